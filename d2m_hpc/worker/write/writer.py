"""Write outputs to an npz and a parquet, and commit them so that readers see both or none."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from d2m_hpc.errors import D2MError, DiskError, ShardError
from d2m_hpc.models.weights import sha256_of
from d2m_hpc.run.outputs import OutputDir
from d2m_hpc.run.pair import METADATA, Pair
from d2m_hpc.run.records import Record
from d2m_hpc.run.staging import STAGING, Staging, remove
from d2m_hpc.storage.files import durable, sync_path
from d2m_hpc.storage.refused import DISK, of_system
from d2m_hpc.storage.texts import escaped
from d2m_hpc.worker.write.extend import Derived, Rows

ROUNDS = 3
VERSIONED = ("d2m_hpc", "torch", "torchvision", "open_clip_torch", "timm", "transformers")


def versions() -> dict[str, str]:
    """Versions of the packages that compute values."""
    found = {}
    for name in VERSIONED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def write_pair(made: Rows, record: Record, folder: Path) -> tuple[Path | None, Path]:
    """Write both files to a folder, durably, read them back, and record their hashes.

    Returns:
        The npz, if there is a new one, and the parquet.

    Raises:
        ShardError: the files read back have other rows than were written.
    """
    npz, parquet = folder / f"{record.shard}.npz", folder / f"{record.shard}.parquet"
    if isinstance(made, Derived):
        record.npz_sha256 = made.before.npz_sha256
    else:
        with durable(npz) as file:
            np.savez(file, **made.features())  # type: ignore[arg-type]
        record.npz_sha256 = sha256_of(npz)
    rows = made.table()
    note = json.dumps({**escaped(record.to_dict()), "versions": versions()})
    noted = rows.replace_schema_metadata({METADATA: note})
    # With a CRC for every page, as an extension reads the values back.
    options = {"compression": "zstd", "write_page_checksum": True}
    with durable(parquet) as file, pq.ParquetWriter(file, noted.schema, **options) as writer:
        if noted.num_rows:  # Hugging Face's `datasets` fails on a row group without rows
            writer.write_table(noted)
    record.parquet_sha256 = sha256_of(parquet)
    has_npz = not isinstance(made, Derived)
    _check(folder, record, has_npz)
    return (npz if has_npz else None), parquet


def _check(folder: Path, record: Record, has_npz: bool) -> None:
    """Read the files back: a full or lying disk is found before anybody sees the files."""
    read: object
    pair = Pair(OutputDir(str(folder)), record.shard)
    try:
        read = sorted(pair.lengths() if has_npz else {len(pair.table())})
    except zipfile.BadZipFile as error:
        read = error
    if read != [record.rows]:
        raise ShardError(f"{folder}: read back {read}, wrote {record.rows} rows; is the disk full?")


class TakenOver(Exception):
    """Another task has taken the shard over, and writes its pair."""


class Committer:
    """The only writer into the output folder.

    Args:
        scratch: holds files before they are sent to an object store.
    """

    def __init__(self, output: OutputDir, scratch: Path) -> None:
        self.output = output
        # Beside the outputs, as a rename commits; readers of the outputs skip folders.
        beside = Path(output.root) if output.is_local else scratch
        self.staging = Staging(beside / STAGING)
        output.make()
        if output.is_local:  # `make` has probed a store
            output.probe()

    def commit(self, made: Rows, record: Record, held: Callable[[], bool] = lambda: True) -> None:
        """Publish a shard's pair: the npz first, the parquet last.

        A parquet in its place is a finished shard; until the end there is none, even where a pair
        is replaced.

        Args:
            held: whether this task still has the shard's lease; asked once the attempt's folder
                exists, as a task that takes the lease over moves that folder away.

        Raises:
            TakenOver: the lease is lost.
            ShardError: the values cannot be written, or the store refuses them.
            DiskError: the disk refuses.
        """
        try:
            folder = self.staging.make(record.shard, record.attempt)
            try:
                if not held():
                    raise TakenOver
                npz, parquet = write_pair(made, record, folder)
                if self.output.is_local:
                    self._rename(npz, parquet)
                else:
                    self._upload(npz, parquet, held)
            finally:
                with suppress(OSError):
                    remove(folder)
        except Exception as error:
            if not held():
                raise TakenOver from error
            if not isinstance(error, OSError):
                raise
            where = f"{self.output.url}: {record.shard} cannot be written"
            if error.errno in DISK:
                raise DiskError(f"{where}: {of_system(error)}") from error
            raise ShardError(f"{where}: {error}") from error

    def _rename(self, npz: Path | None, parquet: Path) -> None:
        """Commit by renames into and out of the attempt's folder, which fail once that is gone."""
        folder, earlier = Path(self.output.root), parquet.with_name("earlier")
        if npz is not None:
            with suppress(FileNotFoundError):
                os.rename(folder / parquet.name, earlier)
                sync_path(folder)
            os.replace(npz, folder / npz.name)
            sync_path(folder)
        os.replace(parquet, folder / parquet.name)
        sync_path(folder)

    def _upload(self, npz: Path | None, parquet: Path, held: Callable[[], bool]) -> None:
        """Commit to a store, which has no rename.

        The lease is checked before each step; where the store knows conditions, a put replaces no
        newer file.
        """
        removed = [parquet.name]
        for _ in range(ROUNDS):
            steps = [
                partial(self._remove, removed),
                *(partial(self.output.put, file) for file in (npz, parquet) if file),
            ]
            with suppress(FileExistsError):
                for step in steps:
                    if not held():
                        raise TakenOver
                    step()
                return
            # The file in the way is an older pair's, or this one's, whose answer was lost. The npz
            # goes first: a parquet that is there then is of a task that took the shard over.
            removed = [file.name for file in (npz, parquet) if file]
        raise OSError("another program writes it too")

    def _remove(self, names: Iterable[str]) -> None:
        for name in names:
            self.output.remove(name)

    def clean(self, stem: str, attempt: int) -> bool:
        """Stop earlier attempts at a shard from committing; return whether there were any.

        The caller holds the lease.

        Args:
            attempt: the caller's number; attempts with smaller ones are stopped.

        Raises:
            D2MError: an attempt could still commit.
        """
        try:
            return self.staging.fence(stem, attempt)
        except OSError as error:
            what = f"{self.staging.root}: files of an earlier attempt at {stem} cannot be removed"
            raise D2MError(f"{what}: {error}; remove it and run the same command again") from error

    def close(self) -> None:
        """Remove the staging folder if no task uses it."""
        self.staging.close()
