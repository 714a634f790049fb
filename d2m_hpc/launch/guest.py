"""Leave the process of a Python caller as it was before the call."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from d2m_hpc.models.code import forget
from d2m_hpc.models.weights import OFFLINE

HUB = "huggingface_hub.constants"
SEED = "dataset2metadata"
"""The prefix of modules that the seed program's custom files import."""


@contextmanager
def guest() -> Iterator[None]:
    """Restore what a task changes: environment, modules, logging, settings of PIL and torch."""
    with _environment(), _logging(), _modules(), pictures(), _torch():
        yield


@contextmanager
def _environment() -> Iterator[None]:
    """Restore variables, and the Hugging Face hub's offline switch, which is read only once."""
    before, hub = dict(os.environ), sys.modules.get(HUB)
    offline = hub.HF_HUB_OFFLINE if hub else None
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update({n: v for n, v in before.items() if os.environ.get(n) != v})
        if hub := sys.modules.get(HUB):
            asked = any(before.get(n, "").upper() in ("1", "ON", "YES", "TRUE") for n in OFFLINE)
            vars(hub)["HF_HUB_OFFLINE"] = asked if offline is None else offline


@contextmanager
def _logging() -> Iterator[None]:
    """Restore logging, which libraries configure while they are imported."""
    root = logging.getLogger()
    level, handlers, disabled = root.level, [*root.handlers], logging.root.manager.disable
    try:
        yield
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers
        logging.disable(disabled)


@contextmanager
def _modules() -> Iterator[None]:
    """Forget a custom file's modules: another run's may have the same names."""
    path, modules = [*sys.path], set(sys.modules)
    try:
        yield
    finally:
        sys.path[:] = path
        forget()
        for name in sys.modules.keys() - modules:
            if name.startswith(SEED):
                del sys.modules[name]


@contextmanager
def pictures() -> Iterator[None]:
    """Restore PIL's limits, which a task replaces by the config's."""
    from PIL import Image, ImageFile

    before = ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS
    from d2m_hpc.models import formats

    formats.lift_limits()
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS = before


@contextmanager
def _torch() -> Iterator[None]:
    """Restore torch's settings and random numbers: building a net draws some."""
    import torch

    from d2m_hpc.models import precision

    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    random = torch.get_rng_state()
    benchmark = torch.backends.cudnn.benchmark
    attention = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    try:
        with precision.restored():
            yield
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        torch.set_rng_state(random)
        torch.backends.cudnn.benchmark = benchmark
        torch.backends.cuda.enable_cudnn_sdp(attention)
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.empty_cache()
