"""The YAML config, typed; every mistake in the file is reported at once, with its key.

The keys of the seed program (dataset2metadata) keep their names and meanings.
"""

from d2m_hpc.config.load import glance, load
from d2m_hpc.config.schema import Config, Slurm

__all__ = ["Config", "Slurm", "glance", "load"]
