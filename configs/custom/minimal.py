"""A model to copy: an image's shape and mean colour, without any download."""

from functools import partial

import numpy as np
import torch

from d2m_hpc.models.postprocessors import select


def shape_and_colour(image):
    """An RGB PIL image to a float32 tensor [4]: width / height, mean red, green, blue in [0, 1]."""
    red, green, blue = np.asarray(image).mean(axis=(0, 1)) / 255
    return torch.tensor([image.width / image.height, red, green, blue])


class Look(torch.nn.Module):
    name = "look"
    raw_inputs = ("image",)  # what of a sample: "image", "text" or "json"
    preprocessors = ("shape-and-colour",)  # what to make of it, one for each raw input
    dependencies = ()  # models whose outputs follow as further arguments of `forward`
    to_device = True  # move the batch to the GPU first

    def __init__(self, device):
        super().__init__()

    def forward(self, x):
        """A batch [B, 4] to the aspect ratios [B] and the colours [B, 3]."""
        return x[:, 0], x[:, 1:]


model_lookup = {"look": Look}
preprocessor_lookup = {"shape-and-colour": shape_and_colour}
postprocess_parquet_lookup = {"aspect-ratio": partial(select, model="look", index=0)}
postprocess_feature_lookup = {"mean-colour": partial(select, model="look", index=1)}
