"""Faults of many kinds done to a run, by a seed, and the account of what came of it."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from kit import d2m, submit
from slurm.cluster import DEVCLUSTER, PATIENCE, Cluster, is_up, wait_until
from slurm.runs import Run, Tars, config_of
from test_resume import contents

from d2m_hpc.run.folder import RunDir
from d2m_hpc.run.records import read_records
from d2m_hpc.run.rounds import read
from d2m_hpc.watch.status import find_run
from d2m_hpc.watch.verify import verify

LEASE_SECONDS = 4.0
NEW_COLUMNS = ["text-characters", "image-contrast", "image-sharpness", "image-entropy"]
DISK_MIB = 24
GHOST_SECONDS = 30.0
"""Slurm itself gives a node 20 s to start a task's script."""

BAD = ("lost", "doubled", "wrong", "unfinished", "tracebacks")


@dataclass
class Account:
    """What faults did to one or more runs.

    Attributes:
        faults: how many of each kind were done.
        lost: shards that stayed undone after all faults were over.
        doubled: shards that two attempts put on record by one config, with the attempts.
        wrong: outputs that are missing, or other than those of an undisturbed run.
        unfinished: what the last submit said, where the run did not become complete.
        tracebacks: what a command printed where it should have said a line.
        rounds: those of a run that went on by itself, with the shards that each found done.
    """

    faults: Counter[str] = field(default_factory=Counter)
    shards: int = 0
    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    unfinished: list[str] = field(default_factory=list)
    tracebacks: list[str] = field(default_factory=list)
    rounds: list[str] = field(default_factory=list)

    def add(self, other: Account) -> None:
        self.faults += other.faults
        self.shards += other.shards
        for name in (*BAD, "rounds"):
            getattr(self, name).extend(getattr(other, name))

    def __str__(self) -> str:
        kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(self.faults.items()))
        bad = {k: getattr(self, k) for k in BAD}
        told = "; ".join(f"{len(v)} {k}" for k, v in bad.items())
        why = "".join(f"\n  {k}: {item}" for k, v in bad.items() for item in v)
        rounds = "".join(f"\n  {told}" for told in self.rounds)
        return f"{self.faults.total()} faults ({kinds}): {self.shards} shards, {told}{why}{rounds}"


class Disk:
    """A small filesystem for a run's outputs and its folder, which can be filled up."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        options = f"size={DISK_MIB}m"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)

    def fill(self) -> None:
        with suppress(OSError), open(self.folder / "filler", "wb", buffering=0) as file:
            while file.write(b"\0" * 4096):
                pass
        assert os.statvfs(self.folder).f_bavail == 0

    def free(self) -> None:
        (self.folder / "filler").unlink(missing_ok=True)

    def close(self) -> None:
        subprocess.run(["umount", "--lazy", self.folder], check=True)


class Chaos:
    """Does harm to a run; each fault says whether there was anything to harm.

    Most faults end after some seconds, while others are done.
    """

    def __init__(
        self,
        cluster: Cluster,
        tars: Tars,
        shards: int,
        folder: Path,
        seed: int,
        by_itself: bool = False,
    ) -> None:
        """
        Args:
            by_itself: no user submits again: the run has `--until-done`.
        """
        self.by_itself = by_itself
        self.cluster, self.tars, self.folder = cluster, tars, folder
        self.random = random.Random(seed)
        self.disk = Disk(folder / "disk")
        self.columns = 0
        self.run = self._run(shards)
        self.account = Account(shards=shards)
        self.last = ""
        self._undo: list[tuple[float, Callable[[], object]]] = []
        self._without_script: dict[str, float] = {}
        self.run.pace(0.5)

    def _run(self, shards: int) -> Run:
        return Run(self.cluster, self.tars, shards, self.folder, **self._values())

    def _values(self) -> dict[str, object]:
        columns = ["image-brightness", "image-phash", "text-words", "gated-length"]
        return {
            "output_metadata_dir": str(self.folder / "disk" / "out"),
            "run_dir": str(self.folder / "disk" / "out" / ".d2m"),
            "postprocess_columns": [*columns, *NEW_COLUMNS[: self.columns]],
            "shards_per_task": 4,
            "lease_seconds": LEASE_SECONDS,
            "max_attempts": 1000,
            "slurm": {"cpus_per_task": 2},
        }

    # --- one after another ---

    def go(self, kinds: Iterator[str], most: int) -> None:
        """Do so many faults while the run lasts, submitting again whenever it has no task left."""
        self.submit()
        if self.by_itself:  # nothing goes on that Slurm forgets before it is written down
            self.cluster.save(self._element())
        while self.account.faults.total() < most:
            self._wait_for_tasks()
            if self.is_done():
                break
            kind = next(kinds)
            fault: Callable[[], bool] = getattr(self, kind)
            if fault():
                self.account.faults[kind] += 1
            self._sleep(self.random.uniform(0.2, 2.0))

    def is_done(self) -> bool:
        out = self.folder / "disk" / "out"
        done = {p.stem for p in out.glob("*.parquet")}
        return len(done) == self.run.shards and not self.live()

    def _wait_for_tasks(self) -> None:
        """Until some task is at work that can be harmed."""
        end = time.monotonic() + 60
        while not self.workers() and time.monotonic() < end and not self.is_done():
            if not self.live() and self._needs_a_user():
                self.submit()
            self._release()
            self._cancel_ghosts()
            self._sleep(0.5)

    def _release(self) -> None:
        """Let go of what Slurm holds: a requeued task whose node was taken as it began, too.

        Also a round: who looks after a cluster does that, not who looks after a run.
        """
        if found := self.live(rounds=True):
            self._slurm("scontrol", "release", ",".join(line.split()[0] for line in found))

    def _cancel_ghosts(self) -> None:
        """Cancel what Slurm calls running and whose script is gone, as administrators do.

        A slurmctld that is killed has not saved its last seconds: it starts again with tasks as
        running that were requeued or ended in them. It misses them on their node within minutes.
        But where the node's word that such a task is over comes late, to the new slurmctld, that
        takes the node from the task, and calls it running, without a node, until its walltime ends.
        """
        asked = ("squeue", "-h", "-r", "-t", "RUNNING,SUSPENDED", "-o", "%i %A %S")
        listed = self.cluster.run(*asked, check=False).stdout.splitlines()
        scripts = self.cluster.run("pgrep", "-af", "^slurmstepd: .*batch", check=False).stdout
        gone = [line for line in listed if f"[{line.split()[1]}.batch]" not in scripts]
        now = time.monotonic()
        self._without_script = {line: self._without_script.get(line, now) for line in gone}
        for line, since in self._without_script.items():
            if now - since > GHOST_SECONDS:
                print(f"\nSlurm calls running what does not run: {line}", flush=True)
                self._slurm("scancel", line.split()[0])

    def _sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while True:
            now = time.monotonic()
            due = [item for item in self._undo if item[0] <= now]
            self._undo = [item for item in self._undo if item[0] > now]
            for _, undo in due:
                undo()
            if now >= end:
                return
            time.sleep(0.05)

    def _later(self, low: float, high: float, undo: Callable[[], object]) -> None:
        self._undo.append((time.monotonic() + self.random.uniform(low, high), undo))

    # --- what there is to harm ---

    def live(self, rounds: bool = False) -> list[str]:
        """`element state` of the run's tasks; none while slurmctld is away."""
        asked = ("squeue", "-h", "-r", "-o", "%i %T %j")
        lines = self.cluster.run(*asked, check=False).stdout.splitlines()
        tasks = (x.split() for x in lines if " d2m-" in x)
        return [" ".join(words[:2]) for words in tasks if rounds or not words[2].endswith("-next")]

    def _needs_a_user(self) -> bool:
        """Whether nothing submits by itself what is left; that is a fault where it should."""
        chain = read(RunDir(self.run.run_dir)) if self.by_itself else None
        if chain is not None and chain.state == "stopped":
            self._unfinished(str(chain))
        return chain is None or chain.state == "stopped"

    def workers(self) -> list[int]:
        command = f"^{sys.executable} -P -u -m d2m_hpc.worker {re.escape(str(self.run.run_dir))} "
        found = subprocess.run(["pgrep", "-f", command], capture_output=True, check=False).stdout
        return [int(pid) for pid in found.split()]

    def _signal(self, pid: int, number: signal.Signals) -> bool:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return False
        return True

    def _worker(self, number: signal.Signals) -> int:
        """One that got the signal; 0 where there is none."""
        pids = self.workers()
        pid = self.random.choice(pids) if pids else 0
        return pid if pid and self._signal(pid, number) else 0

    def _element(self, state: str = "") -> str:
        found = [x.split()[0] for x in self.live() if x.endswith(state)]
        return self.random.choice(found) if found else ""

    def _slurm(self, *words: str) -> bool:
        return self.cluster.run(*words, check=False).returncode == 0

    # --- what a user does ---

    def _said(self, ended: subprocess.CompletedProcess[str]) -> None:
        if "Traceback (most recent call last)" in ended.stdout + ended.stderr:
            self.account.tracebacks.append((ended.stdout + ended.stderr)[-2000:])

    def submit(self, *options: str) -> int:
        own = ("--until-done", "--max-rounds=1000") if self.by_itself else ()
        words = (self.run.config, "--no-preflight", *own, *options)
        patience = 2 * PATIENCE if "--wait" in options else PATIENCE
        try:
            ended = d2m("submit", *words, timeout=patience)
        except subprocess.TimeoutExpired as late:
            raise AssertionError(f"{late}\n{self._seen(words[0])}") from late
        self._said(ended)
        self.last = ended.stdout + ended.stderr
        return ended.returncode

    def _seen(self, config: Path) -> str:
        """What there is to see of a command that does not come back."""
        asked = ("squeue", "-r", "-o", "%i %T %r %N %M %j")
        shown = self.cluster.run(*asked, check=False).stdout + d2m("status", config).stdout
        processes = self.cluster.run("ps", "-eo", "pid,ppid,stat,wchan:24,etimes,args", "--forest")
        shown += "".join(
            line + "\n"
            for line in processes.stdout.splitlines()
            if "slurm" in line or "d2m" in line
        )
        for log in self.run.run_dir.rglob("*.out"):
            shown += f"{log.name}: {log.read_text(errors='replace')[-300:]}\n"
        return shown

    def two_submits(self) -> bool:
        both = [self.run.start_submit() for _ in range(2)]
        for each in both:
            said = each.communicate(timeout=PATIENCE)[0]
            self._said(subprocess.CompletedProcess("", each.returncode, said, ""))
        return True

    def new_column(self) -> bool:
        if self.columns == len(NEW_COLUMNS):
            return False
        self.columns += 1
        self._run(self.run.shards)  # writes the config
        # Rounds follow the run's config, so a user whose submit fails has to see to that.
        while self.submit() and self.by_itself:
            self._sleep(2)
        return True

    # --- what becomes of processes ---

    def kill(self) -> bool:
        return self._worker(signal.SIGKILL) > 0

    def freeze(self) -> bool:
        """For longer than its lease."""
        pid = self._worker(signal.SIGSTOP)
        if pid:
            thaw = lambda: self._signal(pid, signal.SIGCONT)  # noqa: E731
            self._later(1.5 * LEASE_SECONDS, 3 * LEASE_SECONDS, thaw)
        return pid > 0

    def poison(self) -> bool:
        """A shard kills every process that touches it, until somebody mends it."""
        path, shard = self.folder / "poison", self.random.randrange(self.run.shards)
        number = self.random.choice([signal.SIGSEGV, signal.SIGKILL])
        path.write_text(f"{int(number)} {shard}")
        self._later(5, 12, lambda: path.unlink(missing_ok=True))
        return True

    # --- what Slurm does ---

    def preempt(self) -> bool:
        where = ["--partition=high", "--exclusive", f"--nodelist={self._node()}"]
        return self._slurm("sbatch", "--output=/dev/null", *where, "--wrap=true")

    def requeue(self) -> bool:
        element = self._element(" RUNNING")
        return bool(element) and self._slurm("scontrol", "requeue", element)

    def hold(self) -> bool:
        element = self._element(" RUNNING")
        if not element or not self._slurm("scontrol", "requeuehold", element):
            return False
        self._later(3, 10, lambda: self._slurm("scontrol", "release", element))
        return True

    def suspend(self) -> bool:
        element = self._element(" RUNNING")
        if not element or not self._slurm("scontrol", "suspend", element):
            return False
        self._later(2, 10, lambda: self._slurm("scontrol", "resume", element))
        return True

    def walltime(self) -> bool:
        """What Slurm sends before it ends."""
        element = self._element(" RUNNING")
        return bool(element) and self._slurm("scancel", "--signal=USR2", element)

    def cancel_element(self) -> bool:
        element = self._element()
        return bool(element) and self._slurm("scancel", element)

    def cancel_array(self) -> bool:
        element = self._element()
        return bool(element) and self._slurm("scancel", element.partition("_")[0])

    # --- what becomes of machines ---

    def _node(self) -> str:
        return self.random.choice(["n1", "n2"])

    def _set_node(self, state: str) -> bool:
        node = self._node()
        words = ("scontrol", "update", f"nodename={node}", "reason=chaos")
        self._later(2, 8, lambda: self._slurm(*words[:3], "state=resume"))
        return self._slurm(*words, f"state={state}")

    def node_down(self) -> bool:
        return self._set_node("down")

    def node_drain(self) -> bool:
        return self._set_node("drain")

    def controller(self) -> bool:
        """slurmctld dies, now and then while a task's walltime ends, and starts again."""
        for pid in self.cluster.controllers():
            self._signal(pid, signal.SIGKILL)
        if self.random.random() < 0.5:
            self._worker(signal.SIGUSR2)
        self._later(1, 5, self._restart)
        return True

    def _restart(self) -> None:
        """One that forgot a task finds it twice on a node, and drains that."""
        self.cluster.up()
        self._later(10, 20, self._resume_nodes)

    def _resume_nodes(self) -> None:
        if is_up():
            self.cluster.resume_nodes()

    def full_disk(self) -> bool:
        self.disk.fill()
        self._later(1, 4, self.disk.free)
        return True

    # --- the end ---

    def heal(self) -> None:
        """End all faults, and let a user submit until the run is complete."""
        for _, undo in self._undo:
            undo()
        self._undo = []
        if not is_up():
            self.cluster.up()
        self.run.pace(0)
        self._suspend()
        if self.by_itself:
            wait_until(self._has_ended, 3 * PATIENCE)
            return
        for _ in range(8):
            with self._administered():
                if self.submit("--wait") == 0:
                    return
            self._suspend()
        self._unfinished(self.last[-2000:])

    def _unfinished(self, why: str) -> None:
        """Keep what tells how that came: the disk goes with the faults."""
        self.account.unfinished.append(why)
        kept = self.folder / f"unfinished-{len(self.account.unfinished)}"
        shutil.copytree(self.run.run_dir, kept)
        asked = ("squeue", "-r", "-t", "all", "-o", "%i %T %r %N %S %e %j")
        (kept / "squeue").write_text(self.cluster.run(*asked, check=False).stdout)

    def _suspend(self) -> None:
        """Suspend what runs, which goes on next: a slurmctld that died may have forgotten a
        suspension, which the node goes by."""
        for element in (line.split()[0] for line in self.live() if line.endswith(" RUNNING")):
            self._slurm("scontrol", "suspend", element)

    @contextmanager
    def _administered(self) -> Iterator[None]:
        """Slurm may drain a node, and hold a task that it could not start, while a submit waits."""
        over = threading.Event()

        def look() -> None:
            while not over.wait(2):
                self._let_run()

        self._let_run()
        administrator = threading.Thread(target=look)
        administrator.start()
        try:
            yield
        finally:
            over.set()
            administrator.join()

    def _let_run(self) -> None:
        """As administrators do; a slurmctld that forgot a task may drain its node only now."""
        if not is_up():  # it may die of what befell it, once its faults are over
            self.cluster.run(DEVCLUSTER / "up", check=False)
        self._resume_nodes()
        self._release()
        self._cancel_ghosts()
        if self._is_stopped():
            self._suspend()
            return
        for element in (line.split()[0] for line in self.live() if line.endswith(" SUSPENDED")):
            self._slurm("scontrol", "resume", element)

    def _is_stopped(self) -> bool:
        """Whether Slurm calls a task running whose processes are stopped: where it resumed the
        task at once, its node may have done that before it suspended it."""
        own = f"/slurm_script$|d2m_hpc.worker {re.escape(str(self.run.run_dir))} "
        stopped = subprocess.run(["pgrep", "-r", "T", "-f", own], capture_output=True, check=False)
        return bool(stopped.stdout) and not any(x.endswith(" SUSPENDED") for x in self.live())

    def _has_ended(self) -> bool:
        time.sleep(1)
        self._let_run()
        chain = read(RunDir(self.run.run_dir))
        if chain is None or chain.state == "running":
            return False
        if chain.state == "stopped":
            self._unfinished(str(chain))
        found = ", ".join(f"{r.done} of {r.shards}" for r in chain.rounds)
        self.account.rounds.append(f"{len(chain.rounds)} rounds, which found done: {found}")
        return True

    def close(self, truth: Callable[[int, int], dict[str, object]]) -> Account:
        """Compare with an undisturbed run's outputs.

        Args:
            truth: those, by the numbers of shards and of columns that were added.
        """
        want = truth(self.run.shards, self.columns)
        out = self.folder / "disk" / "out"
        found, account = contents(out), self.account
        stems = {f"{i:05d}" for i in range(self.run.shards)}
        account.lost += sorted(stems - {name[:5] for name in found})
        account.wrong += sorted(
            k for k in want.keys() | found.keys() if want.get(k) != found.get(k)
        )
        account.wrong += [f"{f.file} {f.what}" for f in verify(*find_run(self.run.run_dir)).faults]
        account.doubled += self._doubled()
        self.disk.close()
        return account

    def _doubled(self) -> list[str]:
        by: dict[tuple[str, str], list[str]] = {}
        for path in sorted((self.run.run_dir / "records").glob("*.jsonl")):
            for record in read_records(path):
                if record.state == "done":
                    key = (record.shard, record.fingerprint)
                    by.setdefault(key, []).append(f"{record.task} on {record.host} ({path.name})")
        return [f"{shard}: {', '.join(who)}" for (shard, _), who in by.items() if len(who) > 1]


KINDS = """
    kill freeze poison preempt requeue hold suspend walltime cancel_element cancel_array
    node_down node_drain controller full_disk two_submits new_column
""".split()  # noqa: SIM905 - a list of names reads better


USERS = {"two_submits", "new_column"}
"""The kinds in which a user submits."""


def order(seed: int, kinds: Collection[str]) -> Iterator[str]:
    """Kinds for ever, all in turn before one comes again."""
    shuffled = random.Random(seed)
    while True:
        yield from shuffled.sample(sorted(kinds), len(kinds))


class Truth:
    """What undisturbed `--local` runs make of a config, each computed once."""

    def __init__(self, tars: Tars, folder: Path) -> None:
        self.tars, self.folder = tars, folder
        self._known: dict[tuple[int, int], dict[str, object]] = {}

    def __call__(self, shards: int, columns: int) -> dict[str, object]:
        key = (shards, columns)
        if key not in self._known:
            folder = self.folder / f"truth-{shards}-{columns}"
            base = ["image-brightness", "image-phash", "text-words", "gated-length"]
            names = [*base, *NEW_COLUMNS[:columns]]
            config = config_of(folder, self.tars.folder, shards, postprocess_columns=names)
            ended = submit(config)
            assert ended.returncode == 0, ended.stdout + ended.stderr
            self._known[key] = contents(folder / "out")
        return self._known[key]
