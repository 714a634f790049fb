"""The picture formats that are read; no other is opened, whatever a file's name says.

PIL knows forty more. Some run a program on what a stranger wrote (EPS, and IPTC with EPS inside),
some open a picture inside of the picture, past any check of its size (IPTC), and some decode before
they tell the size (ICO, ICNS).
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

from PIL import Image, ImageFile, TiffImagePlugin, UnidentifiedImageError

from d2m_hpc.models.inputs import FORMATS

BYTES = {"JPEG": 9, "TIFF": 12, "AVIF": 13, "WEBP": 19, "JPEG2000": 20}
"""What a pixel takes while it is decoded and resized, as measured; of other formats, `OTHERS`."""
OTHERS = 12
GRANTED = 2 << 30
"""Bytes that decoding one picture may take at any `max_image_pixels`: what the default allows a
picture of most formats. The others reach it with fewer pixels."""

SCANS = 32
"""Scans that a JPEG of any size may have; progressive photographs have ten or so."""
MOST_SCANS = 500
"""Scans that a small JPEG may have, as libjpeg's authors advise."""
SCANNED = 1e9
"""Pixels times scans that a JPEG with more than `SCANS` may have: five seconds of decoding."""
_SEGMENT = re.compile(rb"\xff+([\x02-\xcf\xd9-\xfe])", re.DOTALL)
"""A marker of JPEG but those that stand alone; FF in coded data is followed by 0."""
_START_OF_SCAN, _END = b"\xda", b"\xd9"
_FRAMES = bytes({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})
_PROGRESSIVE = b"\xc2\xc6\xca\xce"
_COMPRESSION, _JPEG_IN_TIFF = 259, 7
_PLACES = ((273, 279), (324, 325))
"""Tags of TIFF: where strips begin and their sizes in bytes; likewise of tiles."""


def lift_limits() -> None:
    """Set PIL's own limits, which every decoding in this process shares."""
    # The reference program decodes what is there of a truncated image, and so do we.
    ImageFile.LOAD_TRUNCATED_IMAGES = True
    # `max_image_pixels` is checked before decoding, in place of PIL's own limit.
    Image.MAX_IMAGE_PIXELS = None


lift_limits()


class TooLarge(ValueError):
    """A picture has more pixels than are allowed, or takes more memory or time."""


def require_size(width: int, height: int, max_pixels: int) -> None:
    """
    Raises:
        TooLarge: the product is over `max_pixels`.
    """
    if width * height > max_pixels:
        raise TooLarge(
            f"the image has {width}x{height} pixels, over max_image_pixels ({max_pixels})"
        )


def require_few_scans(data: bytes, most: int | None = None) -> None:
    """Refuse a JPEG whose scans take minutes to decode, however small the file is.

    Each scan costs a pass over all pixels. A JPEG of one scan is known by its header, and its data
    are not looked at.

    Args:
        most: the scans that the JPEG may have; None for what suits its pixels.

    Raises:
        TooLarge: the JPEG has too many scans for its pixels.
    """
    width = height = colours = position = 0
    progressive = False
    while found := _SEGMENT.search(data, position):
        position = found.end()
        segment = data[position : position + 8]
        if len(segment) < 8 or found[1] == _END:
            return
        if found[1] in _FRAMES:
            progressive, colours = found[1] in _PROGRESSIVE, segment[7]
            height, width = int.from_bytes(segment[3:5]), int.from_bytes(segment[5:7])
        elif found[1] == _START_OF_SCAN:
            if progressive or segment[2] < colours:
                suited = max(SCANS, min(MOST_SCANS, int(SCANNED / max(width * height, 1))))
                _count_scans(data, position, f"{width}x{height}", most or suited)
            return
        position += int.from_bytes(segment[:2])


def _count_scans(data: bytes, position: int, size: str, most: int) -> None:
    """
    Args:
        position: behind the first scan's marker.
    """
    if data.count(b"\xff" + _START_OF_SCAN, position) < most:
        return  # a few of them may be no markers
    scans = 1
    while (found := _SEGMENT.search(data, position)) and found[1] != _END:
        scans += found[1] == _START_OF_SCAN
        if scans > most:
            raise TooLarge(
                f"the JPEG has over {most} scans, the most for {size} pixels; "
                "photographs have about 10, and each costs a pass over all pixels"
            )
        position = found.end() + int.from_bytes(data[found.end() : found.end() + 2])


def _require_few_scans_in_strips(data: bytes, tags: Mapping[int, Any]) -> None:
    """Refuse a TIFF of JPEGs, one a strip or tile, of which any has many scans.

    Strips may share their bytes, so that no sum over the file bounds what decoding takes.

    Raises:
        TooLarge: a strip or tile has over `SCANS` scans.
    """
    if tags.get(_COMPRESSION) != _JPEG_IN_TIFF or data.count(b"\xff" + _START_OF_SCAN) <= SCANS:
        return
    for starts, sizes in _PLACES:
        known = tags.get(starts, ())
        for start, size in {*zip_longest(known, tags.get(sizes, ())[: len(known)])}:
            require_few_scans(data[start : start + size if size else None], SCANS)


def opened(data: bytes, max_pixels: int) -> Image.Image:
    """Open a picture by its header, without decoding it.

    Raises:
        TooLarge: the header tells more than `max_pixels`, or a JPEG has too many scans.
        UnidentifiedImageError: none of `FORMATS`.
        Exception: what PIL's plugins raise for a damaged header.
    """
    if data[:2] == b"\xff\xd8":
        require_few_scans(data)
    try:
        image = Image.open(io.BytesIO(data), formats=[*FORMATS])
    except UnidentifiedImageError:
        raise UnidentifiedImageError("its format is not known") from None
    require_size(*image.size, max_pixels)
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        _require_few_scans_in_strips(data, image.tag_v2)
    return image


def granted(max_pixels: int) -> int:
    """The bytes that one picture may take, as a file or decoded."""
    return max(GRANTED, OTHERS * max_pixels)


def cost(kind: str | None, width: int, height: int, max_pixels: int) -> int:
    """The bytes that decoding takes.

    Raises:
        TooLarge: more than `max_pixels` of most formats, and more than `GRANTED`.
    """
    each = BYTES.get(kind or "", OTHERS)
    needed = each * width * height
    if needed > (most := granted(max_pixels)):
        raise TooLarge(
            f"the {kind} image of {width}x{height} pixels takes {needed / 1e9:.1f} GB to decode, "
            f"over {most / 1e9:.1f} GB; max_image_pixels from {-(-needed // OTHERS)} allows it"
        )
    return needed
