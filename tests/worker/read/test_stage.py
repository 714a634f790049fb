"""A tar comes to the node whole, whatever the store, the server or the command does on the way."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import re
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import kit
import pyarrow as pa
import pytest
import s3
from kit import write_tar

from d2m_hpc.errors import ShardError
from d2m_hpc.run.records import Shard
from d2m_hpc.storage import stores
from d2m_hpc.worker.read import stage as module
from d2m_hpc.worker.read.scratch import Scratch
from d2m_hpc.worker.read.shard import Archive
from d2m_hpc.worker.read.stage import stage

Members = list[tuple[str, bytes]]


def tar_bytes(members: Members) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "xz": lzma.compress,
    "bzip2": bz2.compress,
    "zstd": partial(pa.compress, codec="zstd", asbytes=True),
}
THREE = [(f"{k}.{e}", f"{k}{e}".encode() * 5) for k in "abc" for e in ("jpg", "json", "txt")]


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Scratch]:
    """Empty after every test."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    yield Scratch(folder, sys.maxsize)
    assert list(folder.iterdir()) == []


def read_all(url: str, scratch: Scratch) -> tuple[list[str], str]:
    """The keys of a shard, and how it is damaged."""
    with stage(Shard("stem", url), scratch) as staged, closing(Archive(staged.path)) as archive:
        index = archive.index()
        keys = [s.key for s in index]
        return keys, staged.damage or index.cut


def test_a_plain_local_tar_is_read_in_its_place(tmp_path: Path, scratch: Scratch) -> None:
    path = write_tar(tmp_path / "a.tar", THREE)
    with stage(Shard("a", str(path)), scratch) as staged:
        assert staged.path == path
        assert list(scratch.folder.iterdir()) == []
    assert path.exists()


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.tar", "a::b.tar.gz", "{x} [y]*.tar.gz"])
@pytest.mark.parametrize("codec", COMPRESS)
def test_a_compressed_tar_is_known_by_its_content(
    awkward_path: Path, scratch: Scratch, name: str, codec: str
) -> None:
    path = awkward_path / name
    path.write_bytes(COMPRESS[codec](tar_bytes(THREE)))
    assert read_all(str(path), scratch) == (["a", "b", "c"], "")
    assert path.exists()


@pytest.mark.parametrize("codec", COMPRESS)
def test_a_stream_of_many_parts_is_read_to_its_end(
    tmp_path: Path, scratch: Scratch, codec: str
) -> None:
    data, path, compress = tar_bytes(THREE), tmp_path / "a.tar.gz", COMPRESS[codec]
    path.write_bytes(compress(data[:3000]) + compress(data[3000:]))
    assert read_all(str(path), scratch) == (["a", "b", "c"], "")


@pytest.mark.parametrize(
    "command",
    [
        "xz --lzma2=preset=0,dict=512MiB --memlimit=0",
        "(xz -0; xz --lzma2=preset=0,dict=512MiB --memlimit=0 < {tar})",
        "zstd -1 --long=30",
    ],
)
def test_a_stream_that_takes_much_memory_is_refused_and_not_called_damaged(
    tmp_path: Path, scratch: Scratch, command: str
) -> None:
    tar = write_tar(tmp_path / "a.tar", THREE)
    Path("/proc/self/clear_refs").write_text("5")  # what this process holds now is its peak
    before = kit.peak()
    with pytest.raises(ShardError, match=r"stem\.tar: .* 256 MiB of memory; compress it"):
        read_all(f"pipe:{command.format(tar=tar)} < {tar}", scratch)
    assert kit.peak() - before < 300e6


def test_what_follows_an_xz_stream_is_padding_and_a_stream_that_ends_early_is_cut(
    tmp_path: Path, scratch: Scratch
) -> None:
    path, data = tmp_path / "a.tar", lzma.compress(tar_bytes(THREE))
    for padding in (bytes(4), bytes(512), b"anything" * 4):
        path.write_bytes(data + padding)
        assert read_all(str(path), scratch) == (["a", "b", "c"], "")
    path.write_bytes(data[:-12])
    assert "in the xz stream" in read_all(str(path), scratch)[1]


@pytest.mark.parametrize("first", ["BZh9", "BZh91AY&S", "(", "\x1fx"])
def test_a_tar_may_begin_with_a_name_like_a_compressed_one(
    tmp_path: Path, scratch: Scratch, first: str
) -> None:
    path = write_tar(tmp_path / "a.tar", {f"{first}.txt": b"x"})
    assert read_all(str(path), scratch) == ([first], "")


@pytest.mark.parametrize("compress", [bytes, *COMPRESS.values()])
def test_urls_are_copied(scratch: Scratch, compress: Any) -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe("/bucket/a.tar", compress(tar_bytes(THREE)))
    assert read_all("memory://bucket/a.tar", scratch) == (["a", "b", "c"], "")
    fs.rm("/bucket/a.tar")


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_commands_are_run_in_a_shell(awkward_path: Path, scratch: Scratch, mode: str) -> None:
    write_tar(awkward_path / "a.tar", THREE, mode=mode)
    command = 'pipe:cat "$D/a.tar" | cat'
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("D", str(awkward_path))
        assert read_all(command, scratch) == (["a", "b", "c"], "")


@pytest.mark.parametrize("url", ["/no/such.tar", "/no/such.tar.gz", "memory://no/such.tar"])
def test_a_missing_file_is_an_error_of_the_shard_that_names_it(scratch: Scratch, url: str) -> None:
    with pytest.raises(ShardError, match=r"such\.tar.*[Nn]o such file"):
        read_all(url, scratch)


def test_a_folder_is_an_error_of_the_shard(tmp_path: Path, scratch: Scratch) -> None:
    with pytest.raises(ShardError, match="directory"):
        read_all(str(tmp_path), scratch)


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("false", "exit code 1"),
        ("exit 7", "exit code 7"),
        ("no-such-command", "not found"),
        ("cat {tar}; echo went wrong >&2; exit 3", "exit code 3.*went wrong"),
        ("(cat {tar}; false) | cat", "exit code 1"),
        ("gzip -c {tar}; false", "exit code 1"),
    ],
)
def test_a_command_that_fails_fails_the_shard_whatever_it_wrote(
    tmp_path: Path, scratch: Scratch, command: str, says: str
) -> None:
    tar = write_tar(tmp_path / "a.tar", THREE)
    with pytest.raises(ShardError, match=says):
        read_all("pipe:" + command.format(tar=tar), scratch)


def test_a_command_may_write_much_to_stderr(tmp_path: Path, scratch: Scratch) -> None:
    tar = write_tar(tmp_path / "a.tar", THREE)
    noise = "yes warning | head -c 300000 >&2"
    assert read_all(f"pipe:{noise}; cat {tar}", scratch) == (["a", "b", "c"], "")
    with pytest.raises(ShardError, match=r"the end of it$") as raised:
        read_all(f"pipe:{noise}; cat {tar}; echo the end of it >&2; exit 5", scratch)
    assert len(str(raised.value)) < 5000


def test_a_plain_tar_cut_in_a_pipe_is_cut(tmp_path: Path, scratch: Scratch) -> None:
    tar = write_tar(tmp_path / "a.tar", THREE)
    keys, cut = read_all(f"pipe:head -c 5000 {tar}", scratch)
    assert keys == ["a"]
    assert cut.startswith("at byte")


@pytest.mark.parametrize("codec", COMPRESS)
def test_a_stream_cut_anywhere_is_reported(tmp_path: Path, scratch: Scratch, codec: str) -> None:
    data, path = COMPRESS[codec](tar_bytes(THREE)), tmp_path / "a.tar.gz"
    for size in range(len(data)):
        path.write_bytes(data[:size])
        keys, damage = read_all(str(path), scratch)
        assert damage, size
        assert keys == ["a", "b", "c"][: len(keys)]


@pytest.mark.parametrize("codec", ["gzip", "xz", "bzip2"])  # zstd's checksum is an option
def test_a_stream_with_a_flipped_byte_is_reported(
    tmp_path: Path, scratch: Scratch, codec: str
) -> None:
    data, path = bytearray(COMPRESS[codec](tar_bytes(THREE))), tmp_path / "a.tar"
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)
    _, damage = read_all(str(path), scratch)
    assert re.match(f"in the {codec} stream, after \\d+ bytes of tar: .", damage)


@pytest.mark.parametrize("codec", COMPRESS)
def test_a_command_that_fails_behind_a_compressed_stream_is_its_own_error(
    tmp_path: Path, scratch: Scratch, codec: str
) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(COMPRESS[codec](tar_bytes(THREE)))
    with pytest.raises(ShardError, match="exit code 9"):
        read_all(f"pipe:cat {path}; exit 9", scratch)


@pytest.mark.parametrize("from_end", [1, 8])
def test_a_gzip_with_a_wrong_checksum_or_length_is_reported(
    tmp_path: Path, scratch: Scratch, from_end: int
) -> None:
    data, path = bytearray(gzip.compress(tar_bytes(THREE))), tmp_path / "a.tar.gz"
    data[-from_end] ^= 1
    path.write_bytes(data)
    _, damage = read_all(str(path), scratch)
    assert damage.startswith("in the gzip stream, after ")


def test_a_broken_gzip_from_a_command_is_damage_not_a_failure_of_the_command(
    tmp_path: Path, scratch: Scratch
) -> None:
    path = tmp_path / "a.tar.gz"
    path.write_bytes(gzip.compress(tar_bytes(THREE))[:-8] + b"x" * 3_000_000)
    _, damage = read_all(f"pipe:cat {path}", scratch)
    assert damage.startswith("in the gzip stream, after ")


def test_an_error_while_a_shard_is_used_still_drops_the_copy(
    tmp_path: Path, scratch: Scratch
) -> None:
    path = write_tar(tmp_path / "a.tar.gz", THREE, mode="w:gz")
    staging = stage(Shard("a", str(path)), scratch)
    assert staging.__enter__().path.parent == scratch.folder
    error = ZeroDivisionError("of whoever uses it")
    assert not staging.__exit__(ZeroDivisionError, error, None)


# --- a command that hangs ---


@pytest.mark.parametrize(
    "command", ["sleep 60", "head -c 2000 {tar}; sleep 60", "exec >&-; sleep 60", "sleep 60 | cat"]
)
def test_a_command_that_hangs_is_killed_and_fails_the_shard(
    tmp_path: Path, scratch: Scratch, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SILENCE", 0.3)
    tar, mark = write_tar(tmp_path / "a.tar", THREE), f"60.{time.time_ns()}"
    command = command.format(tar=tar).replace("60", mark)
    with pytest.raises(ShardError, match=r"gave nothing for|timed out"):
        read_all(f"pipe:{command}", scratch)
    assert ends(mark)


def test_a_command_is_ended_where_its_shard_is_given_up(tmp_path: Path) -> None:
    mark = f"60.{time.time_ns()}"
    with pytest.raises(ShardError, match="has 1000 bytes or more"):
        read_all(f"pipe:head -c 1000 /dev/zero; sleep {mark}", Scratch(tmp_path, 999))
    assert ends(mark)


def ends(word: str) -> bool:
    """A killed process that is nobody's child here may be there a moment longer."""
    end = time.monotonic() + 30
    while running(word) and time.monotonic() < end:
        time.sleep(0.01)
    return not running(word)


def running(word: str) -> bool:
    """Whether a process has this word among its arguments."""
    lines = (p / "cmdline" for p in Path("/proc").iterdir() if p.name.isdecimal())
    return any(word.encode() in _read(path) for path in lines)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


# --- object stores ---

TAR = tar_bytes(THREE)
URL = "s3://bucket/tars/a.tar"


@pytest.fixture
def stored(bucket: s3.Server) -> s3.Server:
    """An S3 that has the tar, and counts from now on."""
    bucket.put("tars/a.tar", TAR)
    bucket.requests.clear()
    return bucket


def fetch(scratch: Scratch, url: str = URL, size: int | None = len(TAR)) -> bytes:
    with stage(Shard("a", url, size), scratch) as staged:
        return staged.path.read_bytes()


def test_an_object_of_a_known_size_takes_one_request(stored: s3.Server, scratch: Scratch) -> None:
    assert fetch(scratch) == TAR
    assert stored.methods() == {"GET": 1}


def test_the_size_is_asked_for_where_it_is_not_known(stored: s3.Server, scratch: Scratch) -> None:
    assert fetch(scratch, size=None) == TAR
    assert stored.methods() == {"HEAD": 1, "GET": 1}


def test_a_large_object_comes_in_blocks_in_order(
    stored: s3.Server, scratch: Scratch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "BLOCK", 1000)
    stored.fail("GET", "a.tar", s3.status(500), times=2)
    assert fetch(scratch) == TAR
    asked = {r.range for r in stored.requests}
    assert asked == {f"bytes={i}-{min(i + 1000, len(TAR)) - 1}" for i in range(0, len(TAR), 1000)}


@pytest.mark.parametrize("answer", [s3.status(500), s3.status(503), s3.broken_off, s3.shortened])
def test_what_a_store_does_now_and_then_is_tried_again(
    stored: s3.Server, scratch: Scratch, answer: s3.Answer
) -> None:
    stored.fail("GET", "a.tar", answer, times=stores.TRIES - 1)
    assert fetch(scratch) == TAR


def test_what_a_store_does_every_time_is_an_error_that_says_so(
    stored: s3.Server, scratch: Scratch
) -> None:
    stored.fail("GET", "a.tar", s3.status(500), times=100)
    with pytest.raises(ShardError, match=r"bucket/tars/a\.tar.* failed 5 times, at last at byte 0"):
        fetch(scratch)
    assert stored.methods() == {"GET": stores.TRIES}


@pytest.mark.parametrize(("number", "says"), [(403, "AccessDenied"), (404, "no such file")])
def test_what_would_be_the_same_again_is_not_tried_again(
    stored: s3.Server, scratch: Scratch, number: int, says: str
) -> None:
    url = URL if number == 403 else URL.replace("a.tar", "b.tar")
    stored.fail("GET", "a.tar", s3.status(403))
    with pytest.raises(ShardError, match=says):
        fetch(scratch, url)
    assert stored.methods() == {"GET": 1}


def test_an_object_shorter_than_it_was_planned_fails_the_shard(
    stored: s3.Server, scratch: Scratch
) -> None:
    with pytest.raises(ShardError, match=f"after {len(TAR)} of {len(TAR) + 1} bytes: .*range"):
        fetch(scratch, size=len(TAR) + 1)


def test_waits_between_tries_double_and_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(stores.time, "sleep", waits.append)

    def never() -> None:
        raise TimeoutError("no answer")

    for _ in range(20):
        with pytest.raises(OSError, match="failed 5 times, at last TimeoutError: no answer"):
            stores.retrying(never)
    rounds = [waits[i : i + 4] for i in range(0, 80, 4)]
    longest = [max(wait[i] for wait in rounds) for i in range(4)]
    assert all(2**i / 2 <= w[i] <= 2**i for w in rounds for i in range(4))
    assert len({round(w, 6) for w in waits}) > 70
    assert longest == sorted(longest)


@pytest.mark.parametrize(
    ("url", "extra"), [("s3://bucket/a.tar", "s3"), ("https://host/a.tar", "http")]
)
def test_a_library_that_is_missing_is_named(
    url: str, extra: str, scratch: Scratch, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("s3fs", "aiohttp"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("s3", "https"):
        monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, name, raising=False)
    monkeypatch.delitem(sys.modules, "fsspec.implementations.http", raising=False)
    with pytest.raises(ShardError, match=rf"pip install 'd2m_hpc\[{extra}\]'"):
        fetch(scratch, url)


# --- HTTP ---


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, *args: Any, web: Web) -> None:
        self.web = web
        super().__init__(*args)

    def do_GET(self) -> None:
        asked = self.headers.get("Range", "")
        self.web.seen.append(asked)
        how = self.web.plan.pop(0) if self.web.plan else "fine"
        if how.isdecimal():
            self.send_error(int(how))
            return
        start = int(asked[6:].split("-")[0]) if asked and self.web.ranges else 0
        data = self.web.data[start:]
        self.send_response(206 if start else 200)
        said = len(data) // 2 if how == "lies" else len(data)
        self.send_header("Content-Length", str(said))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if how != "fine" else data)
        if how == "silent":
            time.sleep(1.0)
        self.close_connection = how != "fine"

    def log_message(self, format: str, *args: object) -> None:
        pass


class Web:
    """A server of one file; `plan` says how requests are answered, `seen` which ranges they had."""

    def __init__(self, ranges: bool) -> None:
        self.data, self.ranges = TAR, ranges
        self.plan: list[str] = []
        self.seen: list[str] = []
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, web=self))
        self.url = f"http://127.0.0.1:{self.http.server_port}/d/a.tar"


@pytest.fixture(params=[True, False], ids=["ranges", "no ranges"])
def web(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    monkeypatch.setattr(stores, "FIRST_WAIT", 0.01)
    served = Web(request.param)
    thread = threading.Thread(target=served.http.serve_forever, args=(0.02,))
    thread.start()
    yield served
    served.http.shutdown()
    thread.join()
    served.http.server_close()


def test_a_tar_on_a_web_server_takes_one_request(web: Web, scratch: Scratch) -> None:
    assert fetch(scratch, web.url, None) == TAR
    assert web.seen == [""]


@pytest.mark.parametrize("how", ["500", "503", "429", "breaks off"])
def test_a_web_server_that_fails_is_asked_again(web: Web, scratch: Scratch, how: str) -> None:
    web.plan += [how] * (stores.TRIES - 1)
    assert fetch(scratch, web.url, None) == TAR


def test_a_web_server_that_falls_silent_is_asked_again(
    web: Web, scratch: Scratch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "SILENCE", 0.2)
    web.plan += ["silent"]
    assert fetch(scratch, web.url, None) == TAR


def test_what_came_is_not_fetched_again_where_there_are_ranges(web: Web, scratch: Scratch) -> None:
    web.data = TAR + bytes(range(256)) * 40_000  # more than can lie unread when it breaks off
    web.plan += ["breaks off"]
    assert fetch(scratch, web.url, None) == web.data
    first, second = web.seen
    assert first == ""
    assert 0 < int(second.removeprefix("bytes=").removesuffix("-")) <= len(web.data) // 2


@pytest.mark.parametrize(("how", "says"), [("403", "403"), ("404", "no such file")])
def test_a_web_server_that_refuses_is_asked_once(
    web: Web, scratch: Scratch, how: str, says: str
) -> None:
    web.plan += [how]
    with pytest.raises(ShardError, match=says):
        fetch(scratch, web.url, None)
    assert len(web.seen) == 1


def test_a_web_server_that_always_breaks_is_given_up(web: Web, scratch: Scratch) -> None:
    web.plan += ["500"] * 100
    with pytest.raises(ShardError, match="failed 5 times, at last"):
        fetch(scratch, web.url, None)
    assert len(web.seen) == stores.TRIES


def test_a_web_server_that_says_too_short_a_length_is_found_by_the_tar(
    web: Web, scratch: Scratch
) -> None:
    web.plan += ["lies"]
    keys, cut = read_all(web.url, scratch)
    assert keys == ["a"]
    assert cut.startswith("at byte")


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_what_is_no_regular_file_is_told_and_not_waited_for(
    name: str, tmp_path: Path, scratch: Scratch
) -> None:
    os.mkfifo(tmp_path / name)
    shard, why = Shard("a", str(tmp_path / name), 1), f"{name}: it is no regular file"
    with pytest.raises(ShardError, match=why), stage(shard, scratch):
        pass
    with pytest.raises(OSError, match="it is no regular file"):
        Archive(tmp_path / name)
