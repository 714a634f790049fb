"""Choose the reader of a shard: for tars, parquets and folders."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from d2m_hpc.config import Config
from d2m_hpc.storage.files import regular
from d2m_hpc.storage.urls import is_folder
from d2m_hpc.worker.read import names, refusal
from d2m_hpc.worker.read.folder import PictureFolder
from d2m_hpc.worker.read.names import Split
from d2m_hpc.worker.read.parquet import Parquet
from d2m_hpc.worker.read.reader import Reader
from d2m_hpc.worker.read.shard import Archive

READERS: dict[bytes, Callable[[str, Path, Config], Reader]] = {b"PAR1": Parquet}
"""Readers of files that are no tars, by the files' first bytes."""
Opener = Callable[[str, Path, str], Reader]
"""Opens a shard, given its URL, its file on this node, and the fault of the stream to there."""


def open_tar(
    url: str, path: Path, damage: str, split: Split = names.split, wrong: str = "no tar"
) -> Reader:
    """Open a tar; raise `ShardError` for any other file, which says what is wrong with it."""
    archive = Archive(path, damage, split)
    if not damage and (what := archive.nature()):
        archive.close()
        raise refusal.no_shard(url, wrong, what)
    return archive


def opener(config: Config, split: Split = names.split) -> Opener:
    """The function that opens a config's shards: `input_tars` are tars, `inputs` of any form.

    Args:
        split: splits the names of tars' members.
    """

    def open_any(url: str, path: Path, damage: str) -> Reader:
        if is_folder(url):
            return PictureFolder(url, config)
        with open(path, "rb", opener=regular) as file:
            head = file.read(max(map(len, READERS)))
        found = next((r for magic, r in READERS.items() if head.startswith(magic)), None)
        if found:
            return found(url, path, config)
        return open_tar(url, path, damage, split, "neither a tar nor a parquet")

    return open_any if config.inputs else partial(open_tar, split=split)
