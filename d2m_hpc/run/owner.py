"""The owner of an output folder: pairs of two runs, or other files, must not mix in one folder."""

from __future__ import annotations

import json
import os
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from d2m_hpc.errors import ConfigError, D2MError
from d2m_hpc.run.folder import RunDir
from d2m_hpc.run.outputs import SUFFIXES, OutputDir

OWNER = ".d2m-owner"
SECONDS = 1.0
"""The wait after which a file that cannot be understood counts as left by a killed writer."""


@dataclass(frozen=True)
class Owner:
    """The run that an output folder belongs to, by the folder's file `.d2m-owner`.

    Attributes:
        run_dir: the run folder; empty if the file cannot be understood.
        host: the host that wrote the file.
    """

    run_dir: str = ""
    host: str = ""

    @classmethod
    def of(cls, output: OutputDir) -> Owner | None:
        """Read the owner of a folder; None if it has none, D2MError if the file is unreadable."""
        try:
            note = json.loads(output.read(OWNER))
            return cls(str(note["run_dir"]), str(note["host"]))
        except (FileNotFoundError, NotADirectoryError):  # making the folder reports the latter
            return None
        except (ValueError, TypeError, LookupError):
            return cls()
        except Exception as error:  # each store raises errors of its own
            raise D2MError(f"{output.address(OWNER)} cannot be read: {error}") from error

    def folder(self, output: OutputDir) -> Path:
        """The path of the run folder, which moves with the outputs if it is beside them."""
        return (Path(output.root) if output.is_local else Path()) / self.run_dir

    def is_gone(self, output: OutputDir, run: RunDir) -> bool:
        """Whether the owner's run folder was deleted, or is the given run under an earlier name."""
        if not self.run_dir:
            return True
        here = not Path(self.run_dir).is_absolute() or self.host == socket.gethostname()
        return not self.folder(output).exists() and (here or bool(run.submissions()))


def require_own(output: OutputDir, run: RunDir, take: bool) -> None:
    """Require that an output folder does not belong to another run.

    Args:
        take: whether to make the run the owner of a folder without one.

    Raises:
        ConfigError: the folder belongs to another run.
        D2MError: the owner cannot be read.
    """
    root = run.root.absolute()
    beside = output.is_local and root.is_relative_to(output.root)
    name = str(root.relative_to(output.root) if beside else root)
    note = json.dumps({"run_dir": name, "host": socket.gethostname()}).encode()
    for wait in (SECONDS, SECONDS, None):
        owner = Owner.of(output)
        if owner is None and not take:
            return
        if owner is not None:
            if owner.run_dir and _is_same(owner.folder(output), root):
                return
            if not owner.is_gone(output, run) or wait is None:
                raise ConfigError("config", [_refusal(output, owner, root)])
            if not take:
                return
            if not owner.run_dir:
                time.sleep(wait)  # another run may be writing the file right now
                if Owner.of(output) != owner:
                    continue
            output.remove(OWNER)
        output.create(OWNER, note)


def require_apart(output: OutputDir, run: RunDir, path: Path, is_file: bool = False) -> None:
    """Require that what a user names by -o is none of a run's own files, nor like them.

    Beside the outputs may lie files that are not named as outputs, and pages in both folders.

    Raises:
        ConfigError: it is in the run folder or the output folder.
    """
    kind = path.suffix if is_file else ""
    folders = {"run folder": str(run.root)} if kind != ".html" else {}
    if output.is_local and (not is_file or kind in SUFFIXES):
        folders["output folder"] = output.root
    for what, folder in folders.items():
        if Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
            where = f"{path} is in the {what} {folder}"
            raise ConfigError("-o", [f"{where}, where all files are the run's; name another place"])


def _is_same(folder: Path, root: Path) -> bool:
    with suppress(OSError):
        return folder.samefile(root)
    return folder == root


def _refusal(output: OutputDir, owner: Owner, root: Path) -> str:
    theirs = owner.folder(output)
    return (
        f"output_metadata_dir: {output.url} belongs to the run in {theirs} (on {owner.host}), and "
        f"this is the run in {root}; two runs would mix their files. Set `run_dir: {theirs}` to go "
        f"on with that run, or take another output_metadata_dir. If that run is over, `rm -r "
        f"{theirs}` or delete {output.address(OWNER)}"
    )
