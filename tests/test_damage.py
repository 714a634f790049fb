"""Every file of a finished run, each kind of damage, every command: no traceback, a true answer."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from kit import STATS, submit, write_config, write_shards

from d2m_hpc import cli
from d2m_hpc.run.folder import RunDir

SHARDS = 2


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `c.yml` and a finished run of two shards; not to be changed."""
    folder = tmp_path_factory.mktemp("damage")
    write_shards(folder / "tars", SHARDS, 4)
    config = write_config(
        folder / "c.yml",
        STATS,
        input_tars="tars/*.tar",
        output_metadata_dir="out",
        use_datacomp_keys=True,
    )
    ended = submit(config, cwd=folder)
    assert ended.returncode == 0, ended.stderr
    run = RunDir(folder / "out" / ".d2m")
    (run.submission("000").arrays).write_text("[]")
    run.node_failures.mkdir(exist_ok=True)
    (run.node_failures / "7-0.json").write_text('{"node": "n1", "why": "no GPU", "time": 1.0}')
    run.hashes.write_text('{"/x/a.pt": [1, 2, "ab"]}')
    run.lease("00000").write_text("left by a task")
    return folder


def _flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ (1 << at % 8)]) + data[at + 1 :]


def _some_flips(data: bytes) -> bytes:
    """A byte in a hundred."""
    drawn = random.Random(len(data))
    for _ in range(max(1, len(data) // 100)):
        data = _flip(data, drawn.randrange(len(data)))
    return data


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "emptied": lambda data: b"",
    "cut in half": lambda data: data[: len(data) // 2],
    "one byte flipped in the middle": lambda data: _flip(data, len(data) // 2),
    "one byte flipped near the end": lambda data: _flip(data, max(0, len(data) - 40)),
    "bytes flipped all over": _some_flips,
    "zeros": lambda data: bytes(len(data)),
    "random bytes": lambda data: random.Random(1).randbytes(700),
    "an empty list": lambda data: b"[]\n",
    "an empty object": lambda data: b"{}\n",
    "a number": lambda data: b"5\n",
    "a list of odd things": lambda data: b'[null, {"shard": 3}, [], "x"]\n',
    "terminal escapes": lambda data: b'"\x1b[2J\x1b]0;title\x07"\n',
    "doubled": lambda data: data + data,
    "numbers for texts": lambda data: re.sub(rb':\s*"[^"]*"', b": 7", data),
    "texts for numbers": lambda data: re.sub(rb":\s*[0-9.]+", b': "x"', data),
    "other names": lambda data: data.replace(b'"', b'"z'),
}
FILES = [
    "c.yml",
    "out/00000.npz",
    "out/00000.parquet",
    *(
        f"out/.d2m/{name}"
        for name in (
            "config.yml",
            "shards.parquet",
            "records/000-0-0.jsonl",
            "progress/000-0-0.json",
            "logs/000-0.log",
            "hashes.json",
            "nodes/7-0.json",
            "leases/00000.lock",
            "fingerprints/*.json",
            "submissions/000/config.yml",
            "submissions/000/intent.json",
            "submissions/000/jobs.json",
            "submissions/000/chunks.jsonl",
            "submissions/000/chunks.offsets",
        )
    ),
]
MORE = [*STATS["postprocess_columns"], "image-contrast"]
COMMANDS: dict[str, tuple[str, ...]] = {
    "status": ("status", "c.yml"),
    "status by its folder": ("status", "out/.d2m", "--json"),
    "logs": ("logs", "c.yml", "00000"),
    "verify": ("verify", "c.yml"),
    "verify --json": ("verify", "c.yml", "--json", "--partial"),
    "report": ("report", "c.yml", "-o", "made/report.html"),
    "select": ("select", "c.yml", "-o", "made/subset.npy", "--where", '"text-words" > 0'),
    "export": ("export", "datacomp", "c.yml", "-o", "made/datacomp"),
    "cancel": ("cancel", "c.yml"),
    "weights": ("weights", "check", "c.yml"),
    "plan": ("plan", "c.yml"),
    "plan of more": (
        "plan",
        "c.yml",
        "--set",
        "postprocess_columns=[image-brightness, image-phash, text-words, image-contrast]",
    ),
}


class Screen:
    """What a command printed, and what it ended with."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


Call = Callable[..., Screen]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs `d2m` in this process, as its console script does, where there is no Slurm."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))

    def run(*words: str) -> Screen:
        monkeypatch.setattr(sys, "argv", ["d2m", *words])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        return Screen(int(ended.value.code or 0), said.out, said.err)

    return run


@pytest.fixture
def copy(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy that may be damaged, and the folder that commands are called in."""
    shutil.copytree(finished, tmp_path / "copy")
    folder = tmp_path / "copy"
    for path in (folder / "out" / ".d2m").rglob("config.yml"):
        path.write_text(path.read_text().replace(str(finished), str(folder)))
    (folder / "made").mkdir()
    monkeypatch.chdir(folder)
    return folder


def _check(said: Screen, what: str) -> None:
    """Whatever is wrong, it is told in lines that a terminal can show."""
    told = said.out + said.err
    assert said.code in (0, 1, 2, 3), (what, told)
    assert "Traceback" not in told, (what, told)
    assert "please report this" not in told, (what, told)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", told), (what, told)
    if said.code and not said.out:
        assert said.err.startswith(("error: ", "Usage: ")), (what, told)


def test_nothing_is_wrong_with_the_run_itself(copy: Path, call: Call) -> None:
    codes = {name: call(*words).code for name, words in COMMANDS.items()}
    assert codes == {**dict.fromkeys(codes, 0), "cancel": 3}


@pytest.mark.parametrize("file", FILES)
def test_no_damage_of_a_file_ends_in_a_traceback(file: str, copy: Path, call: Call) -> None:
    [path] = copy.glob(file)
    whole = path.read_bytes()
    for damage, change in DAMAGES.items():
        path.write_bytes(change(whole))
        for name, words in COMMANDS.items():
            _check(call(*words), f"{name}: {damage}")


@pytest.mark.parametrize("file", FILES)
def test_nothing_that_is_missing_ends_in_a_traceback(file: str, copy: Path, call: Call) -> None:
    [path] = copy.glob(file)
    path.unlink()
    for name, words in COMMANDS.items():
        _check(call(*words), f"{name}: missing")
    path.mkdir()
    for name, words in COMMANDS.items():
        _check(call(*words), f"{name}: a folder in its place")


@pytest.mark.parametrize(
    "folder",
    ["out", "out/.d2m", *(f"out/.d2m/{n}" for n in ("records", "submissions", "progress"))],
)
def test_a_folder_that_is_missing_or_a_file_is_told(folder: str, copy: Path, call: Call) -> None:
    path = copy / folder
    shutil.rmtree(path)
    for name, words in COMMANDS.items():
        _check(call(*words), f"{name}: missing")
    path.write_bytes(b"a file")
    for name, words in COMMANDS.items():
        _check(call(*words), f"{name}: a file in its place")


NAMED = {
    "out/.d2m/shards.parquet": ("status", "verify", "report", "select", "export", "plan"),
    "out/.d2m/submissions/000/intent.json": ("status", "verify", "report", "select", "export"),
    "out/.d2m/submissions/000/jobs.json": ("status",),
    "out/.d2m/config.yml": ("status", "verify", "report", "select", "export", "logs"),
    "out/.d2m/fingerprints/*.json": ("plan of more",),
}


@pytest.mark.parametrize("file", NAMED)
def test_a_damaged_file_is_named(file: str, copy: Path, call: Call) -> None:
    [path] = copy.glob(file)
    whole = path.read_bytes()
    for damage in ("emptied", "cut in half", "random bytes", "a number"):
        path.write_bytes(DAMAGES[damage](whole))
        for name in NAMED[file]:
            said = call(*COMMANDS[name])
            assert said.code in (1, 2), (name, damage, said.out)
            assert path.name in said.err, (name, damage, said.err)


def test_a_pipe_among_tars_and_outputs_keeps_nobody_waiting(tmp_path: Path) -> None:
    tars = write_shards(tmp_path / "tars", 2, samples=2)
    config = write_config(
        tmp_path / "c.yml",
        STATS,
        input_tars=str(tmp_path / "tars"),
        output_metadata_dir=str(tmp_path / "out"),
    )
    assert submit(config).returncode == 0
    tars = write_shards(tmp_path / "tars", 3, samples=2)
    os.mkfifo(tmp_path / "out" / "00002.parquet")
    ended = submit(config, timeout=60)
    assert ended.returncode in (1, 2)
    assert "00002.parquet is no regular file" in " ".join(ended.stderr.split())
    (tmp_path / "out" / "00002.parquet").unlink()
    tars[0].unlink()
    os.mkfifo(tars[0])
    ended = submit(config, timeout=60)
    assert ended.returncode == 2
    assert f"{tars[0]} is a device, a pipe or a socket" in ended.stderr


def test_what_stands_in_a_parquets_place_and_is_no_file_is_told(copy: Path, call: Call) -> None:
    """The shard is not done, nobody waits for a pipe, and nothing of a folder is moved away."""
    out = copy / "out"
    kept, *_ = sorted(out.glob("*.parquet"))
    stem, there = kept.stem, kept.read_bytes()
    before = json.loads(call("status", "out/.d2m", "--json").out)
    for make in (os.mkfifo, os.mkdir):
        kept.unlink()
        make(kept)
        figures = json.loads(call("status", "out/.d2m", "--json").out)
        assert (figures["done"], figures["removed"]) == (before["done"] - 1, before["removed"] + 1)
        assert figures["odd"] == [str(kept)]
        assert f"{stem}.parquet is no regular file" in call("status", "out/.d2m").out
        said = call("verify", "out/.d2m")
        assert (said.code, f"{stem}.parquet cannot be read" in said.out) == (1, True)
        said = call("plan", "c.yml")
        assert said.code == 2
        assert f"{stem}.parquet is no regular file" in " ".join(said.err.split())
        os.rename(kept, copy / make.__name__)
        kept.write_bytes(there)
    assert json.loads(call("status", "out/.d2m", "--json").out)["odd"] == []
