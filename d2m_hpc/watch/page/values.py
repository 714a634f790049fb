"""The sections that tell of the output: a histogram of every column, and the contact sheet."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from d2m_hpc.watch.page import charts
from d2m_hpc.watch.page.columns import LARGEST, Column, Sampled
from d2m_hpc.watch.page.frame import Found, note, section
from d2m_hpc.watch.page.markup import Markup, element, table
from d2m_hpc.watch.page.sheet import Sample

ALIKE = 1e-9
"""Values of which no two differ by more than this share of the largest are not drawn."""


def values(found: Found) -> Markup:
    """A histogram of every column."""
    sampled = found.sampled
    read, of = len(sampled.shards), sampled.of
    if not read:
        return section("Values", note("No shard is done yet."), _unreadable(sampled))
    rows = max((c.rows + c.missing for c in sampled.columns), default=0)
    which = (
        f"From all {of:,} finished shards"
        if read == of
        else f"From {read:,} of {of:,} finished shards, drawn at random"
    )
    cards = (_card(column) for column in sampled.columns)
    return section(
        "Values",
        note(f"{which}: {rows:,} rows."),
        _unreadable(sampled),
        element("div", *cards, class_="cards"),
    )


def _unreadable(sampled: Sampled) -> Markup | None:
    if not sampled.unreadable:
        return None
    stem, why = next(iter(sampled.unreadable.items()))
    return element(
        "p",
        f"{len(sampled.unreadable)} shards could not be read; the first, ",
        element("code", stem),
        f": {why}",
    )


def _card(column: Column) -> Markup:
    missing = f", {column.missing:,} without a value" if column.missing else ""
    head = element("h3", column.name)
    if column.is_category:
        return element("div", head, _categories(column), class_="card")
    values = column.values
    if not len(values):
        told = note(f"{column.rows:,} values of type {column.type}, not drawn{missing}.")
        return element("div", head, told, class_="card")
    unit = {"number": "value", "list": "items in the list", "text": "characters"}[column.kind]
    told = note(_quartiles(values, unit), missing, _odd(column, len(values)))
    if np.ptp(values) <= ALIKE * np.abs(values).max():
        return element("div", head, told, class_="card")
    drawn = charts.histogram(values, unit, f"Histogram of {column.name}")
    return element("div", head, drawn, told, class_="card")


def _quartiles(values: NDArray[np.float64], unit: str) -> str:
    if values.min() == values.max():
        return f"{unit}: {charts.number(values[0])} in all {len(values):,} rows"
    marks = np.percentile(values, [0, 25, 50, 75, 100])
    low, first, middle, third, high = (charts.number(float(m)) for m in marks)
    return f"{low} to {high}, median {middle}, middle half {first} to {third}"


def _odd(column: Column, finite: int) -> str:
    odd = column.rows - finite
    return f", {odd:,} not finite or over {LARGEST:g}" if odd else ""


def _categories(column: Column) -> Markup:
    """How often each comes, the most frequent first."""
    assert column.categories is not None
    counts = dict(column.categories)
    if column.missing:
        counts["(no value)"] = column.missing
    most = max(counts.values())
    rows = (
        (name, charts.shares({name: n}, {name: "blue"}, most), f"{n:,}")
        for name, n in sorted(counts.items(), key=lambda pair: -pair[1])
    )
    return table(("value", "", "rows"), rows, figures=1)


def contact_sheet(found: Found) -> Markup:
    sheet = found.sheet
    notes = [note(words) for words in sheet.notes]
    if not sheet.score:
        return section("Samples", note("There is no score yet to choose samples by."), *notes)
    if not sheet.shards:
        return section("Samples", *notes)
    if not any(sheet.ends.values()):
        return section("Samples", note("Fewer than three rows have ", element("code", sheet.score)))
    intro = note(
        "By ",
        element("code", sheet.score),
        f", from {sheet.shards:,} of "
        f"{found.sampled.of:,} finished shards. Pictures stand as they are stored; "
        "their EXIF orientation is ignored, as the models do.",
    )
    ends = (part for end, samples in sheet.ends.items() for part in _end(end, samples))
    return section("Samples", intro, *notes, *ends)


def _end(end: str, samples: list[Sample]) -> Iterable[Markup]:
    if samples:
        yield element("h3", f"The {end}")
        yield element("div", *map(_figure, samples), class_="sheet")


def _figure(sample: Sample) -> Markup:
    caption = sample.caption or "(no caption)"
    if sample.picture:
        shown = element("img", src=sample.picture, alt=caption)
    else:
        shown = element("div", f"No picture: {sample.fault}", class_="no-picture")
    told = element(
        "figcaption",
        element("b", charts.number(sample.value)),
        element("p", caption, dir="auto", title=caption),
        element("code", f"{sample.key}"),
        f" in {sample.stem}",
    )
    return element("figure", shown, told)
