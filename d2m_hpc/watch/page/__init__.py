"""`d2m report`: what a run did and made, as one HTML file that needs nothing besides itself."""

from __future__ import annotations

import time
from pathlib import Path

from d2m_hpc.config import Config
from d2m_hpc.plan import patterns
from d2m_hpc.plan.standing import standings
from d2m_hpc.run.folder import RunDir
from d2m_hpc.run.outputs import OutputDir
from d2m_hpc.storage.asked_for import require_writable, writing
from d2m_hpc.storage.files import atomic_write
from d2m_hpc.watch.page import columns, gantt, sheet, timing, values
from d2m_hpc.watch.page import frame as pages
from d2m_hpc.watch.page.history import History
from d2m_hpc.watch.status import summarise


def write(run: RunDir, config: Config, path: Path, score: str | None, each: int) -> None:
    """Make the page of a run, in whatever state that is.

    Args:
        path: of the HTML file, which is replaced as a whole.
        score: the column that the contact sheet is sorted by; None for the first score.
        each: samples at each end of the score.

    Raises:
        ConfigError: `score` names no column of numbers, or the file cannot be written.
    """
    require_writable(path)
    found = _find(run, config, score, each)
    parts = (
        pages.headline(found),
        timing.progress(found),
        gantt.tasks(found),
        timing.stages(found),
        values.values(found),
        values.contact_sheet(found),
        pages.faults(found),
        timing.slowest(found),
    )
    html = pages.page(f"d2m: {found.summary.output}", parts)
    with writing(path):
        atomic_write(path.absolute(), html.encode("utf-8"))


def _find(run: RunDir, config: Config, score: str | None, each: int) -> pages.Found:
    now = time.time()
    history = History.read(run)
    manifest = history.manifest
    output = OutputDir(config.output_metadata_dir)
    stood = standings(run, config, manifest)
    sampled = columns.sample(output, [*stood.done, *stood.outdated])
    preferred = [config.renamed(name) for name in config.postprocess_columns]
    chosen = sheet.choose_score(sampled.columns, score, preferred)
    made = sheet.Sheet()
    if chosen and each:
        urls = {s.stem: s for s in patterns.read_shards(run.shards)}
        shards = [urls[stem] for stem in sampled.shards if stem in urls]
        made = sheet.make(output, shards, chosen, each, config.max_image_pixels)
    summary = summarise(run, config, manifest, stood)
    return pages.Found(summary, config, history, sampled, made, stood.done, now)
