"""What a batch asks of CUDA: launches, waiting, memory, devices; its values are in tests/gpu."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from kit import DATACOMP, SHARDS, captions, photographs, write_config

from d2m_hpc import config as configs
from d2m_hpc.models.blocks import Reused
from d2m_hpc.models.preprocessors import Options, Picture
from d2m_hpc.worker.batch import Batch, Outputs, collate
from d2m_hpc.worker.compute.ahead import in_turn
from d2m_hpc.worker.compute.graph import Graph
from d2m_hpc.worker.compute.in_flight import InFlight
from d2m_hpc.worker.compute.resolve import Toolbox
from d2m_hpc.worker.work import Clock


def _graph(folder: str, checkpoints: str, **more: Any) -> Graph:
    config = configs.load(
        write_config(
            Path(folder, "config.yml"),
            {**DATACOMP, "batch_size": 8, "device": 0, **more},
            input_tars=str(SHARDS / "00000.tar"),
            output_metadata_dir=str(Path(folder, "out")),
            weights_dir=checkpoints,
            allow_unpublished_weights=True,
        )
    )
    number = int(str(config.device).removeprefix("cuda:"))
    return Graph(config, Toolbox.of(config), torch.device("cuda", number))


def _batches(graph: Graph, count: int, size: int = 8, memory: Reused | None = None) -> list[Batch]:
    """Of the same samples."""
    memory = memory or Reused(size, graph.device)
    pictures = [Picture(p) for p in photographs(8)] * (size // 8)
    raw = {"image": pictures, "text": captions()[:8] * (size // 8)}
    made = {
        wanted: [p.prepare(value, Options()) for value in raw[wanted[0]]]
        for wanted, p in graph.toolbox.inputs.items()
    }
    keys = [str(i) for i in range(size)]
    return [Batch(keys, {w: collate(v, memory) for w, v in made.items()}, {}) for _ in range(count)]


def steady(gpu: Any, folder: str, checkpoints: str) -> dict[str, Any]:
    graph = _graph(folder, checkpoints, device="cuda:1")
    first, second, third, fourth = _batches(graph, 4)
    with graph:
        list(graph.run([first, second]))
        launched = graph.launch(third)
        gpu.reset()
        last = graph.launch(fourth)
        asked = ("wait", "cudaMalloc", "cudaHostAlloc", "cudaHostRegister", "search", "kernel")
        counts = {what: gpu.count(what) for what in asked}
        rows = [len(made.outputs().keys) for made in (launched, last)]
        counts["waits for outputs"] = gpu.count("wait") - counts["wait"]
    return {**counts, "rows": rows, "contexts": [gpu.has_context(i) for i in range(2)]}


def test_a_batch_is_launched_without_waiting_and_finds_its_memory(
    nogpu: Any, tmp_path: Path, checkpoints: Path
) -> None:
    found = nogpu(steady, str(tmp_path), str(checkpoints), devices=2)
    assert found.pop("kernel") > 100
    assert found == {
        "wait": 0,
        "cudaMalloc": 0,
        "cudaHostAlloc": 0,
        "cudaHostRegister": 0,
        "search": 0,
        "rows": [8, 8],
        "waits for outputs": 2,
        "contexts": [False, True],  # of `cuda:1` alone
    }


def across(gpu: Any, folder: str, checkpoints: str) -> dict[str, Any]:
    """Shards of two batches, the first ones until launches are recorded."""
    graph, told = _graph(folder, checkpoints), list[list[int | str]]()
    batches = [Batch([str(i)] * 8, b.inputs, {}) for i, b in enumerate(_batches(graph, 10))]
    shards = [iter(batches[i : i + 2]) for i in range(0, 10, 2)]
    launch, outputs, handed = graph.launch, InFlight.outputs, [1]

    def launching(batch: Batch) -> InFlight:
        before = [gpu.count(what) for what in ("wait", "cudaMalloc", "cudaHostRegister")]
        made = launch(batch)
        after = [gpu.count(what) for what in ("wait", "cudaMalloc", "cudaHostRegister")]
        told.append(["launch", batch.keys[0], sum(after) - sum(before)])
        return made

    def reading(flight: InFlight) -> Outputs:
        told.append(["read", flight._batch.keys[0]])
        return outputs(flight)

    def poll() -> tuple[Clock, Batch] | None:
        return (Clock(), next(shards[handed[0]])) if handed[0] < 5 else None

    graph.launch, InFlight.outputs = launching, reading
    with graph, closing(in_turn(graph, shards, poll)) as turns:
        for _, made in turns:
            for some in made:
                assert len(some.keys) == 8
            told.append(["end"])
            handed[0] += 1
    return {"told": told[-12:]}


def test_the_next_shard_is_launched_without_waiting_while_one_is_computed(
    nogpu: Any, tmp_path: Path, checkpoints: Path
) -> None:
    """A shard's last outputs are read while the device has something to do."""
    assert nogpu(across, str(tmp_path), str(checkpoints))["told"] == [
        *(["launch", "6", 0], ["read", "5"], ["end"]),
        *(["launch", "7", 0], ["read", "6"], ["launch", "8", 0], ["read", "7"], ["end"]),
        *(["launch", "9", 0], ["read", "8"], ["read", "9"], ["end"]),
    ]


def dropped(gpu: Any, folder: str, checkpoints: str) -> list[Any]:
    graph, found = _graph(folder, checkpoints), []
    memory = Reused(8, graph.device)
    batches = _batches(graph, 2, memory=memory)
    shards = [iter([batches.pop()]), iter(list[Batch]())]
    wait = graph.wait

    def noted() -> None:
        found.append([gpu.count("wait") - before, _free(memory)])
        wait()
        found.append([gpu.count("wait") - before, _free(memory)])

    graph.wait = noted
    with graph, closing(in_turn(graph, shards, lambda: (Clock(), batches.pop()))) as turns:
        for some in next(turns)[1]:
            assert len(some.keys) == 8
        before = gpu.count("wait")
    del turns, shards
    return [*found, [0, _free(memory)]]


def _free(memory: Reused) -> int:
    """Blocks that may be lent again."""
    return sum(len(blocks) for blocks in memory._free.values())


def test_memory_of_a_shard_that_is_dropped_is_lent_after_the_device_is_done(
    nogpu: Any, tmp_path: Path, checkpoints: Path
) -> None:
    (waits, free), (after, still), (_, last) = nogpu(dropped, str(tmp_path), str(checkpoints))
    assert (waits, after) == (0, 1)
    assert free == still > 0
    assert last == 2 * free


def recorded(gpu: Any, folder: str, checkpoints: str) -> dict[str, Any]:
    graph = _graph(folder, checkpoints)
    found, shut, own = [], list[int](), graph.gate.shut

    @contextmanager
    def noted() -> Iterator[None]:
        before = gpu.count("kernel")
        with own():
            yield
        shut.append(gpu.count("kernel") - before)

    graph.gate.shut = noted
    with graph:
        for batch in _batches(graph, 5):
            gpu.reset()
            shut.clear()
            rows = len(graph(batch).keys)
            asked = ("kernel", "kernel in a graph", "cudaGraphInstantiate", "cudaMalloc")
            counts = {what: gpu.count(what) for what in asked}
            found.append({"rows": rows, **counts, "while shut": sum(shut), "shut": len(shut)})
    return {"batches": found, "forgotten": not graph._graphs.has_recorded}


def test_launches_are_recorded_and_made_again_as_one(
    nogpu: Any, tmp_path: Path, checkpoints: Path
) -> None:
    found = nogpu(recorded, str(tmp_path), str(checkpoints))
    first, second, third, fourth, last = found["batches"]
    assert [first["cudaGraphInstantiate"], second["cudaGraphInstantiate"]] == [0, 0]
    assert third["cudaGraphInstantiate"] > 4
    assert fourth == last
    assert last["kernel in a graph"] > 3 * last["kernel"]
    assert (last["while shut"], last["shut"]) == (last["kernel"], 2)  # outputs are read the second
    assert found["forgotten"]


def scarce(gpu: Any, folder: str, checkpoints: str) -> list[dict[str, Any]]:
    graph = _graph(folder, checkpoints, batch_size=32)
    found = []
    with graph:
        for batch in _batches(graph, 4, 32):
            gpu.reset()
            rows = len(graph(batch).keys)
            asked = {what: gpu.count(what) for what in ("cudaMalloc", "cudaFree")}
            found.append({"rows": rows, "fitting": graph._fitting, **asked})
    return found


def test_the_number_of_samples_that_fit_is_remembered(
    nogpu: Any, tmp_path: Path, checkpoints: Path
) -> None:
    first, *_, last = nogpu(scarce, str(tmp_path), str(checkpoints), memory=400 << 20)
    assert first["cudaFree"] > 0
    assert last == {"rows": 32, "fitting": first["fitting"], "cudaMalloc": 0, "cudaFree": 0}
    assert first["fitting"] < 32


def given_up(gpu: Any, folder: str, checkpoints: str) -> dict[str, Any]:
    """Something else takes what is left of the device, once launches are recorded."""
    graph, taken, waits = _graph(folder, checkpoints), list[torch.Tensor](), list[int]()
    give_up = graph._graphs.give_up

    def noted() -> bool:
        waits.append(gpu.count("cudaEventSynchronize"))
        return give_up()

    with graph:
        *batches, last = _batches(graph, 5)
        for batch in batches:
            graph(batch)
        torch.cuda.empty_cache()
        with suppress(torch.OutOfMemoryError):
            while True:
                taken.append(torch.empty(1 << 20, dtype=torch.uint8, device=graph.device))
        graph._graphs.give_up = noted
        gpu.reset()
        flight = graph.launch(last)
        return {"waits": waits, "rows": len(flight.outputs().keys)}


def test_what_was_launched_is_waited_for_before_its_memory_is_used_again(
    nogpu: Any, tmp_path: Path, checkpoints: Path
) -> None:
    """Where launches are recorded no more, the same rows are launched again."""
    found = nogpu(given_up, str(tmp_path), str(checkpoints), memory=1 << 30)
    assert found["rows"] == 8
    assert found["waits"][0] > 0
