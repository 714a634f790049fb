"""YAML files: every mistake has its line, and words mean what they say."""

from __future__ import annotations

import json
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from kit import d2m

from d2m_hpc.config import Config, load
from d2m_hpc.config.document import ALIASED, Document
from d2m_hpc.errors import ConfigError

GOOD = """\
models: [image-stats]
input_tars: [tars/a.tar]
output_metadata_dir: out
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "run.yml"
    path.write_text(dedent(text), encoding="utf-8")
    return path


def loaded(folder: Path, more: str, *overrides: str) -> Config:
    return load(written(folder, GOOD + dedent(more)), overrides)


def mistakes(folder: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        load(written(folder, text), overrides)
    return raised.value.mistakes


# --- values ---


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12:30", "12:30"),
        ("007", "007"),
        ("2026-01-31", "2026-01-31"),
        ("2026-01-31T10:00:00Z", "2026-01-31T10:00:00Z"),
        ("yes", "yes"),
        ("Off", "Off"),
        ("True", True),
        ("false", False),
        ("~", None),
        ("", None),
        ("'null'", "null"),
        ("-3", -3),
        ("0x1F", 31),
        ("1.5", 1.5),
        ("=", "="),
        ("!!str 5", "5"),
        ("[1, [a, {b: c}]]", [1, ["a", {"b": "c"}]]),
    ],
)
def test_words_mean_what_they_say(text: str, value: object) -> None:
    document = Document(f"x: {text}")
    assert (document.value, document.mistakes) == ({"x": value}, [])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("!!int twelve", "'twelve'"),
        ("!!set {a, b}", "the tag '!!set'"),
        ("!!omap [a: 1]", "the tag '!!omap'"),
        ("!!binary aGk=", "the tag '!!binary'"),
        ("!!python/object/apply:os.system [ls]", "the tag '!!python/object/apply:os.system'"),
        ("!mine 5", "the tag '!mine'"),
        ("!!map [1]", "the tag '!!map'"),
        ("9" * 5000, "whole numbers up to"),
        ("-9223372036854775809", "whole numbers up to"),
        ("-.inf", "a finite number"),
        (".NaN", "a finite number"),
        ("1.0e+999", "a finite number"),
        (r'"a\0b"', "U+0000"),
        (r'["\udc41"]', "U+DC41"),
        ("{[1, 2]: 3}", "a key that is no text"),
        (r'{"\0": 3}', "a key that is no text"),
        ("[" * 60 + "]" * 60, "nested more than 50 deep"),
        ("&a [*a]", "nested more than 50 deep"),
        ("&a {<<: *a}", "nested more than 50 deep"),
        ("{<<: 5}", "`<<: *name`"),
    ],
)
def test_what_is_no_plain_value_is_a_mistake_with_its_line(text: str, told: str) -> None:
    document = Document(f"a: 1\nb: {text}\n", "some.yml")
    [mistake] = document.mistakes
    assert told in mistake
    assert "some.yml:2:" in mistake
    assert len(mistake) < 600
    assert not document.value or document.value["a"] == 1


def test_aliases_do_not_multiply_without_end() -> None:
    grown = [f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 9)}]" for i in range(1, 12)]
    document = Document("\n".join(["x0: &x0 [ha]", *grown, "last: 1"]), "f.yml")
    [mistake] = document.mistakes
    assert f"more than {ALIASED:,} values" in mistake


def test_a_long_list_is_no_bomb() -> None:
    names = [f"s3://bucket/{i:06d}.tar" for i in range(5000)]
    text = "a: &a\n" + "".join(f"- {name}\n" for name in names) + "b: *a\n"
    assert Document(text).value == {"a": names, "b": names}


def test_keys_that_are_merged_give_way_to_own_ones() -> None:
    text = """
    one: &one {a: 1, b: 1}
    two: &two {b: 2, c: 2}
    all: {<<: [*one, *two], c: 3}
    """
    document = Document(dedent(text))
    assert document.mistakes == []
    assert document.value["all"] == {"a": 1, "b": 1, "c": 3}


# --- keys given twice, keys for anchors ---


def test_a_key_given_twice_is_told_with_both_lines(tmp_path: Path) -> None:
    text = GOOD + "batch_size: 4\nslurm:\n  qos: a\n  'qos': b\nmodels: [text-stats]\n"
    qos, models = sorted(mistakes(tmp_path, text), reverse=True)
    assert qos.startswith("slurm.qos: found the key twice, in lines 6 and 7; valid is once")
    assert models.startswith("models: found the key twice, in lines 1 and 8")
    for line in ("run.yml:1:1\n  1 | models: [image-stats]\n", "run.yml:8:1\n  8 | models: [text"):
        assert line in models


def test_keys_in_x_hold_what_is_repeated(tmp_path: Path) -> None:
    config = loaded(
        tmp_path,
        """
        x-nodes: &nodes {partition: gpu, mem: 4G}
        x-note: 5
        slurm:
          <<: *nodes
          x-more: [1]
          mem: 8G
        """,
    )
    assert (config.slurm.partition, config.slurm.mem) == ("gpu", "8G")


def test_an_x_key_of_sbatch_s_own_is_kept(tmp_path: Path) -> None:
    config = loaded(tmp_path, "slurm: {extra: {x-own: 1}}")
    assert config.slurm.extra == {"x-own": 1}


# --- lines ---


def test_mistakes_come_with_file_line_and_text(tmp_path: Path) -> None:
    text = """\
    models:
      - image-stats
      - image-stat
    input_tars: a.tar
    output_metadata_dir: out
    postprocess_columns: [text-words]   # of a model that is not listed
    slurm:
      partion: gpu
    """
    partion, model, column = mistakes(tmp_path, text)
    assert model.splitlines()[1:] == [
        f"  --> {tmp_path}/run.yml:3:5",
        "  3 |   - image-stat",
        "    |     ^^^^^^^^^^",
    ]
    assert column.splitlines()[2:] == [
        "  6 | postprocess_columns: [text-words]   # of a model that is not listed",
        "    |                       ^^^^^^^^^^",
    ]
    assert partion.splitlines()[3] == "    |   ^^^^^^^^^^^^"


def test_a_long_or_odd_line_is_shown_in_part(tmp_path: Path) -> None:
    text = GOOD + f"run_dir: {'x' * 300}   # a\tb\x85resize: quick # \t{'y' * 300}\n"
    [resize] = mistakes(tmp_path, text)
    assert "resize: quick" in resize
    assert max(map(len, resize.splitlines()[1:])) < len(str(tmp_path)) + 120


def test_broken_yaml_has_its_line(tmp_path: Path) -> None:
    [broken] = mistakes(tmp_path, "models: [a]\nslurm:\n\tmem: 4G\n")
    assert "is not valid YAML: found a tab where a line begins or a value; valid are" in broken
    assert "run.yml:3:1\n" in broken
    [control] = mistakes(tmp_path, "models: [a]\nrun_dir: \x07\n")
    assert "#x0007" in control
    assert "run.yml:2:" in control


def test_a_mistake_on_the_command_line_says_so(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD + "resize: exact\n")
    with pytest.raises(ConfigError) as raised:
        load(path, ["resize=slow", "slurm.mem=[", "models.first=1"], {"time": "2h"})
    mem, first, resize, time = raised.value.mistakes
    assert mem.startswith("--set slurm.mem: found '[': is not valid YAML")
    assert first.startswith("--set models.first: `models` is not a section")
    assert resize.endswith("--> --set resize")
    assert time.endswith("--> --time")


def test_an_empty_list_beside_another_mistake_is_none(tmp_path: Path) -> None:
    text = GOOD + "postprocess_columns:\npostprocess_features:\nadditional_fields:\nresize: 5\n"
    [mistake] = mistakes(tmp_path, text)
    assert mistake.startswith("resize: found 5;")


def test_a_value_that_is_no_plain_one_does_not_hide_other_mistakes(tmp_path: Path) -> None:
    text = "models: !!set {a}\ninput_tars: a.tar\noutput_metadata_dir: out\nbatch_size: .inf\n"
    assert [m.split(":")[0] for m in mistakes(tmp_path, text + "nworkers: 0\n")] == [
        "models",
        "batch_size",
        "nworkers",
    ]


def test_thousands_of_mistakes_are_cut(tmp_path: Path) -> None:
    names = ", ".join(f"m{i}" for i in range(5000))
    path = written(tmp_path, GOOD.replace("image-stats", f"image-stats, {names}, {names}"))
    ended = d2m("plan", path)
    assert ended.returncode == 2
    assert len(ended.stderr) < 100_000
    assert "4,980 more unknown names" in ended.stderr or "9,980 more" in ended.stderr


# --- types ---


SET = ("array", "arr", "job-name", "output", "out", "chdir")
"""Options of sbatch that are set for each job; some abbreviated, as sbatch takes them."""


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("batch_size: true", "batch_size: found True; valid is a value, not `true` or `false`"),
        ("device: false", "device: found False; valid is a value"),
        ("lease_seconds: true", "lease_seconds: found True; valid is a value"),
        ("batch_size: 4000000000", "batch_size: found 4000000000; input should be less than"),
        ("lease_seconds: 1.0e+30", "lease_seconds: found 1e+30; input should be less than"),
        ("device: cuda:²", "device: found 'cuda:²'"),
        ("slurm: {mem: false}", "slurm.mem: found False"),
        ('slurm: {qos: "a\\nb"}', "slurm.qos: found 'a\\nb'; valid is one line"),
        ("slurm: {extra: {'a b': 1}}", "'a b' is no long option"),
        ("slurm: {extra: {--hold: true}}", "'--hold' is no long option without its dashes"),
        ('slurm: {extra: {"ho\\nld": 1}}', "'ho\\nld' is no long option"),
        ("slurm: {extra: {licenses: [a, b]}}", "the value of 'licenses' is a list"),
        ('slurm: {extra: {comment: "a\\nb"}}', "valid is one line"),
        ("slurm: {extra: {time: 4h}}", "did you mean '4:00:00'?"),
        ("slurm: {extra: {clusters: a}}", "valid is `export SLURM_CLUSTERS=NAME`"),
        ("slurm: {rounds: {clusters: a}}", "valid is `export SLURM_CLUSTERS=NAME`"),
        *((f"slurm: {{extra: {{{n}: x}}}}", f"slurm.extra: found '{n}'") for n in SET),
        *((f"slurm: {{rounds: {{{n}: x}}}}", f"slurm.rounds: found '{n}'") for n in SET),
        ("slurm: {extra: {quiet: true}}", "found 'quiet', with which sbatch names no job; leave"),
        ("slurm: {rounds: {test-only: true}}", "slurm.rounds: found 'test-only', with which"),
        ("slurm: {rounds: {begin: now}}", "found 'begin', which is set for each job; leave it out"),
        ("slurm: {rounds: {dependency: x}}", "slurm.rounds: found 'dependency'"),
        ("slurm: {gres: [a, b], extra: {gres: c}}", "slurm.extra: found 'gres', which is set"),
        ('slurm: {gres: ["gpu:1", "gpu\\n2"]}', "valid is one line"),
        (
            "slurm: {gres: [a, b], constraint: [c, d, e]}",
            "slurm.constraint: found 3 entries, and slurm.gres has 2; valid is one for each",
        ),
    ],
)
def test_values_that_types_refuse(tmp_path: Path, line: str, told: str) -> None:
    [mistake] = mistakes(tmp_path, GOOD + line + "\n")
    assert told in mistake
    assert "run.yml:4:" in mistake


@pytest.mark.parametrize("time", ["90", "010", "0", "3:30", "12:00:00", "2-0", "1-12:30:00"])
def test_walltimes_of_slurm_s_own_forms(tmp_path: Path, time: str) -> None:
    assert str(loaded(tmp_path, f"slurm: {{time: {time}}}").slurm.time) == time


@pytest.mark.parametrize(
    ("time", "meant"),
    [
        ("6h", "'6:00:00'"),
        ("90 min", "'90'"),
        ("2d", "'2-0'"),
        ("45s", "'0:45'"),
        ("1:2:3:4", ""),
        ("-5", ""),
        ("1.5", ""),
        ("'4 hours 5'", ""),
        ("1-", ""),
        ("true", ""),
        ("[4]", ""),
    ],
)
def test_other_walltimes_are_told_before_slurm_is_asked(
    tmp_path: Path, time: str, meant: str
) -> None:
    [mistake] = mistakes(tmp_path, GOOD + f"slurm: {{time: {time}}}\n")
    assert mistake.startswith("slurm.time: found ")
    assert "valid is 4:00:00, 1-12 (days and hours), 1-12:30:00, or a number of minutes" in mistake
    assert ("did you mean " + meant in mistake) if meant else ("did you mean" not in mistake)


# --- variables ---


def test_variables_in_paths_are_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLACE", "/lustre/me")
    monkeypatch.setenv("HOME", "/home/me")
    text = """\
    models: [image-stats]
    input_tars:
      - $PLACE/${PLACE}s/{0..3}.tar
      - s3://$PLACE/a$$b.tar
      - pipe:cat $PLACE/x.tar
      - https://host/$PLACE/a.tar?sig=$PLACE
      - costs$5.tar
    output_metadata_dir: ~/out
    run_dir: $PLACE/run
    """
    config = load(written(tmp_path, text))
    assert config.input_tars == [
        "/lustre/me//lustre/mes/{0..3}.tar",
        "s3:///lustre/me/a$b.tar",
        "pipe:cat $PLACE/x.tar",
        "https://host//lustre/me/a.tar?sig=$PLACE",
        "costs$5.tar",
    ]
    assert (config.output_metadata_dir, config.run_dir) == ("/home/me/out", "/lustre/me/run")


def test_variables_in_the_paths_of_a_models_parameters_are_expanded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of one that is not set are one mistake: none of its outputs, or of a head on them."""
    torch.save(torch.nn.Linear(48, 1).state_dict(), tmp_path / "head.pth")
    monkeypatch.setenv("PLACE", str(tmp_path))
    monkeypatch.delenv("NO_SUCH", raising=False)
    text = """\
    models:
      - stats: {kind: image-stats}
      - own: {kind: head, on: stats-histogram, checkpoint: $PLACE/head.pth}
    postprocess_columns: [own-score]
    input_tars: a.tar
    output_metadata_dir: out
    """
    config = load(written(tmp_path, text))
    assert config.models[1]["own"]["checkpoint"] == str(tmp_path / "head.pth")
    text = text.replace("stats: {kind: image-stats}", "sims: {kind: sscd, checkpoint: $NO_SUCH/a}")
    [unset] = mistakes(tmp_path, text.replace("stats-histogram", "sims-image"))
    assert "models.0.sims.checkpoint: found '$NO_SUCH/a'; $NO_SUCH is not set; export" in unset
    assert "2 |   - sims: {" in unset


def test_a_variable_that_is_not_set_is_a_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_SUCH", raising=False)
    monkeypatch.setenv("EMPTY", "")
    text = GOOD.replace("[tars/a.tar]", "[b.tar, $NO_SUCH/*.tar]").replace(": out", ": $EMPTY")
    output, tars = mistakes(tmp_path, text)
    assert "$NO_SUCH is not set; export it" in tars
    assert "2 | input_tars: [b.tar, $NO_SUCH/*.tar]" in tars
    assert "with its variables it is empty" in output
    assert mistakes(tmp_path, GOOD + "run_dir: ~no-such-user/x\n")[0].startswith("run_dir: found")


def test_a_file_of_that_very_name_and_a_frozen_config_are_taken_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NO_SUCH", raising=False)
    (tmp_path / "$NO_SUCH.tar").touch()
    path = written(tmp_path, GOOD.replace("tars/a.tar", "$NO_SUCH.tar"))
    assert load(path).input_tars == ["$NO_SUCH.tar"]
    (tmp_path / "$NO_SUCH.tar").unlink()
    assert load(path, frozen=True).input_tars == ["$NO_SUCH.tar"]


def test_pairs_of_surrogates_are_one_character() -> None:
    values = {"name \U0001f600": "a \U0001f680 b", "list": ["\U0001f600\U0001f600"]}
    read = Document(json.dumps(values))
    assert not read.mistakes
    assert read.value == values
    alone = Document('a: "\\ud83d b"')
    assert "U+D83D" in str(alone.mistakes[0])


def test_a_config_is_not_read_beyond_its_bound(tmp_path: Path) -> None:
    (tmp_path / "big.yml").write_bytes(b"#" * 10_000_001)
    for path in (tmp_path / "big.yml", Path("/dev/zero")):
        with pytest.raises(ConfigError, match="is larger than 10,000,000 bytes"):
            load(path)
