"""Back end `folder`: decode once with torchvision, cut every view from it, in the workers of a DataLoader.

Runs everywhere, needs nothing to be built, and is what the other back ends are compared with.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from loaders.contract import HostBatch, Room
from loaders.contract import Options as BaseOptions
from loaders.index import BadImage, DataError
from loaders.sampler import FLIP, Plan, Stream, resized_sides
from loaders.views import View, groups

_MODES = {"bilinear": InterpolationMode.BILINEAR, "bicubic": InterpolationMode.BICUBIC}
MAX_SUCCESSORS = 100


def missing() -> str:
    """Nothing: this back end runs everywhere."""
    return ""


class Options(BaseOptions):
    """`data.options` of this back end."""

    prefetch: int = Field(default=3, ge=1)
    """Micro-batches that each worker holds ready."""


def open(
    stream: Stream,
    positions: Iterable[list[int]],
    *,
    replace: bool,
    workers: int,
    device: torch.device,
    options: Options,
) -> Iterator[HostBatch]:
    """See `loaders.contract`."""
    loader: DataLoader[Any] = DataLoader(
        _Positions(stream, replace),
        batch_sampler=positions,  # any iterable of lists will do, it need not end
        num_workers=workers,
        collate_fn=_same,
        worker_init_fn=_ignore_signals,
        prefetch_factor=options.prefetch if workers else None,
        pin_memory=device.type == "cuda",
        # Workers only read and decode: they start by fork, so that the index is shared and not copied.
        multiprocessing_context="fork" if workers else None,
    )
    return _Batches(loader)


class _Batches:
    """The iterator of a DataLoader whose workers end for certain, and whose errors are one line."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._iterator: Any = iter(loader)

    def __iter__(self) -> Iterator[HostBatch]:
        return self

    def __next__(self) -> HostBatch:
        batch = next(self._iterator)
        if isinstance(batch, DataError):
            raise batch
        return batch

    def close(self) -> None:
        """End the workers. They ignore SIGTERM, so Python's own way of ending them at exit would wait for ever."""
        workers = getattr(self._iterator, "_workers", [])
        if workers:
            self._iterator._shutdown_workers()
        for worker in workers:
            if worker.is_alive():
                worker.kill()
                worker.join()
        self._iterator = iter(())


class _Positions(Dataset[Any]):
    def __init__(self, stream: Stream, replace: bool) -> None:
        self.stream, self.replace = stream, replace

    def __getitems__(self, positions: list[int]) -> HostBatch | DataError:
        try:
            return load_batch(self.stream, positions, replace=self.replace)
        except DataError as error:  # raised in the worker it would come out wrapped in a traceback
            return error


def _ignore_signals(worker: int) -> None:
    # A signal to the whole job is for the training process, which stops in order and then ends its workers.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _same(batch: Any) -> Any:
    return batch


def load_batch(stream: Stream, positions: Sequence[int], *, replace: bool) -> HostBatch:
    """Read, decode and crop the images at `positions` on the host.

    Args:
        replace: put the successor in the order in the place of an image that cannot be decoded; otherwise
            leave it out. Either way it is listed in `HostBatch.bad`.

    Raises:
        DataError: `MAX_SUCCESSORS` images in a row cannot be decoded.
    """
    plan = stream.plan(positions)
    rows: list[Row] = []
    bad: list[tuple[str, str]] = []
    for row, position in enumerate(positions):
        sample = load_row(stream, plan, row, position, replace=replace, bad=bad)
        if sample is not None:
            rows.append(sample)
    return gather(stream, rows, bad)


Row = tuple[int, NDArray[np.float32], list[Tensor]]


def gather(stream: Stream, rows: list[Row], bad: list[tuple[str, str]]) -> HostBatch:
    """The batch of rows that were done one by one; in a worker it is stacked right in shared memory."""
    if rows:
        crops = [
            default_collate([cuts[view] for view in group for _, _, cuts in rows]).unflatten(0, (len(group), -1))
            for group in groups(stream.views)
        ]
    else:
        crops = Room(stream.views).crops(0)
    image = np.array([image for image, _, _ in rows], dtype=np.int64)
    color = np.array([color for _, color, _ in rows], dtype=np.float32)
    return HostBatch.of(stream, image, color, crops, bad)


def load_row(
    stream: Stream, plan: Plan, row: int, position: int, *, replace: bool, bad: list[tuple[str, str]]
) -> Row | None:
    """Image number, colours [V, NUM_COLOR] and crops (uint8 [size, size, 3] each) of one row of a plan.

    What cannot be decoded is appended to `bad` as (path, reason); with `replace` its successors are tried.
    """
    for successor in range(MAX_SUCCESSORS):
        if successor:
            plan, row = stream.plan([position + successor]), 0
        image = int(plan.image[row])
        try:
            pixels = stream.index.read(image)
        except BadImage as error:
            bad.append((stream.index.path(image), str(error)))
            if not replace:
                return None
            continue
        color = plan.color[row]
        crops = [cut(pixels, window, view) for window, view in zip(plan.windows[row], stream.views, strict=True)]
        return image, color, [c.flip(1) if flips else c for c, flips in zip(crops, color[:, FLIP] > 0, strict=True)]
    raise DataError(f"{MAX_SUCCESSORS} images in a row cannot be decoded, the last is {bad[-1][0]}: {bad[-1][1]}")


def cut(pixels: Tensor, window: NDArray[np.float64], view: View) -> Tensor:
    """Crop and resize with antialiasing: uint8 [3, H, W] to uint8 [size, size, 3], as torchvision does it."""
    mode = _MODES[view.interpolation]
    if view.crop == "center":
        height, width = pixels.shape[1:]
        new_w, new_h = (int(side) for side in resized_sides(view, np.array(float(width)), np.array(float(height))))
        pixels = F.resize(pixels, [new_h, new_w], interpolation=mode, antialias=True)
        crop = F.center_crop(pixels, [view.size, view.size])
    else:
        top, left, height, width = (int(side) for side in window)
        crop = F.resized_crop(
            pixels, top, left, height, width, [view.size, view.size], interpolation=mode, antialias=True
        )
    return crop.permute(1, 2, 0)
