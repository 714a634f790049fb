"""A small random BLIP-2 in the hub's folder format, with a tokenizer learnt from the kit."""

from __future__ import annotations

from pathlib import Path

import torch
from kit import captions
from tokenizers import AddedToken, ByteLevelBPETokenizer
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    BlipImageProcessor,
    GPT2TokenizerFast,
    OPTConfig,
)

SIDE = 32
QUERIES = 2
SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}


def save(folder: Path) -> Path:
    """Write config.json, the weights, and the files of the processor and its tokenizer."""
    processor = Blip2Processor(
        BlipImageProcessor(size={"height": SIDE, "width": SIDE}), _tokenizer(folder), QUERIES
    )
    words = len(processor.tokenizer)
    image_token = processor.tokenizer.convert_tokens_to_ids("<image>")
    processor.save_pretrained(folder)
    _net(words, image_token).save_pretrained(folder)
    return folder


def _tokenizer(folder: Path) -> GPT2TokenizerFast:
    """With OPT's special tokens at OPT's places."""
    learnt = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    learnt.train_from_iterator(captions(), vocab_size=400, special_tokens=special)
    folder.mkdir(parents=True, exist_ok=True)
    learnt.save_model(str(folder))
    made = GPT2TokenizerFast.from_pretrained(
        folder, bos_token="</s>", eos_token="</s>", pad_token="<pad>", unk_token="</s>"
    )
    made.add_special_tokens(
        {"additional_special_tokens": [AddedToken("<image>", normalized=False, special=True)]}
    )
    return made


def _net(words: int, image_token: int) -> Blip2ForConditionalGeneration:
    torch.manual_seed(0)
    vision = Blip2VisionConfig(**SMALL, num_attention_heads=2, image_size=SIDE, patch_size=16)
    qformer = Blip2QFormerConfig(**SMALL, num_attention_heads=2, encoder_hidden_size=16)
    text = OPTConfig(
        vocab_size=words,
        hidden_size=16,
        word_embed_proj_dim=16,
        ffn_dim=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=2,
    )
    config = Blip2Config(
        vision_config=vision.to_dict(),
        qformer_config=qformer.to_dict(),
        text_config=text.to_dict(),
        num_query_tokens=QUERIES,
        image_token_index=image_token,
    )
    net = Blip2ForConditionalGeneration(config)
    for weight in net.parameters():
        if weight.dim() > 1:  # as they are made, they say the same of every image
            torch.nn.init.normal_(weight, std=0.5)
    return net
