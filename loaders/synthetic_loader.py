"""Back end `synthetic`: images drawn from their number, in the training process. For tests and dry benchmarks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from loaders import contract
from loaders.contract import HostBatch, Order
from loaders.host import load_batch
from loaders.index import Index, Names


class Options(contract.Options):
    """`data.options` of this back end."""

    reads_files: ClassVar[bool] = False
    num_images: int = Field(default=1024, ge=1)
    num_val_images: int = Field(default=256, ge=1)
    num_classes: int = Field(default=10, ge=2)
    side: int = Field(default=256, ge=1)

    @classmethod
    def about(cls) -> str:
        """It always works."""
        return "works: noise, no files"

    def open_index(self, split: Literal["train", "val"]) -> Index:
        """Its own images."""
        return noise(self.num_images if split == "train" else self.num_val_images, self.num_classes, self.side)

    def batches(self, order: Order) -> Iterator[HostBatch]:
        """See `contract.Options`."""
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


class _Noise(Index):
    def read(self, row: int) -> Tensor:
        side = int(self.width[row])
        assert self.label is not None
        pattern = torch.Generator().manual_seed(int(self.label[row]))
        grain = torch.Generator().manual_seed(1_000_000 + int(self.names[row]))
        coarse = torch.randint(0, 160, (3, 4, 4), generator=pattern, dtype=torch.int32)
        scale = -(-side // 4)
        image = coarse.repeat_interleave(scale, 1).repeat_interleave(scale, 2)[:, :side, :side]
        return (image + torch.randint(0, 96, (3, side, side), generator=grain, dtype=torch.int32)).to(torch.uint8)
