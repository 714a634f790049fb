"""The JSON schema of a config, for editors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from d2m_hpc.config.load import APART
from d2m_hpc.config.schema import Config
from d2m_hpc.models.registry import COLUMNS, FEATURES, MODELS

DIALECT = "https://json-schema.org/draft/2020-12/schema"
KNOWN = {"models": MODELS, "postprocess_columns": COLUMNS, "postprocess_features": FEATURES}
"""Names that an editor may offer; those of a custom file are as valid."""


def json_schema() -> dict[str, Any]:
    """Make the schema: the keys and their types. `load` finds more mistakes, in better words."""
    schema = Config.model_json_schema()
    for key, names in KNOWN.items():
        for array in _arrays(schema["properties"][key]):
            array["items"] = {"anyOf": [{"enum": sorted(names)}, {"type": "string"}]}
    for section in (schema, *schema["$defs"].values()):
        section["patternProperties"] = {f"^{APART}": {}}
    return {"$schema": DIALECT, **schema, "title": "d2m_hpc config"}


def _arrays(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    choices: list[dict[str, Any]] = schema.get("anyOf", [schema])
    return (choice for choice in choices if choice.get("type") == "array")
