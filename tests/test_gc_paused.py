"""The garbage collector rests while a plan is made, and afterwards works as before."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from d2m_hpc import stopping
from d2m_hpc.gc_paused import gc_paused


@gc_paused()
def is_collecting() -> bool:
    return gc.isenabled()


def test_nothing_is_collected_meanwhile() -> None:
    assert gc.isenabled()
    assert not is_collecting()
    assert gc.isenabled()


def test_it_goes_on_after_the_outermost() -> None:
    with gc_paused():
        assert not is_collecting()
        assert not gc.isenabled()
    assert gc.isenabled()


def test_it_goes_on_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), gc_paused():
        raise ZeroDivisionError
    assert gc.isenabled()


def test_whoever_had_it_off_keeps_it_off() -> None:
    gc.disable()
    try:
        is_collecting()
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_callers_process_is_not_touched() -> None:
    before = gc.get_freeze_count()
    with gc_paused():
        made = [[i] for i in range(1000)]
    assert gc.get_freeze_count() == before
    assert {id(one) for one in made} < set(map(id, gc.get_objects()))


def test_what_was_made_meanwhile_is_not_gone_through_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a process of a command's own."""
    monkeypatch.setattr(stopping, "_own", True)
    with gc_paused():
        made = [[i] for i in range(1000)]
    try:
        assert not {id(one) for one in made} & set(map(id, gc.get_objects()))
    finally:
        gc.unfreeze()
    assert {id(one) for one in made} < set(map(id, gc.get_objects()))


CYCLE = """
from d2m_hpc.gc_paused import gc_paused
from d2m_hpc.stopping import own_process

own_process()

class Last:
    def __del__(self):
        print("gone")

with gc_paused():
    last = Last()
    last.itself = last
del last
"""


def test_at_exit_it_is_torn_down_as_all_else_is() -> None:
    """Libraries of compiled code, triton's for one, print pages of what they think is leaked."""
    done = subprocess.run([sys.executable, "-c", CYCLE], capture_output=True, text=True, check=True)
    assert done.stdout == "gone\n"
