"""Describe the inputs of models by values, so that equal inputs are prepared once. No torch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

RAW_INPUTS = ("image", "text", "json")
"""A further text of a sample, which `text_from` names, is the raw input `text:NAME`."""
PICTURES = ("jpg", "png", "jpeg", "webp", "gif", "bmp", "tif", "tiff", "avif", "jp2", "ppm")
"""Extensions of a sample's pictures, in the order in which one is looked for."""
FORMATS = {
    "JPEG": ("jpg", rb"\xff\xd8\xff"),
    "PNG": ("png", rb"\x89PNG"),
    "WEBP": ("webp", rb"RIFF....WEBP"),
    "GIF": ("gif", rb"GIF8"),
    "BMP": ("bmp", rb"BM"),
    "TIFF": ("tif", rb"II[*+]\0|MM\0[*+]|MM\*\0|II\0\*"),
    "AVIF": ("avif", rb"....ftypavi[fs]"),
    "JPEG2000": ("jp2", rb"....jP  |\xff\x4f\xff\x51"),
    "PPM": ("ppm", rb"P[36]\s"),
}
"""The formats of `PICTURES` by PIL's names, in the order in which they are tried: how names end,
and how files begin."""
_BEGINNINGS = re.compile(
    b"|".join(b"(?P<%s>%s)" % (name.encode(), start) for name, (_, start) in FORMATS.items()),
    re.DOTALL,
)
LARGEST_SIDE = 4096
"""Pixels of a side of what a model is given."""
Resize = Literal["shortest", "longest", "squash", "pad"]
Interpolation = Literal["bicubic", "bilinear", "lanczos", "nearest", "box", "hamming"]


def format_of(data: bytes) -> str:
    """The picture format that data begin as, a key of `FORMATS`; empty for none.

    Example:
        >>> format_of(b"\\xff\\xd8\\xff\\xe0")
        'JPEG'
    """
    found = _BEGINNINGS.match(data)
    return (found.lastgroup or "") if found else ""


def require_sides(*sides: Any) -> None:
    """
    Raises:
        ValueError: one is no number of pixels, or takes too much memory.
    """
    for side in sides:
        if type(side) is not int or not 1 <= side <= LARGEST_SIDE:
            raise ValueError(f"a side of {side!r} pixels; valid is 1 to {LARGEST_SIDE}")


def colour(name: str, given: Any) -> tuple[float, float, float]:
    """Mean or std of pixels, by channel.

    Raises:
        ValueError: it is none.
    """
    try:
        red, green, blue = map(float, given)
    except (TypeError, ValueError):
        raise ValueError(f"{name} {given!r}; valid are three numbers, one a channel") from None
    return red, green, blue


@dataclass(frozen=True)
class ImageInput:
    """Pictures as uint8 [B, 3, H, W], normalised on the device.

    Models whose inputs are equal but for mean and std share one decoding and one resizing.

    Example:
        >>> ImageInput(224, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)).size
        (224, 224)

    Attributes:
        size: height and width; one number for a square.
        resize: `shortest` brings the short side to `short` and cuts the middle out; `longest`
            brings the long side to `size` and puts `fill` around; `squash` ignores the aspect;
            `pad` puts `fill` around to make a square, then resizes, and a model is given the
            pictures and the padding, float32 [B, 4]: at the left, top, right and bottom, as
            fractions of the square's side.
        short: pixels of the short side before the middle is cut out; `size` where it is not given.
        fill: grey value, in [0, 255].
        crop: how the first row and column of the middle come from a half: `round` to the even
            number, as torchvision does, or `floor`, as transformers does.
        mean, std: of pixels in [0, 1], by channel; without both the model is given uint8.
    """

    size: tuple[int, int] | int
    resize: Resize = "shortest"
    interpolation: Interpolation = "bicubic"
    short: int = 0
    fill: int = 0
    crop: Literal["round", "floor"] = "round"
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None

    raw: ClassVar[str] = "image"
    __pydantic_config__: ClassVar = {"extra": "forbid"}

    def __post_init__(self) -> None:
        size = self.size if isinstance(self.size, list | tuple) else (self.size, self.size)
        object.__setattr__(self, "size", tuple(size))
        require_sides(*self.size, self.short or 1)  # type: ignore[misc]
        if 0 < self.short < max(size):
            what = f"a `short` side of {self.short} pixels, of which {max(size)} are cut out"
            raise ValueError(f"{what}; valid is {max(size)} or more")
        for name, choice in (("resize", Resize), ("interpolation", Interpolation)):
            if (value := getattr(self, name)) not in get_args(choice):
                raise ValueError(f"{name} {value!r}; valid: {', '.join(get_args(choice))}")
        for name, ways in (("short", ("shortest",)), ("fill", ("longest", "pad"))):
            if getattr(self, name) and self.resize not in ways:
                what = f"`{name}` means nothing beside `resize: {self.resize}`"
                raise ValueError(f"{what}; leave it out, or choose {' or '.join(ways)}")
        for name in ("mean", "std"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, colour(name, value))
        if (self.mean is None) != (self.std is None):
            given, other = ("std", "mean") if self.mean is None else ("mean", "std")
            raise ValueError(f"a {given} without a {other}; give both, or neither for uint8")
        if self.mean and not all(0 <= value <= 1 for value in self.mean):
            what = f"a mean of {[*self.mean]}, and pixels are in [0, 1]"
            raise ValueError(f"{what}; valid is 0 to 1, as is a mean of 0 to 255 divided by 255")
        if self.std and not all(0 < value < math.inf for value in self.std):
            raise ValueError(f"a std of {[*self.std]}; valid are numbers above 0")

    @property
    def pixels(self) -> ImageInput:
        """The same without mean and std: what is decoded and resized."""
        return replace(self, mean=None, std=None)

    @property
    def height(self) -> int:
        return self.size[0]  # type: ignore[index]

    @property
    def width(self) -> int:
        return self.size[1]  # type: ignore[index]

    def __str__(self) -> str:
        return f"image of {self.width} x {self.height} ({self.resize}, {self.interpolation})"


@dataclass(frozen=True)
class OwnInput:
    """An input that a family's own code prepares, sample by sample, in the decode threads.

    Equal inputs are prepared once for all models that ask for them.

    Example:
        >>> OwnInput("text", "d2m_hpc.models.tokens:tokenizer", context=64).options
        (('context', 64),)

    Attributes:
        raw: what the code is given: `image` (RGB, as PIL), `text` (a str) or `json` (a dict).
        made_by: `module:function`; called with the options once a process, it returns what is
            called for each sample.
    """

    raw: str
    made_by: str
    options: tuple[tuple[str, Any], ...] = ()

    def __init__(self, raw: str, made_by: str, **options: Any) -> None:
        given = options.pop("options", ())  # as `repr` and a file of a submission have them
        for name, value in (
            ("raw", raw),
            ("made_by", made_by),
            ("options", tuple(sorted({**dict(given), **options}.items()))),
        ):
            object.__setattr__(self, name, value)

    def __str__(self) -> str:
        return f"{self.raw} by {self.made_by}"


Form = str | ImageInput | OwnInput
"""How a raw input is prepared: by value, or by the name of a preprocessor."""
Input = tuple[str, Form]
"""A raw input and how it is prepared."""


def kind_of(raw: str) -> str:
    """One of `RAW_INPUTS`; a further text is a text.

    Example:
        >>> kind_of("text:recaption")
        'text'
    """
    return raw.partition(":")[0]


def named_text(name: str) -> str:
    """The raw input of a text by its name in a config; that of the sample's own has none."""
    return f"text:{name}" if name else "text"


def told(form: Form) -> str:
    """A preprocessor, for messages: its name, or our own one's, or what it does."""
    same = (n for n, f in NAMED.items() if f == form or getattr(f, "pixels", None) == form)
    return repr(form if isinstance(form, str) else next(same, str(form)))


def as_prepared(wanted: Input) -> Input:
    """The input as decode threads prepare it: of images, all that differs in mean and std alone."""
    raw, form = wanted
    return raw, form.pixels if isinstance(form, ImageInput) else form


_HALF = (0.5, 0.5, 0.5)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
NAMED: Mapping[str, Form] = {
    "clip-aug": ImageInput(224, mean=CLIP_MEAN, std=CLIP_STD),
    "clip-tokens": OwnInput("text", "d2m_hpc.models.tokens:of_clip"),
    "faces-aug": ImageInput(224, "pad", fill=255, mean=_HALF, std=_HALF),
    "dedup-aug": ImageInput(512, "squash", "bilinear", mean=_HALF, std=_HALF),
    "stats-aug": ImageInput(256, "squash", "bilinear"),
    "identity": "identity",
}
"""The names that a custom class may give in `preprocessors`; `identity` is the sample as it is."""
