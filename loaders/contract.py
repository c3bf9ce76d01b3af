"""What a back end offers, and what it hands over.

A back end is a file `loaders/<name>_loader.py` with a class `Options(contract.Options)`: its fields are `data.options`
of a recipe, its methods are all that the rest of the project knows of it. `batches` does the work; everything else has
a default. A back end draws nothing: which image, which window, which flip and which colors come from
`stream.plan(positions)`. Crops come back as uint8, flipped where that was drawn, without color. An image that cannot be
decoded gives way to its successor in the stream (`Order.replace`) or is left out, and is listed. Closing the iterator
(if it has a `close`) frees threads, processes and memory.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loaders.config import Strict
from loaders.index import Index
from loaders.sampler import Stream
from loaders.views import View


@dataclass(frozen=True)
class Order:
    """What a back end is asked for."""

    stream: Stream
    """What to cut from which image."""
    positions: Iterable[list[int]]
    """The positions of each batch; need not end."""
    replace: bool
    """Put the successor in the stream in place of an image that cannot be decoded; otherwise leave it out."""
    workers: int
    """Threads or processes that may decode; 0 asks for none besides this one, where that is possible."""
    device: torch.device
    """Where the crops will be used; those of a back end that decodes on the host stay there."""
    fill: tuple[int, int, int] = (0, 0, 0)
    """Color from 0 to 255 of what no image covers: `data.mean`, which is about 0 once it is normalized."""


class Options(Strict):
    """Base of the back ends' own classes: `data.options`, and what the project asks of a back end."""

    reads_files: ClassVar[bool] = True
    """Whether its images are those that `data.train` names, so that all such back ends can stand in for each other."""

    @property
    def gives_boxes(self) -> bool:
        """Whether `HostBatch.label` is the objects of each image and not one class; only back ends that are equal in
        this can stand in for each other."""
        return False

    @classmethod
    def missing(cls) -> str:
        """What this machine lacks for the back end and what to do, or ""."""
        return ""

    @classmethod
    def refuses(cls, root: Path) -> str:
        """Why it cannot read the data set at `root` and what to do, or ""."""
        return ""

    @classmethod
    def preference(cls, on_gpu: bool, root: Path | None) -> int:
        """How much `data.backend: auto` wants it, on a machine with or without a GPU, for the data set at `root`;
        with 0 it has to be named."""
        return 0

    @classmethod
    def about(cls) -> str:
        """What works here, in a few words, for `tools/doctor.py`."""
        return "works"

    @classmethod
    def versions(cls) -> dict[str, str]:
        """Versions of the libraries that its pixels depend on, by name."""
        return {}

    def open_index(self, split: Literal["train", "val"]) -> Index:
        """The data set of a back end that reads no files."""
        raise NotImplementedError

    def arrange(self, stream: Stream, positions: list[int]) -> list[int]:
        """The positions of an optimizer step in the order in which they are dealt to micro-batches and ranks; a
        function of the stream alone."""
        return positions

    def warnings(self, views: tuple[View, ...], micro_batch: int, workers: int) -> list[str]:
        """What may go wrong on this machine though nothing is missing, each with what to do.

        Args:
            workers: of all ranks of this machine.
        """
        return []

    def notes(self, device: torch.device) -> list[str]:
        """What a run should say once of how its images are read on this device."""
        return []

    def batches(self, order: Order) -> Iterator[HostBatch]:
        """One `HostBatch` for each list of `order.positions`, in that order.

        Raises:
            DataError: the machine or the data set does not allow it.
        """
        raise NotImplementedError


class HostBatch(NamedTuple):
    """One micro-batch as a back end hands it over; tensors on the host unless the back end decodes on a GPU.

    A back end that `gives_boxes` hands over whole images, each in the top left corner of a canvas: one view, crops
    [1, B, H, W, 3] with H and W multiples of 32 that change from batch to batch. `label` is float32 [B, 1 + M, 6] with
    rows (class, x1, y1, x2, y2, difficult) in pixels of the canvas, flipped and scaled as the image is. Row 0 is the
    image itself: class -1, box (0, 0, width, height), so that what is beyond it is padding. The objects follow in the
    order of `Index.objects`; an image with fewer than M of them ends in rows of -2. Multiplied by the width of the
    stored image over that of row 0, x is in pixels of the stored image; y likewise by the heights.
    """

    crops: list[Tensor]  # G x uint8 [k, B, size, size, 3]: the views of a group together, see `Stream.groups`
    color: Tensor  # float32 [B, V, NUM_COLOR]
    label: Tensor | None  # int64 [B], or boxes; None where the data set has no labels
    rows: Tensor  # int64 [B], rows of the index
    bad: list[tuple[str, str]]  # (path, reason) of what could not be decoded
    features: Tensor | None = None  # float16 [B, V, D] from a cache, see `FeatureCache.read`; no back end's business

    @classmethod
    def of(
        cls,
        stream: Stream,
        image: NDArray[np.int64],
        color: NDArray[np.float32],
        crops: list[Tensor],
        bad: list[tuple[str, str]],
    ) -> HostBatch:
        """Build from rows of the index [B] and their colors [B, V, NUM_COLOR]."""
        labels = stream.index.label
        label = None if labels is None else torch.from_numpy(labels[image].astype(np.int64))
        return cls(crops, torch.from_numpy(color), label, torch.from_numpy(image), bad)


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on the device; the host does not wait for the copy, which runs in the current stream."""
    if device.type == "cuda" and not tensor.is_cuda and not tensor.is_pinned():
        tensor = tensor.pin_memory()  # only a copy from pinned memory leaves the host free to continue
    return tensor.to(device, non_blocking=True)


_HOST = torch.device("cpu")


class CropMemory:
    """Memory for the crops of one batch after another.

    Fresh memory costs a page fault for every 4 KiB, more than the crops themselves; so what nobody holds any more is
    used again. A tensor of it that is held, by anyone and however long, is never touched.
    """

    def __init__(self, stream: Stream, *, pinned: bool = False) -> None:
        self._groups = [(len(group), stream.views[group[0]].size) for group in stream.groups]
        self._pinned = pinned
        self._buffers: dict[int, list[NDArray[np.uint8]]] = {}  # by bytes
        self._lock = threading.Lock()

    def shapes(self, count: int) -> list[tuple[int, ...]]:
        """G shapes (k, count, size, size, 3) of the crops of `count` images."""
        return [(views, count, size, size, 3) for views, size in self._groups]

    def crops(self, count: int, device: torch.device = _HOST) -> list[Tensor]:
        """Memory for `count` images: G x uint8 [k, count, size, size, 3], not initialized; a GPU's is torch's."""
        if device.type == "cuda":
            return [torch.empty(shape, dtype=torch.uint8, device=device) for shape in self.shapes(count)]
        if self._pinned:  # torch keeps pinned memory itself
            return [torch.empty(shape, dtype=torch.uint8, pin_memory=True) for shape in self.shapes(count)]
        with self._lock:
            return [torch.from_numpy(self._free(math.prod(shape))).view(shape) for shape in self.shapes(count)]

    def _free(self, size: int) -> NDArray[np.uint8]:
        buffers = self._buffers.setdefault(size, [])
        for number in range(len(buffers)):
            if sys.getrefcount(buffers[number]) == 2:  # the list's and that of this call
                return buffers[number]
        buffers.append(np.empty(size, dtype=np.uint8))
        return buffers[-1]
