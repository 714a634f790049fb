"""From tars to a subset, and to the files for DataComp's tools, by the commands."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import Result
from kit import STATS, jpeg, write_config, write_tar
from pools import subset
from typer.testing import CliRunner

import d2m_hpc as d2m
from d2m_hpc.cli.commands import app
from d2m_hpc.errors import ConfigError, D2MError

UIDS = ["FF", "0" * 31 + "A", "9e3779b97f4a7c15f39cc0605cedc834", "1"]
"""As pools have them: short, upper-case; in another order as texts than as numbers."""
STEMS = ["00000000", "00000001"]


def _tar(path: Path, uids: list[str | None]) -> None:
    members = {}
    for i, uid in enumerate(uids):
        key = f"{path.stem}{i:04d}"
        values = {"uid": uid, "original_width": 300 + i, "caption": f"caption {i}" if i else None}
        members |= {
            f"{key}.jpg": jpeg(i),
            f"{key}.json": json.dumps(values).encode(),
            f"{key}.txt": b"of the txt",
        }
    write_tar(path, members)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a finished run over two tars; the second has a sample that has no uid."""
    folder = tmp_path_factory.mktemp("datacomp")
    _tar(folder / "tars" / f"{STEMS[0]}.tar", [*UIDS])
    _tar(folder / "tars" / f"{STEMS[1]}.tar", [f"{i:032x}" for i in range(20, 30)] + [None])
    path = write_config(
        folder / "c.yml",
        STATS,
        additional_fields=["uid", "original_width"],
        use_datacomp_keys=True,
        input_tars=str(folder / "tars" / "*.tar"),
        output_metadata_dir=str(folder / "out"),
    )
    assert d2m.submit(path, local=True).status().complete
    return path


def _d2m(*arguments: object) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)])


def test_the_outputs_hold_what_the_readers_take_for_granted(config: Path) -> None:
    tables = [pd.read_parquet(config.parent / "out" / f"{stem}.parquet") for stem in STEMS]
    assert [len(t) for t in tables] == [4, 10]
    for table in tables:
        assert table.uid.str.fullmatch("[0-9a-f]{32}").all()
        by_text = [int(u, 16) for u in sorted(table.uid)]
        assert by_text == sorted(by_text)
        assert table.text.tolist() == [
            "of the txt",
            *(f"caption {i}" for i in range(1, len(table))),
        ]
    assert [int(u, 16) for u in tables[0].uid] == [int(u, 16) for u in UIDS]


def test_a_subset_is_chosen(config: Path, tmp_path: Path) -> None:
    chosen = _d2m("select", config, "--where", "original_width >= 303", "-o", tmp_path / "s.npy")
    assert (chosen.exit_code, chosen.stderr) == (0, "")
    assert chosen.stdout == f"14 rows, 8 pass\n8 chosen, 57.1% of the rows: {tmp_path}/s.npy\n"
    want = [UIDS[3].zfill(32), *(f"{i:032x}" for i in range(23, 30))]
    assert np.array_equal(np.load(tmp_path / "s.npy"), subset(want))


def test_the_best_are_chosen_and_told_as_json(config: Path, tmp_path: Path) -> None:
    best = ("--top", "0.5", "--by", "original_width")
    chosen = _d2m("select", config, *best, "-o", tmp_path / "s.npy", "--json")
    assert json.loads(chosen.stdout)["chosen"] == 7 == len(np.load(tmp_path / "s.npy"))


def test_nothing_chosen_is_exit_code_1(config: Path, tmp_path: Path) -> None:
    chosen = _d2m("select", config, "--where", "original_width > 9000", "-o", tmp_path / "s.npy")
    assert chosen.exit_code == 1
    assert chosen.stdout == "14 rows, 0 pass\nnothing is chosen; nothing is written\n"
    assert not (tmp_path / "s.npy").exists()


def test_thresholds_are_shown_where_no_file_is_named(config: Path) -> None:
    shown = _d2m("select", config, "--by", "original_width")
    assert (shown.exit_code, shown.stderr) == (0, "")
    assert shown.stdout.splitlines()[:2] == [
        "14 rows, 14 pass",
        "         300 keeps 100.0%, 14 samples",
    ]


def test_a_parquet_for_img2dataset(config: Path, tmp_path: Path) -> None:
    """Of what a subset and a condition leave; this run has no URLs."""
    _d2m("select", config, "--where", "original_width >= 303", "-o", tmp_path / "s.npy")
    options = ("--subset", tmp_path / "s.npy", "-o", tmp_path / "kept.parquet")
    ended = _d2m("export", "img2dataset", config, *options)
    assert "additional_fields: the run has no url; add them and submit" in str(ended.exception)
    ended = _d2m("export", "img2dataset", config, "-o", tmp_path / "kept")
    assert "kept'; valid is a name in .parquet" in str(ended.exception)
    more = ("--column", "uid", "--column", "text", "--join", tmp_path / "s.npy")
    where = ("--where", "in_subset and original_width < 305")
    ended = _d2m("select", config, *where, *more, "-o", tmp_path / "kept.parquet")
    assert (ended.exit_code, ended.stderr) == (0, "")
    kept = pd.read_parquet(tmp_path / "kept.parquet").sort_values("text")
    assert kept.columns.tolist() == ["uid", "text"]
    assert kept.text.tolist() == ["caption 3", "caption 3", "caption 4"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--top", "0.3"), "--top and --by"),
        (("--by", "original_width"), "--top and --by"),
        (("--top", "-1", "--by", "original_width"), "--top: found -1; valid is a share"),
        (("--top", "2.5", "--by", "original_width"), "--top: found 2.5; valid is a share"),
        (("--top", "nan", "--by", "original_width"), "--top: found nan; valid is a share"),
        (("--top", "inf", "--by", "original_width"), "--top: found inf; valid is a share"),
        (
            ("--top", "1", "--by", "original_width"),
            "--top: found 1, which may be one sample or all",
        ),
        (("--sample", "1"), "--sample: found 1, which may be one sample or all; valid is 1.0 for"),
        (("--seed", "0"), "--seed: found no --sample"),
        (("-o", "subset.txt"), "--output: found 'subset.txt'; valid is a name in .npy"),
    ],
)
def test_mistakes_on_the_command_line(
    config: Path, tmp_path: Path, options: tuple[str, ...], says: str
) -> None:
    ended = _d2m("select", config, "-o", tmp_path / "s.npy", *options)
    assert isinstance(ended.exception, ConfigError)
    assert says in str(ended.exception)


def test_a_share_has_a_point_and_a_number_of_samples_has_none(config: Path, tmp_path: Path) -> None:
    for given, chosen in (("1.0", 14), ("2", 2)):
        options = ("--top", given, "--by", "original_width", "-o", tmp_path / "s.npy", "--json")
        assert json.loads(_d2m("select", config, *options).stdout)["chosen"] == chosen
    ended = _d2m("select", config, "--top", "many", "--by", "original_width")
    assert ended.exit_code == 2
    assert "found 'many'; valid is a number, such as 0.3" in ended.stderr


def test_an_export_says_what_it_wrote_and_which_tools_cannot_run(
    config: Path, tmp_path: Path
) -> None:
    ended = _d2m("export", "datacomp", config, "-o", tmp_path / "files")
    assert ended.exit_code == 0
    assert json.loads((tmp_path / "files" / "sizes.json").read_bytes()) == {
        "00000000.tar": 4,
        "00000001.tar": 11,
    }
    lines = ended.stdout.splitlines()
    assert f"wrote {tmp_path}/files/sizes.json" in lines
    assert "2 finished shards; 0 are not finished" in lines
    assert "cannot run: baselines.py --name basic_filter; it reads original_height" in lines
    assert not any("no_filter" in line for line in lines)
    assert f"-i {config.parent}/tars " in lines[-1]


def test_an_export_of_a_run_that_is_not_finished_is_an_error(config: Path, tmp_path: Path) -> None:
    tars = config.parent / "more"
    for i in range(2):
        _tar(tars / f"{i}.tar", [f"{i:x}"])
    (tars / "1.tar").write_bytes(b"no tar" * 1000)
    half = write_config(
        tmp_path / "c.yml",
        STATS,
        additional_fields=["uid"],
        use_datacomp_keys=True,
        input_tars=str(tars / "*.tar"),
        output_metadata_dir=str(tmp_path / "out"),
    )
    assert _d2m("submit", half, "--local").exit_code == 1
    ended = _d2m("export", "datacomp", half, "-o", tmp_path / "files")
    assert isinstance(ended.exception, D2MError)
    assert ended.exception.exit_code == 1
    assert (
        _d2m("export", "datacomp", half, "-o", tmp_path / "files", "--allow-missing").exit_code == 0
    )


def test_a_finished_run_gets_datacomps_names_without_computing(
    config: Path, tmp_path: Path
) -> None:
    """But for samples without a caption in their JSON, whose text only the tar has."""
    tars, out = config.parent / "tars" / "*.tar", tmp_path / "out"
    fields = ["uid", "caption", "original_width"]
    values = {**STATS, "additional_fields": fields, "feature_dtype": "float32"}
    plain = write_config(
        tmp_path / "c.yml", values, input_tars=str(tars), output_metadata_dir=str(out)
    )
    assert d2m.submit(plain, local=True).status().rows == 15
    ended = _d2m("export", "datacomp", plain, "-o", tmp_path / "files")
    assert (ended.exit_code, ended.stderr) == (0, "")
    assert "3 rows have no caption or no usable uid; left out there" in ended.stdout
    theirs = config.parent / "out"
    for stem in STEMS:
        want = pd.read_parquet(theirs / f"{stem}.parquet")
        keep = want.text != "of the txt"
        found = pd.read_parquet(tmp_path / "files" / "metadata" / f"{stem}.parquet")
        assert found.drop(columns="caption").equals(want[keep].reset_index(drop=True))
        with (
            np.load(theirs / f"{stem}.npz") as a,
            np.load(tmp_path / "files" / "metadata" / f"{stem}.npz") as b,
        ):
            assert a.files == b.files
            for name in a.files:
                assert b[name].dtype == np.float16
                assert np.array_equal(a[name][keep], b[name])
    sizes = json.loads((tmp_path / "files" / "sizes.json").read_bytes())
    assert sizes == {f"{STEMS[0]}.tar": 4, f"{STEMS[1]}.tar": 11}
    assert _d2m("export", "datacomp", plain, "-o", tmp_path / "files").exit_code == 0
