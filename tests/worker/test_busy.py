"""The GPU's busy share, by NVIDIA's own Python library over a driver's library made here.

No real driver is asked: the numbers are those of `DRIVER`.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from d2m_hpc.run.tasks import Progress
from d2m_hpc.worker import busy
from d2m_hpc.worker.busy import Busy

NAME = "GPU-00112233-4455-6677-8899-aabbccddeeff"
DRIVER = """
#include <string.h>
int nvmlInitWithFlags(unsigned flags) { return 0; }
int nvmlDeviceGetHandleByUUID(const char* uuid, void** device) {
    *device = (void*)7;
    return strcmp(uuid, "NAME") ? 6 : 0; /* not found */
}
int nvmlDeviceGetUtilizationRates(void* device, unsigned* rates) {
    static int looks = 0;
    rates[0] = ++looks == 1 ? 100 : 50, rates[1] = 3;
    return device == (void*)7 && looks < 5 ? 0 : 15; /* the GPU is lost */
}
const char* nvmlErrorString(int code) { return "told by the driver"; }
"""


@pytest.fixture
def driver(tmp_path: Path) -> Path:
    pytest.importorskip("pynvml")
    if not shutil.which("gcc"):
        pytest.skip("needs gcc")
    library = tmp_path / "libnvidia-ml.so.1"
    command = ("gcc", "-shared", "-fPIC", "-x", "c", "-", f"-Wl,-soname,{library.name}")
    subprocess.run(
        [*command, "-o", library], input=DRIVER.replace("NAME", NAME), text=True, check=True
    )
    return library


def looked(driver: Path | None, gpu: str) -> list[float]:
    """The sum and number of looks by a process of its own, which keeps the library."""
    read, write = os.pipe()
    if not (pid := os.fork()):
        if driver:
            ctypes.CDLL(str(driver))  # found by its name from now on
        busy.EVERY_SECONDS = 0.01
        progress = Progress("000-0-0")
        with Busy(progress, gpu):
            end = time.monotonic() + (5 if driver and gpu == NAME else 0.2)
            while progress.gpu_looks < 4 and time.monotonic() < end:
                time.sleep(0.01)
        os.write(write, json.dumps([progress.gpu_busy, progress.gpu_looks]).encode())
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    os.close(write)
    with os.fdopen(read) as said:
        found: list[float] = json.load(said)
    return found


def test_looks_at_a_gpu_are_added_up(driver: Path) -> None:
    assert looked(driver, NAME) == [2.5, 4]  # and the look that failed ends them


def test_a_driver_that_is_away_or_knows_no_such_gpu_ends_no_task(driver: Path) -> None:
    assert looked(driver, "GPU-other") == [0, 0]
    assert looked(None, NAME) == [0, 0]
