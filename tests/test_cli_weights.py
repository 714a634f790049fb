"""`d2m weights` as a user runs it: the kit's files in their published names, from a mirror."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from kit import DATACOMP, d2m, write_config

from d2m_hpc.cli.commands import app
from d2m_hpc.errors import WeightsError
from d2m_hpc.models.weights import CHECKPOINTS

NO_OUTPUT: dict[str, Any] = {
    "postprocess_columns": [],
    "postprocess_features": [],
    "allow_unpublished_weights": True,
}


@pytest.fixture
def folder(weights_mirror: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The weights folder, which is to be made."""
    for name, value in weights_mirror.items():
        monkeypatch.setenv(name, value)
    return Path(weights_mirror["D2M_WEIGHTS"])


def _config(tmp_path: Path, **more: Any) -> Path:
    common = {"input_tars": "a.tar", "output_metadata_dir": str(tmp_path / "out")}
    return write_config(tmp_path / "c.yml", {**DATACOMP, **common, **more})


def _weights(*words: object) -> None:
    app(["weights", *map(str, words)], standalone_mode=False)


def _files(folder: Path) -> dict[str, int]:
    return {
        p.relative_to(folder).as_posix(): p.stat().st_size for p in folder.rglob("*") if p.is_file()
    }


def test_from_nothing_to_all_that_a_config_needs(
    folder: Path, checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = _config(tmp_path, allow_unpublished_weights=True)
    _weights("list", config)
    assert capsys.readouterr().out.count("missing") == len(CHECKPOINTS)
    _weights("fetch", config)
    said = capsys.readouterr().out
    assert _files(folder) == {name: _files(checkpoints)[name] for name in CHECKPOINTS}
    accepted = [c.name for c in CHECKPOINTS.values() if c.sha256]
    for name in accepted:
        line = rf"^not the published file {folder / name} \(accepted: allow_unpublished_weights"
        assert re.search(line, said, re.MULTILINE), name
    assert said.count("ok  ") == len(CHECKPOINTS) - len(accepted)
    _weights("check", config)
    assert capsys.readouterr().out == said
    _weights("list", config)
    listed = capsys.readouterr().out
    assert "missing" not in listed
    assert [name for name in CHECKPOINTS if str(folder / name) not in listed] == []


def test_a_mirror_s_own_files_are_refused_by_default(folder: Path, tmp_path: Path) -> None:
    ended = d2m("weights", "fetch", _config(tmp_path))
    assert (ended.returncode, "Traceback" in ended.stderr) == (2, False)
    published = [c for c in CHECKPOINTS.values() if c.sha256]
    assert ended.stderr.count("sent a file of sha256") == len(published)
    assert _files(folder).keys() == {c.name for c in CHECKPOINTS.values() if not c.sha256}


def test_a_mirror_that_lacks_a_file_gives_the_others(
    folder: Path, tmp_path: Path, weights_mirror: dict[str, str]
) -> None:
    config = _config(tmp_path, models=["faces-scrfd10g"], **NO_OUTPUT)
    address = weights_mirror["D2M_WEIGHTS_MIRROR"] + "/nowhere"
    message = f"{address}/scrfd_10g.pt: the server answers 404 .*copy to {folder}/scrfd_10g.pt"
    with pytest.raises(WeightsError, match=message):
        _weights("fetch", config, "--mirror", address)


def test_the_option_wins_over_the_environment(
    folder: Path, tmp_path: Path, weights_mirror: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("D2M_WEIGHTS_MIRROR", "http://127.0.0.1:9")
    empty = {"postprocess_columns": [], "postprocess_features": []}
    config = _config(
        tmp_path, models=["dedup-isc-ft-v107"], allow_unpublished_weights=True, **empty
    )
    _weights("fetch", config, "--mirror", weights_mirror["D2M_WEIGHTS_MIRROR"])
    assert _files(folder).keys() == {"isc_ft_v107.pth.tar", "eval_dedup_embeddings.pt"}
