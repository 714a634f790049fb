"""Other programs on a CPU with checkpoints of random values, for `benchmarks.whole`.

dataset2metadata wants CUDA and the published files. What is changed of it, and nothing else:
checkpoints come from a folder, Detoxify and the detector of faces go to the CPU, and it does not
sleep between groups of tars. Of clip-retrieval, only where its checkpoint comes from.
"""

from __future__ import annotations

import json
import sys
import time
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# Only the standard library here: the other programs' Python does not have our packages.

CLASSES = [str(number) for number in range(16)]


def dataset2metadata(keys: dict[str, Any], checkout: Path, weights: Path) -> None:
    """Run the reference program on a config's keys."""
    sys.path.insert(0, str(checkout))
    import torch
    from dataset2metadata import models, process

    process.time = SimpleNamespace(time=time.time, sleep=lambda seconds: None)
    _clip_from(weights)
    detoxify, detector = models.Detoxify, models.FaceDetector
    tokens = str(weights / "xlm-roberta-base")
    models.Detoxify = lambda name, device: detoxify(name, huggingface_config_path=tokens)
    load = torch.load

    def with_levels(*given: Any, **more: Any) -> Any:
        content = load(*given, **more)
        content["state_dict"]["bbox_head.integral.project"] = torch.linspace(0, 8, 9)
        return content

    def on_cpu(path: str, device: object) -> Any:
        torch.load = with_levels
        try:
            return detector(path, -1)
        finally:
            torch.load = load

    models.FaceDetector = on_cpu
    files = {
        "nsfw-image": "nsfw_torch.pt",
        "faces-scrfd10g": "scrfd_10g.pt",
        "dedup-embeddings": "eval_dedup_embeddings.pt",
    }
    models.download = lambda name: str(weights / files[name])

    def from_folder(url: str, **_: Any) -> Any:
        content = torch.load(weights / Path(url).name, map_location="cpu", weights_only=False)
        if "config" in content:
            content["config"]["dataset"] = {"args": {"classes": CLASSES}}
            content["config"]["arch"]["args"]["model_type"] = tokens
        else:
            content["args"] = Namespace(input_size=512)
        return content

    torch.hub.load_state_dict_from_url = from_folder
    process.process(keys)


def clip_retrieval(keys: dict[str, Any], _: Path, weights: Path) -> None:
    """Run clip-retrieval's inference on images of tars, with CLIP B/32."""
    # Its packages beside inference (the index, the server) are neither installed nor needed.
    here = next(
        Path(p) / "clip_retrieval" for p in sys.path if (Path(p) / "clip_retrieval").is_dir()
    )
    sys.modules["clip_retrieval"] = package = type(sys)("clip_retrieval")
    package.__path__ = [str(here)]
    sys.modules["sentence_transformers"] = stub = type(sys)("sentence_transformers")
    stub.SentenceTransformer = None
    _clip_from(weights)
    inner = type(sys)("clip_retrieval.clip_inference")
    sys.modules["clip_retrieval.clip_inference"] = inner
    inner.__path__ = [str(here / "clip_inference")]
    from clip_retrieval.clip_inference.worker import worker

    worker(
        tasks=[0],
        input_dataset=keys["input_tars"],
        output_folder=keys["output_metadata_dir"],
        output_partition_count=1,
        input_format="webdataset",
        batch_size=keys["batch_size"],
        num_prepro_workers=keys["nworkers"],
        enable_text=False,
    )


def _clip_from(weights: Path) -> None:
    from clip import clip

    def download(url: str, root: str) -> str:
        return str(weights / Path(url).name)

    def no_archive(*_: Any, **__: Any) -> Any:
        raise RuntimeError("the made-up checkpoints are plain state dicts")

    clip._download, clip.torch.jit.load = download, no_archive


if __name__ == "__main__":
    program, keys, checkout, weights = sys.argv[1:]
    run = {"dataset2metadata": dataset2metadata, "clip-retrieval": clip_retrieval}[program]
    run(json.loads(keys), Path(checkout), Path(weights))
