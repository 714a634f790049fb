"""The machine that figures were taken on, and whether others were using it."""

from __future__ import annotations

import os
import platform
import resource
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

BUSY = 0.2
"""Share of all cores in other hands from which on timings are not to be trusted."""


class Watch:
    """Describes the machine, and counts who used its cores meanwhile."""

    def __init__(self) -> None:
        self._load = os.getloadavg()[0]
        self._started = time.monotonic()
        self._all, self._own = _busy_seconds(), _own_seconds()

    def describe(self) -> dict[str, Any]:
        """What a reader must know to judge the figures; the load is the mean of a minute.

        `others` is the mean number of cores that other programs used since the watch began.
        """
        return {
            "cpu": _cpu(),
            "cores": _cores(),
            "load_before": round(self._load, 2),
            "load_after": round(os.getloadavg()[0], 2),
            "others": round(self._others(), 2),
            "python": platform.python_version(),
            "torch": version("torch"),
        }

    def disturbed(self) -> bool:
        """Others had too much of the machine; within a second, the kernel's ticks do not tell."""
        return self._seconds() >= 1 and _too_much(self._others(), _cores())

    def _seconds(self) -> float:
        return time.monotonic() - self._started

    def _others(self) -> float:
        others = (_busy_seconds() - self._all) - (_own_seconds() - self._own)
        return max(0.0, others / self._seconds())


def _too_much(used: float, cores: int) -> bool:
    return used > BUSY * cores


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def warning(machine: dict[str, Any]) -> str:
    """Why figures taken on a machine are doubtful; empty where they are not."""
    if _too_much(machine["others"], machine["cores"]):
        return (
            f"other programs used {machine['others']} of {machine['cores']} cores meanwhile: "
            "the figures are not to be trusted; stop them and run this again"
        )
    return ""


def load_warning() -> str:
    """Why it is no good moment to begin; empty where it is."""
    load, cores = os.getloadavg()[0], _cores()
    if _too_much(load, cores):
        return f"the load average is {load:.2f} on {cores} cores: wait until the machine is quiet"
    return ""


def _busy_seconds() -> float:
    """Of all cores together, since the machine started; what a host takes away counts."""
    user, nice, system, _, _, irq, softirq, steal = map(
        int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    )
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    """Of this process and of those that it started and waited for."""
    usages = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _cpu() -> str:
    """The processor's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
