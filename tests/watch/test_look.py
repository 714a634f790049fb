"""`d2m select --look`: what is cut stands beside what is kept."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from kit import STATS, d2m, jpeg, submit, write_config, write_tar

import d2m_hpc
from d2m_hpc.errors import ConfigError
from d2m_hpc.watch.page.look import EACH

ROWS = 20
EVIL = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards whose n-th sample has n words; one has no uid, and one's picture is gone since."""
    folder = tmp_path_factory.mktemp("look")
    for shard in range(2):
        members: dict[str, bytes] = {}
        for n in range(1, ROWS + 1):
            key, words = f"{shard}{n:02d}", [f"word{i}" for i in range(n - 1)]
            uid = "none" if (shard, n) == (0, 20) else f"{shard * 100 + n:032x}"
            members[f"{key}.jpg"] = jpeg(shard * 100 + n)
            members[f"{key}.json"] = f'{{"uid": "{uid}", "caption": "c"}}'.encode()
            members[f"{key}.txt"] = " ".join([*words, EVIL.replace(" ", "")]).encode()
        write_tar(folder / "tars" / f"{shard}.tar", members)
    values = {
        "input_tars": str(folder / "tars" / "*.tar"),
        "output_metadata_dir": str(folder / "o"),
    }
    path = write_config(folder / "c.yml", {**STATS, **values})
    assert submit(path).returncode == 0
    return path


def shown(page: str) -> dict[str, list[str]]:
    """The keys of the samples on each side."""
    sides = re.split("<h2>", page)[1:]
    return {
        side.partition(",")[0].partition("<")[0]: re.findall(r"<code>(\d+)</code> in", side)
        for side in sides
    }


def test_samples_around_the_threshold_stand_side_by_side(config: Path, tmp_path: Path) -> None:
    page, subset = tmp_path / "look.html", tmp_path / "best.npy"
    options = ["--by", "text-words", "--top", "9", "-o", subset, "--look", page]
    ended = d2m("select", config, *options)
    assert ended.returncode == 0, ended.stderr
    assert f"wrote {page}" in ended.stdout.replace("\n", "")
    text = page.read_text()
    found = shown(text)
    assert [key[1:] for key in found["Kept"]] == [
        "16",
        "16",
        "17",
        "17",
        "18",
        "18",
        "19",
        "19",
        "20",
    ]
    assert found["Cut"][0] == "020"  # it has no uid
    assert [key[1:] for key in found["Cut"]][1:5] == ["15", "15", "14", "14"]
    assert len(found["Cut"]) == EACH
    assert len(np.load(subset)) == 9
    assert "The lowest <code>text-words</code> that is kept is 16." in " ".join(text.split())
    assert text.count("data:image/jpeg;base64,") == 9 + EACH
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "default-src 'none'" in text


def test_any_query_can_be_looked_at(config: Path, tmp_path: Path) -> None:
    run, page = d2m_hpc.open(config), tmp_path / "look.html"
    found = run.select(None, '"text-words" > 18', by="text-words", look=page)
    assert found.survival
    sides = shown(page.read_text())
    assert [key[1:] for key in sides["Kept"]] == ["19", "19", "20"]
    assert [key[1:] for key in sides["Cut"]][:3] == ["20", "18", "18"]
    found = run.select(None, '"text-words" > 18 AND "key" LIKE \'1%\'', look=page)
    assert found.chosen == 2
    text = page.read_text()
    sides = shown(text)
    assert sorted(sides["Kept"]) == ["119", "120"]
    assert len(sides["Cut"]) == EACH
    assert "drawn at random" in text
    assert "nan" not in re.sub('data:[^"]*', "", text)
    ended = d2m("select", config, "--where", "false", "--look", page)
    assert ended.returncode == 1
    assert "None of these shards." in page.read_text()
    assert "nothing is chosen" in ended.stdout


def test_texts_and_scores_that_the_choice_is_about_are_shown(tmp_path: Path) -> None:
    members: dict[str, bytes] = {}
    for n in range(3):
        members |= {f"k{n}.jpg": jpeg(n), f"k{n}.txt": b"the old one", f"k{n}.mine.txt": b"mine!"}
    write_tar(tmp_path / "tars" / "0.tar", members)
    again = {"key": ["k0", "k1", "k2"], "blip": ["short", "a much longer new one", None]}
    pq.write_table(pa.table(again), tmp_path / "0.parquet")
    values = {
        **STATS,
        "postprocess_columns": ["text-words", "text-again-words", "image-brightness"],
        "additional_fields": [],
        "text_from": {
            "again": f"parquet:{tmp_path}/{{stem}}.parquet:blip",
            "mine": "mine.txt",
        },
        "input_tars": str(tmp_path / "tars" / "*.tar"),
        "output_metadata_dir": str(tmp_path / "out"),
        "max_rejected_fraction": 1.0,
    }
    assert submit(write_config(tmp_path / "c.yml", values)).returncode == 0
    page, where = tmp_path / "look.html", '"text-again-words" > "text-words"'
    d2m_hpc.open(tmp_path / "c.yml").select(None, where, look=page)
    text = " ".join(page.read_text().split())
    assert "Of 2 rows, 1 sample is kept." in text
    assert "is true of 1 row.</li>" in text
    kept, cut = re.split("<h2>Cut", text)
    for side, caption, words in ((kept, "a much longer new one", 5), (cut, "short", 1)):
        for name, told in (("text", "the old one"), ("again", caption), ("mine", "mine!")):
            assert f'<b>{name}</b><p dir="auto" title="{told}">{told}</p>' in side
        assert f"<code>text-words</code> 3</div><div><code>text-again-words</code> {words}<" in side
    assert "image-brightness" not in text


def test_what_cannot_be_looked_at_is_told(config: Path, tmp_path: Path) -> None:
    run = d2m_hpc.open(config)
    with pytest.raises(
        ConfigError, match=r"^--look: .*\n.*there is no folder .*; name another by --look"
    ):
        run.select(None, by="text-words", look=tmp_path / "none" / "look.html")
    more = tmp_path / "more.parquet"
    pq.write_table(pa.table({"uid": [f"{1:032x}"], "mine": [1.0]}), more)
    with pytest.raises(ConfigError, match="--look: 'mine' is no column of the run"):
        run.select(None, by="mine", join=more, look=tmp_path / "look.html")
