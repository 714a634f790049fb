"""Turn the members of one sample into the inputs of the models."""

from __future__ import annotations

import json
import os
import re
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from webdataset.tariterators import base_plus_ext

from d2m_hpc.config import Config
from d2m_hpc.config.texts import TextSource
from d2m_hpc.errors import Rejected
from d2m_hpc.models import custom, formats
from d2m_hpc.models.inputs import Input, kind_of, told
from d2m_hpc.models.preprocessors import Options, Preprocessor
from d2m_hpc.run.records import Rejection
from d2m_hpc.storage.texts import safe
from d2m_hpc.worker.read import decode, parse
from d2m_hpc.worker.read.names import EXTENSIONS, Members, members_of
from d2m_hpc.worker.read.reader import Reader, Sample
from d2m_hpc.worker.read.readers import Opener, open_tar, opener
from d2m_hpc.worker.read.seen import Seen
from d2m_hpc.worker.rows import Tray

IN_FLIGHT = 2 << 30
"""Bytes that all decode threads together may take for pictures: for 19 JPEGs of 12 megapixels at
once, whatever the number of threads. A larger picture is decoded alone."""
LARGE = 16 << 20
"""A member from this size on is read while no other thread decodes."""
LARGEST = {"text": 64 << 20, "json": 64 << 20}
"""Bytes that a member may have; parsing takes ten times as much. Pictures: `formats.granted`."""
WHOLE = 4 << 20
"""Bytes from which an input counts as a whole picture; those that models are made for take less."""
SHOWN = 5
"""Extensions that are named of a sample that lacks one."""


class Budget:
    """Bounds the amount that threads hold together; first come, first served.

    Args:
        most: the bound; a thread that asks for more waits until no other holds any.
    """

    def __init__(self, most: int) -> None:
        self._most = self._free = most
        self._waiting: deque[object] = deque()
        self._changed = threading.Condition()

    def take(self, amount: int) -> int:
        """Wait for an amount; return the amount to give back."""
        amount = min(amount, self._most)
        with self._changed:
            if self._waiting or self._free < amount:
                me = object()
                self._waiting.append(me)
                self._changed.wait_for(lambda: self._waiting[0] is me and self._free >= amount)
                self._waiting.popleft()
                self._changed.notify_all()  # there may be enough for the next one, too
            self._free -= amount
        return amount

    def give(self, amount: int) -> None:
        with self._changed:
            self._free += amount
            if self._waiting:
                self._changed.notify_all()


class Held:
    """One sample's share of a budget, until the context ends.

    A sample that needs more gives its share back first: samples that each held some and waited for
    more could wait for ever.
    """

    def __init__(self, budget: Budget) -> None:
        self._budget, self._amount = budget, 0

    def __enter__(self) -> Held:
        return self

    def __exit__(self, *_: object) -> None:
        if self._amount:
            self._budget.give(self._amount)
            self._amount = 0

    def need(self, amount: int) -> None:
        """Wait until the sample may hold as much."""
        if amount > self._amount:
            self.__exit__()
            self._amount = self._budget.take(amount)


@dataclass(frozen=True)
class Recipe:
    """How to make samples ready.

    Attributes:
        inputs: each distinct (raw input, preprocessor) of the models.
        fields: keys of the samples' JSON that are carried over.
        strict: fail at the first rejection (`warn_and_continue: false`).
        asked: the additional fields, as the config names them.
        members: the names of members by kind.
        texts: where the texts that models take are, by raw input, unless they are members.
        open: opens a shard.
        caption: the field that DataComp's `text` comes from, where a sample has it.
        datacomp_keys: make `text` and `uid` as DataComp's tools need them, or reject the sample.
        budget: of bytes for pictures in decoding, for all threads together.
    """

    inputs: Mapping[Input, Preprocessor]
    fields: Sequence[str]
    options: Options
    batch_size: int
    threads: int
    allow_truncated: bool
    strict: bool
    datacomp_keys: bool = False
    budget: Budget = field(default_factory=lambda: Budget(IN_FLIGHT), compare=False)
    asked: Sequence[str] = ()
    members: Members = field(default_factory=lambda: EXTENSIONS)
    texts: Mapping[str, TextSource] = field(default_factory=dict)
    caption: str = "caption"
    open: Opener = open_tar

    @classmethod
    def of(cls, config: Config, inputs: Mapping[Input, Preprocessor]) -> Recipe:
        taken = {raw for raw, _ in inputs}
        return cls(
            inputs=inputs,
            fields=config.carried,
            options=Options(
                config.resize == "exact", config.max_image_pixels, config.decode == "scaled"
            ),
            batch_size=config.batch_size,
            threads=config.nworkers or len(os.sched_getaffinity(0)),
            allow_truncated=config.allow_truncated_shards,
            strict=not config.warn_and_continue,
            datacomp_keys=config.use_datacomp_keys,
            asked=[name for name, _ in config.asked_fields],
            members=members_of(config),
            texts={r: s for r, s in config.texts.items() if r in taken and not s.members},
            caption=config.text_field or "caption",
            open=opener(config, base_plus_ext),
        )

    @cached_property
    def needed(self) -> Members:
        """The kinds of members that a sample must have, and the members' names."""
        kinds = dict.fromkeys(raw for raw, _ in self.inputs if raw not in self.texts)
        if self.fields or any(s.field or s.by != "key" for s in self.texts.values()):
            kinds["json"] = None
        return {kind: self.members[kind] for kind in kinds}

    @cached_property
    def nested(self) -> list[str]:
        """The fields that may lie within others."""
        return [name for name in self.fields if "." in name]


@dataclass
class Ready:
    """A preprocessed sample.

    Attributes:
        tray: in which arrays of it lie.
    """

    key: str
    inputs: dict[Input, Any]
    fields: list[Any]
    tray: Tray | None = None

    @cached_property
    def bulk(self) -> int:
        """The bytes of pictures that custom preprocessors hand on as a whole."""
        sizes = map(_size, self.inputs.values())
        return sum(size for size in sizes if size >= WHOLE)


def _size(value: Any, depth: int = 2) -> int:
    """Bytes of a picture or an array, or of those in a tuple, list or dict."""
    if depth and isinstance(value, tuple | list | dict):
        parts = value.values() if isinstance(value, dict) else value
        return sum(_size(part, depth - 1) for part in parts)
    if isinstance(value, Image.Image):
        return value.width * value.height * 4
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()  # sparse ones have no `nbytes`
    if isinstance(value, bytes | bytearray):
        return len(value)
    return value.nbytes if isinstance(value, np.ndarray) else 0


def prepare(
    sample: Sample, archive: Reader, recipe: Recipe, seen: Seen | None = None
) -> Ready | Rejection:
    """Decode one sample once and run every distinct preprocessor on it once.

    Args:
        seen: notes the fields of the sample's JSON.
    """
    try:
        with Held(recipe.budget) as held:
            raw = {name: _raw(name, sample, archive, recipe, held) for name in recipe.needed}
            if seen is not None and "json" in raw:
                seen.add(sample.key, raw["json"], recipe.asked)
            for name, source in recipe.texts.items():
                raw[name] = _text(name, source, sample, archive, raw)
            inputs = {
                wanted: _preprocess(wanted, made, raw[wanted[0]], recipe.options)
                for wanted, made in recipe.inputs.items()
            }
            raw.pop("image", None)
        fields = {name: raw["json"].get(name) for name in recipe.fields}
        for name in recipe.nested:
            fields[name] = parse.field(raw["json"], name)
        if recipe.datacomp_keys:
            fields |= _datacomp_fields(raw["json"], sample, archive, recipe)
        for name, value in fields.items():
            _require_unicode(f"field {name!r}", value)
        return Ready(sample.key, inputs, list(fields.values()))
    except Rejected as reason:
        return Rejection(sample.key, str(reason))


def _text(
    name: str, source: TextSource, sample: Sample, archive: Reader, raw: Mapping[str, Any]
) -> str:
    """A text that is in no member."""
    values = raw.get("json", {})
    try:
        if source.field:
            return parse.text_in(values, source.field)
        return archive.beside[name].text(sample.key, values)
    except Rejected as reason:
        raise Rejected(f"{name}: {reason}" if name != "text" else str(reason)) from None


_UID = re.compile("[0-9a-f]{1,32}")


def _datacomp_fields(
    values: Mapping[str, Any], sample: Sample, archive: Reader, recipe: Recipe
) -> dict[str, str]:
    """`text`, and `uid` if asked for; rejects a sample without a caption or a usable uid.

    A null in either would stop every reader of the shard.
    """
    caption = parse.field(values, recipe.caption)
    if not isinstance(caption, str):
        caption = parse.text(_member("text", sample, archive, recipe.members["text"]))
    fields = {"text": caption.removeprefix(parse.MARK)}
    if "uid" in recipe.fields:
        fields["uid"] = _uid(values.get("uid"))
    return fields


def _uid(value: Any) -> str:
    """A uid as 32 lower-case hex digits; the resharder sorts by the texts."""
    digits = value.lower() if isinstance(value, str) else ""
    if not _UID.fullmatch(digits):
        raise Rejected(f"no usable uid: found {str(value)[:40]!r}, valid are up to 32 hex digits")
    return digits.zfill(32)


def _require_unicode(what: str, value: Any) -> None:
    """Reject lone surrogates, which odd names and JSON escapes may hold and a parquet may not."""
    if isinstance(value, str | list | dict):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise Rejected(f"{what} is not valid Unicode") from None


def _preprocess(wanted: Input, made: Preprocessor, value: Any, options: Options) -> Any:
    try:
        prepared = made.prepare(value, options)
    except Rejected:
        raise
    except Exception as error:  # a custom file's own code: one odd sample must not cost the shard
        reason = custom.described(error)
        raise Rejected(f"preprocessor {told(wanted[1])} raised {reason}") from error
    if prepared is None:
        raise Rejected(f"preprocessor {told(wanted[1])} returned None; is a `return` missing?")
    return prepared


def _raw(name: str, sample: Sample, archive: Reader, recipe: Recipe, held: Held) -> Any:
    max_pixels, names = recipe.options.max_pixels, recipe.needed[name]
    data = _member(name, sample, archive, names, max_pixels, held.need)
    if name == "image":
        return decode.image(data, max_pixels, held.need, recipe.options.scaled)
    return parse.json_object(data) if name == "json" else parse.text(data)


def _member(
    name: str,
    sample: Sample,
    archive: Reader,
    names: Sequence[str],
    max_pixels: int = 0,
    need: Callable[[int], None] = lambda size: None,
) -> bytes:
    """Read a member of a bounded size; one that is large waits until it may be held alone."""
    extension = next((e for e in names if e in sample.members), None)
    if extension is None:
        wanted = " or ".join(names[:4])
        raise Rejected(f"no {name} ({wanted}); it has {_described(sample)}")
    offset, size = sample.members[extension]
    if size > (most := LARGEST.get(kind_of(name)) or formats.granted(max_pixels)):
        raise Rejected(f"the {name} file has {size:,} bytes, over {most:,}")
    if size >= LARGE:
        need(IN_FLIGHT)
    return archive.read(offset, size)


def _described(sample: Sample) -> str:
    """A sample's extensions, and its links."""
    shown = ", ".join(safe(extension, 30) for extension in list(sample.members)[:SHOWN])
    others = len(sample.members) - SHOWN
    text = shown + (f" and {others} more" if others > 0 else "")
    if sample.links:
        text += f"; {safe(', '.join(sample.links), 30)} is a link, and links are not followed"
    return text
