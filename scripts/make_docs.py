"""Write docs/config.md, from the config's own types and descriptions.

python scripts/make_docs.py [FILE]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic_core import PydanticUndefined

from d2m_hpc.config import Config, Slurm
from d2m_hpc.config.reference import json_schema
from d2m_hpc.config.schema import SOURCES, Section
from d2m_hpc.described import described

PAGE = Path(__file__).parent.parent / "docs" / "config.md"
TOP = """\
# The config

<!-- Written by scripts/make_docs.py from d2m_hpc/config/schema.py: change it there. -->

A YAML file. Only `models`, `output_metadata_dir` and one of `input_tars` and [`inputs`](inputs.md)
are required. Files of [dataset2metadata](migrating.md) are valid as they are.

```yaml
models: [image-stats, text-stats]
postprocess_columns: [image-brightness, text-words]
additional_fields: [uid, url]
input_tars: "tars/{00000..00999}.tar"
output_metadata_dir: metadata
slurm:
  partition: gpu
  time: 4:00:00
```

Every key can be set on the command line, where values are YAML too, and every key of `slurm:` is
also an option. All mistakes in a config are told at once, each with its key, its line and what is
valid.

```bash
d2m plan configs/quickstart.yml --set batch_size=32 --set slurm.mem=16G
d2m-submit configs/quickstart.yml --mem 16G --dry-run
```

`$NAME` and `${NAME}` in paths, patterns and URLs are taken from the environment of the command, but
not in `pipe:` commands, which their shell expands; one that is not set is a mistake, and `$$` is a
plain `$`. A key may be given once. Keys that begin with `x-` are for the file's own use: a YAML
anchor in one can be repeated elsewhere.

```yaml
x-nodes: &nodes {partition: gpu, mem: 64G}
slurm:
  <<: *nodes
  time: 4:00:00
```

Editors that know JSON schemas complete keys and mark mistakes. `d2m schema` prints it; name the
file in the config's first line for the YAML language server (VS Code, Neovim, Emacs):

```bash
d2m schema > d2m.schema.json
{ echo '# yaml-language-server: $schema=d2m.schema.json'; cat configs/quickstart.yml; } > mine.yml
```

## Keys

`*` marks what decides the values in the outputs. Together with the checkpoints' and the custom
file's sha256 it is the run's fingerprint: [a config that differs in
it](resume.md#when-the-config-changes) does not mix its outputs with those that are there.

"""
SLURM = """
## Keys of `slurm:`

What is not set is left to sbatch's own defaults.

"""


def page() -> str:
    definitions = json_schema()
    keys = _table(Config, definitions["properties"], _fingerprinted())
    slurm = _table(Slurm, definitions["$defs"]["Slurm"]["properties"], frozenset())
    return f"{TOP}{keys}{SLURM}{slurm}"


def _fingerprinted() -> frozenset[str]:
    config = Config(models=["image-stats"], input_tars=["a.tar"], output_metadata_dir="out")
    return frozenset({*config.fingerprint({}), *SOURCES, "decode", "custom_pypath"})


def _table(section: type[Section], schema: dict[str, Any], marked: frozenset[str]) -> str:
    rows = ["| key | valid | default | |", "|---|---|---|---|"]
    texts = described(section)
    for name, field in section.model_fields.items():
        default = "required" if field.is_required() else _default(field.default)
        key = f"`{name}`" + (" *" if name in marked else "")
        rows.append(f"| {key} | {valid(schema[name])} | {default} | {texts[name]} |")
    return "\n".join(rows) + "\n"


def _default(value: Any) -> str:
    assert value is not PydanticUndefined
    return "" if value is None or isinstance(value, Section) else f"`{json.dumps(value)}`"


WORDS = {
    "array": "list of strings",
    "boolean": "`true`, `false`",
    "object": "mapping",
    "string": "string",
}


def valid(schema: dict[str, Any]) -> str:
    """In words: types, choices and bounds."""
    if "$ref" in schema:
        return "keys, [below](#keys-of-slurm)"
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "anyOf" in schema:
        return " or ".join(filter(None, map(valid, schema["anyOf"])))
    if "const" in schema:  # what YAML makes of an unquoted `off`
        return ""
    kind = schema["type"]
    if kind == "array" and "minProperties" in str(schema.get("items")):
        return "list of names, and of names with parameters"
    if kind in ("integer", "number"):
        return " ".join([kind, *_bounds(schema)])
    return WORDS.get(kind, "")  # null stands for the default


def _bounds(schema: dict[str, Any]) -> Iterator[str]:
    """A maximum that only keeps numbers within a machine's own is left out."""
    words = {"minimum": "from", "exclusiveMinimum": "over", "maximum": "to"}
    for key, word in words.items():
        if key in schema and schema[key] < 1e9:
            yield f"{word} {schema[key]}"


def main(path: Path) -> None:
    path.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else PAGE)
