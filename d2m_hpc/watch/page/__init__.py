"""`d2m report`: what a run did and made, as one HTML file that needs nothing besides itself.

`page.html.j2` holds all markup and words of the page; the modules beside it compute its figures.
"""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from d2m_hpc.config import Config
from d2m_hpc.plan.standing import standings
from d2m_hpc.run.folder import RunDir
from d2m_hpc.run.outputs import OutputDir
from d2m_hpc.run.shards import read_shards
from d2m_hpc.storage import asked_for
from d2m_hpc.storage.urls import masked
from d2m_hpc.watch.page import charts, columns, sheet, timing, values
from d2m_hpc.watch.page.history import History
from d2m_hpc.watch.status import summarise
from d2m_hpc.watch.terminal import count, duration, figures, ran_on

_UNREADABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
"""Control characters and lone surrogates: no HTML can hold them."""
_PICTURE = re.compile(r"data:image/jpeg;base64,[A-Za-z0-9+/]*={0,2}")
"""A data URL, in which nothing is a secret however much it looks like one."""
_BETWEEN_TAGS = re.compile(r">\s*\n\s*<")


def write(run: RunDir, config: Config, path: Path, score: str | None, each: int) -> None:
    """Make the page of a run, whatever state the run is in.

    Args:
        path: of the HTML file, which is replaced as a whole.
        score: the column that the contact sheet is sorted by; None for the first score.
        each: samples at each end of the score.

    Raises:
        ConfigError: `score` names no column to sort by, or the file cannot be written.
    """
    asked_for.require_writable(path)
    template = environment().get_template("page.html.j2")
    page = _BETWEEN_TAGS.sub("><", template.render(_contents(run, config, score, each)))
    asked_for.write(path, [page.encode("utf-8")])


def _contents(run: RunDir, config: Config, score: str | None, each: int) -> dict[str, Any]:
    """Everything that the template names."""
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
        made = sheet.make(output, shards, chosen, each, config.max_image_pixels)
    begin, end = history.span
    axis = charts.time_axis(end - begin, moment(begin)) if end else None
    drawn = timing.progress(history, stood.done, summary.shards, axis) if axis else []
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
        "cards": [values.card(column) for column in sampled.columns],
        "hosts": timing.hosts(history.manifest.done.values()),
        "stages": timing.STAGES,
        "slow_factor": timing.SLOW,
    }


def environment() -> Environment:
    """What templates are rendered by: everything that they print is masked and escaped.

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
    made.filters |= {"count": count, "duration": duration, "moment": moment}
    made.filters |= {"number": charts.number, "percent": charts.percent}
    made.filters |= {"figures": figures, "ran_on": ran_on}
    return made


def printed(value: object) -> object:
    """A value as a page prints it, before it is escaped.

    Texts are without secrets and without what no HTML can hold; whole numbers have separators of
    thousands, others one digit after the point.
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
