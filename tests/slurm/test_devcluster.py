"""The throwaway cluster does what a real one does, as far as the launcher relies on it."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
from pathlib import Path

import pytest
from slurm.cluster import DEVCLUSTER, Cluster, wait_until

STATE = Path("/var/lib/d2m-devcluster")


def slurm_daemons() -> list[str]:
    """Pid and command line of all that `up` starts, and of job steps."""
    command = ["pgrep", "-af", f"^(slurm|: slurmscriptd|(munged|mariadbd) .*{STATE}/)"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()


def kill(daemon: str) -> None:
    """Let a daemon of the devcluster die without a word."""
    os.kill(int((STATE / "run" / f"{daemon}.pid").read_text(encoding="utf-8")), signal.SIGKILL)


def listeners() -> set[tuple[str, int]]:
    """Address and port of each TCP socket that a daemon of Slurm's listens on."""
    lines = subprocess.run(["ss", "-Hltnp"], capture_output=True, text=True, check=True).stdout
    return {
        (address, int(port))
        for line in lines.splitlines()
        if re.search(r'"(slurm\w*|munged|mariadbd)"', line)
        for address, _, port in [line.split()[3].rpartition(":")]
    }


def test_a_job_runs(cluster: Cluster) -> None:
    job = cluster.submit("echo on $SLURMD_NODENAME")
    assert cluster.wait_state(job, "COMPLETED", "FAILED") == "COMPLETED"
    assert cluster.output(job) in {"on n1\n", "on n2\n"}


def test_a_failing_job_fails_with_its_exit_code(cluster: Cluster) -> None:
    job = cluster.submit("exit 3")
    assert cluster.wait_state(job, "COMPLETED", "FAILED") == "FAILED"
    assert cluster.field(job, "ExitCode") == "3:0"


def test_array_elements_have_their_own_index(cluster: Cluster) -> None:
    job = cluster.submit("echo $SLURM_ARRAY_JOB_ID $SLURM_ARRAY_TASK_ID", "--array=0-2")
    for i in range(3):
        cluster.wait_state(f"{job}_{i}", "COMPLETED")
        assert cluster.output(job, i) == f"{job} {i}\n"


def test_a_job_with_a_gpu_sees_one_device(cluster: Cluster) -> None:
    job = cluster.submit("echo $CUDA_VISIBLE_DEVICES", "--gres=gpu:1")
    cluster.wait_state(job, "COMPLETED")
    assert cluster.output(job) == "0\n"


def test_a_job_without_a_gpu_sees_no_device(cluster: Cluster) -> None:
    job = cluster.submit("echo ${CUDA_VISIBLE_DEVICES-none}")
    cluster.wait_state(job, "COMPLETED")
    assert cluster.output(job) == "none\n"


def test_max_array_size_and_gpus_per_node(cluster: Cluster) -> None:
    before = int(cluster.submit("true"))
    cluster.up("--max-array-size", 4, "--gpus-per-node=2", "--nodes", 1)
    assert cluster.run("sinfo", "-hN", "-p", "low", "-o", "%N %T %G").stdout.split() == [
        "n1",
        "idle",
        "gpu:2",
    ]
    refused = cluster.run("sbatch", "--array=2-4", "--wrap=true", check=False)
    assert refused.returncode == 1
    assert "Invalid job array specification" in refused.stderr

    job = cluster.submit("echo $CUDA_VISIBLE_DEVICES; sleep 1", "--gres=gpu:1", "--array=2-3")
    assert int(job) > before
    for i in (2, 3):
        cluster.wait_state(f"{job}_{i}", "COMPLETED")
    assert {cluster.output(job, i) for i in (2, 3)} == {"0\n", "1\n"}


def test_a_low_job_gives_way_to_a_high_one_and_runs_again(cluster: Cluster) -> None:
    low = cluster.submit(
        """trap 'echo SIGTERM; exit 0' TERM
        echo run ${SLURM_RESTART_COUNT:-0}
        if [ -z "$SLURM_RESTART_COUNT" ]; then while true; do sleep 0.1; done; fi""",
        "--exclusive",
        "--nodelist=n1",
        "--requeue",
    )
    wait_until(lambda: "run 0" in cluster.output(low))
    high = cluster.submit("true", "--partition=high", "--exclusive", "--nodelist=n1")
    cluster.wait_state(high, "COMPLETED")
    assert cluster.field(low, "JobState") == "PENDING"
    cluster.wait_state(low, "COMPLETED")
    assert cluster.field(low, "Restarts") == "1"
    lines = cluster.output(low).splitlines()
    assert [line for line in lines if line.startswith(("run", "SIGTERM"))] == [
        "run 0",
        "SIGTERM",
        "run 1",
    ]


def test_requeue_of_one_array_element_leaves_the_others(cluster: Cluster) -> None:
    job = cluster.submit(
        """echo run ${SLURM_RESTART_COUNT:-0}
        if [ -z "$SLURM_RESTART_COUNT" ]; then exec sleep 600; fi""",
        "--array=0-1",
        "--requeue",
    )
    for i in range(2):
        wait_until(lambda i=i: "run 0" in cluster.output(job, i))
    cluster.run("scontrol", "requeue", f"{job}_1")
    cluster.wait_state(f"{job}_1", "COMPLETED")
    assert cluster.field(f"{job}_0", "JobState") == "RUNNING"
    assert [cluster.field(f"{job}_{i}", "Restarts") for i in range(2)] == ["0", "1"]


def test_a_full_node_that_still_ends_another_job_is_up(cluster: Cluster) -> None:
    """A suspended job's CPUs are others', and its step may take long to end."""
    whole = ("--cpus-per-task=4", "--nodelist=n1")
    ending = cluster.submit("exec sleep 600", *whole)
    cluster.wait_state(ending, "RUNNING")
    cluster.run("scontrol", "suspend", ending)
    cluster.wait_state(cluster.submit("exec sleep 600", *whole), "RUNNING")
    [step] = cluster.run("pgrep", "-f", f"^slurmstepd: \\[{ending}.batch\\]").stdout.split()
    os.kill(int(step), signal.SIGSTOP)
    try:
        cluster.run("scancel", ending)
        wait_until(lambda: cluster.node_state("n1") == "allocated+")
        assert "Slurm is up" in cluster.up().stdout
        assert cluster.node_state("n1") == "allocated+"
    finally:
        os.kill(int(step), signal.SIGCONT)


def test_scancel_ends_a_job(cluster: Cluster) -> None:
    job = cluster.submit("exec sleep 600")
    cluster.wait_state(job, "RUNNING")
    cluster.run("scancel", job)
    assert cluster.wait_state(job, "CANCELLED", "COMPLETED", "FAILED") == "CANCELLED"


def test_a_node_goes_down_with_its_job_and_comes_back(cluster: Cluster) -> None:
    job = cluster.submit("exec sleep 600", "--nodelist=n2", "--no-requeue")
    cluster.wait_state(job, "RUNNING")
    cluster.run("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    assert cluster.wait_state(job, "NODE_FAIL", "FAILED", "CANCELLED") == "NODE_FAIL"
    assert cluster.node_state("n2").startswith("down")
    cluster.run("scontrol", "update", "nodename=n2", "state=resume")
    wait_until(lambda: cluster.node_state("n2") == "idle")
    again = cluster.submit("true", "--nodelist=n2")
    cluster.wait_state(again, "COMPLETED")


def test_up_brings_back_what_was_lost(cluster: Cluster) -> None:
    cluster.run("scontrol", "update", "nodename=n1", "state=down", "reason=test")
    kill("slurmd-n2")
    cluster.up()
    assert [cluster.node_state(node) for node in ("n1", "n2")] == ["idle", "idle"]
    job = cluster.submit("true", "--nodes=2")
    cluster.wait_state(job, "COMPLETED")


def test_accounting(cluster: Cluster) -> None:
    without = cluster.run("sacct", check=False)
    assert without.returncode == 1
    assert "accounting storage is disabled" in without.stderr

    cluster.up("--accounting")
    job = cluster.submit("exit 3", "--array=0-1")
    sacct = ("sacct", "-nXP", "-o", "JobID,State,ExitCode", "-j", job)
    expected = {f"{job}_0|FAILED|3:0", f"{job}_1|FAILED|3:0"}
    wait_until(lambda: set(cluster.run(*sacct).stdout.split()) == expected)


def test_up_twice_changes_nothing(cluster: Cluster) -> None:
    job = cluster.submit("touch running; exec sleep 600")
    wait_until((cluster.folder / "running").exists)
    before = slurm_daemons()
    cluster.up()
    assert slurm_daemons() == before
    assert cluster.field(job, "JobState") == "RUNNING"


def test_listens_on_the_loopback_only(cluster: Cluster) -> None:
    try:
        own = socket.gethostbyname(socket.gethostname())
    except OSError:
        own = "nothing"
    if own != "127.0.0.1":
        pytest.skip(f"this machine's name resolves to {own}: Slurm cannot listen on 127.0.0.1 only")
    ports = {port for _, port in listeners()}
    assert ports == {16817, 17001, 17002}
    assert {address for address, _ in listeners()} == {own}


def test_keeps_its_secrets(cluster: Cluster) -> None:
    assert (STATE / "munge" / "key").stat().st_mode & 0o777 == 0o400
    folders = [STATE, *(path for path in STATE.rglob("*") if path.is_dir())]
    assert not [folder for folder in folders if folder.stat().st_mode & 0o022]


def test_down_leaves_nothing_and_can_be_run_again(cluster: Cluster) -> None:
    job = cluster.submit("trap '' TERM; touch running; sleep 601; sleep 602", "--nodelist=n1")
    wait_until((cluster.folder / "running").exists)
    cluster.down()
    assert cluster.run("pgrep", "-f", "^sleep 60[12]", check=False).stdout == ""
    assert not slurm_daemons()
    assert not STATE.exists()
    assert not Path("/etc/slurm/slurm.conf").is_symlink()
    cluster.down()

    cluster.up()
    assert int(cluster.submit("true")) != int(job)


def test_down_ends_jobs_whose_controller_is_dead(cluster: Cluster) -> None:
    cluster.submit("touch running; sleep 603", "--nodelist=n1")
    wait_until((cluster.folder / "running").exists)
    kill("slurmctld")
    cluster.down()
    assert not slurm_daemons()
    assert cluster.run("pgrep", "-f", "^sleep 603", check=False).stdout == ""


@pytest.mark.parametrize(
    "options",
    [["--nodes", "0"], ["--nodes"], ["--what"], ["--max-array-size", "x"], ["--dir", "/tmp"]],
)
def test_up_refuses_what_it_cannot_do(cluster: Cluster, options: list[str]) -> None:
    refused = cluster.run(DEVCLUSTER / "up", *options, check=False)
    assert refused.returncode in (1, 2)
    assert refused.stderr
    assert cluster.node_state("n1") == "idle"


@pytest.mark.skipif(os.geteuid() != 0, reason="makes a namespace")
def test_the_daemons_of_another_namespace_are_no_daemons_of_this_devcluster(tmp_path: Path) -> None:
    """As of one in a container, whose folder has the same name."""
    environment = {**os.environ, "D2M_DEVCLUSTER": str(tmp_path)}
    sleeps = (["sleep", "600"], ["unshare", "--mount", "sleep", "600"])
    own, other = (subprocess.Popen(words, env=environment) for words in sleeps)
    try:
        wait_until(
            lambda: os.readlink(f"/proc/{other.pid}/ns/mnt") != os.readlink("/proc/self/ns/mnt")
        )
        script = f". {DEVCLUSTER}/lib.sh; dir={tmp_path}; daemons"
        found = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    finally:
        for each in (own, other):
            each.kill()
            each.wait()
    assert found.stdout.split() == [str(own.pid)]
