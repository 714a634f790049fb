"""Configs that are wrong in ways nobody thinks of: each is read, or refused with its mistakes.

python tests/fuzz/configs.py SEED COUNT
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from collections import Counter
from contextlib import chdir
from pathlib import Path

import yaml

from d2m_hpc.config import Config, load
from d2m_hpc.config.reference import json_schema
from d2m_hpc.errors import D2MError
from d2m_hpc.launch.decide import decide, inspect

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
        decide(inspect(config, str(path)))
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
    with tempfile.TemporaryDirectory() as folder, chdir(folder):  # relative paths lead there
        path = Path(folder) / "c.yml"
        (path.parent / "tars").mkdir()
        for i in range(4):
            (path.parent / "tars" / f"{i}.tar").write_bytes(bytes(1024))
        for i in range(count):
            rng = random.Random(f"{seed}-{i}")
            path.write_text(mutated(rng), "utf-8")
            given, began = overrides(rng), time.monotonic()
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
