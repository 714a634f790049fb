"""A parquet on this node whose rows are samples: img2dataset's, or that of `datasets`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from d2m_hpc.config import Config
from d2m_hpc.errors import Rejected
from d2m_hpc.storage.files import regular
from d2m_hpc.storage.texts import safe, valid
from d2m_hpc.worker.read import refusal
from d2m_hpc.worker.read.columns import Columns, choose, is_bytes, is_wrapped, kinds_in
from d2m_hpc.worker.read.names import EXTENSIONS, Members, members_of
from d2m_hpc.worker.read.reader import Reader, Sample, Samples, Version

BUFFER = 1 << 20
"""Bytes that are read of a column at once: a row group may be larger than the memory."""
BATCH_BYTES, BATCH_ROWS = 8 << 20, 32
"""What is decoded at once, by the mean size of rows: few rows, as some may be far larger."""
WHOLE = 64 << 20
"""Bytes of a batch from which each row's own size is looked up."""
FAILED = "rows whose download failed are no samples: {}"
NO_BYTES = "images have a path and no bytes ({}); `datasets` embeds them by `embed_external_files`"
_Cells = list[tuple[str, pa.Array]]


class _Row(NamedTuple):
    """A row of a batch, without its images."""

    number: int
    cells: _Cells


class Parquet(Reader):
    """An open parquet; one thread reads its pages, any thread the values in memory."""

    def __init__(self, url: str, path: Path, config: Config) -> None:
        self._url, self._config = url, config
        self._raw = open(path, "rb", opener=regular)  # noqa: SIM115
        self.version = Version.of(self._raw)
        try:
            with _told(url):
                self._file = pq.ParquetFile(
                    self._raw,
                    pre_buffer=False,
                    buffer_size=BUFFER,
                    page_checksum_verification=True,
                )
        except BaseException:
            self.close()
            raise

    def index(self, needed: Members = EXTENSIONS) -> ParquetSamples:
        schema = self._file.schema_arrow
        if needed is EXTENSIONS:
            needed = {kind: EXTENSIONS[kind] for kind in kinds_in(schema, self._config)}
        try:
            columns = choose(schema, self._config, needed)
        except ValueError as error:
            raise refusal.unreadable(self._url, str(error)) from None
        return ParquetSamples(self._url, self._file, columns, members_of(self._config), needed)

    def read(self, place: Any, size: int) -> bytes:
        if isinstance(place, pa.Buffer):
            data: bytes = place.to_pybytes()
            return data
        try:
            values = {name: array[place.number].as_py() for name, array in place.cells}
            return json.dumps(values, default=str).encode()
        except (ValueError, ArithmeticError, RecursionError, pa.ArrowException) as error:
            raise Rejected(f"the row cannot be read: {safe(str(error), 100)}") from None

    def close(self) -> None:
        self._raw.close()


@contextmanager
def _told(url: str) -> Iterator[None]:
    """Turn Arrow's errors into `ShardError`."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, EOFError) as error:
        what = f"it is no whole parquet: {type(error).__name__}: {error}"
        raise refusal.unreadable(url, what) from None


class ParquetSamples(Samples):
    """Iterate, once, over a parquet's rows, a few of which are in memory.

    Args:
        members: the names of members by kind.
    """

    def __init__(
        self,
        url: str,
        file: pq.ParquetFile,
        columns: Columns,
        members: Members,
        needed: Members,
    ) -> None:
        super().__init__(needed)
        self._url, self._file, self._columns = url, file, columns
        self._plain = (columns.key, columns.image, columns.text, columns.status)
        self._names = {kind: names[0] for kind, names in members.items()}
        self._has_json = "json" in needed
        self._row = 0

    def __iter__(self) -> Iterator[Sample]:
        schema = self._file.schema_arrow
        kept = [n for n in schema.names if self._has_json and not is_bytes(schema.field(n).type)]
        texts = self._columns.others.values()
        wanted = [*dict.fromkeys([*filter(None, self._plain), *texts, *kept])]
        if not wanted:  # rows are counted by any column
            wanted = schema.names[:1]
        with _told(self._url):
            batches = self._file.iter_batches(self._rows(wanted), columns=wanted, use_threads=False)
        while True:
            with _told(self._url):
                if (batch := next(batches, None)) is None:
                    return
            yield from self._samples(batch, kept)

    def _rows(self, wanted: Sequence[str]) -> int:
        """The rows of a batch, by the mean size of the wanted columns' rows."""
        metadata = self._file.metadata
        size = 0
        for number in range(min(metadata.num_row_groups, 100)):
            group = metadata.row_group(number)
            columns = map(group.column, range(group.num_columns))
            sizes = (c.total_uncompressed_size for c in columns if _top(c) in wanted)
            size = max(size, sum(sizes) // max(1, group.num_rows))
        return max(1, min(BATCH_ROWS, BATCH_BYTES // max(1, size)))

    def _samples(self, batch: pa.RecordBatch, kept: Sequence[str]) -> Iterator[Sample]:
        key, image, text, status = (
            _plain(batch.column(name)) if name else None for name in self._plain
        )
        others = {raw: _plain(batch.column(n)) for raw, n in self._columns.others.items()}
        pictures, paths = _inside(image, "bytes"), _inside(image, "path")
        cells = [(n, _without_bytes(_plain(batch.column(n)))) for n in kept]
        share = batch.nbytes if self._has_json and batch.nbytes > WHOLE else 0
        for number in range(len(batch)):
            name = self._key(key, number)
            if status is not None and status[number].as_py() != "success":
                self.ledger.notes.add(FAILED, name)
                continue
            sample = Sample(name)
            self._put(sample, "image", pictures, number)
            self._put(sample, "text", text, number)
            for raw, values in others.items():
                self._put(sample, raw, values, number)
            if self._has_json:
                size = sum(a.slice(number, 1).nbytes for _, a in cells) if share else 0
                sample.members[self._names["json"]] = (_Row(number, cells), size)
            if (
                pictures is not None
                and paths is not None
                and paths[number].is_valid
                and not pictures[number].is_valid
            ):
                self.ledger.causes.add(NO_BYTES, name)
            self.count += 1
            yield sample

    def _put(self, sample: Sample, kind: str, values: pa.Array | None, number: int) -> None:
        if values is not None and (data := values[number].as_buffer()) is not None:
            sample.members[self._names[kind]] = (data, data.size)

    def _key(self, keys: pa.Array | None, number: int) -> str:
        """A row's key: the parquet's own, or the row's number."""
        self._row += 1
        if keys is not None and (value := keys[number]).is_valid:
            data = value.as_buffer() if hasattr(value, "as_buffer") else None
            text = data.to_pybytes().decode(errors="surrogateescape") if data else ""
            if data is None or text:
                return valid(text if data is not None else str(value.as_py()))
        return f"{self._row - 1:09d}"


def _top(column: Any) -> str:
    return str(column.path_in_schema.partition(".")[0])


def _plain(array: pa.Array) -> pa.Array:
    return array.dictionary_decode() if pa.types.is_dictionary(array.type) else array


def _inside(images: pa.Array | None, name: str) -> pa.Array | None:
    """The bytes or the paths of a column of images; None where it has no such."""
    if images is None or not is_wrapped(images.type):
        return images if name == "bytes" else None
    place = images.type.get_field_index(name)
    return images.flatten()[place] if place >= 0 else None


def _without_bytes(array: pa.Array) -> pa.Array:
    """A column of images without the images: their paths, or whatever else is beside the bytes."""
    if not is_wrapped(array.type):
        return array
    names = [array.type.field(i).name for i in range(array.type.num_fields)]
    beside = [(n, a) for n, a in zip(names, array.flatten(), strict=True) if n != "bytes"]
    if not beside:
        return pa.nulls(len(array))
    return pa.StructArray.from_arrays([a for _, a in beside], [n for n, _ in beside])
