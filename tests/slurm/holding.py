"""Let tasks stand still at a shard, in a module of the package, until a test has looked."""

from __future__ import annotations

from pathlib import Path

CODE = '''
import importlib.machinery as machinery
import os
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent


class Holding:
    """Patches a module as it is imported."""

    @staticmethod
    def find_spec(name, path, target=None):
        if name != MODULE:
            return None
        spec = machinery.PathFinder.find_spec(name, path)
        load = spec.loader.exec_module
        spec.loader.exec_module = lambda module: (load(module), patch(module))
        return spec


def stand(stem):
    """As long as there is a file `hold-SHARD`; `held-SHARD` tells the task."""
    if (HERE / f"hold-{stem}").exists():
        (HERE / f"held-{stem}").write_text(os.environ["SLURM_ARRAY_TASK_ID"])
    while (HERE / f"hold-{stem}").exists():
        time.sleep(0.02)


sys.meta_path.insert(0, Holding)
'''


def write_holding(folder: Path, module: str, patch: str) -> str:
    """
    Args:
        folder: of the files `hold-SHARD` and `held-SHARD`.
        patch: the code of a function `patch(module)`, which has something there call `stand(stem)`.

    Returns:
        The line of `setup` for tasks that are to stand still.
    """
    (folder / "sitecustomize.py").write_text(f"{CODE}MODULE = {module!r}\n\n{patch}")
    return f"export PYTHONPATH={folder}"
