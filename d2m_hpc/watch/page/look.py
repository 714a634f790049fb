"""`d2m select --look`: pictures of what a selection cuts beside those of what it keeps."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from d2m_hpc.config import Config
from d2m_hpc.errors import ConfigError
from d2m_hpc.plan.standing import standings
from d2m_hpc.run.folder import RunDir
from d2m_hpc.run.outputs import OutputDir
from d2m_hpc.run.pair import Pair
from d2m_hpc.run.records import Shard
from d2m_hpc.run.shards import read_shards
from d2m_hpc.storage import asked_for
from d2m_hpc.subsets.finished import readable
from d2m_hpc.subsets.samples import Pool
from d2m_hpc.subsets.widest import quoted
from d2m_hpc.watch.page import charts, environment
from d2m_hpc.watch.page.sheet import CAPTION, Picked, fill, within_reach

if TYPE_CHECKING:
    from d2m_hpc.subsets.select import Query, Selection

EACH = 12
"""Samples that are kept, and as many that are cut."""


class Look:
    """Draws the sheet of a selection, which `select` calls once it has chosen.

    Args:
        path: of the HTML file, which is replaced whole.

    Raises:
        ConfigError: the file cannot be written.
    """

    def __init__(self, run: RunDir, config: Config, path: Path) -> None:
        asked_for.require_writable(path, "--look")
        self._run, self._config, self._path = run, config, path
        self._output = OutputDir(config.output_metadata_dir)

    def __call__(self, pool: Pool, query: Query, selection: Selection) -> None:
        if query.by and query.by in pool.beside:
            raise ConfigError("select", [f"--look: {query.by!r} is no column of the run"])
        shards, notes = self._shards(query.seed or 0)
        rows = self._rows(pool, shards, query)
        kept = _chosen(pool, rows)
        sides = {
            "kept": [row for i, (_, row) in enumerate(rows) if i in kept],
            "cut": [row for i, (_, row) in enumerate(rows) if i not in kept],
        }
        for name, side in sides.items():
            if query.by:
                side.sort(key=lambda row: row.value if name == "kept" else -row.value)
            else:
                Random(query.seed or 0).shuffle(side)
            del side[EACH:]
        for shard in shards:
            if some := [row for side in sides.values() for row in side if row.stem == shard.stem]:
                fill(shard, some, self._config)
                self._show_values(shard.stem, some, named(pool, query))
        ((least,),) = pool.db.execute("SELECT min(score) FROM chosen").fetchall()
        self._write(
            query=query,
            selection=selection,
            sides=sides,
            notes=notes,
            shards=len(shards),
            least=least if query.by else None,
        )

    def _shards(self, seed: int) -> tuple[list[Shard], list[str]]:
        """Some finished shards, drawn at random, that are cheap to read."""
        done = standings(self._run, self._config).done
        shards = [s for s in read_shards(self._run.shards) if s.stem in done and done[s.stem].rows]
        Random(seed).shuffle(shards)
        return within_reach(shards)

    def _rows(self, pool: Pool, shards: Sequence[Shard], query: Query) -> list[tuple[str, Picked]]:
        """The uids, if there are any, and scores of all rows that have what they are sorted by."""
        found = []
        uid = "key" if pool.by_name else "uid"
        names = dict.fromkeys(("key", uid, query.by or "key"))
        for stem in (shard.stem for shard in shards):
            with readable(self._output.path(stem)):
                table = Pair(self._output, stem).table(names)
            if names.keys() <= {*table.column_names}:  # an older shard may lack the score
                three = (table[name].to_pylist() for name in ("key", uid, query.by or "key"))
                for row, (key, told, value) in enumerate(zip(*three, strict=True)):
                    if not query.by or (value is not None and math.isfinite(value)):
                        score = float(value) if query.by else math.nan
                        found.append((told, Picked(stem, key, score, row=row)))
        return found

    def _show_values(self, stem: str, samples: Sequence[Picked], names: Sequence[str]) -> None:
        """Fill in the columns that the choice depends on."""
        with readable(self._output.path(stem)):
            table = Pair(self._output, stem).table(names)
        for sample in samples:
            for name in table.column_names:
                value = table[name][sample.row].as_py()
                told = str(value)
                if isinstance(value, float) and math.isfinite(value):
                    told = charts.number(value)
                sample.values[name] = "none" if value is None else told[:CAPTION]

    def _write(self, **contents: Any) -> None:
        template = environment().get_template("look.html.j2")
        asked_for.write(self._path, [template.render(contents).encode("utf-8")], "--look")


def named(pool: Pool, query: Query) -> list[str]:
    """The run's columns that a choice depends on, but for the one that the page is sorted by."""

    def is_in_condition(name: str) -> bool:
        plain = rf'(?<![\w"]){re.escape(name)}(?![\w"])'
        return quoted(name) in query.where or (
            name.isidentifier() and bool(re.search(plain, query.where))
        )

    own = {"key", "uid", "shard", query.by, *pool.beside}
    asked = {query.within, query.weight}
    return [n for n in pool.columns if n not in own and (n in asked or is_in_condition(n))]


def _chosen(pool: Pool, rows: Sequence[tuple[str, Picked]]) -> set[int]:
    """The places of those rows that are in the subset."""
    texts = {"uid": [u for u, _ in rows], "key": [r.key for _, r in rows]}
    texts["shard"] = [row.stem for _, row in rows]
    columns = {name: pa.array(values, pa.string()) for name, values in texts.items()}
    pool.db.register(
        "looked", pa.table({"place": pa.array(range(len(rows)), pa.int64())} | columns)
    )
    halves = f"(SELECT place, {pool.identity} FROM looked)"
    told = "SEMI JOIN chosen USING (d2m_high, d2m_low)"
    found = pool.db.execute(f"SELECT place FROM {halves} {told}")
    return {place for (place,) in found.fetchall()}
