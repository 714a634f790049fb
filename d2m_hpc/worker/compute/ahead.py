"""Go from shard to shard without a pause of the device."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future
from contextlib import closing
from typing import TypeVar

from d2m_hpc.stopping import is_asked
from d2m_hpc.worker.batch import Batch, Outputs
from d2m_hpc.worker.compute.graph import Graph
from d2m_hpc.worker.compute.in_flight import InFlight
from d2m_hpc.worker.work import Clock

S = TypeVar("S", bound=Iterable[Batch])


def in_turn(
    graph: Graph, shards: Iterable[S], poll: Callable[[], tuple[Clock, Batch] | None]
) -> Generator[tuple[S, Generator[Outputs]]]:
    """Yield each shard and its outputs, which are valid until the next shard is asked for.

    On a GPU, the first batch of the next shard is launched before a shard's last outputs are read,
    or before they are handed over, if it is ready then. Nobody waits for it. What its launch raises
    is raised by its own shard's outputs, unless somebody asked the task to end.

    Args:
        poll: takes the first batch of the shard that comes next, with the shard's clock, if it is
            ready; the shard then yields its other batches.
    """
    begun, ahead = list[Future[InFlight]](), list[Future[InFlight]]()

    def launch() -> None:
        if ahead or not graph.returns_early or (ready := poll()) is None:
            return
        clock, batch = ready
        ahead.append(Future())
        with clock("compute"):
            try:
                ahead[0].set_result(graph.launch(batch))
            except BaseException as error:
                if is_asked(error):
                    raise
                ahead[0].set_exception(error)

    try:
        for shard in shards:
            begun, ahead = ahead, []
            with closing(graph.run(shard, begun, launch)) as outputs:
                yield shard, outputs
            if begun:  # nobody asked for the outputs
                graph.wait()
    finally:
        if begun or ahead:
            graph.wait()
