"""A fork of a warm process is a program as any other."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import warm
from kit import custom_config, custom_file, d2m, write_shards


def test_a_program_has_its_own_words_folder_variables_and_umask(tmp_path: Path) -> None:
    write_shards(tmp_path / "tars", 1)
    config = custom_config(tmp_path, custom_file("own"), "own", output_metadata_dir="$MADE/out")
    wanted = {**os.environ, "MADE": "here"}
    ended = d2m("submit", config.name, "--local", cwd=tmp_path, env=wanted, umask=0o077)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "1 shard: 0 done, 1 to do" in ended.stdout
    made = tmp_path / "here" / "out"
    assert made.stat().st_mode & 0o777 == 0o700
    assert d2m("verify", made / ".d2m").returncode == 0
    ended = d2m("status", "none.yml", cwd=tmp_path)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: none.yml: ")


def test_a_kill_ends_a_program_at_once_and_for_good(tmp_path: Path) -> None:
    """Also its child: the process that computes goes with the one that watches."""
    write_shards(tmp_path / "tars", 1)
    code = custom_file("slow", before="open('begun', 'w').close(); import time; time.sleep(600)")
    config = custom_config(tmp_path, code, "slow")
    with open(tmp_path / "said", "w") as said:
        program = warm.start(["d2m", "submit", str(config), "--local"], said, said, cwd=tmp_path)
    assert program is not None
    while not (tmp_path / "begun").exists():
        time.sleep(0.01)
    children = Path(f"/proc/{program.pid}/task/{program.pid}/children").read_text().split()
    program.kill()
    assert program.wait() == -9
    assert len(children) == 1
    while any(Path("/proc", child).exists() for child in children):
        time.sleep(0.01)
    assert not list((tmp_path / "out").glob("*.parquet"))


def test_programs_run_side_by_side(tmp_path: Path) -> None:
    with open(tmp_path / "said", "w") as said:
        words = ["python", "-P", "-m", "this"]
        programs = [warm.start(words, said, said) for _ in range(3)]
        assert [p.wait() for p in programs if p] == [0, 0, 0]
    assert (tmp_path / "said").read_text().count("Readability counts.") == 3


def test_what_the_imports_have_read_starts_a_program_cold(tmp_path: Path) -> None:
    with open(tmp_path / "said", "w") as said:
        words = ["d2m", "--version"]
        for name in ("HOME", "OMP_NUM_THREADS", "LC_ALL"):
            env = {**os.environ, name: "2"}
            assert warm.start(words, said, said, env=env) is None
            assert d2m("--version", env=env).stdout.startswith("d2m_hpc ")
        for name in ("D2M_REPORT", "CUDA_VISIBLE_DEVICES"):
            started = warm.start(words, said, said, env={**os.environ, name: ""})
            assert started is not None
            assert started.wait() == 0


def test_a_warm_process_ends_with_the_tests() -> None:
    code = "import os, warm; warm.run(['d2m', '--version']); "
    code += "print(open(f'/proc/self/task/{os.getpid()}/children').read(), flush=True); os._exit(1)"
    folder = Path(__file__).parent
    ended = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    while Path("/proc", ended.stdout.strip()).exists():
        time.sleep(0.01)
    assert (ended.returncode, ended.stdout.strip().isdecimal()) == (1, True)
