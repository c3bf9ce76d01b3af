"""The data stream as a pure function of (seed, position): which image, which crop, which colors.

Position p of the stream is place p mod N of epoch p div N; an epoch is a permutation of the data set (`loaders.order`).
So a resumed run, another number of ranks, workers or another back end sees the same stream.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from loaders import order
from loaders.index import Index
from loaders.philox import uniform
from loaders.views import View, groups

CROP_TRIES = 10  # as torchvision's RandomResizedCrop
# Columns of `Plan.color`.
BRIGHTNESS, CONTRAST, SATURATION, HUE, ORDER, GRAY, SIGMA, SOLARIZE = range(8)
NUM_COLOR = 8
NO_SOLARIZE = 2.0  # a threshold that no pixel reaches
_DRAWS = 2 * CROP_TRIES + 2 + 11 + 1  # crop tries, crop position, flip and color, `Plan.free`


class Plan(NamedTuple):
    """What a back end has to do for b positions and V views."""

    image: NDArray[np.int64]  # [b], row in the index
    windows: NDArray[np.float64]  # [b, V, 4]: top, left, height, width in source pixels
    sees: NDArray[np.float64]  # [b, V, 4]: top, left, bottom, right of all that a window's filter may read
    flip: NDArray[np.bool_]  # [b, V]
    color: NDArray[np.float32]  # [b, V, NUM_COLOR]
    free: NDArray[np.float64]  # [b, V] in (0, 1): one more draw, for a back end whose images have more than a window


class Stream:
    """The stream of one data set under one seed.

    Args:
        index: the data set.
        views: V views of each image.
        seed: of the run, 0 <= seed < 2**64.
        shuffled: False gives the data set's own order, for evaluation.
        version: of the order, see `order.VERSION`.
        window: blocks of a window, for an order that touches few shards at a time (`order.Blocks`).
        fixed_views: K draws of windows, flips and colors for an image: those of epochs 0 to K - 1 come again and
            again, epoch e has those of e mod K. The order of images changes with every epoch all the same.
    """

    def __init__(
        self,
        index: Index,
        views: Sequence[View],
        seed: int,
        *,
        shuffled: bool = True,
        version: int = order.VERSION,
        window: int | None = None,
        fixed_views: int | None = None,
    ) -> None:
        self.index, self.views, self.seed, self.shuffled = index, tuple(views), seed, shuffled
        self.groups = groups(views)
        """Numbers of the views that lie together in memory, G lists: see `views.groups`."""
        self.fixed_views = fixed_views
        self.order = _order(index, seed, version, window) if shuffled else None
        """None for the data set's own."""

    def images(self, positions: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Epoch [b] and image [b] of each position."""
        epoch, place = np.divmod(np.asarray(positions, dtype=np.int64), len(self.index))
        return epoch, self.order(epoch, place) if self.order else place

    def draws_of(self, positions: Sequence[int], image: NDArray[np.int64]) -> NDArray[np.int64]:
        """With fixed views, the numbers [b] of the view sets that images [b] came with at these positions: those of the
        positions themselves, or the successor's where one stands in for an image that cannot be decoded."""
        assert self.fixed_views is not None
        epoch, planned = self.images(positions)
        successors = 0
        while len(others := np.flatnonzero(planned != image)):
            successors += 1
            assert successors <= len(self.index)
            epoch[others], planned[others] = self.images([positions[other] + successors for other in others.tolist()])
        return epoch % self.fixed_views

    def plan(self, positions: Sequence[int]) -> Plan:
        """Everything that is drawn for these positions."""
        epoch, image = self.images(positions)
        return self.plan_of(image, epoch % self.fixed_views if self.fixed_views else epoch)

    def plan_of(self, image: NDArray[np.int64], draw: NDArray[np.int64] | int) -> Plan:
        """What is drawn for images [b] in the epochs `draw`, a number or [b]: with fixed views, for view set `draw`."""
        draw = np.broadcast_to(draw, image.shape)
        width, height = self.index.width[image].astype(np.float64), self.index.height[image].astype(np.float64)
        numbers = np.arange(len(self.views))
        drawn = uniform(image[:, None], numbers, draw[:, None], _DRAWS, self.seed)  # [b, V, _DRAWS]
        windows, sees, flips, colors = [], [], [], []
        for number, view in enumerate(self.views):
            of_crop, of_color = np.split(drawn[:, number], [2 * CROP_TRIES + 2], axis=1)
            window = _windows(view, width, height, of_crop)
            windows.append(window)
            sees.append(_sees(view, window, width, height))
            flips.append(of_color[:, 0] < view.flip)
            colors.append(_colors(view, of_color))
        return Plan(
            image,
            windows=np.stack(windows, axis=1),
            sees=np.stack(sees, axis=1),
            flip=np.stack(flips, axis=1),
            color=np.stack(colors, axis=1),
            free=drawn[:, :, -1],
        )


def _order(index: Index, seed: int, version: int, window: int | None) -> order.Order:
    if window is not None:
        return order.Blocks(order.block_starts(index), len(index), window, seed)
    return order.Sorted(len(index), seed) if version == 1 else order.Full(len(index), seed)


def _windows(view: View, w: NDArray[np.float64], h: NDArray[np.float64], u: NDArray[np.float64]) -> NDArray[np.float64]:
    """Crop windows [b, 4] as (top, left, height, width) in images of width and height [b]."""
    if view.crop == "center":
        return _center_windows(view, w, h)
    if view.crop == "whole":
        return np.stack((np.zeros_like(h), np.zeros_like(w), h, w), axis=1)
    # torchvision's RandomResizedCrop: the first of ten tries that fits, else the largest allowed center crop.
    area = (w * h)[:, None] * (view.scale[0] + (view.scale[1] - view.scale[0]) * u[:, :CROP_TRIES])
    log_low, log_high = np.log(view.ratio)
    ratio = np.exp(log_low + (log_high - log_low) * u[:, CROP_TRIES : 2 * CROP_TRIES])
    try_w, try_h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))  # [b, tries]
    fits = (try_w >= 1) & (try_h >= 1) & (try_w <= w[:, None]) & (try_h <= h[:, None])
    first, rows = fits.argmax(axis=1), np.arange(len(w))
    crop_w, crop_h = try_w[rows, first], try_h[rows, first]
    top = np.floor(u[:, -2] * (h - crop_h + 1))
    left = np.floor(u[:, -1] * (w - crop_w + 1))
    aspect = w / h
    low, high = view.ratio
    last_w = np.where(aspect > high, np.rint(h * high), w)
    last_h = np.where(aspect < low, np.rint(w / low), h)
    fallback = np.stack((np.floor((h - last_h) / 2), np.floor((w - last_w) / 2), last_h, last_w), axis=1)
    return np.where(fits.any(axis=1)[:, None], np.stack((top, left, crop_h, crop_w), axis=1), fallback)


def _center_windows(view: View, w: NDArray[np.float64], h: NDArray[np.float64]) -> NDArray[np.float64]:
    # The window in source pixels that Resize(resize) + CenterCrop(size) of torchvision keeps, with its integers.
    resized_w, resized_h = resized_sides(view, w, h)
    left, top = np.rint((resized_w - view.size) / 2), np.rint((resized_h - view.size) / 2)
    scale_w, scale_h = w / resized_w, h / resized_h
    return np.stack((top * scale_h, left * scale_w, view.size * scale_h, view.size * scale_w), axis=1)


def _sees(
    view: View, windows: NDArray[np.float64], w: NDArray[np.float64], h: NDArray[np.float64]
) -> NDArray[np.float64]:
    """What is part of the picture for a window's filter: [b, 4] as (top, left, bottom, right), whole pixels.

    A random crop is a picture of its own. A center crop is a part of the resized picture, so its filter also sees what
    is around it, as far as the widest filter reaches: two output pixels, and two source pixels for rounding.
    """
    first, last = windows[:, :2], windows[:, :2] + windows[:, 2:]
    if view.crop == "center":
        reach = 2 * np.maximum(windows[:, 2:] / view.size, 1) + 2
        first = np.floor(np.maximum(first - reach, 0))
        last = np.ceil(np.minimum(last + reach, np.stack((h, w), axis=1)))
    return np.concatenate((first, last), axis=1)


def resized_sides(
    view: View, width: NDArray[np.float64], height: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Width and height after resizing the shorter side to `view.resize`, cut to whole pixels as torchvision does."""
    assert view.resize is not None
    shorter = np.minimum(width, height)
    return np.floor(view.resize * width / shorter), np.floor(view.resize * height / shorter)


def _colors(view: View, u: NDArray[np.float64]) -> NDArray[np.float32]:
    """Color parameters [b, NUM_COLOR]; identities where an operation was not drawn."""
    jitters = u[:, 1] < view.jitter

    def factor(column: int, strength: float) -> NDArray[np.float64]:
        return np.where(jitters, np.maximum(0, 1 - strength + 2 * strength * u[:, column]), 1)

    color = np.zeros((len(u), NUM_COLOR))
    color[:, BRIGHTNESS] = factor(2, view.brightness)
    color[:, CONTRAST] = factor(3, view.contrast)
    color[:, SATURATION] = factor(4, view.saturation)
    color[:, HUE] = np.where(jitters, view.hue * (2 * u[:, 5] - 1), 0)
    color[:, ORDER] = np.floor(24 * u[:, 6])
    color[:, GRAY] = u[:, 7] < view.gray
    low, high = view.blur_sigma
    color[:, SIGMA] = np.where(u[:, 8] < view.blur, low + (high - low) * u[:, 9], 0)
    color[:, SOLARIZE] = np.where(u[:, 10] < view.solarize, view.solarize_threshold, NO_SOLARIZE)
    return color.astype(np.float32)


class TrainPositions:
    """The positions of one rank, micro-batch by micro-batch, from optimizer step `step` on; never ends.

    The images of an optimizer step are the same for every number of ranks: micro-step m of step t takes a run
    of `micro_batch * world_size` positions, rank r the r-th part of it.

    Args:
        arrange: puts the positions of a step in another order before they are dealt so.
    """

    def __init__(
        self,
        *,
        batch_size: int,
        micro_batch: int,
        rank: int,
        world_size: int,
        step: int,
        arrange: Callable[[list[int]], list[int]] = list,
    ) -> None:
        assert batch_size % (micro_batch * world_size) == 0
        self.batch_size, self.micro_batch, self.step, self.arrange = batch_size, micro_batch, step, arrange
        self.parts = range(rank * micro_batch, batch_size, micro_batch * world_size)

    def __iter__(self) -> Iterator[list[int]]:
        for step in itertools.count(self.step):
            positions = self.arrange(list(range(step * self.batch_size, (step + 1) * self.batch_size)))
            for first in self.parts:
                yield positions[first : first + self.micro_batch]


class EvalPositions:
    """Positions rank, rank + world_size, ... of one pass over `positions`: complete, without repeats."""

    def __init__(self, positions: Sequence[int], *, batch_size: int, rank: int, world_size: int) -> None:
        self.positions, self.batch_size = positions[rank::world_size], batch_size

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, len(self.positions), self.batch_size):
            yield list(self.positions[start : start + self.batch_size])
