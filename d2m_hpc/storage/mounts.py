"""What a network filesystem's client may keep that another node has changed, and how long."""

from __future__ import annotations

import os
import re
from pathlib import Path

MOUNTS = Path("/proc/self/mounts")
DEFAULT = 60.0
"""Seconds of NFS' acregmax and acdirmax, which the system lists where they are others."""


def keeps_names(folder: Path) -> bool:
    """Whether the names in a folder, and those missing there, may be kept for a while: by a client
    of NFS, or as the server of a FUSE filesystem allows."""
    return _mount(folder, MOUNTS)[0].startswith(("nfs", "fuse"))


def cached_seconds(folder: Path, mounts: Path = MOUNTS) -> float:
    """The seconds for which a client of NFS keeps the times and listings of files in a folder.

    0 on other filesystems, and where the system does not tell.
    """
    kind, options = _mount(folder, mounts)
    if not kind.startswith("nfs") or "noac" in options.split(","):
        return 0.0
    known = dict(re.findall(r"\b(acregmax|acdirmax)=(\d+)", options))
    return max(float(known.get(name, DEFAULT)) for name in ("acregmax", "acdirmax"))


def _mount(folder: Path, mounts: Path) -> tuple[str, str]:
    """The kind and the options of the filesystem that a folder is in; empty where the system does
    not tell."""
    found: tuple[str, str, str] = "", "", ""
    try:
        lines = mounts.read_text("utf-8", "surrogateescape").splitlines()
        place = os.path.realpath(folder)
    except OSError:
        return "", ""
    for line in lines:
        _, point, kind, options, *_ = line.split(" ")
        point = re.sub(r"\\([0-7]{3})", lambda escape: chr(int(escape[1], 8)), point)
        if f"{place}/".startswith(f"{point.rstrip('/')}/") and len(point) >= len(found[0]):
            found = point, kind, options
    return found[1:]
