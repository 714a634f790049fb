"""What people read: nothing of a path or an error is lost on its way to the screen."""

from __future__ import annotations

import io
import logging
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kit import CHECKPOINTS, STATS, write_config, write_shards

from d2m_hpc import config as configs
from d2m_hpc.errors import ConfigError
from d2m_hpc.launch import commands, flow
from d2m_hpc.launch.local import ThisProcess
from d2m_hpc.models import weights
from d2m_hpc.models.lock import Lock
from d2m_hpc.plan.decide import Decision, decide
from d2m_hpc.plan.workload import inspect
from d2m_hpc.watch import live
from d2m_hpc.watch import terminal as show
from d2m_hpc.watch.status import Failure, Summary
from d2m_hpc.watch.verify import Fault, Report
from d2m_hpc.worker.task import Progress

ODD = "/data/[bold]x[/bold]/[/y]/" + "a-long-name/" * 12 + "end"
"""A path with what rich takes for markup, longer than a terminal is wide."""


class Screen:
    """What `show` prints, at a terminal or into a file."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
        self._file = io.StringIO()
        monkeypatch.setenv("COLUMNS", "80")
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setattr(show, "console", show.new_console(self._file, terminal))

    @property
    def text(self) -> str:
        """Without colours and the like."""
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self._file.getvalue())


@pytest.fixture
def file(monkeypatch: pytest.MonkeyPatch) -> Screen:
    return Screen(monkeypatch, terminal=False)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Screen:
    return Screen(monkeypatch, terminal=True)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    package = logging.getLogger("d2m_hpc")
    before = list(package.handlers)
    yield
    assert package.handlers == before


def _summary(**more: Any) -> Summary:
    figures: dict[str, Any] = {
        **dict.fromkeys(("shards", "done", "failed", "pending", "running"), 0),
        **dict.fromkeys(("rows", "rejected", "recomputed"), 0),
        "samples_per_second": 0.0,
        "eta_seconds": None,
        "run_dir": "/run",
        "output": "/out",
    }
    return Summary(**{**figures, **more})


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (None, "unknown"),
        (0, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (60, "1 min 00 s"),
        (3599, "59 min 59 s"),
        (3600, "1 h 00 min"),
        (7500, "2 h 05 min"),
        (48 * 3600, "2 d 0 h"),
        (10 * 86400 + 3 * 3600, "10 d 3 h"),
    ],
)
def test_durations_read_as_people_say_them(seconds: float | None, words: str) -> None:
    assert show.duration(seconds) == words


def test_a_summary_has_every_path_whole_in_a_file(file: Screen) -> None:
    show.summary(_summary(run_dir=ODD, output="s3://bucket/[x]"))
    assert ODD in file.text
    assert "s3://bucket/[x]" in file.text


def test_a_summary_at_a_terminal_folds_a_path_and_loses_nothing(terminal: Screen) -> None:
    show.summary(_summary(run_dir=ODD))
    lines = [line.rpartition(" │")[0].rpartition("│ ")[2].strip() for line in _rows(terminal.text)]
    assert ODD in "".join(lines)
    assert max(map(len, terminal.text.splitlines())) <= 80


def _rows(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("│")]


def test_a_summary_names_what_failed_and_why(file: Screen) -> None:
    stems = [f"{i:05d}" for i in range(7)]
    failures = [Failure("ShardError", "[/tmp] is full", stems), Failure("OSError", "x", ["a"])]
    show.summary(_summary(shards=9, failed=8, failures=failures, rejections={"no [text]": 1234}))
    assert (
        "failed 7 (00000, 00001, 00002, 00003, 00004, ...): ShardError: [/tmp] is full" in file.text
    )
    assert "failed 1 (a): OSError: x" in file.text
    assert "rejected 1,234: no [text]" in file.text


def test_one_shard_is_no_plural(file: Screen) -> None:
    show.summary(_summary(notices={"a": 1, "b": 1234}))
    assert "noted of 1 shard: a\nnoted of 1,234 shards: b\n" in file.text


def test_a_complete_run_has_no_time_left(file: Screen) -> None:
    show.summary(_summary(shards=2, done=2, rows=1234567, recomputed=3))
    lines = [" ".join(line.strip("│ ").split()) for line in _rows(file.text)]
    assert "rows │ 1,234,567" in lines
    assert "time left │ none" in lines
    assert "run again in float32 │ 3" in lines
    assert file.text.startswith("complete")


def test_a_report_names_files_and_counts_each_once(file: Screen) -> None:
    faults = [Fault("[a].npz", "is missing"), Fault("b.npz", "x"), Fault("b.npz", "y")]
    show.report(Report(3, 3, faults, shards=3, unfinished=0))
    assert file.text.splitlines() == [
        "[a].npz is missing",
        "b.npz x",
        "b.npz y",
        "3 shards checked, 2 files wrong",
        "to compute a shard again, delete its parquet and run d2m-submit",
    ]


def test_a_report_of_a_sample_says_so(file: Screen) -> None:
    show.report(Report(100, 1_000_000, [], shards=1_000_000, unfinished=0))
    assert file.text == "checked 100 of 1,000,000 shards, a random sample, 0 files wrong\n"


def test_checkpoints_have_their_urls_whole_in_a_file(file: Screen, tmp_path: Path) -> None:
    known = list(CHECKPOINTS.values())
    (tmp_path / known[1].name).write_bytes(bytes(1500))
    show.checkpoints([weights.survey(c, tmp_path, Lock.read(tmp_path)) for c in known])
    assert [c.url for c in known if c.url not in file.text] == []
    assert file.text.count("not published") == sum(not c.sha256 for c in known) > 0
    assert [c.name for c in known if str(tmp_path / c.name) not in file.text] == []
    assert (file.text.count("1.5 kB"), file.text.count("missing")) == (1, len(known) - 1)


def test_a_workload_without_checkpoints_says_so(file: Screen) -> None:
    show.checked([], False)
    assert file.text == "no checkpoint is needed\n"


def test_a_file_of_ones_own_is_accepted_aloud_where_the_config_allows_it(file: Screen) -> None:
    checkpoint = CHECKPOINTS["scrfd_10g.pt"]
    path = Path(checkpoint.name)
    found = [weights.Found(checkpoint, path, [weights.Checked(checkpoint, path, "0" * 64)])]
    show.checked(found, False)
    show.checked(found, True)
    assert file.text.splitlines() == [
        "not the published file scrfd_10g.pt",
        "not the published file scrfd_10g.pt (accepted: allow_unpublished_weights is true)",
    ]


# --- a run ---


@pytest.fixture
def decided(tmp_path: Path) -> Decision:
    write_shards(tmp_path / "tars", 3, samples=1)
    path = write_config(
        tmp_path / "c.yml",
        STATS,
        input_tars=[str(tmp_path / "tars" / "*.tar"), str(tmp_path / "tars" / "00000.tar")],
        output_metadata_dir=str(tmp_path / "out"),
    )
    return decide(inspect(configs.load(path), str(path)))


def test_a_decision_says_what_is_left_and_what_is_odd(decided: Decision, file: Screen) -> None:
    show.decision(decided)
    assert file.text.splitlines() == [
        "3 shards: 0 done, 3 to do",
        "note: 1 tar is named more than once; each is done once",
    ]


def test_a_given_up_shard_comes_with_the_way_to_try_again(decided: Decision, file: Screen) -> None:
    decided.exhausted = {"00001"}
    show.decision(decided)
    assert "2 to do, 1 given up after 3 attempts (--set max_attempts=4)" in file.text


def test_a_run_into_a_file_says_its_last_line(
    decided: Decision, file: Screen, capsys: pytest.CaptureFixture[str]
) -> None:
    now = time.time()
    task = Progress("000-0-0", shards=3, done=1, rows=10, started=now - 5, updated=now)
    with live.progress(len(decided.pending)) as listener:
        listener(task)
        assert capsys.readouterr().out == ""  # not for every batch
        task.done, task.failed, task.rows, task.state = 2, 1, 20, "finished"
        listener(task)
    said = capsys.readouterr().out
    assert said == "3/3 shards, 20 rows, 4.0 samples/s, 1 failed\n"


def test_a_run_at_a_terminal_has_a_bar(decided: Decision, terminal: Screen) -> None:
    now = time.time()
    task = Progress("000-0-0", shards=3, done=2, failed=1, rows=20, started=now - 5, updated=now)
    with live.progress(len(decided.pending)) as listener:
        listener(task)
    assert "3/3 4 samples/s" in terminal.text
    assert "1 failed" in terminal.text


def test_warnings_of_a_run_are_seen_once_and_whole(decided: Decision, file: Screen) -> None:
    log = logging.getLogger("d2m_hpc.worker.task")
    for _ in range(2):
        with live.progress(len(decided.pending)):
            log.warning("%s: out of memory", ODD)
    assert file.text.count("out of memory") == 2
    assert file.text.count(ODD) == 2


def test_a_listener_that_fails_takes_its_handler_along(decided: Decision, file: Screen) -> None:
    show.decision(decided)
    with pytest.raises(ConfigError), live.progress(len(decided.pending)):
        raise ConfigError("c.yml", ["x"])
    assert "3 to do" in file.text


def test_a_decision_says_what_finished_shards_gain(tmp_path: Path, file: Screen) -> None:
    write_shards(tmp_path / "tars", 3)
    common = {
        "input_tars": str(tmp_path / "tars" / "*.tar"),
        "output_metadata_dir": str(tmp_path / "out"),
    }
    few = {"models": ["text-stats"], "postprocess_columns": ["text-words"]}
    few |= {"postprocess_features": [], "additional_fields": []}
    path = write_config(tmp_path / "c.yml", {**STATS, **few}, **common)
    asked = inspect(configs.load(path), str(path))
    flow.submit(asked, ThisProcess(live.progress), show.decision)
    config = configs.load(write_config(path, STATS, **common))
    more = config.model_copy(update={"additional_fields": ["[uid]"]})
    for asked, lines in (
        (
            config,
            "3 shards gain columns image-brightness, image-phash; features image-histogram; "
            "fields uid, caption (models run: image-stats)",
        ),
        (
            more.model_copy(update=few | {"additional_fields": ["[uid]"]}),
            "3 shards gain fields [uid] (models run: none)",
        ),
        (
            more.model_copy(update=few | {"models": ["text-stats", "image-stats"]}),
            "3 shards gain no column, feature or field (models run: image-stats)",
        ),
    ):
        show.decision(decide(inspect(asked, str(path))))
        assert file.text.splitlines()[-2:] == ["3 shards: 0 done, 3 to do", lines]


@pytest.mark.parametrize(
    ("alive", "left"),
    [
        ({"tasks": {"pending": 3}}, 0),
        ({"running": 1}, 0),
        ({"unasked": "squeue failed"}, 0),
        ({"goes_on": True}, 0),
        ({"tasks": {"completed": 2, "node_fail": 1}}, 2),
        ({}, 2),
    ],
)
def test_a_watch_ends_with_the_run_or_where_nobody_works_on_it(
    terminal: Screen, monkeypatch: pytest.MonkeyPatch, alive: dict[str, Any], left: int
) -> None:
    monkeypatch.setattr(commands, "SHORTEST_WAIT", 0.0)
    pending = _summary(done=1, pending=2, shards=3, **{"running": 0, **alive})
    looks = iter([pending, pending, pending, _summary(done=3, pending=0, shards=3, running=0)])
    show.watch(lambda: next(looks))
    assert len(list(looks)) == left
    assert ("nobody works on it" in terminal.text) == bool(left)


def test_a_run_that_goes_on_by_itself_says_that_nobody_is_needed(file: Screen) -> None:
    show.summary(_summary(rounds="2 of at most 9 rounds", goes_on=True))
    show.summary(_summary(rounds="3 of at most 9 rounds"))
    told = [line for line in file.text.splitlines() if "by itself" in line]
    assert "2 of at most 9 rounds; the next one submits what is left" in told[0]
    assert "submits" not in told[1]


def test_the_slowest_tasks_at_work_stand_on_top(
    terminal: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    tasks = [
        Progress(f"000-{i}-0", f"n{i % 3}", "cpu", rows=100 * i, shard=f"{i:05d}", shards=4, done=1)
        for i in range(90)
    ]
    for task in tasks:
        task.started, task.updated = now - 60, now
    told = {"done": 90, "shards": 360, "running": 90, "eta_seconds": 120.0}
    gone = Progress("000-90-0", "n0", "cpu", started=now - 60, updated=now)
    show.top(_summary(**told, lost=["000-90-0"], tasks={"running": 92}), [*tasks, gone])
    first, *lines = terminal.text.splitlines()
    assert first.startswith("running: 90 of 360 shards, 0 failed; 90 tasks on 3 nodes, 2 starting")
    assert "time left 2 min 00 s" in " ".join(terminal.text.split())
    rows = [line for line in lines if "000-" in line]
    assert [row.split()[1] for row in rows[:2]] == ["000-0", "000-1"]
    assert len(rows) < 90  # as many as the screen has lines


def test_a_library_that_sets_up_logging_makes_no_line_appear_twice(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """open_clip does so as it is imported, in the midst of a run."""
    root, ours = logging.getLogger(), logging.getLogger("d2m_hpc.worker")
    monkeypatch.setattr(root, "handlers", [])
    with live.progress(1):
        logging.basicConfig()
        ours.warning("a disk is full")
    logging.getLogger("d2m_hpc").warning("later")
    shown = "".join(capsys.readouterr())
    assert shown.count("a disk is full") == 1
    assert shown.count("later") == 1
