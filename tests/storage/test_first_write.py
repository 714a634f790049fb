"""Files that the first of many writes."""

from __future__ import annotations

import errno
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from d2m_hpc.storage import first_write

TASKS = 24


def _race(path: Path) -> list[Any]:
    """What each of many got that proposed another value at once."""
    start, found = threading.Barrier(TASKS), []

    def propose(value: int) -> None:
        start.wait()
        found.append(first_write.agree(path, {"type": value}))

    threads = [threading.Thread(target=propose, args=(i,)) for i in range(TASKS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_of_many_at_once_one_is_taken_by_all(tmp_path: Path) -> None:
    for number in range(10):
        path = tmp_path / "schema" / f"{number}.json"
        found = _race(path)
        assert len(found) == TASKS
        assert found == [json.loads(path.read_bytes())] * TASKS
    assert len(list((tmp_path / "schema").iterdir())) == 10


def test_without_hard_links_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    found = _race(tmp_path / "a.json")
    assert found == [json.loads((tmp_path / "a.json").read_bytes())] * TASKS


def test_a_link_that_was_made_and_told_as_failed_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An NFS server's answer may be lost; the client asks again, and hears that it is there."""
    link = os.link

    def lose_answer(source: Any, target: Any) -> None:
        link(source, target)
        raise FileExistsError(errno.EEXIST, "File exists")

    monkeypatch.setattr(os, "link", lose_answer)
    assert first_write.agree(tmp_path / "a.json", [1]) == [1]


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"no folder")
    with pytest.raises(OSError, match="a"):
        first_write.agree(tmp_path / "a" / "b.json", 1)


def test_nothing_is_agreed_on_before_it_is(tmp_path: Path) -> None:
    assert first_write.read(tmp_path / "a.json") is None
