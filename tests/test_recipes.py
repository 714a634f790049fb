"""The configs of configs/recipes do what their comments say, with small random checkpoints."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow.parquet as pq
import pytest
import tiny_blip2
import torch
import yaml
from kit import captions, photographs, write_tar
from pages import ROOT
from torch import nn

from d2m_hpc import cli
from d2m_hpc.models.published import HubRepo
from d2m_hpc.models.registry import builtin

RECIPES = sorted((ROOT / "configs" / "recipes").glob("*.yml"))


def commands(recipe: Path) -> list[list[str]]:
    """The commands in a recipe's comments, without what is fetched from the internet."""
    lines = re.findall(r"^#   (d2m.*)$", recipe.read_text(), re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines if " fetch " not in line]


@pytest.fixture(scope="module")
def weights(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the recipes' models need, by the published names."""
    folder = tmp_path_factory.mktemp("recipes") / "weights"
    shutil.copytree(checkpoints, folder, copy_function=os.symlink)
    save_clip(folder / HubRepo("apple/DFN-public").name)
    tiny_blip2.save(folder / HubRepo("Salesforce/blip2-opt-2.7b").name)
    [aesthetic] = builtin().models["aesthetic-laion-v2"].checkpoints
    save_head(folder / aesthetic.name)
    nsfw = torch.load(checkpoints / "nsfw_torch.pt", weights_only=True)
    nsfw[[*nsfw][-1]] -= 1  # which leaves random scores below a half
    (folder / "nsfw_torch.pt").unlink()
    torch.save(nsfw, folder / "nsfw_torch.pt")
    return folder


def save_clip(folder: Path) -> None:
    """A small random CLIP as open_clip exports one."""
    vision = {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    config: dict[str, Any] = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}
    folder.mkdir(parents=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    torch.manual_seed(0)
    torch.save(open_clip.CLIP(**config).state_dict(), folder / "open_clip_pytorch_model.bin")


def save_head(path: Path) -> None:
    """A small random head on CLIP L/14, whose scores are around 5."""
    torch.manual_seed(0)
    state = nn.Sequential(nn.Linear(768, 8), nn.Dropout(), nn.Linear(8, 1)).state_dict()
    state["2.bias"] += 4.917
    path.parent.mkdir(parents=True)
    torch.save({f"layers.{name}": value for name, value in state.items()}, path)


@pytest.fixture(scope="module")
def tar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some photographs, as img2dataset would have left them of large pictures."""
    members: dict[str, bytes] = {}
    for i, (picture, caption) in enumerate(zip(photographs(12), captions(), strict=False)):
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG")
        told = {"uid": f"{i:032x}", "url": f"https://example.org/{i}", "caption": caption}
        sizes = {"original_width": 640, "original_height": 900, "sha256": f"{i:064x}"}
        members[f"{i}.jpg"] = buffer.getvalue()
        members[f"{i}.json"] = json.dumps({**told, **sizes}).encode()
        members[f"{i}.txt"] = caption.encode()
    return write_tar(tmp_path_factory.mktemp("tars") / "00000.tar", members)


@pytest.fixture
def run(
    tmp_path: Path, weights: Path, tar: Path, monkeypatch: pytest.MonkeyPatch, own_process: None
) -> Callable[[Path], Path]:
    """Run the commands of a recipe in a folder with its config; gives the folder of the outputs."""

    def ran(recipe: Path) -> Path:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("D2M_WEIGHTS", str(weights))
        values = yaml.safe_load(recipe.read_text())
        small = {
            "input_tars": str(tar),
            "output_metadata_dir": str(tmp_path / "out"),
            "allow_unpublished_weights": True,
            "device": "cpu",
            "nworkers": 2,
            "batch_size": 6,
        }
        for name, *arguments in commands(recipe):
            path = Path(next(a for a in arguments if a.endswith(".yml")))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(yaml.safe_dump({**values, **small}))
            local = ["--local"] if name == "d2m-submit" else []
            monkeypatch.setattr(sys, "argv", [name, *arguments, *local])
            with pytest.raises(SystemExit) as ended:
                {"d2m": cli.main, "d2m-submit": cli.main_submit}[name]()
            assert ended.value.code == 0, (name, arguments)
        return tmp_path / "out"

    return ran


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_commands_of_a_recipe_run(recipe: Path, run: Callable[[Path], Path]) -> None:
    """The outputs have values in all columns, and the subset has some of the rows."""
    out = run(recipe)
    table = pq.read_table(out / "00000.parquet")
    uids = np.load(out.parent / "subset.npy")
    assert 0 < len(uids) < table.num_rows or recipe.stem == "recaption"  # a random CLIP likes none
    assert all(table[name].null_count < table.num_rows for name in table.column_names)
