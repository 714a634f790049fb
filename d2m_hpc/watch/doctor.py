"""Look at what this machine lacks: a line each, with what mends it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from d2m_hpc.config import Config
from d2m_hpc.errors import D2MError
from d2m_hpc.launch import slurm
from d2m_hpc.launch.commands import ask
from d2m_hpc.models import weights
from d2m_hpc.models.lock import Lock
from d2m_hpc.plan import preflight, workload
from d2m_hpc.storage.texts import counted, few
from d2m_hpc.version import __version__

SECONDS = 120
"""The wait for torch, which a network filesystem may bring slowly."""
LITTLE = 20 << 30
"""Bytes of scratch below which copies of remote tars may wait for one another."""
TORCH = """
import json, torch
devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
print(json.dumps([torch.__version__, torch.version.cuda, devices]))
"""


class Check(NamedTuple):
    """One look: what was found, and what to do where that is not enough."""

    name: str
    found: str
    mend: str = ""


def checks(config: Config | None, where: str = "") -> Iterator[Check]:
    """Look at this machine, for one config or for none.

    Args:
        where: the config's file.
    """
    version = ".".join(map(str, sys.version_info[:3]))
    yield Check("d2m_hpc", f"{__version__}, Python {version} in {sys.prefix}")
    looks: list[Callable[[], Check]] = [_torch, _decoders, _slurm, _scratch]
    looks += [lambda: _leases(config), lambda: _weights(config, where), _network]
    for look in looks:
        yield look()


def _torch() -> Check:
    """In a process of its own, as a login node loads no torch."""
    words = [sys.executable, "-c", TORCH]
    try:
        ended = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return Check("torch", f"takes over {SECONDS} s", "put the environment on a faster disk")
    if ended.returncode:
        why = ended.stderr.strip().rpartition("\n")[2] or f"exit code {ended.returncode}"
        return Check("torch", f"cannot be imported: {why}", "install torch anew")
    version, built, devices = json.loads(ended.stdout.splitlines()[-1])
    if devices:
        return Check("torch", f"{version}, {counted(len(devices), 'GPU')}: {', '.join({*devices})}")
    if driver := _driver():
        what = f"{version} for CUDA {built} finds no GPU, though the driver {driver} has some"
        return Check("torch", what, "install a newer driver, or torch for an older CUDA")
    return Check("torch", f"{version}, no GPU here: --local computes on the CPU")


def _driver() -> str:
    """The version of the driver; empty where it has no GPU."""
    words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        ended = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return ended.stdout.partition("\n")[0].strip() if ended.returncode == 0 else ""


def _decoders() -> Check:
    from PIL import features

    try:
        import simplejpeg
    except ImportError as error:
        return Check("decoders", f"simplejpeg cannot be imported: {error}", "install it anew")
    lacked = [name for name in ("webp", "avif", "jpg_2000") if not features.check(name)]
    if lacked:
        what = f"pillow reads no {', '.join(lacked)}"
        return Check("decoders", what, "pip install --upgrade --force-reinstall pillow")
    return Check("decoders", f"simplejpeg {simplejpeg.__version__}, pillow with webp, avif, jp2")


def _slurm() -> Check:
    if not slurm.is_here():
        return Check("Slurm", "there is no sbatch here; --local works")
    try:
        return Check("Slurm", ask("scontrol", "ping").splitlines()[0])
    except (D2MError, IndexError) as error:
        what = str(error).rpartition("\n")[2]  # its reason stands last
        return Check("Slurm", f"does not answer: {what}", "ask who runs it, or use --local")


def _scratch() -> Check:
    name = next((n for n in ("SLURM_TMPDIR", "TMPDIR") if os.path.isdir(os.environ.get(n, ""))), "")
    folder = os.environ[name] if name else tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    advice = "" if free > LITTLE else "TMPDIR may name a larger disk for copies of remote tars"
    return Check("scratch", f"{folder}, {free / 1e9:,.0f} GB free", advice)


def _leases(config: Config | None) -> Check:
    """On the filesystem of the run folder, or of this folder."""
    folder = workload.run_dir(config).root if config else Path.cwd()
    while not folder.is_dir():
        folder = folder.parent
    try:
        if preflight.is_exclusive(folder):
            mend = "; ".join(workload.short_leases(config)) if config else ""
            return Check("leases", f"work in {folder}", mend)
    except OSError as error:
        what = f"{folder} cannot be written: {error.strerror}"
        return Check("leases", what, "set run_dir: to a folder of yours")
    what = f"two tasks could claim one shard in {folder}"
    return Check("leases", what, "set run_dir: to a folder on another disk, which all nodes share")


def _weights(config: Config | None, where: str) -> Check:
    if config is None:
        folder = weights.default_dir()
        there = sum(path.is_file() for path in folder.rglob("*")) if folder.is_dir() else 0
        return Check(
            "weights", f"{counted(there, 'file')} in {folder}; name a config to check its own"
        )
    config = workload.absolute(config)
    run = workload.run_dir(config)
    custom, _ = workload.customs(config, run)
    folder = weights.weights_dir(config.weights_dir)
    specs = custom.registry.specs(config.model_names).values()
    digest = Lock.read(folder).digest(folder, weights.HashCache(run.hashes))  # as a submit does
    found = weights.survey_all(specs, folder, config.custom_file, cache=digest)
    accepts = config.allow_unpublished_weights
    right = sum(all(c.is_usable(accepts) for c in item.files) for item in found)
    what = f"{right} of {len(found)} that the config needs are here ({folder})"
    files = [c for item in found for c in item.files if c.sha256 and not c.is_usable(accepts)]
    if files:
        what += f"; not the published file: {few([c.checkpoint.name for c in files])}"
    mend = f"d2m weights fetch {where}" if right < len(found) else ""
    return Check("weights", what, mend)


def _network() -> Check:
    names = [*weights.OFFLINE, "HF_ENDPOINT", "D2M_WEIGHTS_MIRROR", "https_proxy", "HTTPS_PROXY"]
    there = [name for name in names if os.environ.get(name)]
    return Check("network", f"set: {', '.join(there)}" if there else "no variable changes its use")
