"""Ours and the baseline in turns, and what comes of it: a ratio against a target."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from benchmarks.machine import Watch, warning

Direction = Literal["at least", "at most"]
Pair = tuple[float, float]
REPETITIONS = 5


@dataclass(frozen=True)
class Setting:
    """How a row is run.

    Attributes:
        folder: for tars, which are kept, and for outputs.
        workers: threads of ours, processes of the baseline.
        reference: a checkout of the reference program, to be run in the baseline's place.
        smoke: tiny and once, to see that it runs; the figures mean nothing.
    """

    folder: Path
    workers: int = 2
    reference: Path | None = None
    smoke: bool = False
    repetitions: int = REPETITIONS

    def size(self, full: int, smoke: int) -> int:
        return smoke if self.smoke else full


@dataclass(frozen=True)
class Sides:
    """What is compared: two functions that do the same work and return what it cost.

    Attributes:
        warm_up: what is done before anything counts; by default each side once.
        more: what else belongs into the row's JSON.
    """

    ours: Callable[[], float]
    baseline: Callable[[], float]
    warm_up: Callable[[], object] | None = None
    more: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One measurement and what is expected of it.

    Attributes:
        target: of the ratio: how many times cheaper ours is ("at least"), or how many times the
            baseline's figure it may cost ("at most").
        prepare: makes ready what is not measured.
        unit: of the figures, which are costs: less is better.
        takes_reference: the reference program can be run in the baseline's place.
    """

    name: str
    title: str
    target: float
    prepare: Callable[[Setting], AbstractContextManager[Sides]]
    direction: Direction = "at least"
    unit: str = "s"
    takes_reference: bool = False

    def ratio(self, ours: float, baseline: float) -> float:
        return baseline / ours if self.direction == "at least" else ours / baseline

    def is_met(self, ratio: float) -> bool:
        return ratio >= self.target if self.direction == "at least" else ratio <= self.target


def measure(row: Row, setting: Setting, command: str) -> dict[str, Any]:
    """A row's JSON: one warm-up of each side, then both in turns.

    Raises:
        ValueError: the row has no place for the reference program.
    """
    if setting.reference and not row.takes_reference:
        raise ValueError(f"{row.name} does not run the reference program; leave --reference out")
    with row.prepare(setting) as sides:
        if not setting.smoke:
            (sides.warm_up or (lambda: (sides.ours(), sides.baseline())))()
        watch = Watch()
        pairs, disturbed = _in_turns(sides, setting)
        machine = watch.describe()
    ours, baseline = map(list, zip(*pairs, strict=True))
    ratios = [row.ratio(*pair) for pair in pairs]
    if not all(math.isfinite(r) and r > 0 for r in ratios):
        raise ValueError(f"{row.name}: no ratios can be made of {pairs}")
    return {
        "name": row.name,
        "title": row.title,
        "target": row.target,
        "direction": row.direction,
        "ratio": {"median": median(ratios), "min": min(ratios), "max": max(ratios)},
        "met": row.is_met(median(ratios)),
        "ours": ours,
        "baseline": baseline,
        "disturbed": disturbed,
        "unit": row.unit,
        "against": "reference program" if setting.reference else "baseline",
        **sides.more,
        "machine": machine,
        "command": command,
        "date": time.strftime("%Y-%m-%d"),
    }


def _in_turns(sides: Sides, setting: Setting) -> tuple[list[Pair], list[Pair]]:
    """What ours and the baseline cost, and the pairs that others spoiled and that were taken again.

    There are at most as many of those as of the others.
    """
    pairs: list[Pair] = []
    disturbed: list[Pair] = []
    repetitions = 1 if setting.smoke else setting.repetitions
    while len(pairs) < repetitions:
        (ours, spoiled), (baseline, spoiled_too) = map(_watched, (sides.ours, sides.baseline))
        again = (spoiled or spoiled_too) and len(disturbed) < repetitions and not setting.smoke
        (disturbed if again else pairs).append((ours, baseline))
    return pairs, disturbed


def _watched(side: Callable[[], float]) -> tuple[float, bool]:
    """What a side cost, and whether others had too much of the machine meanwhile."""
    watch = Watch()
    return side(), watch.disturbed()


def timed(work: Callable[[], object]) -> float:
    """Wall seconds."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def save(result: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=1, ensure_ascii=False)
    (folder / f"{result['name']}.json").write_text(text + "\n", encoding="utf-8")


def show(result: dict[str, Any], console: Console) -> None:
    """Every figure, the ratios, and whether the target is met."""
    table = Table(title=result["title"], title_justify="left", title_style="bold")
    for head in ("", f"ours ({result['unit']})", result["against"]):
        table.add_column(head, justify="right" if head else "left")
    for i, (ours, baseline) in enumerate(zip(result["ours"], result["baseline"], strict=True), 1):
        table.add_row(str(i), f"{ours:.4g}", f"{baseline:.4g}")
    console.print(table)
    ratio, verdict = result["ratio"], "met" if result["met"] else "NOT MET"
    console.print(
        f"ratio {ratio['median']:.3g} ({ratio['min']:.3g} to {ratio['max']:.3g}), "
        f"{result['direction']} {result['target']:g}: {verdict}"
    )
    if again := result["disturbed"]:
        console.print(f"{len(again)} more were taken again, as others used the machine meanwhile")
    if doubt := warning(result["machine"]):
        console.print(f"[bold red]{doubt}")
