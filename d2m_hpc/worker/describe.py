"""Run a custom file and describe it: `python -m d2m_hpc.worker.describe FILE FOLDER`.

In a process of its own, as the file imports torch, and may do anything else.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

from d2m_hpc.errors import ConfigError
from d2m_hpc.models import custom
from d2m_hpc.models.code import MOST_BYTES, MOST_MODULES, Modules
from d2m_hpc.run import frozen
from d2m_hpc.storage.texts import traceback_of
from d2m_hpc.worker.supervise import fork


def describe(file: Path) -> frozen.Custom:
    """Run a custom file; return its names and modules, or raise its mistakes as a `ConfigError`."""
    modules = Modules(file)
    module = custom.run(modules)
    registry = custom.registry(custom.lookups(module), custom.output_types(module))
    size = sum(len(source.data) for source in modules.sources.values())
    if len(modules.sources) > MOST_MODULES or size > MOST_BYTES:
        mistake = (
            f"custom_pypath: it imports {len(modules.sources):,} modules of {size:,} bytes that "
            f"lie in its folder, {file.parent}; valid are up to {MOST_MODULES:,} of "
            f"{MOST_BYTES:,} bytes; put it and its modules into a folder of their own"
        )
        raise ConfigError(str(file), [mistake])
    return frozen.Custom(registry, modules.sources, tuple(sorted(modules.missing)))


def main(file: Path, folder: Path) -> None:
    """Write a file's description, or its mistakes, to a folder, as a submission keeps them."""
    try:
        frozen.write(folder, describe(file))
    except ConfigError as error:
        (folder / "mistakes.json").write_text(json.dumps(error.mistakes))


def in_fork(file: Path, folder: Path, errors: Path) -> int:
    """Do the same in a fork of a process that will compute: one import of torch is for both.

    Args:
        errors: the file that takes what is written to stderr.

    Returns:
        How the fork ended, as `subprocess` tells it.
    """
    if not (pid := fork()):
        _as_fork(file, folder, errors)
    try:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise


def _as_fork(file: Path, folder: Path, errors: Path) -> NoReturn:
    code = 1
    try:
        for stream, place in ((1, os.devnull), (2, errors)):
            os.dup2(os.open(place, os.O_WRONLY | os.O_CREAT, 0o600), stream)
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        if not sys.flags.safe_path:
            del sys.path[0]  # the folder of the command
        main(file, folder)
        code = 0
    except BaseException as error:
        os.write(2, traceback_of(error).encode(errors="replace"))
    finally:
        os._exit(code)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
    os._exit(0)  # without waiting for threads of the file
