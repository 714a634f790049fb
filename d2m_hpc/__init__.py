"""d2m_hpc: metadata for folders of webdataset tars, every shard exactly once."""

__version__ = "0.1.0"
