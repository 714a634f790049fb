"""The layouts of exports: arrays, the folders of clip-retrieval, a data set of Hugging Face."""

from __future__ import annotations

import os
import re
import shutil
from base64 import b64encode
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from importlib.metadata import version
from importlib.util import find_spec
from itertools import chain, takewhile
from pathlib import Path
from threading import Lock
from typing import IO, TYPE_CHECKING, Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from numpy.typing import NDArray

from d2m_hpc.config import Config
from d2m_hpc.errors import ConfigError
from d2m_hpc.models.entries import with_paths
from d2m_hpc.run.folder import RunDir
from d2m_hpc.storage import files
from d2m_hpc.storage.texts import fit
from d2m_hpc.storage.urls import masked_all
from d2m_hpc.subsets import exports
from d2m_hpc.subsets.exports import (
    ExportLayout,
    ExportPart,
    ExportSource,
    Vectors,
    begin_npy,
    whole,
)
from d2m_hpc.subsets.tars import SubsetTars
from d2m_hpc.version import __version__

if TYPE_CHECKING:
    from lance.fragment import FragmentMetadata

IMAGE, TEXT = ("-image", "_img"), ("-text", "_txt")
"""How the names of features of images and of texts end, also with DataComp's keys."""
LANCE = "2.0"
"""The format of lance's files, which is written in half of the time that 2.1 and 2.2 take, and read
by all versions of lance that are allowed here."""
POLARS = (2, 1)
"""The first version of polars that was seen to be faster than Arrow here; 1.36 is not."""
GROUP_ROWS, GROUP_BYTES = 10_000, 16 << 20
"""The most rows of a row group of `hf`, and its bytes as far as a part's first shard tells."""


class Arrays(ExportLayout):
    """`FEATURE.npy`, one array a feature that numpy maps; `columns/` has the same rows."""

    kind = "npy"

    def files(self, part: ExportPart) -> list[Path]:
        columns = self.root / "columns" / f"{part.name}.parquet"
        return [columns, *map(self._unfinished, self.source.vectors)]

    def last(self) -> list[Path]:
        return [self.root / f"{v.file}.npy" for v in self.source.vectors] + [self._index]

    @property
    def _index(self) -> Path:
        return self.root / "shards.parquet"

    def _unfinished(self, vectors: Vectors) -> Path:
        return self.root / f".{vectors.file}.npy.part"

    def there(self, known: Collection[str], complete: bool) -> set[str]:
        columns = [self.files(part)[0] for part in self.parts]
        if complete and all(path.exists() for path in [*columns, *self.last()]):
            return {part.digest for part in self.parts}
        there = super().there(known, complete)
        for vectors in () if there else self.source.vectors:
            self._unfinished(vectors).unlink(missing_ok=True)
        return there

    def write(self, part: ExportPart) -> None:
        with ExitStack() as stack:
            arrays = [(v, stack.enter_context(self._at(v, part))) for v in self.source.vectors]
            _parquet(self.files(part)[0], self.source.schema, self.source.copy(part, arrays))

    @contextmanager
    def _at(self, vectors: Vectors, part: ExportPart) -> Iterator[IO[bytes]]:
        """Open an array's file at the part's first row; make the file if it is missing."""
        path = self._unfinished(vectors)
        with files.named(path), open(os.open(path, os.O_RDWR | os.O_CREAT, 0o664), "r+b") as file:
            begin_npy(file, vectors.dtype, (self.source.rows, *vectors.shape))
            start = file.tell()
            file.truncate(start + self.source.rows * vectors.bytes)
            file.seek(start + part.start * vectors.bytes)
            yield file
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> None:
        for vectors, path in zip(self.source.vectors, self.last(), strict=False):
            if self._unfinished(vectors).exists():
                os.replace(self._unfinished(vectors), path)
        stems = [pair.stem for pair, _ in self.source.pairs]
        rows = np.array([rows for _, rows in self.source.pairs], np.int64)
        index = pa.table({"shard": stems, "start": rows.cumsum() - rows, "rows": rows})
        _parquet(self._index, index.schema, iter([index]))


class ClipRetrieval(ExportLayout):
    """`img_emb/`, `text_emb/` and `metadata/`, as clip-retrieval's inference writes them."""

    kind = "clip-retrieval"

    def __init__(self, source: ExportSource, folder: Path, image: str, text: str) -> None:
        super().__init__(source, folder)
        self._folders = {"img_emb": image, "text_emb": text}
        caption = "caption" if "caption" in source.schema.names else "text"
        self._renamed = {"key": "image_path", caption: "caption"}

    def files(self, part: ExportPart) -> list[Path]:
        number = str(part.number).zfill(len(str(len(self.parts))))
        there = {v.name for v in self.source.vectors}
        arrays = {f: f"{f}_{number}.npy" for f, name in self._folders.items() if name in there}
        metadata = self.root / "metadata" / f"metadata_{number}.parquet"
        return [*(self.root / f / name for f, name in arrays.items()), metadata]

    def write(self, part: ExportPart) -> None:
        *paths, metadata = self.files(part)
        known = {v.name: v for v in self.source.vectors}
        asked = [known[name] for name in self._folders.values() if name in known]
        with ExitStack() as stack:
            arrays = [(v, stack.enter_context(whole(p))) for v, p in zip(asked, paths, strict=True)]
            for vectors, file in arrays:
                begin_npy(file, vectors.dtype, (part.rows, *vectors.shape))
            kinds = self._named(self.source.schema)
            copied = self.source.copy(part, arrays)
            _parquet(metadata, kinds, (table.rename_columns(kinds.names) for table in copied))

    def finish(self) -> None:
        """All files are of parts."""

    def _named(self, schema: pa.Schema) -> pa.Schema:
        """The names that clip-retrieval knows; a column that would take one of these keeps out."""
        new = [self._renamed.get(name, name) for name in schema.names]
        again = [f"{n}_2" if n in new[:i] else n for i, n in enumerate(new)]
        kinds = zip(again, schema.types, strict=True)
        return pa.schema([pa.field(name, kind) for name, kind in kinds])


class HuggingFace(ExportLayout):
    """`data/*.parquet`, all columns and features with one schema, and a card, `README.md`."""

    kind = "hf"

    def __init__(self, source: ExportSource, folder: Path) -> None:
        super().__init__(source, folder)
        names = {*source.schema.names}
        if both := [vectors.name for vectors in source.vectors if vectors.name in names]:
            what = f"--feature: {', '.join(map(repr, both))} is a column's name, too; name the "
            what += "other features, or submit with another name for the column"
            raise ConfigError("export", [what])

    def files(self, part: ExportPart) -> list[Path]:
        number = part.name
        return [self.root / "data" / f"train-{number}-of-{len(self.parts):05d}.parquet"]

    def last(self) -> list[Path]:
        return [self.root / "README.md"]

    @property
    def _schema(self) -> pa.Schema:
        kinds = [pa.field(v.name, _list_of(v)) for v in self.source.vectors]
        return pa.schema([*self.source.schema, *kinds])

    def write(self, part: ExportPart) -> None:
        [path] = self.files(part)
        if self.source.vectors and _has_polars() and all(map(_is_plain, self._schema.types)):
            with suppress(_GroupTooLarge), whole(path) as file:
                _sink(file, self._schema, self._tables(part))
                return
        _parquet(path, self._schema, self._tables(part))

    def _tables(self, part: ExportPart) -> Iterator[pa.Table]:
        """The columns and features of each shard."""
        for table, found in self.source.read(part):
            lists = [_as_lists(found[v.name], v) for v in self.source.vectors]
            yield pa.table([*table.columns, *lists], self._schema)

    def finish(self) -> None:
        with whole(self.root / "README.md") as file:
            file.write(self._card().encode())

    def _card(self) -> str:
        made, config = self.source, self.source.config
        about = {
            "size_categories": [_size(made.rows)],
            "configs": [
                {
                    "config_name": "default",
                    "data_files": [{"split": "train", "path": "data/*.parquet"}],
                }
            ],
        }
        named = [masked_all(with_paths(entry, lambda path: path.name)) for entry in config.models]
        models = yaml.safe_dump(named)
        told = [(fit(kind.name).replace("|", r"\|"), kind.type) for kind in self._schema]
        columns = "\n".join(f"| `{name}` | {kind} |" for name, kind in told)
        return (
            f"---\n{yaml.safe_dump(about, sort_keys=False)}---\n\n# Metadata of samples\n\n"
            f"{made.rows:,} samples of {len(made.pairs):,} shards, "
            f"computed by d2m_hpc {__version__} with these models:\n\n```yaml\n{models}```\n\n"
            f"| column | type |\n|---|---|\n{columns}\n"
        )


class Lance(HuggingFace):
    """`data.lance`, a data set of all columns and features; a version of it for each part."""

    kind = "lance"

    def __init__(self, source: ExportSource, folder: Path) -> None:
        if find_spec("lance") is None:
            what = "lance needs pylance, which is not installed; `pip install 'd2m_hpc[lance]'`"
            raise ConfigError("export", [what])
        super().__init__(source, folder)
        self._begins = Lock()
        self._written: dict[int, list[FragmentMetadata]] = {}

    @property
    def _place(self) -> Path:
        return self.root / "data.lance"

    @property
    def _data(self) -> Path:
        return self._place / "data"

    def files(self, part: ExportPart) -> list[Path]:
        return []

    def last(self) -> list[Path]:
        return []

    def there(self, known: Collection[str], complete: bool) -> set[str]:
        """The first parts, if the data set has these alone; otherwise none, and it is removed."""
        import lance

        there = [*takewhile(lambda part: part.digest in known, self.parts)]
        if self._place.exists():
            with suppress(OSError, ValueError):  # a kill before its first version
                found = lance.dataset(self._place)
                if there and found.count_rows() == sum(part.rows for part in there):
                    if not complete:  # a kill leaves files that are of no part
                        found.cleanup_old_versions(timedelta(0), delete_unverified=True)
                    return {part.digest for part in there}
            shutil.rmtree(self._place)
        return set()

    def write(self, part: ExportPart) -> None:
        import lance
        from lance.fragment import write_fragments

        batches = (batch for table in self._tables(part) for batch in table.to_batches())
        reader = pa.RecordBatchReader.from_batches(self._schema, batches)
        with self._told():
            with self._begins:
                if not self._place.exists():
                    empty = self._schema.empty_table()
                    lance.write_dataset(empty, self._place, data_storage_version=LANCE)
            self._written[part.number] = written = write_fragments(reader, str(self._place))
        for file in (file for fragment in written for file in fragment.files):
            files.sync_path(self._data / file.path)
        files.sync_path(self._data)

    def growing(self) -> Iterable[Path]:
        return self._data.glob(".tmp*")  # lance tells a file's name once it is whole

    def commit(self, part: ExportPart) -> list[Path]:
        from lance import LanceDataset, LanceOperation

        with self._told():
            before = LanceDataset(str(self._place)).version
            more = LanceOperation.Append(self._written.pop(part.number))
            LanceDataset.commit(str(self._place), more, read_version=before)
        return []

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Raise lance's errors of the system, such as of a full disk, as Python's own."""
        try:
            yield
        except Exception as error:
            if found := re.search(r"\(os error (\d+)\)", str(error)):
                number = int(found[1])  # which lance has in its text alone
                raise OSError(number, os.strerror(number), str(self._place)) from error
            raise

    def finish(self) -> None:
        """All rows are of parts."""


def _size(rows: int) -> str:
    """The Hub's words for a number of rows."""
    steps = ["1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T"]
    place = max(0, len(str(rows)) - 3)
    return f"{steps[place - 1]}<n<{steps[place]}" if 0 < place < len(steps) else "n<1K"


def of(
    kind: str,
    run: RunDir,
    config: Config,
    folder: Path,
    features: Sequence[str] | None = None,
    image: str = "",
    text: str = "",
    lists: Path | None = None,
    allow_missing: bool = False,
) -> ExportLayout:
    """Find the outputs to export, in the layout of this name.

    Raises:
        ConfigError: there is no such layout or feature.
        D2MError: shards are not finished.
    """
    if kind == "clip-retrieval":
        names = [config.renamed(name) for name in config.postprocess_features]
        ends = {"--image": IMAGE, "--text": TEXT}
        found = [image, text]
        if not any(found):
            found = [_only(o, [n for n in names if n.endswith(e)]) for o, e in ends.items()]
        if not any(found):
            what = f"found features {', '.join(names) or 'none'}; valid is a feature of images or "
            raise ConfigError("export", [f"{what}texts, by --image or --text"])
        made = exports.source(run, config, [name for name in found if name], allow_missing)
        return ClipRetrieval(made, folder, *map(config.renamed, found))
    if kind == SubsetTars.kind:
        return SubsetTars(run, config, folder, lists)
    for layout in (Arrays, HuggingFace, Lance):
        if kind == layout.kind:
            return layout(exports.source(run, config, features, allow_missing), folder)
    kinds = ["npy", "clip-retrieval", "hf", "lance", "links", "subset-tars"]
    raise ConfigError("export", [f"layout: found {kind!r}; valid: {', '.join(kinds)}"])


def _only(option: str, names: list[str]) -> str:
    if len(names) > 1:
        raise ConfigError("export", [f"{option}: name one of {', '.join(names)}"])
    return names[0] if names else ""


def _parquet(path: Path, schema: pa.Schema, tables: Iterator[pa.Table]) -> None:
    """Write a parquet of one table or more; of vectors nothing is compressed or counted, which
    would gain nothing."""
    first = next(tables)
    vectors = {kind.name for kind in schema if pa.types.is_fixed_size_list(kind.type)}
    words = [name for name in schema.names if name not in vectors]
    options = {
        "compression": {name: "none" if name in vectors else "zstd" for name in schema.names},
        "use_dictionary": [name for name in words if exports.repeats(first[name])],
        "write_statistics": words,
    }
    with whole(path) as file, pq.ParquetWriter(file, schema, **options) as writer:
        for table in chain([first], tables):
            writer.write_table(table)


class _GroupTooLarge(Exception):
    """Rows of a part are far longer than those of its first shard."""


def _sink(file: IO[bytes], schema: pa.Schema, tables: Iterator[pa.Table]) -> None:
    """Write a parquet by polars, which encodes lists several times as fast as Arrow does.

    Its schema is told in the metadata: by itself, polars would tell of large strings and lists.

    Raises:
        _GroupTooLarge: a row group, which polars has in memory, would be too large.
    """
    import polars as pl
    from polars.io.plugins import register_io_source

    failed: list[Exception] = []
    first = next(tables)
    rows = max(1, min(GROUP_ROWS, GROUP_BYTES * len(first) // first.nbytes))

    def frames(*_: object) -> Iterator[pl.DataFrame]:
        try:
            for table in chain([first], tables):
                if table.nbytes * rows > 4 * GROUP_BYTES * len(table):
                    raise _GroupTooLarge
                yield cast("pl.DataFrame", pl.from_arrow(table))
        except Exception as error:  # polars would raise it as one of its own
            failed.append(error)

    known = cast("pl.DataFrame", pl.from_arrow(schema.empty_table())).schema
    told = {"ARROW:schema": b64encode(schema.serialize()).decode()}
    source = register_io_source(frames, schema=known)
    try:
        source.sink_parquet(
            file,
            compression="snappy",
            statistics=False,
            row_group_size=rows,
            metadata=told,
        )
    except pl.exceptions.PolarsError as error:
        if not failed and (code := re.search(r"\(os error (\d+)\)", str(error))):
            raise OSError(int(code[1]), os.strerror(int(code[1]))) from error
        if not failed:
            raise
    if failed:
        raise failed[0]


def _has_polars() -> bool:
    """Whether polars is here, of a version that encodes lists fast and knows float16."""
    if find_spec("polars") is None:
        return False
    found = re.findall(r"\d+", version("polars"))
    return (*map(int, found[:2]),) >= POLARS


def _is_plain(kind: pa.DataType) -> bool:
    """Whether polars knows the type as Arrow does, but for the size of offsets."""
    of = pa.types
    while of.is_list(kind) or of.is_fixed_size_list(kind):
        kind = kind.value_type
    return any(
        is_one(kind) for is_one in (of.is_string, of.is_floating, of.is_integer, of.is_boolean)
    )


def _list_of(vectors: Vectors) -> pa.DataType:
    """Lists of fixed sizes, one in the other, of the feature's numbers."""
    kind = pa.from_numpy_dtype(vectors.dtype)
    for length in reversed(vectors.shape):
        kind = pa.list_(kind, length)
    return kind


def _as_lists(array: NDArray[Any], vectors: Vectors) -> pa.Array:
    values = pa.array(array.reshape(-1))
    for length in reversed(vectors.shape):
        values = pa.FixedSizeListArray.from_arrays(values, length)
    return values
