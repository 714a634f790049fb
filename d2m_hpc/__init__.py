"""d2m_hpc: metadata for folders of webdataset tars, every shard exactly once.

Example:
    import d2m_hpc as d2m

    run = d2m.submit("config.yml", local=True)
    print(run.status().done, "shards done")
    scores = run.table(["key", "oai-clip-vit-l14-score"])
    for part in run.features("oai-clip-vit-l14-image"):
        index.add(part.values)
"""

from d2m_hpc.api import Run, derive, head, init, load_config, open, submit
from d2m_hpc.subsets.finished import Features, Part
from d2m_hpc.version import __version__

__all__ = [
    "Features",
    "Part",
    "Run",
    "__version__",
    "derive",
    "head",
    "init",
    "load_config",
    "open",
    "submit",
]
