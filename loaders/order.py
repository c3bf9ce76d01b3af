"""The order of an epoch: which row of the index comes at which place.

An order is a function of (seed, epoch, place), computed for just the places that are asked: it costs the same for a
thousand images and for a billion, and no memory. It is a bijection by construction: a Feistel network with modular
addition over a grid that just holds all rows, and cycle-walking (Black and Rogaway, "Ciphers with arbitrary finite
domains", CT-RSA 2002). A row outside the data set is permuted again until it is inside; the grid has less than one
line too many, so this is rare. Over the next power of two up to half of the rows would be outside.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from loaders.philox import uniform, words

VERSION = 2
"""Of the order. A run keeps the version that it began with; 1 is `Sorted`."""
ROUNDS = 8
_SIDE = 8  # least rows and columns of a grid: in smaller ones neighbors would stay together for too many rounds

# In place of a view's number in the counter of a draw.
_OF_SORTED, _OF_PLACES = 0xFFFFFFFF, 0xFFFFFFFE

Order = Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.int64]]
"""Epochs [b] and places [b] to rows of the index [b]."""


def order(size: int, seed: int, version: int) -> Order:
    """The order of `size` images in the given version."""
    return Sorted(size, seed) if version == 1 else Full(size, seed)


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
        self._epochs: dict[int, NDArray[np.int64]] = {}

    def __call__(self, epoch: NDArray[np.int64], place: NDArray[np.int64]) -> NDArray[np.int64]:
        image = np.empty_like(place)
        for e in np.unique(epoch).tolist():
            image[epoch == e] = self._of(e)[place[epoch == e]]
        return image

    def _of(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._epochs:
            if len(self._epochs) > 1:  # a batch can straddle two epochs, never three
                del self._epochs[min(self._epochs)]
            keys = uniform(np.arange(self.size), np.asarray(_OF_SORTED), np.asarray(epoch), 2, self.seed)
            self._epochs[epoch] = np.lexsort((keys[:, 1], keys[:, 0]))
        return self._epochs[epoch]


def permuted(
    place: NDArray[np.int64], size: NDArray[np.int64], epoch: NDArray[np.int64], seed: int
) -> NDArray[np.int64]:
    """A keyed permutation of the whole numbers below `size`, at the places that are asked.

    Args:
        place: [b], 0 <= place < size.
        size: of the set that is permuted, 1 or more; broadcast to [b], as are the others.
        epoch, seed: choose the permutation.

    Returns:
        [b], below `size`.
    """
    place, size, epoch = np.broadcast_arrays(place, size, epoch)
    # A square grid, or one row less; float64's root is exact enough, as rows follow from columns.
    columns = np.maximum(np.ceil(np.sqrt(size.astype(np.float64))).astype(np.int64), _SIDE)
    rows = np.maximum(-(-size // columns), _SIDE)
    keys = _keys(epoch, seed)
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


def _keys(epoch: NDArray[np.int64], seed: int) -> NDArray[np.uint64]:
    """Keys of the rounds: epochs [b] to [ROUNDS, b]."""
    epochs, where = np.unique(epoch, return_inverse=True)
    drawn = words(np.asarray(0), np.asarray(_OF_PLACES), epochs, 2 * ROUNDS, seed).astype(np.uint64)
    keys: NDArray[np.uint64] = (drawn[:, ::2] << np.uint64(32)) | drawn[:, 1::2]
    return keys.T[:, where.reshape(-1)]
