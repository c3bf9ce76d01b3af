"""Some images of each class of a labeled set: a held-out share, and small subsets.

Every row has a number in (0, 1) that depends on the row and a seed alone; of each class the rows with the smallest ones
are taken. So a smaller subset lies in a larger one of the same seed, and what is drawn is the same everywhere.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from loaders.errors import DataError
from loaders.index import Index
from loaders.philox import uniform

_OF_HELD_OUT, _OF_SUBSET = 0xFFFFFFFC, 0xFFFFFFFB  # in place of a view's number in the counter of a draw


def held_out(index: Index, share: float, seed: int = 0) -> NDArray[np.bool_]:
    """Which rows are held out: of each class `share` of its images, rounded, at least one and never all; of a set
    without labels `share` of all.

    Args:
        share: above 0, below 1.

    Returns:
        [N]; the other rows are for training.

    Raises:
        DataError: a class has fewer than two images.
    """
    sizes = _sizes(index)
    for number in np.flatnonzero(sizes == 1).tolist():
        raise DataError(f"{index.root}: {_class(index, number)} has 1 image, of which none can be held out")
    taken = np.zeros(len(index), dtype=np.bool_)
    taken[_first(index, np.clip(_rounded(share * sizes), 1, np.maximum(sizes - 1, 0)), _OF_HELD_OUT, seed)] = True
    return taken


def subset(index: Index, *, share: float | None = None, count: int | None = None, seed: int = 0) -> NDArray[np.int64]:
    """Rows of a small set, ascending: of each class `share` of its images, rounded, at least one; or `count` of them.

    Args:
        share: above 0, at most 1.
        count: at least 1; one of the two is given.

    Raises:
        DataError: a class has fewer than `count` images.
    """
    sizes = _sizes(index)
    if share is not None:
        assert count is None
        return np.sort(_first(index, np.minimum(np.maximum(_rounded(share * sizes), 1), sizes), _OF_SUBSET, seed))
    assert count is not None
    for number in np.flatnonzero((sizes < count) & (sizes > 0)).tolist():
        raise DataError(f"{index.root}: {_class(index, number)} has {sizes[number]} images, expected at least {count}")
    return np.sort(_first(index, np.where(sizes > 0, count, 0), _OF_SUBSET, seed))


def _label(index: Index) -> NDArray[np.int32]:
    return np.zeros(len(index), dtype=np.int32) if index.label is None else index.label


def _class(index: Index, number: int) -> str:
    return f"class {index.classes[number]!r}" if index.label is not None else "the set"


def _sizes(index: Index) -> NDArray[np.int64]:
    """Images of each class [C]; a list of integers may have classes without any."""
    return np.bincount(_label(index), minlength=len(index.classes)).astype(np.int64)


def _rounded(numbers: NDArray[Any]) -> NDArray[np.int64]:
    return np.floor(numbers + 0.5).astype(np.int64)


def _first(index: Index, counts: NDArray[np.int64], of: int, seed: int) -> NDArray[np.int64]:
    """The rows of each class with the smallest numbers, `counts` [C] of them."""
    label, rows = _label(index), np.arange(len(index))
    number = uniform(rows, np.asarray(of), np.asarray(0), 1, seed)[:, 0]
    order = np.lexsort((number, label))  # class by class
    ends = np.cumsum(np.bincount(label, minlength=len(counts)))
    place = rows - (ends - np.bincount(label, minlength=len(counts)))[label[order]]  # in its class
    return order[place < counts[label[order]]]
