"""What a back end has to offer, and what it hands over.

A back end is a file `loaders/<name>_loader.py` with `class Options(contract.Options)` and

    def open(stream, positions, *, replace, workers, device, options) -> Iterator[HostBatch]

which yields one `HostBatch` for each list of positions that `positions` gives, in that order, and `missing() -> str`,
which says what this machine lacks for it. It draws nothing: which image, which window, which flip and which colours
come from `stream.plan(positions)`. Crops come back as uint8, flipped where that was drawn, without colour. An image
that cannot be decoded gives way to its successor in the stream (`replace`), or is left out, and is listed. Closing
the iterator (if it has a `close`) frees threads, processes and memory.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from loaders.sampler import NUM_COLOR, Stream
from loaders.views import View, groups


class Options(BaseModel):
    """Base of the back ends' own options."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class HostBatch(NamedTuple):
    """One micro-batch as a back end hands it over; tensors on the host unless the back end decodes on a GPU."""

    crops: list[Tensor]  # G x uint8 [k, B, size, size, 3]: views of one size together, see `views.groups`
    color: Tensor  # float32 [B, V, NUM_COLOR]
    label: Tensor  # int64 [B]
    rows: Tensor  # int64 [B], rows of the index
    bad: list[tuple[str, str]]  # (path, reason) of what could not be decoded

    @classmethod
    def of(
        cls,
        stream: Stream,
        image: NDArray[np.int64],
        color: NDArray[np.float32],
        crops: list[Tensor],
        bad: list[tuple[str, str]],
    ) -> HostBatch:
        """Build from rows of the index."""
        return cls(
            crops=crops,
            color=torch.from_numpy(color.reshape(len(image), len(stream.views), NUM_COLOR)),
            label=torch.from_numpy(stream.index.label[image]),
            rows=torch.from_numpy(image),
            bad=bad,
        )


class Room:
    """Memory for the crops of one batch after another.

    Fresh memory costs a page fault for every 4 KiB, more than the crops themselves; so what nobody holds any more is
    used again. A tensor of it that is held, by anyone and however long, is never touched.
    """

    def __init__(self, views: Sequence[View], *, pinned: bool = False) -> None:
        self._views, self._pinned = tuple(views), pinned
        self._buffers: dict[int, list[NDArray[np.uint8]]] = {}  # by bytes
        self._lock = threading.Lock()

    def crops(self, count: int) -> list[Tensor]:
        """Room for `count` images: G x uint8 [k, count, size, size, 3], not initialised."""
        shapes = [(len(group), count, *(self._views[group[0]].size,) * 2, 3) for group in groups(self._views)]
        if self._pinned:  # torch keeps pinned memory itself
            return [torch.empty(shape, dtype=torch.uint8, pin_memory=True) for shape in shapes]
        with self._lock:
            return [torch.from_numpy(self._free(math.prod(shape))).view(shape) for shape in shapes]

    def _free(self, size: int) -> NDArray[np.uint8]:
        buffers = self._buffers.setdefault(size, [])
        for number in range(len(buffers)):
            if sys.getrefcount(buffers[number]) == 2:  # the list's and that of this call
                return buffers[number]
        buffers.append(np.empty(size, dtype=np.uint8))
        return buffers[-1]
