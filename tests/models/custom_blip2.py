"""The seed program's example of a custom file, with a tiny random BLIP-2 in place of the real."""

from functools import partial

import numpy as np
import torch
import torch.nn as nn
from dataset2metadata.postprocessors import identity
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    OPTConfig,
)

SIDE = 32
WORDS = [f"word{i}" for i in range(64)]
SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}


def tiny_blip2():
    torch.manual_seed(0)
    vision = Blip2VisionConfig(**SMALL, num_attention_heads=2, image_size=SIDE, patch_size=16)
    qformer = Blip2QFormerConfig(**SMALL, num_attention_heads=2, encoder_hidden_size=16)
    text = OPTConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        word_embed_proj_dim=16,
        ffn_dim=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=3,
    )
    config = Blip2Config(
        vision_config=vision.to_dict(),
        qformer_config=qformer.to_dict(),
        text_config=text.to_dict(),
        num_query_tokens=2,
        image_token_index=len(WORDS) - 1,
    )
    return Blip2ForConditionalGeneration(config)


# define model here
class Blip2Wrapper(nn.Module):
    name = "blip2"
    raw_inputs = ["image"]  # noqa: RUF012
    preprocessors = ["blip2-aug"]  # noqa: RUF012
    dependencies = []  # noqa: RUF012
    to_device = True

    def __init__(self, device) -> None:
        super().__init__()
        self.model = tiny_blip2().to(device)
        self.model.eval()
        print(f"instantiated {self.name} on {device}")

    def forward(self, x):
        generated_ids = self.model.generate(pixel_values=x, max_new_tokens=4)
        return [" ".join(WORDS[i] for i in ids).strip() for ids in generated_ids.tolist()]


def blip_preprocess(x):
    pixels = np.asarray(x.resize((SIDE, SIDE)), dtype=np.float32) / 127.5 - 1
    return torch.from_numpy(pixels).permute(2, 0, 1)


preprocessor_lookup = {
    "blip2-aug": blip_preprocess,
}

model_lookup = {
    "blip2": Blip2Wrapper,
}

postprocess_parquet_lookup = {
    "blip2-cap": partial(identity, model="blip2", to_cpu=False),
}
postprocess_feature_lookup = {}
