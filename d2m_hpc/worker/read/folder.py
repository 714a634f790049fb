"""A folder of pictures: img2dataset's `files` format, or any pictures, with or without captions."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from functools import cached_property
from typing import Any, NoReturn
from unicodedata import normalize

from d2m_hpc.config import Config
from d2m_hpc.run.slices import File, Slice, key_of, owner, version_of
from d2m_hpc.storage.texts import valid
from d2m_hpc.worker.read import captions, refusal
from d2m_hpc.worker.read.columns import TEXTS
from d2m_hpc.worker.read.members import LINKED_FILES, Ledger, Notes
from d2m_hpc.worker.read.names import EXTENSIONS, Members, members_of
from d2m_hpc.worker.read.reader import Reader, Sample, Samples, Version

TWICE = "further captions of a picture are not read: {}"
MISSING = "pictures have no row in the captions file: {}"
ABSENT = "rows of the captions file are on pictures that are not there: {}"
INSTEAD = "files are not read, as the captions file has a row of their picture: {}"
NAMELESS = "rows of the captions file have no `file_name`: {:,}"
NO_TEXTS = "rows of the captions file hold {} in place of a text: {{}}"
SPECIAL = "files are devices, pipes or sockets and are not read: {}"
SAME = "another file of its sample has this extension in other letters"


class PictureFolder(Reader):
    """The samples of a folder between two keys; links in it are not followed."""

    def __init__(self, url: str, config: Config) -> None:
        self._config, self._slice = config, Slice.of(url)
        self._names = members_of(config)
        self._where = self._slice.folder
        self._known = {name for names in self._names.values() for name in names}
        self._is_first, self._above, self._absent = True, "", Notes()
        try:
            if config.captions:
                there = os.stat(config.captions)
                self.texts = {config.captions: [there.st_size, there.st_mtime_ns]}
                files = self._slice.files(self._pass)
            else:
                files = self._slice.files()
            self._fd = os.open(self._where, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise refusal.unreadable(
                self._where, f"it cannot be listed: {error.strerror}"
            ) from None
        self.version = Version(*version_of(files))
        self._listed = {file.name for file in files}
        self._files = self._by_key(files)

    def _by_key(self, files: Sequence[File]) -> dict[str, list[tuple[str, File]]]:
        """The files of each key with a picture, with their extensions."""
        split = [(*key_of(file.name, self._known), file) for file in files]
        pictures = {key for key, extension, _ in split if extension in self._names["image"]}
        inside = [key for key in pictures if self._slice.first <= key <= self._slice.last]
        found: dict[str, list[tuple[str, File]]] = {key: [] for key in sorted(inside)}
        own = owner(pictures)
        for key, extension, file in sorted(split, key=lambda s: s[0] not in pictures):
            if (key := own(key)) in found:
                found[key].append((extension, file))
        return found

    def index(self, needed: Members = EXTENSIONS) -> PictureSamples:
        if not self._files:
            self._refuse("none of the shard's pictures is there any more")
        return PictureSamples(self._files, self._rows, self._names, needed, self._absent)

    @cached_property
    def _rows(self) -> Mapping[str, list[dict[str, Any]]] | None:
        """The captions file's rows, by picture, if there is such a file."""
        if not self._config.captions:
            return None
        names = {file.name for files in self._files.values() for _, file in files}
        path = self._config.captions
        # Names are sorted otherwise than keys: `a.jpg` comes after `a-b.jpg`, and `a` before `a-b`.
        stem = re.split(r"[\0-.]", self._above)[0] + "/" if self._above else chr(sys.maxunicode)
        span = ("" if self._is_first else self._slice.first, stem)
        wanted = captions.Wanted(path, self._where, names, self._listed, span, self._miss)
        found = captions.rows(path, wanted)
        if wanted.nameless and self._is_first:
            self._absent.add(NAMELESS.format(wanted.nameless), "")
        return found

    def _pass(self, name: str) -> None:
        """Note whether the folder has pictures before this shard's, and the first one behind."""
        key, extension = key_of(name, self._known)
        if extension in self._names["image"]:
            if key < self._slice.first:
                self._is_first = False
            elif key > self._slice.last:
                self._above = min(key, self._above or key)

    def _miss(self, name: str) -> None:
        """Count a picture that has a row and is not there, if it would lie in this shard, or
        between it and the next one."""
        key, extension = key_of(name, self._known)
        is_here = key >= self._slice.first or self._is_first
        is_here &= not self._above or key < self._above
        if is_here and extension in self._names["image"] and not self._has_another_form(name):
            self._absent.add(ABSENT, name)

    def _has_another_form(self, name: str) -> bool:
        """Whether the name, in any form of its letters, is there in another shard."""
        if name.isascii():
            return False
        forms = (os.path.join(self._where, normalize(form, name)) for form in ("NFC", "NFD"))
        return any(map(os.path.lexists, forms))

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
        rows: the captions file's rows, by picture, if there is such a file.
        members: the names of members by kind.
        absent: notes on rows of no picture.
    """

    def __init__(
        self,
        files: Mapping[str, list[tuple[str, File]]],
        rows: Mapping[str, list[dict[str, Any]]] | None,
        members: Members,
        needed: Members,
        absent: Notes,
    ) -> None:
        super().__init__(needed)
        self.ledger = Ledger(needed, LINKED_FILES)
        self.ledger.notes = deepcopy(absent)
        self._files, self._rows, self._members = files, rows, members
        self._takes_text = "text" in needed

    def __iter__(self) -> Iterator[Sample]:
        for key, files in self._files.items():
            sample, special = Sample(valid(key)), ""
            for extension, file in files:
                if file.size < -1:
                    special = file.name
                    self.ledger.causes.add(SPECIAL, special)
                elif file.size < 0:
                    self.ledger.takes(file.name, sample.key, extension, is_file=False)
                elif extension in sample.members:
                    self.ledger.stray(valid(file.name), SAME)
                else:
                    sample.members[extension] = (file.name, file.size)
            if self._rows is not None:
                self._caption(sample, files, self._rows)
            if special and not sample.members:
                self.ledger.stray(valid(special), "a device, a pipe or a socket")
            if sample.members:  # the ledger has a sample of links alone
                sample.links = self.ledger.settle(sample.key, sample.members, again=False)
                self.count += 1
                yield sample
        self.ledger.finish(self.count)

    def _caption(
        self,
        sample: Sample,
        files: Sequence[tuple[str, File]],
        rows: Mapping[str, list[dict[str, Any]]],
    ) -> None:
        """Take the captions file's row on a sample's picture as its JSON and text."""
        kinds = self._members["image"]
        names = [file.name for kind in kinds for e, file in files if e == kind]
        if not (name := next((name for name in names if name in rows), "")):
            self.ledger.causes.add(MISSING, names[0])
            return
        row, *others = rows[name]
        for _ in others:
            self.ledger.notes.add(TWICE, name)
        fields = {n: value for n, value in row.items() if not isinstance(value, bytes)}
        found = {"json": json.dumps(fields, default=str).encode()}
        there = [row[n] for n in (*self._members["text"], *TEXTS) if row.get(n) is not None]
        if text := next((value for value in there if isinstance(value, str)), None):
            found[self._members["text"][0]] = text.encode("utf-8", "surrogatepass")
        elif text is None and there and self._takes_text:
            self.ledger.causes.add(NO_TEXTS.format(type(there[0]).__name__), name)
        for extension, data in found.items():
            if extension in sample.members:
                self.ledger.notes.add(INSTEAD, f"{sample.key}.{extension}")
            sample.members[extension] = (data, len(data))
