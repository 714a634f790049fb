"""A run that goes on by itself, round by round; tests/slurm has it on a real Slurm."""

from __future__ import annotations

import json
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pytest
from kit import d2m as command
from kit import submit
from launch.scripted import commands_of, six_tasks

import d2m_hpc as d2m
from d2m_hpc.config.load import load
from d2m_hpc.errors import D2MError, SlurmError
from d2m_hpc.launch import rounds, slurm
from d2m_hpc.plan import workload
from d2m_hpc.run.folder import RunDir
from d2m_hpc.run.rounds import Chain, Rounds, read

ANSWERS = (
    'echo "$@" >> {folder}/asked; cat > {folder}/script; echo $((70 + $(wc -l < {folder}/asked)))'
)
REFUSAL = "echo 'sbatch: error: AssocMaxSubmitJobLimit' >&2; exit 1"


class Site:
    """A scripted Slurm that takes every job and runs none."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.patch, self.bin = folder, monkeypatch, folder / "bin"
        self.config = six_tasks(folder, slurm={"rounds": {"partition": "cpu", "mem": "2G"}})
        self.run = RunDir(folder / "out" / ".d2m")
        commands_of(self.bin, monkeypatch, scontrol="true", scancel=f'echo "$@" >> {folder}/gone')
        self.takes(ANSWERS.format(folder=folder))
        self.lists()

    def takes(self, line: str) -> None:
        commands_of(self.bin, self.patch, sbatch=line)

    def lists(self, *jobs: tuple[str, str], elements: int = 1) -> None:
        """Running elements, by job id and name."""
        rows = (f"{job}|{i}|RUNNING|None|n1|{name}" for job, name in jobs for i in range(elements))
        lines = "".join(f"{row}\\n" for row in rows)
        commands_of(self.bin, self.patch, squeue=f"printf '{lines}'")

    def asked(self) -> list[str]:
        """The words of each sbatch."""
        path = self.folder / "asked"
        return path.read_text().splitlines() if path.exists() else []

    def begin(self, **wish: object) -> None:
        d2m.submit(self.config, preflight=False).go_on(**wish)  # type: ignore[arg-type]

    def again(self) -> Chain:
        self.lists()
        return rounds.again(self.run)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    return Site(tmp_path, monkeypatch)


def test_a_round_waits_for_the_arrays_and_submits_what_they_left(site: Site) -> None:
    run = d2m.submit(site.config, preflight=False)
    [array] = slurm.arrays_of(site.run)["000"]
    site.lists(("71", array.name))
    run.go_on()
    own = site.asked()[-1]
    for option in ("--dependency=afterany:71", "--partition=cpu", "--mem=2G", "--array=0-0"):
        assert option in own.split()
    chain = site.again()
    assert (chain.state, len(chain.rounds)) == ("running", 1)
    assert [len(slurm.read_arrays(s)) for s in site.run.submissions()] == [1, 1]
    assert "-next --array=0-0" in site.asked()[-1]
    assert f"again {site.run.root}" in (site.folder / "script").read_text()


def test_a_round_of_a_derive_derives_what_is_left(site: Site) -> None:
    derive = {"wordy": {"kind": "sql", "type": "bool", "expression": '"text-words" > 1'}}
    config = six_tasks(site.folder, derive=derive)
    d2m.submit(config, local=True)
    d2m.derive(config).go_on()
    assert "-next --array=0-0" in site.asked()[-1]
    chain = site.again()
    assert (chain.state, chain.rounds[0].done) == ("running", 0)
    first, *later = (json.loads(s.intent.read_bytes()) for s in site.run.submissions())
    assert [i["fingerprint"].partition("+")[0] for i in later] == [first["fingerprint"]] * 2
    d2m.derive(config, local=True)
    assert site.again().state == "complete"


def test_a_complete_run_ends_it_starts_the_next_job_and_tells(site: Site) -> None:
    site.begin(then="echo trained > here", notify='echo "$D2M_STATE: $D2M_WHY" > ../told')
    site.patch.chdir(site.bin)
    assert submit(site.config).returncode == 0
    before = len(site.asked())
    chain = site.again()
    assert (chain.state, chain.ended) == ("complete", "the run is complete")
    [then] = site.asked()[before:]
    assert "--job-name=d2m-then" in then
    assert (site.folder / "script").read_text().splitlines()[-1] == "echo trained > here"
    assert (site.folder / "told").read_text() == "complete: the run is complete\n"
    assert d2m.open(site.run.root).status().rounds == str(chain)


def test_rounds_that_come_to_nothing_stop(site: Site) -> None:
    site.begin(notify=f"echo $D2M_STATE >> {site.folder}/told")
    assert [site.again().state for _ in range(3)] == ["running", "running", "stopped"]
    chain = read(site.run)
    assert chain is not None
    nothing, why = chain.ended.split("; ")
    assert nothing == "2 rounds in a row came to nothing"
    assert why == "6 array tasks ended with 6 shards left (Slurm does not remember how)"
    before = len(site.asked())
    assert site.again().state == "stopped"
    assert len(site.asked()) == before
    assert (site.folder / "told").read_text() == "stopped\n"


@pytest.mark.parametrize(
    ("states", "ended"),
    [
        (["CANCELLED"], "running"),
        (["PREEMPTED"], "running"),
        (["FAILED"], "stopped"),
        (["FAILED", "OUT_OF_MEMORY"], "running"),
    ],
)
def test_rounds_whose_tasks_were_taken_away_or_ended_for_many_reasons_do_not_stop_it(
    site: Site, states: list[str], ended: str
) -> None:
    site.begin()
    for state in islice(cycle(states), 5):
        [*_, array] = [a for arrays in slurm.arrays_of(site.run).values() for a in arrays]
        rows = "".join(f"{array.job_id}|{i}|{state}|None||{array.name}\\n" for i in range(6))
        commands_of(site.bin, site.patch, squeue=f"printf '{rows}'")
        chain = rounds.again(site.run)
    assert chain.state == ended


def test_no_more_rounds_than_allowed(site: Site) -> None:
    site.begin(most=1)
    assert site.again().state == "running"
    chain = site.again()
    assert chain.ended == "there were as many rounds as --max-rounds allows"
    assert str(chain).startswith("1 of at most 1 round; ")


def test_a_refused_submit_is_tried_again_later(site: Site) -> None:
    site.begin()
    limit = f"case $* in *-next*) {ANSWERS.format(folder=site.folder)};; *) {REFUSAL};; esac"
    site.takes(limit)
    chain = site.again()
    assert chain.state == "running"
    assert "AssocMaxSubmitJobLimit" in chain.rounds[-1].trouble
    assert "AssocMaxSubmitJobLimit" in d2m.open(site.run.root).status().rounds
    for _ in range(8):
        assert site.again().state == "running"
    begins = [word for words in site.asked() for word in words.split() if "--begin" in word]
    waits = [0, 30, 60, 120, 240, 480, 960, 1920, 3600, 3600]
    assert begins == [f"--begin=now+{seconds}" for seconds in waits]


def test_where_no_round_can_follow_that_is_on_record(site: Site) -> None:
    site.patch.setattr(rounds, "PAUSE", 0.01)
    site.begin(notify=f"echo $D2M_STATE >> {site.folder}/told")
    site.takes(f"case $* in *-next*) {REFUSAL};; *) echo 77;; esac")
    with pytest.raises(SlurmError):
        site.again()
    chain = read(site.run)
    assert chain is not None
    assert chain.ended.startswith("the next round could not be submitted: Slurm refused")
    assert (site.folder / "told").read_text() == "stopped\n"


def test_a_round_that_cannot_be_written_is_followed_all_the_same(site: Site) -> None:
    """As on a full disk: rounds that are in no record are rare, but none is the last."""
    site.begin()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with site.patch.context() as patch:
        patch.setattr(rounds, "write", full)
        assert site.again().state == "running"
    assert "--begin=now+3600" in site.asked()[-1]


def test_a_chain_that_broke_off_is_told(site: Site) -> None:
    site.begin()
    name = slurm.rounds_of(site.run).name
    site.lists(("72", name))
    assert d2m.open(site.run.root).status().rounds == "0 of at most 20 rounds"
    site.lists()
    assert "no further round waits" in d2m.open(site.run.root).status().rounds


def test_a_round_that_slurm_holds_is_told_with_what_helps(site: Site) -> None:
    site.begin()
    held = f"72|0|PENDING|launch failed requeued held||{slurm.rounds_of(site.run).name}"
    commands_of(site.bin, site.patch, squeue=f"printf '{held}\\n'")
    status = d2m.open(site.run.root).status()
    assert status.rounds == "0 of at most 20 rounds; Slurm does not start the next one"
    assert not status.goes_on
    [waiting] = status.waiting
    assert "`scontrol release 72`" in str(waiting)


def test_a_mistake_that_somebody_must_mend_stops_it(site: Site) -> None:
    site.begin()
    (site.folder / "tars").rename(site.folder / "elsewhere")
    chain = site.again()
    assert chain.state == "stopped"
    assert "found no tar" in chain.ended


def test_a_round_leaves_a_newer_submits_rounds_alone(site: Site) -> None:
    site.begin()
    before = len(site.asked())
    site.patch.setenv("SLURM_ARRAY_JOB_ID", "72")
    name = slurm.rounds_of(site.run).name
    site.lists(("72", name), ("99", name))
    rounds.again(site.run)
    assert all("-next" not in words for words in site.asked()[before:])
    site.lists(("72", name))
    rounds.again(site.run)
    assert "-next" in site.asked()[-1]


def test_a_round_that_slurm_forgot_is_submitted_again(site: Site) -> None:
    """A slurmctld that is killed forgets the jobs of its last seconds."""
    site.patch.setattr(rounds, "ON_DISK", 0)
    site.begin()
    before = len(site.asked())
    site.patch.setenv("SLURM_ARRAY_JOB_ID", "72")
    name = slurm.rounds_of(site.run).name
    site.lists(("72", name))
    chain = rounds.again(site.run)
    following = [words for words in site.asked()[before:] if "-next" in words]
    rounds.secure(site.run, chain)
    assert [w for w in site.asked()[before:] if "-next" in w] == following * 2
    before = len(site.asked())
    site.lists(("72", name), ("99", name))
    rounds.secure(site.run, chain)
    # The next round has come and gone meanwhile.
    site.patch.setenv("SLURM_ARRAY_JOB_ID", "99")
    rounds.again(site.run)
    site.patch.setenv("SLURM_ARRAY_JOB_ID", "72")
    done = len(site.asked())
    site.lists(("72", name))
    rounds.secure(site.run, chain)
    assert len(site.asked()) == done > before


def test_a_round_is_followed_though_the_one_before_has_not_ended(site: Site) -> None:
    site.begin()
    site.patch.setenv("SLURM_ARRAY_JOB_ID", "99")
    name = slurm.rounds_of(site.run).name
    site.lists(("72", name), ("99", name))
    rounds.again(site.run)
    assert "-next" in site.asked()[-1]


def test_a_round_does_not_bring_an_older_config_back(site: Site) -> None:
    """A user adds a column while the round waits for the run's lock."""
    site.begin()
    inspect = workload.inspect

    def overtaken(*given: Any, **named: Any) -> workload.Workload:
        site.patch.undo()
        asked = inspect(*given, **named)
        edited = site.config.read_text().replace("- text-words", "- text-words\n- text-characters")
        site.config.write_text(edited)
        commands_of(site.bin, site.patch)
        d2m.submit(site.config, preflight=False)
        return asked

    site.patch.setattr(workload, "inspect", overtaken)
    assert site.again().state == "running"
    assert "text-characters" in load(site.run.config, frozen=True).postprocess_columns
    assert len(site.run.submissions()) == 2
    site.again()
    assert "text-characters" in load(site.run.config, frozen=True).postprocess_columns
    assert len(site.run.submissions()) == 3


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("- text-words", "- text-words\n- text-characters"),
        ("shards_per_task: 1", "shards_per_task: 2"),
    ],
)
def test_a_round_follows_the_last_config_though_no_shard_was_left_for_its_submit(
    site: Site, before: str, after: str
) -> None:
    """All of them were with live tasks of an earlier config."""
    d2m.submit(site.config, preflight=False)
    [array] = slurm.arrays_of(site.run)["000"]
    site.lists(("71", array.name), elements=6)
    d2m.submit(site.config, preflight=False)
    assert len(site.run.submissions()) == 1
    assert before in site.config.read_text()
    site.config.write_text(site.config.read_text().replace(before, after))
    site.begin()
    assert site.again().state == "running"
    assert after in site.run.config.read_text()
    [*_, last] = site.run.submissions()
    assert len(slurm.read_arrays(last)) == 1
    assert after in last.config.read_text()


@pytest.mark.parametrize("command", ["squeue", "scancel"])
def test_a_cancel_while_slurmctld_is_away_says_when_to_try_again(
    site: Site, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    site.begin()
    site.lists(("99", slurm.rounds_of(site.run).name))
    away = "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1"
    commands_of(site.bin, monkeypatch, **{command: away})
    with pytest.raises(SlurmError, match=r"contact slurm .*`scontrol ping` .*; once slurmctld ans"):
        d2m.open(site.run.root).cancel()


def test_a_cancel_and_another_submit_end_the_rounds_before(site: Site) -> None:
    site.begin()
    name = slurm.rounds_of(site.run).name
    site.lists(("99", name))
    site.begin()
    d2m.open(site.run.root).cancel()
    assert (site.folder / "gone").read_text().splitlines() == ["99", "99"]


def test_a_run_without_rounds_or_with_a_damaged_record_says_so(site: Site) -> None:
    d2m.submit(site.config, preflight=False)
    with pytest.raises(D2MError, match="submit with --until-done"):
        rounds.again(site.run)
    site.begin()
    site.run.rounds.write_text("{")
    with pytest.raises(D2MError, match=r"rounds\.json"):
        rounds.again(site.run)


def test_the_record_is_for_its_user_alone(site: Site) -> None:
    site.begin(notify="curl -H 'Authorization: hush'")
    assert site.run.rounds.stat().st_mode & 0o077 == 0
    assert json.loads(site.run.rounds.read_text())["wish"]["most"] == 20


def test_the_command_line_begins_it_and_shows_it(site: Site) -> None:
    said = command("submit", site.config, "--no-preflight", "--until-done", "--max-rounds", "3")
    assert said.returncode == 0, said.stderr
    assert "submits again what these leave" in said.stdout
    again = command("again", site.run.root)
    assert again.returncode == 0, again.stderr
    assert again.stdout.strip() == "1 of at most 3 rounds"
    assert "1 of at most 3 rounds" in command("status", site.config).stdout
    chain = read(site.run)
    assert chain is not None
    assert (chain.wish, chain.folder) == (Rounds(3), str(Path.cwd()))


def test_an_interrupted_wait_tells_that_the_tasks_go_on(site: Site) -> None:
    """Else its user does not know whether Ctrl-C has ended them."""
    found = "for w; do case $w in *-next) ;; --name=*) n=${w##*,} ;; esac; done; [ $n ] || exit 0"
    line = f'{found}; echo "7|0|RUNNING|None|n1|$n"; kill -INT $PPID'
    commands_of(site.bin, site.patch, squeue=line)
    ended = command("submit", site.config, "--no-preflight", "--wait")
    told = "interrupted; the array tasks go on: `d2m status` shows how far they are, `d2m cancel` "
    assert (ended.returncode, told in ended.stderr) == (130, True), ended.stderr
