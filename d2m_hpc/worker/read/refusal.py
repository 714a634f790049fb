"""Say in one line of under 300 characters why a whole shard fails, and what to do."""

from __future__ import annotations

from collections.abc import Sequence

from d2m_hpc.errors import ShardError, TruncatedShard
from d2m_hpc.run.records import Rejection
from d2m_hpc.run.slices import place_of
from d2m_hpc.storage.texts import safe
from d2m_hpc.worker.read.tar import DAMAGED, JOINED

LONGEST = 299
SHORTEST_URL = 40
"""Characters of the tar's name beside a long message."""


def no_shard(url: str, kinds: str, what: str) -> ShardError:
    return ShardError(_line(url, f" is {kinds}: {what}"))


def unreadable(url: str, what: str) -> ShardError:
    return ShardError(_line(url, f": {safe(what, 250)}"))


def truncated(url: str, where: str, whole: int) -> TruncatedShard:
    """The error for a tar that cannot be read on from `where`, after `whole` samples."""
    advice = " (allow_truncated_shards: true takes them)" if whole else ""
    what, mend = _cut(where, "truncated"), ""
    if where.startswith(JOINED):
        mend = "; join tars by `tar -A`, or unpack it by `tar -xi` and pack again"
    return TruncatedShard(_line(url, f" is {what}; whole samples before it: {whole}{advice}{mend}"))


def taken(where: str, whole: int) -> str:
    """The notice on a cut tar whose whole samples were taken."""
    what = _cut(where, "cut")
    return f"the tar is {what}; the rest is not read, samples before it are taken: {whole}"


def _cut(where: str, how: str) -> str:
    told = where.startswith((JOINED, DAMAGED))
    return safe(where, 150) if told else f"{how} {safe(where, 150)}"


def rejected(url: str, rejection: Rejection) -> ShardError:
    """The error for the first rejection in a shard that may have none."""
    key, reason = _short(rejection)
    return ShardError(_line(url, f": sample {key}: {reason} (warn_and_continue: true goes on)"))


def too_many(
    url: str, rejections: Sequence[Rejection], total: int, limit: float, cause: str
) -> ShardError:
    """The error for too many rejections, with the cause of most of them if the tar tells it."""
    what = (
        f": {len(rejections)} of {total} samples are rejected, over max_rejected_fraction ({limit})"
    )
    if cause:
        return ShardError(_line(url, f"{what}: {cause}"))
    key, reason = _short(rejections[0])
    return ShardError(_line(url, f"{what}; the first: {key}, {reason}"))


def _short(rejection: Rejection) -> tuple[str, str]:
    return repr(safe(rejection.key, 40)), safe(rejection.reason, 100)


def _line(url: str, what: str) -> str:
    return safe(place_of(url), max(SHORTEST_URL, LONGEST - len(what))) + what
