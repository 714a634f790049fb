"""Files that DataComp's tools need beside the outputs: places of shards and parquets, and sizes.

The contract is that of `baselines.py`, `baselines/image_based_clustering.py` and `resharder.py` in
github.com/mlfoundations/datacomp.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from d2m_hpc.config import Config
from d2m_hpc.errors import ConfigError
from d2m_hpc.plan.naming import location
from d2m_hpc.plan.standing import Standings, standings
from d2m_hpc.run.folder import RunDir
from d2m_hpc.run.manifest import Outcome
from d2m_hpc.run.outputs import OutputDir
from d2m_hpc.run.records import Shard
from d2m_hpc.run.shards import read_shards
from d2m_hpc.storage import asked_for
from d2m_hpc.storage.urls import is_chained, is_remote
from d2m_hpc.subsets.exports import require_finished
from d2m_hpc.subsets.samples import UID, opened

_B32, _L14 = "clip_b32_similarity_score", "clip_l14_similarity_score"
_INTERSECT = "baselines.py --name image_based_intersect_clip_score"
BLUR = "resharder.py --blur-metadata-map"
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
    """

    files: list[Path]
    shards: int
    missing: list[str]
    repeated: int
    lacking: dict[str, list[str]]
    commands: list[str]
    unnamed: list[str]


def export(run: RunDir, config: Config, folder: Path, allow_missing: bool = False) -> Export:
    """Write `sizes.json` and, where there are faces, `blur_metadata_map.json`.

    The resharder takes the tars of one folder; those of several get a `sizes-N.json` each.

    Raises:
        ConfigError: the outputs do not have DataComp's names, or the folder cannot be written.
        D2MError: shards are not finished, unless that is allowed.
    """
    found = standings(run, config)
    missing = found.unfinished
    _require_names(run, config)
    require_finished(found, allow_missing)
    asked_for.make_folder(folder)
    asked_for.require_writable(folder / "sizes.json")
    repeated, folder, lacks = _repeated(run, config, found), folder.absolute(), lacking(config)
    there = [s for s in read_shards(run.shards) if s.stem in found.done]
    sizes = _write_sizes(folder, there, found.done)
    blur = [] if BLUR in lacks else [_write_blur_map(folder, there, config)]
    commands = {where: _command(where, table, blur) for where, table in sizes.items()}
    return Export(
        files=[*sizes.values(), *blur],
        shards=len(there),
        missing=missing,
        repeated=repeated,
        lacking=lacks,
        commands=[command for command in commands.values() if command],
        unnamed=[where for where, command in commands.items() if not command],
    )


def _require_names(run: RunDir, config: Config) -> None:
    if not config.use_datacomp_keys:
        what = "use_datacomp_keys: found false, so DataComp's tools find neither their columns nor "
        what += "their uids; set it to true, and submit with `reprocess: true`"
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


def _write_sizes(
    folder: Path, shards: Iterable[Shard], done: Mapping[str, Outcome]
) -> dict[str, Path]:
    """Write the number of samples of each tar, as the resharder counts: with rejected ones.

    Returns a path for each folder of tars.
    """
    sizes: dict[str, dict[str, int]] = {}
    for shard in shards:
        where, name = _tar(shard.url)
        found = done[shard.stem]
        sizes.setdefault(where, {})[name] = found.rows + sum(n for _, n in found.rejected)
    many = len(sizes) > 1
    paths = {w: folder / (f"sizes-{i}.json" if many else "sizes.json") for i, w in enumerate(sizes)}
    for where, path in paths.items():
        asked_for.write(path, [json.dumps(sizes[where], indent=0).encode()])
    return paths


def _write_blur_map(folder: Path, shards: Iterable[Shard], config: Config) -> Path:
    """Write which parquet has the faces of which tar."""
    output = OutputDir(config.output_metadata_dir)
    table = {
        shard.stem: {
            "parquet": output.address(f"{shard.stem}.parquet"),
            "shards": ["/".join(_tar(shard.url))],
        }
        for shard in shards
    }
    path = folder / "blur_metadata_map.json"
    asked_for.write(path, [json.dumps(table, indent=0).encode()])
    return path


def _repeated(run: RunDir, config: Config, known: Standings) -> int:
    with opened(run, config, known) as pool:
        if "uid" not in pool.columns:
            return 0
        pool.db.execute("CREATE TABLE uids (high UBIGINT, low UBIGINT)")
        for _ in pool.groups():
            pool.db.execute(f"INSERT INTO uids SELECT {UID} FROM pool")
        counted = pool.db.execute("SELECT count(*) - count(DISTINCT (high, low)) FROM uids")
        (repeated,) = counted.fetchone() or (0,)
    return int(repeated)


def _command(where: str, sizes: Path, blur: Sequence[Path]) -> str:
    """The resharder's command for one folder of tars; empty where it cannot name them."""
    numbered = numbering(json.loads(sizes.read_bytes()))
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
