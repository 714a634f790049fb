"""Faces by an ONNX detector of insightface's model packs (SCRFD, Guo et al., 2021,
arXiv:2105.04714), run by onnxruntime, and the share of its image that the largest one takes.

Unpack https://github.com/deepinsight/insightface/releases/download/v0.7/buffalo_l.zip as
`$D2M_WEIGHTS/buffalo_l`; `pip install onnxruntime`, or `onnxruntime-gpu` for a GPU.
"""

import os
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from PIL import Image
from torchvision.ops import nms

from d2m_hpc.models.postprocessors import identity

WEIGHTS = Path(os.environ.get("D2M_WEIGHTS", "~/.cache/d2m_hpc")).expanduser()
DETECTOR = WEIGHTS / "buffalo_l" / "det_10g.onnx"
SIDE = 640  # pixels of the square that the detector sees, as in insightface
STRIDES = (8, 16, 32)
ANCHORS = 2
MIN_SCORE = 0.5
MAX_IOU = 0.4


def letterbox(image):
    """An RGB PIL image to uint8 [SIDE, SIDE, 3], black at the right and below, and its size
    (width, height) within."""
    scale = SIDE / max(image.size)
    small = image.resize([max(1, round(side * scale)) for side in image.size], Image.BILINEAR)
    square = np.zeros((SIDE, SIDE, 3), np.uint8)
    square[: small.height, : small.width] = small
    return square, np.array(small.size, np.float32)


def anchors():
    """Centres (x, y) [N, 2] and strides [N, 1] in pixels: level by level, row by row, those of a
    cell together."""
    centres, strides = [], []
    for stride in STRIDES:
        rows, columns = np.mgrid[:SIDE:stride, :SIDE:stride]
        cells = np.stack([columns, rows], axis=-1).reshape(-1, 2).repeat(ANCHORS, axis=0)
        centres.append(cells)
        strides.append(np.full((len(cells), 1), stride))
    return torch.from_numpy(np.concatenate(centres)), torch.from_numpy(np.concatenate(strides))


class Detector(torch.nn.Module):
    name = "insightface"
    raw_inputs = ("image",)
    preprocessors = ("letterbox",)
    dependencies = ()
    to_device = False  # onnxruntime copies to the GPU itself
    checkpoints = (DETECTOR,)  # hashed at submit, and seen to be the same by each task

    def __init__(self, device):
        super().__init__()
        index = str(device).removeprefix("cuda:")
        gpu = [] if index == "cpu" else [("CUDAExecutionProvider", {"device_id": index})]
        providers = [*gpu, "CPUExecutionProvider"]
        self.session = onnxruntime.InferenceSession(str(DETECTOR), providers=providers)
        self.centres, self.strides = anchors()

    def forward(self, inputs):
        """Letterboxed images [B, SIDE, SIDE, 3] and their sizes [B, 2] to the boxes of each image,
        best first: [x0, y0, x1, y1] in [0, 1]."""
        images, sizes = inputs
        pixels = (images.permute(0, 3, 1, 2).float() - 127.5) / 128
        return [
            (self.faces(one[None]) / size.repeat(2)).clamp(0, 1).tolist()
            for one, size in zip(pixels, sizes, strict=True)
        ]

    def faces(self, pixels):
        """One image [1, 3, SIDE, SIDE] to its boxes [K, 4] in pixels."""
        # Three levels of scores, three of distances to the box's sides; some models add landmarks.
        parts = self.session.run(None, {self.session.get_inputs()[0].name: pixels.numpy()})[:6]
        levels = [torch.from_numpy(part) for part in parts]
        scores = torch.cat([level.reshape(-1) for level in levels[:3]])
        distances = torch.cat([level.reshape(-1, 4) for level in levels[3:]]) * self.strides
        corners = [self.centres - distances[:, :2], self.centres + distances[:, 2:]]
        boxes = torch.cat(corners, dim=1).clamp(0, SIDE)
        likely = scores > MIN_SCORE
        boxes, scores = boxes[likely], scores[likely]
        return boxes[nms(boxes, scores, MAX_IOU)]


class LargestFace(torch.nn.Module):
    name = "largest-face"
    raw_inputs = ()
    preprocessors = ()
    dependencies = ("insightface",)  # its output is the argument of `forward`

    def __init__(self, device):
        super().__init__()

    def forward(self, boxes):
        """The boxes of B images to the largest one's share of each image, [B] in [0, 1]."""
        shares = [[(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in faces] for faces in boxes]
        return torch.tensor([max(share, default=0.0) for share in shares])


model_lookup = {"insightface": Detector, "largest-face": LargestFace}
preprocessor_lookup = {"letterbox": letterbox}
postprocess_parquet_lookup = {
    "insightface-boxes": partial(identity, model="insightface", to_cpu=False),
    "largest-face": partial(identity, model="largest-face"),
}
postprocess_feature_lookup = {}
