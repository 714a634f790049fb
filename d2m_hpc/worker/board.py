"""Memory by which a task's process tells the process that watches it how far it is."""

from __future__ import annotations

import itertools
import json
import mmap
import struct
import threading
from dataclasses import asdict, dataclass

SLOTS, SLOT, HEAD, SCENE = 64, 512, 64, 4096
_ENTRY = struct.Struct("<BxHI")
"""A slot's start: its state, the length of the stem, the attempt's number; the stem follows."""
_FREE, _CLAIMED, _BEGUN = range(3)


@dataclass(frozen=True)
class Entry:
    """A shard that a task holds.

    Attributes:
        begun: it is being copied, read, computed or written; else it was only claimed, or waits.
    """

    stem: str
    attempt: int
    begun: bool


@dataclass(frozen=True)
class Scene:
    """Where a task works."""

    root: str
    submission: str
    index: int
    attempt: int
    host: str
    fingerprint: str
    lease_seconds: float
    stall_seconds: float


class Board:
    """Written by the threads of one process, and read by its parent, also after it was killed.

    A stem that is longer than a slot, as no file's name is, is cut.
    """

    def __init__(self) -> None:
        self._map = mmap.mmap(-1, HEAD + SCENE + SLOTS * SLOT)
        self._lock = threading.Lock()
        self._beats, self._done = itertools.count(1), itertools.count(1)

    def clear(self) -> None:
        """For the next process."""
        self._map[:] = bytes(len(self._map))

    def beat(self) -> None:
        """Something happened."""
        self._map[0:8] = next(self._beats).to_bytes(8, "little")

    @property
    def beats(self) -> int:
        return int.from_bytes(self._map[0:8], "little")

    def finished_one(self) -> None:
        """A shard was done."""
        self._map[8:16] = next(self._done).to_bytes(8, "little")

    @property
    def done(self) -> int:
        return int.from_bytes(self._map[8:16], "little")

    def leave(self) -> None:
        """The process ends on its own, after all was said."""
        self._map[16] = 1

    @property
    def left(self) -> bool:
        return bool(self._map[16])

    def set_scene(self, scene: Scene | None) -> None:
        """Say where the task works from now on; None while it does not work."""
        text = json.dumps(asdict(scene)).encode() if scene else b""
        self._map[HEAD : HEAD + SCENE] = text[:SCENE].ljust(SCENE, b"\0")

    @property
    def scene(self) -> Scene | None:
        text = self._map[HEAD : HEAD + SCENE].rstrip(b"\0")
        try:
            return Scene(**json.loads(text)) if text else None
        except (ValueError, TypeError):
            return None

    def claim(self, stem: str, attempt: int) -> int:
        """Note a shard that was claimed; returns its slot, -1 where there is none left."""
        name = stem.encode("utf-8", "surrogateescape")[: SLOT - _ENTRY.size]
        with self._lock:
            free = (i for i in range(SLOTS) if self._map[self._at(i)] == _FREE)
            if (slot := next(free, -1)) < 0:
                return slot
            at = self._at(slot)
            self._map[at + 1 : at + _ENTRY.size] = _ENTRY.pack(0, len(name), attempt)[1:]
            self._map[at + _ENTRY.size : at + _ENTRY.size + len(name)] = name
            self._map[at] = _CLAIMED  # last: until then there is nothing to be read
            return slot

    def begin(self, slot: int) -> None:
        """The shard is copied, read, computed or written from now on."""
        if slot >= 0:
            self._map[self._at(slot)] = _BEGUN

    def rest(self, slot: int) -> None:
        """The shard waits: copied, to be read; or computed, to be written."""
        if slot >= 0:
            self._map[self._at(slot)] = _CLAIMED

    def free(self, slot: int) -> None:
        """The shard is settled, or left to others."""
        if slot >= 0:
            self._map[self._at(slot)] = _FREE

    def entries(self) -> list[Entry]:
        """The shards that the process holds, or held when it ended."""
        found = []
        for slot in range(SLOTS):
            at = self._at(slot)
            state, length, attempt = _ENTRY.unpack(self._map[at : at + _ENTRY.size])
            if state != _FREE:
                name = self._map[at + _ENTRY.size : at + _ENTRY.size + length]
                stem = name.decode("utf-8", "surrogateescape")
                found.append(Entry(stem, attempt, state == _BEGUN))
        return found

    @staticmethod
    def _at(slot: int) -> int:
        return HEAD + SCENE + slot * SLOT
