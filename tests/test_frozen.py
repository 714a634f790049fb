"""A run is frozen when it is submitted: by what its tasks compute, and who may look at it then."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from kit import STATS, custom_file, d2m, submit, write_config, write_shards

from d2m_hpc import config as configs
from d2m_hpc.errors import ConfigError, D2MError, WeightsError
from d2m_hpc.launch.flow import commit, submitting
from d2m_hpc.plan.decide import decide
from d2m_hpc.plan.workload import inspect
from d2m_hpc.run import frozen
from d2m_hpc.run.folder import RunDir
from d2m_hpc.run.manifest import Manifest
from d2m_hpc.watch.verify import verify
from d2m_hpc.worker.task import run_task

OWN = custom_file("length", "caption-length")


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
    """They go on to what they need: Slurm, and the outputs, which get DataComp's names."""
    for command in (["cancel"], ["export", "datacomp", "-o", str(tmp_path)]):
        ended = d2m(*command, finished / "c.yml")
        assert "no-such" not in ended.stderr + ended.stdout
        assert "own.py" not in ended.stderr + ended.stdout
    assert ended.returncode == 0, ended.stderr


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
    frozen.write_text(frozen.read_text().replace("\nslurm:", "\nwarp: 9\nslurm:"))
    ended = d2m("status", tmp_path / "out" / ".d2m")
    assert (ended.returncode, "warp" in ended.stderr) == (0, True), ended.stderr


# --- code ---


pytestmark = pytest.mark.usefixtures("own_process")


def submitted(config: Path, **how: Any) -> RunDir:
    """Submit all that is left as one task, which has not begun."""
    workload = inspect(configs.load(config), str(config), **how)
    with submitting(workload):
        decision = decide(workload)
        commit(decision, [decision.pending])
    return workload.run


def lengths(folder: Path, stem: str = "00000") -> list[float]:
    values: list[float] = pq.read_table(folder / "out" / f"{stem}.parquet")[
        "caption-length"
    ].to_pylist()
    return values


WRITTEN = [9.0] * 4
"""The lengths of the captions of shard 00000: `caption 0` and so on."""
TENFOLD = OWN.replace("float(len(text))", "10.0 * len(text)")


def test_a_custom_file_that_is_edited_after_the_submit_is_not_run(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    run = submitted(config)
    before = inspect(configs.load(config), "c.yml").fingerprint_id
    (tmp_path / "code" / "own.py").write_text(TENFOLD)
    run_task(run.root, "000", 0)
    assert lengths(tmp_path) == WRITTEN
    assert {o.fingerprint for o in Manifest.load(run).done.values()} == {before}
    with pytest.raises(ConfigError, match="custom_file: the sha256 was") as refused:
        decide(inspect(configs.load(config), "c.yml"))
    assert "caption-length of the finished outputs come from it" in str(refused.value)


def test_a_custom_file_that_is_gone_is_run(tmp_path: Path) -> None:
    """Also by a task that is requeued after all of the user's files have moved."""
    run = submitted(config_of(tmp_path))
    shutil.rmtree(tmp_path / "code")
    run_task(run.root, "000", 0)
    assert lengths(tmp_path) == WRITTEN


def test_two_submits_run_their_own_code_and_have_fingerprints_of_their_own(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    run = submitted(config)
    config_of(tmp_path, TENFOLD)
    submitted(config)
    run_task(run.root, "001", 0)
    assert lengths(tmp_path) == [90.0] * 4
    first, second = (json.loads(s.intent.read_bytes())["fingerprint"] for s in run.submissions())
    assert first != second
    assert {o.fingerprint for o in Manifest.load(run).done.values()} == {second}


WITH_HELPERS = OWN.replace("import torch", "import torch\nimport scale\nfrom parts import offset")
WITH_HELPERS = WITH_HELPERS.replace("float(len(text))", "scale.BY * len(text) + offset.of()")


def with_helpers(folder: Path, **more: object) -> Path:
    """A config whose custom file has a module, a package and a function's import beside it."""
    (folder / "code" / "parts").mkdir(parents=True)
    (folder / "code" / "scale.py").write_text("BY = 2.0\n")
    (folder / "code" / "late.py").write_text("VALUE = 0.5\n")
    (folder / "code" / "parts" / "__init__.py").write_text("")
    offset = "from .units import ONE\ndef of():\n    import late\n    return ONE + late.VALUE\n"
    (folder / "code" / "parts" / "offset.py").write_text(offset)
    (folder / "code" / "parts" / "units.py").write_text("ONE = 1.0\n")
    return config_of(folder, WITH_HELPERS, **more)


HELPERS = {
    "scale.py": "BY = 3.0\n",
    "parts/units.py": "ONE = 7.0\n",
    "late.py": "VALUE = 7.5\n",
}


def test_modules_beside_a_custom_file_are_frozen_with_it(tmp_path: Path) -> None:
    config = with_helpers(tmp_path)
    run = submitted(config)
    custom = frozen.read(run.submission("000").frozen)
    assert next(iter(custom.sources)) == "d2m_custom_own"
    helpers = {"scale", "parts", "parts.offset", "parts.units", "late"}
    assert set(custom.sources) == {"d2m_custom_own", *helpers}
    for name, text in HELPERS.items():
        (tmp_path / "code" / name).write_text(text)
    run_task(run.root, "000", 0)
    assert lengths(tmp_path) == [2 * 9 + 1.5] * 4
    assert not list((tmp_path / "code").rglob("__pycache__"))
    with pytest.raises(ConfigError) as refused:
        decide(inspect(configs.load(config), "c.yml"))
    for name in ("scale", "parts.units", "late"):
        assert f"{name}: the sha256 was" in str(refused.value)
    assert "custom_file:" not in str(refused.value)


def test_a_module_that_was_not_found_at_the_submit_is_not_imported(tmp_path: Path) -> None:
    code = OWN.replace("super().__init__()", "super().__init__(); __import__('sca' + 'le')")
    config = config_of(tmp_path, code)
    (tmp_path / "code" / "scale.py").write_text("BY = 2.0\n")
    run = submitted(config)
    with pytest.raises(ConfigError, match=r"'scale' .* was not found when the run was submitted"):
        run_task(run.root, "000", 0)
    assert list(run.records.iterdir()) == []


def test_a_module_that_appears_is_found_by_the_next_submit(tmp_path: Path) -> None:
    optional = "try:\n    import scale\nexcept ImportError:\n    pass\n"
    config = config_of(tmp_path, optional + OWN)
    without = submitted(config)
    before = inspect(configs.load(config), "c.yml")
    (tmp_path / "code" / "scale.py").write_text("BY = 2.0\n")
    after = inspect(configs.load(config), "c.yml")
    assert [*before.custom.sources] == ["d2m_custom_own"]
    assert [*after.custom.sources] == ["d2m_custom_own", "scale"]
    run_task(without.root, "000", 0)
    assert lengths(tmp_path) == WRITTEN


def test_an_unchanged_file_is_not_run_again_and_gives_the_same(tmp_path: Path) -> None:
    config = with_helpers(tmp_path)
    run = submitted(config, thorough=True)
    first = frozen.read(run.submission("000").frozen)
    (tmp_path / "code" / "own.py").chmod(0o400)
    assert frozen.newest(run, tmp_path / "code" / "own.py") == first
    again, fresh = (inspect(configs.load(config), "c.yml", thorough=t) for t in (False, True))
    assert again.fingerprint == fresh.fingerprint
    assert again.custom.registry == fresh.custom.registry
    assert (again.custom.hashes, again.custom.missing) == (first.hashes, first.missing)


def test_a_custom_file_reads_what_lies_beside_it(tmp_path: Path) -> None:
    beside = "from pathlib import Path\nWORDS = (Path(__file__).parent / 'by').read_text()\n"
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "by").write_text("4")
    config = config_of(tmp_path, beside + OWN.replace("float(len", "float(int(WORDS) * len"))
    run_task(submitted(config).root, "000", 0)
    assert lengths(tmp_path) == [36.0] * 4


def test_a_link_to_a_custom_file_is_named_as_it_was_given(tmp_path: Path) -> None:
    config = with_helpers(tmp_path)
    (tmp_path / "code").rename(tmp_path / "real")
    (tmp_path / "code").symlink_to(tmp_path / "real")
    run = submitted(config)
    sources = frozen.read(run.submission("000").frozen).sources
    assert sources["scale"].path == str(tmp_path / "code" / "scale.py")
    (tmp_path / "code").unlink()
    run_task(run.root, "000", 0)
    assert lengths(tmp_path) == [2 * 9 + 1.5] * 4


def test_a_damaged_copy_stops_a_task_in_one_line(tmp_path: Path) -> None:
    run = submitted(config_of(tmp_path))
    [copy] = run.submission("000").frozen.glob("*.py")
    copy.write_text(TENFOLD)
    with pytest.raises(D2MError, match=r"000-own.py is not the copy that was made of .*submit ag"):
        run_task(run.root, "000", 0)
    shutil.rmtree(run.submission("000").frozen)
    with pytest.raises(ConfigError, match=r"own.py is not frozen in it"):
        run_task(run.root, "000", 0)
    assert list(run.records.iterdir()) == []


def test_a_frozen_config_that_is_cut_anywhere_is_named(tmp_path: Path) -> None:
    """Where its first lines are whole, its run would be looked at with defaults for the rest."""
    path = submitted(config_of(tmp_path)).config
    whole = path.read_bytes()
    assert configs.glance(path, frozen=True)
    for end in range(len(whole) - 1):
        path.write_bytes(whole[:end])
        for read in (configs.glance, configs.load):
            with pytest.raises(ConfigError, match=r"config\.yml"):
                read(path, frozen=True)


def test_a_submit_that_dies_between_the_copies_and_the_intent_is_none(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    run = submitted(config)
    run.submission("000").intent.unlink()
    assert submit(config).returncode == 0
    assert lengths(tmp_path) == WRITTEN
    assert verify(*status_of(run)).faults == []


def status_of(run: RunDir) -> tuple[RunDir, configs.Config]:
    return run, configs.glance(run.config, frozen=True)


# --- checkpoints ---

READING = OWN.replace(
    "super().__init__()",
    "super().__init__()\n        self.by = torch.load(WEIGHTS / 'by.pth', weights_only=True)",
).replace("float(len(text))", "float(self.by) * len(text)")
READING = READING.replace(
    "import torch",
    "import torch\nfrom pathlib import Path\nWEIGHTS = Path(__file__).parent / 'w'",
    1,
)
DECLARING = READING.replace("to_device = False", "to_device = False\n    checkpoints = PATHS")


def with_weights(folder: Path, declared: str | None = "['w/by.pth']", **more: object) -> Path:
    """A config whose custom model reads a checkpoint, and maybe declares it."""
    (folder / "code" / "w").mkdir(parents=True, exist_ok=True)
    if not (folder / "code" / "w" / "by.pth").exists():
        torch.save(torch.tensor(2.0), folder / "code" / "w" / "by.pth")
    return config_of(folder, DECLARING.replace("PATHS", declared) if declared else READING, **more)


def change(folder: Path, by: float = 5.0) -> None:
    torch.save(torch.tensor(by), folder / "code" / "w" / "by.pth")


@pytest.mark.parametrize("declared", ["['w/by.pth']", "WEIGHTS / 'by.pth'", "'w'"])
def test_a_declared_checkpoint_that_changed_after_the_submit_stops_the_task(
    declared: str, tmp_path: Path
) -> None:
    run = submitted(with_weights(tmp_path, declared))
    (name, sha256), *none = json.loads(fingerprint_of(run))["checkpoints"].items()
    assert name == ("length/w/by.pth" if declared == "'w'" else "length/by.pth")
    assert not none
    change(tmp_path)
    with pytest.raises(WeightsError, match=rf"by.pth is another file: its sha256 was {sha256}, is"):
        run_task(run.root, "000", 0)
    assert list(run.records.iterdir()) == []
    (tmp_path / "code" / "w" / "by.pth").unlink()
    with pytest.raises(WeightsError, match=r"by.pth cannot be read: No such file"):
        run_task(run.root, "000", 0)


def fingerprint_of(run: RunDir) -> bytes:
    [path] = run.fingerprints.iterdir()
    return path.read_bytes()


def test_a_checkpoint_of_another_time_and_the_same_content_is_the_same(tmp_path: Path) -> None:
    run = submitted(with_weights(tmp_path))
    path = tmp_path / "code" / "w" / "by.pth"
    os.utime(path, (5, 5))
    run_task(run.root, "000", 0)
    assert lengths(tmp_path) == [18.0] * 4


def test_a_declared_checkpoint_that_changed_between_two_submits_is_refused(tmp_path: Path) -> None:
    config = with_weights(tmp_path)
    run_task(submitted(config).root, "000", 0)
    change(tmp_path)
    asked = inspect(configs.load(config), "c.yml")
    with pytest.raises(ConfigError, match=r"checkpoints: the sha256 of length/by.pth was"):
        decide(asked)
    again = inspect(configs.load(config, ["reprocess=true"]), "c.yml")
    assert len(decide(again).pending) == 2


@pytest.mark.parametrize(
    ("declared", "mistake"),
    [
        ("['w/none.pth']", r"checkpoints of 'length': .*none.pth is not there"),
        ("{'a': 1}.items()", r"checkpoints: found dict_items.*; valid is a list of paths"),
        ("7", "checkpoints: found 7; valid is a list of paths"),
    ],
)
def test_a_declaration_that_is_wrong_is_refused(
    declared: str, mistake: str, tmp_path: Path
) -> None:
    with pytest.raises((WeightsError, ConfigError), match=mistake):
        submitted(with_weights(tmp_path, declared))


def test_a_changed_published_checkpoint_stops_the_task(tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    weights.mkdir()
    torch.save({}, weights / "nsfw_torch.pt")
    shutil.copy(weights / "nsfw_torch.pt", weights / "ViT-L-14.pt")
    config = config_of(
        tmp_path,
        models=["length", "oai-clip-vit-l14", "nsfw-image-oai-clip-vit-l-14"],
        postprocess_columns=["caption-length"],
        weights_dir=str(weights),
        allow_unpublished_weights=True,
    )
    run = submitted(config)
    torch.save({"a": 1}, weights / "nsfw_torch.pt")
    with pytest.raises(WeightsError) as refused:
        run_task(run.root, "000", 0)
    assert str(refused.value).splitlines()[0] == "checkpoints have changed since the submit:"
    assert "ViT-L-14.pt is another" not in str(refused.value)
    assert f"{weights}/nsfw_torch.pt is another file" in str(refused.value)
    assert refused.value.exit_code == 2


def test_a_checkpoint_that_nobody_declared_may_not_change_within_a_run(tmp_path: Path) -> None:
    """A custom model opens it by itself; the first task notes what it is."""
    config = with_weights(tmp_path, None, steal=False)
    workload = inspect(configs.load(config), "c.yml")
    with submitting(workload):
        decision = decide(workload)
        commit(decision, [[job] for job in decision.pending])
    run = workload.run
    run_task(run.root, "000", 0)
    assert lengths(tmp_path) == [18.0] * 4
    os.utime(tmp_path / "code" / "w" / "by.pth", (5, 5))
    change(tmp_path)
    with pytest.raises(WeightsError) as refused:
        run_task(run.root, "000", 1)
    assert "by.pth is another file: its sha256 was" in str(refused.value)
    assert "declare it in the custom class (`checkpoints = [...]`)" in str(refused.value)
    assert not (tmp_path / "out" / "00001.parquet").exists()
    change(tmp_path, 2.0)  # restored
    run_task(run.root, "000", 1)
    assert lengths(tmp_path, "00001") == [24.0] * 4


def test_a_checkpoint_that_is_declared_since_takes_the_place_of_one_that_was_not(
    tmp_path: Path,
) -> None:
    run_task(submitted(with_weights(tmp_path, None)).root, "000", 0)
    change(tmp_path)
    config = with_weights(tmp_path, "['w/by.pth']", reprocess=True)
    run_task(submitted(config).root, "001", 0)
    assert lengths(tmp_path) == [45.0] * 4
