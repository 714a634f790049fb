"""Seconds by stage, as records tell them."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from d2m_hpc.worker.work import Clock


def test_what_is_timed_adds_up_whatever_is_raised() -> None:
    clock = Clock()
    for _ in range(2):
        with suppress(KeyError), clock("decode"):
            time.sleep(0.02)
            raise KeyError
    assert clock.seconds["decode"] >= 0.04


def test_a_block_within_another_is_not_counted_twice() -> None:
    """Also of another shard, which then is not charged for the block around it."""
    clock, other = Clock(), Clock()
    began = time.perf_counter()
    with clock("compute"):
        with clock("wait"):
            time.sleep(0.1)
        with suppress(KeyError), other("compute"):
            with other("wait"):
                time.sleep(0.03)
            time.sleep(0.05)
            raise KeyError
        time.sleep(0.02)
    with clock("write"):
        time.sleep(0.02)
    whole = time.perf_counter() - began
    assert clock.seconds["wait"] >= 0.1
    assert clock.seconds["compute"] >= 0.02
    assert clock.seconds["write"] >= 0.02
    assert (other.seconds["wait"] >= 0.03, other.seconds["compute"] >= 0.05) == (True, True)
    assert sum((*clock.seconds.values(), *other.seconds.values())) <= whole


def test_no_thread_s_seconds_are_lost() -> None:
    clock = Clock()
    with ThreadPoolExecutor(8) as pool:
        for _ in range(2000):
            pool.submit(clock.add, "decode", 0.001)
    assert clock.rounded() == {"decode": 2.0}


def test_laps_tell_what_was_waited_of_their_time() -> None:
    clock = Clock()
    clock.lap()
    laps = []
    for waits in (0.03, 0.0):
        with clock("wait"):
            time.sleep(waits)
        time.sleep(0.01)
        laps.append(clock.lap())
    (worked, waited), later = laps
    assert waited >= 0.03
    assert worked >= waited + 0.01
    assert later[0] >= later[1] + 0.01
