"""`d2m report`: the course and the outputs of a run, as one HTML file without other files.

`page.html.j2` holds all markup and words; the modules beside it compute the figures.
"""

from __future__ import annotations

import re
import time
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from d2m_hpc.config import Config
from d2m_hpc.models.entries import one_line
from d2m_hpc.plan.standing import standings
from d2m_hpc.run.folder import RunDir
from d2m_hpc.run.outputs import OutputDir
from d2m_hpc.run.shards import read_shards
from d2m_hpc.storage import asked_for
from d2m_hpc.storage.texts import counted
from d2m_hpc.storage.urls import masked
from d2m_hpc.watch.page import charts, columns, sheet, timing
from d2m_hpc.watch.page.history import History
from d2m_hpc.watch.status import summarise
from d2m_hpc.watch.terminal import duration, figures, ran_on

_UNREADABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
"""Control characters and lone surrogates, which HTML cannot hold."""
_PICTURE = re.compile(r"data:image/jpeg;base64,[A-Za-z0-9+/]*={0,2}")
"""A data URL, which may look like a secret and never is one."""
_BETWEEN_TAGS = re.compile(r">\s*\n\s*<")


def write(run: RunDir, config: Config, path: Path, score: str | None, each: int) -> None:
    """Make the page of a run in any state.

    Args:
        path: of the HTML file, which is replaced whole.
        score: the column that sorts the contact sheet; None for the first score.
        each: samples at each end of the score.

    Raises:
        ConfigError: `score` names no column to sort by, or the file cannot be written.
    """
    asked_for.require_writable(path)
    asked_for.write(path, [rendered(run, config, score, each)[0]])


def rendered(run: RunDir, config: Config, score: str | None, each: int) -> tuple[bytes, bool]:
    """The page, and whether the run is complete; the arguments are those of `write`."""
    contents = _contents(run, config, score, each)
    page = environment().get_template("page.html.j2").render(contents)
    return _BETWEEN_TAGS.sub("><", page).encode("utf-8"), contents["summary"].complete


def _contents(run: RunDir, config: Config, score: str | None, each: int) -> dict[str, Any]:
    """Compute every value that the template names."""
    now = time.time()
    history = History.read(run)
    output = OutputDir(config.output_metadata_dir)
    stood = standings(run, config, history.manifest)
    summary = summarise(run, config, history.manifest, stood)
    sampled = columns.sample(output, [*stood.done, *stood.outdated])
    preferred = [config.renamed(name) for name in config.postprocess_columns]
    chosen = sheet.choose_score(sampled.columns, score, preferred)
    made = sheet.Sheet()
    if chosen and each:
        urls = {s.stem: s for s in read_shards(run.shards)}
        shards = [urls[stem] for stem in sampled.shards if stem in urls]
        made = sheet.make(output, shards, chosen, each, config)
    begin, end = history.span
    axis = charts.time_axis(end - begin, moment(begin)) if end else None
    computed = history.manifest.computed
    drawn = timing.progress(history, computed(stood.done), summary.shards, axis) if axis else []
    return {
        "now": now,
        "begin": begin,
        "axis": axis,
        "config": config,
        "summary": summary,
        "history": history,
        "progress": drawn,
        "sampled": sampled,
        "sheet": made,
        "cards": [columns.card(column) for column in sampled.columns],
        "hosts": timing.hosts(computed(history.manifest.done).values()),
        "stages": timing.STAGES,
        "slow_factor": timing.SLOW,
    }


@cache
def environment() -> Environment:
    """The environment of templates, which masks and escapes every printed value.

    A process keeps one, as compiling the templates takes longer than filling them.

    `environment().from_string("<b>{{ x }}</b>").render(x="<i>")` is `<b>&lt;i&gt;</b>`.
    """
    made = Environment(
        loader=PackageLoader(__name__, "."),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=printed,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"count": counted, "duration": duration, "moment": moment}
    made.filters |= {"number": charts.number, "percent": charts.percent}
    made.filters |= {"figures": figures, "ran_on": ran_on, "one_line": one_line}
    return made


def printed(value: object) -> object:
    """A value as text, before it is escaped.

    Texts lose secrets and characters that HTML cannot hold; whole numbers get separators of
    thousands, other numbers one digit after the point.
    """
    if hasattr(value, "__html__"):  # a macro's
        return value
    if isinstance(value, int | float):
        return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"
    text = str(value)
    shown = text if _PICTURE.fullmatch(text) else masked(text)
    return _UNREADABLE.sub("\ufffd", shown)


def moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
