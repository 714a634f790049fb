"""Files named by -o: replaced where they are files, written into where they are not."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

from d2m_hpc.errors import ConfigError
from d2m_hpc.storage.asked_for import make_folder, require_writable, write


def test_a_device_is_written_into_and_stays_one(tmp_path: Path) -> None:
    path, full = tmp_path / "null", tmp_path / "full"
    try:
        os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 3))
        os.mknod(full, 0o600 | stat.S_IFCHR, os.makedev(1, 7))
        path.open("rb").close()
    except OSError:
        pytest.skip("devices are root's to make")
    for device in (path, full):
        require_writable(device)
    write(path, [b"page"])
    with pytest.raises(ConfigError, match="full cannot be written: No space left"):
        write(full, [b"page"])
    assert stat.S_ISCHR(path.stat().st_mode)
    assert stat.S_ISCHR(full.stat().st_mode)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full", "null"]


def test_a_pipe_is_written_into(tmp_path: Path) -> None:
    os.mkfifo(path := tmp_path / "pipe")
    require_writable(path)
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(path.read_bytes()))
    reader.start()
    write(path, [b"a ", b"page"])
    reader.join()
    assert got == [b"a page"]
    assert stat.S_ISFIFO(path.stat().st_mode)


@pytest.mark.parametrize("there", [True, False])
def test_what_a_link_leads_to_is_replaced(there: bool, tmp_path: Path) -> None:
    (tmp_path / "to").mkdir()
    if there:
        (tmp_path / "to" / "r.html").write_text("before")
    (link := tmp_path / "r.html").symlink_to("to/r.html")
    require_writable(link)
    write(link, [b"after"])
    assert link.is_symlink()
    assert (tmp_path / "to" / "r.html").read_text() == "after"
    assert [p.name for p in (tmp_path / "to").iterdir()] == ["r.html"]


def test_a_missing_folder_is_named_and_not_made(tmp_path: Path) -> None:
    path = tmp_path / "no" / "x.npy"
    for call in (require_writable, lambda p: write(p, [b""]), lambda p: make_folder(p)):
        with pytest.raises(ConfigError, match=f"there is no folder {tmp_path}/no; make it"):
            call(path)
    assert not (tmp_path / "no").exists()
    (link := tmp_path / "l").symlink_to("no/x.npy")
    with pytest.raises(ConfigError, match=f"there is no folder {tmp_path}/no; make it"):
        require_writable(link)
    make_folder(tmp_path / "new")
    require_writable(tmp_path / "new" / "x.npy")
