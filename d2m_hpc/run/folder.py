"""Every path of a run."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from d2m_hpc.storage.files import FOLDER_MODE, make_folder


@dataclass(frozen=True)
class Submission:
    """The files of one submission: what was meant to run, and how it was configured."""

    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def config(self) -> Path:
        return self.folder / "config.yml"

    @property
    def frozen(self) -> Path:
        """Copies of the custom file and its modules, as `run.frozen` keeps them."""
        return self.folder / "frozen"

    @property
    def intent(self) -> Path:
        """JSON: when, by whom and for which fingerprint; written before anything is started."""
        return self.folder / "intent.json"

    @property
    def arrays(self) -> Path:
        """JSON: the job arrays, with their job ids once Slurm has taken them."""
        return self.folder / "jobs.json"

    def failed(self, stem: str) -> Path:
        """There, and empty, once a task of this submission has failed the shard."""
        return self.folder / "failed" / stem

    @property
    def extended(self) -> Path:
        """A folder with an empty file for each shard whose finished pair a task has extended."""
        return self.folder / "extended"

    @property
    def local(self) -> Path:
        """A lease that a `--local` submit holds while it works."""
        return self.folder / "local.lock"

    @property
    def chunks(self) -> Path:
        """JSON lines; line i is the list of shards of array task i."""
        return self.folder / "chunks.jsonl"

    @property
    def chunk_offsets(self) -> Path:
        """Where each line of `chunks` begins, in bytes; 64-bit little-endian numbers."""
        return self.folder / "chunks.offsets"


@dataclass(frozen=True)
class RunDir:
    """The run folder; the only place that knows the name of a file in it."""

    root: Path

    @property
    def config(self) -> Path:
        """The resolved config of the newest submission."""
        return self.root / "config.yml"

    @property
    def fingerprints(self) -> Path:
        """A JSON file for each config that was ever submitted."""
        return self.root / "fingerprints"

    def fingerprint(self, name: str) -> Path:
        """JSON: the parts of a config that decide what the output is; `name` is their hash."""
        return self.fingerprints / f"{name}.json"

    @property
    def schema(self) -> Path:
        """What no config or model declares, as the run's first tasks found it: types, files."""
        return self.root / "schema"

    def agreed(self, what: str, name: str) -> Path:
        """JSON: the type of a field, column or feature, or a file that a model opens.

        It is never changed once it is there.
        """
        digest = hashlib.sha256(f"{what}/{name}".encode("utf-8", "surrogatepass")).hexdigest()
        return self.schema / f"{digest[:24]}.json"

    @property
    def shards(self) -> Path:
        """Parquet: stem, url, size of every shard that was planned and not forgotten."""
        return self.root / "shards.parquet"

    @property
    def forgotten(self) -> Path:
        """JSON lines: shards that were taken out of the plan, and those that were put back."""
        return self.root / "forgotten.jsonl"

    @property
    def records(self) -> Path:
        return self.root / "records"

    @property
    def leases(self) -> Path:
        return self.root / "leases"

    @property
    def attempts(self) -> Path:
        """A JSON file for each shard that is in hand, or that no attempt has finished."""
        return self.root / "attempts"

    @property
    def progress(self) -> Path:
        return self.root / "progress"

    @property
    def node_failures(self) -> Path:
        """A JSON file for each task that its node could not start."""
        return self.root / "nodes"

    def starting(self, job: str, attempt: int) -> Path:
        """There until an array element's task has begun; made by its batch script."""
        return self.node_failures / f".{job}-{attempt}.tmp"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def hashes(self) -> Path:
        """JSON: sha256 of checkpoints by path, size and mtime, so that each is read once."""
        return self.root / "hashes.json"

    @property
    def wandb(self) -> Path:
        """What wandb keeps, with `logging: true`; the name is its own choice."""
        return self.root / "wandb"

    @property
    def submit_lock(self) -> Path:
        """Held while a submit decides and commits."""
        return self.root / "submit.lock"

    def record(self, submission: str, index: int, attempt: int) -> Path:
        return self.records / f"{submission}-{index}-{attempt}.jsonl"

    def lease(self, stem: str) -> Path:
        return self.leases / f"{stem}.lock"

    def progress_of(self, task: str) -> Path:
        """Of `submission-index-attempt`."""
        return self.progress / f"{task}.json"

    def log_of(self, submission: str, index: int) -> Path:
        return self.logs / f"{submission}-{index}.log"

    def submission(self, name: str) -> Submission:
        return Submission(self.root / "submissions" / name)

    def submissions(self) -> list[Submission]:
        """All submissions, oldest first."""
        folder = self.root / "submissions"
        names = (p for p in folder.iterdir() if p.name.isdecimal()) if folder.is_dir() else ()
        return [Submission(p) for p in sorted(names, key=lambda p: int(p.name))]

    def new_submission(self) -> Submission:
        """Make the next submission's folder; two callers at once get two folders."""
        make_folder(self.root / "submissions")
        last = self.submissions()
        number = int(last[-1].name) + 1 if last else 0
        while True:
            submission = self.submission(f"{number:03d}")
            try:
                submission.folder.mkdir(FOLDER_MODE)
                return submission
            except FileExistsError:
                number += 1

    def create(self) -> None:
        """Make the folders that tasks write into; never world-writable, whatever the umask."""
        for folder in (
            self.root,
            self.records,
            self.leases,
            self.attempts,
            self.progress,
            self.logs,
            self.node_failures,
        ):
            make_folder(folder)
