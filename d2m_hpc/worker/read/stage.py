"""Bring a tar to this node: from a shared disk, an object store or a command, decompressed."""

from __future__ import annotations

import io
import os
import select
import signal
import socket
import subprocess
import tempfile
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from d2m_hpc.errors import NodeError, ShardError
from d2m_hpc.run.records import Shard
from d2m_hpc.storage import stores
from d2m_hpc.storage.files import regular
from d2m_hpc.storage.refused import of_system
from d2m_hpc.storage.urls import PIPE, is_folder, is_local, is_pipe
from d2m_hpc.worker.read.compressed import BROKEN, HEAD, MEMORY, Readable, codec_of, is_hungry
from d2m_hpc.worker.read.reader import Version
from d2m_hpc.worker.read.scratch import Copy, Scratch

STEP = 1 << 20
SAID = 2000
"""Bytes of a failed command's last words on record."""
SILENCE = 900.0
"""Seconds without a byte until a command counts as hung, before the watchdog ends the task."""
Blocks = Generator[bytes, None, None]


@dataclass
class Staged:
    """A local, uncompressed tar.

    Attributes:
        damage: the fault of the stream that it came from.
        copied: it lies in scratch.
        origin: the version of the copied file; for a tar from a store or a command, the planned
            size.
    """

    path: Path
    damage: str = ""
    copied: bool = True
    origin: Version = field(default_factory=Version)


@contextmanager
def stage(shard: Shard, scratch: Scratch) -> Iterator[Staged]:
    """Bring a shard to this node; a copy in scratch is deleted afterwards.

    Raises:
        ShardError: it cannot be had, is too large for scratch, or takes too much memory.
    """
    if is_folder(shard.url):
        yield Staged(Path(), copied=False)
        return
    if is_local(shard.url) and not _is_compressed(shard.url):
        yield Staged(Path(shard.url), copied=False)
        return
    with scratch.copy(f"{shard.stem}.tar") as copy:
        copy.reserve(shard.size or 0)
        staged = Staged(copy.path, origin=Version(shard.size or 0))
        staged.damage = _fetch(shard, copy, staged)
        yield staged


def _is_compressed(path: str) -> bool:
    try:
        with open(path, "rb", opener=regular) as file:
            return codec_of(file.read(HEAD)) is not None
    except OSError as error:
        raise ShardError(f"{path}: {error.strerror or error}") from None


def _fetch(shard: Shard, copy: Copy, staged: Staged) -> str:
    """Copy a tar to scratch, or raise `ShardError`; return the fault of its stream, if any."""
    with open(copy.path, "wb") as file, closing(_blocks(shard, staged)) as blocks:
        try:
            return _write(Stream(blocks), file, copy)
        except (ShardError, NodeError):
            raise
        except FileNotFoundError:
            raise ShardError(f"{shard.url}: no such file") from None
        except Exception as error:  # each store raises errors of its own
            where = f"{shard.url}, copied to {copy.path}"
            raise ShardError(f"{where}: {type(error).__name__}: {error}") from error


def _blocks(shard: Shard, staged: Staged) -> Blocks:
    """Yield a tar's bytes as they come."""
    if is_pipe(shard.url):
        return _said(shard.url.removeprefix(PIPE))
    if is_local(shard.url):  # fsspec would take `::` in a path for a chain of stores
        return _read(shard.url, staged)
    return stores.blocks(shard.url, shard.size)


def _read(path: str, staged: Staged) -> Blocks:
    with open(path, "rb", opener=regular) as file:
        staged.origin = Version.of(file)
        while block := file.read(STEP):
            yield block


def _said(command: str) -> Blocks:
    """Yield the output of the user's shell line; raise `ShardError` where it fails, or hangs."""
    shell = ["/bin/bash", "-o", "pipefail", "-c", command]
    with tempfile.TemporaryFile() as words:
        # The command has a session of its own, so that its children can be killed with it.
        process = subprocess.Popen(
            shell,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=words,
            start_new_session=True,
        )
        with process, _ending(process):
            assert process.stdout is not None
            yield from _patiently(process.stdout.fileno(), command)
            code = process.wait(SILENCE)
        if code:
            said = _last(words)
            raise ShardError(f"pipe:{command} ended with exit code {code}: {said}")


@contextmanager
def _ending(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Kill a command that still runs when the block ends, with its children."""
    try:
        yield
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def _patiently(pipe: int, command: str) -> Iterator[bytes]:
    """Yield a pipe's bytes; raise `ShardError` after `SILENCE` seconds without any."""
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    while poll.poll(1000 * SILENCE):
        if not (block := os.read(pipe, STEP)):
            return
        yield block
    raise ShardError(f"pipe:{command} gave nothing for {SILENCE:.0f} s and was killed")


def _last(words: BinaryIO) -> str:
    size = words.seek(0, os.SEEK_END)
    words.seek(max(0, size - SAID))
    said = words.read().decode(errors="replace").strip()
    # The first line may be cut, and hold a secret without its name.
    return said.partition("\n")[2] or said if size > SAID else said


def _write(stream: Stream, file: BinaryIO, copy: Copy) -> str:
    """Write a stream to a file, decompressed; return the fault that broke it off."""
    codec = codec_of(stream.head(HEAD))
    if codec is None:
        return _copy(stream, file, copy)
    with codec.open(stream) as plain:
        damage = _copy(plain, file, copy, stream)
    if is_hungry(damage):
        raise ShardError(
            f"{copy.path.name}: decompressing its {codec.name} stream takes more than "
            f"{MEMORY >> 20} MiB of memory; compress it with a smaller dictionary or window, as "
            f"{codec.name} does by itself"
        )
    if damage:
        damage = f"in the {codec.name} stream, after {file.tell()} bytes of tar: {damage}"
        stream.drain()
    return damage


def _copy(source: Readable, file: BinaryIO, copy: Copy, behind: Stream | None = None) -> str:
    """Copy a source to a file; return the damage of the compressed stream `behind` it, if any.

    Errors in reading the compressed stream itself are raised.
    """
    size = 0
    while True:
        try:
            block = source.read(STEP)
        except BROKEN as error:
            if behind is None or behind.failed:
                raise
            return str(error)
        if not block:
            return ""
        size += len(block)
        copy.reserve(size)
        _put(block, file, copy)


def _put(block: bytes, file: BinaryIO, copy: Copy) -> None:
    """Write a block; raise `NodeError` where this node's disk refuses, though it promised the
    room."""
    try:
        file.write(block)
        file.flush()
    except OSError as error:
        raise NodeError(f"{copy.path}, on {socket.gethostname()}: {of_system(error)}") from error


class Stream(io.RawIOBase):
    """Blocks as a file that can be read once.

    Attributes:
        failed: the source of the blocks has raised an error.
    """

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks = blocks
        self._rest = memoryview(b"")
        self.failed = False

    def readable(self) -> bool:
        return True

    def head(self, size: int) -> bytes:
        """The first bytes, which are read again afterwards; call it before any read."""
        head = b""
        while len(head) < size and (block := self._more()):
            head += block
        self._rest = memoryview(head)
        return head[:size]

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes, and none at the end."""
        rest = self._rest or memoryview(self._more())
        cut = len(rest) if size < 0 else size
        self._rest = rest[cut:]
        return bytes(rest[:cut])

    def _more(self) -> bytes:
        try:
            return next(self._blocks, b"")
        except BaseException:
            self.failed = True
            raise

    def drain(self) -> None:
        """Read to the end, as a command that cannot write on looks like one that fails."""
        while self.read():
            pass
