"""Several texts of a sample: each is scored, and the image is encoded once."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from kit import jpeg, submit, write_config, write_tar
from models.families.test_open_clip import CLIP, export
from test_families import EXACT, run
from tiny_nets import bert, blip
from transformers import BertForSequenceClassification, BertModel, BlipForImageTextRetrieval

import d2m_hpc as d2m
from d2m_hpc import config as configs
from d2m_hpc.errors import ConfigError
from d2m_hpc.models.clip import Clip
from d2m_hpc.models.hub_nets import Matcher
from d2m_hpc.run.outputs import OutputDir
from d2m_hpc.run.pair import Pair
from d2m_hpc.worker.read import beside, decode

ROWS = 6
ALT = [f"the dog number {i} on a photo" for i in range(ROWS)]
AGAIN = ["a cat" + " in the photo" * i for i in range(ROWS)]
TXT = [f"caption {i}" * (i + 1) for i in range(ROWS)]
COLUMNS = {
    "clip": ("score",),
    "itm": ("score",),
    "mood": ("happy", "label"),
    "text": ("words", "characters"),
    "language-lid176": ("language", "probability"),
}
FEATURES = {"clip": ("text",), "sense": ("feature",)}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Small nets of each family that takes a text."""
    folder = tmp_path_factory.mktemp("nets")
    export(folder / "clip", CLIP)
    blip(folder / "itm", BlipForImageTextRetrieval)
    labels = {"id2label": {0: "happy", 1: "sad"}, "label2id": {"happy": 0, "sad": 1}}
    bert(folder / "mood", BertForSequenceClassification, **labels)
    bert(folder / "sense", BertModel)
    kinds = {"itm": "image-text-matching", "mood": "text-classification", "sense": "text-embedding"}
    return [
        {"clip": {"kind": "open_clip", "model": str(folder / "clip")}},
        *({n: {"kind": kind, "checkpoint": str(folder / n)}} for n, kind in kinds.items()),
        "text-stats",
        "language-lid176",
    ]


def tar(folder: Path, **more: list[Any]) -> Path:
    """Samples with a txt, an alt.txt, and a recaption in their JSON.

    Args:
        more: other values of the JSON.
    """
    members: dict[str, bytes] = {}
    for i in range(ROWS):
        values = {"again": AGAIN[i], "uid": f"u{i}", **{k: v[i] for k, v in more.items()}}
        members[f"{i}.alt.txt"] = ALT[i].encode()
        members[f"{i}.jpg"] = jpeg(i)
        members[f"{i}.json"] = json.dumps(values).encode()
        members[f"{i}.txt"] = TXT[i].encode()
    return write_tar(folder / "0.tar", members)


def asked(names: dict[str, tuple[str, ...]], *texts: str) -> list[str]:
    """The columns or features of some texts; that of the sample's own has an empty name."""
    return [
        "-".join(filter(None, (model, text, output)))
        for text in texts
        for model, outputs in names.items()
        for output in outputs
    ]


def done(folder: Path, out: str, models: list[Any], **values: Any) -> dict[str, Any]:
    """All columns and features of a run in this process, by name."""
    common = {"input_tars": str(folder / "0.tar"), "output_metadata_dir": str(folder / out)}
    run(write_config(folder / "c.yml", {**EXACT, "models": models, **common, **values}))
    table = pq.read_table(folder / out / "0.parquet").to_pydict()
    with np.load(folder / out / "0.npz") as arrays:
        return table | {name: arrays[name].tolist() for name in arrays.files}


TWO = {"alt": "alt.txt", "again": "json:again"}


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many rows were decoded, and how many were encoded by what."""
    counts: Counter[str] = Counter()

    def count(made: Any, name: str) -> None:
        real = getattr(made, name)

        def counted(self: Any, rows: Any) -> Any:
            counts[name] += len(rows)
            return real(self, rows)

        monkeypatch.setattr(made, name, counted)

    count(Clip, "encode_image"), count(Clip, "encode_text"), count(Matcher, "of_images")
    real = decode.image
    monkeypatch.setattr(decode, "image", lambda *a: counts.update(["decoded"]) or real(*a))
    return counts


def test_each_text_has_its_own_outputs_and_the_image_is_encoded_once(
    models: list[Any], tmp_path: Path, encoded: Counter[str]
) -> None:
    """Every value is, to the bit, that of a run with this text alone."""
    tar(tmp_path)
    names = ("", "alt", "again")
    several = done(
        tmp_path,
        "several",
        models,
        text_from=TWO,
        postprocess_columns=asked(COLUMNS, *names),
        postprocess_features=[*asked(FEATURES, *names), "clip-image"],
    )
    assert encoded == {"decoded": 6, "encode_image": 6, "encode_text": 18, "of_images": 6}
    for text, alone in (
        ("", {}),
        ("alt", {"text_key": "alt.txt"}),
        ("again", {"text_from": "json:again"}),
    ):
        one = done(
            tmp_path,
            f"one-{text}",
            models,
            postprocess_columns=asked(COLUMNS, ""),
            postprocess_features=[*asked(FEATURES, ""), "clip-image"],
            **alone,
        )
        assert several["clip-image"] == one["clip-image"]
        for names_of in (COLUMNS, FEATURES):
            for plain, named in zip(asked(names_of, ""), asked(names_of, text), strict=True):
                assert several[named] == one[plain], named
    assert several["text-again-words"] == [2 + 3 * i for i in range(ROWS)]
    assert several["clip-alt-score"] != several["clip-again-score"]
    record = Pair(OutputDir(str(tmp_path / "several")), "0").record()
    assert record is not None
    assert record.notices == []


def test_a_text_that_is_added_later_is_all_that_is_encoded(
    models: list[Any], tmp_path: Path, encoded: Counter[str]
) -> None:
    tar(tmp_path)
    first = {
        "postprocess_columns": ["clip-score", "text-words"],
        "postprocess_features": ["clip-image"],
    }
    done(tmp_path, "out", models, **first)
    encoded.clear()
    columns = [*first["postprocess_columns"], "clip-again-score", "mood-again-happy"]
    features = ["clip-image", "clip-again-text"]
    more = {"text_from": {"again": "json:again"}, "postprocess_features": features}
    more["postprocess_columns"] = columns[:2]
    done(tmp_path, "out", models, **more)
    assert encoded == {"encode_text": 6}  # no picture was even decoded
    grown = done(tmp_path, "out", models, **{**more, "postprocess_columns": columns})
    assert encoded == {"encode_text": 12, "encode_image": 6, "decoded": 6}  # as it was rounded
    assert grown == done(tmp_path, "whole", models, **{**more, "postprocess_columns": columns})
    for other, told in (
        ({"again": "txt"}, "text_from: 'again' was 'json:again', is 'txt'"),
        ({"again": "json:again", "default": "json:again"}, "text_from: was None, is 'json:again'"),
    ):
        with pytest.raises(ConfigError, match=told):
            done(tmp_path, "out", models, **{**more, "text_from": other})


def test_a_sample_that_lacks_one_of_the_texts_is_rejected(
    models: list[Any], tmp_path: Path
) -> None:
    members = {"0.jpg": jpeg(0), "0.txt": b"a", "0.json": b'{"again": null}'}
    members |= {"1.jpg": jpeg(1), "1.json": b'{"again": "b"}'}
    members |= {"2.jpg": jpeg(2), "2.alt.txt": b"c", "2.json": b'{"again": "c"}'}
    write_tar(tmp_path / "0.tar", members)
    columns = ["clip-alt-score", "clip-again-score"]
    made = done(
        tmp_path,
        "out",
        models[:1],
        text_from=TWO,
        postprocess_columns=columns,
        max_rejected_fraction=1.0,
    )
    assert made["key"] == ["2"]  # no txt is needed, as no name means the sample's own text
    record = Pair(OutputDir(str(tmp_path / "out")), "0").record()
    assert record is not None
    assert dict(record.rejections) == {
        "0": "no text:alt (alt.txt); it has jpg, txt, json",
        "1": "no text:alt (alt.txt); it has jpg, json",
    }
    assert dict(d2m.open(tmp_path / "out" / ".d2m").status().rejections) == {
        "no text:alt (alt.txt)": 2
    }
    made = done(
        tmp_path,
        "other",
        models[:1],
        text_from={"again": "json:again"},
        postprocess_columns=["clip-again-score"],
        max_rejected_fraction=1.0,
    )
    assert made["key"] == ["1", "2"]
    record = Pair(OutputDir(str(tmp_path / "other")), "0").record()
    assert record is not None
    assert dict(record.rejections) == {
        "0": "text:again: no text in the JSON's field 'again': found null"
    }
    reasons = d2m.open(tmp_path / "other" / ".d2m").status().rejections
    assert dict(reasons) == {"text:again: no text in the JSON's field 'again'": 1}


def test_a_custom_class_takes_a_further_text(tmp_path: Path) -> None:
    tar(tmp_path)
    (tmp_path / "own.py").write_text(
        "import torch\n"
        "class Longer(torch.nn.Module):\n"
        "    raw_inputs = ['text', 'text:again']\n"
        "    preprocessors = ['identity', 'identity']\n"
        "    def __init__(self, device):\n"
        "        super().__init__()\n"
        "    def forward(self, own, again):\n"
        "        return torch.tensor([float(len(b) - len(a)) for a, b in zip(own, again)])\n"
        "model_lookup = {'own': Longer}\n"
        "postprocess_parquet_lookup = {'own-more': lambda cache: cache['own']}\n"
    )
    values = {"custom_pypath": str(tmp_path / "own.py"), "postprocess_columns": ["own-more"]}
    made = done(tmp_path, "out", ["own"], text_from={"again": "json:again"}, **values)
    assert made["own-more"] == [len(b) - len(a) for a, b in zip(TXT, AGAIN, strict=True)]
    with pytest.raises(ConfigError, match="unknown raw input 'text:again'"):
        done(tmp_path, "out2", ["own"], **values)


def test_further_texts_of_a_parquet_are_its_columns(tmp_path: Path) -> None:
    table = pa.table({"caption": ["a b", "c"], "Other": ["d", "e f g"], "uid": ["u", "v"]})
    pq.write_table(table, tmp_path / "0.parquet")
    columns = ["text-words", "text-other-words", "text-field-words"]
    config = {
        "models": ["text-stats"],
        "postprocess_columns": columns,
        "text_from": {"other": "other", "field": "json:Other"},
        "inputs": str(tmp_path / "0.parquet"),
        "output_metadata_dir": str(tmp_path / "out"),
    }
    run(write_config(tmp_path / "c.yml", {**EXACT, **config}))
    made = pq.read_table(tmp_path / "out" / "0.parquet").select(columns).to_pydict()
    assert [*made.values()] == [[2, 1], [1, 3], [1, 3]]


class TestBeside:
    """Texts in a parquet beside the shards."""

    def made(self, folder: Path, source: str, **more: Any) -> tuple[dict[str, int], dict[str, str]]:
        """Words of each row, and the reasons of rejections, by key."""
        values = {"postprocess_columns": ["text-again-words"], "max_rejected_fraction": 1.0}
        values |= {"text_from": {"again": source}, **more}
        table = done(folder, "out", ["text-stats"], **values)
        record = Pair(OutputDir(str(folder / "out")), "0").record()
        assert record is not None
        words = table[values["postprocess_columns"][0]]
        return dict(zip(table["key"], words, strict=True)), dict(record.rejections)

    def test_texts_are_found_by_key_and_by_any_field(self, tmp_path: Path) -> None:
        """As another run of this program writes them: recaptions are scored without code."""
        tar(tmp_path)
        (tmp_path / "re").mkdir()
        keys = ["5", "3", "1", "1", "0"]
        texts = ["a", None, "a b", "c", "a b c"]
        table = pa.table({"key": keys, "blip-text": texts, "uid": [f"u{k}" for k in keys]})
        table = table.append_column("none", table["uid"])
        pq.write_table(table, tmp_path / "re" / "0.parquet")
        words, rejected = self.made(tmp_path, f"parquet:{tmp_path}/re/{{stem}}.parquet:blip-text")
        assert words == {"0": 3, "5": 1}
        assert rejected == {
            "1": "text:again: 0.parquet has several rows with the key '1'",
            "2": "text:again: 0.parquet has no row with the key '2'",
            "3": "text:again: 0.parquet has a null for the key '3'",
            "4": "text:again: 0.parquet has no row with the key '4'",
        }
        (tmp_path / "one.parquet").write_bytes((tmp_path / "re" / "0.parquet").read_bytes())
        (tmp_path / "by-uid").mkdir()
        (tmp_path / "0.tar").rename(tmp_path / "by-uid" / "0.tar")
        source = f"parquet:{tmp_path}/one.parquet:blip-text:uid"
        assert self.made(tmp_path / "by-uid", source)[0] == words
        more = {"text_from": source, "postprocess_columns": ["text-words"], "reprocess": True}
        assert self.made(tmp_path / "by-uid", "", **more)[0] == words
        more["text_from"] = source.replace(":uid", ":none")
        assert self.made(tmp_path / "by-uid", "", **more)[1]["0"] == (
            "its JSON has no 'none', by which one.parquet tells samples"
        )

    @pytest.mark.parametrize(
        ("table", "told"),
        [
            (None, "no texts can be read: No such file"),
            (b"no parquet", "no texts can be read: Parquet magic bytes not found"),
            ({"key": ["0"], "text": ["a"]}, "there is no column 'again'; it has key, text"),
            ({"uid": ["0"], "again": ["a"]}, "there is no column 'key'; it has uid, again"),
            ({"key": ["0"], "again": [5]}, "the column 'again' holds int64 and no texts"),
            ({"key": ["0"], "again": ["a" * 9999]}, "bytes, over 1,000; write a file for each"),
        ],
    )
    def test_a_file_that_cannot_be_used_fails_its_shard_in_a_line(
        self, table: Any, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(beside, "MOST", 1000)
        tar(tmp_path)
        if isinstance(table, dict):
            pq.write_table(pa.table(table), tmp_path / "t.0.parquet", compression="none")
        elif table:
            (tmp_path / "t.0.parquet").write_bytes(table)
        source = f"parquet:{tmp_path}/t.{{stem}}.parquet:again"
        with pytest.raises(FileNotFoundError):  # the shard is not done
            self.made(tmp_path, source)
        [record] = (tmp_path / "out" / ".d2m" / "records").iterdir()
        error = json.loads(record.read_text().splitlines()[-1])["error"]
        assert told in error
        assert "t.0.parquet" in error
        assert "\n" not in error

    @pytest.mark.parametrize("name", ["t.{stem}.parquet", "t.0.parquet"])
    def test_a_parquet_that_is_replaced_is_noticed(self, tmp_path: Path, name: str) -> None:
        """A shard's own one, and one for all shards."""
        tar(tmp_path)
        file = tmp_path / "t.0.parquet"
        pq.write_table(pa.table({"key": ["0", "1"], "again": ["a", "a"]}), file)
        source = f"parquet:{tmp_path}/{name}:again"
        assert self.made(tmp_path, source)[0] == {"0": 1, "1": 1}
        run = d2m.open(tmp_path / "out" / ".d2m")
        assert run.verify().changed.stems == []
        pq.write_table(pa.table({"key": ["0", "1"], "again": ["a b", "a b"]}), file)
        # Neither a submit nor added columns hide it, and both leave the finished values alone.
        more = {"postprocess_columns": ["text-again-words", "text-again-characters"]}
        assert self.made(tmp_path, source, **more)[0] == {"0": 1, "1": 1}
        run = d2m.open(tmp_path / "out" / ".d2m")
        assert run.verify().changed.stems == run.verify().changed.texts == ["0"]
        [notice] = run.status().changed.notices()
        assert notice.startswith("shards whose files of texts or captions are not those that were")
        run = d2m.submit(run.config, local=True, recompute_changed=True)
        assert run.table()["text-again-words"].to_pylist() == [2, 2]
        assert run.verify().changed.stems == []

    def test_a_store_has_such_files_too(self, tmp_path: Path) -> None:
        import fsspec

        tar(tmp_path)
        with fsspec.open("memory://texts/0.parquet", "wb") as file:
            pq.write_table(pa.table({"key": ["0"], "again": ["a b"]}), file)
        source = "parquet:memory://texts/{stem}.parquet:again"
        assert self.made(tmp_path, source)[0] == {"0": 2}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"a b": "txt"}, "the name 'a b'; valid are letters, digits and `_`"),
        ({"alt": "a/b"}, "alt: 'a/b'; valid are a member such as `alt.txt`"),
        ({"alt": "parquet:x.csv:a"}, "alt: 'parquet:x.csv:a'; valid are a member"),
        ({"alt": "parquet:/none/x.parquet:a"}, "/none/x.parquet is not there; check the path"),
        ({"alt": "parquet:/none/{stem}.parquet:a"}, "/none is not there; check the path"),
        ({"alt": "parquet:$NONE_SUCH/x.parquet:a"}, "$NONE_SUCH is not set"),
        ({"other": "txt"}, "unknown name 'text-alt-words'"),
        ({"default": "parquet:x.parquet:a"}, "use_datacomp_keys can make no column `text`"),
    ],
)
def test_mistakes_are_told(given: Any, told: str, tmp_path: Path) -> None:
    tar(tmp_path)
    values = {
        "models": ["text-stats"],
        "postprocess_columns": ["text-alt-words"],
        "input_tars": str(tmp_path / "*.tar"),
        "output_metadata_dir": str(tmp_path / "out"),
    }
    values |= {"use_datacomp_keys": "default" in given, "text_from": given}
    ended = submit(write_config(tmp_path / "c.yml", values), "--dry-run")
    assert ended.returncode == 2
    assert told in " ".join(ended.stderr.split())
    assert "Traceback" not in ended.stderr


def test_paths_are_those_of_the_folder_of_the_submit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from d2m_hpc.plan.workload import absolute

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TEXTS", "again")
    values = {"models": ["text-stats"], "input_tars": "x.tar", "output_metadata_dir": "out"}
    given = {"a": "parquet:$TEXTS/{stem}.parquet:b:uid", "default": "json:c"}
    path = write_config(tmp_path / "c.yml", {**values, "text_from": given})
    assert absolute(configs.load(path)).text_from == {
        "a": f"parquet:{tmp_path}/again/{{stem}}.parquet:b:uid",
        "default": "json:c",
    }
