"""Decode a sample's image."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import simplejpeg

from d2m_hpc.errors import Rejected
from d2m_hpc.models import formats
from d2m_hpc.models.preprocessors import Picture

LEAST = 1024
"""Pixels of the short side that are left where a JPEG is decoded at a fraction of its size."""


def image(
    data: bytes,
    max_pixels: int,
    need: Callable[[int], None] = lambda size: None,
    scaled: bool = False,
) -> Picture:
    """Decode to RGB, EXIF orientation ignored.

    Args:
        need: called with the bytes that decoding takes, before it begins; may wait.
        scaled: decode a large JPEG at a half, a quarter or an eighth of its size.

    Raises:
        Rejected: not an image, or one of more than `max_pixels` by its header, or one that takes
            more memory or time than such a picture may.
    """
    if not data:
        raise Rejected("the image file is empty")
    try:
        if (
            data[:2] == b"\xff\xd8"
            and (picture := _jpeg(data, max_pixels, need, scaled)) is not None
        ):
            return picture
        return _by_pil(data, max_pixels, need)
    except formats.TooLarge as error:
        raise Rejected(str(error)) from None


def _jpeg(
    data: bytes, max_pixels: int, need: Callable[[int], None], scaled: bool
) -> Picture | None:
    """Decode a JPEG; None where PIL should try: CMYK, truncated, or not quite a JPEG."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        formats.require_size(width, height, max_pixels)
        formats.require_few_scans(data)
        if colours in ("CMYK", "YCCK"):
            return None
        need(formats.cost("JPEG", width, height, max_pixels))
        part = next((n for n in (8, 4, 2) if scaled and min(width, height) >= n * LEAST), 1)
        if part == 1:
            return Picture(simplejpeg.decode_jpeg(data, "RGB"))
        # Libjpeg knows 3/8, 5/8 and so on, too, which take longer.
        least = {"min_width": -(-width // part), "min_height": -(-height // part)}
        return Picture(simplejpeg.decode_jpeg(data, "RGB", min_factor=part, **least))
    except formats.TooLarge:
        raise
    except ValueError:
        return None


def _by_pil(data: bytes, max_pixels: int, need: Callable[[int], None]) -> Picture:
    try:
        with warnings.catch_warnings():
            # Pixels that can be read are no worse for odd metadata.
            warnings.simplefilter("ignore")
            with formats.opened(data, max_pixels) as opened:
                # In four colours a JPEG takes as much as the others.
                kind = None if opened.mode == "CMYK" else opened.format
                need(formats.cost(kind, *opened.size, max_pixels))
                opened.load()
                # `convert` copies even RGB.
                return Picture(opened if opened.mode == "RGB" else opened.convert("RGB"))
    except formats.TooLarge:
        raise
    except Exception as error:  # PIL's plugins raise many kinds of errors
        raise Rejected(f"the image cannot be decoded: {error}") from None
