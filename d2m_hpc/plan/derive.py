"""What decides derived columns: the entries of `derive`, and what their first steps have found.

A first step looks at the whole run, or at a file of the user's: centroids, duplicates, references.
Its result is kept in the run folder, by the hash of all that decides it and by its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from d2m_hpc.config import Config
from d2m_hpc.config.derive import (
    Clusters,
    Derivation,
    Duplicates,
    HeadScores,
    NegClipLoss,
    Referring,
    SqlExpression,
)
from d2m_hpc.errors import ConfigError, ShardError
from d2m_hpc.models.family import Use, located
from d2m_hpc.models.weights import sha256_of, weights_dir
from d2m_hpc.plan.workload import Workload, hashed
from d2m_hpc.run.derived import evaluated, kept_file, require_steady
from d2m_hpc.run.folder import RunDir
from d2m_hpc.run.manifest import Outcome
from d2m_hpc.run.outputs import OutputDir
from d2m_hpc.run.pair import Pair
from d2m_hpc.run.values import arrow_type
from d2m_hpc.storage.files import atomic_write, make_folder

_Arrays = Mapping[str, NDArray[Any]]
FirstStep = Callable[[str, Derivation, Mapping[str, Path]], _Arrays]
"""Does the first step of an entry, given its name, and the files that earlier ones kept by name."""
UNKNOWN = "?"
"""In place of the hash of a first step's result."""


def lacking(name: str, entry: Derivation, kept: Mapping[str, Path]) -> _Arrays:
    """Refuse to do a first step, where a job must do it."""
    raise NotPrepared(name)


class NotPrepared(Exception):
    """The first step of an entry is not done yet."""


def derived(
    workload: Workload, done: Mapping[str, Outcome], first_step: FirstStep | None = lacking
) -> dict[str, str]:
    """Hash what decides the columns of each entry of `derive`, by name.

    Args:
        done: the run's finished shards.
        first_step: does those that are not done yet; with None, an entry whose first step is not
            done has a hash that no shard has, with `UNKNOWN` at its end.

    Raises:
        NotPrepared: a first step is to be done, and `first_step` does none.
        ConfigError: a file of the user's cannot be read.
    """
    run, config = workload.run, workload.config
    _require_sql(config, done)
    digests: dict[str, str] = {}
    kept: dict[str, Path] = {}
    for name, entry in config.derive.items():
        about = entry.model_dump(mode="json", exclude={"reference"})
        if isinstance(entry, SqlExpression):
            about["before"] = dict(digests)
        if isinstance(entry, HeadScores):
            size = _size(config, done, entry.family.on)
            about["checkpoint"] = _checkpoint(name, entry, config.weights_dir, size)
        if (key := _key(name, entry, workload, done, kept)) is None:
            digests[name] = hashed(about)
            continue
        if (path := kept_file(run, f"{key}-*")) is None:
            arrays = first_step(name, entry, kept) if first_step else None
            path = _keep(run, key, arrays) if arrays else Path(f"{key}-{UNKNOWN}")
        kept[name] = path
        digests[name] = f"{hashed(about)}-{path.stem.partition('-')[2]}"
    return digests


def _require_sql(config: Config, done: Mapping[str, Outcome]) -> None:
    """Try each expression on two rows of nulls, of the columns' types.

    Raises:
        ConfigError: one cannot be evaluated.
    """
    if not any(isinstance(entry, SqlExpression) for entry in config.derive.values()):
        return
    known = _first(config, done).metadata().schema.to_arrow_schema()
    table = pa.table({name: pa.nulls(2, known.field(name).type) for name in config.columns})
    for name, entry in config.derive.items():
        if isinstance(entry, SqlExpression):
            try:
                require_steady(entry.expression, table.column_names)
                evaluated(entry.expression, entry.type, table)
            except ShardError as error:
                raise ConfigError("config", [f"derive.{name}.expression: {error}"]) from None
        for column, kind in entry.columns(name).items():
            table = table.append_column(column, pa.nulls(2, arrow_type(kind)))


def _first(config: Config, done: Mapping[str, Outcome]) -> Pair:
    """The first finished pair that has rows, if any has."""
    stem = next((s for s, outcome in done.items() if outcome.rows), next(iter(done)))
    return Pair(OutputDir(config.output_metadata_dir), stem)


def _size(config: Config, done: Mapping[str, Outcome], feature: str) -> tuple[int, ...]:
    """How many values a row of a stored feature has; nothing where the pair does not tell."""
    with suppress(Exception):  # of a damaged pair, or a store: the task tells
        [found] = _first(config, done).features([feature], mapped=True).values()
        return (found[0].size,)
    return ()


def _keep(run: RunDir, key: str, arrays: _Arrays) -> Path:
    """Write the result of a first step, in a file that is named by its hash."""
    make_folder(run.derived)
    temporary = run.derived / f".{key}.tmp"
    with temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    path = run.derived / f"{key}-{sha256_of(temporary)[:16]}.npz"
    with temporary.open("rb") as file:
        atomic_write(path, iter(lambda: file.read(1 << 24), b""))
    temporary.unlink()
    return path


def _key(
    name: str,
    entry: Derivation,
    workload: Workload,
    done: Mapping[str, Outcome],
    kept: Mapping[str, Path],
) -> str | None:
    """A hash of all that decides the result of an entry's first step; None where there is none."""
    about = entry.model_dump(mode="json", exclude={"threshold", "norm", "temperature"})
    if isinstance(entry, Clusters | NegClipLoss):  # the same for shards that come later
        return hashed({**about, "run": hashed(workload.fingerprint)})
    if isinstance(entry, Duplicates):
        shards = [f"{stem} {o.rows} {o.npz_sha256}" for stem, o in done.items()]
        whole = hashlib.sha256("\n".join(shards).encode()).hexdigest()
        return hashed({**about, "within": kept[entry.within].name, "shards": whole})
    if isinstance(entry, Referring):
        about["reference"] = _sha256(name, "reference", Path(entry.reference))
        return hashed({**about, "kind": "reference"})
    return None


def _checkpoint(name: str, entry: HeadScores, folder: str | None, size: tuple[int, ...]) -> str:
    """The sha256 of a head's file, which must be there and fit.

    Args:
        size: of the feature.

    Raises:
        ConfigError: it is not, or does not.
    """
    use = Use(name, weights_dir(folder), frozenset())
    try:
        entry.family.outputs(use)
        entry.family.check(use, [size])
        [file] = entry.family.checkpoints(use)
    except ValueError as error:
        raise ConfigError("config", [f"derive.{name}: {error}"]) from None
    return _sha256(name, "checkpoint", located(file, use.folder))


def _sha256(name: str, key: str, path: Path) -> str:
    try:
        return sha256_of(path)
    except OSError as error:
        what = f"derive.{name}.{key}: {path} cannot be read: {error.strerror or error}"
        raise ConfigError("config", [what]) from None
