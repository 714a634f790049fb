from __future__ import annotations

import io
import tracemalloc

import numpy as np
import pytest
import torch
from kit import photographs
from numpy.typing import NDArray
from PIL import Image
from scipy.fft import dctn
from scipy.ndimage import convolve
from skimage.measure import shannon_entropy
from torch import Tensor

from d2m_hpc.models import stats
from d2m_hpc.models.checkpoint import Weights
from d2m_hpc.models.preprocessors import PREPROCESSORS, Options, Picture
from d2m_hpc.models.stats import ImageStats, TextStats

CPU = torch.device("cpu")
IMAGE = ImageStats(CPU, Weights.__new__(Weights))
TEXT = TextStats(CPU, Weights.__new__(Weights))


def _pixels(images: list[Image.Image]) -> Tensor:
    made = PREPROCESSORS["stats-aug"]
    prepared = [made.prepare(Picture(image), Options(exact=True)) for image in images]
    pixels: Tensor = made.finish(torch.from_numpy(np.stack(prepared)))
    return pixels


def _luma(pixels: Tensor) -> NDArray[np.float64]:
    weights = np.array([0.299, 0.587, 0.114])
    luma: NDArray[np.float64] = np.einsum("bchw,c->bhw", pixels.double().numpy(), weights)
    return luma


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return _pixels(photographs())


def test_brightness_and_contrast_are_mean_and_deviation_of_luma(pixels: Tensor) -> None:
    brightness, contrast, *_ = IMAGE(pixels)
    luma = _luma(pixels) / 255
    np.testing.assert_allclose(brightness.numpy(), luma.mean(axis=(1, 2)), atol=1e-5)
    np.testing.assert_allclose(contrast.numpy(), luma.std(axis=(1, 2)), atol=1e-5)


def test_sharpness_is_the_variance_of_the_laplacian(pixels: Tensor) -> None:
    sharpness = IMAGE(pixels)[2].numpy()
    kernel = np.array([[0, 1, 0], [1, -4, 1], [0, 1, 0]], dtype=float)
    expected = [convolve(x, kernel)[1:-1, 1:-1].var() for x in _luma(pixels) / 255]
    np.testing.assert_allclose(sharpness, expected, rtol=1e-4)


def test_a_blurred_photograph_is_less_sharp() -> None:
    image = photographs(1)[0]
    small = image.resize((image.width // 8, image.height // 8)).resize(image.size)
    sharp, blurred = IMAGE(_pixels([image, small]))[2].tolist()
    assert blurred < sharp / 2


def test_entropy_is_that_of_the_rounded_luma(pixels: Tensor) -> None:
    entropy = IMAGE(pixels)[3].numpy()
    # Integers: no two ways to round the products.
    whole = torch.einsum("bchw,c->bhw", pixels.long(), torch.tensor([299, 587, 114])).numpy()
    untied = [(whole[i] % 1000 != 500).all() for i in range(len(whole))]
    expected = [shannon_entropy((x + 500) // 1000, base=2) for x in whole]
    # Where luma ends in exactly one half, float32 may round either way: a few pixels of 65,536.
    np.testing.assert_allclose(entropy, expected, atol=2e-3)
    np.testing.assert_allclose(entropy[untied], np.array(expected)[untied], atol=1e-5)


def test_one_colour_has_no_entropy_contrast_or_edges() -> None:
    image = Image.new("RGB", (64, 64), (120, 7, 200))
    brightness, contrast, sharpness, entropy, _, histogram = IMAGE(_pixels([image]))
    assert brightness.item() == pytest.approx((0.299 * 120 + 0.587 * 7 + 0.114 * 200) / 255)
    assert (contrast.item(), sharpness.item()) == pytest.approx((0, 0), abs=1e-6)
    assert str(entropy.item()) == "0.0"
    assert histogram.nonzero()[:, 1].tolist() == [120 // 16, 16 + 0, 32 + 200 // 16]


def test_all_grey_levels_alike_have_eight_bits_of_entropy() -> None:
    ramp = torch.arange(256, dtype=torch.uint8).expand(1, 3, 256, 256)
    assert IMAGE(ramp)[3].item() == pytest.approx(8, abs=1e-5)


def test_the_histogram_is_numpys_share_of_each_colour(pixels: Tensor) -> None:
    histogram = IMAGE(pixels)[5].numpy()
    for row, image in zip(histogram, pixels.numpy(), strict=True):
        counts = [np.histogram(colour, bins=16, range=(0, 256))[0] for colour in image]
        np.testing.assert_allclose(row, np.concatenate(counts) / 256**2, atol=1e-6)


def _phash(luma: NDArray[np.float64]) -> tuple[str, float]:
    """The hash, and how near the closest frequency lies to the median, of their spread."""
    small = luma.reshape(32, 8, 32, 8).mean(axis=(1, 3))
    low = dctn(small)[:8, :8].ravel()
    others = np.sort(low[1:])
    median = others[31]  # the middle one of 63
    margin = np.abs(np.delete(low[1:], np.argsort(low[1:])[31]) - median).min()
    bits = "".join("1" if value > median else "0" for value in low)
    return f"{int(bits, 2):016x}", float(margin)


def _hashes(pixels: Tensor) -> list[str]:
    hashes: list[str] = IMAGE.on_host(IMAGE(pixels))[4]
    return hashes


def test_the_perceptual_hash_is_scipys_cosine_transform_against_its_median(pixels: Tensor) -> None:
    hashes = _hashes(pixels)
    expected = [_phash(luma) for luma in _luma(pixels)]
    clear = [i for i, (_, margin) in enumerate(expected) if margin > 1e-3]
    assert len(clear) > 25
    assert [hashes[i] for i in clear] == [expected[i][0] for i in clear]


def _distance(a: str, b: str) -> int:
    return (int(a, 16) ^ int(b, 16)).bit_count()


def _reencoded(image: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    image.resize((image.width * 3 // 4, image.height * 3 // 4)).save(buffer, "JPEG", quality=60)
    return Image.open(buffer).convert("RGB")


def test_the_perceptual_hash_survives_a_smaller_jpeg_and_tells_photographs_apart() -> None:
    images = photographs(12)  # further on, some come a second time
    hashes = _hashes(_pixels(images))
    again = _hashes(_pixels([_reencoded(image) for image in images]))
    assert max(_distance(a, b) for a, b in zip(hashes, again, strict=True)) <= 6
    pairs = [_distance(a, b) for i, a in enumerate(hashes) for b in hashes[:i]]
    assert min(pairs) >= 16


def test_a_batch_gives_what_its_images_give_alone(pixels: Tensor) -> None:
    together = IMAGE(pixels[:5])
    for i in range(5):
        for part, alone in zip(together, IMAGE(pixels[i : i + 1]), strict=True):
            if isinstance(part, Tensor):
                np.testing.assert_allclose(part[i].numpy(), alone[0].numpy(), rtol=1e-5)
            else:
                assert part[i] == alone[0]


def test_image_stats_are_float32s_under_autocast(pixels: Tensor) -> None:
    plain = IMAGE(pixels[:3])
    with torch.autocast("cpu", torch.bfloat16):
        for ours, expected in zip(IMAGE(pixels[:3]), plain, strict=True):
            assert ours == expected if isinstance(ours, list) else torch.equal(ours, expected)


@pytest.mark.parametrize(
    ("text", "characters", "words", "shares"),
    [
        ("", 0, 0, [0, 0, 0, 0]),
        ("   ", 3, 0, [0, 0, 0, 0]),
        ("Ab 1!", 5, 2, [3 / 5, 1 / 5, 1 / 5, 1]),
        ("the The cat", 11, 3, [9 / 11, 1 / 11, 0, 2 / 3]),
        ("ÄÖ日本 ٣", 6, 2, [5 / 6, 2 / 6, 1 / 6, 1]),
        ("a\tb\n\nc", 6, 3, [3 / 6, 0, 0, 1]),
        ("🤖🤖", 2, 1, [0, 0, 0, 1]),
    ],
)
def test_text_stats_are_those_counted_by_hand(
    text: str, characters: int, words: int, shares: list[float]
) -> None:
    counted, split, *found = TEXT([text, "another caption"])
    assert (counted[0], split[0]) == (characters, words)
    assert [float(share[0]) for share in found] == pytest.approx(shares, abs=1e-6)


@pytest.mark.parametrize("space", [" ", "\u3000", "\x1c", "\x85\n", "\t\u2028 ", "\x0b\xa0"])
def test_the_words_of_a_long_text_are_those_of_a_short_one(
    space: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = space.join(["One", "one", "ΣΑΣ", "σας", "é\u0301t", "\u200b", "\ufeff", "x_y-z"]) + space
    short = TEXT([text])
    monkeypatch.setattr(stats, "LONG", 0)
    long = TEXT([text])
    assert (long[1], long[5].tolist()) == (short[1], short[5].tolist())
    assert long[1] == [8]


@pytest.mark.parametrize(("texts", "repeats"), [(8, 50_000), (1, 250_000)])
def test_words_take_little_memory_however_many_and_long_the_texts(texts: int, repeats: int) -> None:
    batch = ["a cat sits " * repeats] * texts
    tracemalloc.start()
    try:
        TEXT(batch)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 20e6
