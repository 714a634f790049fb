"""Nets of transformers, loaded from folders without asking the hub, and their inputs."""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from d2m_hpc.errors import WeightsError
from d2m_hpc.models.buckets import MOST_COMPUTED, padded_to_longest, run_tokens
from d2m_hpc.models.checkpoint import told
from d2m_hpc.models.layers import Layers
from d2m_hpc.models.transfer import to_device

ENDLESS = 1 << 20
"""A tokenizer's limit from which on it is none: some have 10^30."""

SHORTEST = {"canine": 4, "funnel": 4}
"""Tokens that a net which takes them together by steps needs, by its type."""

WRITERS = ("git", "vision-encoder-decoder")
"""Types of nets whose texts begin with the tokens of the prompt, as they are given."""
PATCHED = {"pixel_attention_mask", "spatial_shapes", "image_grid_thw", "image_sizes"}
"""What processors give beside pictures whose numbers of patches differ."""

LOCAL: Mapping[str, Any] = {"local_files_only": True, "trust_remote_code": False}
"""How transformers loads: it asks no hub, and nobody whether to run a repository's code."""

Tokenised = list[list[int]] | tuple[list[list[int]], list[list[int]]]
"""The tokens of texts; with the type of each token, where the tokenizer makes types."""


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bar and no advice from transformers; both as they were afterwards."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


@contextmanager
def loading(folder: Path, part: str = "") -> Iterator[None]:
    """Build something of a checkpoint's folder, or of a file.

    Args:
        part: what of it is loaded, for the message.

    Raises:
        WeightsError: it does not hold what is needed.
    """
    if not folder.exists():
        raise WeightsError(f"{folder} is missing; run `d2m weights check`")
    try:
        with quiet():
            yield
    except (WeightsError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a library trips over in files of another kind
        raise WeightsError(f"{folder} cannot be used: {part}{told(error, folder)}") from error


def net_of(folder: Path, auto: str, device: torch.device, unused: str = "-") -> Any:
    """The net of a checkpoint, in float32, ready to compute with.

    Args:
        auto: the class of transformers that knows which net this is.
        unused: how the names of tensors begin that may be missing.

    Raises:
        WeightsError: the checkpoint lacks tensors that the net has, which transformers would make
            up, has none for such a net, or layers that transformers would leave out.
    """
    import transformers

    with loading(folder):
        net, found = getattr(transformers, auto).from_pretrained(
            str(folder),
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # to name them below
            **LOCAL,
        )
        if missing := sorted(n for n in found["missing_keys"] if not n.startswith(unused)):
            few = ", ".join(missing[:4])
            raise WeightsError(f"{folder} lacks tensors of a {type(net).__name__}: {few}")
        own, whole = {*map(_numberless, net.state_dict())}, f"{net.base_model_prefix}."
        left = ((n, _numberless(n)) for n in sorted(found["unexpected_keys"]))
        if layers := [n for n, kind in left if {kind, kind.removeprefix(whole)} & own]:
            what = f"{folder} has layers beyond those of its config.json: {', '.join(layers[:4])}"
            raise WeightsError(f"{what}; mend their number there, or save the shorter net")
        for name, *sizes in sorted(found["mismatched_keys"]):
            saved, wanted = map(list, sizes)
            what = f"{name} has the shape {saved}, and by its config.json {wanted}"
            raise WeightsError(f"{folder} cannot be used: {what}")
        return net.to(device).eval()


def _numberless(name: str) -> str:
    return re.sub(r"\b\d+\b", "#", name)


def loaded(auto: str, source: str) -> Any:
    """A tokenizer or processor of a checkpoint's folder."""
    import transformers

    with loading(Path(source), f"its {auto.removeprefix('Auto')}: "):
        return getattr(transformers, auto).from_pretrained(source, **LOCAL)


def images(source: str) -> Callable[[Image.Image], Tensor]:
    """Pictures as a checkpoint's own processor prepares them, for `inputs.OwnInput`."""
    made = loaded("AutoImageProcessor", source)

    def prepared(image: Image.Image) -> Any:
        # Of a picture 1 or 3 pixels high, transformers could not tell which axis the channels are.
        return made(np.array(image), input_data_format="channels_last", return_tensors="pt")

    with loading(Path(source)):
        given, oblong = (prepared(Image.new("RGB", (width, 64))) for width in (64, 96))
    what = f"{source}: its {type(made).__name__} gives"
    if "pixel_values" not in given or {*given} & PATCHED:
        what = f"{what} {', '.join(sorted(given))}, not pixel_values alone"
        raise WeightsError(f"{what}; only a custom file computes with that")
    if given["pixel_values"].shape != oblong["pixel_values"].shape:
        what = f"{what} pictures of several sizes, which make no batch"
        raise WeightsError(f"{what}; give one `size`, or a `crop_size`")
    return lambda image: prepared(image)["pixel_values"][0]


def tokens(
    source: str, most: int | None = None, prefix: str = "", lower: bool = False
) -> Callable[[str], Any]:
    """The tokens of a text, for `inputs.OwnInput`, with their types where the tokenizer makes them.

    Args:
        source: the folder of the tokenizer's files.
        most: tokens of a text, if fewer than the net takes.
        prefix: what every text begins with.
        lower: take texts in lower case.
    """
    made, one = loaded("AutoTokenizer", source), Lock()
    config = _of_texts(Path(source))
    most = min(most or ENDLESS, longest(config, made.model_max_length))
    known = config.get("vocab_size") or math.inf
    instead = [made.pad_token_id or made.eos_token_id or 0]

    def prepare(text: str) -> Any:
        text = (prefix + text).lower() if lower else prefix + text
        with one:  # tokenizers keep truncation as state, which threads would share
            found = made(text, truncation=True, max_length=most)
        ids = found["input_ids"] or instead  # an empty text, without tokens around
        if (last := max(ids)) >= known:  # CUDA would end the task
            token = made.convert_ids_to_tokens(last)
            raise ValueError(f"{token!r} is token {last} of the tokenizer; the net has {known}")
        types = found.get("token_type_ids")
        return ids if types is None else (ids, types or [0])

    return prepare


def _of_texts(folder: Path) -> dict[str, Any]:
    """What config.json says of the net, or of the part of the net that takes texts."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_bytes())
    return config.get("text_config") or config


def longest(config: Mapping[str, Any], told: int) -> int:
    """The most tokens that a net takes.

    Args:
        config: what config.json says of it.
        told: what its tokenizer says.
    """
    places = config.get("max_position_embeddings") or config.get("n_positions") or ENDLESS
    if "roberta" in str(config.get("model_type")):  # counts its places from behind the padding
        places -= int(config.get("pad_token_id") or 0) + 1
    return min(told, places, ENDLESS)


def padding_of(config: Any) -> int:
    """The token that fills up texts, as a net's config has it; where it has none, any would do.

    Some nets find each text's last token by the config's. Where it has none, a number of no token
    is entered: for such a net, the last token is that in the last place.
    """
    if not isinstance(getattr(config, "pad_token_id", None), int):
        config.pad_token_id = -1
    return max(0, int(config.pad_token_id))


class TextNet:
    """Runs a net on texts, each of which gets the values that it would get alone.

    Args:
        net: what reads texts.
        config: the net's.
        take: given the net's output, a mask int64 [b, L] (1 at tokens, 0 behind them) and the
            texts' lengths [b], returns results [b, ...].
        source: the folder of a checkpoint, to try whether its net reads the padding.
    """

    def __init__(
        self,
        net: Any,
        config: Any,
        device: torch.device,
        take: Callable[..., Tensor],
        source: Path | None = None,
    ) -> None:
        self.net, self.device, self.take = net, device, take
        self.padding, self.least = padding_of(config), SHORTEST.get(config.model_type, 1)
        self.takes = inspect.signature(net.forward).parameters
        self.sparse = [
            m for m in net.modules() if getattr(m, "attention_type", "") == "block_sparse"
        ]
        self.most = math.inf  # while the net is tried
        apart = self.sparse or (source and self._reads_padding(source))
        self.most = 1 if apart else MOST_COMPUTED

    def _reads_padding(self, source: Path) -> bool:
        """Whether a text has other values beside a longer one, or cannot be computed there.

        Nets read the padding that have no mask, that take the last place or the mean of all for
        their summary, or that mix neighbours as a convolution does, whatever the mask says.
        """
        longer = "a cat on a mat in the sun, a dog, and a bird that sings all day"
        with loading(source):
            both = [*map(tokens(str(source)), ("a cat", longer))]
        texts: Any = (
            tuple(map(list, zip(*both, strict=True))) if isinstance(both[0], tuple) else both
        )
        one: Any = tuple(t[:1] for t in texts) if isinstance(texts, tuple) else texts[:1]
        with suppress(Exception), torch.no_grad():  # which is told when a caption is computed
            alone, beside = self(one), self(texts)[:1]
            return not torch.allclose(beside, alone, rtol=0, atol=1e-4 * float(alone.abs().max()))
        return True

    def __call__(self, texts: Tokenised, **seen: Tensor) -> Tensor:
        """
        Args:
            seen: what else the net is given, a row for each text.
        """
        ids, types = texts if isinstance(texts, tuple) else (texts, None)
        kinds = None
        if types and "token_type_ids" in self.takes and any(map(any, types)):
            lengths = torch.tensor([*map(len, types)])
            made = F.pad(padded_to_longest(types, lengths, 0), (0, self.least - 1))
            kinds = to_device(made, self.device)

        def run(ids: Tensor, lengths: Tensor, rows: Tensor) -> Tensor:
            try:
                return read(ids, lengths, rows)
            except ValueError:  # of BART, which wants as many ends in each text as in the first
                if len(rows) == 1 or self.most == math.inf:
                    raise
            parts = (t[:, None] for t in (lengths, rows))
            ones = zip(ids[:, None], *parts, strict=True)
            return torch.cat([read(ids[:, : int(n)], n, row) for ids, n, row in ones])

        def read(ids: Tensor, lengths: Tensor, rows: Tensor) -> Tensor:
            ids = F.pad(ids, (0, max(0, self.least - ids.shape[1])), value=self.padding)
            mask = (torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]).long()
            given = {"input_ids": ids, "attention_mask": mask}
            if types:
                zeros = torch.zeros_like(ids)
                given["token_type_ids"] = zeros if kinds is None else kinds[rows, : ids.shape[1]]
            given = {name: value for name, value in given.items() if name in self.takes}
            more = {name: value[rows] for name, value in seen.items()}
            for net in self.sparse:  # after a short text, the net would be another for good
                net.set_attention_type("block_sparse")
            with quiet() if self.sparse else nullcontext():
                return self.take(self.net(**given, **more), mask, lengths)

        return run_tokens(ids, self.padding, run, self.device, self.most)


class Classifier(nn.Module):
    """The scores of a checkpoint's labels, of pictures or of texts.

    Args:
        auto: the class of transformers that knows the net.
        labels: the labels, in order, as the checkpoint has them: by the names of their columns.
    """

    def __init__(
        self, device: torch.device, folder: Path, auto: str, labels: Mapping[str, str]
    ) -> None:
        super().__init__()
        self.net = net_of(folder, auto, device)
        self.labels, self.texts = labels, None
        if auto == "AutoModelForSequenceClassification":
            self.texts = TextNet(self.net, self.net.config, device, _logits, folder)

    def forward(self, given: Tensor | Tokenised) -> dict[str, Tensor]:
        """
        Args:
            given: pictures float32 [B, 3, H, W], or B texts' tokens.

        Returns:
            `scores`, float32 [B, labels].
        """
        if isinstance(given, Tensor) or self.texts is None:
            return {"scores": self._scores(self.net(pixel_values=given).logits.float())}
        return {"scores": self._scores(self.texts(given).float())}

    def on_host(self, output: dict[str, Tensor]) -> dict[str, Any]:
        scores, names = output["scores"], [*self.labels.values()]
        best = [names[i] for i in scores.argmax(dim=1).tolist()]
        return {**dict(zip(self.labels, scores.unbind(1), strict=True)), **output, "label": best}

    def _scores(self, logits: Tensor) -> Tensor:
        """As a pipeline of transformers makes them of the net's numbers."""
        kind = self.net.config.problem_type
        if kind == "regression":
            return logits
        several = kind == "multi_label_classification" or logits.shape[1] == 1
        return logits.sigmoid() if several else logits.softmax(dim=1)


def _logits(output: Any, mask: Tensor, lengths: Tensor) -> Tensor:
    logits: Tensor = output.logits
    return logits


class Embedder(nn.Module):
    """A feature of each text.

    Args:
        pooling: what of the last layer's tokens is taken, as sentence-transformers names it.
        steps: what follows before features are cut: the folder of a linear layer with its
            activation; or None, to bring features to length 1.
        cut: the first values that are kept; None for all.
        normalise: bring features to length 1 at last.
    """

    def __init__(
        self,
        device: torch.device,
        folder: Path,
        pooling: str,
        steps: Sequence[tuple[Path, str] | None],
        cut: int | None = None,
        normalise: bool = False,
    ) -> None:
        super().__init__()
        self.net = net_of(folder, _reader_of(folder), device, unused="pooler.")
        self.pooling, self.cut, self.normalise = pooling, cut, normalise
        self.steps = nn.Sequential(*(_layer(*s) if s else _Normalised() for s in steps)).to(device)
        self.read = TextNet(self.net, self.net.config, device, self._pooled, folder)

    def forward(self, texts: Tokenised) -> dict[str, Tensor]:
        """
        Args:
            texts: tokens of B texts.

        Returns:
            `feature`, float32 [B, D].
        """
        feature = self.steps(self.read(texts))[:, : self.cut]
        return {"feature": F.normalize(feature, dim=1) if self.normalise else feature}

    def _pooled(self, output: Any, mask: Tensor, lengths: Tensor) -> Tensor:
        hidden: Tensor = output.last_hidden_state.float()
        if self.pooling == "cls":
            return hidden[:, 0]
        if self.pooling == "lasttoken":
            return hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1]
        if self.pooling == "max":
            return hidden.masked_fill(mask[:, :, None] == 0, -torch.inf).amax(dim=1)
        weights = mask.cumsum(dim=1) * mask if self.pooling == "weightedmean" else mask
        total = weights.sum(dim=1, keepdim=True).float()
        if self.pooling == "mean_sqrt_len_tokens":
            total = total.sqrt()
        return (hidden * weights[:, :, None]).sum(dim=1) / total


class _Normalised(nn.Module):
    def forward(self, feature: Tensor) -> Tensor:
        return F.normalize(feature, dim=1)


def _layer(folder: Path, activation: str) -> nn.Module:
    """A `Dense` of sentence-transformers."""
    names = ("model.safetensors", "pytorch_model.bin")
    path = next((folder / name for name in names if (folder / name).is_file()), folder / names[0])
    with loading(path):
        return Layers(path, "none", activation, normalize=False, epsilon=1e-5)


class Captioner(nn.Module):
    """A text about each image.

    Args:
        prompt: what texts begin with; may be empty.
        options: of `generate`.
    """

    def __init__(
        self, device: torch.device, folder: Path, prompt: str, options: Mapping[str, int]
    ) -> None:
        super().__init__()
        self.net = net_of(folder, "AutoModelForImageTextToText", device)
        self.tokenizer = loaded("AutoTokenizer", str(folder))
        self.options, self.given = options, {}
        if prompt:
            made = loaded("AutoProcessor", str(folder))
            given = made(images=Image.new("RGB", (64, 64)), text=prompt, return_tensors="pt")
            if self.net.config.model_type in WRITERS:
                ends = (self.tokenizer.sep_token_id, self.tokenizer.eos_token_id)
                last = -1 if given["input_ids"][0, -1] in ends else None  # no text goes on behind
                given = {k: given[k][:, :last] for k in ("input_ids", "attention_mask")}
            self.given = {k: v.to(device) for k, v in given.items() if k != "pixel_values"}

    def forward(self, images: Tensor) -> dict[str, Any]:
        """
        Args:
            images: float32 [B, 3, H, W], normalised.

        Returns:
            `text`, a list of B; and `finite`, float32 [B], which is NaN where the net's numbers
            were, as a text says nothing of that.
        """
        rows, seen = len(images), _Seen()
        given = {k: v.repeat(rows, *[1] * (v.dim() - 1)) for k, v in self.given.items()}
        ids = self.net.generate(
            pixel_values=images,
            **given,
            **self.options,
            do_sample=False,
            logits_processor=[seen],
        )
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        bad = seen.bad.view(rows, -1).any(dim=1)
        return {
            "text": [text.strip() for text in texts],
            "finite": torch.where(bad, torch.nan, 0.0),
        }


def _reader_of(folder: Path) -> str:
    """The class of a net that reads texts: of T5 and its like, the encoder."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    with loading(folder):
        kind = json.loads((folder / "config.json").read_bytes())["model_type"]
    encoder = str(MODEL_MAPPING_NAMES.get(kind, "")).removesuffix("Model") + "EncoderModel"
    return encoder if hasattr(transformers, encoder) else "AutoModel"


class _Seen:
    """Notes the rows for which a net gives NaN, while it generates."""

    bad: Tensor

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        bad = scores.isnan().any(dim=1)
        self.bad = self.bad | bad if hasattr(self, "bad") else bad
        return scores


class Matcher(nn.Module):
    """The probability that a text belongs to an image, by BLIP's matching head."""

    def __init__(self, device: torch.device, folder: Path) -> None:
        super().__init__()
        self.net = net_of(folder, "BlipForImageTextRetrieval", device)
        self.read = TextNet(self.net.text_encoder, self.net.config.text_config, device, self._taken)

    def forward(self, images: Tensor, texts: Tokenised) -> dict[str, Tensor]:
        """
        Args:
            images: float32 [B, 3, H, W], normalised.
            texts: tokens of B texts.

        Returns:
            `score`, float32 [B].
        """
        return self.of_images(images)(texts)

    def of_images(self, images: Tensor) -> Callable[[Tokenised], dict[str, Tensor]]:
        seen = self.net.vision_model(pixel_values=images).last_hidden_state
        return lambda texts: {"score": self.read(texts, encoder_hidden_states=seen)}

    def _taken(self, output: Any, mask: Tensor, lengths: Tensor) -> Tensor:
        logits: Tensor = self.net.itm_head(output.last_hidden_state[:, 0])
        return logits.float().softmax(dim=1)[:, 1]
