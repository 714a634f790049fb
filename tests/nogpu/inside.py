"""Call functions of tests in forks of this process, as lines on its input say."""

from __future__ import annotations

import ctypes
import json
import os
import runpy
import sys
import traceback

import torch  # noqa: F401  (once, for all forks)

from d2m_hpc.worker import task  # noqa: F401


class Gpu:
    """The devices of this process, which compute nothing."""

    def __init__(self, devices: int, memory: int) -> None:
        self._library = ctypes.CDLL(None)
        self._library.nogpu_setup(devices, ctypes.c_size_t(memory))

    def count(self, what: str) -> int:
        """Calls of a function of CUDA since `reset`; `kernel` for all launches, `wait` for all that
        wait for the device, `pinned bytes` as they are now."""
        found: int = self._library.nogpu_count(what.encode())
        return found

    def reset(self) -> None:
        self._library.nogpu_reset()

    def has_context(self, device: int) -> bool:
        return bool(self._library.nogpu_has_context(device) & 0xFF)

    def die_after(self, launches: int) -> None:
        """From then on, all that uses a device fails."""
        self._library.nogpu_die_after(ctypes.c_long(launches))


def _answer(to: int, line: str) -> None:
    path, name, arguments, devices, memory = json.loads(line)
    try:
        function = runpy.run_path(path, run_name="inside")[name]
        told = {"made": function(Gpu(devices, memory), *arguments)}
    except Exception:
        told = {"failed": traceback.format_exc()}
    os.write(to, (json.dumps(told) + "\n").encode())


def main() -> None:
    answers = os.dup(1)
    os.dup2(2, 1)
    for line in sys.stdin:
        if not (pid := os.fork()):
            _answer(answers, line)
            os._exit(0)
        if ended := os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
            os.write(answers, (json.dumps({"ended": ended}) + "\n").encode())


if __name__ == "__main__":
    main()
