"""The kinds of derived columns: what a config may write under `derive`, and the columns' types."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from d2m_hpc.config.section import STRICT, Count, NoSwitch
from d2m_hpc.models.entries import family_of, with_places

if TYPE_CHECKING:
    from collections.abc import Callable

    from d2m_hpc.models.families.head import LinearHead

Seed = Annotated[int, Field(ge=0, lt=2**32), NoSwitch]


class Derivation(BaseModel):
    """An entry of `derive`: one column, or a few, computed from a shard's stored values."""

    model_config = STRICT
    kind: str

    @property
    def reads(self) -> dict[str, str]:
        """The features that are read, by the key that names each."""
        named = {key: getattr(self, key, None) for key in ("feature", "image", "text", "on")}
        return {key: name for key, name in named.items() if name}

    def columns(self, name: str) -> dict[str, str]:
        """The types of the columns, by name.

        Args:
            name: the entry's name.
        """
        return {name: "float32"}

    def with_paths(self, change: Callable[[str], str]) -> Derivation:
        """The same with its paths changed."""
        return self


class SqlExpression(Derivation):
    """A value of each row by an SQL expression of DuckDB over the shard's columns."""

    kind: Literal["sql"]
    expression: Annotated[str, Field(min_length=1)]
    """over the columns and the derived columns listed before: `"image-brightness" > 0.2`"""
    type: Literal["bool", "int64", "float32", "string"] = "float32"
    """of the column"""

    def columns(self, name: str) -> dict[str, str]:
        return {name: self.type}


class HeadScores(Derivation):
    """The scores of a model of the kind `head`, with its parameters, on a stored feature."""

    model_config = ConfigDict(extra="allow")
    kind: Literal["head"]

    @model_validator(mode="after")
    def _check(self) -> HeadScores:
        if self.family.width:
            raise ValueError("a head with `width` makes a feature; valid is one with `classes`")
        return self

    @cached_property
    def family(self) -> LinearHead:
        return family_of({"head": self.model_dump()})  # type: ignore[return-value]

    @property
    def reads(self) -> dict[str, str]:
        return {"on": self.family.on}

    def columns(self, name: str) -> dict[str, str]:
        named = [f"{name}-{label}" for label in self.family.classes]
        return dict.fromkeys(named or [name], "float32")

    def with_paths(self, change: Callable[[str], str]) -> HeadScores:
        entry: Any = with_places({"head": self.model_dump()}, lambda _, path: change(path))
        return HeadScores(**entry["head"])


class Clusters(Derivation):
    """The nearest of centroids, by cosine, which k-means finds in a sample of the run."""

    kind: Literal["clusters"]
    feature: str
    """a feature of the config"""
    count: Count
    """clusters"""
    sample: Count | None = None
    """rows for k-means; by default 256 a cluster"""
    iterations: Annotated[int, Field(ge=1, le=1000), NoSwitch] = 20
    """of k-means"""
    seed: Seed = 0
    """of the sample and of k-means"""

    def columns(self, name: str) -> dict[str, str]:
        return {name: "int32", f"{name}-similarity": "float32"}


class Duplicates(Derivation):
    """Whether a sample has a near-duplicate that stays, within its cluster, as in SemDeDup."""

    kind: Literal["duplicates"]
    feature: str
    """a feature of the config"""
    within: str
    """the entry of kind `clusters`, on the same feature, that is listed before"""
    threshold: Annotated[float, Field(ge=-1, le=1), NoSwitch] = 0.95
    """the cosine from which two samples are near-duplicates"""

    def columns(self, name: str) -> dict[str, str]:
        return {name: "bool", f"{name}-similarity": "float32"}


class Referring(Derivation):
    """A derivation that compares a feature with the vectors of a file of the user's."""

    feature: str
    """a feature of the config"""
    reference: str
    """an `.npy` of a vector a row, or a `.parquet`"""
    column: str | None = None
    """with the vectors, of a parquet"""

    def with_paths(self, change: Callable[[str], str]) -> Referring:
        return self.model_copy(update={"reference": change(self.reference)})


class Nearest(Referring):
    """The row of a reference that is nearest by cosine, and the cosine."""

    kind: Literal["nearest"]

    def columns(self, name: str) -> dict[str, str]:
        return {name: "int64", f"{name}-similarity": "float32"}


class NormSim(Referring):
    """NormSim of Wang et al. (2024): the norm of a sample's cosines with the vectors of a task."""

    kind: Literal["normsim"]
    norm: Literal[2, "inf"] = "inf"
    """`inf` is the largest cosine"""


class NegClipLoss(Derivation):
    """negCLIPLoss of Wang et al. (2024): the CLIP score less its mean normalization in batches."""

    kind: Literal["negcliploss"]
    image: str
    """the feature of the images"""
    text: str
    """the feature of the texts"""
    temperature: Annotated[float, Field(gt=0, le=100), NoSwitch] = 0.01
    """of the model"""
    batch: Annotated[int, Field(ge=1, le=1 << 20), NoSwitch] = 32_768
    """samples in a batch, drawn from the run"""
    batches: Annotated[int, Field(ge=1, le=1000), NoSwitch] = 10
    """batches over which the mean is taken"""
    seed: Seed = 0
    """of the draw"""


AnyDerivation = Annotated[
    SqlExpression | HeadScores | Clusters | Duplicates | Nearest | NormSim | NegClipLoss,
    Field(discriminator="kind"),
]
KINDS: tuple[type[Derivation], ...] = get_args(get_args(AnyDerivation)[0])
