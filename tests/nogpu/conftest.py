"""A process with CUDA, in which nothing computes (`runtime.cpp`), and calls of functions there."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

HERE = Path(__file__).parent
ASKING = re.compile("cuda|python")
"""Libraries of torch that call CUDA's."""
CALLED = re.compile(r" U ((?:__)?cu(?:da|blas|dnn)\w+)")
DEFINED = re.compile(r" T (\w+)")
SUCCESS = 'extern "C" __attribute__((weak)) long {}() {{ return 0; }}\n'


class Ended(NamedTuple):
    """A process without a result.

    Attributes:
        code: its exit code, or negative the signal.
    """

    code: int


@pytest.fixture(scope="session")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library, under the name of the driver's, which torch loads by itself."""
    if missing := [tool for tool in ("g++", "nm") if not shutil.which(tool)]:
        pytest.skip(f"needs {missing[0]}")
    site = Path(torch.__file__).parents[1]
    includes = [site / "nvidia/cu13/include", site / "triton/backends/nvidia/include"]
    if not (includes[0] / "cuda_runtime_api.h").exists():
        pytest.skip("needs a torch for CUDA 13")
    folder = tmp_path_factory.mktemp("nogpu")
    headers = [f"-I{path}" for path in includes]
    _run("g++", "-O1", "-fPIC", "-std=c++17", *headers, "-c", HERE / "runtime.cpp", cwd=folder)
    libraries = [f for f in (site / "torch" / "lib").glob("*.so") if ASKING.search(f.name)]
    called = _run("nm", "-D", "--undefined-only", *libraries, cwd=folder)
    defined = DEFINED.findall(_run("nm", "runtime.o", cwd=folder))
    others = sorted({*CALLED.findall(called)} - {*defined})
    (folder / "others.cpp").write_text("".join(map(SUCCESS.format, others)))
    library = folder / "libcuda.so.1"
    names = ("-Wl,-soname,libcuda.so.1", "-o", library)
    _run("g++", "-shared", "-fPIC", "others.cpp", "runtime.o", *names, cwd=folder)
    return library


def _run(*command: str | Path, cwd: Path) -> str:
    return subprocess.run(command, cwd=cwd, check=True, stdout=subprocess.PIPE, text=True).stdout


@pytest.fixture(scope="session")
def environment(runtime: Path) -> dict[str, str]:
    """Variables of a process with such a CUDA."""
    variables = {
        **os.environ,
        "LD_PRELOAD": str(runtime),
        "LD_LIBRARY_PATH": str(runtime.parent),
        "TORCH_CUDNN_V8_API_DISABLED": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    variables.pop("CUDA_VISIBLE_DEVICES", None)
    return variables


@pytest.fixture(scope="session")
def nogpu(environment: dict[str, str]) -> Iterator[Callable[..., Any]]:
    """Call a function of a test file in a fork of a process with such a CUDA; give its result.

    It is given an `inside.Gpu` first. Results and arguments are JSON. Where it ends its process,
    the result is `Ended`.
    """
    command = [sys.executable, str(HERE / "inside.py")]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        to, back = process.stdin, process.stdout
        assert to
        assert back

        def call(
            function: Callable[..., Any], *arguments: Any, devices: int = 1, memory: int = 80 << 30
        ) -> Any:
            name = (function.__code__.co_filename, function.__name__)
            print(json.dumps([*name, arguments, devices, memory]), file=to, flush=True)
            told = json.loads(back.readline())
            assert "failed" not in told, told["failed"]
            return told["made"] if "made" in told else Ended(told["ended"])

        yield call
        to.close()
