"""What a config asks for: inputs, checkpoints and folders, looked at; changes nothing."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

from d2m_hpc.config import Config
from d2m_hpc.config.load import located
from d2m_hpc.config.mistakes import registry_mistakes
from d2m_hpc.errors import ConfigError, WeightsError
from d2m_hpc.models import weights
from d2m_hpc.models.entries import with_paths
from d2m_hpc.models.lock import Lock
from d2m_hpc.models.registry import Registry
from d2m_hpc.plan import patterns, preflight
from d2m_hpc.run import frozen
from d2m_hpc.run.extension import with_own_names
from d2m_hpc.run.folder import RunDir
from d2m_hpc.storage.texts import BRIEF, safe
from d2m_hpc.storage.urls import is_local


def run_dir(config: Config) -> RunDir:
    """Where a config's run lives: `run_dir`, or beside the outputs, or here if those are remote."""
    if config.run_dir:
        return RunDir(Path(os.path.expanduser(config.run_dir)).absolute())
    output = config.output_metadata_dir
    if is_local(output):
        return RunDir(Path(os.path.expanduser(output)).absolute() / ".d2m")
    name = re.sub(r"[^A-Za-z0-9.-]+", "-", output.split("://", 1)[1]).strip("-")
    return RunDir(Path(".d2m").absolute() / name)


@dataclass
class Workload:
    """What a config asks for, checked; nothing of a run's state is in it.

    Attributes:
        where: the config file, for messages.
        sizes: url to size of every input tar.
        custom: the custom file that tasks will run; without one, the built-in names.
        checkpoints: what the models read, as it was found.
        fingerprint: the parts that decide what the output is.
        notices: what the user should know though it stops nothing.
        times: when those of them that stores listed were put there, by url.
        recompute_changed: compute what was made of tars that are others now once more.
        moved: whether tars of the same names and sizes elsewhere are the same; None if not said.
    """

    config: Config
    where: str
    run: RunDir
    sizes: dict[str, int | None]
    custom: frozen.Custom
    checkpoints: dict[str, weights.Kept]
    fingerprint: dict[str, Any]
    notices: list[str]
    times: dict[str, float] = field(default_factory=dict)
    recompute_changed: bool = False
    moved: bool | None = None

    @property
    def fingerprint_id(self) -> str:
        """A short hash of the fingerprint, as records carry it."""
        return hashlib.sha256(canonical(self.fingerprint)).hexdigest()[:16]

    @cached_property
    def document(self) -> dict[str, Any]:
        """What is kept of this config to compare later ones with."""
        return with_own_names(self.fingerprint, self.custom.registry)


def canonical(values: dict[str, Any]) -> bytes:
    return json.dumps(values, sort_keys=True, indent=1, ensure_ascii=False).encode()


def inspect(config: Config, where: str, thorough: bool = False) -> Workload:
    """Look at inputs, checkpoints and the custom file; nothing but probes of folders is written.

    Args:
        where: the config file, for messages.
        thorough: look for all that would fail on every node, and run the custom file even if it
            is as it was at the last submit.

    Raises:
        ConfigError: with everything that was found.
        WeightsError: nothing else was found, but checkpoints are missing or wrong.
    """
    config = absolute(config)
    run = run_dir(config)
    expansion = patterns.expand(config.input_tars, sized=not has_plan(run, where))
    problems = [*preflight.folders(config, run)] if thorough else []
    problems += expansion.mistakes
    problems += preflight.inputs(expansion) if thorough else ()
    custom, mistakes = customs(config, run, thorough)
    problems += mistakes
    checkpoints: dict[str, weights.Kept] = {}
    try:
        checkpoints = _checkpoints(config, custom.registry, run, where)
    except WeightsError as error:
        if not thorough and not problems:
            raise
        problems.append(str(error))
    problems += missing_extras(config)
    if problems:
        mode = ", preflight (--no-preflight skips it)" if thorough else ""
        raise ConfigError(f"{where}{mode}", located(where, problems))
    hashes = {name: kept.sha256 for name, kept in checkpoints.items()}
    fingerprint = config.fingerprint(hashes, custom.hashes)
    return Workload(
        config,
        where,
        run,
        expansion.sizes,
        custom,
        checkpoints,
        fingerprint,
        _notices(expansion),
        expansion.times,
    )


def customs(config: Config, run: RunDir, thorough: bool = False) -> tuple[frozen.Custom, list[str]]:
    """What the custom file gives, and what is wrong with it or with the names in the config.

    Args:
        thorough: run the file even if it is as it was at the last submit.
    """
    file, custom = config.custom_file, frozen.Custom()
    mistakes: list[str] = []
    if file is not None:
        known = None if thorough else frozen.newest(run, file)
        custom, mistakes = (known, []) if known else preflight.described(file)
        mistakes = mistakes or [*registry_mistakes(config, custom.registry)]
    registry, _ = config.registry(custom.registry)
    return replace(custom, registry=registry), mistakes


def has_plan(run: RunDir, where: str) -> bool:
    """
    Raises:
        ConfigError: there can be no such folder.
    """
    try:
        return run.shards.exists()
    except OSError as error:
        reason = f"run_dir: {safe(str(run.root), BRIEF)} cannot be used: {error.strerror or error}"
        raise ConfigError(where, [reason]) from None


def absolute(config: Config) -> Config:
    """Paths as a task on another machine needs them."""
    output = config.output_metadata_dir.removeprefix("file://")
    config = config.model_copy(update={"output_metadata_dir": output})
    paths = {
        key: str(Path(os.path.expanduser(value)).absolute())
        for key in ("output_metadata_dir", "custom_pypath", "weights_dir", "run_dir")
        if (value := getattr(config, key)) and is_local(value)
    }
    folder = str(weights.weights_dir(config.weights_dir).absolute())
    models = [with_paths(entry, str) for entry in config.models]
    return config.model_copy(update={"models": models, "weights_dir": folder, **paths})


def missing_extras(config: Config) -> list[str]:
    """What the config needs that is installed on request only."""
    if not config.logging or any(metadata.distributions(name="wandb")):
        return []
    return [
        "logging: true needs wandb, which is not installed; `pip install 'd2m_hpc[wandb]'`, or set "
        "logging: false"
    ]


def _checkpoints(
    config: Config, registry: Registry, run: RunDir, where: str
) -> dict[str, weights.Kept]:
    """Every checkpoint that the models need, those that custom classes declare included.

    Raises:
        WeightsError: one is missing or wrong.
    """
    folder = weights.weights_dir(config.weights_dir)
    specs = registry.specs(config.model_names).values()
    digest = Lock.read(folder).digest(folder, weights.HashCache(run.hashes))
    checked = weights.check(specs, folder, digest)
    weights.require(checked, config.allow_unpublished_weights, where)
    files = {item.checkpoint.name: item.path for item in checked}
    for spec in specs:
        files |= weights.declared(spec, config.custom_file or folder)
    try:
        return {name: weights.Kept.of(path, digest) for name, path in files.items()}
    except OSError as error:
        raise WeightsError(f"checkpoints: {error.filename}: {error.strerror or error}") from None


def _notices(expansion: patterns.Expansion) -> list[str]:
    notices = []
    if expansion.duplicates:
        notices.append(f"{expansion.duplicates} tars are named more than once; each is done once")
    if expansion.missing:
        few = ", ".join(expansion.missing[:3])
        notices.append(f"{len(expansion.missing)} tars are not there and will fail: {few}")
    return notices
