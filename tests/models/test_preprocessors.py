from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms as T
from kit import photographs
from numpy.typing import NDArray
from PIL import Image
from tiny_nets import OTHERWISE
from torch import Tensor
from torchvision.transforms import functional as TF
from torchvision.transforms import v2

from d2m_hpc.models import extremes, preprocessors
from d2m_hpc.models.preprocessors import PREPROCESSORS, Options, Picture
from d2m_hpc.models.registry import Registry
from d2m_hpc.worker.batch import collate

BICUBIC = T.InterpolationMode.BICUBIC
HALF = ([0.5] * 3, [0.5] * 3)
IMAGES = ("clip-aug", "faces-aug", "dedup-aug")
OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))

CLIP = T.Compose(
    [
        T.Resize(224, interpolation=BICUBIC),
        T.CenterCrop(224),
        T.ToTensor(),
        T.Normalize(*OPENAI),
    ]
)
DEDUP = T.Compose([T.Resize((512, 512)), T.ToTensor(), T.Normalize(*HALF)])


def _faces(image: Image.Image) -> Tensor:
    side = max(image.size)
    square = Image.new("RGB", (side, side), (255, 255, 255))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    small = square.resize((224, 224), Image.Resampling.BICUBIC)
    pixels: Tensor = TF.normalize(TF.to_tensor(small), *HALF)
    return pixels


REFERENCE: dict[str, Callable[[Image.Image], Tensor]] = {
    "clip-aug": CLIP,
    "faces-aug": _faces,
    "dedup-aug": DEDUP,
}


def _prepared(name: str, image: Image.Image, exact: bool) -> NDArray[np.uint8]:
    made = PREPROCESSORS[name].prepare(Picture(image), Options(exact=exact))
    pixels: NDArray[np.uint8] = made[0] if isinstance(made, tuple) else made
    return pixels


def _finished(name: str, image: Image.Image, exact: bool) -> Tensor:
    prepared: Any = PREPROCESSORS[name].prepare(Picture(image), Options(exact=exact))
    if isinstance(prepared, tuple):
        pixels: Tensor = PREPROCESSORS[name].finish(collate([prepared]))[0]
        return pixels[0]
    batch: Tensor = PREPROCESSORS[name].finish(collate([prepared]))
    return batch[0]


def _odd_sizes() -> list[Image.Image]:
    photograph = photographs(1)[0]
    sizes = [(1, 1), (3, 2), (7, 480), (512, 5), (223, 225), (225, 223), (600, 224), (224, 224)]
    return [photograph.resize(size) for size in sizes]


@pytest.mark.parametrize("name", IMAGES)
def test_exact_is_what_the_reference_computes(name: str) -> None:
    for image in [*photographs(6), *_odd_sizes()]:
        expected = REFERENCE[name](image)
        ours = _finished(name, image, exact=True)
        assert ours.dtype == torch.float32
        np.testing.assert_allclose(ours.numpy(), expected.numpy(), atol=1e-6, err_msg=image.size)


FAST = {
    "clip-aug": v2.Compose([v2.Resize(224, interpolation=BICUBIC), v2.CenterCrop(224)]),
    "dedup-aug": v2.Resize((512, 512)),
    "stats-aug": v2.Resize((256, 256)),
}


@pytest.mark.parametrize("name", FAST)
def test_fast_is_torchvisions_resizing_of_bytes_bit_for_bit(name: str) -> None:
    if OTHERWISE and name in ("dedup-aug", "stats-aug"):
        pytest.skip("this torchvision resizes bytes as floats on AVX-512")
    for image in [*photographs(6), *_odd_sizes()]:
        expected = FAST[name](TF.pil_to_tensor(image)).permute(1, 2, 0)
        assert np.array_equal(_prepared(name, image, exact=False), expected)


@pytest.mark.parametrize(
    ("name", "most", "share"),
    [("clip-aug", 2, 0.004), ("faces-aug", 2, 0.003), ("dedup-aug", 1, 0.001)],
)
def test_fast_differs_from_exact_by_little_and_in_few_pixels(
    name: str, most: int, share: float
) -> None:
    pixels, differing, largest = 0, 0, 0
    for image in photographs():
        fast = _prepared(name, image, exact=False).astype(int)
        difference = abs(fast - _prepared(name, image, exact=True))
        pixels += difference.size
        differing += int((difference > 0).sum())
        largest = max(largest, int(difference.max()))
    assert largest <= most
    assert differing / pixels <= share


@pytest.mark.parametrize("name", [*IMAGES, "stats-aug"])
@pytest.mark.parametrize("exact", [True, False])
def test_pixels_travel_as_bytes_of_one_size_channels_last(name: str, exact: bool) -> None:
    made = {_prepared(name, image, exact).shape for image in _odd_sizes()}
    assert len(made) == 1
    pixels = _prepared(name, _odd_sizes()[0], exact)
    assert pixels.dtype == np.uint8
    assert pixels.shape[2] == 3


def test_a_pictures_array_is_its_own_to_write_in() -> None:
    image = photographs(1)[0]
    before = image.copy()
    pixels = Picture(image).array
    pixels[:] = 0
    assert image == before
    assert np.array_equal(Picture(before).array, np.asarray(image))


def test_a_pictures_array_outlives_it() -> None:
    expected = [np.array(image) for image in photographs(6)]
    kept = [Picture(image).array for image in photographs(6)]
    gc.collect()
    assert all(map(np.array_equal, kept, expected))


@pytest.mark.parametrize("exact", [True, False])
def test_an_array_of_pixels_gives_what_a_pil_image_gives(exact: bool) -> None:
    image = photographs(1)[0]
    pixels = np.asarray(image)
    assert not pixels.flags.writeable
    for name in IMAGES:
        prepare = PREPROCESSORS[name].prepare
        from_pil, from_array = (
            prepare(Picture(p), Options(exact=exact)) for p in (image, pixels.copy())
        )
        if isinstance(from_pil, tuple):
            from_pil, from_array = from_pil[0], from_array[0]
        assert np.array_equal(from_pil, from_array)


@pytest.mark.parametrize(
    ("size", "padding"),
    [
        ((100, 200), [0.25, 0, 0.25, 0]),
        ((200, 100), [0, 0.25, 0, 0.25]),
        ((5, 10), [0.2, 0, 0.3, 0]),
        ((64, 64), [0, 0, 0, 0]),
    ],
)
def test_faces_padding_is_told_in_fractions_of_the_square(
    size: tuple[int, int], padding: list[float]
) -> None:
    pixels, told = PREPROCESSORS["faces-aug"].prepare(Picture(Image.new("RGB", size)), Options())
    np.testing.assert_allclose(told, padding, atol=1e-7)
    white = int((pixels.mean(axis=2) > 127).sum()) / 224**2
    assert white == pytest.approx(sum(padding), abs=0.02)


@pytest.mark.parametrize("exact", [True, False])
def test_a_square_is_resized_once_for_clip_and_the_faces(
    exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    real = preprocessors._resize
    monkeypatch.setattr(
        preprocessors, "_resize", lambda *given: sizes.append(given[1:4]) or real(*given)
    )
    picture, options = Picture(photographs(1)[0].resize((300, 300))), Options(exact=exact)
    for_clip = PREPROCESSORS["clip-aug"].prepare(picture, options)
    for_faces, _ = PREPROCESSORS["faces-aug"].prepare(picture, options)
    assert np.array_equal(for_clip, for_faces)
    assert sizes == [(224, 224, "bicubic")]


def test_a_picture_is_copied_out_and_shortened_once_for_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    image = photographs(1)[0].resize((2000, 300))
    copied, shortened, taken = list[Any](), list[Any](), list[Any]()
    copy, shorten, take = preprocessors.array_of, extremes.shortened, preprocessors._batch_of
    monkeypatch.setattr(preprocessors, "_batch_of", lambda p: taken.append(p) or take(p))
    monkeypatch.setattr(preprocessors, "array_of", lambda p: copied.append(p) or copy(p))
    monkeypatch.setattr(extremes, "shortened", lambda p: shortened.append(p) or shorten(p))
    for longest, times in ((2000, 0), (1000, 1)):
        monkeypatch.setattr(extremes, "LONGEST", longest)
        copied.clear()
        taken.clear()
        picture = Picture(image)
        for name in ("faces-aug", "dedup-aug", "stats-aug"):
            PREPROCESSORS[name].prepare(picture, Options())
        sources = [p for p in copied if p is picture.short.source]
        assert (len(sources), len(shortened)) == (1, times)
        assert len([p for p in taken if p is picture.short.array]) == 1


@pytest.mark.parametrize("name", ["dedup-aug", "stats-aug"])
def test_squares_take_any_aspect(name: str) -> None:
    picture = Picture(Image.new("RGB", (1, 9000)))
    PREPROCESSORS[name].prepare(picture, Options(max_pixels=10_000))


def test_identity_gives_an_image_as_pil_and_all_else_as_it_is() -> None:
    image = photographs(1)[0]
    same = preprocessors.identity(Picture(np.asarray(image)), Options())
    assert isinstance(same, Image.Image)
    assert np.array_equal(np.asarray(same), np.asarray(image))
    value = {"a": 1}
    assert preprocessors.identity(value, Options()) is value


def test_a_custom_preprocessor_is_given_a_pil_image() -> None:
    made = preprocessors.custom(lambda image: image.size)
    assert made.prepare(Picture(np.zeros((4, 6, 3), np.uint8)), Options()) == (6, 4)
    assert made.finish("as it is") == "as it is"


def test_the_registry_knows_every_preprocessor() -> None:
    assert PREPROCESSORS.keys() == Registry().preprocessors


def test_one_half_normalises_every_byte_bit_for_bit_as_the_reference_does() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(2, 16, 16, 3)
    finished: Tensor = PREPROCESSORS["dedup-aug"].finish(every)
    assert torch.equal(finished, ((every.float() / 255 - 0.5) / 0.5).permute(0, 3, 1, 2))
    assert finished.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("shape", [(3, 224, 224, 3), (2, 33, 17, 3), (1, 1, 1, 3)])
def test_pixels_are_normalised_bit_for_bit_alike_however_they_lie(
    step: int, shape: tuple[int, ...]
) -> None:
    random = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=random)[:, :, ::step]
    finished: Tensor = PREPROCESSORS["clip-aug"].finish(pixels)
    mean, std = torch.tensor(OPENAI, dtype=torch.float64)
    shift, factor = (-mean / std).float(), (1 / std).float()
    expected = torch.addcmul(shift, pixels / 255, factor)
    assert torch.equal(finished, expected.permute(0, 3, 1, 2))


@pytest.mark.parametrize("exact", [False, True])
def test_a_picture_is_gone_with_its_last_user(exact: bool) -> None:
    """Pictures in circles would lie in memory until the garbage collector runs."""
    picture = Picture(photographs(1)[0])
    for name in IMAGES:
        PREPROCESSORS[name].prepare(picture, Options(exact=exact))
    gone = weakref.ref(picture)
    gc.disable()
    try:
        del picture
        assert gone() is None
    finally:
        gc.enable()
