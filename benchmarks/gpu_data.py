"""What the GPU benchmark works on: checkpoints of full size and random values, and made-up tars."""

from __future__ import annotations

import io
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.captions import captions
from benchmarks.tars import Sample, write
from d2m_hpc.models import dedup, faces, nsfw, toxicity
from d2m_hpc.models.dedup import IscNet
from d2m_hpc.models.scrfd import ScrfdNet

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
CLIP = {"ViT-B-32.pt": "ViT-B-32-quickgelu", "ViT-L-14.pt": "ViT-L-14-quickgelu"}
ISC_ARCH = "tf_efficientnetv2_m_in21ft1k"
REFERENCES = 100_000
"""Rows of the reference embeddings."""
CLASSES = 16
PICTURES = 128
"""Different pictures; a tar of more samples repeats them."""
WIDTH, HEIGHT = 450, 340


def tiny_checkpoints(folder: Path) -> None:
    """The golden kit's small nets."""
    subprocess.run([sys.executable, str(GOLDEN / "make_checkpoints.py"), str(folder)], check=True)


def full_checkpoints(folder: Path) -> None:
    """Nets of the published sizes, with random values, in the published formats.

    XLM-R's own vocabulary cannot be made up: the golden kit's small one takes its place.
    """
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    for name, arch in CLIP.items():
        torch.save(_clip(arch), folder / name)
    isc = _calibrated(IscNet(ISC_ARCH), _pictures(8, 160))
    state = {f"module.{name}": value for name, value in isc.items()}
    torch.save({"arch": ISC_ARCH, "state_dict": state}, folder / dedup.CHECKPOINT)
    embeddings = nn.functional.normalize(torch.randn(REFERENCES, 256), dim=1)
    torch.save(embeddings, folder / dedup.REFERENCES)
    torch.save({"state_dict": _scrfd()}, folder / faces.CHECKPOINT)
    torch.save(nsfw.head().state_dict(), folder / nsfw.CHECKPOINT)
    _toxicity(folder)


def _pictures(count: int, side: int) -> Tensor:
    """float32 [count, 3, side, side] in [-1, 1], of what the tars hold."""
    made = (Image.open(io.BytesIO(_jpeg(seed))).resize((side, side)) for seed in range(count))
    pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in made]))
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def _clip(arch: str) -> dict[str, Tensor]:
    import open_clip

    state = open_clip.create_model(arch, pretrained=None).state_dict()
    sizes = {"input_resolution": 224, "context_length": 77, "vocab_size": 49408}
    numbers = {name: torch.tensor(value) for name, value in sizes.items()}
    return {name: value.half() for name, value in state.items()} | numbers


def _scrfd() -> dict[str, Tensor]:
    """With about five likely anchors an image."""
    net, images = ScrfdNet(), torch.rand(8, 3, 224, 224) * 2 - 1
    _calibrated(net, images)
    with torch.no_grad():
        scores = torch.cat([scores.flatten(1) for scores, _ in net.eval()(images)], dim=1)
        fifth = scores.topk(5, dim=1).values[:, -1].mean()
        net.bbox_head.stride_cls[0].bias -= fifth - math.log(0.3 / 0.7)
    return net.state_dict()


def _calibrated(net: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Its state once the norms have seen images: what leaves them fits into half precision."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        net.train()(images)
    return net.state_dict()


def _toxicity(folder: Path) -> None:
    from transformers import XLMRobertaConfig, XLMRobertaForSequenceClassification

    config = XLMRobertaConfig(
        vocab_size=250_002,
        max_position_embeddings=514,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        num_labels=CLASSES,
    )
    arguments = {
        "model_type": "xlm-roberta-base",
        "model_name": "XLMRobertaForSequenceClassification",
        "tokenizer_name": "XLMRobertaTokenizer",
        "num_classes": CLASSES,
    }
    state = XLMRobertaForSequenceClassification(config).state_dict()
    content = {"config": {"arch": {"args": arguments}}, "state_dict": state}
    torch.save(content, folder / toxicity.CHECKPOINT)
    shutil.copytree(GOLDEN / toxicity.HUB_FILES, folder / toxicity.HUB_FILES, dirs_exist_ok=True)
    config.save_pretrained(folder / toxicity.HUB_FILES)


def tars(folder: Path, count: int, samples: int) -> list[Path]:
    """`count` names of one tar of so many samples: what is measured is no disk."""
    folder.mkdir(parents=True, exist_ok=True)
    first, *others = (folder / f"{i:05d}.tar" for i in range(count))
    _write(first, samples)
    for path in others:
        path.hardlink_to(first)
    return [first, *others]


def _write(path: Path, samples: int) -> None:
    pictures = [_jpeg(seed) for seed in range(min(samples, PICTURES))]
    write(
        path,
        (
            Sample(f"{i:09d}", caption, pictures[i % len(pictures)], WIDTH, HEIGHT)
            for i, caption in enumerate(captions(samples))
        ),
    )


def _jpeg(seed: int) -> bytes:
    """As large and as hard to decode as a photograph: noise of every size, the large ones most."""
    random = np.random.default_rng(seed)
    pixels = np.zeros((HEIGHT, WIDTH, 3))
    for cells, strength in ((4, 60), (16, 30), (64, 14), (256, 9)):
        noise = random.normal(0, strength, (cells, cells, 3)).clip(-128, 127) + 128
        large = Image.fromarray(noise.astype(np.uint8)).resize((WIDTH, HEIGHT), Image.BICUBIC)
        pixels += np.asarray(large, dtype=float) - 128
    buffer = io.BytesIO()
    Image.fromarray((pixels + 128).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()
