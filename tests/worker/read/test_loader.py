"""Shards to batches: in order, every sample accounted for, and stoppable at any moment."""

from __future__ import annotations

import gzip
import json
import os
import sys
import tarfile
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kit import SHARDS, jpeg, sample, write_shards, write_tar
from PIL import Image

from d2m_hpc.errors import Rejected, ShardError, TruncatedShard
from d2m_hpc.models.inputs import Input
from d2m_hpc.models.preprocessors import PREPROCESSORS, Options, Preprocessor, custom
from d2m_hpc.run.records import Job, Rejection, Shard
from d2m_hpc.storage.lease import Lease
from d2m_hpc.worker import gate as gates
from d2m_hpc.worker.batch import Batch
from d2m_hpc.worker.gate import Gate
from d2m_hpc.worker.read import loader as module
from d2m_hpc.worker.read.loader import AHEAD, GROUP, Loader, Reading
from d2m_hpc.worker.read.prepare import WHOLE, Recipe
from d2m_hpc.worker.read.scratch import Scratch
from d2m_hpc.worker.work import Work

TEXT: dict[Input, Preprocessor] = {("text", "identity"): PREPROCESSORS["identity"]}
BOTH: dict[Input, Preprocessor] = {("image", "stats-aug"): PREPROCESSORS["stats-aug"], **TEXT}


def recipe(inputs: Mapping[Input, Preprocessor] = TEXT, **more: Any) -> Recipe:
    values = {"fields": [], "options": Options(), "batch_size": 4, "threads": 2}
    return Recipe(inputs=inputs, **{**values, "allow_truncated": False, "strict": False, **more})


def works(*paths: Path) -> list[Work]:
    return [Work(Job(Shard(p.name.split(".")[0], str(p)))) for p in paths]


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Scratch]:
    """Empty after every test, and no thread is left."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    before = set(threading.enumerate())
    yield Scratch(folder, sys.maxsize)
    left = set(threading.enumerate()) - before
    assert [t.name for t in left if t.is_alive()] == []
    assert list(folder.iterdir()) == []


def read(reading: Reading) -> list[Batch]:
    return list(reading)


def load(path: Path, made: Recipe, scratch: Scratch) -> tuple[list[Batch], Reading]:
    """All of one shard."""
    with Loader(works(path), made, scratch) as loader:
        ((reading, batches),) = [(reading, read(reading)) for reading in loader]
    return batches, reading


def keys(batches: Iterable[Batch]) -> list[str]:
    return [key for batch in batches for key in batch.keys]


# --- what comes out ---


@pytest.mark.parametrize("threads", [1, 4])
def test_batches_are_full_and_in_the_tars_order(
    tmp_path: Path, scratch: Scratch, threads: int
) -> None:
    def slow_at_times(text: str) -> str:
        time.sleep(0.004 * (int(text.split()[1]) % 3 == 0))
        return text

    paths = write_shards(tmp_path, 3, samples=18)
    inputs = {("text", "slow"): custom(slow_at_times)}
    made = recipe(inputs, threads=threads, fields=["uid", "nothing"])
    with Loader(works(*paths), made, scratch) as loader:
        for number, reading in enumerate(loader):
            batches = read(reading)
            assert reading.work.shard.stem == f"{number:05d}"
            assert [len(b.keys) for b in batches] == [4, 4, 4, 4, 2]
            assert keys(batches) == [f"{number:05d}{j:04d}" for j in range(18)]
            texts = [t for b in batches for t in b.inputs[("text", "slow")]]
            assert texts == [f"caption {number * 1000 + j}" for j in range(18)]
            uids = [u for b in batches for u in b.fields["uid"]]
            assert uids == [f"{number * 1000 + j:032x}" for j in range(18)]
            assert batches[-1].fields["nothing"] == [None, None]
            assert (reading.found.total, reading.found.rejections) == (18, [])


def test_built_in_inputs_have_a_row_a_sample(tmp_path: Path, scratch: Scratch) -> None:
    (path,) = write_shards(tmp_path, 1, samples=3)
    (batch,), _ = load(path, recipe(BOTH), scratch)
    pixels = batch.inputs[("image", "stats-aug")]
    assert (pixels.shape, pixels.dtype) == ((3, 256, 256, 3), torch.uint8)
    assert batch.inputs[("text", "identity")] == [f"caption {i}" for i in range(3)]


def test_compressed_shards_and_commands_are_read_too(tmp_path: Path, scratch: Scratch) -> None:
    packed = write_tar(tmp_path / "a.tar.gz", sample("k"), mode="w:gz")
    urls = [str(packed), f"pipe:cat {packed}", packed.as_uri()]
    works = [Work(Job(Shard(str(i), url))) for i, url in enumerate(urls)]
    with Loader(works, recipe(BOTH), scratch) as loader:
        assert [keys(reading) for reading in loader] == [["k"]] * 3


def test_a_shard_without_samples_has_no_batches(tmp_path: Path, scratch: Scratch) -> None:
    batches, reading = load(write_tar(tmp_path / "a.tar", {}), recipe(), scratch)
    assert (batches, reading.found.total, reading.found.rejections) == ([], 0, [])


def test_a_sample_is_decoded_once_and_each_preprocessor_run_once(
    tmp_path: Path, scratch: Scratch
) -> None:
    calls: Counter[Any] = Counter()

    def counted(name: str) -> Preprocessor:
        def prepare(value: Any) -> int:
            calls[name] += 1
            calls[id(value), value.tobytes()] += 1
            return 1

        return custom(prepare)

    (path,) = write_shards(tmp_path, 1, samples=6)
    inputs = {("image", name): counted(name) for name in ("one", "two")}
    load(path, recipe(inputs), scratch)
    assert (calls.pop("one"), calls.pop("two")) == (6, 6)
    # Both were handed the same object.
    assert all(n % 2 == 0 for n in calls.values())


def test_custom_preprocessors_get_what_the_seed_gave_them(tmp_path: Path, scratch: Scratch) -> None:
    made = recipe(
        {
            ("image", "pil"): custom(lambda image: (image.mode, *image.size)),
            ("image", "array"): custom(np.asarray),
            ("text", "length"): custom(len),
            ("json", "uid"): custom(lambda values: values["uid"]),
        }
    )
    (batch,), _ = load(write_tar(tmp_path / "a.tar", sample("k", 7)), made, scratch)
    modes, widths, heights = batch.inputs[("image", "pil")]
    assert (modes, widths.tolist(), heights.tolist()) == (["RGB"], [40], [30])
    assert batch.inputs[("image", "array")].shape == (1, 30, 40, 3)
    assert batch.inputs[("text", "length")].tolist() == [9]
    assert batch.inputs[("json", "uid")] == [f"{7:032x}"]


# --- rejections ---


def test_each_bad_sample_is_rejected_with_its_reason(scratch: Scratch) -> None:
    made = recipe(BOTH, fields=["uid"], options=Options(max_pixels=10_000_000))
    batches, reading = load(SHARDS / "bad.tar", made, scratch)
    assert keys(batches) == ["good-0", "good-1", "no-uid", "good-2"]
    reasons = dict(reading.found.rejections)
    assert reading.found.total == 14 == len(reasons) + 4
    assert [key for key, _ in reading.found.rejections] == [
        *("no-text", "no-json", "garbage", "zero", "latin1", "bad-json", "text-only"),
        *("header-only", "bomb", "dots"),
    ]
    assert reasons["no-text"] == "no text (txt); it has jpg, json"
    assert reasons["dots"].startswith("no image (jpg or png or jpeg or webp); it has in.key.jpg")
    assert "over max_image_pixels" in reasons["bomb"]
    assert "not UTF-8" in reasons["latin1"]
    assert [b.fields["uid"][0] is None for b in batches] == [False]


def test_only_what_is_asked_for_must_be_there(scratch: Scratch) -> None:
    batches, reading = load(SHARDS / "bad.tar", recipe(TEXT), scratch)
    assert {"garbage", "zero", "bad-json", "text-only", "bomb"} <= set(keys(batches))
    assert [key for key, _ in reading.found.rejections] == ["no-text", "latin1", "dots"]


def test_strays_are_counted_with_the_samples(tmp_path: Path, scratch: Scratch) -> None:
    notes = {"README": b"", "__notes__": b""}
    members = {**sample("a"), "picture": b"", **sample("b", 1), **notes}
    batches, reading = load(write_tar(tmp_path / "a.tar", members), recipe(), scratch)
    assert keys(batches) == ["a", "b"]
    assert reading.found.total == 3
    assert reading.found.rejections == [Rejection("picture", "a member without an extension")]
    assert reading.found.notices == [
        "foreign members are not read: README",
        "members with a reserved name (__...__) are not read: __notes__",
    ]


def test_a_preprocessor_that_raises_costs_that_sample_only(
    tmp_path: Path, scratch: Scratch
) -> None:
    def picky(text: str) -> str:
        if text == "caption 2":
            raise KeyError("two")
        return text

    (path,) = write_shards(tmp_path, 1, samples=5)
    batches, reading = load(path, recipe({("text", "picky"): custom(picky)}), scratch)
    assert keys(batches) == [f"00000000{i}" for i in (0, 1, 3, 4)]
    reason = "preprocessor 'picky' raised KeyError: 'two'"
    assert reading.found.rejections == [Rejection("000000002", reason)]


class _Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


@pytest.mark.parametrize("error", [_Mute, StopIteration, ExceptionGroup("several", [OSError()])])
def test_an_error_without_words_costs_that_sample_only(
    error: Any, tmp_path: Path, scratch: Scratch
) -> None:
    def odd(text: str) -> str:
        if text == "1":
            raise error
        return text

    path = write_tar(tmp_path / "a.tar", {"a.txt": b"1", "b.txt": b"2"})
    batches, reading = load(path, recipe({("text", "odd"): custom(odd)}), scratch)
    assert keys(batches) == ["b"]
    (rejection,) = reading.found.rejections
    assert rejection.reason.startswith("preprocessor 'odd' raised ")
    assert ":  " not in rejection.reason


class _Sizeless:
    @property
    def nbytes(self) -> int:
        raise RuntimeError("unknown")


@pytest.mark.parametrize("value", [_Sizeless(), [torch.ones(3).to_sparse()]])
def test_values_of_no_known_size_reach_the_model(
    value: Any, tmp_path: Path, scratch: Scratch
) -> None:
    path = write_tar(tmp_path / "a.tar", {"a.txt": b"1"})
    wanted = ("text", "value")
    (batch,), _ = load(path, recipe({wanted: custom(lambda text: value)}), scratch)
    assert batch.inputs[wanted] == [value]


def test_a_preprocessor_that_returns_nothing_is_told(tmp_path: Path, scratch: Scratch) -> None:
    (path,) = write_shards(tmp_path, 1, samples=1)
    _, reading = load(path, recipe({("text", "mute"): custom(lambda text: None)}), scratch)
    [(_, reason)] = reading.found.rejections
    assert reason == "preprocessor 'mute' returned None; is a `return` missing?"


@pytest.mark.parametrize("values", ["\ud800", ["\udfff"], {"\udc00": 1}, {"a": [{"b": "\ud800"}]}])
def test_a_field_that_no_parquet_can_hold_costs_that_sample_only(
    tmp_path: Path, scratch: Scratch, values: Any
) -> None:
    odd = {"odd.txt": b"", "odd.json": json.dumps({"uid": "1", "caption": values}).encode()}
    path = write_tar(tmp_path / "a.tar", {**sample("a"), **odd})
    batches, reading = load(path, recipe(fields=["caption"]), scratch)
    assert keys(batches) == ["a"]
    assert reading.found.rejections == [Rejection("odd", "field 'caption' is not valid Unicode")]
    batches, reading = load(path, recipe(fields=["uid"]), scratch)
    assert (keys(batches), reading.found.rejections) == (["a", "odd"], [])


def test_a_key_that_is_no_utf8_keeps_its_row_and_is_escaped(
    tmp_path: Path, scratch: Scratch
) -> None:
    odd = {os.fsdecode(b"na\xefve.txt"): b"text", os.fsdecode(b"\xe5.json"): b"{}"}
    path = write_tar(tmp_path / "a.tar", {**odd, **sample("b")}, format=1)
    batches, reading = load(path, recipe(), scratch)
    assert keys(batches) == ["na\\xefve", "b"]
    assert reading.found.rejections == [Rejection("\\xe5", "no text (txt); it has json")]


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE])
def test_a_sample_that_lacks_a_link_counts_once_and_says_so(
    tmp_path: Path, scratch: Scratch, kind: bytes
) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for key in "ab":
            tar.addfile(tarfile.TarInfo(f"{key}.jpg"))
            link = tarfile.TarInfo(f"{key}.txt")
            link.type, link.linkname = (kind, "z.txt") if key == "a" else (tarfile.REGTYPE, "")
            tar.addfile(link)
    batches, reading = load(path, recipe(), scratch)
    assert (keys(batches), reading.found.total) == (["b"], 2)
    [(key, reason)] = reading.found.rejections
    assert key == "a"
    assert reason == "no text (txt); it has jpg; txt is a link, and links are not followed"
    assert "--dereference" in reading.found.causes.foremost()


# --- errors of a shard ---


def test_a_strict_recipe_fails_at_the_first_rejection(scratch: Scratch) -> None:
    with pytest.raises(ShardError, match=r"bad\.tar: sample 'no-text': no text.*warn_and_continue"):
        load(SHARDS / "bad.tar", recipe(BOTH, strict=True), scratch)


@pytest.mark.parametrize(
    "function", [lambda text: torch.zeros(len(text) % 3), lambda text: "x" if "1" in text else 1]
)
def test_values_that_make_no_batch_fail_the_shard_and_name_the_preprocessor(
    tmp_path: Path, scratch: Scratch, function: Any
) -> None:
    members = {**sample("a", 9), **sample("b", 10)}
    path = write_tar(tmp_path / "a.tar", members)
    with pytest.raises(ShardError, match="preprocessor 'ragged'"):
        load(path, recipe({("text", "ragged"): custom(function)}), scratch)


def test_a_shard_that_fails_does_not_stop_the_next(tmp_path: Path, scratch: Scratch) -> None:
    good, late = write_shards(tmp_path, 2, samples=9)
    bad = [tmp_path / "missing.tar", SHARDS / "cut.tar"]
    seen: list[Any] = []
    with Loader(works(good, *bad, late), recipe(), scratch) as loader:
        for reading in loader:
            try:
                seen.append(len(keys(reading)))
            except ShardError as error:
                seen.append(type(error))
    assert seen == [9, ShardError, TruncatedShard, 9]


def test_a_truncated_shard_fails_and_says_what_takes_it(scratch: Scratch) -> None:
    with pytest.raises(TruncatedShard, match=r"at byte \d+.* it: 19 .*allow_truncated_shards"):
        load(SHARDS / "cut.tar", recipe(), scratch)


@pytest.mark.parametrize("zeros", [0, 1024])
def test_a_truncated_shard_fails_before_or_after_it_is_computed(
    tmp_path: Path, scratch: Scratch, zeros: int
) -> None:
    """One that ends in zeros all the same looks whole until its last header is read."""
    (whole,) = write_shards(tmp_path, 1, samples=9)
    whole.write_bytes(whole.read_bytes()[: 20 * 1024 + 300].ljust(21 * 1024, b"x") + bytes(zeros))
    seen: list[str] = []
    with Loader(works(whole), recipe(), scratch) as loader:
        (reading,) = loader
        with pytest.raises(TruncatedShard):
            seen += (key for batch in reading for key in batch.keys)
    assert bool(seen) == bool(zeros)


def test_a_truncated_shard_is_taken_when_that_is_asked_for(scratch: Scratch) -> None:
    batches, reading = load(SHARDS / "cut.tar", recipe(BOTH, allow_truncated=True), scratch)
    assert keys(batches) == [f"{i:07d}" for i in range(100, 119)]
    assert reading.found.rejections == [Rejection("0000119", "cut off where the archive ends")]
    assert reading.found.total == 20
    (notice,) = reading.found.notices
    size = (SHARDS / "cut.tar").stat().st_size
    assert notice.startswith("the tar is cut at byte ")
    assert f"of {size}" in notice or f"at byte {size}: " in notice
    assert notice.endswith("samples before it are taken: 19")


def test_a_broken_stream_that_is_taken_leaves_a_notice(tmp_path: Path, scratch: Scratch) -> None:
    members = {**sample("a"), **sample("b"), "b.npy": os.urandom(3 << 20), **sample("c")}
    packed = write_tar(tmp_path / "p.tar.gz", members, mode="w:gz")
    packed.write_bytes(packed.read_bytes()[:-6000])
    batches, reading = load(packed, recipe(allow_truncated=True), scratch)
    assert keys(batches) == ["a"]
    (notice,) = reading.found.notices
    assert notice.startswith("the tar is cut in the gzip stream, after ")


def test_a_whole_shard_has_no_notice_of_a_cut(tmp_path: Path, scratch: Scratch) -> None:
    (whole,) = write_shards(tmp_path, 1, samples=2)
    _, reading = load(whole, recipe(allow_truncated=True), scratch)
    assert reading.found.notices == []


@pytest.mark.parametrize("samples", [2, 4, 11])
def test_two_tars_in_one_file_are_called_that(
    tmp_path: Path, scratch: Scratch, samples: int
) -> None:
    """`cat a.tar b.tar`: whatever comes first, the second one is not read by any `tar` either."""
    first = write_tar(
        tmp_path / "a.tar", dict(i for k in range(samples) for i in sample(f"{k}").items())
    )
    second = write_tar(tmp_path / "b.tar", sample("z"))
    both = tmp_path / "both.tar"
    both.write_bytes(first.read_bytes() + second.read_bytes())
    says = f"two archives, one after the other: the next begins at byte {first.stat().st_size} of"
    with pytest.raises(TruncatedShard, match=rf"both\.tar is {says}.*`tar -A`.*`tar -xi`"):
        load(both, recipe(), scratch)
    batches, reading = load(both, recipe(allow_truncated=True), scratch)
    assert len(keys(batches)) == samples
    (notice,) = reading.found.notices
    assert notice.startswith(f"the tar is {says}")


@pytest.mark.parametrize("junk", [b"\xa7" * 512, b"chatter of a script\n" * 80])
def test_junk_between_members_is_damage_and_no_cut(
    junk: bytes, tmp_path: Path, scratch: Scratch
) -> None:
    """Members follow it, so that nobody need look for a download that was broken off."""
    tar = write_tar(tmp_path / "a.tar", {**sample("a"), **sample("b"), **sample("c")})
    whole = tar.read_bytes()
    at = whole.index(b"c.jpg")
    tar.write_bytes(whole[:at] + junk + whole[at:])
    with pytest.raises(TruncatedShard, match=rf"a\.tar is damaged at byte {at} of \d+: .*header"):
        load(tar, recipe(), scratch)
    batches, reading = load(tar, recipe(allow_truncated=True), scratch)
    assert keys(batches) == ["a", "b"]
    assert reading.found.notices[0].startswith(f"the tar is damaged at byte {at} of")


def test_zeros_before_what_is_no_header_are_no_second_tar(tmp_path: Path, scratch: Scratch) -> None:
    first = write_tar(tmp_path / "a.tar", sample("a"))
    first.write_bytes(first.read_bytes() + b"notes on the side" * 60)
    with pytest.raises(TruncatedShard, match=r"is damaged at byte \d+.*zeros, and more data after"):
        load(first, recipe(), scratch)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "it is empty"),
        (b"<html>not found</html>" * 50, "it is an HTML page"),
        (jpeg(), r"it is a picture \(JPEG\)"),
        (bytes(30_000), "zeros"),
    ],
)
@pytest.mark.parametrize("allow", [False, True])
@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_what_is_no_tar_is_named_and_never_a_finished_shard(
    tmp_path: Path, scratch: Scratch, data: bytes, says: str, allow: bool, compress: Any
) -> None:
    """No `TruncatedShard`: there is nothing in it to be taken."""
    (tmp_path / "a.tar").write_bytes(compress(data))
    with pytest.raises(ShardError, match=rf"a\.tar is no tar: .*{says}") as raised:
        load(tmp_path / "a.tar", recipe(allow_truncated=allow), scratch)
    assert type(raised.value) is ShardError


def test_a_broken_gzip_is_named_as_such(tmp_path: Path, scratch: Scratch) -> None:
    path = write_tar(tmp_path / "a.tar.gz", sample("a"), mode="w:gz")
    path.write_bytes(path.read_bytes()[:-6])
    with pytest.raises(TruncatedShard, match="in the gzip stream"):
        load(path, recipe(), scratch)


def test_an_error_of_whoever_hands_out_shards_reaches_the_reader_of_batches(
    tmp_path: Path, scratch: Scratch
) -> None:
    def claim() -> Iterator[Work]:
        yield from works(*write_shards(tmp_path, 1))
        raise ZeroDivisionError("no disk")

    with Loader(claim(), recipe(), scratch) as loader:
        given = iter(loader)
        seen = keys(next(given))
        with pytest.raises(ZeroDivisionError, match="no disk"):
            next(given)
    assert len(seen) == 5


# --- ahead, and stopping ---


def test_reading_ahead_is_bounded(tmp_path: Path, scratch: Scratch) -> None:
    """Whatever is computed slowly, memory holds some batches and no more."""
    prepared: Counter[str] = Counter()

    def count(text: str) -> str:
        prepared["all"] += 1
        return text

    paths = write_shards(tmp_path, 2, samples=150)
    most = 4 * (AHEAD + 1) + GROUP * (2 * 2 + 2)
    with Loader(works(*paths), recipe({("text", "count"): custom(count)}), scratch) as loader:
        deadline = time.monotonic() + 60
        while prepared["all"] < 4 * AHEAD and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)
        assert 4 * AHEAD <= prepared["all"] <= most
        assert [len(keys(reading)) for reading in loader] == [150, 150]


def polled(loader: Loader) -> Batch:
    """The first batch of the next shard, as soon as it is ready."""
    deadline = time.monotonic() + 60
    while (found := loader.poll()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return found[1]


def test_the_first_batch_of_the_next_shard_is_taken_where_it_is_ready(
    tmp_path: Path, scratch: Scratch
) -> None:
    reached, go_on = threading.Event(), threading.Event()

    def wait(text: str) -> str:
        if text == "caption 1000":  # the second shard's first sample
            reached.set()
            assert go_on.wait(60)
        return text

    paths = write_shards(tmp_path, 3, samples=6)
    with Loader(works(*paths), recipe({("text", "wait"): custom(wait)}), scratch) as loader:
        shards = iter(loader)
        first = next(shards)
        batches = iter(first)
        taken = next(batches)
        assert reached.wait(60)
        assert loader.poll() is None
        go_on.set()
        ahead = polled(loader)
        assert keys([taken, *batches]) == [f"{i:09d}" for i in range(6)]
        assert first.found.total == 6
        second = next(shards)
        assert keys([ahead, *second]) == [f"{10_000 + i:09d}" for i in range(6)]
        assert second.found.total == 6
        ahead = polled(loader)
        assert keys([ahead, *next(shards)]) == [f"{20_000 + i:09d}" for i in range(6)]
        assert list(shards) == []
        assert loader.poll() is None


def test_an_error_or_an_end_is_left_to_its_shard(tmp_path: Path, scratch: Scratch) -> None:
    def of_some_length(text: str) -> torch.Tensor:
        return torch.zeros(1 if text.startswith("caption 1") else len(text))

    odd, *others = write_shards(tmp_path, 2)
    write_tar(odd, {"a.txt": b"1", "b.txt": b"22"})
    empty = write_tar(tmp_path / "empty.tar", {})
    paths = [odd, tmp_path / "gone.tar", empty, *others]
    made = recipe({("text", "some"): custom(of_some_length)})
    with Loader(works(*paths), made, scratch) as loader:
        shards, found = iter(loader), []
        while not found or found[-1] != 5:
            while not (waiting := loader._next.queue) or waiting[0]._queue.empty():
                time.sleep(0.001)
            if isinstance(item := waiting[0]._queue.queue[0], Future):
                wait([item])
            ahead = loader.poll()
            assert (ahead is not None) == (len(found) == 3)
            try:
                found.append(len(keys([*([ahead[1]] if ahead else []), *next(shards)])))
            except ShardError as error:
                found.append(str(error))
    assert [*map(type, found)] == [str, str, int, int]
    assert "different shapes" in found[0]
    assert "No such file" in found[1]
    assert found[2:] == [0, 5]


@pytest.mark.parametrize("first", [1, 3, 64])
@pytest.mark.parametrize("bad", [(), (0,), (5,), (2, 3, 4), (0, 7, 8, 15, 16, 24), (24,)])
def test_batches_are_as_large_whatever_is_rejected_before_them(
    bad: tuple[int, ...],
    first: int,
    tmp_path: Path,
    scratch: Scratch,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "GROUP", 3)
    monkeypatch.setattr(module, "FIRST", first)

    def number(text: str) -> np.ndarray[Any, Any]:
        if int(text) in bad:
            raise Rejected("odd")
        return np.full((2, 2), int(text), np.uint8)

    members = {f"{i:02d}.txt": str(i).encode() for i in range(25)}
    path = write_tar(tmp_path / "a.tar", members)
    wanted = ("text", "number")
    batches, reading = load(path, recipe({wanted: custom(number)}, batch_size=8), scratch)
    good = [i for i in range(25) if i not in bad]
    assert [[int(key) for key in b.keys] for b in batches] == [
        good[i : i + 8] for i in range(0, len(good), 8)
    ]
    for batch in batches:
        assert batch.inputs[wanted][:, 0, 0].tolist() == [int(key) for key in batch.keys]
        assert batch.inputs[wanted].shape[1:] == (2, 2)
    assert [int(r.key) for r in reading.found.rejections] == [*bad]


@pytest.mark.parametrize("kept", [20, 10, 2])
def test_rejected_samples_take_no_batchs_memory(
    kept: int, tmp_path: Path, scratch: Scratch
) -> None:
    """Of 20 samples some are kept: batches of rows from many trays hold no more than others do."""
    rows, size = 32, 50_000

    def some(text: str) -> np.ndarray[Any, Any]:
        if int(text) * 7 % 20 >= kept:
            raise Rejected("odd")
        return np.full(size, int(text) % 256, np.uint8)

    members = {f"{i:04d}.txt": str(i).encode() for i in range(1000)}
    path = write_tar(tmp_path / "a.tar", members)
    made = recipe({("text", "some"): custom(some)}, batch_size=rows)
    found: list[int] = []
    tracemalloc.start()
    try:
        with Loader(works(path, path), made, scratch) as loader:
            for reading in loader:
                for batch in reading:
                    assert len(batch.keys) <= rows
                    found += batch.inputs["text", "some"][:, -1].tolist()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found == [i % 256 for i in range(1000) if i * 7 % 20 < kept] * 2
    # Those that wait, one that is made, one in hand, and those of the threads that prepare more.
    assert peak < (2 * AHEAD + 4) * rows * size


@pytest.mark.parametrize("form", [lambda a: (a, 1), lambda a: [a], lambda a: {"x": (a,)}])
def test_whole_pictures_within_others_end_a_batch_too(
    form: Callable[[Any], Any], tmp_path: Path, scratch: Scratch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH_BYTES", 2 * WHOLE)
    inputs = {("text", "whole"): custom(lambda text: form(np.zeros(WHOLE, np.uint8)))}
    path = write_tar(tmp_path / "a.tar", {f"{i:02d}.txt": b"1" for i in range(5)})
    batches, _ = load(path, recipe(inputs, batch_size=100), scratch)
    assert [len(batch.keys) for batch in batches] == [2, 2, 1]


def test_no_sample_is_prepared_while_the_gate_is_shut(
    tmp_path: Path, scratch: Scratch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gates, "PATIENCE", 3600.0)
    prepared: list[str] = []

    def note(text: str) -> str:
        prepared.append(text)
        return text

    class Told(Gate):
        arrived = threading.Event()

        def wait(self) -> None:
            self.arrived.set()
            super().wait()

    gate, [path] = Told(), write_shards(tmp_path, 1, samples=20)
    made = recipe({("text", "note"): custom(note)})
    with ExitStack() as stack:
        with gate.shut():
            loader = stack.enter_context(Loader(works(path), made, scratch, gate=gate))
            assert gate.arrived.wait(60)
            assert prepared == []
        assert [len(keys(reading)) for reading in loader] == [20]
    assert len(prepared) == 20


def test_whole_pictures_are_bounded_by_their_bytes(
    tmp_path: Path, scratch: Scratch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A custom preprocessor hands on pictures of 5 MB: there is room for two, and for as many in
    each batch; without a bound, two full batches and 14 groups would be in memory."""
    size = 1250 * 1000 * 4
    monkeypatch.setattr(module, "GROUP", 1)
    monkeypatch.setattr(module, "IN_FLIGHT", 2 * size)
    monkeypatch.setattr(module, "BATCH_BYTES", 2 * size)
    held: list[Any] = []

    def whole(picture: Image.Image) -> Image.Image:
        held.append(1)
        return picture

    data = jpeg(1, (1250, 1000))
    path = write_tar(tmp_path / "a.tar", {f"{i:02d}.jpg": data for i in range(30)})
    made = recipe({("image", "whole"): custom(whole)}, batch_size=100, threads=4)
    with Loader(works(path), made, scratch) as loader:
        time.sleep(1)
        assert len(held) <= 2 * AHEAD + 2 + 3 + 4  # batches, one that is made, the pool, a start
        ((first, *others),) = [[len(keys([b])) for b in reading] for reading in loader]
    assert first == 2
    assert set(others) == {2}
    assert len(held) == 30


def test_the_bound_is_one_for_all_shards(
    tmp_path: Path, scratch: Scratch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "GROUP", 1)
    prepared: list[str] = []

    def count(text: str) -> str:
        prepared.append(text)
        return text

    paths = [
        write_tar(tmp_path / f"{n}.tar", {f"{i:02d}.txt": b"1" for i in range(n)}) for n in (20, 40)
    ]
    most = 4 * (2 + AHEAD + 1) + 2 * 2 + 2
    with Loader(works(*paths), recipe({("text", "count"): custom(count)}), scratch) as loader:
        batches = iter(next(iter(loader)))
        for _ in range(2):
            next(batches)
        deadline = time.monotonic() + 60
        while len(prepared) <= 4 * AHEAD and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)
        assert 4 * AHEAD < len(prepared) <= most


def claimed(folder: Path, paths: list[Path], taken: list[Path]) -> Iterator[Work]:
    for path in paths:
        lease = Lease(folder / f"{path.stem}.lock")
        assert lease.claim()
        taken.append(path)
        yield Work(Job(Shard(path.stem, str(path))), lease)


@pytest.mark.parametrize("after", [0, 1, 2, 7, 8])
@pytest.mark.parametrize("packed", [False, True])
def test_closed_while_reading_it_lets_go_of_everything(
    tmp_path: Path, scratch: Scratch, after: int, packed: bool
) -> None:
    paths = write_shards(tmp_path / "in", 4, samples=30)
    if packed:
        paths = [
            write_tar(p.with_suffix(".tar.gz"), {f"{i}.txt": b"1" for i in range(30)}, mode="w:gz")
            for p in paths
        ]
    leases, taken = tmp_path / "leases", list[Path]()
    leases.mkdir()
    held: list[Reading] = []
    seen = 0
    loader = Loader(claimed(leases, paths, taken), recipe(), scratch)
    with loader:
        for reading in loader:
            held.append(reading)
            for _ in reading:
                if seen == after:
                    break
                seen += 1
            else:
                reading.work.release()
                held.remove(reading)
                continue
            break
    assert seen == after
    # What was handed out is its holder's to release; all else that was claimed is free again.
    assert [p.stem for p in leases.iterdir()] == [r.work.shard.stem for r in held]
    assert 1 <= len(taken) < 4
    for reading in held:
        reading.work.release()


def test_closed_before_anyone_asked_it_lets_go_of_everything(
    tmp_path: Path, scratch: Scratch
) -> None:
    paths, taken = write_shards(tmp_path / "in", 3, samples=40), list[Path]()
    leases = tmp_path / "leases"
    leases.mkdir()
    with Loader(claimed(leases, paths, taken), recipe(), scratch):
        pass
    assert list(leases.iterdir()) == []


def test_a_shard_that_is_given_up_makes_way_for_the_next(tmp_path: Path, scratch: Scratch) -> None:
    """Its batches fill the queue; nobody will take them."""
    paths = write_shards(tmp_path, 3, samples=60)
    counts = []
    with Loader(works(*paths), recipe(), scratch) as loader:
        for number, reading in enumerate(loader):
            if number == 1:
                next(iter(reading))
                reading.cancel()
            else:
                counts.append(len(keys(reading)))
    assert counts == [60, 60]


def test_closing_does_not_wait_for_a_shard_in_other_hands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who hands out shards may be waiting for another task, for hours."""
    monkeypatch.setattr(module, "STOP_SECONDS", 0.2)
    other, waiting = threading.Event(), threading.Event()
    asked_again: list[bool] = []
    lease = Lease(tmp_path / "a.lock")

    def claim() -> Iterator[Work]:
        waiting.set()
        other.wait(30)
        assert lease.claim()
        yield Work(Job(Shard("a", "/no/such.tar")), lease)
        asked_again.append(True)

    with Loader(claim(), recipe(), Scratch(tmp_path, 0)) as loader:
        assert waiting.wait(10)
    assert not other.is_set()
    other.set()
    loader._reader.join(10)
    assert not loader._reader.is_alive()
    # What it was given after the end it lets go of at once.
    assert not (tmp_path / "a.lock").exists()
    assert not asked_again


def test_a_tar_that_shrinks_while_it_is_read_fails_the_shard(
    tmp_path: Path, scratch: Scratch
) -> None:
    """Someone writes it again: what is left of a member is not the member."""
    (path,) = write_shards(tmp_path, 1, samples=3)

    def shrink(text: str) -> str:
        os.truncate(path, 0)
        return text

    made = recipe({("text", "shrink"): custom(shrink)}, threads=1, batch_size=1)
    with pytest.raises(ShardError, match="changed while it was read"):
        load(path, made, scratch)


def test_a_scratch_folder_that_is_gone_fails_the_shard(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar.gz", sample("k"), mode="w:gz")
    with pytest.raises(OSError, match="gone"):
        load(path, recipe(), Scratch(tmp_path / "gone", sys.maxsize))
