"""What is on disk of attempts, and what of it counts as one that never ended."""

from __future__ import annotations

from pathlib import Path

import pytest

from d2m_hpc.run.attempts import Attempt, Attempts


@pytest.fixture
def attempts(awkward_path: Path) -> Attempts:
    return Attempts(awkward_path / "attempts")


def test_an_attempt_is_there_from_its_begin_to_its_end(attempts: Attempts) -> None:
    first = Attempt(1, "000-2-0", "node1")
    assert attempts.last("a[b]*") is None
    attempts.begin("a[b]*", first, anew=True)
    assert attempts.last("a[b]*") == first
    assert attempts.unended() == {"a[b]*": first}
    attempts.done("a[b]*")
    assert attempts.last("a[b]*") is None
    attempts.done("a[b]*")


def test_one_that_failed_or_was_given_back_keeps_its_number(attempts: Attempts) -> None:
    attempts.begin("s", Attempt(4, "000-0-0"), anew=True)
    attempts.end("s", Attempt(4, "000-0-0"))
    assert attempts.last("s") == Attempt(4, "000-0-0", ended=True)
    assert attempts.unended() == {}
    attempts.begin("s", Attempt(5, "001-0-0"), anew=False)
    assert attempts.unended() == {"s": Attempt(5, "001-0-0")}


def test_whoever_lost_the_lease_finds_that_another_has_begun(attempts: Attempts) -> None:
    attempts.begin("s", Attempt(1, "000-0-0"), anew=True)
    with pytest.raises(FileExistsError):
        attempts.begin("s", Attempt(1, "000-1-0"), anew=True)
    assert attempts.last("s") == Attempt(1, "000-0-0")


@pytest.mark.parametrize("torn", [b"", b'{"number": 3, "ta', b"[]", b'{"task": "x"}', b"\xff"])
def test_one_whose_line_is_torn_had_not_begun(attempts: Attempts, torn: bytes) -> None:
    attempts.begin("s", Attempt(1), anew=True)
    attempts._path("s").write_bytes(torn)
    assert attempts.last("s") == Attempt(0, ended=True)
    assert attempts.unended() == {}
    attempts.begin("s", Attempt(1), anew=False)
    assert attempts.unended() == {"s": Attempt(1)}


def test_what_a_newer_version_adds_is_left_aside(attempts: Attempts) -> None:
    attempts.begin("s", Attempt(1), anew=True)
    attempts._path("s").write_bytes(b'{"number": 7, "colour": "red"}')
    assert attempts.last("s") == Attempt(7)


def test_what_is_left_of_done_shards_is_dropped(attempts: Attempts) -> None:
    for stem in "abc":
        attempts.begin(stem, Attempt(1), anew=True)
    attempts.drop({"a", "c", "z"})
    assert attempts.unended() == {"b": Attempt(1)}
