"""Which run an output folder belongs to; pairs of two runs in one would mix."""

from __future__ import annotations

import json
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from d2m_hpc.errors import ConfigError, D2MError
from d2m_hpc.run.folder import RunDir
from d2m_hpc.run.outputs import OutputDir

OWNER = ".d2m-owner"
SECONDS = 1.0
"""After which a file that cannot be understood is one that its writer was killed at."""


@dataclass(frozen=True)
class Owner:
    """The run that an output folder belongs to, as the file `.d2m-owner` in it says.

    Attributes:
        run_dir: empty where the file cannot be understood.
        host: where that path was written down.
    """

    run_dir: str = ""
    host: str = ""

    @classmethod
    def of(cls, output: OutputDir) -> Owner | None:
        """
        Raises:
            D2MError: it cannot be told, for the file cannot be read.
        """
        try:
            note = json.loads(output.read(OWNER))
            return cls(str(note["run_dir"]), str(note["host"]))
        except (FileNotFoundError, NotADirectoryError):  # of a file, whoever makes the folder tells
            return None
        except (ValueError, TypeError, LookupError):
            return cls()
        except Exception as error:  # each store raises errors of its own
            raise D2MError(f"{output.address(OWNER)} cannot be read: {error}") from error

    def folder(self, output: OutputDir) -> Path:
        """A run folder beside the outputs moves with them, and is named from there."""
        return (Path(output.root) if output.is_local else Path()) / self.run_dir

    def is_gone(self, output: OutputDir, run: RunDir) -> bool:
        """Whether its run folder was deleted, or is the one at hand, under the name it had."""
        if not self.run_dir:
            return True
        here = not Path(self.run_dir).is_absolute() or self.host == socket.gethostname()
        return not self.folder(output).exists() and (here or bool(run.submissions()))


def require_own(output: OutputDir, run: RunDir, take: bool) -> None:
    """Keep two runs from mixing their pairs in one output folder.

    Args:
        take: put it on record that the folder is this run's, where it is nobody's.

    Raises:
        ConfigError: it is another run's.
        D2MError: its owner cannot be told.
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
                time.sleep(wait)  # whoever makes the file now may not have written it yet
                if Owner.of(output) != owner:
                    continue
            output.remove(OWNER)
        output.create(OWNER, note)


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
