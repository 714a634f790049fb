"""Memory shared by a task's process with the process that watches it."""

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
    """The place of a task's work."""

    root: str
    submission: str
    index: int
    attempt: int
    host: str
    fingerprint: str
    lease_seconds: float
    stall_seconds: float


class Board:
    """Notes by the threads of one process for its parent, readable after a kill.

    A stem longer than a slot is cut; no file's name is so long.
    """

    def __init__(self) -> None:
        self._map = mmap.mmap(-1, HEAD + SCENE + SLOTS * SLOT)
        self._lock = threading.Lock()
        self._beats, self._done = itertools.count(1), itertools.count(1)

    def clear(self) -> None:
        """Erase the notes before the next process."""
        self._map[:] = bytes(len(self._map))

    def beat(self) -> None:
        """Note a sign of life."""
        self._map[0:8] = next(self._beats).to_bytes(8, "little")

    @property
    def beats(self) -> int:
        return int.from_bytes(self._map[0:8], "little")

    def finished_one(self) -> None:
        """Count a finished shard."""
        self._map[8:16] = next(self._done).to_bytes(8, "little")

    @property
    def done(self) -> int:
        return int.from_bytes(self._map[8:16], "little")

    def leave(self) -> None:
        """Note that the process holds no shard any more, and ends by itself."""
        self._map[16] = 1

    @property
    def left(self) -> bool:
        return bool(self._map[16])

    def set_scene(self, scene: Scene | None) -> None:
        """Note where the task works; None while it does not work."""
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
        """Note a claimed shard; return its slot, or -1 without a free one."""
        name = stem.encode("utf-8", "surrogateescape")[: SLOT - _ENTRY.size]
        with self._lock:
            free = (i for i in range(SLOTS) if self._map[self._at(i)] == _FREE)
            if (slot := next(free, -1)) < 0:
                return slot
            at = self._at(slot)
            self._map[at + 1 : at + _ENTRY.size] = _ENTRY.pack(0, len(name), attempt)[1:]
            self._map[at + _ENTRY.size : at + _ENTRY.size + len(name)] = name
            self._map[at] = _CLAIMED  # last, as it makes the slot readable
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
