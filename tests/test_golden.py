"""The whole DataComp workload over the golden kit, against what the reference program wrote."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from kit import DATACOMP, EXPECTED, SHARDS, d2m, submit, write_config

STEMS = ("00000", "00001", "odd")
SCORES = [c for c in DATACOMP["postprocess_columns"] if c != "face-boxes"]
FEATURES = DATACOMP["postprocess_features"]
DATACOMP_NAMES = {
    "oai-clip-vit-b32-score": "clip_b32_similarity_score",
    "oai-clip-vit-l14-score": "clip_l14_similarity_score",
    "face-boxes": "face_bboxes",
    "dedup-isc-ft-v107-score": "dedup",
    "oai-clip-vit-b32-image": "b32_img",
    "oai-clip-vit-b32-text": "b32_txt",
    "oai-clip-vit-l14-image": "l14_img",
    "oai-clip-vit-l14-text": "l14_txt",
}


def run(folder: Path, checkpoints: Path, **more: object) -> Path:
    """Run the workload as a user does; returns the output folder."""
    config = write_config(
        folder / "datacomp.yml",
        {**DATACOMP, "resize": "exact", "amp": "off", "feature_dtype": "float32", **more},
        input_tars=[str(SHARDS / "0000{0,1}.tar"), str(SHARDS / "odd.tar")],
        output_metadata_dir=str(folder / "out"),
        weights_dir=str(checkpoints),
        allow_unpublished_weights=True,
    )
    ended = submit(config)
    assert ended.returncode == 0, ended.stderr + ended.stdout
    checked = d2m("verify", config)
    assert checked.returncode == 0, checked.stdout
    return folder / "out"


def boxes(column: pd.Series) -> Iterator[np.ndarray]:
    for image in column:
        yield np.array([list(b) for b in image], dtype=float).reshape(-1, 4)


def differences(out: Path, names: dict[str, str] | None = None) -> dict[str, float]:
    """The largest difference of every score and feature; for faces, how many have no partner.

    A box has a partner when one of the other program's in the same image lies within 0.001.
    """
    names = names or {}
    found: dict[str, float] = dict.fromkeys([*SCORES, *FEATURES, "boxes without a partner"], 0.0)
    for stem in STEMS:
        want, got = (pd.read_parquet(d / f"{stem}.parquet") for d in (EXPECTED, out))
        assert got["key"].is_unique
        for field in DATACOMP["additional_fields"]:
            assert want[field].tolist() == got[field].tolist()
        for name in SCORES:
            off = np.abs(want[name] - got[names.get(name, name)]).max()
            found[name] = max(found[name], float(off))
        with (
            np.load(EXPECTED / f"{stem}.npz") as w,
            np.load(out / f"{stem}.npz") as g,
        ):
            for name in FEATURES:
                off = np.abs(w[name] - g[names.get(name, name)].astype(np.float32)).max()
                found[name] = max(found[name], float(off))
        pairs = zip(
            boxes(want["face-boxes"]),
            boxes(got[names.get("face-boxes", "face-boxes")]),
            strict=True,
        )
        found["boxes without a partner"] += sum(_lonely(a, b) + _lonely(b, a) for a, b in pairs)
    print({k: float(f"{v:.3g}") for k, v in found.items()})
    return found


def _lonely(some: np.ndarray, others: np.ndarray) -> int:
    if not len(others):
        return len(some)
    apart = np.abs(some[:, None] - others[None]).max(axis=2)
    return int((apart.min(axis=1) > 1e-3).sum())


def assert_within(found: dict[str, float], bounds: dict[str, float]) -> None:
    over = {k: v for k, v in found.items() if not v <= bounds[k]}
    assert not over


@pytest.mark.parametrize("batch_size", [7, 32])
def test_exact_float32_equals_the_reference(
    batch_size: int, tmp_path: Path, checkpoints: Path
) -> None:
    out = run(tmp_path, checkpoints, batch_size=batch_size)
    found = differences(out)
    assert_within(found, {**dict.fromkeys(found, 1e-4), "boxes without a partner": 0})
    for stem in STEMS:
        want, got = (pd.read_parquet(d / f"{stem}.parquet") for d in (EXPECTED, out))
        for a, b in zip(boxes(want["face-boxes"]), boxes(got["face-boxes"]), strict=True):
            assert a.shape == b.shape
            assert np.abs(a - b).max(initial=0) <= 1e-3


def test_fast_resizing_moves_clip_by_two_in_ten_thousand_at_most(
    tmp_path: Path, checkpoints: Path
) -> None:
    """With DataComp's own names and float16 features, as such a run is set up in practice."""
    out = run(
        tmp_path,
        checkpoints,
        resize="fast",
        batch_size=32,
        feature_dtype="float16",
        use_datacomp_keys=True,
    )
    found = differences(out, DATACOMP_NAMES)
    bounds = {
        "oai-clip-vit-b32-score": 1e-4,
        "oai-clip-vit-l14-score": 1e-4,
        "nsfw-detoxify-score": 1e-6,
        "nsfw-image-score": 1e-5,
        "dedup-isc-ft-v107-score": 1e-6,
        **dict.fromkeys(FEATURES, 2.5e-4),
        "boxes without a partner": 0,
    }
    assert_within(found, bounds)


def test_bfloat16_autocast_stays_within_what_was_measured(
    tmp_path: Path, checkpoints: Path
) -> None:
    """ISC and SCRFD are deep conv nets of random weights here, which rounding moves the most."""
    found = differences(run(tmp_path, checkpoints, amp="bfloat16", batch_size=32))
    bounds = {
        "oai-clip-vit-b32-score": 3e-3,
        "oai-clip-vit-l14-score": 3e-3,
        "nsfw-detoxify-score": 5e-3,
        "nsfw-image-score": 5e-3,
        "dedup-isc-ft-v107-score": 5e-2,
        **dict.fromkeys(FEATURES, 4e-3),
        "dedup-isc-ft-v107-image": 0.2,
        "boxes without a partner": 90,
    }
    assert_within(found, bounds)


def test_bad_samples_are_rejected_with_key_and_reason(tmp_path: Path, checkpoints: Path) -> None:
    config = _one(tmp_path, checkpoints, "bad.tar", max_rejected_fraction=1.0)
    assert submit(config).returncode == 0
    table = pd.read_parquet(tmp_path / "out" / "bad.parquet")
    assert table["key"].tolist() == ["good-0", "good-1", "no-uid", "good-2"]
    assert table["uid"].isna().tolist() == [False, False, True, False]
    assert _record(tmp_path)["rejections"] == [
        ["no-text", "no text (txt); it has jpg, json"],
        ["no-json", "no json (json); it has jpg, txt"],
        ["garbage", "the image cannot be decoded: its format is not known"],
        ["zero", "the image file is empty"],
        ["latin1", "the text is not UTF-8: invalid continuation byte at byte 3"],
        ["bad-json", "the JSON cannot be parsed: Expecting value: line 1 column 9 (char 8)"],
        ["text-only", "no image (jpg or png or jpeg or webp); it has txt, json"],
        ["header-only", "the image cannot be decoded: its format is not known"],
        ["bomb", "the image has 30000x30000 pixels, over max_image_pixels (178956970)"],
        [
            "dots",
            "no image (jpg or png or jpeg or webp); it has in.key.jpg, in.key.json, in.key.txt",
        ],
    ]


def test_too_many_rejections_fail_the_shard(tmp_path: Path, checkpoints: Path) -> None:
    ended = submit(_one(tmp_path, checkpoints, "bad.tar"))
    assert ended.returncode == 1
    assert "10 of 14 samples are rejected, over max_rejected_fraction (0.1)" in ended.stdout
    assert "the first: 'no-text', no text (txt); it has jpg, json" in ended.stdout
    assert not list((tmp_path / "out").glob("bad.*"))


def test_without_warn_and_continue_the_first_rejection_fails_the_shard(
    tmp_path: Path, checkpoints: Path
) -> None:
    ended = submit(_one(tmp_path, checkpoints, "bad.tar", warn_and_continue=False))
    assert ended.returncode == 1
    assert "sample 'no-text': no text (txt); it has jpg, json" in ended.stdout


def test_a_truncated_shard_fails_with_offset_and_whole_samples(
    tmp_path: Path, checkpoints: Path
) -> None:
    ended = submit(_one(tmp_path, checkpoints, "cut.tar"))
    assert ended.returncode == 1
    assert "truncated at byte 1112064: 0000119.jpg should reach byte 1145324" in ended.stdout
    assert "whole samples before it: 19" in ended.stdout


def test_the_whole_samples_of_a_truncated_shard_can_be_had(
    tmp_path: Path, checkpoints: Path
) -> None:
    config = _one(tmp_path, checkpoints, "cut.tar", allow_truncated_shards=True)
    assert submit(config).returncode == 0
    want = pd.read_parquet(EXPECTED / "00001.parquet")["uid"][:19]
    assert pd.read_parquet(tmp_path / "out" / "cut.parquet")["uid"].tolist() == want.tolist()
    assert _record(tmp_path)["rejections"] == [["0000119", "cut off where the archive ends"]]


def _one(folder: Path, checkpoints: Path, tar: str, **more: object) -> Path:
    """A config for one tar; CLIP alone needs image and text, the fields need JSON."""
    light: dict[str, object] = {
        "models": ["oai-clip-vit-b32"],
        "postprocess_columns": ["oai-clip-vit-b32-score"],
        "postprocess_features": [],
    }
    return write_config(
        folder / "one.yml",
        {**DATACOMP, **light, **more},
        input_tars=str(SHARDS / tar),
        output_metadata_dir=str(folder / "out"),
        weights_dir=str(checkpoints),
        allow_unpublished_weights=True,
    )


def _record(folder: Path) -> dict[str, list[list[str]]]:
    """The only line of the only records file."""
    (path,) = (folder / "out" / ".d2m" / "records").iterdir()
    (line,) = path.read_text().splitlines()
    found: dict[str, list[list[str]]] = json.loads(line)
    return found
