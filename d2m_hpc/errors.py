"""Every error that d2m_hpc raises on purpose, named by what the caller does next.

D2MError                 exit 1: the command could not do all that was asked
├── ConfigError          exit 2: mend the config or the command line
├── DiskError            exit 2: make room or mend the disk of the run or its outputs
├── WeightsError         exit 2: fetch or replace a checkpoint
├── SlurmError           exit 3: Slurm refused
├── NodeError            exit 4: this node cannot work; leave its shards to another
└── ShardError           record it and go on with the next shard
    └── TruncatedShard   likewise; the archive ends too early
Rejected                 record it and go on with the next sample

Their messages say what is wrong, where, and what to do next; they are printed without a traceback.
"""

from collections.abc import Sequence
from textwrap import indent
from typing import Any

MOST = 100
"""Mistakes that are told; a machine that wrote a config may have made thousands."""


class D2MError(Exception):
    """Base of all errors below; `exit_code` is what a command ends with."""

    exit_code = 1


class ConfigError(D2MError):
    """One or more mistakes in the config or on the command line.

    Attributes:
        valid: the rest of the config, in which there may be more mistakes; None if it is not known.
    """

    exit_code = 2

    def __init__(self, where: str, mistakes: Sequence[str], valid: Any = None) -> None:
        self.where, self.mistakes, self.valid = where, [*mistakes], valid
        count = "1 mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
        told = [indent(m, "  ") for m in mistakes[:MOST]]
        if left := len(mistakes) - len(told):
            told.append(f"  and {left:,} more")
        super().__init__("\n".join([f"{where}: {count}", *told]))


class DiskError(D2MError):
    """The run folder or the outputs cannot be written or read, which is no shard's fault."""

    exit_code = 2


class WeightsError(D2MError):
    """A checkpoint is missing or is not the published file."""

    exit_code = 2


class SlurmError(D2MError):
    """Slurm refused or cannot be reached."""

    exit_code = 3


class NodeError(D2MError):
    """This machine has no usable device."""

    exit_code = 4


class ShardError(D2MError):
    """A shard cannot be finished."""


class OutputError(ShardError):
    """A model's outputs are none of those that its declaration names."""


class TruncatedShard(ShardError):
    """An archive ends before its end-of-archive mark."""


class Rejected(Exception):
    """This sample cannot be used; the message is the reason that goes on record."""
