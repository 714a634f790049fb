"""Files that DataComp's tools need beside the outputs: places of shards and parquets, and sizes.

The contract is that of `baselines.py`, `baselines/image_based_clustering.py` and `resharder.py` in
github.com/mlfoundations/datacomp.
"""

from __future__ import annotations

import json
import re
import shlex
import zipfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from d2m_hpc.config import Config
from d2m_hpc.errors import ConfigError
from d2m_hpc.plan.forget import forgotten
from d2m_hpc.plan.naming import location
from d2m_hpc.plan.standing import Standings, standings
from d2m_hpc.run.folder import RunDir
from d2m_hpc.run.manifest import Outcome
from d2m_hpc.run.outputs import OutputDir
from d2m_hpc.run.records import Shard
from d2m_hpc.run.shards import read_shards
from d2m_hpc.storage import asked_for
from d2m_hpc.storage.urls import is_chained, is_remote
from d2m_hpc.subsets import exports
from d2m_hpc.subsets.samples import UID, opened

_B32, _L14 = "clip_b32_similarity_score", "clip_l14_similarity_score"
_INTERSECT = "baselines.py --name image_based_intersect_clip_score"
BLUR = "resharder.py --blur-metadata-map"
LONGEST = 1 << 14
"""Bytes of what these files have on one shard."""
READERS: Mapping[str, tuple[str, ...]] = {
    "baselines.py --name no_filter": ("uid",),
    "baselines.py --name basic_filter": ("uid", "text", "original_width", "original_height"),
    "baselines.py --name text_based": ("uid", "text"),
    "baselines.py --name laion2b": ("uid", "text", _B32),
    "baselines.py --name clip_score --arch b32": ("uid", _B32),
    "baselines.py --name clip_score --arch l14": ("uid", _L14),
    "baselines.py --name image_based": ("uid", "text", "l14_img"),
    f"{_INTERSECT} --arch b32": ("uid", "text", _B32, "l14_img"),
    f"{_INTERSECT} --arch l14": ("uid", "text", _L14, "l14_img"),
    "image_based_clustering.py": ("uid", "text", "l14_img"),
    "image_based_clustering.py --embedding_key b32_img": ("uid", "text", "b32_img"),
    BLUR: ("uid", "face_bboxes"),
}
"""The columns and arrays that each tool reads."""


@dataclass(frozen=True)
class Export:
    """The files that were written, and what DataComp's tools can do with them.

    Attributes:
        files: the paths.
        shards: the number of finished shards.
        missing: stems of other shards.
        repeated: rows beyond the first of each uid.
        lacking: for each tool, columns and arrays that the run does not have.
        commands: a command of the resharder for each folder of tars.
        unnamed: folders of tars whose names the resharder cannot make from a number.
        renamed: the folder of the outputs with DataComp's names; empty where the run has these.
        left_out: rows without a caption or a usable uid, which are not in that folder.
    """

    files: list[Path]
    shards: int
    missing: list[str]
    repeated: int
    lacking: dict[str, list[str]]
    commands: list[str]
    unnamed: list[str]
    renamed: str = ""
    left_out: int = 0


class Renamed(exports.ExportLayout):
    """The outputs of a run by DataComp's names, as `use_datacomp_keys` would have made them."""

    kind = "datacomp"

    def __init__(self, source: exports.ExportSource, folder: Path) -> None:
        self.config = source.config.model_copy(update={"use_datacomp_keys": True})
        self._caption = source.config.text_field or "caption"
        if self._caption not in source.schema.names:
            what = (
                f"found no column {self._caption!r}, of which DataComp's `text` is made; name it in"
            )
            what += " additional_fields and submit: it is read from the tars, and no model runs"
            raise ConfigError("export", [what])
        super().__init__(source, folder)

    def files(self, part: exports.ExportPart) -> list[Path]:
        stems = [pair.stem for pair, _ in part.pairs]
        return [self.root / f"{stem}.{kind}" for stem in stems for kind in ("npz", "parquet")]

    def write(self, part: exports.ExportPart) -> None:
        files = iter(self.files(part))
        for pair, rows in part.pairs:
            columns, keep = self._columns(self.source.table(pair, rows))
            with exports.whole(next(files)) as file, zipfile.ZipFile(file, "w") as archive:
                for v in self.source.vectors:
                    name = f"{self.config.renamed(v.name)}.npy"
                    with archive.open(name, "w", force_zip64=True) as member:
                        exports.begin_npy(member, np.dtype(np.float16), (int(keep.sum()), *v.shape))
                        self.source.copy_values(pair, rows, [(v, _Kept(member, v, keep))])
            with exports.whole(next(files)) as file:
                kept = pa.table(columns).filter(keep)
                again = [name for name in kept.column_names if exports.repeats(kept[name])]
                pq.write_table(kept, file, compression="zstd", use_dictionary=again)

    def _columns(self, table: pa.Table) -> tuple[dict[str, pa.Array], NDArray[np.bool_]]:
        """The columns, and which rows have a caption, and a usable uid if there are uids."""
        names = map(self.config.renamed, table.column_names)
        columns = dict(zip(names, table.columns, strict=True))
        columns["text"] = table[self._caption].cast(pa.string())
        keep = pc.is_valid(columns["text"])
        if "uid" in columns:
            uids = columns["uid"]
            usable = pc.match_substring_regex(uids, "^[0-9a-fA-F]{1,32}$")
            keep = pc.and_(keep, pc.fill_null(usable, False))
            columns["uid"] = pc.utf8_lpad(pc.utf8_lower(uids), 32, "0")
        return columns, keep.to_numpy(zero_copy_only=False)

    def finish(self) -> None:
        """All files are of parts."""

    @property
    def left_out(self) -> int:
        paths = (p for part in self.parts for p in self.files(part) if p.suffix == ".parquet")
        return self.source.rows - sum(int(pq.read_metadata(path).num_rows) for path in paths)


class _Kept:
    """Writes those rows of a feature that are kept, as float16."""

    def __init__(self, file: IO[bytes], vectors: exports.Vectors, keep: NDArray[np.bool_]) -> None:
        self._file, self._vectors, self._keep = file, vectors, keep

    def writelines(self, blocks: Iterable[memoryview]) -> None:
        keep, shape = self._keep, (-1, *self._vectors.shape)
        for block in blocks:
            rows = np.frombuffer(block, self._vectors.dtype).reshape(shape)
            own, keep = keep[: len(rows)], keep[len(rows) :]
            kept = rows if own.all() else rows[own]
            self._file.write(kept.astype(np.float16, copy=False).data)


def export(
    run: RunDir,
    config: Config,
    folder: Path,
    allow_missing: bool = False,
    on_rows: Callable[[int, int], None] = lambda done, of: None,
) -> Export:
    """Write `sizes.json` and, where there are faces, `blur_metadata_map.json`.

    The resharder takes the tars of one folder; those of several get a `sizes-N.json` each. The
    outputs of a run without DataComp's names are copied with these names into `metadata/`.

    Raises:
        ConfigError: the outputs have no captions, or the folder cannot be written.
        D2MError: shards are not finished, unless that is allowed.
    """
    found = standings(run, config)
    _require_tars(run, config)
    found.require_finished(allow_missing)
    there = [s for s in read_shards(run.shards) if s.stem in found.done]
    sizes = _sizes(folder.absolute(), there, found.done)
    lacks = lacking(config.model_copy(update={"use_datacomp_keys": True}))
    blur = [] if BLUR in lacks else [folder.absolute() / "blur_metadata_map.json"]
    _claim(run, folder, sizes, blur)
    renamed = None
    if not config.use_datacomp_keys:
        made = exports.source(run, config, None, allow_missing)
        renamed = Renamed(made, folder.absolute() / "metadata")
        exports.export(run, renamed, on_rows)
    where = str(renamed.root) if renamed else config.output_metadata_dir
    repeated = _repeated(run, config, found)
    _write({path: counts for path, (_, counts) in sizes.items()})
    _write(dict.fromkeys(blur, _faces(there, OutputDir(where))))
    commands = {of: _command(of, tars, path, blur) for path, (of, tars) in sizes.items()}
    return Export(
        files=[*sizes, *blur],
        shards=len(there),
        missing=found.unfinished,
        repeated=repeated,
        lacking=lacks,
        commands=[command for command in commands.values() if command],
        unnamed=[place for place, command in commands.items() if not command],
        renamed=where if renamed else "",
        left_out=renamed.left_out if renamed else 0,
    )


def _require_tars(run: RunDir, config: Config) -> None:
    if config.inputs:
        what = "inputs: DataComp's tools read tars, of runs with input_tars"
        raise ConfigError(str(run.config), [what])


def lacking(config: Config) -> dict[str, list[str]]:
    """For each tool that cannot run, the columns and arrays that a run of this config lacks."""
    made = map(config.renamed, [*config.postprocess_columns, *config.postprocess_features])
    there = {*made, *config.carried}
    found = {tool: [n for n in needs if n not in there] for tool, needs in READERS.items()}
    return {tool: names for tool, names in found.items() if names}


def _tar(url: str) -> tuple[str, str]:
    """A tar's folder and name; for a command or a wrapped URL, those of the tar inside."""
    path = url.rpartition("::")[2] if is_chained(url) else url if is_remote(url) else location(url)
    folder, _, name = path.rpartition("/")
    return folder, name


def _sizes(
    folder: Path, shards: Iterable[Shard], done: Mapping[str, Outcome]
) -> dict[Path, tuple[str, dict[str, int]]]:
    """The number of samples of each tar, as the resharder counts: with rejected ones.

    Returns:
        For each file to write, a folder of tars and their numbers.
    """
    sizes: dict[str, dict[str, int]] = {}
    for shard in shards:
        where, name = _tar(shard.url)
        found = done[shard.stem]
        sizes.setdefault(where, {})[name] = found.rows + sum(n for _, n in found.rejected)
    names = [f"sizes-{i}.json" for i in range(len(sizes))] if len(sizes) > 1 else ["sizes.json"]
    return {folder / name: of for name, of in zip(names, sizes.items(), strict=False)}


def _faces(shards: Iterable[Shard], output: OutputDir) -> dict[str, dict[str, object]]:
    """Which parquet has the faces of which tar."""
    return {
        shard.stem: {
            "parquet": output.address(f"{shard.stem}.parquet"),
            "shards": ["/".join(_tar(shard.url))],
        }
        for shard in shards
    }


def _encoded(table: object) -> bytes:
    return json.dumps(table, indent=0).encode()


def _write(tables: Mapping[Path, object]) -> None:
    for path, table in tables.items():
        asked_for.write(path, [_encoded(table)])


def _claim(run: RunDir, folder: Path, sizes: Iterable[Path], blur: Iterable[Path]) -> None:
    """Make the folder; raise `ConfigError` where a file there may not be replaced."""
    asked_for.make_folder(folder)
    stems = forgotten(run) | {shard.url: shard.stem for shard in read_shards(run.shards)}
    tars = {_tar(url)[1] for url in stems}
    for path in sizes:
        _require_of(path, tars, lambda value: type(value) is int)
    for path in blur:
        _require_of(path, {*stems.values()}, lambda value: {*value} == {"parquet", "shards"})


def _require_of(path: Path, names: Collection[str], is_fit: Callable[[Any], bool]) -> None:
    asked_for.require_writable(path)
    if not path.is_file():  # a device or a pipe is written into
        return
    try:
        data = path.read_bytes() if path.stat().st_size <= LONGEST * len(names) else b""
        table = json.loads(data)
        is_own = _encoded(table) == data and table.keys() <= names
        is_own &= all(map(is_fit, table.values()))
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        is_own = False
    if not is_own:
        what = f"{path} is of no export of this run, and would be replaced"
        raise ConfigError("export", [f"--output: {what}; name another folder, or remove it"])


def _repeated(run: RunDir, config: Config, known: Standings) -> int:
    with opened(run, config, known) as pool:
        if "uid" not in pool.columns:
            return 0
        pool.db.execute("CREATE TABLE uids (high UBIGINT, low UBIGINT)")
        for _ in pool.groups():
            pool.db.execute(
                f"INSERT INTO uids FROM (SELECT {UID} FROM pool) WHERE d2m_high IS NOT NULL"
            )
        counted = pool.db.execute("SELECT count(*) - count(DISTINCT (high, low)) FROM uids")
        (repeated,) = counted.fetchone() or (0,)
    return int(repeated)


def _command(where: str, tars: Iterable[str], sizes: Path, blur: Sequence[Path]) -> str:
    """The resharder's command for one folder of tars; empty where it cannot name them."""
    numbered = numbering(tars)
    if numbered is None:
        return ""
    form, first, count = numbered
    words = ["python", "resharder.py", "-i", where, "-o", "OUTPUT_DIR", "-s", "subset.npy"]
    words += ["--shard-format", form, "--first-shard", str(first), "-n", str(count)]
    # The resharder looks for the table from the tars' folder on; on a store, only inside of it.
    words += ["--shard-table", sizes.name if is_remote(where) else str(sizes)]
    if blur:
        words += ["--blur-metadata-map", str(blur[0]), "--apply-blur"]
    return shlex.join(words)


def numbering(names: Iterable[str]) -> tuple[str, int, int] | None:
    """How the resharder makes tars' names from numbers.

    Returns:
        The format, the first number and the count up to the last; None where no one format makes
        all names.
    """
    parts = [re.fullmatch(r"(.*?)(\d+)(\D*\.tar)", name) for name in names]
    found = [match.groups() for match in parts if match]
    if len(found) < len(parts) or len({(head, tail) for head, _, tail in found}) != 1:
        return None
    head, _, tail = (part.replace("{", "{{").replace("}", "}}") for part in found[0])
    numbers = [int(digits) for _, digits, _ in found]
    form = f"{head}{{:0{min(len(digits) for _, digits, _ in found)}d}}{tail}"
    if any(form.format(n) != "".join(f) for n, f in zip(numbers, found, strict=True)):
        return None
    return form, min(numbers), max(numbers) - min(numbers) + 1
