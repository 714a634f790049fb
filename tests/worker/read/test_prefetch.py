"""The next shard is brought while the last one is read, and no more is held than that."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from kit import sample, write_tar

from d2m_hpc.errors import ShardError
from d2m_hpc.run.records import Job, Shard
from d2m_hpc.worker.read.prefetch import Stager
from d2m_hpc.worker.read.scratch import Scratch
from d2m_hpc.worker.work import Work


class Claim(Work):
    """A shard, and whether it was let go of."""

    released = False

    def release(self) -> None:
        super().release()
        self.released = True


@pytest.fixture
def room(tmp_path: Path) -> Iterator[Scratch]:
    folder = tmp_path / "scratch"
    folder.mkdir()
    yield Scratch(folder, sys.maxsize)
    assert wait_for(lambda: list(folder.iterdir()) == [])


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    return write_tar(tmp_path / "a.tar", sample("a"))


def wait_for(happens: Callable[[], bool], seconds: float = 60.0) -> bool:
    end = time.monotonic() + seconds
    while not happens() and time.monotonic() < end:
        time.sleep(0.01)
    return happens()


def stager(urls: list[str], room: Scratch, claimed: list[Claim]) -> Stager:
    def claims() -> Iterator[Claim]:
        for number, url in enumerate(urls):
            claimed.append(Claim(Job(Shard(str(number), url))))
            yield claimed[-1]

    started = Stager(claims(), room)
    started.thread.start()
    return started


def test_the_next_copy_is_made_while_one_is_read_and_no_more(room: Scratch, tar: Path) -> None:
    claimed: list[Claim] = []
    shards = iter(stager([f"pipe:cat {tar}"] * 4, room, claimed))
    for number in range(4):
        with next(shards).arrived() as staged:
            expected = min(number + 2, 4)
            names = {f"{i}.tar" for i in range(number, expected)}
            assert wait_for(lambda: {p.name for p in room.folder.iterdir()} == names)  # noqa: B023
            assert wait_for(lambda: len(claimed) == expected)  # noqa: B023
            time.sleep(0.05)
            assert len(claimed) == expected
            assert staged.path.read_bytes() == tar.read_bytes()
        assert not staged.path.exists()
    assert next(shards, None) is None


def test_what_needs_no_copy_is_claimed_at_the_last_moment(room: Scratch, tar: Path) -> None:
    claimed: list[Claim] = []
    shards = iter(stager([str(tar)] * 3, room, claimed))
    for number in range(3):
        with next(shards).arrived() as staged:
            time.sleep(0.05)
            assert len(claimed) == number + 1
            assert staged.path == tar


def test_a_shard_that_cannot_be_had_makes_way_for_the_next(room: Scratch, tar: Path) -> None:
    came = []
    for coming in stager(["pipe:false", f"pipe:cat {tar}"], room, []):
        try:
            with coming.arrived():
                came.append("here")
        except ShardError as error:
            came.append(str(error))
    assert came == ["pipe:false ended with exit code 1: ", "here"]


def test_the_next_copy_waits_for_room(tar: Path, tmp_path: Path) -> None:
    size = tar.stat().st_size
    room = Scratch(tmp_path, size + 10)
    shards = iter(stager([f"pipe:cat {tar}"] * 2, room, []))
    with next(shards).arrived():
        second = next(shards)
        time.sleep(0.1)
        assert (tmp_path / "1.tar").stat().st_size <= 10
    with second.arrived() as staged:
        assert staged.path.stat().st_size == size


@pytest.mark.parametrize("taken", [0, 1])
def test_stopping_lets_go_of_what_nobody_took(room: Scratch, tar: Path, taken: int) -> None:
    claimed: list[Claim] = []
    started = stager([f"pipe:cat {tar}"] * 5, room, claimed)
    assert wait_for(lambda: len(claimed) == 1)
    if taken:
        with next(iter(started)).arrived():
            assert wait_for(lambda: len(claimed) == 2)
            started.stop()
    else:
        started.stop()
    assert next(iter(started), None) is None
    assert [c.released for c in claimed] == [False, True][1 - taken :]


def test_stopping_does_not_wait_for_a_copy_that_hangs(room: Scratch, tmp_path: Path) -> None:
    go, claimed = tmp_path / "go", list[Claim]()
    url = f"pipe:until [ -e {go} ]; do sleep 0.02; done"
    started = stager([url, url], room, claimed)
    assert wait_for(lambda: (room.folder / "0.tar").exists())
    stopping = threading.Thread(target=started.stop, daemon=True)
    stopping.start()
    assert wait_for(lambda: not stopping.is_alive())
    assert claimed[0].released
    go.touch()
    assert wait_for(lambda: "stager" not in {t.name for t in threading.enumerate()})
    assert len(claimed) == 1


def test_what_stops_the_claims_is_told(room: Scratch) -> None:
    def claims() -> Iterator[Claim]:
        raise ZeroDivisionError
        yield

    started = Stager(claims(), room)
    started.thread.start()
    with pytest.raises(ZeroDivisionError):
        next(iter(started))
