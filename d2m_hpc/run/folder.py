"""The path of every file in a run folder."""

from __future__ import annotations

import hashlib
from pathlib import Path

from d2m_hpc.storage.files import FOLDER_MODE, make_folder


class Submission:
    """The files of one submission: what was meant to run, and how it was configured."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = folder.name
        self.config = folder / "config.yml"
        self.frozen = folder / "frozen"
        """Copies of the custom file and its modules, as `run.frozen` keeps them."""
        self.intent = folder / "intent.json"
        """JSON: when, by whom and for which fingerprint; written before any task starts."""
        self.arrays = folder / "jobs.json"
        """JSON: the job arrays, with their job ids once Slurm has taken them."""
        self.extended = folder / "extended"
        """A folder with an empty file for each shard whose finished pair a task has extended."""
        self.local = folder / "local.lock"
        """A lease that a `--local` submit holds while it works."""
        self.chunks = folder / "chunks.jsonl"
        """JSON lines; line i is the list of shards of array task i."""
        self.chunk_offsets = folder / "chunks.offsets"
        """Where each line of `chunks` begins, in bytes; 64-bit little-endian numbers."""

    def failed(self, stem: str) -> Path:
        """An empty file, made when a task of this submission has failed the shard."""
        return self.folder / "failed" / stem


class RunDir:
    """The run folder; the only place that knows the name of a file in it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config = root / "config.yml"
        """The resolved config of the newest submission."""
        self.fingerprints = root / "fingerprints"
        """A JSON file for each config that was ever submitted."""
        self.schema = root / "schema"
        """Types and files that no config or model declares, as the run's first tasks found them."""
        self.shards = root / "shards.parquet"
        """Parquet: stem, url, size of every shard that was planned and not forgotten."""
        self.forgotten = root / "forgotten.jsonl"
        """JSON lines: shards that were taken out of the plan, and those that were put back."""
        self.records = root / "records"
        self.leases = root / "leases"
        self.attempts = root / "attempts"
        """A JSON file for each shard that is in hand, or that no attempt has finished."""
        self.progress = root / "progress"
        self.node_failures = root / "nodes"
        """A JSON file for each task that its node could not start."""
        self.logs = root / "logs"
        self.hashes = root / "hashes.json"
        """JSON: sha256 of checkpoints by path, size and mtime, so that each is read once."""
        self.compiled = root / "compiled"
        """What torch has compiled for the nets, so that the next tasks need not; torch chose the
        names."""
        self.wandb = root / "wandb"
        """The folder of wandb, with `logging: true`; wandb chose the name."""
        self.rounds = root / "rounds.json"
        """JSON: how the run goes on by itself, and what each round found."""
        self.derived = root / "derived"
        """What the first steps of `d2m derive` found: npz of centroids and the like."""
        self.exports = root / "exports"
        """JSON lines: the kept keys of each `subset-tars` that array tasks write."""
        self.submit_lock = root / "submit.lock"
        """A lease that a submit holds while it decides and commits."""

    def fingerprint(self, name: str) -> Path:
        """JSON: the values of a config that decide the output; `name` is their hash."""
        return self.fingerprints / f"{name}.json"

    def agreed(self, what: str, name: str) -> Path:
        """JSON: the type of a field, column or feature, or a file that a model opens.

        The file never changes once it is there.
        """
        digest = hashlib.sha256(f"{what}/{name}".encode("utf-8", "surrogatepass")).hexdigest()
        return self.schema / f"{digest[:24]}.json"

    def starting(self, job: str, attempt: int) -> Path:
        """A file of an array element's batch script, there until the element's task has begun."""
        return self.node_failures / f".{job}-{attempt}.tmp"

    def record(self, submission: str, index: int, attempt: int) -> Path:
        return self.records / f"{submission}-{index}-{attempt}.jsonl"

    def lease(self, stem: str) -> Path:
        return self.leases / f"{stem}.lock"

    def progress_of(self, task: str) -> Path:
        """JSON: the progress of the task `submission-index-attempt`."""
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
        make_folder(self.root)
        for folder in (self.records, self.leases, self.attempts, self.progress, self.logs):
            make_folder(folder)
        make_folder(self.node_failures)
