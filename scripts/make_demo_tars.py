"""Real webdataset tars of the photographs that scikit-image ships (public domain and CC0).

python scripts/make_demo_tars.py FOLDER
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
import tarfile
from pathlib import Path

from PIL import Image
from skimage import data

CAPTIONS = {
    "astronaut": "Eileen Collins, astronaut, in front of a flag",
    "brick": "a wall of bricks",
    "camera": "a cameraman at work",
    "cat": "Chelsea the cat looks into the camera",
    "coffee": "a cup of coffee on a wooden table",
    "coins": "Greek coins from Pompeii",
    "grass": "grass seen from above",
    "gravel": "a path of gravel",
    "hubble_deep_field": "galaxies in the Hubble deep field",
    "immunohistochemistry": "colonic glands under a microscope",
    "moon": "the surface of the moon",
    "page": "a page of text",
    "retina": "the retina of an eye",
    "rocket": "a Falcon 9 rocket on its launch pad",
    "text": "handwriting on a blackboard",
}
ELSEWHERE = {
    "brick": "eine Mauer aus Ziegelsteinen",
    "cat": "la gata Chelsea mira a la cámara",
    "coffee": "une tasse de café sur une table en bois",
    "coins": "ελληνικά νομίσματα από την Πομπηία",
    "gravel": "un sentiero di ghiaia",
    "moon": "поверхность Луны",
    "rocket": "発射台に立つファルコン9ロケット",
}
"""Captions in other languages, of a picture's last part."""
CROPS = 4
SAMPLES_A_TAR = 20


def crops(picture: Image.Image) -> list[Image.Image]:
    """The whole picture and three parts of it."""
    width, height = picture.size
    boxes = [(0, 0, width, height), (0, 0, width // 2, height), (width // 2, 0, width, height)]
    boxes.append((width // 4, height // 4, 3 * width // 4, 3 * height // 4))
    return [picture.crop(box) for box in boxes[:CROPS]]


def sample(key: str, name: str, part: int, picture: Image.Image) -> dict[str, bytes]:
    """The members that img2dataset writes for a sample."""
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "JPEG", quality=95)
    jpeg = buffer.getvalue()
    caption = CAPTIONS[name] + (f", part {part}" if part else "")
    if part == CROPS - 1:
        caption = ELSEWHERE.get(name, caption)
    fields = {
        "uid": hashlib.md5(f"{name}-{part}".encode()).hexdigest(),
        "url": f"skimage.data.{name}",
        "caption": caption,
        "key": key,
        "original_width": picture.width,
        "original_height": picture.height,
        "sha256": hashlib.sha256(jpeg).hexdigest(),
    }
    return {
        f"{key}.jpg": jpeg,
        f"{key}.json": json.dumps(fields).encode(),
        f"{key}.txt": caption.encode(),
    }


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pictures = [
        (name, part, crop)
        for name in CAPTIONS
        for part, crop in enumerate(crops(Image.fromarray(getattr(data, name)())))
    ]
    for start in range(0, len(pictures), SAMPLES_A_TAR):
        with tarfile.open(folder / f"{start // SAMPLES_A_TAR:05d}.tar", "w") as tar:
            for i, (name, part, crop) in enumerate(pictures[start : start + SAMPLES_A_TAR], start):
                for member, content in sample(f"{i:09d}", name, part, crop).items():
                    info = tarfile.TarInfo(member)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    print(f"{len(pictures)} image-text pairs in {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
