"""Back end `synthetic`: images drawn from their number, in the training process. For tests and dry benchmarks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from loaders import contract
from loaders.contract import HostBatch, Order
from loaders.host import load_batch
from loaders.index import Index, Names, Objects
from loaders.philox import uniform
from loaders.sampler import Stream
from loaders.scenes_loader import by_orientation, load_scenes


class Options(contract.Options):
    """`data.options` of this back end."""

    reads_files: ClassVar[bool] = False
    num_images: int = Field(default=1024, ge=1)
    num_val_images: int = Field(default=256, ge=1)
    num_classes: int = Field(default=10, ge=2)
    side: int = Field(default=256, ge=1)
    with_boxes: bool = False
    """Whole images, as large as the view, with the pattern in one place of each and its box, in place of crops."""

    @property
    def gives_boxes(self) -> bool:
        """As its key says."""
        return self.with_boxes

    @classmethod
    def about(cls) -> str:
        """It always works."""
        return "works: noise, no files"

    def open_index(self, split: Literal["train", "val"]) -> Index:
        """Its own images."""
        index = noise(self.num_images if split == "train" else self.num_val_images, self.num_classes, self.side)
        return replace(index, objects=_places(index, self.side)) if self.with_boxes else index

    def arrange(self, stream: Stream, positions: list[int]) -> list[int]:
        """As the back end whose images are whole."""
        return by_orientation(stream, positions) if self.with_boxes else positions

    def batches(self, order: Order) -> Iterator[HostBatch]:
        """See `contract.Options`."""
        if self.with_boxes:
            size = order.stream.views[0].size
            return map(partial(load_scenes, order, (size,), size), order.positions)
        return (load_batch(order.stream, positions, replace=order.replace) for positions in order.positions)


def noise(num_images: int, num_classes: int, side: int) -> Index:
    """A data set without files: images drawn from their number, with a coarse pattern for each class."""
    return _Noise(
        root=Path("synthetic"),
        classes=[f"class{label}" for label in range(num_classes)],
        names=Names.of_rows(num_images),
        label=np.arange(num_images, dtype=np.int32) % num_classes,
        width=np.full(num_images, side, dtype=np.int32),
        height=np.full(num_images, side, dtype=np.int32),
        format=np.full(num_images, b"noise"),
        problems={},
        max_pixels=side * side,
    )


def _places(index: Index, side: int) -> Objects:
    """A square for the pattern of each image, of a third to two thirds of its side."""
    rows = np.arange(len(index))
    drawn = uniform(rows, np.asarray(0), np.asarray(0), 3, seed=0)
    size = np.maximum(1, np.floor(side * (1 + drawn[:, 0]) / 3))
    x, y = (np.floor(drawn[:, axis] * (side - size + 1)) for axis in (1, 2))
    assert index.label is not None
    box = np.stack((x, y, x + size, y + size), axis=1)
    return Objects(rows, index.label.astype(np.int64), box, np.zeros(len(rows), dtype=bool))


class _Noise(Index):
    def read(self, row: int) -> Tensor:
        side = int(self.width[row])
        assert self.label is not None
        pattern = torch.Generator().manual_seed(int(self.label[row]))
        grain = torch.Generator().manual_seed(1_000_000 + int(self.names[row]))
        coarse = torch.randint(0, 160, (3, 4, 4), generator=pattern, dtype=torch.int32)
        x1, y1, x2, y2 = (0, 0, side, side) if self.objects is None else self.objects.of(row).box[0].astype(int)
        scale = -(-(y2 - y1) // 4)
        image = torch.zeros(3, side, side, dtype=torch.int32)
        image[:, y1:y2, x1:x2] = coarse.repeat_interleave(scale, 1).repeat_interleave(scale, 2)[:, : y2 - y1, : x2 - x1]
        return (image + torch.randint(0, 96, (3, side, side), generator=grain, dtype=torch.int32)).to(torch.uint8)
