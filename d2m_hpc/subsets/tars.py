"""Tars of kept samples, each from a shard of a run, with the members as they are in the shard."""

from __future__ import annotations

import json
import os
import struct
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import IO, TYPE_CHECKING

import pyarrow as pa

from d2m_hpc.config import Config
from d2m_hpc.errors import ConfigError, D2MError
from d2m_hpc.models.inputs import FORMATS, format_of
from d2m_hpc.plan.standing import standings
from d2m_hpc.run.folder import RunDir
from d2m_hpc.run.outputs import OutputDir
from d2m_hpc.run.pair import Pair
from d2m_hpc.run.records import Shard
from d2m_hpc.run.shards import read_shards
from d2m_hpc.run.slices import place_of
from d2m_hpc.storage.urls import masked
from d2m_hpc.subsets.exports import ExportLayout, ExportPart, ExportSource, digest_of, whole

if TYPE_CHECKING:
    from d2m_hpc.worker.read.reader import Reader

BLOCK = tarfile.BLOCKSIZE
HELD, PARTS = 1 << 20, 1000
"""Bytes, and pieces of them, after which these are written; the system takes 1024 at once."""


class SubsetTars(ExportLayout):
    """`{stem}.tar` of each shard with kept samples; the shards are read again.

    Args:
        file: of the kept keys, as `d2m select -o FILE.jsonl` writes it.
    """

    kind = "subset-tars"

    def __init__(self, run: RunDir, config: Config, folder: Path, file: Path | None) -> None:
        output, found = OutputDir(config.output_metadata_dir), standings(run, config)
        lists = _read_lists(file)
        self._shards = {s.stem: s for s in read_shards(run.shards) if s.stem in lists}
        if lost := [stem for stem in lists if stem not in self._shards]:
            what = f"--lists: found the shard {lost[0]!r}, which is none of {run.root}"
            raise ConfigError("export", [what])
        self._lists = {stem: lists[stem] for stem in self._shards}
        pairs = [(Pair(output, stem), len(keys)) for stem, keys in self._lists.items()]
        left = len(found.stems) - len(found.done)
        super().__init__(ExportSource(config, pairs, [], pa.schema([]), [], left), folder)
        self.parts = [*self._own_parts(pairs)]

    def _own_parts(self, pairs: Sequence[tuple[Pair, int]]) -> Iterator[ExportPart]:
        start = 0
        for number, (pair, rows) in enumerate(pairs):
            shard = self._shards[pair.stem]
            about = [shard.stem, shard.url, str(shard.size), *self._lists[shard.stem]]
            digest = digest_of([self.kind, *about])
            yield ExportPart(number, start, rows, ((pair, rows),), digest)
            start += rows

    def lines(self) -> Iterator[bytes]:
        """The lists, as `d2m select` writes them."""
        for stem, keys in self._lists.items():
            yield json.dumps({"shard": stem, "keys": keys}).encode() + b"\n"

    def files(self, part: ExportPart) -> list[Path]:
        return [self.root / f"{pair.stem}.tar" for pair, _ in part.pairs]

    def write(self, part: ExportPart) -> None:
        from d2m_hpc.worker.read.readers import opener
        from d2m_hpc.worker.read.scratch import scratch
        from d2m_hpc.worker.read.stage import stage

        [path] = self.files(part)
        config, shard = self.source.config, self._shards[path.stem]
        with (
            scratch(config.scratch_bytes) as disk,
            stage(shard, disk) as staged,
            closing(opener(config)(shard.url, staged.path, staged.damage)) as reader,
            whole(path) as file,
        ):
            self._copy(shard, reader, tar := TarWriter(file))
            tar.close()

    def _copy(self, shard: Shard, reader: Reader, tar: TarWriter) -> None:
        from d2m_hpc.worker.read.names import members_of

        left, names = Counter(self._lists[shard.stem]), dict[str, str]()
        image = members_of(self.source.config)["image"][0]
        wanted = frozenset(left)
        for sample in reader.index():
            if (key := sample.key) not in wanted:
                continue
            left[key] -= 1
            name = _name(key)
            if left[key] < 0 or names.setdefault(name, key) != key:
                what = f"several samples are {name!r} in a tar, as is one with the kept key {key!r}"
                raise D2MError(f"{masked(place_of(shard.url))}: {what}; give each a key of its own")
            for extension, (place, size) in sample.members.items():
                data = reader.latest(place, size)
                if extension == image and isinstance(place, pa.Buffer):  # one name for a column
                    extension = FORMATS[kind][0] if (kind := format_of(bytes(data))) else extension
                tar.add(f"{name}.{extension}", data)
        if left := +left:
            key = min(left)
            if there := self._lists[shard.stem].count(key) - left[key]:
                what = f"the lists have {key!r} {there + left[key]} times, and the shard {there}"
                raise D2MError(f"{masked(place_of(shard.url))}: {what}; name it once")
            what = f"{left.total()} kept samples are not there, such as {key!r}"
            advice = "since its outputs were made; see d2m-submit --recompute-changed"
            raise D2MError(f"{masked(place_of(shard.url))}: {what}; it has changed {advice}")

    def finish(self) -> None:
        """All files are of parts."""


def _name(key: str) -> str:
    """A sample's name in a tar, which leads to no place outside.

    A tar's key ends at the first dot, which names of files and keys in parquets may have.

    Example:
        >>> _name("../a.b/c.d")
        '__/a.b/c_d'
    """
    if "." not in key and key[:1] != "/":
        return key
    *folders, name = key.split("/")
    if folders and not folders[0]:
        folders[0] = "_"
    return "/".join([*("__" if part == ".." else part for part in folders), name.replace(".", "_")])


class TarWriter:
    """Writes members byte for byte as `tarfile` writes them, whose headers cost more than the copy
    of a picture."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._parts: list[bytes | memoryview] = []
        self._held = self._size = 0
        self._rest = b""
        self._block: object = None

    def add(self, name: str, data: bytes | memoryview) -> None:
        """Add a member; its bytes are held until later, but those of one block of a tar only."""
        if isinstance(data, memoryview) and data.obj is not self._block:
            self._write()
            self._block = data.obj
        header = self._rest + _header(name, len(data))
        self._rest = bytes(-len(data) % BLOCK)
        self._parts += (header, data)
        self._held += len(header) + len(data)
        if self._held >= HELD or len(self._parts) >= PARTS:
            self._write()

    def close(self) -> None:
        """Write the end of the archive."""
        size = self._size + self._held + len(self._rest) + 2 * BLOCK
        end = self._rest + bytes(2 * BLOCK + -size % tarfile.RECORDSIZE)
        self._parts.append(end)
        self._held += len(end)
        self._write()

    def _write(self) -> None:
        """Write what is held, without putting it together."""
        done = os.writev(self._file.fileno(), self._parts)
        left = memoryview(b"".join(self._parts) if done < self._held else b"")[done:]
        while left:  # of more than 2 GiB, or where the disk is full, as the next call tells
            left = left[os.write(self._file.fileno(), left) :]
        self._parts, self._held, self._size = [], 0, self._size + self._held


def _header(name: str, size: int) -> bytes:
    """A member's header as `tarfile` makes it, and by it where it is more than one block."""
    if len(name) > tarfile.LENGTH_NAME or not name.isascii() or size >= 1 << 33:
        return _info(name, size).tobuf(tarfile.PAX_FORMAT)
    text, digits = name.encode(), b"%011o" % size
    checksum = b"%06o\0 " % (_CHECKSUM + sum(text + digits))
    return _FIELDS.pack(text, _OWNER, digits, _TIME, checksum, _REST)


def _info(name: str, size: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    return info


_FIELDS = struct.Struct("100s24s11s13s8s356s")
"""A header: name, mode and owner, size, time, checksum, all else."""
_, _OWNER, _NO_SIZE, _TIME, _SUM, _REST = _FIELDS.unpack(_info("", 0).tobuf(tarfile.PAX_FORMAT))
_CHECKSUM = int(_SUM[:6], 8) - sum(_NO_SIZE)
"""The sum of a header's bytes without those of the name and of the size."""


def _read_lists(path: Path | None) -> dict[str, list[str]]:
    """Read the kept keys, by the shard's stem; raise `ConfigError` where that cannot be."""
    try:
        if path is None:
            raise ValueError("no file is named")
        with path.open(encoding="utf-8") as file:
            lines = [(x["shard"], x["keys"]) for x in map(json.loads, file)]
        for stem, keys in lines:
            if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
                raise ValueError(f"the keys of {stem!r} are no list of texts")
        if len(found := dict(lines)) < len(lines):
            [(stem, _)] = Counter(stem for stem, _ in lines).most_common(1)
            raise ValueError(f"the shard {stem!r} is on several lines")
    except (OSError, ValueError, LookupError, TypeError) as error:
        what = f"--lists: {path} cannot be read: {error}; valid is what `d2m select -o` writes"
        raise ConfigError("export", [f"{what} to a name in .jsonl"]) from None
    return found
