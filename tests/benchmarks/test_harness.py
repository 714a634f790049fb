from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count, repeat
from pathlib import Path

import pytest

from benchmarks.harness import Row, Setting, Sides, measure
from benchmarks.machine import Watch, warning


def _row(costs: dict[str, Iterator[float]], order: list[str], **more: object) -> Row:
    def side(name: str) -> float:
        order.append(name)
        return next(costs[name])

    @contextmanager
    def prepare(setting: Setting) -> Iterator[Sides]:
        yield Sides(lambda: side("ours"), lambda: side("baseline"))

    return replace(Row("row", "a row", 3, prepare), **more)


def _costs() -> dict[str, Iterator[float]]:
    return {"ours": iter([9.0, 1.0, 2.0, 1.0]), "baseline": iter([9.0, 4.0, 4.0, 3.0])}


def test_both_sides_in_turns_after_a_run_that_does_not_count(tmp_path: Path) -> None:
    order: list[str] = []
    result = measure(_row(_costs(), order), Setting(tmp_path, repetitions=3), "bench row")
    assert order == ["ours", "baseline"] * 4
    assert (result["ours"], result["baseline"]) == ([1.0, 2.0, 1.0], [4.0, 4.0, 3.0])
    assert result["ratio"] == {"median": 3.0, "min": 2.0, "max": 4.0}
    assert result["met"]


def test_a_cost_is_held_against_its_bound(tmp_path: Path) -> None:
    row = _row(_costs(), [], direction="at most", target=0.3)
    result = measure(row, Setting(tmp_path, repetitions=3), "")
    assert result["ratio"]["median"] == pytest.approx(1 / 3)
    assert not result["met"]


def test_no_ratio_is_made_of_nothing(tmp_path: Path) -> None:
    costs = {"ours": iter([0.0]), "baseline": iter([1.0])}
    row = _row(costs, [], direction="at most")
    with pytest.raises(ValueError, match="row: no ratios can be made"):
        measure(row, Setting(tmp_path, smoke=True), "")


def test_a_row_without_a_place_for_the_reference_program_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="row does not run the reference program"):
        measure(_row(_costs(), []), Setting(tmp_path, reference=tmp_path), "")


def _disturbed(monkeypatch: pytest.MonkeyPatch, answers: Iterator[bool]) -> None:
    monkeypatch.setattr(Watch, "disturbed", lambda watch: next(answers))


@pytest.mark.parametrize("spoiled", [(True, False), (False, True)])
def test_a_pair_that_others_spoiled_is_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoiled: tuple[bool, bool]
) -> None:
    _disturbed(monkeypatch, iter([*spoiled, False, False, False, False]))
    result = measure(_row(_costs(), []), Setting(tmp_path, repetitions=2), "")
    assert result["disturbed"] == [(1.0, 4.0)]
    assert (result["ours"], result["baseline"]) == ([2.0, 1.0], [4.0, 3.0])


def test_where_others_never_stop_pairs_count_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _disturbed(monkeypatch, repeat(True))
    costs = {"ours": map(float, count(1)), "baseline": repeat(1.0)}
    result = measure(_row(costs, []), Setting(tmp_path, repetitions=3), "")
    assert [ours for ours, _ in result["disturbed"]] == [2.0, 3.0, 4.0]
    assert result["ours"] == [5.0, 6.0, 7.0]


def test_a_watch_sees_what_others_use(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"now": 0.0, "busy": 0.0, "own": 0.0}
    monkeypatch.setattr("benchmarks.machine.time.monotonic", lambda: times["now"])
    monkeypatch.setattr("benchmarks.machine._busy_seconds", lambda: times["busy"])
    monkeypatch.setattr("benchmarks.machine._own_seconds", lambda: times["own"])
    monkeypatch.setattr("benchmarks.machine.os.sched_getaffinity", lambda pid: {0, 1})
    watch = Watch()
    times.update(now=10.0, busy=15.0, own=11.5)
    assert not watch.disturbed()
    times.update(busy=16.0)
    assert watch.disturbed()
    assert watch.describe()["others"] == 0.45
    times.update(now=0.9)
    assert not watch.disturbed()


def test_a_busy_machine_is_told() -> None:
    assert "other programs used 1.2 of 2 cores" in warning({"others": 1.2, "cores": 2})
    assert warning({"others": 0.1, "cores": 2}) == ""
