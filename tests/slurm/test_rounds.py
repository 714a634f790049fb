"""A run that goes on by itself, on a real Slurm."""

from __future__ import annotations

from kit import d2m
from slurm.cluster import Cluster, wait_until
from slurm.runs import Run, Tars

from d2m_hpc.run.folder import RunDir
from d2m_hpc.run.rounds import Chain, read


def ended(run: Run) -> Chain:
    def chain() -> Chain | None:
        found = read(RunDir(run.run_dir))
        return found if found and found.state != "running" else None

    found = wait_until(chain)
    run.wait_over()
    return found


def test_a_run_whose_tasks_are_cancelled_goes_on_and_starts_the_job_behind_it(
    cluster: Cluster, tars: Tars
) -> None:
    run = Run(cluster, tars, 6, shards_per_task=2)
    run.hold(0)
    then, notify = f"pwd > {run.folder}/then", f"echo $D2M_STATE > {run.folder}/told"
    told = run.submit("--until-done", "--then", then, "--notify", notify, cwd=run.folder)
    assert "submits again what these leave" in told.stdout
    run.wait_held()
    run.let_go()
    run.hold()
    cluster.run("scancel", run.job_ids()[0])
    run.wait_held(2)  # of the second round's tasks
    run.let_go()
    chain = ended(run)
    assert chain.state == "complete"
    assert len(run.submissions()) == len(chain.rounds) == 2
    run.assert_complete()
    assert wait_until(lambda: (run.folder / "then").exists())
    assert (run.folder / "then").read_text().strip() == str(run.folder)
    assert (run.folder / "told").read_text() == "complete\n"


def test_a_cancelled_run_stays_cancelled(cluster: Cluster, tars: Tars) -> None:
    run = Run(cluster, tars, 4)
    run.hold()
    run.submit("--until-done")
    run.wait_held()
    assert "by itself" in d2m("status", run.config).stdout
    assert d2m("cancel", run.config).stdout == "cancelled 1 array task\n"
    run.wait_over()
    assert len(run.submissions()) == 1
    found = read(RunDir(run.run_dir))
    assert found is not None
    assert found.rounds == []
