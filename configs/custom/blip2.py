"""BLIP-2 captions (Li et al., 2023, arXiv:2301.12597) with transformers 4.56 or newer.

The model's folder lies in the weights folder, where a node without internet finds it:
`hf download Salesforce/blip2-opt-2.7b --local-dir "$D2M_WEIGHTS/blip2-opt-2.7b"`.
"""

import os
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import Blip2ForConditionalGeneration, Blip2Processor

from d2m_hpc.models.postprocessors import identity

FOLDER = Path(os.environ.get("D2M_WEIGHTS", "~/.cache/d2m_hpc")).expanduser() / "blip2-opt-2.7b"
MAX_NEW_TOKENS = 30

processor = Blip2Processor.from_pretrained(FOLDER)


def blip2_image(image):
    """An RGB PIL image to the net's float32 pixels [3, side, side]."""
    # Of a picture 1 or 3 pixels high, transformers could not tell which axis the channels are.
    pixels = processor.image_processor(
        np.array(image), input_data_format="channels_last", return_tensors="pt"
    )
    return pixels["pixel_values"][0]


class Blip2(torch.nn.Module):
    name = "blip2"
    raw_inputs = ("image",)
    preprocessors = ("blip2-image",)
    dependencies = ()
    to_device = True
    checkpoints = (FOLDER,)  # hashed at submit, and seen to be the same by each task

    def __init__(self, device):
        super().__init__()
        # Half of float32's memory on a GPU; many operations of a CPU know no float16.
        self.dtype = torch.float32 if str(device) == "cpu" else torch.float16
        net = Blip2ForConditionalGeneration.from_pretrained(FOLDER, dtype=self.dtype)
        self.net = net.to(device).eval()

    def forward(self, pixels):
        """Pixels [B, 3, side, side] to B captions."""
        ids = self.net.generate(
            pixel_values=pixels.to(self.dtype), max_new_tokens=MAX_NEW_TOKENS, do_sample=False
        )
        captions = processor.batch_decode(ids, skip_special_tokens=True)
        return [caption.strip() for caption in captions]


model_lookup = {"blip2": Blip2}
preprocessor_lookup = {"blip2-image": blip2_image}
postprocess_parquet_lookup = {"blip2-caption": partial(identity, model="blip2", to_cpu=False)}
postprocess_feature_lookup = {}
