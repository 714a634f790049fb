"""The jobs of each task of a submission: written once, read a line at a time."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator, Sequence

from d2m_hpc.run.damage import undamaged
from d2m_hpc.run.folder import Submission
from d2m_hpc.run.records import Job, Shard
from d2m_hpc.storage.files import atomic_write

_OFFSET = struct.Struct("<Q")
_UNTRIED = Job(Shard("", ""))


def write_chunks(
    submission: Submission, chunks: Iterable[Sequence[Job]], private: bool = False
) -> None:
    """Write the jobs of task i as line i of `chunks.jsonl`, and the lines' offsets beside it.

    A million shards are 150 MB of lines, and each of tens of thousands of tasks reads one line. The
    jobs of one chunk extend pairs of one fingerprint, or none. A job is written as its shard's
    fields and its own; the last fields of an untried shard are left out.
    """
    offsets, end = bytearray(), 0

    def lines() -> Iterator[bytes]:
        nonlocal end
        for chunk in chunks:
            values = [_short(job) for job in chunk]
            line = json.dumps(values).encode() + b"\n"
            offsets.extend(_OFFSET.pack(end))
            end += len(line)
            yield line

    atomic_write(submission.chunks, lines(), private=private)
    atomic_write(submission.chunk_offsets, bytes(offsets))


def _short(job: Job) -> tuple[object, ...]:
    if job[2:] != _UNTRIED[2:]:
        told = (*job.shard, *job[1:])
        return told if job.need else told[:-1]
    return (*job.shard, job.extends) if job.extends else job.shard


class Chunks:
    """The chunks of a submission; `len` is their number, and a read takes only the lines needed."""

    def __init__(self, submission: Submission) -> None:
        self._submission = submission

    def __len__(self) -> int:
        return self._submission.chunk_offsets.stat().st_size // _OFFSET.size

    def read(self, numbers: Iterable[int]) -> Iterator[list[Job]]:
        """Read the chunks of some tasks, in their order.

        Args:
            numbers: the tasks' indices, from 0 to `len` - 1.

        Raises:
            D2MError: one of the two files is damaged.
        """
        with (
            open(self._submission.chunk_offsets, "rb") as offsets,
            open(self._submission.chunks, "rb") as lines,
        ):
            for number in numbers:
                advice = "submit again once none of this submission's tasks is at work"
                with undamaged(self._submission.chunks, advice):
                    offsets.seek(number * _OFFSET.size)
                    lines.seek(*_OFFSET.unpack(offsets.read(_OFFSET.size)))
                    jobs = [Job(Shard(*v[:3]), *v[3:]) for v in json.loads(lines.readline())]
                yield jobs
