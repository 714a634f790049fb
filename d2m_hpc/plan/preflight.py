"""Find mistakes that would stop every task, at submit and all at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from d2m_hpc.config import Config
from d2m_hpc.errors import ConfigError
from d2m_hpc.gc_paused import gc_paused
from d2m_hpc.models.registry import Registry
from d2m_hpc.plan import patterns
from d2m_hpc.run import frozen
from d2m_hpc.run.folder import RunDir
from d2m_hpc.run.frozen import Custom
from d2m_hpc.run.outputs import OutputDir
from d2m_hpc.storage import stores
from d2m_hpc.storage.files import regular
from d2m_hpc.storage.lease import Lease
from d2m_hpc.storage.texts import ERROR, safe
from d2m_hpc.storage.urls import is_folder, is_local, is_pipe, scheme

PROBED = 3
"""The number of inputs that are opened: the first, the middle one and the last."""


def folders(config: Config, run: RunDir) -> Iterator[str]:
    """Find mistakes in the folders that tasks write into."""
    yield from _output(config)
    yield from _leases(run)


def _output(config: Config) -> Iterator[str]:
    try:
        output = OutputDir(config.output_metadata_dir)
        output.make()
        if output.is_local:  # `make` probes a store
            output.probe()
    except ConfigError as error:
        yield from error.mistakes


def _leases(run: RunDir) -> Iterator[str]:
    try:
        run.create()
        if not is_exclusive(run.root):
            yield f"run_dir: two tasks could claim one shard in {run.root}; put it on another disk"
    except OSError as error:
        yield f"run_dir: {run.root} cannot be written: {error}"


def is_exclusive(folder: Path) -> bool:
    """Check exclusive creation of files, which leases need and a few network filesystems lack."""
    path = folder / f".probe-{uuid.uuid4().hex}.lock"
    first, second = Lease(path), Lease(path)
    exclusive = first.claim() and not second.claim()
    first.release()
    return exclusive


def inputs(
    expansion: patterns.Expansion, config: Config, known: Registry, thorough: bool
) -> Iterator[str]:
    """Open a few inputs, and report those that cannot be read, or lack what the models take.

    Args:
        thorough: open tars, too; the columns of parquets are always looked at.
    """
    if not thorough and not config.inputs:
        return
    missing = set(expansion.missing)
    urls = [u for u in expansion.sizes if not (is_pipe(u) or is_folder(u) or u in missing)]
    step = max(1, (len(urls) - 1) // (PROBED - 1))
    for url in dict.fromkeys([*urls[::step][: PROBED - 1], *urls[-1:]]):
        try:
            # A URL that is signed for a GET refuses whatever else the columns would take.
            if config.inputs and url.endswith(".parquet") and scheme(url) not in stores.WEB:
                _require_columns(url, config, known)
            else:
                _read_some(url)
        except Exception as error:  # each store raises errors of its own
            yield f"{expansion.key}: {url} cannot be read: {error}"


def _read_some(url: str) -> None:
    if is_local(url):  # fsspec would read `::` in a path as a chain of stores
        open(url, "rb", opener=regular).close()
    else:
        stores.peek(url)


def _require_columns(url: str, config: Config, known: Registry) -> None:
    """Raise `ValueError` for a parquet that lacks a column which the models need."""
    import pyarrow as pa
    import pyarrow.parquet as pq  # the import takes longer than most commands do

    from d2m_hpc.worker.read.columns import choose

    fs, path = stores.filesystem(url)
    with fs.open(path, "rb") as file:
        try:
            schema = pq.read_schema(file)
        except pa.ArrowException:  # damaged, which fails its shard alone
            return
    choose(schema, config, kinds(config, known))


def kinds(config: Config, known: Registry) -> set[str]:
    """The kinds of members that a config's models take, besides fields."""
    from d2m_hpc.worker.read.names import needed

    models = filter(None, map(known.models.get, config.model_names))
    return needed(config, {raw for model in models for raw in model.raw_inputs}) - {"json"}


def described(file: Path) -> tuple[Custom, list[str]]:
    """Run a custom file in a process of its own; returns its names and modules, and its mistakes.

    The process runs the file as a task would: without internet, and without modules of this folder.
    """
    from d2m_hpc.worker import supervise

    with tempfile.TemporaryDirectory(prefix="d2m-") as name:
        folder = Path(name)
        code, said = _in_fork(file, folder) if supervise.is_child() else _apart(file, folder)
        told = folder / "mistakes.json"
        if told.exists():
            return Custom(), [f"{file}: {m}" for m in json.loads(told.read_bytes())]
        if code or not (folder / "custom.json").exists():  # a file may end its process with 0
            why = said.strip().split("\n")[-1] or f"it ended with {code}"
            return Custom(), [f"{file}: custom_pypath: importing it failed: {safe(why, ERROR)}"]
        return frozen.read(folder), []


def _apart(file: Path, folder: Path) -> tuple[int, str]:
    """How a new process ended, and what it wrote to stderr."""
    command = [sys.executable, "-P", "-m", "d2m_hpc.worker.describe", str(file), str(folder)]
    environment = {"HF_HUB_OFFLINE": "1", **os.environ}
    done = subprocess.run(
        command, capture_output=True, text=True, errors="replace", env=environment
    )
    return done.returncode, done.stderr


def _in_fork(file: Path, folder: Path) -> tuple[int, str]:
    """The same of a fork of this process, which computes later: one import of torch is for both."""
    with gc_paused():
        from d2m_hpc.worker import describe

    errors = folder / "errors"
    return describe.in_fork(file, folder, errors), errors.read_text(errors="replace")
