"""The commands as a user types them."""

from __future__ import annotations

import compileall
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from kit import CHECKPOINTS, DATACOMP, SHARDS, STATS, d2m, submit, write_config, write_shards

import d2m_hpc
from d2m_hpc.config import Slurm
from d2m_hpc.described import described

BIN = Path(sys.executable).parent
HEAVY = {"torch", "torchvision", "numpy", "pyarrow", "pydantic", "PIL", "fsspec", "pandas"}

NO_INTERNET = dict.fromkeys(
    ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9"
)
"""A port where nobody listens: a connection is refused at once."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`c.yml` over two good tars and a broken one; `six.yml` wants every checkpoint."""
    folder = tmp_path_factory.mktemp("cli")
    write_shards(folder / "tars", 2)
    (folder / "tars" / "broken.tar").write_bytes(b"not a tar" * 100)
    write_config(
        folder / "c.yml",
        STATS,
        input_tars=str(folder / "tars" / "*.tar"),
        output_metadata_dir=str(folder / "out"),
    )
    write_config(
        folder / "six.yml",
        DATACOMP,
        input_tars=str(SHARDS / "00000.tar"),
        output_metadata_dir=str(folder / "six"),
    )
    (folder / "no-weights").mkdir()
    return folder


def _environment(weights: Path) -> dict[str, str]:
    return {**os.environ, **NO_INTERNET, "no_proxy": "", "D2M_WEIGHTS": str(weights)}


# --- help, and what it costs ---


def _run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)


def test_both_commands_help() -> None:
    d2m_help, submit_help = (_run(BIN / name, "--help") for name in ("d2m", "d2m-submit"))
    assert (d2m_help.returncode, submit_help.returncode) == (0, 0)
    for command in ("submit", "plan", "status", "verify", "cancel", "logs", "weights"):
        assert re.search(rf"\b{command}\b", d2m_help.stdout), command
    options = ("--set", "--local", "--dry-run", "--wait", "--partition", "--gres", "--max-parallel")
    for option in options:
        assert option in submit_help.stdout, option


def test_every_slurm_key_is_an_option_described_as_in_the_config() -> None:
    environment = {**os.environ, "COLUMNS": "400", "TERMINAL_WIDTH": "400"}
    command = [BIN / "d2m-submit", "--help"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    told = {line.split()[1]: line for line in ended.stdout.splitlines() if " --" in line}
    texts = described(Slurm)
    assert texts.keys() == Slurm.model_fields.keys()
    for name, text in texts.items():
        assert text in told[f"--{name.replace('_', '-')}"]


def test_d2m_alone_shows_its_help() -> None:
    assert "Usage: d2m" in _run(BIN / "d2m").stdout


def _cpu_seconds(*command: str) -> float:
    """Of the child: user and system."""
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        files = [(os.POSIX_SPAWN_DUP2, null, 1)]
        pid = os.posix_spawn(command[0], command, os.environ, file_actions=files)
    finally:
        os.close(null)
    _, status, usage = os.wait4(pid, 0)
    assert status == 0
    return usage.ru_utime + usage.ru_stime


def test_the_help_of_submit_costs_under_half_a_second_of_cpu() -> None:
    assert compileall.compile_dir(Path(d2m_hpc.__file__).parent, quiet=1)
    command = (str(BIN / "d2m-submit"), "--help")
    # A busy machine's shared caches and cores cost CPU time, too.
    assert any(_cpu_seconds(*command) < 0.5 for _ in range(12))


def test_importing_the_commands_loads_no_large_library() -> None:
    ended = _run(sys.executable, "-X", "importtime", "-c", "import d2m_hpc.cli.commands")
    loaded = {line.rpartition("|")[2].strip().split(".")[0] for line in ended.stderr.splitlines()}
    assert {"d2m_hpc", "typer"} <= loaded
    assert loaded & HEAVY == set()


def test_a_command_makes_no_options_of_others() -> None:
    ended = _run(sys.executable, "-X", "importtime", BIN / "d2m", "status", "--help")
    assert "Usage: d2m status" in ended.stdout
    assert "d2m_hpc.cli.submit" in ended.stderr
    assert "d2m_hpc.config" not in ended.stderr


SEEN = """
import json, sys
from d2m_hpc import cli
seen = {}
for words in json.loads(sys.argv[1]):
    sys.argv = ["d2m", *words]
    try:
        cli.main()
    except SystemExit as ended:
        seen[" ".join(words[:1])] = [ended.code or 0, "torch" in sys.modules]
print(json.dumps(seen), file=sys.stderr)
"""


def test_a_login_node_never_loads_torch(folder: Path) -> None:
    """Not to submit, to look at a run, or to check its outputs."""
    config = str(folder / "c.yml")
    commands = [["submit", config, "--dry-run"], ["plan", config], ["weights", "check", config]]
    commands += [["status", config], ["verify", config]]
    ended = _run(sys.executable, "-c", SEEN, json.dumps(commands))
    seen = json.loads(ended.stderr.splitlines()[-1])
    assert seen == {
        "submit": [0, False],
        "plan": [0, False],
        "weights": [0, False],
        "status": [2, False],
        "verify": [2, False],
    }
    assert "3 shards: 0 done, 3 to do" in ended.stdout
    assert not (folder / "out").exists()  # a dry run writes nothing


# --- a run ---


@pytest.fixture(scope="module")
def ran(folder: Path) -> subprocess.CompletedProcess[str]:
    """A run with other values than the config's, to another folder."""
    return submit(
        folder / "c.yml",
        "--set",
        "postprocess_columns=[text-words]",
        "--set",
        f"output_metadata_dir={folder}/other",
        "--set",
        "slurm.partition=gpu",
        "--mem",
        "8G",
    )


def test_a_failed_shard_is_exit_code_1_with_its_reason(
    ran: subprocess.CompletedProcess[str], folder: Path
) -> None:
    assert ran.returncode == 1
    assert "3/3 shards, 10 rows" in ran.stdout
    assert "failed 1 (broken): ShardError: " in ran.stdout
    assert f"{folder}/tars/broken.tar is no tar: it is text: " in ran.stdout
    assert "Traceback" not in ran.stdout + ran.stderr


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_run_goes_on_where_nobody_reads_what_it_prints(folder: Path, unbuffered: str) -> None:
    """As with `| head -1`, which ends once it has a line."""
    reader, out = os.pipe()
    os.close(reader)
    to = folder / f"unread{unbuffered}"
    words = ["--local", "--set", f"output_metadata_dir={to}"]
    words += ["--set", f"input_tars={folder}/tars/0*.tar"]
    with open(out, "w") as unread:
        ended = subprocess.run(
            [BIN / "d2m-submit", folder / "c.yml", *words],
            stdout=unread,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
            check=False,
        )
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert {path.stem for path in to.glob("*.parquet")} == {"00000", "00001"}


def test_samples_are_looked_at_and_copied_without_torch(
    ran: subprocess.CompletedProcess[str], folder: Path
) -> None:
    """All that opens tars and folders of pictures on a login node."""
    pictures, run, kept = folder / "pictures", str(folder / "other" / ".d2m"), folder / "kept.jsonl"
    pictures.mkdir()
    with tarfile.open(folder / "tars" / "00000.tar") as tar:
        tar.extractall(pictures, filter="data")
    words = [run, "--top", "2", "--by", "text-words"]
    commands = [
        ["init", str(pictures), "-o", str(folder / "new.yml")],
        ["report", run, "-o", str(folder / "page.html"), "--samples", "2"],
        ["select", *words, "--look", str(folder / "look.html"), "-o", str(kept)],
        ["export", "subset-tars", run, "--lists", str(kept), "-o", str(folder / "kept")],
    ]
    ended = _run(sys.executable, "-c", SEEN, json.dumps(commands))
    seen = json.loads(ended.stderr.splitlines()[-1])
    assert seen == {command[0]: [0, False] for command in commands}
    assert "2 rows of 1 shard" in ended.stdout
    assert "<img" in (folder / "page.html").read_text()


def test_set_and_the_slurm_options_override_the_config(
    ran: subprocess.CompletedProcess[str], folder: Path
) -> None:
    assert ran.returncode == 1
    assert pq.read_schema(folder / "other" / "00000.parquet").names == [
        "key",
        "text-words",
        "uid",
        "caption",
    ]
    kept = (folder / "other" / ".d2m" / "config.yml").read_text()
    assert "partition: gpu" in kept
    assert "mem: 8G" in kept


def test_every_mistake_of_a_command_is_told_at_once(folder: Path) -> None:
    words = ("--set", "batch_size=0", "--set", "models=[image-stat]", "--set", "nonsense")
    ended = submit(folder / "c.yml", *words)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "batch_size: found 0" in ended.stderr
    assert "did you mean 'image-stats'?" in ended.stderr
    assert "--set nonsense: found no `key=value`" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_an_unknown_option_is_a_usage_error(folder: Path) -> None:
    ended = submit(folder / "c.yml", "--partitoin", "gpu")
    assert ended.returncode == 2
    assert "--partitoin" in ended.stderr


def test_a_machine_without_slurm_says_so(folder: Path) -> None:
    """And what to do; nothing has been written then."""
    environment = {**os.environ, "PATH": str(BIN)}
    ended = d2m("submit", folder / "c.yml", env=environment)
    assert ended.returncode == 3
    assert "--local" in ended.stderr
    assert not (folder / "out").exists()


# --- checkpoints ---


@pytest.mark.parametrize(
    "command", [("submit", "--dry-run"), ("submit", "--local"), ("weights", "check")]
)
def test_missing_checkpoints_are_named_with_url_and_command(
    command: tuple[str, str], folder: Path
) -> None:
    config, empty = folder / "six.yml", folder / "no-weights"
    first, second = command
    words = (first, config, second) if second.startswith("-") else (first, second, config)
    ended = d2m(*words, env=_environment(empty))
    assert ended.returncode == 2
    for checkpoint in CHECKPOINTS.values():
        line = f"{empty / checkpoint.name} is missing; it is published at {checkpoint.url}"
        assert line in ended.stderr
    assert f"run `d2m weights fetch {config}` where there is internet" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_fetch_without_internet_names_every_file(folder: Path) -> None:
    empty = folder / "no-weights"
    ended = d2m("weights", "fetch", folder / "six.yml", env=_environment(empty))
    assert ended.returncode == 2
    for checkpoint in CHECKPOINTS.values():
        assert checkpoint.url in ended.stderr
        assert f"copy to {empty / checkpoint.name}" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert [p.name for p in empty.rglob("*") if p.suffix == ".part"] == []


def test_checkpoints_of_ones_own_are_told_from_the_published(
    folder: Path, checkpoints: Path
) -> None:
    ended = d2m("weights", "check", folder / "six.yml", env=_environment(checkpoints))
    assert ended.returncode == 2
    published = [c.name for c in CHECKPOINTS.values() if not c.sha256]
    for checkpoint in CHECKPOINTS.values():
        state = "ok" if checkpoint.name in published else "not the published file"
        assert re.search(rf"^{state} +{checkpoints / checkpoint.name}$", ended.stdout, re.M)
    assert "allow_unpublished_weights: true accepts your own" in ended.stderr


def test_all_checkpoints_are_listed_without_a_config(folder: Path) -> None:
    ended = d2m("weights", "list")
    assert ended.returncode == 0
    for checkpoint in CHECKPOINTS.values():
        assert checkpoint.name in ended.stdout
        assert checkpoint.url in ended.stdout
    few = d2m("weights", "list", folder / "c.yml")
    assert (few.returncode, "ViT-B-32.pt" in few.stdout) == (0, False)


@pytest.mark.parametrize("command", ["submit", "status", "logs"])
def test_names_that_a_terminal_cannot_show_are_escaped(command: str, tmp_path: Path) -> None:
    """Under PYTHONIOENCODING=ascii, as some schedulers and cron set it."""
    folder = tmp_path / "Größe"
    (broken := folder / "tars" / "é.tar").parent.mkdir(parents=True)
    broken.write_bytes(b"not a tar" * 100)
    config = write_config(
        folder / "c.yml",
        STATS,
        input_tars=str(folder / "tars" / "*.tar"),
        output_metadata_dir=str(folder / "out"),
    )
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    ended = submit(config, env=environment)
    if command != "submit":
        ended = d2m(command, config, *(["é"] if command == "logs" else []), env=environment)
    assert "Traceback (most recent call last)" not in ended.stderr
    assert ended.returncode == (1 if command == "submit" else 0), ended.stderr
    assert "\\xe9" in ended.stdout


INTERRUPTS = """
import os, signal, sys

class AtImport:
    def find_spec(self, name, path, target=None):
        if name == os.environ["INTERRUPTED_AT"]:
            signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, AtImport())
"""
"""A `sitecustomize` that sends the process a SIGINT when it imports a module."""


@pytest.mark.parametrize(
    ("command", "module"),
    [
        ("d2m", "d2m_hpc.cli.commands"),
        ("d2m", "d2m_hpc.config.schema"),
        ("d2m", "yaml"),
        ("d2m-submit", "typer"),
        ("d2m-submit", "pydantic"),
        ("-m d2m_hpc", "typer"),
    ],
)
def test_an_interrupt_while_libraries_are_imported_is_quiet(
    command: str, module: str, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTS)
    words = {"d2m": [BIN / "d2m", "plan"], "d2m-submit": [BIN / "d2m-submit", "--dry-run"]}
    started = words.get(command, [sys.executable, *command.split(), "plan"])
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "INTERRUPTED_AT": module}
    ended = subprocess.run(
        [*map(str, started), str(folder / "c.yml")],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "")
