from __future__ import annotations

import hashlib
import http.server
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import open_clip
import pytest

from d2m_hpc.errors import WeightsError
from d2m_hpc.models import weights
from d2m_hpc.models.registry import MODELS
from d2m_hpc.models.weights import CHECKPOINTS, Checkpoint, HashCache, check, fetch, require

CONTENT = os.urandom(3 << 20)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class _Handler(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT in ways that its path names."""

    requests: list[str]

    def do_GET(self) -> None:
        self.requests.append(self.path)
        getattr(self, "_" + self.path.strip("/").split("/")[0])()

    def _head(self, **headers: object) -> None:
        self.send_response(200)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def _right(self) -> None:
        self._head(Content_Length=len(CONTENT))
        self.wfile.write(CONTENT)

    def _unsized(self) -> None:
        self._head()
        self.wfile.write(CONTENT)

    def _breaks(self) -> None:
        self._head(Content_Length=len(CONTENT))
        self.wfile.write(CONTENT[: len(CONTENT) // 2])

    def _chunk(self) -> None:
        self._head(Transfer_Encoding="chunked")
        self.wfile.write(b"100000\r\n" + CONTENT[:1000])

    def _short(self) -> None:
        self._head(Content_Length=1000)
        self.wfile.write(CONTENT)

    def _nonsense(self) -> None:
        self._head(Content_Length="many")
        self.wfile.write(CONTENT[:1000])

    def _wrong(self) -> None:
        self._head(Content_Length=len(CONTENT))
        self.wfile.write(CONTENT[::-1])

    def _garbled(self) -> None:
        self.wfile.write(b"this is not HTTP\r\n\r\n")

    def _absent(self) -> None:
        self.send_error(404)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """The address of a real HTTP server, and the paths it was asked for."""
    requests: list[str] = []
    handler = type("Handler", (_Handler,), {"requests": requests})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}", requests
        running.shutdown()
        thread.join()


def _names(folder: Path) -> list[str]:
    """All files but the locks of downloads."""
    return sorted(p.name for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock")


@pytest.mark.parametrize("way", ["right", "unsized"])
def test_a_file_that_is_right_appears_under_its_name(
    way: str, server: tuple[str, list[str]], awkward_path: Path
) -> None:
    checkpoint = Checkpoint("folder/net.pt", f"{server[0]}/{way}", SHA256)
    path = fetch(checkpoint, awkward_path)
    assert path == awkward_path / "folder/net.pt"
    assert path.read_bytes() == CONTENT
    assert _names(awkward_path) == ["net.pt"]


@pytest.mark.parametrize(
    ("way", "reason"),
    [
        ("breaks", r"broke off after \d+ of 3145728 bytes"),
        ("chunk", "IncompleteRead|incomplete|broke"),
        ("short", "sent a file of sha256"),
        ("nonsense", "many|sent a file"),
        ("wrong", f"sent a file of sha256 [0-9a-f]{{64}}, published is {SHA256}"),
        ("garbled", "not HTTP|HTTP"),
        ("absent", "404"),
    ],
)
def test_a_file_that_is_not_right_never_appears(
    way: str, reason: str, server: tuple[str, list[str]], tmp_path: Path
) -> None:
    url = f"{server[0]}/{way}"
    with pytest.raises(WeightsError, match=rf"{url}(.|\n)*({reason})"):
        fetch(Checkpoint("net.pt", url, SHA256), tmp_path)
    assert _names(tmp_path) == []


@pytest.mark.parametrize("way", ["breaks", "chunk"])
def test_a_download_that_breaks_off_is_noticed_without_a_published_hash(
    way: str, server: tuple[str, list[str]], tmp_path: Path
) -> None:
    with pytest.raises(WeightsError, match=r"try again, or copy to .*net\.pt"):
        fetch(Checkpoint("net.pt", f"{server[0]}/{way}"), tmp_path)
    assert _names(tmp_path) == []


def test_a_server_that_is_not_there_is_named(tmp_path: Path) -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), _Handler) as closed:
        url = f"http://127.0.0.1:{closed.server_port}/right"
    with pytest.raises(WeightsError, match=url):
        fetch(Checkpoint("net.pt", url, SHA256), tmp_path)


def test_a_wrong_download_leaves_the_file_that_was_there(
    server: tuple[str, list[str]], tmp_path: Path
) -> None:
    (tmp_path / "net.pt").write_bytes(b"mine")
    with pytest.raises(WeightsError):
        fetch(Checkpoint("net.pt", f"{server[0]}/wrong", SHA256), tmp_path)
    assert (tmp_path / "net.pt").read_bytes() == b"mine"


def test_a_file_that_is_there_and_right_is_not_fetched(
    server: tuple[str, list[str]], tmp_path: Path
) -> None:
    (tmp_path / "net.pt").write_bytes(CONTENT)
    fetch(Checkpoint("net.pt", f"{server[0]}/right", SHA256[:8]), tmp_path)
    assert server[1] == []


def test_progress_is_told_up_to_the_whole(server: tuple[str, list[str]], tmp_path: Path) -> None:
    told: list[tuple[int, int | None]] = []
    checkpoint = Checkpoint("net.pt", f"{server[0]}/right", SHA256)
    fetch(checkpoint, tmp_path, lambda done, total: told.append((done, total)))
    assert told == sorted(told)
    assert told[-1] == (len(CONTENT), len(CONTENT))


def test_two_processes_that_fetch_at_once_download_once(
    server: tuple[str, list[str]], tmp_path: Path
) -> None:
    code = (
        "import sys; from pathlib import Path; from d2m_hpc.models.weights import *;"
        "sys.stdin.readline();"
        "fetch(Checkpoint('net.pt', sys.argv[1], sys.argv[2]), Path(sys.argv[3]))"
    )
    command = [sys.executable, "-c", code, f"{server[0]}/right", SHA256, str(tmp_path)]
    running = [subprocess.Popen(command, stdin=subprocess.PIPE) for _ in range(2)]
    for process in running:
        process.communicate(b"go\n")
    assert [process.returncode for process in running] == [0, 0]
    assert server[1] == ["/right"]
    assert (tmp_path / "net.pt").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("name", "model"), [("ViT-B-32.pt", "ViT-B-32"), ("ViT-L-14.pt", "ViT-L-14")]
)
def test_clips_urls_are_those_that_open_clip_knows(name: str, model: str) -> None:
    known = open_clip.pretrained.get_pretrained_cfg(model, "openai")
    assert CHECKPOINTS[name].url == known["url"]
    assert CHECKPOINTS[name].sha256 == known["url"].split("/")[-2]


def test_needed_lists_each_checkpoint_once_and_none_of_custom_models() -> None:
    names = [c.name for c in weights.needed(["oai-clip-vit-b32", "my-own", "oai-clip-vit-b32"])]
    assert names == ["ViT-B-32.pt"]
    assert {c.name for c in weights.needed(MODELS)} == CHECKPOINTS.keys()


def test_a_missing_file_is_named_with_its_url_and_the_command(tmp_path: Path) -> None:
    checked = check(["faces-scrfd10g"], tmp_path)
    assert [item.state for item in checked] == ["missing"]
    with pytest.raises(WeightsError) as caught:
        require(checked, allow_unpublished=True, config="my config.yml")
    message = str(caught.value)
    assert str(tmp_path / "scrfd_10g.pt") in message
    assert CHECKPOINTS["scrfd_10g.pt"].url in message
    assert "d2m weights fetch" in message
    assert "my config.yml" in message


def test_every_problem_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "scrfd_10g.pt").write_bytes(b"mine")
    with pytest.raises(WeightsError) as caught:
        require(check(["faces-scrfd10g", "dedup-isc-ft-v107"], tmp_path), False, "c.yml")
    for name in ("scrfd_10g.pt has sha256", "isc_ft_v107.pth.tar is missing", "eval_dedup"):
        assert name in str(caught.value)


def test_an_unpublished_file_is_refused_unless_it_is_allowed(tmp_path: Path) -> None:
    (tmp_path / "scrfd_10g.pt").write_bytes(b"mine")
    checked = check(["faces-scrfd10g"], tmp_path)
    digest = hashlib.sha256(b"mine").hexdigest()
    assert [item.state for item in checked] == ["not the published file"]
    with pytest.raises(WeightsError, match=f"{digest}.*963570df(.|\n)*allow_unpublished_weights"):
        require(checked, allow_unpublished=False, config="c.yml")
    assert require(checked, allow_unpublished=True, config="c.yml") == {"scrfd_10g.pt": digest}


def test_a_prefix_of_the_hash_is_compared_where_no_more_was_published() -> None:
    checkpoint = CHECKPOINTS["multilingual_debiased-0b549669.ckpt"]
    assert checkpoint.sha256 in checkpoint.name
    assert checkpoint.is_published("0b549669" + "f" * 56)
    assert not checkpoint.is_published("0b549668" + "f" * 56)
    assert CHECKPOINTS["isc_ft_v107.pth.tar"].is_published("a" * 64)


def test_the_hash_cache_reads_a_file_once_and_again_when_it_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []

    def counted(path: Path) -> str:
        read.append(path)
        return hashlib.sha256(path.read_bytes()).hexdigest()

    monkeypatch.setattr(weights, "sha256_of", counted)
    file, cache = tmp_path / "net.pt", tmp_path / "hashes.json"
    file.write_bytes(b"one")
    for _ in range(2):  # a cache of its own each time, as in another process
        assert HashCache(cache)(file) == hashlib.sha256(b"one").hexdigest()
    assert len(read) == 1
    file.write_bytes(b"two")
    os.utime(file, ns=(1, 1))
    assert HashCache(cache)(file) == hashlib.sha256(b"two").hexdigest()
    file.write_bytes(b"three")
    os.utime(file, ns=(1, 1))
    assert HashCache(cache)(file) == hashlib.sha256(b"three").hexdigest()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"a": 1}'])
def test_a_damaged_hash_cache_is_started_anew(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "hashes.json").write_bytes(content)
    (tmp_path / "a").write_bytes(b"one")
    cache = HashCache(tmp_path / "hashes.json")
    assert cache(tmp_path / "a") == hashlib.sha256(b"one").hexdigest()


def test_the_folder_is_the_configs_or_the_environments_or_the_caches(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("D2M_WEIGHTS", "~/shared")
    assert weights.weights_dir("~/own") == tmp_path / "own"
    assert weights.weights_dir(None) == tmp_path / "shared"
    monkeypatch.delenv("D2M_WEIGHTS")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert weights.weights_dir(None) == tmp_path / ".cache/d2m_hpc"
