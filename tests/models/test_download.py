"""A checkpoint is fetched whole or not at all, whatever the server does; over real sockets."""

from __future__ import annotations

import hashlib
import http.server
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from flaky import SIZE, Served, serving
from kit import CHECKPOINTS

from d2m_hpc.errors import WeightsError
from d2m_hpc.models import download
from d2m_hpc.models.published import Checkpoint
from d2m_hpc.models.weights import fetch

HALF = SIZE // 2


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setattr(download, "PAUSE_SECONDS", 0.01)
    with serving() as running:
        yield running


def _checkpoint(served: Served, sha256: str | None = None) -> Checkpoint:
    return Checkpoint("net.pt", f"{served.url}/net.pt", served.sha256 if sha256 is None else sha256)


def _names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.rglob("*") if p.is_file())


def _broken(served: Served, folder: Path, sha256: str | None = None) -> None:
    """A fetch that ended after half of the file; the server is well again."""
    served.ways = ["breaks", "absent"]
    with pytest.raises(WeightsError, match=r"404 .*; check the URL"):
        fetch(_checkpoint(served, sha256), folder)
    assert (folder / "net.pt.part").stat().st_size == HALF
    served.ways, served.ranges, served.paths = ["right"], [], []


@pytest.mark.parametrize("way", ["right", "unsized", "whole"])
def test_a_file_that_is_right_appears_under_its_name(
    way: str, served: Served, awkward_path: Path
) -> None:
    served.ways = [way]
    checkpoint = Checkpoint("folder/net.pt", f"{served.url}/net.pt", served.sha256)
    found = fetch(checkpoint, awkward_path)
    assert (found.path, found.state) == (awkward_path / "folder/net.pt", "ok")
    assert found.path.read_bytes() == served.content
    assert _names(awkward_path) == ["net.pt"]


# --- a transfer that breaks off ---


@pytest.mark.parametrize("way", ["breaks", "hangs"])
def test_it_goes_on_where_it_broke_off(
    way: str, served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "TIMEOUT_SECONDS", 1.0)
    served.ways = [way, "slams", "breaks", "ill", "right"]
    fetch(_checkpoint(served), tmp_path)
    assert (tmp_path / "net.pt").read_bytes() == served.content
    assert served.ranges[:3] == [None, f"bytes={HALF}-", f"bytes={HALF}-"]
    assert served.ranges[4] == f"bytes={HALF + HALF // 2}-"
    assert _names(tmp_path) == ["net.pt"]


def test_progress_starts_at_what_is_there_and_ends_at_the_whole(
    served: Served, tmp_path: Path
) -> None:
    told: list[tuple[int, int | None]] = []
    served.ways = ["breaks", "right"]
    fetch(_checkpoint(served), tmp_path, on_bytes=lambda done, total: told.append((done, total)))
    assert told == sorted(told)
    assert told.count((HALF, SIZE)) == 2  # the end of the first try, the start of the second
    assert told[-1] == (SIZE, SIZE)


def test_the_next_call_goes_on_too(served: Served, tmp_path: Path) -> None:
    served.ways = ["breaks", "slams"]
    with pytest.raises(WeightsError, match=r"no proper answer.*try again, or copy to .*net\.pt"):
        fetch(_checkpoint(served), tmp_path)
    assert _names(tmp_path) == ["net.pt.part", "net.pt.part.from"]
    served.ways = ["right"]
    fetch(_checkpoint(served), tmp_path)
    assert (tmp_path / "net.pt").read_bytes() == served.content
    assert set(served.ranges[1:]) == {f"bytes={HALF}-"}


def test_it_goes_on_for_as_long_as_it_gets_further(served: Served, tmp_path: Path) -> None:
    served.ways = ["breaks"] * (3 * download.TRIES) + ["right"]
    fetch(_checkpoint(served), tmp_path)
    assert (tmp_path / "net.pt").read_bytes() == served.content
    assert len(served.ranges) == 3 * download.TRIES + 1


@pytest.mark.parametrize(
    ("way", "requests"),
    [("whole_breaks", download.TRIES), ("ill", download.TRIES), ("slams", download.TRIES)],
)
def test_it_gives_up_where_it_gets_no_further(
    way: str, requests: int, served: Served, tmp_path: Path
) -> None:
    served.ways = [way]
    with pytest.raises(WeightsError, match=r"broke off|503|answer"):
        fetch(_checkpoint(served), tmp_path)
    assert len(served.ranges) == requests


def test_pauses_grow(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(download.time, "sleep", pauses.append)
    monkeypatch.setattr(download, "PAUSE_SECONDS", 1.0)
    served.ways = ["ill"]
    with pytest.raises(WeightsError):
        fetch(_checkpoint(served), tmp_path)
    assert len(pauses) == download.TRIES - 1
    assert all(0.5 <= pause / 2**n <= 1.5 for n, pause in enumerate(pauses))


def test_a_server_that_ignores_ranges_starts_anew(served: Served, tmp_path: Path) -> None:
    served.ways = ["breaks", "whole"]
    fetch(_checkpoint(served), tmp_path)
    assert (tmp_path / "net.pt").read_bytes() == served.content
    assert served.ranges == [None, f"bytes={HALF}-"]


# --- nothing is glued together ---


def test_a_file_that_changed_between_two_tries_is_fetched_anew(
    served: Served, tmp_path: Path
) -> None:
    """Without a published hash, too: only the versions tell."""
    _broken(served, tmp_path, "")
    served.change()
    fetch(_checkpoint(served, ""), tmp_path)
    assert (tmp_path / "net.pt").read_bytes() == served.content


def test_a_range_of_another_version_is_refused(served: Served, tmp_path: Path) -> None:
    _broken(served, tmp_path, "")
    served.change()
    served.ways = ["deaf", "right"]
    fetch(_checkpoint(served, ""), tmp_path)
    assert (tmp_path / "net.pt").read_bytes() == served.content
    assert served.ranges == [f"bytes={HALF}-", None]


def test_a_part_of_an_unknown_version_is_not_gone_on_with(served: Served, tmp_path: Path) -> None:
    served.ways = ["anonymous_breaks", "right"]
    fetch(_checkpoint(served, ""), tmp_path)
    assert served.ranges == [None, None]
    assert (tmp_path / "net.pt").read_bytes() == served.content


def test_a_part_from_elsewhere_is_not_gone_on_with(served: Served, tmp_path: Path) -> None:
    _broken(served, tmp_path)
    fetch(_checkpoint(served), tmp_path, mirror=f"{served.url}/mirror")
    assert (served.ranges, served.paths) == ([None], ["/mirror/net.pt"])


def test_another_range_than_asked_for_is_refused(served: Served, tmp_path: Path) -> None:
    served.ways = ["breaks", "elsewhere", "right"]
    fetch(_checkpoint(served, ""), tmp_path)
    assert (tmp_path / "net.pt").read_bytes() == served.content
    assert served.ranges == [None, f"bytes={HALF}-", None]


def test_a_server_that_keeps_its_tag_for_another_file_costs_one_more_download(
    served: Served, tmp_path: Path
) -> None:
    _broken(served, tmp_path)
    served.change_content()
    fetch(_checkpoint(served), tmp_path)
    assert (tmp_path / "net.pt").read_bytes() == served.content
    assert served.ranges == [f"bytes={HALF}-", None]


def test_a_file_that_became_shorter_than_the_part_is_fetched_anew(
    served: Served, tmp_path: Path
) -> None:
    _broken(served, tmp_path)
    served.content = served.content[:1000]
    fetch(_checkpoint(served), tmp_path)
    assert (tmp_path / "net.pt").read_bytes() == served.content


@pytest.mark.parametrize("origin", [b"", b"[", b"[]", b'{"a": 1}', b"\xff", b"3"])
def test_a_damaged_note_of_the_version_starts_anew(
    origin: bytes, served: Served, tmp_path: Path
) -> None:
    (tmp_path / "net.pt.part").write_bytes(b"something")
    (tmp_path / "net.pt.part.from").write_bytes(origin)
    fetch(_checkpoint(served), tmp_path)
    assert (tmp_path / "net.pt").read_bytes() == served.content
    assert _names(tmp_path) == ["net.pt"]


# --- what is not the file ---


@pytest.mark.parametrize(
    ("way", "reason", "kept"),
    [
        ("short", "sent a file of sha256 [0-9a-f]{64}, published is", False),
        ("long", rf"broke off after {SIZE} of {SIZE + 1000} bytes", True),
        ("huge", "GB free of 10000000.0 GB that are needed", False),
        ("nonsense", "sent a file of sha256", False),
        ("wrong", "sent a file of sha256 [0-9a-f]{64}, published is", False),
        ("empty", "broke off after 0 of", False),
        ("chunk", "broke off", True),
        ("page", "sent a web page instead of the file", False),
        ("garbled", "no proper answer", False),
        ("absent", "404 Not Found", False),
        ("moved", "302 .*redirect", False),
    ],
)
def test_a_file_that_is_not_right_never_appears(
    way: str, reason: str, kept: bool, served: Served, tmp_path: Path
) -> None:
    served.ways = [way]
    with pytest.raises(WeightsError, match=rf"{served.url}/net\.pt.*{reason}") as caught:
        fetch(_checkpoint(served), tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "net.pt").exists()
    part = tmp_path / "net.pt.part"
    assert (part.exists() and part.stat().st_size > 0) == kept


@pytest.mark.parametrize("way", ["whole_breaks", "chunk", "page", "empty", "long"])
def test_that_is_noticed_without_a_published_hash(way: str, served: Served, tmp_path: Path) -> None:
    served.ways = [way]
    with pytest.raises(WeightsError, match=r"try again, or copy to .*net\.pt"):
        fetch(_checkpoint(served, ""), tmp_path)
    assert not (tmp_path / "net.pt").exists()


def test_a_web_page_on_the_way_costs_nothing_of_what_has_arrived(
    served: Served, tmp_path: Path
) -> None:
    served.ways = ["breaks", "page"]
    with pytest.raises(WeightsError, match="web page"):
        fetch(_checkpoint(served), tmp_path)
    assert (tmp_path / "net.pt.part").read_bytes() == served.content[:HALF]


def test_a_server_that_is_not_there_is_named_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(download.time, "sleep", pauses.append)
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as closed:
        url = f"http://127.0.0.1:{closed.server_port}/right"
    with pytest.raises(WeightsError, match=f"{url}: the server cannot be reached: .*refused"):
        fetch(Checkpoint("net.pt", url), tmp_path)
    assert not pauses


def test_a_server_that_never_answers_is_given_up(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "TIMEOUT_SECONDS", 0.05)
    served.ways = ["silent"]
    with pytest.raises(WeightsError, match="no proper answer: timed out"):
        fetch(_checkpoint(served), tmp_path)
    served.over.wait(0.5)  # for the server to have read the last of them
    assert len(served.ranges) == download.TRIES


def test_a_wrong_download_leaves_the_file_that_was_there(served: Served, tmp_path: Path) -> None:
    (tmp_path / "net.pt").write_bytes(b"mine")
    served.ways = ["wrong"]
    with pytest.raises(WeightsError):
        fetch(_checkpoint(served), tmp_path)
    assert (tmp_path / "net.pt").read_bytes() == b"mine"


# --- the disk ---


def test_a_folder_that_cannot_be_made_is_named(served: Served, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    path = tmp_path / "file" / "net.pt"
    with pytest.raises(WeightsError, match=f"{path} cannot be written or read: .*{tmp_path}/file"):
        fetch(_checkpoint(served), tmp_path / "file")
    assert served.ranges == []


FETCH = (
    "import sys; from pathlib import Path; from d2m_hpc.models.weights import *;"
    "sys.stdin.readline();"
    "fetch(Checkpoint('net.pt', sys.argv[1], sys.argv[2]), Path(sys.argv[3]))"
)


def _process(
    served: Served, folder: Path, before: Callable[[], None] | None = None
) -> subprocess.Popen[bytes]:
    """A fetch that waits for a line on its standard input."""
    command = [sys.executable, "-c", FETCH, f"{served.url}/net.pt", served.sha256, str(folder)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stderr=pipe, preexec_fn=before)


def test_a_disk_that_takes_no_more_is_told_and_gone_on_with(served: Served, tmp_path: Path) -> None:
    """The limit on a file's size stands for the disk's."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (HALF, HALF))

    _, errors = _process(served, tmp_path, limit).communicate(b"go\n")
    [last] = errors.decode().splitlines()[-1:]
    assert "net.pt cannot be written or read: [Errno 27] File too large; make room" in last
    fetch(_checkpoint(served), tmp_path)
    assert (tmp_path / "net.pt").read_bytes() == served.content
    assert served.ranges == [None, f"bytes={HALF}-"]


# --- one at a time ---


def test_two_processes_that_fetch_at_once_download_once(served: Served, tmp_path: Path) -> None:
    running = [_process(served, tmp_path) for _ in range(2)]
    for process in running:
        assert process.stdin is not None
        process.stdin.write(b"go\n")
        process.stdin.flush()
    for process in running:
        process.communicate()
    assert [process.returncode for process in running] == [0, 0]
    assert len(served.ranges) == 1
    assert (tmp_path / "net.pt").read_bytes() == served.content
    assert _names(tmp_path) == ["net.pt"]


def test_a_process_that_is_killed_leaves_what_it_had(served: Served, tmp_path: Path) -> None:
    served.ways = ["hangs", "right"]
    process = _process(served, tmp_path)
    assert process.stdin is not None
    process.stdin.write(b"go\n")
    process.stdin.flush()
    part = tmp_path / "net.pt.part"
    while not part.exists() or part.stat().st_size < HALF - download.BLOCK:
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.communicate()
    fetch(_checkpoint(served), tmp_path)
    assert (tmp_path / "net.pt").read_bytes() == served.content
    assert served.ranges[1] is not None
    assert _names(tmp_path) == ["net.pt"]


def test_a_file_that_is_there_and_right_takes_neither_lock_nor_network(
    served: Served, tmp_path: Path
) -> None:
    (tmp_path / "net.pt").write_bytes(served.content)
    (tmp_path / "net.pt.lock").write_text("another process holds it")
    assert fetch(_checkpoint(served, served.sha256[:8]), tmp_path).state == "ok"
    assert served.ranges == []


# --- a mirror, and files of one's own ---


def test_a_mirror_gives_files_under_their_published_names(served: Served, tmp_path: Path) -> None:
    checkpoint = Checkpoint("x base/config.json", "http://127.0.0.1:9/elsewhere", served.sha256)
    found = fetch(checkpoint, tmp_path, mirror=f"{served.url}/weights/")
    assert found.path.read_bytes() == served.content
    assert served.paths == ["/weights/x%20base/config.json"]


@pytest.mark.parametrize("mirror", ["weights.site/d2m", "file:///weights", "/weights"])
def test_a_mirror_that_is_no_url_is_refused(mirror: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"valid is http"):
        fetch(CHECKPOINTS["scrfd_10g.pt"], tmp_path, mirror)


def test_a_mirror_s_own_file_is_taken_only_where_the_config_allows_it(
    served: Served, tmp_path: Path
) -> None:
    published = Checkpoint("net.pt", f"{served.url}/published", "0" * 64)
    with pytest.raises(WeightsError, match="allow_unpublished_weights: true accepts what a mirror"):
        fetch(published, tmp_path, served.url)
    with pytest.raises(WeightsError, match="sent a file of sha256"):
        fetch(published, tmp_path, allow_unpublished=True)  # the publisher has no other
    found = fetch(published, tmp_path, served.url, allow_unpublished=True)
    assert (found.state, found.sha256) == ("not the published file", served.sha256)


def test_a_file_of_one_s_own_stays_where_the_config_allows_it(
    served: Served, tmp_path: Path
) -> None:
    (tmp_path / "net.pt").write_bytes(b"mine")
    found = fetch(_checkpoint(served), tmp_path, allow_unpublished=True)
    assert found.sha256 == hashlib.sha256(b"mine").hexdigest()
    assert (tmp_path / "net.pt").read_bytes() == b"mine"
    assert served.ranges == []


def test_what_is_noted_of_a_part_is_its_url_and_version(served: Served, tmp_path: Path) -> None:
    part = download.PartialFile(tmp_path / "a.part")
    part.begin("http://a", '"v1"')
    assert json.loads((tmp_path / "a.part.from").read_text()) == ["http://a", '"v1"']
    assert part.version("http://a") == ""  # an empty file is a part of nothing
    part.path.write_bytes(b"x")
    assert part.version("http://a") == '"v1"'
    assert part.version("http://b") == ""
