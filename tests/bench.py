"""Models of a config, run on pictures and captions in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from d2m_hpc.config import Config
from d2m_hpc.models.preprocessors import Options, Picture
from d2m_hpc.worker.batch import Batch, Outputs, collate
from d2m_hpc.worker.compute.graph import Graph
from d2m_hpc.worker.compute.resolve import Toolbox

EXACT: dict[str, Any] = {
    "input_tars": ["none.tar"],
    "output_metadata_dir": "none",
    "device": "cpu",
    "amp": "off",
    "resize": "exact",
}


def run(
    keys: Mapping[str, Any], pictures: Sequence[Image.Image], captions: Sequence[str] = ()
) -> Outputs:
    """What a config's models give, prepared and computed as in a task.

    Args:
        keys: of the config; resizing is exact and precision full where they do not say otherwise.
    """
    config = Config.model_validate({**EXACT, **keys})
    toolbox = Toolbox.of(config)
    options = Options(config.resize == "exact", config.max_image_pixels)
    given = {"image": [Picture(picture) for picture in pictures], "text": captions}
    inputs = {
        wanted: collate([made.prepare(value, options) for value in given[wanted[0]]])
        for wanted, made in toolbox.inputs.items()
    }
    rows = [f"k{i}" for i in range(max(len(pictures), len(captions)))]
    return Graph(config, toolbox, torch.device("cpu"))(Batch(rows, inputs, {}))
