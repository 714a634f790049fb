"""What the sections of a config have in common."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, ConfigDict, Field

from d2m_hpc.config.slurm_values import no_switch

NoSwitch = BeforeValidator(no_switch)
Count = Annotated[int, Field(ge=1, le=2**31 - 1), NoSwitch]
STRICT = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
"""In a section an unknown key is a mistake; `described` finds the text below each key."""
