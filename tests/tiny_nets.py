"""Small random checkpoints in the layout of transformers, each with its tokenizer or processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torchvision
import transformers
from kit import captions
from packaging.version import Version
from tokenizers import BertWordPieceTokenizer
from transformers import (
    AutoImageProcessor,
    BertTokenizerFast,
    BlipConfig,
    BlipImageProcessor,
    BlipProcessor,
    BlipTextConfig,
    BlipVisionConfig,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

OLD = Version(torchvision.__version__) < Version("0.24")
OTHERWISE = OLD and torch.backends.cpu.get_cpu_capability() == "AVX512"
"""There torchvision resized bytes bilinearly as floats, and rounded otherwise."""
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}


def lively(net: torch.nn.Module, seed: int = 0) -> Any:
    """The net with weights by which inputs differ: as they are made, outputs are all but equal."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in net.parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.2)
    return net.eval()


def vit(folder: Path, processor: Any = None, **config: Any) -> Path:
    """An image classifier, of 48 pixels."""
    made = ViTConfig(**SMALL, image_size=48, patch_size=16, **config)
    lively(ViTForImageClassification(made)).save_pretrained(folder)
    (processor or ViTImageProcessor(size={"height": 48, "width": 48})).save_pretrained(folder)
    return folder


def image_processor(folder: Path, backend: str = "pil") -> Any:
    """The processor in a folder, by PIL or torchvision; transformers 5.3 names these otherwise."""
    named = hasattr(transformers, "ViTImageProcessorPil")
    choice = {"backend": backend} if named else {"use_fast": backend != "pil"}
    return AutoImageProcessor.from_pretrained(folder, **choice)


def wordpieces(folder: Path) -> BertTokenizerFast:
    """BERT's tokenizer, learnt from the kit, of 64 tokens at most."""
    learnt = BertWordPieceTokenizer()
    learnt.train_from_iterator(captions(), vocab_size=300, show_progress=False)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = BertTokenizerFast(learnt.get_vocab(), model_max_length=64)
    tokenizer.save_pretrained(folder)
    return tokenizer


def blip(folder: Path, kind: Any, side: int = 48) -> Path:
    """A net of BLIP's of some kind."""
    tokenizer = wordpieces(folder)
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    text = BlipTextConfig(
        **SMALL,
        vocab_size=len(tokenizer),
        encoder_hidden_size=32,
        projection_dim=16,
        max_position_embeddings=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.sep_token_id,
        sep_token_id=tokenizer.sep_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = BlipVisionConfig(**SMALL, image_size=side, patch_size=16)
    config = BlipConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16
    )
    lively(kind(config)).save_pretrained(folder)
    images = BlipImageProcessor(size={"height": side, "width": side})
    BlipProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def bert(folder: Path, kind: Any, **config: Any) -> Path:
    """A net of BERT's of some kind, with a tokenizer learnt from the kit."""
    tokenizer = wordpieces(folder)
    made = kind.config_class(
        **SMALL, vocab_size=len(tokenizer), max_position_embeddings=64, **config
    )
    lively(kind(made)).save_pretrained(folder)
    return folder
