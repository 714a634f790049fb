"""Rows of the loader: from tars to batches."""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from benchmarks import baseline, data, reference, workload
from benchmarks.harness import Row, Setting, Sides, timed
from d2m_hpc.config import Config
from d2m_hpc.worker.batch import Batch
from d2m_hpc.worker.compute.resolve import Toolbox
from d2m_hpc.worker.read import decode
from d2m_hpc.worker.read.loader import GROUP
from d2m_hpc.worker.read.prepare import Recipe

Resize = Literal["fast", "exact"]


def drain(expected: int, batches: Callable[[], Iterator[Any]], size: Callable[[Any], int]) -> None:
    """Take all batches.

    Raises:
        RuntimeError: they do not hold every sample.
    """
    found = sum(map(size, batches()))
    if found != expected:
        raise RuntimeError(f"{found} of {expected} samples came out")


def _our_size(batch: Batch) -> int:
    return len(batch.keys)


def _fields_size(batch: Sequence[Any]) -> int:
    """By the JSON's fields, which stand last."""
    return len(batch[-1])


def _conventional(config: Config, setting: Setting) -> Iterator[list[Any]]:
    return baseline.loader(
        config.input_tars,
        setting.workers,
        config.batch_size,
        list(Toolbox.of(config).inputs),
        config.additional_fields,
    )


@contextmanager
def whole_tars(
    setting: Setting, models: Sequence[str], tars: int, samples: int, resize: Resize
) -> Iterator[Sides]:
    """All batches of some tars; ours has uint8 pixels, which the device normalises.

    What the libraries take of it is in the JSON, too: no loader that uses them takes less.
    """
    size = setting.size(samples, 6)
    keys = workload.keys(data.tars(setting.folder, tars, size), setting.workers, models)
    config = Config(**keys, resize=resize)
    rows = tars * size

    def ours() -> float:
        batches = partial(workload.batches, config, setting.folder)
        return timed(lambda: drain(rows, batches, _our_size))

    def conventional() -> float:
        if setting.reference:
            return reference.seconds(setting.reference, "loader", keys, rows)
        batches = partial(_conventional, config, setting)
        return timed(lambda: drain(rows, batches, _fields_size))

    more: dict[str, Any] = {}
    yield Sides(ours, conventional, more=more)
    more["libraries_alone"] = [_pictures_alone(config) for _ in range(setting.size(3, 1))]


def _pictures_alone(config: Config) -> float:
    """Decoding and resizing of the tars' images, which lie in memory, in as many threads."""
    recipe = Recipe.of(config, Toolbox.of(config).inputs)
    wanted = [made for (raw, _), made in recipe.inputs.items() if raw == "image"]

    def prepare(images: Sequence[bytes]) -> None:
        for image in images:
            picture = decode.image(image, recipe.options.max_pixels)
            for made in wanted:
                made.prepare(picture, recipe.options)

    images = [image for tar in config.input_tars for image in _images(tar)]
    groups = [images[i : i + GROUP] for i in range(0, len(images), GROUP)]
    with ThreadPoolExecutor(recipe.threads, "", torch.set_num_threads, (1,)) as pool:
        return timed(lambda: list(pool.map(prepare, groups)))


def _images(tar: str) -> Iterator[bytes]:
    with tarfile.open(tar) as file:
        for member in file:
            if member.name.endswith(".jpg") and (content := file.extractfile(member)):
                yield content.read()


@contextmanager
def first_batch(setting: Setting) -> Iterator[Sides]:
    """From a tar's name to its first batch."""
    keys = workload.keys(
        data.tars(setting.folder, 1, setting.size(10_000, 130)), setting.workers, workload.MODELS
    )
    config = Config(**keys)

    def ours() -> float:
        return _until_first(partial(workload.batches, config, setting.folder))

    def conventional() -> float:
        if setting.reference:
            return reference.seconds(setting.reference, "first-batch", keys, workload.BATCH)
        return _until_first(partial(_conventional, config, setting))

    yield Sides(ours, conventional)


def _until_first(batches: Callable[[], Iterator[Any]]) -> float:
    """Closing what reads ahead is not counted."""
    started: list[Iterator[Any]] = []

    def first() -> None:
        started.append(batches())
        next(started[0])

    return timed(first)


class _Processes(IterableDataset[Batch]):
    """Our loader with one decode thread, in each of several processes, over its share of tars."""

    def __init__(self, keys: dict[str, Any], scratch: Path) -> None:
        self._keys, self._scratch = keys, scratch

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        assert worker is not None
        tars = self._keys["input_tars"][worker.id :: worker.num_workers]
        config = Config(**self._keys | {"input_tars": tars, "nworkers": 1})
        return workload.batches(config, self._scratch)


@contextmanager
def threads(setting: Setting) -> Iterator[Sides]:
    """Our loader's threads against as many processes of it; batches come by shared memory."""
    count, size = 4 * setting.workers, setting.size(250, 6)
    keys = workload.keys(data.tars(setting.folder, count, size), setting.workers, workload.MODELS)

    def processes() -> Iterator[Batch]:
        dataset = _Processes(keys, setting.folder)
        yield from DataLoader(dataset, batch_size=None, num_workers=setting.workers)

    def in_threads() -> Iterator[Batch]:
        return workload.batches(Config(**keys), setting.folder)

    yield Sides(
        ours=lambda: timed(lambda: drain(count * size, in_threads, _our_size)),
        baseline=lambda: timed(lambda: drain(count * size, processes, _our_size)),
    )


def _loader(
    name: str,
    what: str,
    target: float,
    models: Sequence[str] = workload.MODELS,
    resize: Resize = "fast",
    many: bool = True,
) -> Row:
    """Of many tars, or of a single large one."""

    def prepare(setting: Setting) -> AbstractContextManager[Sides]:
        tars, samples = (4 * setting.workers, 250) if many else (1, 1000)
        return whole_tars(setting, models, tars, samples, resize)

    return Row(f"loader-{name}", f"loader, {what}", target, prepare, takes_reference=True)


ROWS = (
    _loader("one-tar", "one tar", 6, many=False),
    _loader("many-tars", "many tars", 4.5),
    _loader("exact", "many tars, PIL resizing (`resize: exact`)", 2.5, resize="exact"),
    _loader("clip", "many tars, CLIP's inputs only", 4, models=workload.CLIP),
    Row(
        "first-batch",
        "from a tar of 10,000 samples to its first batch",
        5,
        first_batch,
        takes_reference=True,
    ),
    Row("threads", "our loader in threads, against the same in processes", 1, threads),
)
