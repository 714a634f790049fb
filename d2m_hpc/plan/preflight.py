"""What would go wrong on every node, found at submit and all at once."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

from d2m_hpc.config import Config
from d2m_hpc.config.load import located
from d2m_hpc.errors import ConfigError, WeightsError
from d2m_hpc.plan import patterns
from d2m_hpc.plan.decide import absolute, checkpoint_hashes, missing_extras, run_dir
from d2m_hpc.plan.workload import has_plan
from d2m_hpc.run.folder import RunDir
from d2m_hpc.run.outputs import OutputDir
from d2m_hpc.storage import stores
from d2m_hpc.storage.lease import Lease
from d2m_hpc.storage.urls import is_local, is_pipe

PROBED = 3
"""Inputs that are opened: the first, the middle one and the last."""


def check(config: Config, where: str) -> patterns.Expansion:
    """Returns the inputs, so that nobody lists a million of them a second time.

    Raises:
        ConfigError: with everything that was found.
    """
    config = absolute(config)
    run = run_dir(config)
    inputs = patterns.expand(config.input_tars, sized=not has_plan(run, where))
    problems = [*_output(config), *_leases(run), *_inputs(inputs)]
    problems += [*_weights(config, run, where), *_custom_file(config), *missing_extras(config)]
    if problems:
        told = located(where, problems)
        raise ConfigError(f"{where}, preflight (--no-preflight skips it)", told)
    return inputs


def _output(config: Config) -> Iterator[str]:
    try:
        output = OutputDir(config.output_metadata_dir)
        output.make()
        if output.is_local:  # a store was asked already
            output.probe()
    except ConfigError as error:
        yield from error.mistakes


def _leases(run: RunDir) -> Iterator[str]:
    """Leases need exclusive creation of files, which a few network filesystems do not keep."""
    try:
        run.create()
        path = run.root / f".probe-{uuid.uuid4().hex}.lock"
        first, second = Lease(path), Lease(path)
        exclusive = first.claim() and not second.claim()
        first.release()
    except OSError as error:
        yield f"run_dir: {run.root} cannot be written: {error}"
        return
    if not exclusive:
        yield f"run_dir: two tasks could claim one shard in {run.root}; put it on another disk"


def _inputs(expansion: patterns.Expansion) -> Iterator[str]:
    yield from expansion.mistakes
    missing = set(expansion.missing)
    urls = [u for u in expansion.sizes if not is_pipe(u) and u not in missing]
    step = max(1, (len(urls) - 1) // (PROBED - 1))
    for url in dict.fromkeys([*urls[::step][: PROBED - 1], *urls[-1:]]):
        try:
            _read_some(url)
        except Exception as error:  # each store raises errors of its own
            yield f"input_tars: {url} cannot be read: {error}"


def _read_some(url: str) -> None:
    if is_local(url):  # fsspec would take `::` in a path for a chain of stores
        Path(url).open("rb").close()
    else:
        stores.peek(url)


def _weights(config: Config, run: RunDir, where: str) -> Iterator[str]:
    try:
        checkpoint_hashes(config, run, where)
    except WeightsError as error:
        yield str(error)


IMPORT = """
import sys
from d2m_hpc.config import Config
from d2m_hpc.config.load import located
from d2m_hpc.errors import ConfigError
from d2m_hpc.worker.compute.resolve import Toolbox
try:
    Toolbox.of(Config.model_validate_json(sys.stdin.read()))
except ConfigError as error:
    sys.exit("\\0" + "\\n".join(error.mistakes))
"""


def _custom_file(config: Config) -> Iterator[str]:
    """In a process of its own: the file imports torch, and may do anything else."""
    if config.custom_file is None:
        return
    # As in a task: without internet, and without what happens to lie in this folder.
    command = [sys.executable, "-P", "-c", IMPORT]
    environment = {"HF_HUB_OFFLINE": "1", **os.environ}
    done = subprocess.run(
        command, input=config.model_dump_json(), capture_output=True, text=True, env=environment
    )
    if done.returncode:
        # What precedes the mistakes is what the file's own imports had to say.
        mistakes = done.stderr.rpartition("\0")[2].strip()
        yield f"{config.custom_file}: {mistakes or 'it ended without a reason'}"
