"""The results' JSON to the README's table and to the plot."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

README = Path(__file__).with_name("README.md")
RESULTS = Path(__file__).with_name("results")
PLOT = "ratios.png"
BEGIN, END = "<!-- table -->", "<!-- end of table -->"
NO_GPU = "The GPU table is empty: none was at hand."
GREEN, RED, GREY = "#2a7f62", "#b3432b", "#8a8f98"

Result = dict[str, Any]


def load(folder: Path) -> dict[str, Result]:
    """Every result in a folder, by its name."""
    files = sorted(folder.glob("*.json"))
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in files}


def render(results: dict[str, Result]) -> str:
    """All tables as Markdown."""
    ratios = ratio_rows(results)
    parts = [_ratio_table(ratios), _machines(ratios)] if ratios else []
    if "control" in results:
        parts.append(_control_table(results["control"]))
    parts.append(_gpu_table(results["gpu"]) if "gpu" in results else NO_GPU)
    return "\n\n".join(parts)


def ratio_rows(results: dict[str, Result]) -> list[Result]:
    """Those that have a ratio and a target: faster ones first, then costs against a bound."""
    rows = [result for result in results.values() if "ratio" in result]
    return sorted(rows, key=lambda r: (r["direction"] != "at least", r["name"]))


def _markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _ratio_table(rows: Sequence[Result]) -> str:
    head = ("row", "what", "ratio (lowest to highest)", "target", "met")
    return _markdown(head, map(_ratio_line, rows))


def _ratio_line(row: Result) -> Sequence[str]:
    ratio = row["ratio"]
    spread = f"{_short(ratio['median'])} ({_short(ratio['min'])} to {_short(ratio['max'])})"
    title = row["title"] + _note(row)
    met = "yes" if row["met"] else "**no**"
    return f"`{row['name']}`", title, spread, f"{row['direction']} {row['target']:g}", met


def _note(row: Result) -> str:
    """What else a row found that belongs beside its ratio."""
    if found := row.get("conventional"):
        return f" (conventionally {_short(min(found))} to {_short(max(found))})"
    if seconds := row.get("ours_on_cpu"):
        ratio = median(row["baseline"]) / median(seconds)
        return f" (ratio {_short(ratio)} with our normalising on the CPU)"
    if alone := row.get("libraries_alone"):
        ratio = median(row["baseline"]) / median(alone)
        return f" ({_short(ratio)} if decoding and resizing were all there is)"
    return ""


def _short(value: float) -> str:
    """Two or three digits, as many as mean something."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _machines(rows: Sequence[Result]) -> str:
    found = {
        f"{m['cpu']}, {m['cores']} cores, Python {m['python']}, torch {m['torch']}"
        for m in (row["machine"] for row in rows)
    }
    busiest = max(row["machine"]["others"] for row in rows)
    dates = sorted({row["date"] for row in rows})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return f"{'; '.join(sorted(found))}; {when}. Other programs used at most {busiest:g} cores."


def _control_table(control: Result) -> str:
    """Microseconds a shard, steps by sizes, and how flat they are."""
    sizes = sorted({row["shards"] for row in control["rows"]})
    found = {(row["step"], row["shards"]): row for row in control["rows"]}
    head = ("step", *(f"{size:,} shards" for size in sizes), "cost a shard, last over first")
    flatness = control["flatness"]
    lines = [
        (step, *(_control_cell(found.get((step, size))) for size in sizes), _flat(flatness, step))
        for step in dict.fromkeys(row["step"] for row in control["rows"])
    ]
    limits = control["limits"]
    bound = (
        f"Limits: {limits['seconds']:g} s and {limits['peak_mb']:g} MB for each step, "
        f"{limits['flatness']:g} for the last column."
    )
    return f"{_markdown(head, lines)}\n\n{bound}"


def _control_cell(row: Result | None) -> str:
    return f"{row['seconds']:.1f} s, {row['peak_mb']:.0f} MB" if row else ""


def _flat(flatness: dict[str, float | None], step: str) -> str:
    value = flatness.get(step)
    return "" if value is None else f"{value:.2f}"


GPU_COLUMNS = {
    "part": "part",
    "name": "what",
    "mode": "mode",
    "samples_per_second": "samples/s",
    "tflops": "TFLOP/s",
    "share": "of the ceiling",
    "roofline": "roofline, samples/s",
    "of_roofline": "of the roofline",
    "mb_per_sample": "MB/sample",
    "launches": "launches a batch",
    "kernel_ms": "kernels, ms a batch",
    "launch_ms": "launching, ms a batch",
    "reserved_gb": "GB of the card",
    "new_shape_ms": "new shape, ms",
    "known_shape_ms": "known shape, ms",
    "bandwidth_tb": "TB/s",
    "limit": "limit",
}
"""Of the GPU benchmark's figures, those shown; the JSON has all."""


def _gpu_table(gpu: Result) -> str:
    """A table for each part, without columns in which it has no figure, and the commands."""
    parts = dict.fromkeys(row["part"] for row in gpu["rows"])
    tables = [_gpu_part([row for row in gpu["rows"] if row["part"] == part]) for part in parts]
    commands = dict.fromkeys([gpu.get("command", ""), *(r.get("command", "") for r in gpu["rows"])])
    said = "; ".join(f"`{command}`" for command in commands if command)
    return "\n\n".join([*tables, f"{gpu.get('date', '')}: {said}"])


def _gpu_part(rows: Sequence[Result]) -> str:
    shown = {k: v for k, v in GPU_COLUMNS.items() if any(k in row for row in rows)}
    return _markdown([*shown.values()], ([_cell(row.get(k, "")) for k in shown] for row in rows))


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
    return str(value)


def rewrite(folder: Path, readme: Path) -> None:
    """Put the tables between the README's markers, and the plot beside the results."""
    results = load(folder)
    before, rest = readme.read_text(encoding="utf-8").split(BEGIN)
    _, after = rest.split(END)
    text = f"{before}{BEGIN}\n\n{render(results)}\n\n{END}{after}"
    readme.write_text(text, encoding="utf-8")
    if rows := ratio_rows(results):
        plot(rows, folder / PLOT)


def plot(rows: Sequence[Result], path: Path) -> None:
    """Measured ratios as bars with whiskers from lowest to highest, and the targets as marks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    groups: list[tuple[str, Sequence[Result]]] = [
        (
            "times faster than the other way (more is better)",
            [r for r in rows if r["direction"] == "at least"],
        ),
        (
            "a cost over what it is held against (less is better)",
            [r for r in rows if r["direction"] == "at most"],
        ),
    ]
    groups = [(title, members) for title, members in groups if members]
    heights = [len(members) + 1.2 for _, members in groups]
    figure, axes = plt.subplots(
        len(groups),
        figsize=(9, 0.42 * sum(heights) + 0.6),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for (title, members), axis in zip(groups, axes[:, 0], strict=True):
        _bars(axis, title, members)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _bars(axis: Any, title: str, rows: Sequence[Result]) -> None:
    names = [row["name"] for row in rows]
    for place, row in enumerate(rows):
        ratio, colour = row["ratio"], GREEN if row["met"] else RED
        spread = [[ratio["median"] - ratio["min"]], [ratio["max"] - ratio["median"]]]
        whisker = {"ecolor": "black", "elinewidth": 1, "capsize": 3}
        axis.barh(place, ratio["median"], color=colour, height=0.62, xerr=spread, error_kw=whisker)
        axis.plot([row["target"]] * 2, [place - 0.42, place + 0.42], color="black", lw=2.4)
        label = f"{_short(ratio['median'])}  (target {row['target']:g})"
        right = max(ratio["max"], row["target"])
        axis.annotate(label, (right, place), (8, 0), textcoords="offset points", va="center")
    axis.set_yticks(range(len(rows)), names)
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.set_title(title, loc="left", fontsize=11)
    _scale(axis, rows)


def _scale(axis: Any, rows: Sequence[Result]) -> None:
    """From below the least ratio, so that every bar has a length, with room for the labels."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MultipleLocator, NullFormatter

    values = [value for row in rows for value in (*row["ratio"].values(), row["target"], 1)]
    low, high = min(values) * 0.8, max(values)
    axis.set_xlim(low, high * (high / low) ** 0.35)
    narrow = high < 4 * low
    axis.xaxis.set_major_locator(MultipleLocator(0.1) if narrow else LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.grid(axis="x", color=GREY, alpha=0.3)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
