"""`d2m schema`."""

from __future__ import annotations

import json


def schema() -> None:
    from d2m_hpc.config.reference import json_schema

    print(json.dumps(json_schema(), indent=1))
