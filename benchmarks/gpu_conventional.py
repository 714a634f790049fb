"""The conventional loop on the same nets: float32 batches out of DataLoader processes, texts padded
to the longest, boxes suppressed image by image, every result waited for."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import baseline
from d2m_hpc.models.toxicity import MAX_TOKENS
from d2m_hpc.worker.compute.graph import Graph

INPUTS = (
    ("image", "clip-aug"),
    ("text", "clip-tokens"),
    ("text", "identity"),
    ("image", "faces-aug"),
    ("image", "dedup-aug"),
)
SIDE = 224
MOST_ROWS = 128
"""Of a batch: each process holds two of them ready, of 4 MB a sample."""


def measure(
    graph: Graph, tars: Sequence[Path], workers: int, batch_size: int, seconds: float
) -> dict[str, Any]:
    """Samples a second from tars to values on the host, after a first batch that is not counted."""
    rows, started = 0, 0.0
    for batch in baseline.loader(tars, workers, batch_size, INPUTS):
        compute(graph, batch)
        if started:
            rows += len(batch[1])
            if time.perf_counter() - started > seconds:
                break
        else:
            started = time.perf_counter()
    return {
        "part": "conventional loop",
        "name": f"{workers} loader processes",
        "workers": workers,
        "samples_per_second": rows / (time.perf_counter() - started),
        "rows": rows,
    }


@torch.no_grad()
def compute(graph: Graph, batch: Sequence[Any]) -> list[Any]:
    """Everything that the six models give of a batch, each on the host before the next begins."""
    images, tokens, texts, (squares, paddings), pictures = batch
    models, device = graph.models, graph.device
    found: list[Any] = []
    with torch.autocast(device.type, graph.dtype, enabled=graph.dtype is not None):
        for name in ("oai-clip-vit-b32", "oai-clip-vit-l14"):
            net = models[name].clip
            image = net.encode_image(images.to(device), normalize=True)
            text = net.encode_text(tokens.to(device), normalize=True)
            found += [(image * text).sum(dim=1).cpu(), image.cpu(), text.cpu()]
        found.append(models["nsfw-image-oai-clip-vit-l-14"](image).cpu())
        found.append(_toxicity(models["nsfw-detoxify"], texts, device))
        levels = models["faces-scrfd10g"].net(squares.to(device))
        found.append(baseline.faces([_on_host(level) for level in levels], paddings, SIDE))
        found += [part.cpu() for part in models["dedup-isc-ft-v107"](pictures.to(device))]
    return found


def _toxicity(model: Any, texts: Sequence[str], device: torch.device) -> Tensor:
    encoded = model.tokenizer(
        list(texts), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
    )
    logits = model.net(**encoded.to(device)).logits
    scores: Tensor = logits.float().sigmoid().amax(dim=1).cpu()
    return scores


def _on_host(level: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    logits, distances = level
    return logits.float().cpu(), distances.float().cpu()
