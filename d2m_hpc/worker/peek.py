"""Look at other shards of a run: at their JSON, or at their pairs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from d2m_hpc.config import Config
from d2m_hpc.config.places import Mistake
from d2m_hpc.errors import ConfigError, Rejected
from d2m_hpc.models.types import is_field_type
from d2m_hpc.run import values
from d2m_hpc.run.folder import RunDir
from d2m_hpc.run.outputs import OutputDir
from d2m_hpc.run.pair import METADATA, Pair
from d2m_hpc.run.schema import Schema, untold
from d2m_hpc.run.shards import read_stems
from d2m_hpc.run.slices import place_of
from d2m_hpc.storage.texts import safe
from d2m_hpc.storage.urls import is_folder, is_local
from d2m_hpc.worker.compute.resolve import Toolbox
from d2m_hpc.worker.read import parse
from d2m_hpc.worker.read.names import EXTENSIONS
from d2m_hpc.worker.read.reader import Reader
from d2m_hpc.worker.read.readers import Opener, open_tar, opener
from d2m_hpc.worker.read.seen import Seen

SHARDS = 16
SAMPLES = 64
"""Samples that are read in each of a run's first shards."""


class Peek:
    """A run's first tars on a disk, and the pairs of earlier tasks."""

    def __init__(self, run: RunDir, output: OutputDir, opened: Opener = open_tar) -> None:
        self._run, self._output, self._opened = run, output, opened

    @cached_property
    def _shards(self) -> list[str]:
        with pq.ParquetFile(self._run.shards) as plan:
            first = next(plan.iter_batches(batch_size=SHARDS, columns=["url"]), None)
        urls = first["url"].to_pylist() if first is not None else []
        return [url for url in urls if is_local(url) or is_folder(url)]

    @cached_property
    def _some(self) -> list[list[dict[str, Any]]]:
        """The JSON of each tar's first samples."""
        return [
            [values for _, values in islice(_samples(tar, self._opened), SAMPLES)]
            for tar in self._shards
        ]

    def values(self, name: str) -> Iterator[Sequence[Any]]:
        """Yield each shard's values of a field."""
        for samples in self._some:
            yield [parse.field(sample, name) for sample in samples]

    def kept(self, name: str) -> str:
        """A field's type in finished pairs; empty where none tells it."""
        for parquet in self._parquets:
            schema = parquet.schema.to_arrow_schema()
            if name not in schema.names:
                continue
            kind = values.name_of(schema.field(name).type)
            if not is_field_type(kind):
                continue
            if kind != "string" or not _is_null(parquet, name):
                return kind
        return ""

    @cached_property
    def _parquets(self) -> list[pq.FileMetaData]:
        """Metadata of this run's parquets; other programs' may lie beside them."""
        stems = self._output.stems() if self._output.is_local else set()
        mine = (stem for stem in read_stems(self._run.shards) if stem in stems)
        return [*islice(filter(None, map(self._metadata, mine)), SHARDS)]

    def _metadata(self, stem: str) -> pq.FileMetaData | None:
        """None for another program's parquet, or a damaged one, which other checks report."""
        with suppress(OSError, ValueError):
            found = Pair(self._output, stem).metadata()
            return found if METADATA in (found.metadata or {}) else None
        return None

    def require(self, named: Mapping[str, str], schema: Schema) -> None:
        """Look for each field in the run's first shard that has samples with JSON.

        Args:
            named: as `require_fields` takes them.

        Raises:
            ConfigError: no sample of that shard has one of them.
        """
        for url in self._shards:
            if require_fields(_samples(url, self._opened), url, named, schema):
                return


def required(config: Config, toolbox: Toolbox) -> dict[str, str]:
    """The fields that a run's first shard must have, and the key of the config that names each."""
    if config.allow_missing_fields:
        return {}
    taken = {raw for spec in toolbox.specs.values() for raw in spec.raw_inputs}
    texts = {text.field for raw, text in config.texts.items() if text.field and raw in taken}
    named = dict.fromkeys(texts, "text_from")
    named |= {name: "additional_fields" for name, _ in config.asked_fields}
    return {name: key for name, key in named.items() if name != "key"}


def require_fields(
    samples: Iterable[tuple[str, dict[str, Any]]],
    tar: str,
    named: Mapping[str, str],
    schema: Schema,
) -> bool:
    """Look for each field that no shard of a run has shown so far; whether samples have JSON.

    Args:
        named: as `required` gives them.

    Raises:
        ConfigError: no sample has one of them.
    """
    wanted = [name for name in named if not schema.is_seen(name)]
    if not wanted:
        return True
    seen = Seen()
    for key, sample in samples:
        seen.add(key, sample, wanted)
        if len(seen.present) == len(wanted):
            break
    for name in seen.present:
        schema.mark_seen(name)
    if missing := [name for name in seen.missing(wanted) if not schema.is_seen(name)]:
        where = f"{safe(place_of(tar))}, the run's first shard with samples,"
        advice = "`allow_missing_fields: true` goes on without"
        told = []
        for name in missing:
            listed = name if named[name] == "additional_fields" else None
            told.append(Mistake((named[name],), f"{seen.told(name, where)}; {advice}", listed))
        raise ConfigError(str(schema.run.config) if schema.run else "config", told)
    return seen.samples > 0


def schema_of(
    run: RunDir,
    config: Config,
    named: Mapping[str, str],
    output: OutputDir,
    toolbox: Toolbox,
    version: str,
) -> Schema:
    """The types of a run's outputs, for one of its tasks.

    Args:
        named: as `required` gives them.
        version: of the custom code.

    Raises:
        ConfigError: the run's first shard lacks a field.
    """
    peek = Peek(run, output, opener(config))
    schema = Schema(
        fields=config.field_types,
        columns=toolbox.types,
        shapes=toolbox.shapes,
        version=version,
        run=run,
        ahead=peek.values,
        kept=untold if config.reprocess else peek.kept,
    )
    peek.require(named, schema)
    return schema


def _samples(url: str, opened: Opener) -> Iterator[tuple[str, dict[str, Any]]]:
    """Keys and JSON of a tar's samples, as far as the tar can be read; errors are silent here."""
    try:
        with closing(opened(url, Path(url), "")) as archive:
            yield from json_of(archive)
    except Exception:  # the task that reads the whole tar reports its faults
        return


def json_of(archive: Reader) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the key and the JSON of each sample that has one."""
    for sample in archive.index({"json": EXTENSIONS["json"]}):
        if place := sample.members.get("json"):
            with suppress(Rejected):
                yield sample.key, parse.json_object(archive.read(*place))


def _is_null(parquet: pq.FileMetaData, name: str) -> bool:
    """Whether a column has no value, by the footer."""
    column = next(i for i in range(parquet.num_columns) if parquet.schema.column(i).path == name)
    found = [parquet.row_group(i).column(column) for i in range(parquet.num_row_groups)]
    return all(c.statistics and c.statistics.null_count == c.num_values for c in found)
