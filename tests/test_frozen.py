"""A run is frozen when it is submitted: by what its tasks compute, and who may look at it then."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from kit import STATS, d2m, submit, write_config, write_shards

from d2m_hpc import config as configs
from d2m_hpc.errors import ConfigError
from d2m_hpc.run.folder import RunDir

OWN = """
import torch


class Length(torch.nn.Module):
    raw_inputs = ("text",)
    preprocessors = ("identity",)
    to_device = False

    def __init__(self, device):
        super().__init__()

    def forward(self, texts):
        return torch.tensor([float(len(text)) for text in texts])


model_lookup = {"length": Length}
postprocess_parquet_lookup = {"caption-length": lambda cache: cache["length"]}
"""


def config_of(folder: Path, code: str = OWN, shards: int = 2, **more: object) -> Path:
    """A config with a custom file, `own.py`, in a folder of its own beside the tars."""
    (folder / "code").mkdir(exist_ok=True)
    (folder / "code" / "own.py").write_text(code)
    if not (folder / "tars").exists():
        write_shards(folder / "tars", shards, samples=4)
    values = {
        **STATS,
        "models": ["text-stats", "length"],
        "postprocess_columns": ["text-words", "caption-length"],
        "postprocess_features": [],
        "input_tars": str(folder / "tars" / "*.tar"),
        "output_metadata_dir": str(folder / "out"),
        "custom_pypath": str(folder / "code" / "own.py"),
    }
    return write_config(folder / "c.yml", values, **more)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run, whose custom file is gone, and whose config is not valid."""
    folder = tmp_path_factory.mktemp("finished")
    config = config_of(folder)
    assert submit(config).returncode == 0
    shutil.rmtree(folder / "code")
    values = yaml.safe_load(config.read_text())
    write_config(config, values, models=["no-such"], batch_size="many", no_such_key=1)
    return folder


LOOKS = {
    "status": ("status", "TARGET"),
    "status --json": ("status", "TARGET", "--json"),
    "verify": ("verify", "TARGET"),
    "logs": ("logs", "TARGET", "00000"),
    "report": ("report", "TARGET", "-o", "OUT.html"),
    "select": ("select", "TARGET", "-o", "OUT.npy", "--top", "0.5", "--by", "caption-length"),
}


@pytest.mark.parametrize("target", ["c.yml", "out/.d2m"])
@pytest.mark.parametrize("command", LOOKS)
def test_a_run_can_be_looked_at_without_its_users_files(
    command: str, target: str, finished: Path, tmp_path: Path
) -> None:
    meant = {"TARGET": str(finished / target), "OUT.html": str(tmp_path / "r.html")}
    meant["OUT.npy"] = str(tmp_path / "s.npy")
    ended = d2m(*(meant.get(word, word) for word in LOOKS[command]))
    assert ended.returncode == 0, ended.stderr


def test_cancel_and_export_find_such_a_run_too(finished: Path, tmp_path: Path) -> None:
    """They go on to what they need: Slurm, and the names of DataComp."""
    for command in (["cancel"], ["export", "datacomp", "-o", str(tmp_path)]):
        ended = d2m(*command, finished / "c.yml")
        assert "no-such" not in ended.stderr + ended.stdout
        assert "own.py" not in ended.stderr + ended.stdout
    assert "use_datacomp_keys" in ended.stderr


def test_a_config_that_does_not_say_where_its_run_is_cannot_be_looked_at(tmp_path: Path) -> None:
    (tmp_path / "c.yml").write_text("output_metadata_dir: [1]\nbatch_size: many\n")
    ended = d2m("status", tmp_path / "c.yml")
    assert ended.returncode == 2
    assert "output_metadata_dir: found [1]" in ended.stderr
    assert "batch_size" not in ended.stderr


def test_a_key_of_a_newer_version_is_told_and_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_config(
        tmp_path / "config.yml",
        STATS,
        input_tars="a.tar",
        output_metadata_dir="out",
        warp=9,
        slurm={"tasks_per_node": 4, "wings": 2},
    )
    before = path.read_bytes()
    config = configs.load(path, frozen=True)
    assert (config.models, config.slurm.tasks_per_node) == (STATS["models"], 4)
    [told] = caplog.messages
    assert str(path) in told
    assert "warp, slurm.wings" in told
    assert path.read_bytes() == before


def test_a_value_that_this_version_cannot_work_with_stops_a_task_but_no_look(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values = {**STATS, "amp": "float8", "input_tars": "a.tar", "output_metadata_dir": "out"}
    path = write_config(tmp_path / "config.yml", values)
    with pytest.raises(ConfigError, match="amp: found 'float8'"):
        configs.load(path, frozen=True)
    config = configs.glance(path, frozen=True)
    assert (config.models, config.amp) == (STATS["models"], "auto")
    assert "amp: found 'float8'" in caplog.text


def test_status_tells_of_a_newer_versions_key(tmp_path: Path) -> None:
    config = config_of(tmp_path, shards=1)
    assert submit(config).returncode == 0
    frozen = RunDir(tmp_path / "out" / ".d2m").config
    frozen.write_text(frozen.read_text() + "warp: 9\n")
    ended = d2m("status", tmp_path / "out" / ".d2m")
    assert (ended.returncode, "warp" in ended.stderr) == (0, True), ended.stderr
