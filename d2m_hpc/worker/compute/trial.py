"""Whose fault a failure is: the shard's, or that of the config or of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable

import torch
from PIL import Image

from d2m_hpc.config import Config
from d2m_hpc.errors import ShardError
from d2m_hpc.models.custom import described
from d2m_hpc.models.inputs import told
from d2m_hpc.models.preprocessors import Options, Picture
from d2m_hpc.storage.texts import safe
from d2m_hpc.worker.batch import Batch, Outputs, collate
from d2m_hpc.worker.compute.graph import Graph

SAMPLE = {"image": Picture(Image.new("RGB", (256, 256), "grey")), "text": "a grey square"}
"""What no model of a family may fail on."""


def fault(graph: Graph, config: Config, check: Callable[[Outputs], None]) -> str:
    """What the config's families raise for a made-up sample; nothing where all of them work.

    Custom models are left out: they may want samples of a certain kind.

    Args:
        config: what the graph computes.
        check: raises a `ShardError` for outputs that are not as the models declare them.

    Raises:
        NodeError: the device fails.
    """
    small = graph.of_families(config, SAMPLE.keys())
    if not small.models:
        return ""
    options = Options(config.resize == "exact", config.max_image_pixels)
    inputs = {}
    for (raw, form), made in small.toolbox.inputs.items():
        try:
            inputs[raw, form] = collate([made.prepare(SAMPLE[raw], options)])
        except Exception as error:
            return safe(f"{told(form)} raised {described(error)}")
    try:
        outputs = small(Batch(["made up"], inputs, {}))
        if not outputs.rejections:
            check(outputs)
    except torch.OutOfMemoryError:
        return ""
    except ShardError as error:
        return str(error)
    return outputs.rejections[0].reason if outputs.rejections else ""
