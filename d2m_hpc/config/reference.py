"""The JSON schema of a config, for editors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from d2m_hpc.config.derive import KINDS
from d2m_hpc.config.load import APART
from d2m_hpc.config.schema import Config, Slurm
from d2m_hpc.described import described
from d2m_hpc.models.entries import known_families
from d2m_hpc.models.family import Family
from d2m_hpc.models.registry import builtin

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def json_schema() -> dict[str, Any]:
    """Make the schema: the keys and their types. `load` finds more mistakes, in better words."""
    schema = Config.model_json_schema()
    known = builtin()
    offered = (known.models, known.columns, known.features)  # a custom file's are as valid
    for key, names in zip(
        ("models", "postprocess_columns", "postprocess_features"), offered, strict=True
    ):
        for array in _arrays(schema["properties"][key]):
            named = [{"enum": sorted(names)}, {"type": "string"}]
            array["items"] = {"anyOf": named + ([_families()] if key == "models" else [])}
    for section in (schema, *schema["$defs"].values()):
        section["patternProperties"] = {f"^{APART}": {}}
    _describe(schema, Config)
    parts: tuple[type[BaseModel], ...] = (Slurm, *KINDS)
    for part in parts:
        _describe(schema["$defs"][part.__name__], part)
    return {"$schema": DIALECT, **schema, "title": "d2m_hpc config"}


def _describe(schema: dict[str, Any], part: type[BaseModel]) -> None:
    for name, text in described(part).items():
        schema["properties"][name]["description"] = text


def _families() -> dict[str, Any]:
    """One name, with the parameters of a family; what other packages have is valid, too."""
    known = known_families()
    others = {"properties": {"kind": {"type": "string", "not": {"enum": sorted(known)}}}}
    return {
        "type": "object",
        "minProperties": 1,
        "maxProperties": 1,
        "additionalProperties": {
            "type": "object",
            "required": ["kind"],
            "anyOf": [*map(_parameters, known.values()), others],
        },
    }


def _parameters(family: type[Family]) -> dict[str, Any]:
    schema = family.model_json_schema()
    _describe(schema, family)
    schema["properties"] = {"kind": {"const": family.kind}, **schema.get("properties", {})}
    return schema


def _arrays(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    choices: list[dict[str, Any]] = schema.get("anyOf", [schema])
    return (choice for choice in choices if choice.get("type") == "array")
