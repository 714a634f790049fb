"""Everything that would fail on every node is found at submit, and all at once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from kit import DATACOMP, STATS, custom_config, custom_file, d2m, write_config, write_shards

from d2m_hpc.config import load
from d2m_hpc.config.mistakes import _raw_mistakes
from d2m_hpc.errors import ConfigError
from d2m_hpc.models.family import ModelSpec
from d2m_hpc.models.inputs import ImageInput
from d2m_hpc.models.registry import Registry
from d2m_hpc.plan.workload import inspect


def test_a_good_config_passes_and_leaves_nothing(awkward_path: Path) -> None:
    write_shards(awkward_path / "tars", 2, samples=1)
    config = write_config(
        awkward_path / "c.yml",
        STATS,
        input_tars=str(awkward_path / "tars" / "*.tar"),
        output_metadata_dir=str(awkward_path / "out"),
    )
    inspect(load(config), "c.yml", thorough=True)
    assert [p.name for p in (awkward_path / "out").iterdir()] == [".d2m"]
    assert not list((awkward_path / "out" / ".d2m").glob(".*"))


def test_all_problems_are_named_at_once(tmp_path: Path) -> None:
    (tmp_path / "tars").mkdir()
    (tmp_path / "out").write_text("a file, not a folder")
    (tmp_path / "custom.py").write_text("import torch\nraise RuntimeError('no GPU driver')\n")
    (tmp_path / "a.tar").symlink_to(tmp_path / "nowhere")
    config = write_config(
        tmp_path / "c.yml",
        DATACOMP,
        input_tars=[str(tmp_path / "tars" / "*.tar"), "memory://none/00000.tar"],
        output_metadata_dir=str(tmp_path / "out"),
        run_dir=str(tmp_path / "run"),
        weights_dir=str(tmp_path / "weights"),
        custom_pypath=str(tmp_path / "custom.py"),
    )
    with pytest.raises(ConfigError, match="preflight") as caught:
        inspect(load(config), "c.yml", thorough=True)
    text = "\n".join(caught.value.mistakes)
    assert "output_metadata_dir: " in text
    assert f"found no tar for '{tmp_path / 'tars' / '*.tar'}'" in text
    assert "input_tars: memory://none/00000.tar cannot be read" in text
    assert "scrfd_10g.pt is missing" in text
    assert "custom.py: custom_pypath: importing it failed" in text
    assert "RuntimeError: no GPU driver (custom.py, line 2)" in text


COMPUTED = """
import sys
print("a library's banner", file=sys.stderr)

class Look:
    raw_inputs = [n for n in ("images",)]
    preprocessors = ["identity"]
    dependencies = [n for n in ("other",)]
    def __init__(self, device): ...

model_lookup = {"look": Look}
"""


def test_what_only_running_the_custom_file_can_tell_is_told(tmp_path: Path) -> None:
    write_shards(tmp_path / "tars", 1, samples=1)
    (tmp_path / "custom.py").write_text(COMPUTED)
    config = write_config(
        tmp_path / "c.yml",
        {"models": ["look"]},
        input_tars=str(tmp_path / "tars" / "*.tar"),
        output_metadata_dir=str(tmp_path / "out"),
        custom_pypath=str(tmp_path / "custom.py"),
    )
    with pytest.raises(ConfigError, match="'look' needs the output of 'other'") as caught:
        inspect(load(config), "c.yml", thorough=True)
    assert "unknown raw input 'images'; did you mean 'image'" in str(caught.value)
    assert "banner" not in str(caught.value)


def test_a_custom_model_in_the_place_of_a_built_in_one_is_noted(tmp_path: Path) -> None:
    write_shards(tmp_path / "tars", 1, samples=1)
    named = {'("images",)': '("image",)', '("other",)': "()", '"look"': '"text-stats"'}
    text = COMPUTED
    for old, new in named.items():
        text = text.replace(old, new)
    (tmp_path / "custom.py").write_text(text)
    config = write_config(
        tmp_path / "c.yml",
        {"models": ["text-stats"]},
        input_tars=str(tmp_path / "tars" / "*.tar"),
        output_metadata_dir=str(tmp_path / "out"),
        custom_pypath=str(tmp_path / "custom.py"),
    )
    noted = inspect(load(config), "c.yml").notices
    assert "'text-stats' is the custom file's model, not the built-in one of that name" in noted


def test_an_image_input_for_a_text_is_refused() -> None:
    spec = ModelSpec("own", ("text",), (ImageInput(8),))
    [mistake] = _raw_mistakes(spec, Registry())
    assert "'own' wants the raw input 'text' prepared as an image of 8 x 8" in mistake


def test_folders_are_not_world_writable_and_colons_are_just_a_name(tmp_path: Path) -> None:
    tars = tmp_path / "k::v"
    write_shards(tars, 1, samples=1)
    config = write_config(
        tmp_path / "c.yml",
        STATS,
        input_tars=str(tars / "00000.tar"),
        output_metadata_dir=str(tmp_path / "new" / "out"),
    )
    before = os.umask(0)
    try:
        inspect(load(config), "c.yml", thorough=True)
    finally:
        os.umask(before)
    made = [tmp_path / "new", *(tmp_path / "new").rglob("*")]
    assert [p for p in made if p.stat().st_mode & 0o002] == []


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("raise OSError('no disk\\nat all')", "OSError: no disk at all (own.py, line 1)"),
        ("sys.exit('tired')", "SystemExit: tired (own.py, line 1)"),
        ("os._exit(0)", "it ended with 0"),
        ("os._exit(3)", "it ended with 3"),
        ("os.kill(os.getpid(), 9)", "it ended with -9"),
        ("print('a banner', file=sys.stderr, flush=True), os.abort()", "a banner"),
    ],
)
@pytest.mark.parametrize("local", [True, False])
def test_how_a_custom_file_ends_its_process_is_told(
    tmp_path: Path, local: bool, line: str, why: str
) -> None:
    write_shards(tmp_path / "tars", 1, samples=1)
    config = custom_config(tmp_path, f"import os, sys; {line}\n", "own")
    ended = d2m("submit", config, "--local" if local else "--dry-run")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert f"own.py: custom_pypath: importing it failed: {why}" in " ".join(ended.stderr.split())
    assert "Traceback" not in ended.stderr


def test_a_local_run_forks_for_its_custom_file_rather_than_import_torch_twice(
    tmp_path: Path,
) -> None:
    write_shards(tmp_path / "tars", 1, samples=1)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "beside.py").write_text("")
    code = "import importlib.util as util, os, sys\nfrom pathlib import Path\n"
    code += "told = [os.getpid(), os.getppid(), *sys.argv[1:], util.find_spec('beside')]\n"
    code += (
        "with Path(__file__).with_suffix('.txt').open('a') as file:\n    print(*told, file=file)\n"
    )
    config = custom_config(tmp_path, code + custom_file("own"), "own")
    ended = d2m("submit", config, "--local", cwd=tmp_path / "here")
    assert (ended.returncode, ended.stderr) == (0, "")
    described, ran = map(str.split, (tmp_path / "own.txt").read_text().splitlines())
    assert described[1] == ran[0] != described[0]
    assert described[2:] == ran[2:] == ["submit", str(config), "--local", "None"]
