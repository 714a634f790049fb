"""Compute the first samples of a config's shards; nothing is written but to a temporary folder."""

from __future__ import annotations

import shutil
import tarfile
import tempfile
from contextlib import closing
from dataclasses import dataclass, field
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2m_hpc.config import Config
from d2m_hpc.config.load import located
from d2m_hpc.errors import ConfigError, D2MError
from d2m_hpc.launch import flow
from d2m_hpc.launch.local import ThisProcess
from d2m_hpc.plan import preflight, workload
from d2m_hpc.plan.naming import own_name
from d2m_hpc.run.folder import RunDir
from d2m_hpc.run.manifest import Manifest, all_values
from d2m_hpc.run.outputs import OutputDir
from d2m_hpc.run.pair import Pair
from d2m_hpc.run.records import Rejection, Shard
from d2m_hpc.run.shards import read_stems
from d2m_hpc.storage.files import make_folder
from d2m_hpc.storage.texts import counted

if TYPE_CHECKING:
    import pyarrow as pa

SHARDS = 16
"""The most shards that are opened, where the first have no samples."""


@dataclass
class FirstSamples:
    """The first samples with their values.

    Attributes:
        table: a row for each sample that is not rejected.
        features: of the same rows, by name.
        rejections: keys and reasons of all others.
    """

    table: pa.Table
    features: dict[str, Any] = field(default_factory=dict)
    rejections: list[Rejection] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON has it: `rows`, each with its features, and `rejections`."""
        rows: list[dict[str, Any]] = self.table.to_pylist()
        for name, values in self.features.items():
            for row, value in zip(rows, values.tolist(), strict=True):
                row[name] = value
        return {"rows": rows, "rejections": [tuple(r) for r in self.rejections]}


def head(config: Config, where: str, count: int) -> FirstSamples:
    """Compute the first samples as a task would.

    Args:
        where: the config's file, for messages.

    Raises:
        ConfigError: with every mistake that was found.
        D2MError: no sample can be read, or they cannot be computed.
    """
    with tempfile.TemporaryDirectory(prefix="d2m-head-") as folder:
        config = workload.absolute(config)
        tars = _first(config, where, count, Path(folder) / "tars")
        aside: dict[str, Any] = {
            "input_tars": [str(tar) for tar in tars],
            "inputs": None,
            "captions": None,
            "output_metadata_dir": str(Path(folder) / "out"),
            "run_dir": str(Path(folder) / "run"),
            "max_rejected_fraction": 1.0,
            "logging": False,
        }
        own, known = RunDir(Path(folder) / "run"), workload.run_dir(config).hashes
        if known.exists():  # of checkpoints, which take seconds to read
            make_folder(own.root)
            shutil.copy(known, own.hashes)
        asked = workload.inspect(config.model_copy(update=aside), where)
        flow.submit(asked, ThisProcess())
        return _read(asked)


def _first(config: Config, where: str, count: int, folder: Path) -> list[Path]:
    """Copy the first samples into tars of their own."""
    from d2m_hpc.worker.read.scratch import scratch
    from d2m_hpc.worker.read.stage import stage

    found = workload.expanded(config, workload.run_dir(config), sized=False)
    tars, left = list[Path](), count
    if found.mistakes:
        raise ConfigError(where, located(where, found.mistakes))
    with scratch(config.scratch_bytes) as room:
        for number, url in enumerate(islice(found.sizes, SHARDS)):
            path = folder / str(number) / f"{own_name(url)}.tar"
            path.parent.mkdir(parents=True)
            with stage(Shard(path.stem, url, None), room) as staged:
                copied = _copy(staged.path, url, path, left, config)
            left -= copied
            tars += [path] if copied else []
            if not left:
                break
    if not tars:
        raise D2MError(
            f"no samples in the first of {counted(len(found.sizes), 'shard')}; look at {url}"
        )
    return tars


def _copy(tar: Path, url: str, path: Path, most: int, config: Config) -> int:
    """Copy the members of the first samples; returns the number of samples."""
    from d2m_hpc.worker.read.names import members_of
    from d2m_hpc.worker.read.readers import opener

    needed = members_of(config)
    if config.inputs:  # what no model asks for need not be there
        custom, _ = workload.customs(config, workload.run_dir(config))
        kinds = preflight.kinds(config, custom.registry) | {"json"}
        needed = {kind: names for kind, names in needed.items() if kind in kinds}
    with closing(opener(config)(url, tar, "")) as archive, tarfile.open(path, "w") as copy:
        samples = [*islice(archive.index(needed), most)]
        for sample in samples:
            for kind, (place, size) in sample.members.items():
                info = tarfile.TarInfo(f"{sample.key}.{kind}")
                data = archive.read(place, size)
                info.size = len(data)
                copy.addfile(info, BytesIO(data))
    return len(samples)


def _read(asked: workload.Workload) -> FirstSamples:
    """The outputs of all shards.

    Raises:
        D2MError: a shard has failed.
    """
    import numpy as np
    import pyarrow as pa

    output, manifest = OutputDir(asked.config.output_metadata_dir), Manifest.load(asked.run)
    stems = read_stems(asked.run.shards)
    for stem in stems:
        if failed := manifest.failures.get(stem):
            raise D2MError(failed[-1].error)
    pairs = [Pair(output, stem) for stem in stems]
    table = pa.concat_tables([p.table() for p in pairs], promote_options="permissive")
    parts = [p.features() for p in pairs] if asked.config.postprocess_features else []
    return FirstSamples(
        table.replace_schema_metadata(),
        {name: np.concatenate([part[name] for part in parts]) for name in (*parts, {})[0]},
        [
            Rejection(*pair)
            for values in all_values(asked.run)
            for pair in values.get("rejections", ())
        ],
    )
