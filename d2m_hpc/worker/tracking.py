"""Show a task's figures on Weights & Biases, with `logging: true`; no shard waits or fails for
it."""

from __future__ import annotations

import logging
import os
import threading
from typing import Any

from d2m_hpc.config import Config
from d2m_hpc.run.folder import RunDir
from d2m_hpc.run.tasks import Progress
from d2m_hpc.storage.urls import masked, masked_all

log = logging.getLogger(__name__)

PROJECT = "d2m_hpc"
EVERY_SECONDS = 10.0
START_SECONDS = 30.0
"""Seconds for logging in and for reaching the server."""
FINISH_SECONDS = 20.0
"""Seconds for sending the rest: Slurm usually gives a preempted task 30."""


class Tracker:
    """A context that reports a task's progress to a wandb run every few seconds.

    All of wandb runs in a thread of its own. A failure is logged once, and ends the reports.

    Args:
        run: holds wandb's own files.
        progress: of one attempt of a task; each attempt has its own wandb run.
    """

    def __init__(self, run: RunDir, config: Config, progress: Progress) -> None:
        self._run_dir, self._config, self._progress = run, config, progress
        self._rows, self._told = progress.rows, progress.started
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._track, name="wandb", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(FINISH_SECONDS)

    def _track(self) -> None:
        progress = self._progress
        try:
            tracked = _start(self._run_dir, self._config, progress.task)
            while not self._over.wait(EVERY_SECONDS):
                tracked.log(self._figures())
            tracked.log(self._figures())
            tracked.summary["state"] = progress.state
            tracked.finish(exit_code=int(progress.state not in ("finished", "out of time")))
        except Exception as error:
            log.warning("wandb failed; nothing more of this task is shown there: %s", error)

    def _figures(self) -> dict[str, float]:
        """The counts so far, and the speed since the last report."""
        progress = self._progress
        rows, seconds = progress.rows - self._rows, progress.updated - self._told
        self._rows, self._told = progress.rows, progress.updated
        return {
            "rows": progress.rows,
            "rejected": progress.rejected,
            "shards_done": progress.done,
            "shards_failed": progress.failed,
            "samples_per_second": rows / seconds if seconds > 0 else 0.0,
        }


def _start(run: RunDir, config: Config, task: str) -> Any:
    """Start a wandb run; WANDB_MODE, WANDB_PROJECT and the like apply."""
    import wandb

    wandb.setup(settings=wandb.Settings(login_timeout=START_SECONDS))  # it may ask at a terminal
    started = wandb.init(
        dir=str(run.wandb.parent),  # it makes the folder there
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        group=masked(config.output_metadata_dir).rstrip("/").rpartition("/")[2],
        name=task,
        config=masked_all(config.model_dump(mode="json")),
        settings=wandb.Settings(
            init_timeout=START_SECONDS,
            finish_timeout=FINISH_SECONDS,
            console="off",  # a task has a log of its own
            silent=True,
            disable_git=True,
        ),
    )
    log.info("wandb: run %s, %s, files in %s", started.id, started.settings.mode, started.dir)
    return started
