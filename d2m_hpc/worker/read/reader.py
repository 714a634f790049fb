"""The seam between the forms of shards and all that follows: an ordered list of samples.

Tars, parquets and folders are read behind `Reader`; the rest of the program knows samples only.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, BinaryIO, NamedTuple

from d2m_hpc.run.records import Rejection
from d2m_hpc.worker.read.beside import Beside
from d2m_hpc.worker.read.members import Ledger
from d2m_hpc.worker.read.names import EXTENSIONS, Members


@dataclass
class Sample:
    """A key, and the places of its members: lower-case extension to (place, size in bytes).

    A place is the reader's own: an offset in a tar, a path, a value in memory.

    Attributes:
        links: extensions of members that are links, which are not followed.
        again: the key came before, with other keys in between.
    """

    key: str
    members: dict[str, tuple[Any, int]] = field(default_factory=dict)
    links: list[str] = field(default_factory=list)
    again: bool = False


class Version(NamedTuple):
    """A file's size and time, by which a later look notices a change."""

    size: int = 0
    mtime_ns: int = 0

    @classmethod
    def of(cls, file: BinaryIO) -> Version:
        """The version of an open file, as its path may lead to another file by now."""
        there = os.fstat(file.fileno())
        return cls(there.st_size, there.st_mtime_ns)


class Samples(ABC):
    """Iterate, once, over a shard's samples in its order.

    Whatever is in the shard and in no sample is in the ledger.

    Attributes:
        count: samples so far.
        ledger: all that is in no sample.
        cut: how the shard ends too early; empty for a whole one, and until the iteration ends.

    Args:
        needed: the members that make a sample a row.
    """

    def __init__(self, needed: Members = EXTENSIONS) -> None:
        self.count = 0
        self.ledger = Ledger(needed)
        self.cut = ""

    @property
    def strays(self) -> list[Rejection]:
        """Parts of the shard so far that should be samples and are none."""
        return self.ledger.strays

    @abstractmethod
    def __iter__(self) -> Iterator[Sample]:
        """Yield the samples, each counted."""


class Reader(ABC):
    """An open shard; decode threads read its members while one thread iterates over its samples.

    Attributes:
        version: by which a later look notices that the shard has changed.
        damage: the fault of the stream that a copy came from; empty for a whole one.
        texts: the size and time of other local files that the texts come from, by path.
        beside: texts of the samples in other files, by raw input; whoever opens a shard sets it.
    """

    version = Version()
    texts: Mapping[str, list[int]] = MappingProxyType({})
    damage = ""
    beside: Mapping[str, Beside] = MappingProxyType({})

    @property
    def is_doubtful(self) -> bool:
        """Whether all samples must be counted before the first is used, as the end is missing."""
        return False

    @abstractmethod
    def index(self, needed: Members = EXTENSIONS) -> Samples:
        """The samples, from the first; an earlier iteration is over.

        Args:
            needed: the members that are asked for; by default whatever is there.
        """

    @abstractmethod
    def read(self, place: Any, size: int) -> bytes:
        """A member's bytes, from any thread.

        Raises:
            Rejected: the sample cannot be read.
            ShardError: the shard cannot.
        """

    def latest(self, place: Any, size: int) -> bytes | memoryview:
        """The bytes of a member of the sample that the index gave last, from the index's thread; a
        reader may have them already.

        Raises:
            Rejected, ShardError: as `read` does.
        """
        return self.read(place, size)

    @abstractmethod
    def close(self) -> None:
        """Release the shard; no thread reads it any more."""
