"""Back end `scenes`: whole images with the boxes of what is in them, for detection.

An image is resized so that its shorter side is one of `short_sides`, drawn for each position (in evaluations the
largest), but its longer side at most `max_side`; flipped where that was drawn; and put into the top left corner of a
canvas that holds all images of its batch. What the canvas has beyond an image is of the color `data.mean`. The boxes go
where the image goes; see `contract.HostBatch` for how they are handed over. Of a view only flip and colors count.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from loaders import contract, voc
from loaders.contract import HostBatch, Order
from loaders.folder_loader import in_workers, lacks_shared_memory
from loaders.host import MODES, Decoded, decode_row
from loaders.sampler import Stream
from loaders.views import View

STEP = 32
"""Sides of a canvas are multiples of it, the largest stride of the networks."""
MISSING = -2.0
"""Class of the rows of `label` that stand for nothing."""
Side = Annotated[int, Field(ge=1, le=8192)]


class Options(contract.Options):
    """`data.options` of this back end."""

    short_sides: tuple[Side, ...] = Field(default=tuple(range(480, 801, 32)), min_length=1)
    """Shorter sides that images are resized to, in pixels."""
    max_side: Side = 1333
    """An image whose longer side would be longer is resized to this."""
    prefetch: int = Field(default=3, ge=1)
    """Micro-batches that each worker holds ready."""

    @model_validator(mode="after")
    def _consistent(self) -> Options:
        if self.max_side < max(self.short_sides):
            raise ValueError(f"max_side: expected at least the largest of short_sides, {max(self.short_sides)}")
        return self

    @property
    def gives_boxes(self) -> bool:
        """It does."""
        return True

    @classmethod
    def refuses(cls, root: Path) -> str:
        """All but development kits."""
        return "" if voc.is_kit(root) else f"{root}: expected {voc.EXPECTED}"

    @classmethod
    def about(cls) -> str:
        """It always works."""
        return "works: whole images with boxes, of PASCAL VOC"

    def arrange(self, stream: Stream, positions: list[int]) -> list[int]:
        """Upright images behind the others: what is together in a micro-batch then needs little padding."""
        return by_orientation(stream, positions)

    def warnings(self, views: tuple[View, ...], micro_batch: int, workers: int) -> list[str]:
        """Batches go through shared memory, of which containers have little."""
        area = max(self.short_sides) * self.max_side
        return lacks_shared_memory(workers * (self.prefetch + 1) * micro_batch * 3 * area, workers)

    def batches(self, order: Order) -> Iterator[HostBatch]:
        """See `contract.Options`."""
        return in_workers(order, partial(load_scenes, order, self.short_sides, self.max_side), self.prefetch)


def by_orientation(stream: Stream, positions: list[int]) -> list[int]:
    """Positions of images that are upright behind the others, in their order otherwise."""
    image = stream.images(positions)[1]
    is_upright = stream.index.height[image] > stream.index.width[image]
    order: NDArray[np.int64] = np.array(positions)[np.argsort(is_upright, kind="stable")]
    return order.tolist()


class Scene(NamedTuple):
    """One image of a batch, as large as it is shown."""

    image: int  # row of the index
    color: NDArray[np.float32]  # [1, NUM_COLOR]
    pixels: Tensor  # uint8 [3, h, w]
    label: NDArray[np.float32]  # [1 + m, 6]


def load_scenes(order: Order, short_sides: Sequence[int], max_side: int, positions: Sequence[int]) -> HostBatch:
    """Read, decode, resize and flip the images at `positions`, with their boxes.

    Raises:
        DataError: too many images in a row cannot be decoded.
    """
    stream = order.stream
    plan, scenes, bad = stream.plan(positions), [], []
    for row, position in enumerate(positions):
        decoded, found = decode_row(stream, plan, row, position, replace=order.replace)
        bad += found
        if decoded is not None:
            scenes.append(_scene(stream, decoded, short_sides, max_side))
    height, width = (_rounded(max((s.pixels.shape[axis] for s in scenes), default=STEP)) for axis in (1, 2))
    crops = torch.tensor(order.fill, dtype=torch.uint8).repeat(len(scenes), height, width, 1)  # [B, H, W, 3]
    label = np.full((len(scenes), max((len(s.label) for s in scenes), default=1), 6), MISSING, dtype=np.float32)
    for number, scene in enumerate(scenes):
        h, w = scene.pixels.shape[1:]
        crops[number, :h, :w] = scene.pixels.permute(1, 2, 0)
        label[number, : len(scene.label)] = scene.label
    color = np.stack([s.color for s in scenes]) if scenes else plan.color[:0]
    rows = torch.tensor([scene.image for scene in scenes], dtype=torch.int64)
    return HostBatch([crops[None]], torch.from_numpy(color), torch.from_numpy(label), rows, bad)


def _scene(stream: Stream, decoded: Decoded, short_sides: Sequence[int], max_side: int) -> Scene:
    plan, row, view = decoded.plan, decoded.row, stream.views[0]
    assert stream.index.objects is not None and len(stream.views) == 1
    side = short_sides[int(plan.free[row, 0] * len(short_sides))] if stream.shuffled else max(short_sides)
    height, width = decoded.pixels.shape[1:]
    new_height, new_width = resized(height, width, side, max_side)
    pixels = F.resize(decoded.pixels, [new_height, new_width], interpolation=MODES[view.interpolation], antialias=True)
    objects = stream.index.objects.of(decoded.image)
    box = objects.box * np.tile((new_width / width, new_height / height), 2)
    if plan.flip[row, 0]:
        pixels, box = pixels.flip(2), flipped(box, new_width)
    label = np.zeros((1 + len(box), 6))
    label[0] = -1, 0, 0, new_width, new_height, 0
    label[1:, 0], label[1:, 1:5], label[1:, 5] = objects.label, box, objects.difficult
    return Scene(decoded.image, plan.color[row], pixels, label.astype(np.float32))


def flipped(box: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """Boxes [m, 4] of an image that is `width` wide, in its mirror image."""
    return np.stack((width - box[:, 2], box[:, 1], width - box[:, 0], box[:, 3]), axis=1)


def resized(height: int, width: int, side: int, max_side: int) -> tuple[int, int]:
    """Height and width of an image whose shorter side becomes `side`, or whose longer one becomes `max_side` where it
    would be longer; rounded to whole pixels, halves up."""
    scale = min(side / min(height, width), max_side / max(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def _rounded(side: int) -> int:
    return -(-side // STEP) * STEP
