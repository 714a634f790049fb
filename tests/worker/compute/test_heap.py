"""Free memory between what is held goes back to the system, and nothing else changes."""

from __future__ import annotations

import subprocess
import sys

import pytest

BLOCK, BLOCKS = 1 << 20, 300
FRAGMENTED = f"""
from d2m_hpc.worker.compute.heap import Heap, _resident
del [bytearray(30 << 20)][:]  # from now on, smaller blocks share the heap
heap = Heap(growth={{growth}}, pause={{pause}})
heap.tidy()
held, large = [], []
for _ in range({BLOCKS}):
    large.append(bytearray({BLOCK}))
    large[-1][::4096] = bytes({BLOCK} // 4096)
    held.append(bytearray(b"y" * 40_000))  # more in all than is free below
full = _resident()
del large
before = _resident()
heap.tidy()
heap.tidy()
assert all(block == b"y" * 40_000 for block in held)
print((full - before) >> 20, (full - _resident()) >> 20)
"""


@pytest.mark.parametrize(
    ("growth", "pause", "given_back"), [(64 << 20, 0.0, 1), (1 << 30, 0.0, 0), (64 << 20, 60.0, 0)]
)
def test_gaps_are_given_back_where_a_process_has_grown(
    growth: int, pause: float, given_back: int
) -> None:
    code = FRAGMENTED.format(growth=growth, pause=pause)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    freed, tidied = map(int, done.stdout.split())
    assert freed < 30  # the C library keeps it
    assert (tidied > 250) == bool(given_back)


KEPT = f"""
from d2m_hpc.worker.compute.heap import Heap, _resident, keep_freed
keep_freed()
heap = Heap(growth=64 << 20, pause=0.0)
heap.tidy()
before = _resident()
large = [bytearray(b"x" * {BLOCK}) for _ in range({BLOCKS})] + [bytearray(b"x" * (31 << 20))]
del large
kept = _resident() - before
heap.tidy()
print(kept >> 20, (_resident() - before) >> 20)
"""


def test_freed_memory_is_kept_for_the_next_block_and_bounded() -> None:
    done = subprocess.run([sys.executable, "-c", KEPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kept, left = map(int, done.stdout.split())
    assert kept > 300
    assert left < 32
