"""Values of options and arguments: which paths and numbers are none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from kit import STATS, write_config
from typer.testing import CliRunner

from d2m_hpc.cli.commands import app, submit_app

THREE = "\N{ARABIC-INDIC DIGIT THREE}"


@pytest.mark.parametrize(
    "words",
    [
        "status EMPTY",
        "report c.yml -o EMPTY",
        "diff c.yml EMPTY",
        "export links c.yml -o EMPTY",
        "export datacomp c.yml -o EMPTY",
        "export img2dataset c.yml -o k.parquet --subset EMPTY",
        "export subset-tars c.yml -o kept --lists EMPTY",
        "select c.yml -o EMPTY",
        "select c.yml -o k.npy --join EMPTY",
        "select c.yml -o k.npy --look EMPTY",
        "init tars -o EMPTY",
        "init tars --metadata EMPTY",
        "init EMPTY",
        "head EMPTY",
        "doctor EMPTY",
        "weights list EMPTY",
        "plan EMPTY",
    ],
)
def test_an_empty_path_is_none_and_not_the_current_folder(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tars").mkdir()
    monkeypatch.chdir(tmp_path)
    ended = CliRunner().invoke(app, ["" if word == "EMPTY" else word for word in words.split()])
    assert ended.exit_code
    told = ended.stderr or str(ended.exception)
    assert "found ''; valid is a path" in " ".join(told.replace("│", "").split())
    assert [path.name for path in tmp_path.iterdir()] == ["tars"]


@pytest.mark.parametrize("number", [THREE, "1_0", f"0.{THREE}", "three"])
@pytest.mark.parametrize(
    "words",
    [
        "select c.yml -o k.npy --top",
        "select c.yml -o k.npy --sample",
        "select c.yml -o k.npy --seed",
        "export subset-tars c.yml -o kept --lists k.jsonl --tasks",
        "export subset-tars c.yml -o kept --lists k.jsonl --tasks 2 --part",
        "diff c.yml c.yml --tolerance",
        "verify c.yml --sample",
        "verify c.yml --seed",
        "report c.yml --samples",
        "report c.yml --port",
        "head c.yml",
        "submit c.yml --max-rounds",
        "derive c.yml --max-rounds",
    ],
)
def test_a_number_is_of_ascii_digits(words: str, number: str) -> None:
    ended = CliRunner().invoke(app, [*words.split(), number])
    assert ended.exit_code == 2
    assert f"found '{number}'; valid is" in " ".join(ended.stderr.replace("│", "").split())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("verify c.yml --sample 0", "found '0'; valid is a whole number from 1 on"),
        ("head c.yml 0", "found '0'; valid is a whole number from 1 on"),
        ("report c.yml --samples 61", "found '61'; valid is a whole number from 0 to 60"),
        ("report c.yml --port 65536", "found '65536'; valid is a whole number from 0 to 65535"),
        ("submit c.yml --max-rounds 0", "found '0'; valid is a whole number from 1 on"),
        ("diff c.yml c.yml --tolerance -1", "found '-1'; valid is a number from 0 on"),
        ("diff c.yml c.yml --tolerance nan", "found 'nan'; valid is a number from 0 on"),
    ],
)
def test_a_number_is_in_its_range(words: str, told: str) -> None:
    ended = CliRunner().invoke(app, words.split())
    assert ended.exit_code == 2
    assert told in " ".join(ended.stderr.replace("│", "").split())


@pytest.mark.parametrize(
    ("option", "told"),
    [
        (["--time", THREE], "slurm.time: found '٣'; valid is 4:00:00"),
        (["--extra", f"time={THREE}"], "slurm.extra: found {'time': '٣'}; valid is 4:00:00"),
        (["--cpus-per-task", THREE], "slurm.cpus_per_task: found '٣'"),
        (["--set", f"input_tars={{0..{THREE}}}.tar"], "input_tars"),
    ],
)
def test_a_number_of_a_config_is_of_ascii_digits(
    option: list[str], told: str, tmp_path: Path
) -> None:
    places = {"input_tars": "*.tar", "output_metadata_dir": "out"}
    config = write_config(tmp_path / "c.yml", STATS, **places)
    ended = CliRunner().invoke(submit_app, [str(config), "--dry-run", *option])
    assert ended.exit_code
    assert told in str(ended.exception)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("submit c.yml --then x", "--then is of --until-done, which is not given; add it"),
        ("submit c.yml --wait --notify x", "--notify is of --until-done"),
        ("submit c.yml --max-rounds 3", "--max-rounds is of --until-done"),
        ("submit c.yml --until-done --local", "leave out --local"),
        ("submit c.yml --until-done --no-sbatch", "leave out --no-sbatch"),
        ("submit c.yml --no-sbatch --wait", "--no-sbatch starts no tasks"),
        ("submit c.yml --no-sbatch --local", "--no-sbatch starts no tasks"),
        ("derive c.yml --then x", "--then is of --until-done"),
        ("derive c.yml --until-done --local", "leave out --local"),
        ("derive c.yml --until-done --prepare", "leave out --prepare"),
        ("status c.yml --json --watch", "leave out --watch"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(words: str, told: str) -> None:
    """Else the job of --then never starts, and nobody learns of it."""
    ended = CliRunner().invoke(app, words.split())
    code = getattr(ended.exception, "exit_code", ended.exit_code)
    said = ended.stderr or str(ended.exception)
    assert (code, told in " ".join(said.replace("│", "").split())) == (2, True), said


def test_a_current_folder_that_was_removed_is_told(tmp_path: Path) -> None:
    """Else relative paths fail without their names, and torch by words of its own."""
    command = f"rmdir {tmp_path}; exec {Path(sys.executable).with_name('d2m-submit')} c.yml --local"
    ended = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    told = "the current folder was removed; `cd` to one that exists, and run the same command again"
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", f"error: {told}\n")
