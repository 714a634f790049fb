"""How a checkpoint's image processor prepares pictures, by its config alone."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from d2m_hpc.models.inputs import CLIP_MEAN, CLIP_STD, ImageInput, colour, require_sides

RESAMPLING = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
"""PIL's interpolations by number, as configs of processors have them."""
SIDES = {"height", "width", "shortest_edge"}
"""What a processor's config calls the sides of its pictures."""
FREE = ({"shortest_edge"}, {"shortest_edge", "longest_edge"}, {"max_height", "max_width"})
"""The keys of sizes that leave pictures longer on one side."""
PLAIN = re.compile(
    "(ViT|CLIP|Blip|Bit|Siglip|DeiT|Beit)(ImageProcessor|FeatureExtractor)(Fast|Pil)?"
)
"""Processors that resize, cut the middle out and normalise, and do nothing else."""
UNCUT = ("ViT", "Blip", "Siglip")
"""Of these, the ones that cut out nothing unless their config says so."""
OPENAI = ("CLIP", "Blip", "Bit")
"""Of these, the ones with CLIP's mean and std where their config has none; the others' are 0.5."""
SHORT = ("CLIP", "Bit")
"""Of these, the ones whose size, where it is one number, is that of the shorter side."""


def class_of(told: Mapping[str, Any]) -> str:
    """The name of a processor's class; empty where its config leaves that to the net."""
    return str(told.get("image_processor_type") or told.get("feature_extractor_type") or "")


def require_usable(told: Mapping[str, Any]) -> None:
    """
    Args:
        told: a processor's config.

    Raises:
        ValueError: it prepares no picture, or pictures of which no batch can be made.
    """
    for sides in (told.get("size"), told.get("crop_size")):
        given = sides if isinstance(sides, dict) else {"height": sides}
        require_sides(*(given[n] for n in SIDES & given.keys() if given[n] is not None))
    normal = told.get("do_normalize")
    for name in ("image_mean", "image_std"):
        if normal and told.get(name, 0) is None:
            raise ValueError(f"`{name}` is null, and `do_normalize` wants both of mean and std")
        if told.get("do_normalize", True) and not isinstance(told.get(name), int | float | None):
            found = colour(name, told[name])
            if not all(map(math.isfinite, found)) or (name == "image_std" and 0 in found):
                valid = "numbers other than 0" if name == "image_std" else "finite numbers"
                raise ValueError(f"`{name}` is {[*found]}; valid are {valid}")
    if PLAIN.fullmatch(class_of(told)):
        _require_size(told)


def _require_size(told: Mapping[str, Any]) -> None:
    """
    Raises:
        ValueError: pictures are not brought to a size, or not to one for all.
    """
    size, cut = told.get("size", {"height": 1, "width": 1}), _is_cut(told)
    keys = {k for k, v in size.items() if v is not None} if isinstance(size, dict) else set()
    valid = "valid is a `size` of height and width, or a `crop_size` with `do_center_crop`"
    if not told.get("do_resize", True):
        if not cut:
            raise ValueError(f"`do_resize` is false: pictures have no fixed size; {valid}")
    elif size is None or (isinstance(size, dict) and keys not in ({"height", "width"}, *FREE)):
        raise ValueError(f"`size` is {size!r}; {valid}")
    elif told.get("do_resize") and isinstance(size, dict) and keys in FREE and not cut:
        raise ValueError(f"`size` is {size!r}: pictures have no fixed size; {valid}")
    elif "resample" in told and (how := told["resample"]) not in (*range(6), *RESAMPLING):
        raise ValueError(f"`resample` is {how!r}; valid is 0 to 5")
    factor = told.get("rescale_factor", 1)
    if told.get("do_rescale", True) and (not isinstance(factor, int | float) or not factor):
        raise ValueError(f"`rescale_factor` is {factor!r}; valid is a number such as {1 / 255}")


def _is_cut(told: Mapping[str, Any]) -> bool:
    """Whether the middle of pictures is cut out, by a processor of which `PLAIN` knows."""
    found, given = PLAIN.fullmatch(class_of(told)), told.get("do_center_crop")
    return bool(found and found[1] not in UNCUT) if given is None else bool(given)


def sides(told: Mapping[str, Any]) -> tuple[int, int] | None:
    """Height and width of what a net is given; None where the config does not tell.

    Example:
        >>> sides({"image_processor_type": "ViTImageProcessor", "size": 48})
        (48, 48)
    """
    if not PLAIN.fullmatch(class_of(told)):
        return None
    own = 384 if class_of(told).startswith("Blip") else 224
    given = told.get("crop_size" if _is_cut(told) else "size", own)
    if isinstance(given, dict):
        height, width = given.get("height"), given.get("width")
        return (height, width) if height and width else None
    return (given, given) if isinstance(given, int) else None


def described(told: Mapping[str, Any]) -> ImageInput | None:
    """What a processor's config says, where an `ImageInput` can say the same.

    Example:
        >>> described({"image_processor_type": "DonutImageProcessor", "size": [384, 384]}) is None
        True
    """
    if not PLAIN.fullmatch(class_of(told)):
        return None
    try:
        return _described(told)
    except (LookupError, TypeError, ValueError):
        return None


def _described(told: Mapping[str, Any]) -> ImageInput | None:
    """
    Raises:
        LookupError, TypeError, ValueError: the config leaves out what only its class knows.
    """
    told = _completed(told)
    size, normal = told["size"], told["do_normalize"]
    resized = told["do_resize"] and told["do_rescale"] and not told.get("do_pad")
    if not resized or not math.isclose(told["rescale_factor"], 1 / 255, rel_tol=1e-6):
        return None
    options: dict[str, Any] = {
        "interpolation": RESAMPLING[told["resample"]],
        "mean": told["image_mean"] if normal else (0, 0, 0),
        "std": told["image_std"] if normal else (1, 1, 1),
    }
    if not _is_cut(told):
        square = {*size} == {"height", "width"}
        return ImageInput((size["height"], size["width"]), "squash", **options) if square else None
    sides = (told["crop_size"]["height"], told["crop_size"]["width"])
    if {*size} != {"shortest_edge"} or max(sides) > size["shortest_edge"]:
        return None
    return ImageInput(sides, "shortest", short=size["shortest_edge"], crop="floor", **options)


def _completed(told: Mapping[str, Any]) -> dict[str, Any]:
    """A processor's config with what its class has in place of what is left out, and with sizes
    of one number, as old configs have them, written out."""
    found = PLAIN.fullmatch(class_of(told))
    name = found[1] if found else ""
    square = bool(told.get("default_to_square", name not in SHORT))
    made = {
        **dict.fromkeys(("do_resize", "do_rescale", "do_normalize"), True),
        "rescale_factor": 1 / 255,
        "resample": 2 if name == "ViT" else 3,
        "image_mean": CLIP_MEAN if name in OPENAI else (0.5, 0.5, 0.5),
        "image_std": CLIP_STD if name in OPENAI else (0.5, 0.5, 0.5),
        **{key: value for key, value in told.items() if value is not None},
    }
    for key in ("size", "crop_size"):
        if isinstance(side := made.get(key), int):
            whole = square or key == "crop_size"
            made[key] = {"height": side, "width": side} if whole else {"shortest_edge": side}
    return made
