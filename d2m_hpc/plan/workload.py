"""The workload of a config: its inputs, checkpoints and folders, checked; changes nothing."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

from d2m_hpc.config import Config, texts
from d2m_hpc.config.load import located
from d2m_hpc.config.mistakes import checkpoint_mistakes, registry_mistakes
from d2m_hpc.config.places import Mistake
from d2m_hpc.errors import ConfigError, WeightsError
from d2m_hpc.models import weights
from d2m_hpc.models.entries import with_paths
from d2m_hpc.models.family import ModelSpec
from d2m_hpc.models.headers import fault
from d2m_hpc.models.lock import Lock
from d2m_hpc.models.published import Checkpoint
from d2m_hpc.models.registry import Registry, builtin
from d2m_hpc.plan import memory, patterns, preflight
from d2m_hpc.plan.forget import forgotten
from d2m_hpc.run import frozen
from d2m_hpc.run.extension import DERIVE, with_own_names
from d2m_hpc.run.fingerprints import in_known_order
from d2m_hpc.run.folder import RunDir
from d2m_hpc.run.records import DERIVED
from d2m_hpc.run.shards import read_shards
from d2m_hpc.run.slices import Slice, Tree, planned
from d2m_hpc.storage.mounts import cached_seconds
from d2m_hpc.storage.texts import BRIEF, counted, few, safe
from d2m_hpc.storage.urls import is_folder, is_local


def run_dir(config: Config) -> RunDir:
    """The run folder of a config: `run_dir`, or beside the outputs, or here if these are remote."""
    if config.run_dir:
        return RunDir(Path(os.path.expanduser(config.run_dir)).absolute())
    output = config.output_metadata_dir
    if is_local(output):
        return RunDir(Path(os.path.expanduser(output)).absolute() / ".d2m")
    name = re.sub(r"[^A-Za-z0-9.-]+", "-", output.split("://", 1)[1]).strip("-")
    return RunDir(Path(".d2m").absolute() / name)


@dataclass
class Workload:
    """A checked config and its inputs, without any state of a run.

    Attributes:
        where: the config file, for messages.
        sizes: URL to size of every input tar.
        custom: the custom file that tasks will run; without one, the built-in names.
        checkpoints: the models' checkpoints, by name.
        fingerprint: the values that decide the output.
        notices: messages to the user that stop nothing.
        times: when tars that stores listed were put there, by URL.
        recompute_changed: whether to compute tars again that were replaced.
        moved: whether tars of planned names and sizes elsewhere are the planned ones; None if the
            user has not said.
        derived: a hash of what decides the columns of each entry of `derive`; empty for a submit,
            which computes none of them.
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
    derived: dict[str, str] = field(default_factory=dict)

    @property
    def fingerprint_id(self) -> str:
        """A short hash of the fingerprint, as records carry it."""
        own = hashed(self.fingerprint)
        return f"{own}{DERIVED}{hashed(self.derived)}" if self.derived else own

    @cached_property
    def document(self) -> dict[str, Any]:
        """The values that a run keeps of the config, to compare later configs with."""
        known = with_own_names(self.fingerprint, self.custom.registry)
        return {**known, DERIVE: self.derived} if self.derived else known


def canonical(values: dict[str, Any]) -> bytes:
    return json.dumps(values, sort_keys=True, indent=1, ensure_ascii=False).encode()


def hashed(values: dict[str, Any]) -> str:
    """A short hash."""
    return hashlib.sha256(canonical(values)).hexdigest()[:16]


def inspect(config: Config, where: str, thorough: bool = False) -> Workload:
    """Check inputs, checkpoints and the custom file; writes nothing but probes of folders.

    Args:
        where: the config file, for messages.
        thorough: whether to look for all mistakes that would stop every task, and to run the
            custom file even if it has not changed since the last submit.

    Raises:
        ConfigError: with every mistake that was found.
        WeightsError: the only mistakes are missing or wrong checkpoints.
    """
    config = absolute(config)
    run = run_dir(config)
    expansion = expanded(config, run, sized=not has_plan(run, where))
    problems = [*preflight.folders(config, run)] if thorough else []
    problems += _input_mistakes(config, expansion)
    custom, mistakes = customs(config, run, thorough)
    problems += preflight.inputs(expansion, config, custom.registry, thorough)
    problems += mistakes or checkpoint_mistakes(config, custom.registry)
    checkpoints: dict[str, weights.Kept] = {}
    try:
        checkpoints = _checkpoints(config, custom.registry, run, where, problems)
    except WeightsError as error:
        if not thorough and not problems:
            raise
        problems.append(str(error))
    problems += missing_extras(config)
    if problems:
        mode = ", preflight (--no-preflight skips it)" if thorough else ""
        raise ConfigError(f"{where}{mode}", located(where, problems))
    sizes = [kept.size for kept in checkpoints.values()]
    hashes = {name: kept.sha256 for name, kept in checkpoints.items()}
    fingerprint = in_known_order(run, config.fingerprint(hashes, custom.hashes))
    return Workload(
        config,
        where,
        run,
        expansion.sizes,
        custom,
        checkpoints,
        fingerprint,
        _notices(expansion, config, custom.registry, sizes),
        expansion.times,
    )


def expanded(config: Config, run: RunDir, sized: bool) -> patterns.Expansion:
    """List the shards that a config names; those of folders as the run has planned them.

    Args:
        sized: whether to find the sizes of local tars.
    """

    def tree(folder: str) -> Tree:
        from d2m_hpc.worker.read.names import members_of

        members = members_of(config)
        known = {name for names in members.values() for name in names}
        found = planned(folder, members["image"], known, config.samples_per_shard, earlier())
        found.others = [path for path in found.others if path != config.captions]
        return found

    @cache
    def earlier() -> list[str]:
        urls = [*(shard.url for shard in read_shards(run.shards)), *forgotten(run)]
        return [*filter(is_folder, urls)]

    pictures = tree if config.inputs else None
    return patterns.expand(config.patterns, sized, config.input_key, pictures)


def _input_mistakes(config: Config, expansion: patterns.Expansion) -> Iterator[str]:
    yield from expansion.mistakes
    yield from _own_inputs(config, expansion)
    yield from _captions(config, expansion)
    yield from _texts(config)


def _texts(config: Config) -> Iterator[Mistake]:
    """Find parquets of texts that are not there: of several, their folder."""
    for source in config.texts.values():
        path, stem, _ = source.table.partition(texts.STEM)
        there = os.path.dirname(path) if stem else path
        if path and is_local(path) and not os.path.exists(there):
            what = f"found {source.table!r}, and {there} is not there; check the path"
            yield Mistake(("text_from",), what)


def _captions(config: Config, expansion: patterns.Expansion) -> Iterator[Mistake]:
    """Find out why a captions file cannot be that of the pictures."""
    if config.captions is None:
        return
    path, what = Path(config.captions), ""
    folders = {Slice.of(url).folder for url in filter(is_folder, expansion.sizes)}
    if path.suffix.lower() not in (".jsonl", ".csv", ".parquet"):
        what = f"found {path.name!r}; valid is a jsonl, csv or parquet"
    elif not path.is_file():
        what = f"found {str(path)!r}, which is no file here; check the path"
    elif not folders:
        what = "found a file, but `inputs` names no folder of pictures"
    elif aside := [f for f in sorted(folders) if not Path(f).is_relative_to(path.parent)]:
        what = (
            f"found {str(path)!r}; valid is a file in {aside[0]} or above, as its paths begin there"
        )
    if what:
        yield Mistake(("captions",), what)


def further(config: Config, where: str) -> list[str]:
    """Find the mistakes of a config that was refused, in what is valid of it; reads no checkpoint,
    and asks no store.

    Args:
        where: the config file.
    """
    config = absolute(config)
    local = [pattern for pattern in config.patterns if is_local(pattern)]
    near = config.model_copy(update={config.input_key: local})
    custom, mistakes = customs(config, run_dir(config))
    problems = [
        *expanded(near, run_dir(config), sized=False).mistakes,
        *(mistakes or checkpoint_mistakes(config, custom.registry)),
        *missing_extras(config),
    ]
    specs = custom.registry.specs(config.model_names).values()
    try:
        checked = weights.check(specs, weights.weights_dir(config.weights_dir), lambda path: "?")
        any_hash = config.model_copy(update={"allow_unpublished_weights": True})
        _places([*specs], [c for c in checked if c.state == "missing"], any_hash, where, problems)
    except WeightsError as error:
        problems.append(str(error))
    return located(where, problems)


def _own_inputs(config: Config, expansion: patterns.Expansion) -> Iterator[str]:
    """Find inputs that outputs would replace, as both are parquets of the same names."""
    folder = config.output_metadata_dir.rstrip("/")
    for url in expansion.sizes if config.inputs else ():
        if url.endswith(".parquet") and _folder(url) in (folder, os.path.realpath(folder)):
            yield f"output_metadata_dir: {url} is an input there; take a folder of the outputs' own"
            return


def _folder(url: str) -> str:
    folder = url.rpartition("/")[0]
    return os.path.realpath(folder) if is_local(url) else folder


def customs(config: Config, run: RunDir, thorough: bool = False) -> tuple[frozen.Custom, list[str]]:
    """Run a config's custom file, or read what the last submit froze of an unchanged one.

    Args:
        thorough: run the file even if it has not changed since the last submit.

    Returns:
        The custom file, and the mistakes in it and in the config's names.
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
    """Whether a run has a plan; raise ConfigError if there can be no such folder."""
    try:
        return run.shards.exists()
    except OSError as error:
        reason = f"run_dir: {safe(str(run.root), BRIEF)} cannot be used: {error.strerror or error}"
        raise ConfigError(where, [reason]) from None


def absolute(config: Config) -> Config:
    """Make the paths of a config absolute, for tasks on other machines."""
    output = config.output_metadata_dir.removeprefix("file://")
    config = config.model_copy(update={"output_metadata_dir": output})
    paths: dict[str, Any] = {
        key: str(Path(os.path.expanduser(value)).absolute())
        for key in ("output_metadata_dir", "custom_pypath", "weights_dir", "run_dir", "captions")
        if (value := getattr(config, key)) and is_local(value)
    }
    folder = str(weights.weights_dir(config.weights_dir).absolute())
    paths["text_from"] = texts.with_paths(
        config.text_from, lambda path: os.path.abspath(path) if is_local(path) else path
    )
    models = [with_paths(entry, str) for entry in config.models]
    derive = {name: e.with_paths(os.path.abspath) for name, e in config.derive.items()}
    update = {"models": models, "weights_dir": folder, "derive": derive, **paths}
    return config.model_copy(update=update)


def missing_extras(config: Config) -> list[str]:
    """Find libraries that the config needs and that are installed only on request."""
    if not config.logging or any(metadata.distributions(name="wandb")):
        return []
    return [
        "logging: true needs wandb, which is not installed; `pip install 'd2m_hpc[wandb]'`, or set "
        "logging: false"
    ]


def _checkpoints(
    config: Config, registry: Registry, run: RunDir, where: str, told: Sequence[str]
) -> dict[str, weights.Kept]:
    """Check every checkpoint that the models need, also those that custom classes declare.

    Args:
        told: mistakes that are known already.

    Raises:
        WeightsError: a checkpoint is missing or wrong.
    """
    folder = weights.weights_dir(config.weights_dir)
    specs = registry.specs(config.model_names).values()
    digest = Lock.read(folder).digest(folder, weights.HashCache(run.hashes))
    files = _places([*specs], weights.check(specs, folder, digest), config, where, told)
    try:
        found = {name: weights.Kept.of(path, digest) for name, path in files.items()}
    except OSError as error:
        raise WeightsError(f"checkpoints: {error.filename}: {error.strerror or error}") from None
    asked = weights.asked_hashes(specs)
    own = [
        weights.Checked(Checkpoint(kept.path, "", asked[kept.path]), Path(kept.path), kept.sha256)
        for kept in found.values()
        if kept.path in asked
    ]
    weights.require(own, config.allow_unpublished_weights, where)
    return found


def _places(
    specs: Sequence[ModelSpec],
    checked: Sequence[weights.Checked],
    config: Config,
    where: str,
    told: Sequence[str],
) -> dict[str, Path]:
    """Where the checkpoints lie, by their names.

    Args:
        checked: the published ones.
        told: mistakes that are known already.

    Raises:
        WeightsError: names all that are missing, damaged, or not the published ones.
    """
    files = {item.checkpoint.name: item.path for item in checked}
    wrong: list[str] = []
    try:
        weights.require(checked, config.allow_unpublished_weights, where)
    except WeightsError as error:
        wrong.append(str(error))
    for spec in specs:
        try:
            files |= weights.declared(spec, config.custom_file or Path(config.weights_dir or ""))
        except WeightsError as error:
            wrong.append(str(error))
    faults = (f"{p}: {why}" for p in dict.fromkeys(files.values()) if (why := fault(p)))
    wrong += [what for what in faults if not any(what in mistake for mistake in told)]
    if wrong:
        raise WeightsError("\n".join(wrong))
    return files


def _notices(
    expansion: patterns.Expansion, config: Config, known: Registry, sizes: list[int]
) -> list[str]:
    taken = [n for n in config.model_names if n in known.own and n in builtin().models]
    what = "is the custom file's model, not the built-in one of that name"
    notices = [*expansion.notes, *(f"{name!r} {what}" for name in taken)]
    if expansion.duplicates:
        again = counted(expansion.duplicates, "tar is", "tars are")
        notices.append(f"{again} named more than once; each is done once")
    if expansion.missing:
        some = few(expansion.missing)
        gone = counted(len(expansion.missing), "tar is", "tars are")
        notices.append(f"{gone} not there and will fail: {some}")
    return [*notices, *memory.notices(config, known, sizes), *short_leases(config)]


def short_leases(config: Config) -> list[str]:
    """Say so where a node may see a lease as dead whose heartbeat its NFS client does not show."""
    folder, seconds = run_dir(config).root, config.lease_seconds
    if (cached := cached_seconds(folder)) * 2 <= seconds:
        return []
    told = f"the NFS client keeps times in {folder} for up to {cached:g} s"
    return [f"{told}: set lease_seconds: {2 * cached:g} in place of {seconds:g}"]
