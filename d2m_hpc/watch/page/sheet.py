"""A contact sheet: samples from the tars at the low, middle and high end of a score."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from d2m_hpc.config import Config
from d2m_hpc.config.texts import TextSource
from d2m_hpc.errors import ConfigError, D2MError, Rejected
from d2m_hpc.models import formats
from d2m_hpc.run.outputs import OutputDir
from d2m_hpc.run.pair import Pair
from d2m_hpc.run.records import Shard
from d2m_hpc.storage.urls import is_folder, is_local
from d2m_hpc.watch.page.columns import Column, kind_of, numbers

if TYPE_CHECKING:
    from d2m_hpc.worker.read.beside import Beside

SHARDS = 12
"""Shards with samples on the sheet; all headers of each tar are read."""
REMOTE_SHARDS = 2
REMOTE_BYTES = 512 << 20
"""The largest remote tar that is read, as it must be copied here whole."""
SIDE = 176
"""The longest side of a thumbnail, in pixels."""
CAPTION = 400
"""Characters of a caption that are shown."""
ENDS = ("lowest", "middle", "highest")


@dataclass
class Picked:
    """One sample of the sheet.

    Attributes:
        row: its number in its parquet.
        texts: further texts, by their names in `text_from`.
        values: further columns, by name.
        picture: a JPEG as a data URL; empty where `fault` gives a reason.
    """

    stem: str
    key: str
    value: float
    caption: str = ""
    picture: str = ""
    fault: str = ""
    row: int = 0
    texts: dict[str, str] = field(default_factory=dict)
    values: dict[str, str] = field(default_factory=dict)


@dataclass
class Sheet:
    """Samples by end of the score, with notes.

    Attributes:
        shards: the number of shards that were read.
        notes: why other shards were not.
    """

    score: str = ""
    ends: dict[str, list[Picked]] = field(default_factory=dict)
    shards: int = 0
    notes: list[str] = field(default_factory=list)


def choose_score(columns: Sequence[Column], asked: str | None, preferred: Iterable[str]) -> str:
    """Choose the column to sort by; empty where there is none.

    Args:
        asked: the user's choice.
        preferred: names of scores, of which the first number is the default.

    Raises:
        ConfigError: the user's choice cannot be sorted by.
    """
    valid = [c.name for c in columns if c.kind in ("number", "list", "text") and c.rows]
    if asked is not None:
        if asked not in valid:
            names = ", ".join(valid) or "none, as no shard is done"
            raise ConfigError("--score", [f"no column {asked!r} to sort by; valid are: {names}"])
        return asked
    scores = {c.name for c in columns if c.kind == "number" and c.rows}
    return next((n for n in preferred if n in scores), "")


def make(
    output: OutputDir, shards: Sequence[Shard], score: str, each: int, config: Config
) -> Sheet:
    """Choose samples, and read them from their tars.

    Args:
        shards: finished shards; samples come from cheap ones.
        each: the number of samples at each end.
        config: says which members are pictures and captions; larger pictures are not decoded.
    """
    near, notes = within_reach(shards)
    sheet = Sheet(score, shards=len(near), notes=notes)
    rows = _rows(output, near, score, notes)
    sheet.ends = _pick(rows, each)
    by_shard = {s.stem: s for s in near}
    wanted: dict[str, list[Picked]] = {}
    for sample in (s for samples in sheet.ends.values() for s in samples):
        wanted.setdefault(sample.stem, []).append(sample)
    for stem, samples in wanted.items():
        fill(by_shard[stem], samples, config)
    return sheet


def within_reach(shards: Sequence[Shard]) -> tuple[list[Shard], list[str]]:
    """The shards that are cheap to read, or a note that none is."""
    local = [s for s in shards if is_local(s.url) or is_folder(s.url)][:SHARDS]
    remote = [s for s in shards if s not in local and (s.size or 0) <= REMOTE_BYTES]
    near = local or remote[:REMOTE_SHARDS]
    if near or not shards:
        return near, []
    return [], [f"The tars are remote, and of more than {REMOTE_BYTES >> 20} MiB: none was read."]


def _rows(output: OutputDir, shards: Iterable[Shard], score: str, notes: list[str]) -> list[Picked]:
    """All rows of some shards with the score, the lowest first."""
    found = []
    for shard in shards:
        try:
            table = Pair(output, shard.stem).table(["key", score])
        except Exception as error:  # each store raises errors of its own
            notes.append(f"{shard.stem} could not be read: {type(error).__name__}: {error}")
            continue
        found += _scored(shard.stem, table, score)
    return sorted(found, key=lambda row: row.value)


def _scored(stem: str, table: pa.Table, score: str) -> list[Picked]:
    if score not in table.column_names:  # an older shard lacks it
        return []
    table = table.filter(table[score].is_valid())
    values = numbers(table[score], kind_of(table.schema.field(score).type))
    if values is None:
        return []
    pairs = zip(table["key"].to_pylist(), values.tolist(), strict=True)
    return [Picked(stem, key, value) for key, value in pairs if np.isfinite(value)]


def _pick(rows: Sequence[Picked], each: int) -> dict[str, list[Picked]]:
    """Samples at each end and in the middle, none twice."""
    each = min(each, len(rows) // 3)
    middle = (len(rows) - each) // 2
    spans = (rows[:each], rows[middle : middle + each], rows[len(rows) - each :])
    return {end: list(span) for end, span in zip(ENDS, spans, strict=True)}


def fill(shard: Shard, samples: Sequence[Picked], config: Config) -> None:
    """Read captions and pictures from a tar; `fault` gives the reason for a missing picture."""
    from d2m_hpc.worker.read.scratch import scratch
    from d2m_hpc.worker.read.stage import stage

    try:
        with scratch(REMOTE_BYTES) as room, stage(shard, room) as staged:
            found = _members(shard.url, staged.path, {s.key for s in samples}, config)
    except (OSError, D2MError) as error:
        found, fault = {}, f"the tar cannot be read: {error}"
    else:
        fault = "is not in the tar any more"
    beside = _beside(shard.stem, config)
    for sample in samples:
        members = found.get(sample.key)
        if members is None:
            sample.fault = fault
            continue
        for kind, source in config.texts.items():
            text = _text(kind, source, sample.key, members, beside)[:CAPTION]
            if name := kind.partition(":")[2]:
                sample.texts[name] = text
            else:
                sample.caption = text
        _draw(sample, members.get("image"), config.max_image_pixels)


def _members(url: str, path: Path, keys: set[str], config: Config) -> dict[str, dict[str, bytes]]:
    """The pictures of some samples, and their texts or the JSON with the texts, by key and kind."""
    from d2m_hpc.worker.read.names import members_of, needed
    from d2m_hpc.worker.read.readers import opener

    names, found = members_of(config), {}
    wanted = ("image", *sorted(needed(config, config.texts)))
    with closing(opener(config)(url, path, "")) as archive:
        for sample in archive.index(
            {k: names[k] for k in wanted}
        ):  # also the whole samples before a cut
            if sample.key in keys and sample.key not in found:
                spans = sample.members
                there = {k: [spans[e] for e in names[k] if e in spans] for k in wanted}
                found[sample.key] = {
                    k: archive.read(*first[0]) for k, first in there.items() if first
                }
    return found


def _beside(stem: str, config: Config) -> dict[str, Beside]:
    """The texts in parquets beside a shard, by kind; none where they cannot be read."""
    from d2m_hpc.worker.read.beside import of_shard

    try:
        return of_shard({k: s for k, s in config.texts.items() if s.table}, stem)
    except (OSError, D2MError):
        return {}


def _text(
    kind: str,
    source: TextSource,
    key: str,
    members: Mapping[str, bytes],
    beside: Mapping[str, Beside],
) -> str:
    """A text of a sample; empty where there is none."""
    from d2m_hpc.worker.read import parse

    if source.members:
        return members.get(kind, b"")[: 4 * CAPTION].decode("utf-8-sig", "replace")
    try:
        has_json = source.field or source.by != "key"
        values = parse.json_object(members.get("json", b"")) if has_json else {}
        if source.field:
            return parse.text_in(values, source.field)
        return beside[kind].text(key, values) if kind in beside else ""
    except Rejected:
        return ""


def _draw(sample: Picked, data: bytes | None, max_pixels: int) -> None:
    if data is None:
        sample.fault = "has no picture"
        return
    try:
        sample.picture = thumbnail(data, max_pixels)
    except Exception as error:  # PIL's plugins raise many kinds of errors
        sample.fault = f"cannot be decoded: {str(error) or type(error).__name__}"


def thumbnail(data: bytes, max_pixels: int) -> str:
    """A picture of at most `SIDE` pixels a side, EXIF orientation ignored, as a data URL.

    Raises:
        TooLarge: it has more than `max_pixels` pixels.
        Exception: it cannot be decoded.
    """
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on odd metadata, and on large pictures below our limit
        with formats.opened(data, max_pixels) as opened:
            opened.draft("RGB", (2 * SIDE, 2 * SIDE))
            small = opened.convert("RGB")
    small.thumbnail((SIDE, SIDE))
    small.save(buffer, "JPEG", quality=75)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
