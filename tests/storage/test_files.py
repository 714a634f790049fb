"""Files that are synced while they are written."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from threading import Event

import pytest

from d2m_hpc.storage import files


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "SYNC_SECONDS", 0)


def test_files_are_synced_while_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, real, path = Event(), os.fsync, tmp_path / "whole"

    def fsync(fd: int) -> None:
        real(fd)
        if os.readlink(f"/proc/self/fd/{fd}") == str(path):
            synced.set()

    monkeypatch.setattr(os, "fsync", fsync)
    with files.synced_along(lambda: [path, tmp_path / "gone"]):
        assert not synced.is_set()
        path.write_bytes(b"some")
        assert synced.wait(60)


def test_a_disk_that_fails_meanwhile_is_told_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = Event()

    def fsync(fd: int) -> None:
        failed.set()
        raise OSError(errno.EIO, "the disk fails")

    monkeypatch.setattr(os, "fsync", fsync)
    with (
        pytest.raises(OSError, match="the disk fails") as raised,
        files.synced_along(lambda: [tmp_path]),
    ):
        assert failed.wait(60)
    assert raised.value.filename == str(tmp_path)
