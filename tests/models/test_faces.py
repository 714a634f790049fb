from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from insightface.model_zoo.scrfd import SCRFD
from kit import photographs
from PIL import Image
from torch import Tensor, nn
from torchvision.ops import nms

from d2m_hpc.errors import WeightsError
from d2m_hpc.models import faces
from d2m_hpc.models.checkpoint import Weights
from d2m_hpc.models.preprocessors import PREPROCESSORS, Options, Picture
from d2m_hpc.worker.batch import collate, non_finite

SIDE = faces.STRIDES[0] * 28
Levels = Sequence[faces.Level]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def net(checkpoints: Path) -> faces.ScrfdNet:
    return _lively(faces.load(Weights(checkpoints)).eval())


@pytest.fixture(scope="module")
def scrfd(checkpoints: Path) -> faces.Scrfd10G:
    model = faces.Scrfd10G(CPU, Weights(checkpoints))
    _lively(model.net)
    return model


def _lively(net: faces.ScrfdNet) -> faces.ScrfdNet:
    """Boxes of about six strides, and many of them: the random ones are too small to overlap."""
    for scale in net.bbox_head.scales:
        nn.init.ones_(scale.scale)
    nn.init.constant_(net.bbox_head.stride_reg[0].bias, 3.0)
    nn.init.constant_(net.bbox_head.stride_cls[0].bias, -2.5)
    return net


class _InsightfaceLayout(nn.Module):
    """Our net with the six outputs of insightface's ONNX files: three scores, three distances."""

    def __init__(self, net: faces.ScrfdNet) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        levels = self.net(images)
        scores = (_rows(logits, 1).sigmoid() for logits, _ in levels)
        return (*scores, *(_rows(distances, 4) for _, distances in levels))


def _rows(x: Tensor, width: int) -> Tensor:
    """[1, 2 * width, h, w] to a row an anchor."""
    return x[0].permute(1, 2, 0).reshape(-1, width)


@pytest.fixture(scope="module")
def detector(net: faces.ScrfdNet, tmp_path_factory: pytest.TempPathFactory) -> SCRFD:
    """insightface's own detector on our net, with our thresholds."""
    path = tmp_path_factory.mktemp("onnx") / "scrfd.onnx"
    wrapped, example = _InsightfaceLayout(net).eval(), torch.zeros(1, 3, SIDE, SIDE)
    with warnings.catch_warnings():
        # torch calls its exporter by tracing a legacy; the other needs a further package.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        torch.onnx.export(wrapped, (example,), str(path), dynamo=False, opset_version=17)
    found = SCRFD(str(path))
    found.prepare(-1, nms_thresh=faces.MAX_IOU, det_thresh=faces.MIN_SCORE)
    return found


def _squares() -> list[Image.Image]:
    return [p.resize((SIDE, SIDE)) for p in photographs(6)]


def _insightface_input(image: Image.Image) -> Tensor:
    """The pixels as insightface normalises them: divided by 128 where the reference has 127.5."""
    return torch.from_numpy((np.asarray(image, np.float32) - 127.5) / 128).permute(2, 0, 1)[None]


def _decoded(levels: Levels, image: int = 0) -> tuple[Tensor, Tensor]:
    """All anchors of an image as scores [N] and boxes [N, 4], the two of a cell together."""
    own = [(logits[image, None], distances[image, None]) for logits, distances in levels]
    _, scores, boxes = faces.decode(own, SIDE, min_score=1e-30)
    sizes = [faces.ANCHORS * (SIDE // stride) ** 2 for stride in faces.STRIDES]
    order = [i.view(2, -1).T.flatten() for i in torch.arange(len(scores)).split(sizes)]
    return scores[torch.cat(order)], boxes[torch.cat(order)]


def test_decoded_boxes_and_scores_are_those_of_insightface(
    net: faces.ScrfdNet, detector: SCRFD
) -> None:
    for image in _squares():
        bgr = np.asarray(image)[..., ::-1]
        levels = zip(*detector.forward(bgr, faces.MIN_SCORE)[:2], strict=True)
        theirs = [np.hstack([np.clip(b, 0, SIDE), s]) for s, b in levels]
        with torch.inference_mode():
            scores, boxes = _decoded(net(_insightface_input(image)))
        keep = scores >= faces.MIN_SCORE
        ours = torch.cat([boxes[keep], scores[keep, None]], dim=1).numpy()
        assert len(ours) == sum(map(len, theirs))
        # Both list the anchors level by level, row by row.
        np.testing.assert_allclose(ours, np.concatenate(theirs), atol=2e-3)


def test_suppression_keeps_what_that_of_insightface_keeps(
    net: faces.ScrfdNet, detector: SCRFD
) -> None:
    """insightface's corners are pixels that belong to the box, ours are its edges: less 1 at the
    right and the bottom, both measure the same widths and heights."""
    candidates, survivors = 0, 0
    for image in _squares():
        with torch.inference_mode():
            scores, boxes = _decoded(net(_insightface_input(image)))
        scores, boxes = (x[scores > faces.MIN_SCORE] for x in (scores, boxes))
        ours = faces.suppress(torch.zeros(len(scores), dtype=torch.long), scores, boxes)
        inclusive = boxes.double() - torch.tensor([0, 0, 1, 1])
        kept = detector.nms(torch.cat([inclusive, scores[:, None]], dim=1).numpy())
        assert ours.tolist() == list(kept)
        candidates, survivors = candidates + len(scores), survivors + len(kept)
    assert candidates > 2 * survivors > 100


def _plain_nms(scores: Tensor, boxes: Tensor) -> list[int]:
    """Greedy suppression as the papers write it, one pair at a time."""
    found = [i for i in range(len(scores)) if scores[i] > faces.MIN_SCORE]
    found.sort(key=lambda i: -float(scores[i]))
    kept: list[int] = []
    for i in found:
        if all(_iou(boxes[i], boxes[j]) <= faces.MAX_IOU for j in kept):
            kept.append(i)
    return kept


def _iou(a: Tensor, b: Tensor) -> float:
    ax0, ay0, ax1, ay1 = a.double().tolist()
    bx0, by0, bx1, by1 = b.double().tolist()
    width = max(0.0, min(ax1, bx1) - max(ax0, bx0))
    height = max(0.0, min(ay1, by1) - max(ay0, by0))
    area_a = (ax1 - ax0) * (ay1 - ay0)
    area_b = (bx1 - bx0) * (by1 - by0)
    union = area_a + area_b - width * height
    return width * height / union if union else 0.0


def _candidates(seed: int, sizes: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """So many boxes in each image, many of which overlap."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    corners = torch.rand(len(image), 2, generator=generator) * 150
    extents = torch.rand(len(image), 2, generator=generator) * 90
    scores = 0.3 + 0.7 * torch.rand(len(image), generator=generator)
    return image, scores, torch.cat([corners, corners + extents], dim=-1).clamp(0, SIDE)


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 2**31),
    sizes=st.lists(st.sampled_from([0, 1, 2, 60, faces.TOGETHER + 5]), min_size=1, max_size=8),
)
def test_one_suppression_of_a_batch_keeps_what_one_for_each_image_keeps(
    seed: int, sizes: list[int]
) -> None:
    image, scores, boxes = _candidates(seed, sizes)
    kept = faces.suppress(image, scores, boxes)
    assert image[kept].tolist() == sorted(image[kept].tolist())
    for i in range(len(sizes)):
        [own] = torch.nonzero(image == i, as_tuple=True)
        alone = nms(boxes[own].double(), scores[own].double(), faces.MAX_IOU)
        assert torch.equal(kept[image[kept] == i], own[alone])
        if len(own) <= 60:
            assert alone.tolist() == _plain_nms(scores[own], boxes[own])


def test_few_suppressions_do_for_a_batch_and_no_image_is_torn() -> None:
    image, *_ = _candidates(seed=1, sizes=[3] * 64 + [400, 0, 1, 300])
    runs = list(faces._runs(image))
    assert [run.start for run in runs] == [0, *(run.stop for run in runs[:-1])]
    assert runs[-1].stop == len(image)
    assert len(runs) <= 4
    for before, after in itertools.pairwise(runs):
        assert image[before.stop - 1] < image[after.start]


def test_an_image_without_candidates_has_no_boxes_and_takes_none_from_its_neighbours() -> None:
    levels, paddings = _levels(3, 20), torch.zeros(3, 4)
    for logits, _ in levels:
        logits[1] = -2.0
    found = faces.detect(levels, paddings, SIDE)
    assert found[1] == []
    for i in (0, 2):
        own = [(logits[i, None], distances[i, None]) for logits, distances in levels]
        assert found[i] == faces.detect(own, paddings[:1], SIDE)[0] != []


def test_a_batch_without_any_face_gives_empty_lists() -> None:
    assert faces.detect(_levels(2, 0), torch.zeros(2, 4), SIDE) == [[], []]


def _levels(images: int, likely_ones: int) -> Levels:
    """What the net gives of images with so many likely anchors each."""
    generator = torch.Generator().manual_seed(images)
    logits = torch.rand(images, 2058, generator=generator) * 3
    likely = torch.rand(images, 2058, generator=generator).argsort(dim=1) < likely_ones
    logits = torch.where(likely, logits, -3.0)
    distances = torch.rand(images, 2058 * 4, generator=generator) * 3
    cells = (28, 14, 7)
    parts = (
        logits.split([2 * n * n for n in cells], 1),
        distances.split([8 * n * n for n in cells], 1),
    )
    return [
        (one.view(images, -1, n, n), four.view(images, -1, n, n))
        for n, one, four in zip(cells, *parts, strict=True)
    ]


def _one_by_one(levels: Levels, paddings: Tensor) -> list[list[list[float]]]:
    """Image by image, every anchor decoded, as detectors usually do it."""
    found = []
    for i, padding in enumerate(paddings):
        scores, boxes = _decoded(levels, i)
        over = scores > faces.MIN_SCORE
        kept = boxes[over][nms(boxes[over], scores[over], faces.MAX_IOU)]
        found.append(faces.unpad(kept, padding.expand(len(kept), 4), SIDE).tolist())
    return found


@pytest.mark.parametrize("likely", [0, 1, 5, 100, 1500])
def test_the_faces_of_a_batch_are_those_of_its_images_one_by_one(likely: int) -> None:
    levels = _levels(9, likely)
    paddings = torch.rand(9, 4, generator=torch.Generator().manual_seed(0)) / 3
    found = faces.detect(levels, paddings, SIDE)
    assert found == _one_by_one(levels, paddings)
    assert sum(map(len, found)) >= 9 * min(likely, 5) * 0.9


def _batch(pictures: list[Image.Image]) -> tuple[Tensor, Tensor]:
    made = PREPROCESSORS["faces-aug"]
    prepared = [made.prepare(Picture(p), Options(exact=True)) for p in pictures]
    finished: tuple[Tensor, Tensor] = made.finish(collate(prepared))
    return finished


def _detected(scrfd: faces.Scrfd10G, inputs: tuple[Tensor, Tensor]) -> list[faces.Boxes]:
    return scrfd.on_host(scrfd(inputs))


@torch.inference_mode()
def test_a_batch_gives_what_its_images_give_alone(scrfd: faces.Scrfd10G) -> None:
    images, paddings = _batch([*photographs(8), Image.new("RGB", (50, 90), "black")])
    together = _detected(scrfd, (images, paddings))
    assert sum(map(len, together)) > 8
    for i, found in enumerate(together):
        [alone] = _detected(scrfd, (images[i : i + 1], paddings[i : i + 1]))
        assert len(found) == len(alone)
        np.testing.assert_allclose(found, alone, atol=1e-5)


@torch.inference_mode()
def test_boxes_stand_in_descending_order_of_score(scrfd: faces.Scrfd10G) -> None:
    images, paddings = _batch(photographs(8))
    levels = scrfd.net(images.contiguous())
    for i, found in enumerate(_detected(scrfd, (images, paddings))):
        scores, boxes = _decoded(levels, i)
        relative = faces.unpad(boxes, paddings[i].expand(len(boxes), 4), SIDE)
        of_found = [
            scores[(relative == torch.tensor(box)).all(dim=1)].max().item() for box in found
        ]
        assert len(of_found) > 3
        assert of_found == sorted(of_found, reverse=True)
        assert all(score > faces.MIN_SCORE for score in of_found)


@pytest.mark.parametrize(
    ("size", "box", "expected"),
    [
        # 100x200: 50 white columns at each side of a 200x200 square, that is 56 of 224.
        ((100, 200), [56, 0, 168, 224], [0, 0, 1, 1]),
        ((100, 200), [84, 56, 112, 112], [0.25, 0.25, 0.5, 0.5]),
        ((200, 100), [0, 56, 224, 168], [0, 0, 1, 1]),
        ((200, 100), [56, 84, 112, 112], [0.25, 0.25, 0.5, 0.5]),
        # A box that reaches into the padding ends at the image's edge.
        ((200, 100), [0, 0, 112, 224], [0, 0, 0.5, 1]),
        ((64, 64), [22.4, 44.8, 112, 224], [0.1, 0.2, 0.5, 1]),
        # An odd remainder: one column of padding, on the right.
        ((199, 200), [0, 0, 112, 224], [0, 0, 100 / 199, 1]),
    ],
)
def test_boxes_are_relative_to_the_unpadded_image(
    size: tuple[int, int], box: list[float], expected: list[float]
) -> None:
    _, paddings = _batch([Image.new("RGB", size)])
    relative = faces.unpad(torch.tensor([box], dtype=torch.float32), paddings, SIDE)
    np.testing.assert_allclose(relative.numpy(), [expected], atol=1e-6)


def test_an_image_whose_scores_are_not_finite_does_not_pass_as_one_without_faces(
    scrfd: faces.Scrfd10G,
) -> None:
    """Decoding would turn what overflowed into no face, or into a clipped one."""
    images, paddings = _batch(photographs(3))
    with torch.no_grad():
        good = _detected(scrfd, (images, paddings))
        images[1] = torch.nan
        output = scrfd((images, paddings))
    assert non_finite(output) == [1]
    found = scrfd.on_host(output)
    assert [found[0], found[2]] == [good[0], good[2]]


def test_every_tensor_of_the_checkpoint_is_used_but_the_integral(
    checkpoints: Path, net: faces.ScrfdNet
) -> None:
    stored = set(Weights(checkpoints).load(faces.CHECKPOINT)["state_dict"])
    assert stored - set(net.state_dict()) == {"bbox_head.integral.project"}
    assert set(net.state_dict()) <= stored


def _rewrite(checkpoints: Path, folder: Path, drop: str = "", add: str = "") -> Weights:
    content = Weights(checkpoints).load(faces.CHECKPOINT)
    content["state_dict"].pop(drop, None)
    if add:
        content["state_dict"][add] = torch.zeros(1)
    torch.save(content, folder / faces.CHECKPOINT)
    return Weights(folder)


def test_a_checkpoint_with_a_tensor_too_few_is_refused(checkpoints: Path, tmp_path: Path) -> None:
    name = "neck.fpn_convs.1.conv.bias"
    with pytest.raises(WeightsError, match=rf"scrfd_10g\.pt.*(\n.*)*{name}"):
        faces.load(_rewrite(checkpoints, tmp_path, drop=name))


def test_a_checkpoint_with_a_tensor_too_many_is_refused(checkpoints: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"scrfd_10g\.pt.*(\n.*)*bbox_head\.stride_kps"):
        faces.load(_rewrite(checkpoints, tmp_path, add="bbox_head.stride_kps.0.weight"))


def test_a_file_that_is_something_else_is_named(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / faces.CHECKPOINT)
    with pytest.raises(WeightsError, match=r"scrfd_10g\.pt"):
        faces.load(Weights(tmp_path))
