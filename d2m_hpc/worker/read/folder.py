"""A folder of pictures: img2dataset's `files` format, or any pictures, with or without captions."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NoReturn

from d2m_hpc.config import Config
from d2m_hpc.run.slices import File, Slice, key_of, version_of
from d2m_hpc.storage.texts import valid
from d2m_hpc.worker.read import captions, refusal
from d2m_hpc.worker.read.columns import TEXTS
from d2m_hpc.worker.read.names import EXTENSIONS, Members, members_of
from d2m_hpc.worker.read.reader import Reader, Sample, Samples, Version

TWICE = "further captions of a picture are not read: {}"
SAME = "another file of its sample has this extension in other letters"


class PictureFolder(Reader):
    """The samples of a folder between two keys; links in it are not followed."""

    def __init__(self, url: str, config: Config) -> None:
        self._config, self._slice = config, Slice.of(url)
        self._names = members_of(config)
        self._where = self._slice.folder
        try:
            files = self._slice.files()
            self._fd = os.open(self._where, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise refusal.unreadable(
                self._where, f"it cannot be listed: {error.strerror}"
            ) from None
        self.version = Version(*version_of(files))
        self._files = self._by_key(files)

    def _by_key(self, files: Sequence[File]) -> dict[str, list[tuple[str, File]]]:
        """The files of each key with a picture, with their extensions."""
        known = {name for names in self._names.values() for name in names}
        found: dict[str, list[tuple[str, File]]] = {}
        for file in files:
            key, extension = key_of(file.name, known)
            if self._slice.first <= key <= self._slice.last:
                found.setdefault(key, []).append((extension, file))
        pictures = {*self._names["image"]}
        return {k: found[k] for k in sorted(found) if pictures & {e for e, _ in found[k]}}

    def index(self, needed: Members = EXTENSIONS) -> PictureSamples:
        if not self._files:
            self._refuse("none of the shard's pictures is there any more")
        return PictureSamples(self._files, self._rows, self._names, needed)

    @cached_property
    def _rows(self) -> Mapping[str, list[dict[str, Any]]]:
        """The captions file's rows, by picture."""
        if not self._config.captions:
            return {}
        names = {file.name for files in self._files.values() for _, file in files}
        return captions.rows(self._config.captions, self._where, names)

    def read(self, place: Any, size: int) -> bytes:
        if isinstance(place, bytes):
            return place
        try:
            # By the folder's descriptor and without links, whatever the folder became meanwhile.
            fd = os.open(place, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=self._fd)
            with open(fd, "rb") as file:
                data = file.read(size)
        except OSError as error:
            self._refuse(f"{place!r} cannot be read: {error.strerror or error}")
        if len(data) < size:
            self._refuse(f"{place!r} changed while the shard was read")
        return data

    def _refuse(self, what: str) -> NoReturn:
        raise refusal.unreadable(self._where, what) from None

    def close(self) -> None:
        os.close(self._fd)


class PictureSamples(Samples):
    """Iterate, once, over the samples of a folder in the order of their keys.

    Args:
        files: the files of each key, with their extensions.
        rows: the captions file's rows, by picture.
        members: the names of members by kind.
    """

    def __init__(
        self,
        files: Mapping[str, list[tuple[str, File]]],
        rows: Mapping[str, list[dict[str, Any]]],
        members: Members,
        needed: Members,
    ) -> None:
        super().__init__(needed)
        self._files, self._rows, self._members = files, rows, members

    def __iter__(self) -> Iterator[Sample]:
        for key, files in self._files.items():
            sample = Sample(valid(key))
            for extension, file in files:
                if file.size < 0:
                    self.ledger.takes(file.name, sample.key, extension, is_file=False)
                elif extension in sample.members:
                    self.ledger.stray(valid(file.name), SAME)
                else:
                    sample.members[extension] = (file.name, file.size)
                if rows := self._rows.get(file.name):
                    self._caption(sample, rows, file.name)
            if sample.members:  # the ledger has a sample of links alone
                sample.links = self.ledger.settle(sample.key, sample.members, again=False)
                self.count += 1
                yield sample
        self.ledger.finish(self.count)

    def _caption(self, sample: Sample, rows: Sequence[dict[str, Any]], name: str) -> None:
        """Take a row of the captions file as the sample's JSON and text."""
        for _ in rows[1:]:
            self.ledger.notes.add(TWICE, name)
        row = rows[0]
        data = json.dumps(row, default=str).encode()
        sample.members["json"] = (data, len(data))
        names = (*self._members["text"], *TEXTS)
        if text := next((row[n] for n in names if isinstance(row.get(n), str)), None):
            data = text.encode("utf-8", "surrogatepass")
            sample.members[self._members["text"][0]] = (data, len(data))
