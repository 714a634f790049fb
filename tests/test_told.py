"""What strangers wrote, and what the system refuses, as commands tell it."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
from html import unescape
from pathlib import Path

import pytest
from kit import STATS, d2m, sample, submit, write_config, write_shards

from d2m_hpc import cli
from d2m_hpc.cli.trouble import explained
from d2m_hpc.errors import ConfigError, SlurmError
from d2m_hpc.run.records import Record, Recorder
from d2m_hpc.storage.texts import as_json
from d2m_hpc.watch.status import alike, find_run, summarise

CLEARS, TITLE = "\x1b[2J\x1b[31m", "\x1b]0;caught\x07"
RAW = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\ud800-\udfff]")
"""What must reach no terminal."""


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`c.yml` of a run in a folder of an odd name: keys, captions, errors and stems do what they
    can to a terminal and a page; one shard is done, one has failed."""
    folder = tmp_path_factory.mktemp("told") / "dönér <b>\u202e"
    (folder / "tars").mkdir(parents=True)
    caption = f"<script>alert(1)</script>{CLEARS}{TITLE}\u202egnorw\u2028"
    with tarfile.open(folder / "tars" / "good.tar", "w") as tar:
        for i in range(12):
            members = sample(f"k{i}{TITLE}<i>", i)
            fields = {"uid": f"{i:032x}", "caption": caption}
            for name, data in members.items():
                data = caption.encode() if name.endswith("txt") else data
                _add(tar, name, json.dumps(fields).encode() if name.endswith("json") else data)
        _add(tar, f"z{CLEARS}.jpg", b"no picture")
        _add(tar, f"z{CLEARS}.txt", b"z")
        _add(tar, f"z{CLEARS}.json", b"{}")
    with tarfile.open(folder / "tars" / "bad.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for number in range(2):
            name = f"caf\udce9{CLEARS}<u>{number}"
            values = b'{"uid": "0", "caption": ""}'
            for extension, data in (("jpg", b"none"), ("txt", b"x"), ("json", values)):
                _add(tar, f"{name}.{extension}", data)
    config = write_config(
        folder / "c.yml",
        STATS,
        input_tars=str(folder / "tars" / "*.tar"),
        output_metadata_dir=str(folder / "out"),
        use_datacomp_keys=True,
    )
    ended = submit(config)
    assert ended.returncode == 1, ended.stderr
    assert not RAW.search(ended.stdout + ended.stderr)
    return config


COMMANDS = {
    "status": ("status",),
    "status --json": ("status", "--json"),
    "verify": ("verify",),
    "verify --json": ("verify", "--json"),
    "logs": ("logs", "bad"),
    "report": ("report", "-o", "r\x1b[31m.html"),
    "select": ("select", "-o", "s\x1b[31m.npy"),
    "select in vain": ("select", "-o", "t.npy", "--where", f"nothing{CLEARS} = 1"),
    "export": ("export", "datacomp", "-o", "made\x1b[2J", "--allow-missing"),
    "plan": ("plan",),
    "plan in vain": ("plan", "--set", f"batch_size={CLEARS}"),
}


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("encoding", ["ascii", "utf-8", "latin-1"])
def test_no_raw_control_characters_reach_a_terminal(
    name: str,
    encoding: str,
    hostile: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever it can show: what it cannot is escaped."""
    first, *rest = COMMANDS[name]
    at = 2 if first == "export" else 1
    words = [first, *rest]
    words.insert(at, str(hostile))
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["d2m", *words])
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code in (0, 1, 2)
    for stream in streams:
        stream.flush()
        said = stream.buffer.getvalue().decode(encoding)
        assert "Traceback" not in said
        assert "please report this" not in said
        assert not RAW.search(said), said
    if "--json" in words:
        said = streams[0].buffer.getvalue().decode("ascii")
        json.loads(said)["shards"]


def test_a_page_holds_no_markup_and_no_control_characters_of_strangers(
    hostile: Path, tmp_path: Path
) -> None:
    ended = d2m("report", hostile, "-o", tmp_path / "r.html")
    assert ended.returncode == 0, ended.stderr
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "alert(1)" in page  # as a text
    for tag in ("<script", "<u>", "<i>"):
        assert tag not in page
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", unescape(page))


def test_json_is_ascii_that_strict_parsers_take() -> None:
    told = as_json({"a\x7f": ["caf\udce9", "\x1b[2J", "\u2028", {"x": ("y", 1, None)}]})
    assert told.isascii()
    assert not RAW.search(told)
    assert json.loads(told) == {"a\x7f": ["caf\\xe9", "\x1b[2J", "\u2028", {"x": ["y", 1, None]}]}
    json.loads(told)["a\x7f"][0].encode()


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("/x/a.tar is truncated at byte 9", "/y/b.tar is truncated at byte 10", True),
        ("'a b': no picture", "'c': no picture", True),
        ("No space left", "Permission denied", False),
        ("it's broken", "it's broken", True),
    ],
)
def test_messages_are_alike_but_for_names_and_figures(one: str, other: str, same: bool) -> None:
    assert (alike(one) == alike(other)) == same


def test_a_status_of_huge_messages_of_earlier_versions_is_bounded(hostile: Path) -> None:
    """The message is cut before it is looked at, and so is what is shown of it."""
    folder = hostile.parent
    run, config = find_run(folder / "out" / ".d2m")
    path = run.records / "old.jsonl"
    try:
        Recorder(path).append(Record("bad", "failed", finished=2e9, task="000-0-0", kind="X"))
        line = json.loads(path.read_text())
        path.write_text(json.dumps({**line, "error": "b" * 3_000_000 + "/" + "'" * 99_999}))
        [failure] = summarise(run, config).failures
        assert len(failure.error) <= 3000
    finally:
        path.unlink()


# --- what the system refuses ---


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Of two tars, and not begun."""
    write_shards(tmp_path / "tars", 2, 3)
    return write_config(
        tmp_path / "c.yml",
        STATS,
        input_tars=str(tmp_path / "tars" / "*.tar"),
        output_metadata_dir=str(tmp_path / "out"),
    )


def _one_line(ended: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    assert ended.returncode == code, (ended.stdout, ended.stderr)
    assert "Traceback" not in ended.stderr + ended.stdout
    last = ended.stderr.splitlines()
    assert len(last) in (1, 2), ended.stderr  # "1 mistake", and the mistake
    assert last[0].startswith("error: "), ended.stderr
    assert all(word in ended.stderr for word in words), ended.stderr


def test_a_run_folder_that_is_a_file_is_one_line(config: Path) -> None:
    (config.parent / "runs").write_bytes(b"")
    ended = submit(config, "--set", f"run_dir={config.parent}/runs/here")
    _one_line(ended, 2, f"{config.parent}/runs", "something else stands in its place")


def test_an_output_folder_that_is_a_file_is_one_line(config: Path) -> None:
    (config.parent / "out").write_bytes(b"")
    _one_line(submit(config), 2, f"{config.parent}/out")
    _one_line(d2m("status", config), 2, f"{config.parent}/out")


def test_a_disk_that_takes_no_more_is_one_line(config: Path) -> None:
    """Of files, not even of a byte: as a full disk or a quota does."""
    command = f"ulimit -f 0; exec {Path(sys.executable).with_name('d2m')} submit {config} --local"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    _one_line(ended, 2, str(config.parent / "out"))


def test_a_run_folder_that_is_removed_is_told(config: Path) -> None:
    assert submit(config).returncode == 0
    shutil.rmtree(config.parent / "out" / ".d2m")
    for command in ("status", "verify"):
        _one_line(d2m(command, config), 2, "there is no run in")
    assert submit(config).returncode == 0  # by what the parquets say of themselves
    (config.parent / "out" / ".d2m" / "shards.parquet").unlink()
    for command in ("status", "verify"):
        _one_line(d2m(command, config), 1, "shards.parquet is missing; submit again")
    assert submit(config).returncode == 0
    assert d2m("verify", config).returncode == 0


@pytest.mark.parametrize("command", ["select", "report"])
def test_a_file_that_cannot_be_written_is_told_before_anything_is_read(
    command: str, config: Path
) -> None:
    assert submit(config).returncode == 0
    (config.parent / "file").write_bytes(b"")
    (config.parent / "folder.npy").mkdir()
    for path in (config.parent / "file" / "s.npy", config.parent / "folder.npy"):
        ended = d2m(command, config, "-o", path)
        _one_line(ended, 2, f"{path} cannot be written: ", "name another by -o")
    assert list((config.parent / "folder.npy").iterdir()) == []
    ended = d2m("export", "datacomp", config, "-o", config.parent / "file")
    assert ended.returncode == 2


# --- errors in words ---


def test_our_own_errors_keep_their_lines_and_codes() -> None:
    words, code = explained(ConfigError("c.yml", ["a\x1b[2J", "b"]))
    assert words == "c.yml: 2 mistakes\n  a\\x1b[2J\n  b"
    assert code == 2
    assert explained(SlurmError("x"))[1] == 3


def test_what_the_system_refuses_is_told_with_its_file_and_advice(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        (tmp_path / "a\nb").read_bytes()
    words, code = explained(caught.value)
    assert words.startswith(f"{tmp_path}/a")
    assert "No such file or directory; it is missing" in words
    assert code == 2


def test_a_bug_is_a_line_that_says_where_and_how_to_see_more() -> None:
    try:
        {}["nothing"]
    except KeyError as error:
        words, code = explained(error)
    assert words.startswith("unexpected KeyError: 'nothing' (")
    assert "test_told.py:" in words
    assert "D2M_TRACEBACK=1" in words
    assert code == 1


def test_a_traceback_is_to_be_had(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("D2M_TRACEBACK", "1")
    ended = d2m("status", tmp_path / "none.yml")
    assert ended.returncode == 1
    assert "Traceback" in ended.stderr
    monkeypatch.delenv("D2M_TRACEBACK")
    assert d2m("status", tmp_path / "none.yml").returncode == 2
