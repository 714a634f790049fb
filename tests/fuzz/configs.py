"""Configs that are wrong in ways nobody thinks of: each is read, or refused with its mistakes.

python tests/fuzz/configs.py SEED COUNT
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
import time
from collections import Counter
from contextlib import chdir
from pathlib import Path

import fsspec
import yaml

from d2m_hpc.config import Config, load
from d2m_hpc.config.reference import json_schema
from d2m_hpc.errors import D2MError
from d2m_hpc.plan.decide import decide
from d2m_hpc.plan.workload import inspect

SLOWEST = 20.0
"""Seconds after which reading a config counts as a hang."""
BASE = """\
models: [image-stats, text-stats]
postprocess_columns: [image-brightness, text-words]
postprocess_features: [image-histogram]
additional_fields: [uid, url]
input_tars: tars/{0..3}.tar
output_metadata_dir: out
device: cpu
batch_size: 16
max_rejected_fraction: 0.1
amp: off
custom_pypath: null
x-nodes: &nodes
  partition: gpu
  qos: normal
slurm:
  <<: *nodes
  time: 4:00:00
  mem: 16G
  setup: [module load cuda]
  extra: {exclusive: true, nice: 100}
"""
VALUES = (
    *("", "~", "null", "true", "off", "[]", "{}", "[[]]", "[null]", "{a: {b: [c]}}", "{? [a] : b}"),
    *("0", "-1", "010", "1_0", "0x1f", "1e3", "1.0e+400", ".inf", "-.INF", ".nan", "9" * 30),
    *("9" * 5000, "2026-01-31", "2026-01-31T00:00:00Z", "12:30:45", "4h", "1-12", "!!int x"),
    *("!!set {a, b}", "!!omap [a: 1]", "!!pairs [a: 1]", "!!binary aGk=", "!!float [1]", "!x y"),
    *(
        "!!timestamp x",
        "!!bool maybe",
        "!!null x",
        "!!str [a]",
        "!!python/name:os.system",
        "!!map 1",
    ),
    *(
        '"a\\0b"',
        '"\\ud800"',
        '"\\udcff.tar"',
        '"a\\nb"',
        '"\\e[2J"',
        "'\\'",
        '"\\u2028"',
        "a: b: c",
    ),
    *("*nodes", "*nothing", "&a [*a]", "&a {<<: *a}", "<<", "=", "|\n  a\n  b", ">\n  a", "# no"),
    *("[" * 70, "[" * 70 + "]" * 70, "{a: " * 70 + "1" + "}" * 70, "x" * 5000, "[" + "a, " * 3000),
    *("{0..99999999}.tar", "{a,b}" * 40, "{" * 300, "}" * 30 + "{", "{1..9..0}", "{9..0..-3}.tar"),
    *(
        "$NO_SUCH_NAME/x",
        "${HOME}/x",
        "$$x",
        "~no-such-user/x",
        "~/x",
        "~",
        "'$'",
        "/",
        ".",
        "a" * 300,
    ),
    *(
        "tars",
        "tars/*",
        "tars/[",
        "pipe:",
        "pipe:cat {0..3}",
        "file://",
        "://",
        "s4://b/*",
        "memory://",
    ),
    *(
        "a::b",
        "memory://b/[/x",
        "/dev/null",
        "c.yml",
        "é.tar",
        "../..",
        "tars/0.tar/",
        "x\ty",
        "cuda:²",
    ),
    *(
        "cuda:99999999999",
        "[image-stats, image-stats]",
        "[uid, key, text]",
        "[a, A, 'a ']",
        "- a\n- b",
    ),
)
LINES = (
    *(
        "models: [image-stats]",
        "? [a, b]\n: c",
        "1: 2",
        "null: 1",
        "slurm: {time: 1}",
        "x-: 1",
        "- a",
    ),
    *(
        "<<: *nodes",
        "<<: [*nodes, *nodes]",
        "<<: 5",
        "---",
        "...",
        "%YAML 1.2",
        "%TAG ! x",
        "\t",
        "\0",
    ),
    *(
        "\x07",
        "\ufeff",
        "key without a value",
        "'",
        '"',
        "[",
        "}",
        "a: |",
        "&a",
        "*a",
        "!!set",
        "@",
        "`",
    ),
    *(
        "slurm:",
        "  extra:",
        "    a b: 1",
        "    time: 4h",
        "    x: [1]",
        '    "a\\nb": 1',
        "\u2028",
        "\x85",
    ),
)
PLAUSIBLE = (
    *("", "~", "true", "no", "1", "2.0", "0.5", "60", "auto", "cpu", "cuda:1", "fast", "float32"),
    *("[]", "[image-stats]", "[text-stats, image-stats]", "[image-brightness]", "[uid]", "{}"),
    *(
        "tars",
        "tars/*.tar",
        "[tars/0.tar, 'tars/{1..2}.tar']",
        "$HOME/d2m-none",
        "x/y",
        "010",
        "2-0",
    ),
)
VALID = {
    "models": (
        *("[image-stats, text-stats]", "[text-stats, image-stats]"),
        "\n- image-stats\n- text-stats",
    ),
    "postprocess_columns": (
        *("[]", "[image-brightness]", "[text-words, image-phash]"),
        "\n  - text-words # and no more\n  - image-brightness",
    ),
    "postprocess_features": (
        *("[]", "[image-histogram]", '["image-histogram"]', "!!seq [image-histogram]"),
    ),
    "additional_fields": (
        *("[]", "[uid]", "[key, uid]", "[été, 'a b', 日本]", "['a.b', \"c.d\"]"),
        *("[url, 'n: int64']", "{score: float64, tags: list<string>}", "[more: json]"),
        "[{score: float64}, uid]",
    ),
    "input_tars": (
        *("tars", "./tars/", "tars/*.tar", "tars/?.tar", "'tars/[0-9].tar'", "tars/{3..0}.tar"),
        *("[tars/0.tar, 'tars/{1..2}.tar']", "tars/{0,{1,2}}.tar", "tars::tars/0.tar"),
        *("file://${D2M_FUZZ}/tars/0.tar", "['tars/0.tar', tars/0.tar]", "'**/*.tar'"),
        *("memory://t/{0..9}.tar", "memory://t", "$D2M_FUZZ/tars", "tars/../tars/1.tar"),
        *("'pipe:cat tars/{0..3}.tar'", "pipe:printf '' # x.tar"),
    ),
    "output_metadata_dir": (
        *("out", "./out/x", "$D2M_FUZZ/o", "file:///tmp/d2m-none/o", "memory://o/p", "été"),
    ),
    "device": ("cpu", "0", "cuda:1", "'3'", "cuda:0"),
    "batch_size": ("1", "16", "1_000", "0x10", "100000"),
    "max_rejected_fraction": ("0", "1", "0.5", "1e-3", ".5", "1.0e+0"),
    "amp": ("off", "auto", "false", "'off'", "float16", "bfloat16"),
    "custom_pypath": ("null", "~", ""),
    "  time": ("4:00:00", "'1-12'", "90", "2-00:00:00", "'30:00'", "null"),
    "  mem": ("16G", "16000", "'64G'", "null"),
    "  setup": ("[]", "[module load cuda, 'export A=\"b c\"']", "\n  - a\n  - b"),
    "  extra": ("{}", "{exclusive: false}", "{nice: -5}", "{comment: 'a b'}", "{exclusive: null}"),
}
"""Other values that a key takes; most of them are accepted with most of the others."""
SLURM = (
    "{}",
    "{time: 60}",
    "{<<: *nodes, time: 1-12}",
    "{mem: 16000, requeue: false}",
    "{max_mem: 4G}",
)
MORE = {
    "nworkers": ("1", "null", "64"),
    "reprocess": ("true", "no"),
    "use_datacomp_keys": ("true", "off"),
    "tars_per_wds": ("1", "null"),
    "warn_and_continue": ("false", "yes"),
    "run_dir": ("run", "$D2M_FUZZ/run/x", "null"),
    "compile": ("true",),
    "resize": ("exact", "'fast'"),
    "feature_dtype": ("float32", "float16"),
    "shards_per_task": ("1", "1000000"),
    "task_minutes": ("1", "600", "null"),
    "allow_truncated_shards": ("true",),
    "allow_missing_fields": ("on",),
    "max_image_pixels": ("1000000000", "1", "100_000_000"),
    "max_attempts": ("1", "100"),
    "max_node_failures": ("0", "7"),
    "lease_seconds": ("60", "1e3", "0.5"),
    "stall_seconds": ("3600.5", "10"),
    "scratch_bytes": ("null", "1000000000"),
    "steal": ("false",),
    "weights_dir": ("null", "w", "~/d2m-none"),
    "allow_unpublished_weights": ("true",),
    "x-anything": ("[&a 1, *a]", "{b: [c]}", "null"),
}
"""Values of keys that the base does not have."""
KEYS = (*Config.model_fields, "slurm", "nonsense", "x-y", "", "é", "a.b", "0")
OPTIONS = (
    "models",
    "slurm.time",
    "slurm.extra.x",
    "slurm.extra.time",
    "a.b.c",
    "",
    ".",
    "input_tars",
)


def altered(rng: random.Random) -> str:
    """The base with other values, and more keys, of which each is one that its key takes."""
    lines = BASE.splitlines()
    for i, line in enumerate(lines):
        key = line.partition(":")[0]
        if key in VALID and rng.random() < 0.3:
            lines[i] = f"{key}: {_indented(rng.choice(VALID[key]), key)}"
    if rng.random() < 0.1:
        lines = [*lines[: lines.index("slurm:")], f"slurm: {rng.choice(SLURM)}"]
    more = [f"{key}: {rng.choice(MORE[key])}" for key in MORE if rng.random() < 0.1]
    return "\n".join([*more, *lines]) + rng.choice(("", "\n", "\r\n"))


def _indented(value: str, key: str) -> str:
    """A value of several lines as one of a key that stands so far to the right."""
    return value.replace("\n", "\n" + " " * (len(key) - len(key.lstrip())))


def mutated(rng: random.Random) -> str:
    """The base with other values, or, once in three, with lines and letters of any kind."""
    lines = BASE.splitlines()
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.choice(
            [i for i, line in enumerate(lines) if not line.endswith(("slurm:", "nodes"))]
        )
        values = rng.choice((VALUES, PLAUSIBLE, PLAUSIBLE))
        lines[at] = f"{lines[at].partition(':')[0]}: {rng.choice(values)}"
    if rng.random() < 0.3:
        lines.insert(0, f"{rng.choice(KEYS)}: {rng.choice((*VALUES, *PLAUSIBLE))}")
    if rng.random() < 0.2:
        at = rng.randrange(len(lines))
        lines = [*lines[:at], *lines[at + 1 :]]
    if rng.random() < 0.67:
        return "\n".join(lines) + "\n"
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(lines))
        anything = (*LINES, rng.choice((" ", "\t", "- ")) + lines[at], rng.choice(lines))
        lines.insert(at, rng.choice(anything))
    text = "\n".join(lines) + "\n"
    for _ in range(rng.choice((0, 0, 1, 4))):
        at = rng.randrange(len(text))
        text = (
            text[:at]
            + rng.choice(("", "\0", "\t", '"', "'", "*", ":", "[", "{", "\x7f", "é"))
            + text[at:]
        )
    return text


def overrides(rng: random.Random) -> list[str]:
    count = rng.choice((0, 0, 0, 1, 2))
    keys = (*KEYS, *OPTIONS)
    return [f"{rng.choice(keys)}{rng.choice('==:')}{rng.choice(VALUES)}" for _ in range(count)]


def read(path: Path, given: list[str]) -> str:
    """What becomes of a config: `refused`, or `planned` where all of it can be done.

    Raises:
        AssertionError: a message that is no use, or a config that does not survive being frozen.
    """
    try:
        config = load(path, given)
        frozen = path.with_name("frozen.yml")
        values = config.model_dump(mode="json")
        frozen.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), "utf-8")
        assert load(frozen, frozen=True) == config
        workload = inspect(config, str(path))
        planned = decide(workload).shards
        assert {shard.url for shard in planned} == workload.sizes.keys()
        assert len({shard.stem for shard in planned}) == len(planned)
    except D2MError as error:
        told = str(error)
        assert told.strip()
        assert len(told) < 200_000, "a message without end"
        told.encode()
        return "refused"
    return "planned"


def main(seed: int, count: int) -> Counter[str]:
    """Read many configs; what raises or takes too long is printed, with its text."""
    found: Counter[str] = Counter()
    json_schema()
    memory = fsspec.filesystem("memory")
    for i in range(10):
        memory.pipe(f"/t/{i}.tar", bytes(1024))
    with tempfile.TemporaryDirectory() as folder, chdir(folder):  # relative paths lead there
        os.environ["D2M_FUZZ"] = folder
        path = Path(folder) / "c.yml"
        (path.parent / "tars").mkdir()
        for i in range(4):
            (path.parent / "tars" / f"{i}.tar").write_bytes(bytes(1024))
        for i in range(count):
            rng = random.Random(f"{seed}-{i}")
            fair = rng.random() < 0.5
            path.write_text(altered(rng) if fair else mutated(rng), "utf-8")
            given = [] if fair and rng.random() < 0.9 else overrides(rng)
            began = time.monotonic()
            try:
                what = read(path, given)
            except Exception as error:
                what = f"raised {type(error).__name__}"
                text = path.read_text("utf-8")[:3000]
                print(f"{seed}-{i}: {what}: {str(error)[:300]}\n{given}\n{text}")
            found[what] += 1
            if time.monotonic() - began > SLOWEST:
                found["hung"] += 1
                print(f"{seed}-{i}: took {time.monotonic() - began:.0f} s")
    return found


if __name__ == "__main__":
    print(dict(main(int(sys.argv[1]), int(sys.argv[2]))))
