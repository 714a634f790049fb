"""No secret of a config is shown or recorded; files that must hold it are their owner's alone."""

from __future__ import annotations

import logging
import os
import re
import stat
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from kit import STATS, d2m, submit, write_config, write_shards

from d2m_hpc import cli
from d2m_hpc.config import load
from d2m_hpc.run.folder import RunDir
from d2m_hpc.watch.status import summarise
from d2m_hpc.worker.faults import logging_to

SECRET = "Zq8S3cr3tV4lue"


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`127.0.0.1:port` of a server of four tars."""
    folder = tmp_path_factory.mktemp("served")
    write_shards(folder, 4, 3)
    handler = partial(_Quiet, directory=folder)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.02,))
        thread.start()
        yield f"127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def _tars(server: str) -> list[str]:
    header = f"curl -sSf -H 'Authorization: Bearer {SECRET}'"
    return [
        f"pipe:AWS_SECRET_ACCESS_KEY={SECRET} {header} http://{server}/00000.tar",
        f"pipe:curl -sSf -u me:{SECRET} http://{server}/00001.tar",
        f"http://{server}/00002.tar?X-Amz-Signature={SECRET}&x=1",
        f"http://{server}/gone.tar?sig={SECRET}",
        f"pipe:{header} -v http://{server}/gone2.tar",
        f"pipe:echo 'token={SECRET} is bad' >&2; exit 3",
        f"pipe:cat /nowhere/{{0..1}}.tar; : --password {SECRET}",
    ]


@pytest.fixture(scope="module")
def ended(server: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a config whose run has done what it could, and what it printed."""
    folder = tmp_path_factory.mktemp("secrets")
    config = write_config(
        folder / "c.yml",
        STATS,
        input_tars=_tars(server),
        output_metadata_dir="out",
        slurm={
            "setup": [f"export HF_TOKEN={SECRET}"],
            "extra": {"export": f"A_KEY=b,HF_TOKEN={SECRET}"},
        },
    )
    said = submit(config, "--no-preflight", cwd=folder)
    assert said.returncode == 1, said.stderr
    return folder, said.stdout + said.stderr


COMMANDS = [
    ("plan", "c.yml", "--set", "slurm.extra={}"),
    ("status", "c.yml"),
    ("status", "c.yml", "--json"),
    ("verify", "c.yml"),
    ("verify", "c.yml", "--json"),
    *(("logs", "c.yml", stem) for stem in ("00000", "gone", "gone2", "0")),
    ("report", "c.yml", "-o", "report.html"),
    ("forget", "c.yml", f"http://x/y?sig={SECRET}"),
    ("plan", "c.yml", "--set", f"input_tars=http://127.0.0.1:9/a.tar?token={SECRET}&{'x' * 90}={{"),
    ("plan", "c.yml", "--set", f"modles=https://{'x' * 70}/a?sig={SECRET}{SECRET}{SECRET}"),
    ("plan", "c.yml", "--set", f"models=https://{'x' * 70}/a?sig={SECRET}{SECRET}{SECRET}"),
    ("plan", "c.yml", "--set", f"output_metadata_dir=nope://me:{SECRET}@host/x"),
]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_no_command_shows_a_secret(
    words: tuple[str, ...],
    ended: tuple[Path, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, printed = ended
    assert SECRET not in printed
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["d2m", *words])
    with pytest.raises(SystemExit):
        cli.main()
    said = capsys.readouterr()
    assert said.out + said.err
    assert SECRET not in said.out + said.err
    assert "Traceback" not in said.err


def test_what_is_shown_says_what_is_wrong_all_the_same(ended: tuple[Path, str]) -> None:
    run = RunDir(ended[0] / "out" / ".d2m")
    said = summarise(run, load(run.config, frozen=True)).to_dict()
    errors = "\n".join(failure["error"] for failure in said["failures"])
    assert "?sig=***" in errors
    assert "'Authorization: ***'" in errors
    assert "ended with exit code 3" in errors
    assert said["done"] == 3


def test_only_files_of_their_owner_hold_a_secret(ended: tuple[Path, str]) -> None:
    folder, _ = ended
    holding = {
        path.name
        for path in (folder / "out").rglob("*")
        if path.is_file() and SECRET.encode() in path.read_bytes()
    }
    assert holding <= {"config.yml", "chunks.jsonl", "shards.parquet"}
    assert {"config.yml", "chunks.jsonl"} <= holding
    for path in (folder / "out").rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        if path.name in holding or path.name == "shards.parquet":
            assert mode == 0o600, path
        elif path.is_file() and path.suffix in (".parquet", ".npz", ".jsonl", ".log"):
            assert mode & 0o444 == 0o444 & ~_umask(), path
    assert not [p for p in (folder / "out").rglob("*") if SECRET in p.name]


def _umask() -> int:
    os.umask(before := os.umask(0))
    return before


def test_a_run_without_secrets_is_its_groups(tmp_path: Path) -> None:
    write_shards(tmp_path / "tars", 1, 2)
    config = write_config(
        tmp_path / "c.yml", STATS, input_tars="tars/*.tar", output_metadata_dir="out"
    )
    assert submit(config, cwd=tmp_path, umask=0o002).returncode == 0
    run = RunDir(tmp_path / "out" / ".d2m")
    submission = run.submission("000")
    for path in (run.config, run.shards, submission.config, submission.chunks):
        assert stat.S_IMODE(path.stat().st_mode) == 0o664, path


def test_a_plan_that_holds_a_secret_stays_private(tmp_path: Path) -> None:
    """Its tars stay planned when the config does not name them any more."""
    write_shards(tmp_path / "tars", 2, 2)
    tars = [f"pipe:cat tars/00000.tar; : --token {SECRET}", "tars/00001.tar"]
    values = {**STATS, "output_metadata_dir": "out"}
    config = write_config(tmp_path / "c.yml", values, input_tars=tars)
    assert submit(config, cwd=tmp_path).returncode == 0
    (tmp_path / "out" / "00001.parquet").unlink()
    write_shards(tmp_path / "more", 3, 2)
    write_config(config, values, input_tars=["tars/00001.tar", "more/00002.tar"])
    assert submit(config, cwd=tmp_path).returncode == 0
    run = RunDir(tmp_path / "out" / ".d2m")
    assert stat.S_IMODE(run.shards.stat().st_mode) == 0o600
    assert stat.S_IMODE(run.submission("001").chunks.stat().st_mode) == 0o600
    assert d2m("forget", "c.yml", "00000", cwd=tmp_path).returncode == 0
    assert stat.S_IMODE(run.forgotten.stat().st_mode) == 0o600
    assert SECRET not in run.config.read_text()
    assert stat.S_IMODE(run.config.stat().st_mode) == 0o666 & ~_umask() & 0o664


def test_a_mistake_is_shown_in_its_line_without_the_secret(tmp_path: Path) -> None:
    text = yaml.safe_dump({**STATS, "output_metadata_dir": "out"})
    text += f"input_tars: ['https://me:{SECRET}@h/a.tar?sig={SECRET}', nothing-here.tar]\n"
    (tmp_path / "c.yml").write_text(text)
    said = d2m("plan", "c.yml", cwd=tmp_path)
    assert said.returncode == 2
    assert SECRET not in said.stderr
    assert "https://***@h/a.tar?sig=***" in said.stderr or "nothing-here" in said.stderr


def test_the_log_holds_none(tmp_path: Path) -> None:
    log = logging.getLogger("d2m_hpc.any")
    with logging_to(tmp_path / "log", crashes=False):
        try:
            raise ValueError(f"https://me:{SECRET}@host")
        except ValueError:
            log.exception("%s failed", f"pipe:curl -H 'X-Api-Key: {SECRET}'")
    written = (tmp_path / "log").read_text()
    assert SECRET not in written
    assert "X-Api-Key: ***" in written
    assert "ValueError: https://***@host" in written


def test_the_log_holds_no_control_characters(tmp_path: Path) -> None:
    """Neither of messages nor of errors; a message is one line, a traceback keeps its lines."""
    log = logging.getLogger("d2m_hpc.any")
    hostile = "a\x1b]0;title\x07\u202eb\n2026-01-01 00:00:00,000 INFO 00000: 9 rows"
    with logging_to(tmp_path / "log", crashes=False):
        log.warning("%s: odd", hostile)
        try:
            raise ValueError(hostile)
        except ValueError:
            log.exception("failed")
    written = (tmp_path / "log").read_text()
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", written)
    assert r"a\x1b]0;title\x07\u202eb\n2026-01-01" in written
    assert len([line for line in written.splitlines() if "WARNING" in line]) == 1
    assert "Traceback (most recent call last):\n" in written
