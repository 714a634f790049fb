"""Whose fault a failure is: the shard's, or that of the config or of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable

import torch
from PIL import Image

from d2m_hpc.config import Config
from d2m_hpc.errors import OutputError, ShardError
from d2m_hpc.models.custom import described
from d2m_hpc.models.inputs import kind_of, told
from d2m_hpc.models.preprocessors import Options, Picture
from d2m_hpc.storage.texts import safe
from d2m_hpc.worker.batch import Batch, Outputs, collate
from d2m_hpc.worker.compute.graph import Graph

SAMPLE = {"image": Picture(Image.new("RGB", (256, 256), "grey")), "text": "a grey square"}
"""What no model of a family may fail on."""


def fault(graph: Graph, config: Config, check: Callable[[Outputs], None]) -> str:
    """What the config's families raise for a made-up sample, or how the outputs of custom models
    are not as declared; nothing where all is well.

    What custom models raise is left out: they may want samples of a certain kind.

    Args:
        config: what the graph computes.
        check: raises a `ShardError` for outputs that are not as the models declare them.

    Raises:
        NodeError: the device fails.
    """
    return _fault(graph, config, check, False) or _fault(graph, config, check, True)


def _fault(graph: Graph, config: Config, check: Callable[[Outputs], None], own: bool) -> str:
    """
    Args:
        own: look for outputs alone, those of custom models, too.
    """
    small = graph.declared(config, SAMPLE.keys(), own)
    if not small.models or (own and all(small.toolbox.specs[n].family for n in small.models)):
        return ""
    options = Options(config.resize == "exact", config.max_image_pixels)
    inputs = {}
    for (raw, form), made in small.toolbox.inputs.items():
        try:
            inputs[raw, form] = collate([made.prepare(SAMPLE[kind_of(raw)], options)])
        except Exception as error:
            return "" if own else safe(f"{told(form)} raised {described(error)}")
    outputs = None
    try:
        outputs = small(Batch(["made up"], inputs, {}))
        if not outputs.rejections:
            check(outputs)
    except torch.OutOfMemoryError:
        return ""
    except OutputError as error:
        return str(error)
    except ShardError as error:
        return "" if own and not outputs else str(error)
    return outputs.rejections[0].reason if outputs.rejections and not own else ""
