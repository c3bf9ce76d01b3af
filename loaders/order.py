"""The order of an epoch: which row of the index comes at which place.

An order is a function of (seed, epoch, place), computed for just the places that are asked: it costs the same for a
thousand images and for a billion, and no memory. It is a bijection by construction: a Feistel network with modular
addition over a grid that just holds all rows, and cycle-walking (Black and Rogaway, "Ciphers with arbitrary finite
domains", CT-RSA 2002). A row outside the data set is permuted again until it is inside; the grid has less than one
line too many, so this is rare. Over the next power of two up to half of the rows would be outside.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from loaders.index import Index
from loaders.philox import uniform, words

VERSION = 2
"""Of the order. A run keeps the version that it began with; 1 is `Sorted`."""
ROUNDS = 8
_SIDE = 8  # least rows and columns of a grid: in smaller ones neighbors would stay together for too many rounds

# In place of a view's number in the counter of a draw.
_OF_SORTED, _OF_PLACES, _OF_BLOCKS = 0xFFFFFFFF, 0xFFFFFFFE, 0xFFFFFFFD
RUN = 1024
"""Rows of a block where there are no shards."""

Order = Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.int64]]
"""Epochs [b] and places [b] to rows of the index [b]."""


class Full:
    """Any image at any place."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed

    def __call__(self, epoch: NDArray[np.int64], place: NDArray[np.int64]) -> NDArray[np.int64]:
        return permuted(place, np.asarray(self.size), epoch, self.seed)


class Sorted:
    """Version 1: rows in the order of two random words each. O(N) time and memory for every epoch."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed
        self._of = lru_cache(maxsize=2)(self._permutation)  # a batch can straddle two epochs

    def __call__(self, epoch: NDArray[np.int64], place: NDArray[np.int64]) -> NDArray[np.int64]:
        image = np.empty_like(place)
        for e in np.unique(epoch).tolist():
            image[epoch == e] = self._of(e)[place[epoch == e]]
        return image

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        keys = uniform(np.arange(self.size), np.asarray(_OF_SORTED), np.asarray(epoch), 2, self.seed)
        return np.lexsort((keys[:, 1], keys[:, 0]))


class Blocks:
    """For disks that are slow at random places: a few blocks of rows at a time.

    The blocks of an epoch are permuted, `window` of them in a row make a window, and the images of a window are
    permuted. Time and memory of an epoch grow with the number of blocks alone.

    Args:
        starts: [n], first row of each block, from 0 on.
        size: images of the data set.
        window: blocks of a window; the last of an epoch may have fewer.
        seed: of the run.
    """

    def __init__(self, starts: NDArray[np.int64], size: int, window: int, seed: int) -> None:
        self.starts, self.size, self.window, self.seed = starts, size, window, seed
        self.windows = -(-len(starts) // window)
        """Of an epoch."""
        self._of = lru_cache(maxsize=2)(self._arrangement)  # a batch can straddle two epochs

    def __call__(self, epoch: NDArray[np.int64], place: NDArray[np.int64]) -> NDArray[np.int64]:
        image = np.empty_like(place)
        for e in np.unique(epoch).tolist():
            image[epoch == e] = self._images(e, place[epoch == e])
        return image

    def window_of(self, epoch: int, place: int) -> int:
        """The window that a place of an epoch lies in."""
        _, first = self._of(epoch)
        return (int(np.searchsorted(first, place, "right")) - 1) // self.window

    def rows(self, epoch: int, window: int) -> list[range]:
        """The rows of each block of a window."""
        blocks, _ = self._of(epoch)
        ends = np.append(self.starts[1:], self.size)
        return [range(self.starts[b], ends[b]) for b in blocks[window * self.window : (window + 1) * self.window]]

    def _images(self, epoch: int, place: NDArray[np.int64]) -> NDArray[np.int64]:
        blocks, first = self._of(epoch)
        window = (np.searchsorted(first, place, "right") - 1) // self.window
        low = first[window * self.window]
        high = first[np.minimum((window + 1) * self.window, len(blocks))]
        place = low + permuted(place - low, high - low, np.asarray(epoch), self.seed, window)
        number = np.searchsorted(first, place, "right") - 1
        image: NDArray[np.int64] = self.starts[blocks[number]] + place - first[number]
        return image

    def _arrangement(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The blocks [n] in the order of an epoch, and the first place of each, with the end [n + 1]."""
        count = np.asarray(len(self.starts))
        blocks = permuted(np.arange(len(self.starts)), count, np.asarray(epoch), self.seed, of=_OF_BLOCKS)
        lengths = np.diff(self.starts, append=self.size)[blocks]
        return blocks, np.concatenate(([0], np.cumsum(lengths)))


def block_starts(index: Index) -> NDArray[np.int64]:
    """First rows of the blocks of a data set: its shards if it has several, else runs of `RUN` rows."""
    if index.pieces is None or len(index.pieces.files) < 2:
        return np.arange(0, len(index), RUN)
    file, part = index.pieces.file, 1 << 20  # in parts: the column may be larger than the memory
    changes = [
        first + 1 + np.flatnonzero(np.diff(file[first : first + part + 1])) for first in range(0, len(index), part)
    ]
    return np.concatenate(([0], *changes))


def permuted(
    place: NDArray[np.int64],
    size: NDArray[np.int64],
    epoch: NDArray[np.int64],
    seed: int,
    window: NDArray[np.int64] | int = 0,
    of: int = _OF_PLACES,
) -> NDArray[np.int64]:
    """A keyed permutation of the whole numbers below `size`, at the places that are asked.

    Args:
        place: [b], 0 <= place < size.
        size: of the set that is permuted, 1 or more; broadcast to [b], as are the others.
        epoch, seed, window, of: choose the permutation.

    Returns:
        [b], below `size`.
    """
    place, size, epoch, window = np.broadcast_arrays(place, size, epoch, window)
    # A square grid, or one row less; float64's root is exact enough, as rows follow from columns.
    columns = np.maximum(np.ceil(np.sqrt(size.astype(np.float64))).astype(np.int64), _SIDE)
    rows = np.maximum(-(-size // columns), _SIDE)
    keys = _keys(epoch, window, seed, of)
    image = place.copy()
    outside = np.flatnonzero(size > 1)
    while len(outside):
        image[outside] = _network(image[outside], rows[outside], columns[outside], keys[:, outside])
        outside = outside[image[outside] >= size[outside]]
    return image


def _network(
    number: NDArray[np.int64], rows: NDArray[np.int64], columns: NDArray[np.int64], keys: NDArray[np.uint64]
) -> NDArray[np.int64]:
    """`ROUNDS` rounds over grids of rows times columns: numbers [b] and keys [ROUNDS, b] to numbers [b].

    Rows and columns take turns: each moves on, around its end, by a random distance that depends on the other.
    """
    a, b = rows.astype(np.uint64), columns.astype(np.uint64)
    x, y = np.divmod(number.astype(np.uint64), b)
    for turn in range(0, ROUNDS, 2):
        x = (x + _mixed(y + keys[turn])) % a
        y = (y + _mixed(x + keys[turn + 1])) % b
    return (x * b + y).astype(np.int64)


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA
    2014), without the last bit: a sum with it does not overflow."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))) >> np.uint64(1)


def _keys(epoch: NDArray[np.int64], window: NDArray[np.int64], seed: int, of: int) -> NDArray[np.uint64]:
    """Keys of the rounds: epochs and windows [b] to [ROUNDS, b]."""
    # One number for both: NumPy has no fast way to find equal pairs.
    _, first, where = np.unique(epoch << 32 | window, return_index=True, return_inverse=True)
    drawn = words(window[first], np.asarray(of), epoch[first], 2 * ROUNDS, seed).astype(np.uint64)
    keys: NDArray[np.uint64] = (drawn[:, ::2] << np.uint64(32)) | drawn[:, 1::2]
    return keys.T[:, where.reshape(-1)]
