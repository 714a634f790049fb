"""The share of time in which the GPU computes, as its driver tells."""

from __future__ import annotations

import logging
import threading

from d2m_hpc.run.tasks import Progress

log = logging.getLogger(__name__)

EVERY_SECONDS = 5.0


class Busy:
    """A context that adds looks at a GPU to a task's progress; no task waits or fails for it.

    The looks come at even times, in a thread of their own: after each batch they would miss the
    time in which no batch comes.

    Args:
        gpu: the driver's name of the GPU, such as `GPU-5c9a...`. Drivers tell nothing of parts of a
            GPU (MIG).
    """

    def __init__(self, progress: Progress, gpu: str) -> None:
        self._progress, self._gpu, self._over = progress, gpu, threading.Event()

    def __enter__(self) -> None:
        threading.Thread(target=self._look, name="busy", daemon=True).start()

    def __exit__(self, *_: object) -> None:
        self._over.set()  # without waiting for a driver that hangs

    def _look(self) -> None:
        import pynvml  # nothing on a CPU needs it

        try:
            pynvml.nvmlInit()
            handle = pynvml.nvmlDeviceGetHandleByUUID(self._gpu)
            while not self._over.wait(EVERY_SECONDS):
                self._progress.gpu_busy += pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100
                self._progress.gpu_looks += 1
        except pynvml.NVMLError as error:
            log.info("the driver does not tell how busy %s is: %s", self._gpu, error)
