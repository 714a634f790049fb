"""The page: its frame, the figures at its head, and what went wrong."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files

from d2m_hpc.config import Config
from d2m_hpc.run.manifest import Outcome
from d2m_hpc.watch.page.columns import Sampled
from d2m_hpc.watch.page.history import History
from d2m_hpc.watch.page.markup import Markup, described, element, join, table
from d2m_hpc.watch.page.sheet import Sheet
from d2m_hpc.watch.status import Summary
from d2m_hpc.watch.terminal import duration

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""Whatever a caption says, the browser runs no script and asks nobody for anything."""
GROUPS = 20
"""Kinds of failures, and reasons, that are listed."""
NAMED = 5
"""Shards that are named of a kind of failure."""


@dataclass
class Found:
    """All that the page is made of.

    Attributes:
        done: shards that are, as the newest submission asks; those that are to be extended are not.
        now: in seconds since the epoch.
    """

    summary: Summary
    config: Config
    history: History
    sampled: Sampled
    sheet: Sheet
    done: dict[str, Outcome]
    now: float


def moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))


def page(title: str, sections: Iterable[Markup]) -> Markup:
    """A whole document, which needs nothing besides itself."""
    style = files(__package__).joinpath("style.css").read_text(encoding="utf-8")
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("style", Markup(style)),
    )
    body = element("body", element("main", *sections))
    return Markup("<!DOCTYPE html>\n" + element("html", head, body, lang="en") + "\n")


def section(title: str, *content: object) -> Markup:
    return element("section", element("h2", title), *content)


def note(*words: object) -> Markup:
    return element("p", *words, class_="soft")


def headline(found: Found) -> Markup:
    """What the run is, and its figures."""
    summary, now = found.summary, moment(found.now)
    states = {
        "complete": f"All shards are done. This page was made at {now}.",
        "running": f"The run is still running; this page shows it as it was at {now}.",
        "failed": f"The run ended with failed shards. This page was made at {now}.",
        "pending": f"Shards are left, and no task is at work. This page was made at {now}.",
    }
    return join(
        [
            element("h1", "Run ", element("code", summary.run_dir)),
            element("p", states[summary.state]),
            described(_figures(summary), "headline"),
            element("h3", "What is computed"),
            described(_configured(found.config), "pairs"),
        ]
    )


def _figures(summary: Summary) -> list[tuple[str, str]]:
    tried = summary.rows + summary.rejected
    share = f" ({summary.rejected / tried:.2%})" if summary.rejected else ""
    return [
        ("shards", f"{summary.shards:,}"),
        ("done", f"{summary.done:,}"),
        ("failed", f"{summary.failed:,}"),
        ("running", f"{summary.running:,}"),
        ("pending", f"{summary.pending:,}"),
        ("rows", f"{summary.rows:,}"),
        ("rejected samples", f"{summary.rejected:,}{share}"),
        ("samples a second", f"{summary.samples_per_second:,.1f}"),
        ("GPU hours", f"{summary.gpu_hours:,.1f}"),
        ("time left", duration(summary.eta_seconds) if summary.running else "nothing runs"),
    ]


def _configured(config: Config) -> list[tuple[str, object]]:
    many = len(config.input_tars)
    tars = config.input_tars[0] + (f" and {many - 1} more patterns" if many > 1 else "")
    how = f"batches of {config.batch_size}, amp {config.amp}, resize {config.resize}, "
    how += f"device {config.device}"
    return [
        ("tars", element("code", tars)),
        ("output", element("code", config.output_metadata_dir)),
        ("models", ", ".join(config.models)),
        ("columns", ", ".join(config.postprocess_columns) or "none"),
        ("features", ", ".join(config.postprocess_features) or "none"),
        ("additional fields", ", ".join(config.additional_fields) or "none"),
        ("how", how),
    ]


def faults(found: Found) -> Markup:
    """Rejected samples by reason, failed shards by kind, nodes that could not start tasks."""
    parts = [*_rejections(found), *_failures(found.summary)]
    if noticed := found.summary.notices:
        counted = ((text, f"{n:,}") for text, n in noticed.items())
        parts += [
            element("h3", "Noted of shards"),
            table(("what, of one of them", "shards"), counted, figures=1),
        ]
    nodes = found.summary.broken_nodes
    if nodes:
        parts += [
            element("h3", "Nodes that could not start tasks"),
            table(("node", "last reason"), nodes.items()),
        ]
    return section("Rejections and failures", *parts)


def _rejections(found: Found) -> list[Markup]:
    counts, examples = found.summary.rejections, found.history.examples
    if not counts:
        return [note("No sample was rejected in a finished shard.")]
    shown = list(counts.items())[:GROUPS]
    rows = ((reason, _examples(examples.get(reason, ())), f"{n:,}") for reason, n in shown)
    more = len(counts) - len(shown)
    return [
        element("h3", "Samples rejected in finished shards"),
        table(("reason", "for example", "samples"), rows, figures=1),
        *([note(f"And {more:,} more reasons.")] if more else []),
    ]


def _examples(known: Iterable[tuple[str, str]]) -> Markup:
    return join(element("div", element("code", k), " in ", element("code", s)) for k, s in known)


def _failures(summary: Summary) -> list[Markup]:
    if not summary.failures:
        return [note("No shard has failed and is not done since.")]
    rows = (
        (f.kind, f.error, element("code", f.log), _named(f.shards), f"{len(f.shards):,}")
        for f in summary.failures[:GROUPS]
    )
    more = len(summary.failures) - GROUPS
    return [
        element("h3", "Shards that failed"),
        table(("kind", "message of one", "its log", "for example", "shards"), rows, figures=1),
        *([note(f"And {more:,} more kinds.")] if more > 0 else []),
    ]


def _named(stems: list[str]) -> str:
    return ", ".join(stems[:NAMED]) + (", ..." if len(stems) > NAMED else "")
