"""One sample prepared: DataComp's names for JSON and text, and the bound on what decoding holds."""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kit import jpeg, write_tar
from PIL import Image, ImageFile

from d2m_hpc import config as configs
from d2m_hpc.errors import Rejected
from d2m_hpc.models import formats
from d2m_hpc.models.preprocessors import PREPROCESSORS
from d2m_hpc.run.records import Rejection
from d2m_hpc.worker.read import decode
from d2m_hpc.worker.read.prepare import Budget, Held, Ready, Recipe, prepare
from d2m_hpc.worker.read.shard import Archive

UID = "0" * 28 + "00ab"


def _prepared(
    folder: Path, values: dict[str, Any], text: bytes | None = b"of the txt", **more: Any
) -> dict[str, Any] | str:
    """The fields of one sample, or why it is rejected."""
    members = {"a.json": json.dumps(values).encode()} | ({"a.txt": text} if text else {})
    config = configs.Config(
        models=["text-stats"],
        input_tars=["unused"],
        output_metadata_dir="unused",
        **{"additional_fields": ["uid"], "use_datacomp_keys": True, **more},
    )
    recipe = Recipe.of(config, {})
    with closing(Archive(write_tar(folder / "a.tar", members))) as archive:
        (sample,) = archive.index()
        made = prepare(sample, archive, recipe)
    if isinstance(made, Rejection):
        return made.reason
    assert isinstance(made, Ready)
    return dict(zip(recipe.fields, made.fields, strict=True))


def test_text_is_the_caption(tmp_path: Path) -> None:
    assert _prepared(tmp_path, {"uid": UID, "caption": "of the JSON"}) == {
        "uid": UID,
        "text": "of the JSON",
    }


@pytest.mark.parametrize("caption", [{}, {"caption": None}, {"caption": 7}])
def test_text_is_the_txts_where_there_is_no_caption(
    tmp_path: Path, caption: dict[str, Any]
) -> None:
    assert _prepared(tmp_path, {"uid": UID, **caption}) == {"uid": UID, "text": "of the txt"}


def test_an_empty_caption_is_a_text(tmp_path: Path) -> None:
    assert _prepared(tmp_path, {"uid": UID, "caption": ""}, text=None) == {"uid": UID, "text": ""}


def test_a_sample_without_any_text_is_rejected(tmp_path: Path) -> None:
    reason = _prepared(tmp_path, {"uid": UID, "caption": None}, text=None)
    assert reason == "no text (txt); it has json"


def test_text_is_without_the_captions_byte_order_mark(tmp_path: Path) -> None:
    fields = _prepared(tmp_path, {"caption": "\ufeffc"}, additional_fields=["caption"])
    assert fields == {"text": "c", "caption": "\ufeffc"}
    assert _prepared(tmp_path, {}, "\ufeffc".encode(), additional_fields=[]) == {"text": "c"}


def test_text_is_there_once_and_beside_the_caption(tmp_path: Path) -> None:
    fields = _prepared(
        tmp_path, {"caption": "c", "text": "t"}, additional_fields=["text", "caption"]
    )
    assert fields == {"text": "c", "caption": "c"}
    assert list(fields) == ["text", "caption"]


def test_without_datacomps_names_nothing_is_added_or_changed(tmp_path: Path) -> None:
    values = {"uid": "AB", "caption": "c"}
    assert _prepared(tmp_path, values, use_datacomp_keys=False) == {"uid": "AB"}


@pytest.mark.parametrize(
    ("uid", "normal"),
    [("ab", UID), ("AB", UID), (UID, UID), ("F" * 32, "f" * 32)],
)
def test_a_uid_is_32_lower_case_digits(tmp_path: Path, uid: str, normal: str) -> None:
    fields = _prepared(tmp_path, {"uid": uid})
    assert isinstance(fields, dict)
    assert fields["uid"] == normal


@pytest.mark.parametrize("uid", [None, "", 171, "0" * 33, "xyz", "0xab", "ab\n", "a b"])
def test_a_sample_without_a_usable_uid_is_rejected(tmp_path: Path, uid: Any) -> None:
    reason = _prepared(tmp_path, {"uid": uid})
    assert reason == f"no usable uid: found {str(uid)!r}, valid are up to 32 hex digits"


def test_a_uid_that_nobody_asked_for_is_not_looked_at(tmp_path: Path) -> None:
    assert _prepared(tmp_path, {}, additional_fields=[]) == {"text": "of the txt"}


def _picture(kind: str, size: tuple[int, int] = (300, 200), mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, 90).save(buffer, kind)
    return buffer.getvalue()


def test_threads_decode_no_more_at_a_time_than_the_budget_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight threads, and room for three of these pictures."""
    lock, real = threading.Lock(), ImageFile.ImageFile.load
    now, seen = 0, []

    def load(image: ImageFile.ImageFile) -> Any:
        nonlocal now
        with lock:
            now += 1
            seen.append(now)
        time.sleep(0.002)
        with lock:
            now -= 1
        return real(image)

    members = {f"{i:03d}.png": _picture("PNG") for i in range(40)}
    config = configs.Config(models=["m"], input_tars=["unused"], output_metadata_dir="unused")
    recipe = Recipe.of(config, {("image", "stats-aug"): PREPROCESSORS["stats-aug"]})
    cost = formats.cost("PNG", 300, 200, 10**9)
    recipe = dataclasses.replace(recipe, budget=Budget(3 * cost + 1))
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", load)
    with closing(Archive(write_tar(tmp_path / "a.tar", members))) as archive:
        samples = list(archive.index())
        with ThreadPoolExecutor(8) as pool:
            made = list(pool.map(lambda sample: prepare(sample, archive, recipe), samples))
    assert all(isinstance(m, Ready) for m in made)
    assert 2 <= max(seen) <= 3
    assert recipe.budget.take(3 * cost + 1) == 3 * cost + 1


@pytest.mark.parametrize("how", ["whole", "scaled"])
def test_a_config_says_whether_large_jpegs_are_decoded_whole(tmp_path: Path, how: str) -> None:
    config = configs.Config(
        models=["m"], input_tars=["unused"], output_metadata_dir="unused", decode=how
    )
    seen = dataclasses.replace(PREPROCESSORS["identity"], prepare=lambda image, _: image.size)
    recipe, data = Recipe.of(config, {("image", "identity"): seen}), jpeg(size=(2048, 2050))
    with closing(Archive(write_tar(tmp_path / "a.tar", {"a.jpg": data}))) as archive:
        (sample,) = archive.index()
        made = prepare(sample, archive, recipe)
    assert isinstance(made, Ready)
    assert made.inputs["image", "identity"] == ((1024, 1025) if how == "scaled" else (2048, 2050))


MEASURE = """
import sys
from pathlib import Path
from d2m_hpc.models.preprocessors import PREPROCESSORS, Options
from d2m_hpc.worker.read import decode

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))

made = PREPROCESSORS["stats-aug"]
made.prepare(decode.image(Path(sys.argv[1]).read_bytes(), 10**9), Options())  # as a start
for path in sys.argv[2:]:
    data = Path(path).read_bytes()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = status("VmRSS")
    made.prepare(decode.image(data, 10**9), Options())
    print(path, status("VmHWM") - before)
"""


def test_decoding_takes_no_more_than_is_asked_for(tmp_path: Path) -> None:
    """Of each format, in a process whose peak of memory the system tells."""
    width, height = 3000, 2500
    pixels = np.random.default_rng(1).integers(0, 256, (50, 60, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels).resize((width, height))
    small = tmp_path / "small.jpg"
    small.write_bytes(jpeg())
    options: dict[str, Any] = {"AVIF": {"speed": 10}, "WEBP": {"method": 0}}
    for kind in formats.FORMATS:
        picture.save(tmp_path / kind, kind, **options.get(kind, {}))
    paths = [str(tmp_path / kind) for kind in formats.FORMATS]
    command = [sys.executable, "-c", MEASURE, str(small), *paths]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    taken = {Path(path).name: int(size) for path, size in map(str.split, told.splitlines())}
    asked = {kind: formats.cost(kind, width, height, 10**9) for kind in formats.FORMATS}
    slack = 16 << 20  # of libraries that are loaded for a first picture of a format
    assert {k: taken[k] for k in asked if taken[k] > asked[k] + slack} == {}


@pytest.mark.parametrize("name", ["jpg", "txt", "json"])
def test_a_member_of_gigabytes_is_rejected_unread(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.tar"
    info = tarfile.TarInfo(f"a.{name}")
    info.size = 3 << 30
    with open(path, "wb") as file:  # sparse
        file.write(info.tobuf())
        file.truncate(512 + info.size + 1024)
    kind = {"jpg": "image", "txt": "text"}.get(name, name)
    config = configs.Config(models=["m"], input_tars=["unused"], output_metadata_dir="unused")
    recipe = Recipe.of(config, {(kind, "identity"): PREPROCESSORS["identity"]})
    with closing(Archive(path)) as archive:
        (sample,) = archive.index()
        made = prepare(sample, archive, recipe)
    assert isinstance(made, Rejection)
    assert made.reason.startswith(f"the {kind} file has 3,221,225,472 bytes, over ")


def test_a_large_member_is_held_while_no_other_is(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", {"a.txt": bytes(17 << 20)})
    config = configs.Config(models=["m"], input_tars=["unused"], output_metadata_dir="unused")
    recipe = Recipe.of(config, {("text", "identity"): PREPROCESSORS["identity"]})
    recipe.budget.take(1)
    with closing(Archive(tar)) as archive, ThreadPoolExecutor(1) as pool:
        (sample,) = archive.index()
        waiting = pool.submit(prepare, sample, archive, recipe)
        time.sleep(0.1)
        assert not waiting.done()
        recipe.budget.give(1)
        assert isinstance(waiting.result(60), Ready)


@pytest.mark.parametrize("kind", formats.FORMATS)
def test_what_decoding_takes_is_asked_for_before_it_is_taken(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    data = _picture(kind)

    def refuse(size: int) -> None:
        asked.append(size)
        raise Rejected("not now")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", None)  # a call would be another error
    monkeypatch.setattr("simplejpeg.decode_jpeg", None)
    with pytest.raises(Rejected, match="not now"):
        decode.image(data, 10**6, refuse)
    assert asked == [formats.cost(kind, 300, 200, 10**9)]


def _until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_threads_hold_no_more_than_the_budget_together() -> None:
    budget, lock = Budget(10), threading.Lock()
    now = most = 0

    def work(amount: int) -> None:
        nonlocal now, most
        with Held(budget) as held:
            held.need(amount)
            with lock:
                now += min(amount, 10)
                most = max(most, now)
            time.sleep(0.0005)
            with lock:
                now -= min(amount, 10)

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(work, [1, 4, 7, 30, 3, 10, 2, 6] * 25))
    assert now == 0
    assert 7 < most <= 10
    assert budget.take(10) == 10


def test_who_wants_much_is_not_passed_by_for_ever() -> None:
    budget = Budget(10)
    taken: list[str] = []
    budget.take(6)

    def take(name: str, amount: int) -> None:
        budget.take(amount)
        taken.append(name)

    large = threading.Thread(target=take, args=("large", 9))
    large.start()
    _until(lambda: len(budget._waiting) == 1)
    small = threading.Thread(target=take, args=("small", 1))  # there would be room for it
    small.start()
    _until(lambda: len(budget._waiting) == 2)
    assert taken == []
    budget.give(6)
    large.join(30)
    small.join(30)
    assert sorted(taken) == ["large", "small"]


def test_a_sample_that_needs_more_gives_back_what_it_holds_first() -> None:
    """Two that each hold half and wait for the rest would wait for ever."""
    budget, met = Budget(10), threading.Barrier(2, timeout=30)

    def work() -> None:
        with Held(budget) as held:
            held.need(5)
            met.wait()
            held.need(8)
            held.need(3)

    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(work) for _ in range(2)]:
            future.result(timeout=30)
    assert budget.take(10) == 10


def test_an_error_gives_back_what_was_held() -> None:
    budget = Budget(3)

    def work() -> None:
        with Held(budget) as held:
            held.need(2)
            raise KeyError

    with pytest.raises(KeyError):
        work()
    assert budget.take(3) == 3
