"""Read what a class of pydantic's says of its fields: the text below each."""

from __future__ import annotations

import ast
import inspect
import textwrap
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import BaseModel


def described(section: type[BaseModel]) -> dict[str, str]:
    """The text below each field of a class, also of its bases, on one line.

    With `use_attribute_docstrings` pydantic reads the source at each import, for the few commands
    that show it.

    Example:
        described(Slurm)["partition"]
    """
    found: dict[str, str] = {}
    for base in reversed(section.__mro__):
        if not getattr(base, "__annotations__", None) or base.__module__.startswith("pydantic."):
            continue
        [made] = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(made, ast.ClassDef)
        for line, text in pairwise(made.body):
            if isinstance(line, ast.AnnAssign) and isinstance(text, ast.Expr):
                words = ast.literal_eval(text.value)
                found[ast.unparse(line.target)] = " ".join(words.split())
    return {name: text for name, text in found.items() if name in section.model_fields}
