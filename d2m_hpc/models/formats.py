"""The picture formats that are read; no other is opened, whatever a file's name says.

PIL knows forty more. Some run a program on what a stranger wrote (EPS, and IPTC with EPS inside),
some open a picture inside of the picture, past any check of its size (IPTC), and some decode before
they tell the size (ICO, ICNS).
"""

from __future__ import annotations

import io

from PIL import Image, ImageFile, UnidentifiedImageError

EXTENSIONS = ("jpg", "png", "jpeg", "webp", "gif", "bmp", "tif", "tiff", "avif", "jp2", "ppm")
"""Of a sample's pictures, in the order in which one is looked for."""
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
"""The same by PIL's names, in the order in which they are tried."""
BYTES = {"JPEG": 9, "TIFF": 12, "AVIF": 13, "WEBP": 19, "JPEG2000": 20}
"""What a pixel takes while it is decoded and resized, as measured; of other formats, `OTHERS`."""
OTHERS = 12
GRANTED = 2 << 30
"""Bytes that decoding one picture may take at any `max_image_pixels`: what the default allows a
picture of most formats. The others reach it with fewer pixels."""


def lift_limits() -> None:
    """Set PIL's own limits, which every decoding in this process shares."""
    # The reference program decodes what is there of a truncated image, and so do we.
    ImageFile.LOAD_TRUNCATED_IMAGES = True
    # `max_image_pixels` is checked before decoding, in place of PIL's own limit.
    Image.MAX_IMAGE_PIXELS = None


lift_limits()


class TooLarge(ValueError):
    """A picture has more pixels than are allowed, or takes more memory."""


def require_size(width: int, height: int, max_pixels: int) -> None:
    """
    Raises:
        TooLarge: the product is over `max_pixels`.
    """
    if width * height > max_pixels:
        raise TooLarge(
            f"the image has {width}x{height} pixels, over max_image_pixels ({max_pixels})"
        )


def opened(data: bytes, max_pixels: int) -> Image.Image:
    """Open a picture by its header, without decoding it.

    Raises:
        TooLarge: the header tells more than `max_pixels`.
        UnidentifiedImageError: none of `FORMATS`.
        Exception: what PIL's plugins raise for a damaged header.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise UnidentifiedImageError("its format is not known") from None
    require_size(*image.size, max_pixels)
    return image


def cost(kind: str | None, width: int, height: int, max_pixels: int) -> int:
    """The bytes that decoding takes.

    Raises:
        TooLarge: more than `max_pixels` of most formats, and more than `GRANTED`.
    """
    each = BYTES.get(kind or "", OTHERS)
    needed, granted = each * width * height, max(GRANTED, OTHERS * max_pixels)
    if needed > granted:
        raise TooLarge(
            f"the {kind} image of {width}x{height} pixels takes {needed / 1e9:.1f} GB to decode, "
            f"over {granted / 1e9:.1f} GB; max_image_pixels from {-(-needed // OTHERS)} allows it"
        )
    return needed
