"""Threads that wait at a gate."""

from __future__ import annotations

import threading

import pytest

from d2m_hpc.worker import gate as module
from d2m_hpc.worker.gate import Gate


def test_an_open_gate_lets_all_pass() -> None:
    gate = Gate()
    gate.wait()
    with gate.shut():
        pass
    gate.wait()


def test_a_shut_gate_holds_threads_until_it_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", 3600.0)
    gate, order = Gate(), []

    def pass_through() -> None:
        gate.wait()
        order.append("passed")

    with gate.shut():
        threads = [threading.Thread(target=pass_through) for _ in range(3)]
        for thread in threads:
            thread.start()
        order.append("open")
    for thread in threads:
        thread.join()
    assert order == ["open", *["passed"] * 3]


def test_an_error_of_what_it_is_shut_for_opens_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", 3600.0)
    gate = Gate()
    with pytest.raises(ZeroDivisionError), gate.shut():
        raise ZeroDivisionError
    gate.wait()


def test_threads_wait_no_longer_than_for_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that waits for the GPU must not hold up decoding, however many samples there are."""
    monkeypatch.setattr(module, "PATIENCE", 0.05)
    gate, waits = Gate(), []
    original = gate._open.wait
    monkeypatch.setattr(
        gate._open, "wait", lambda timeout: (waits.append(timeout), original(timeout))
    )
    with gate.shut():
        for _ in range(100):
            gate.wait()
    assert len(waits) == 100
    assert max(waits[1:]) < 0.05
    assert waits[-1] == 0.0
