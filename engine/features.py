"""What a frozen network makes of images: the one extraction for k-NN, probes and embeddings, and a cache of it.

    features = extract(trained, data_of(trained, ["data.val=photos"]), index, layer="pooled", cache=Path("runs/x"))
    features.array  # float32 [N, D], in the order of the index for any number of ranks
"""

from __future__ import annotations

import functools
import hashlib
import json
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

import loaders
from engine import dist
from engine.dist import World
from engine.errors import RecipeError
from engine.log import Progress, logger
from engine.trained import Trained, hash_of
from loaders import DataConfig, Index
from loaders.augment import to_pixels
from loaders.files import aside
from models.contract import Layer

_CHUNK = 4096  # rows that are gathered, or compared, at a time
ALONE = World(0, 1, 0, 1, torch.device("cpu"))


@dataclass(frozen=True, eq=False)
class Features:
    """Features of the images of a data set, those left out that cannot be decoded."""

    array: NDArray[np.float32]
    """[N, D], in the order of the index."""
    rows: NDArray[np.int64]
    """[N], rows of the index, ascending."""
    label: NDArray[np.int64] | None
    """[N]; None where the data set has no labels."""
    names: NDArray[np.str_]
    """[N], paths below the data set's root; what is not UTF-8 is escaped."""
    classes: tuple[str, ...]
    """Names of the labels; () without."""
    images: int
    """That were asked for."""
    of: dict[str, Any]
    """What they are features of, as plain data: `layer`, `weights` (hash), `images` (fingerprint of the index),
    `view`, `mean`, `std`."""

    @property
    def left_out(self) -> int:
        """Images that cannot be decoded."""
        return self.images - len(self.rows)

    @property
    def hash(self) -> str:
        """Of all that they depend on, 16 hex digits: other weights, images, view or layer give another."""
        return _hash(self.of)

    def save(self, path: Path) -> None:
        """Write an .npz of plain arrays: `features`, `rows`, `names`, `label` (-1: none), `classes`, `images`, and `of`
        as JSON; `numpy.load(path, allow_pickle=False)` reads it.

        Raises:
            OSError: the disk refuses; nothing is left.
        """
        label = np.full(len(self.rows), -1, dtype=np.int64) if self.label is None else self.label
        with aside(path) as out, open(out.part, "wb") as file:
            np.savez(
                file, features=self.array, rows=self.rows, names=self.names, label=label,
                classes=np.array(self.classes, dtype=np.str_), images=np.int64(self.images),
                of=np.array(json.dumps(self.of)),
            )  # fmt: skip

    @classmethod
    def load(cls, path: Path) -> Features:
        """Read what `save` wrote; no code of the file is run.

        Raises:
            OSError: it cannot be read.
            ValueError: it is no such file, or damaged.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                got = {name: file[name] for name in ("features", "rows", "names", "label", "classes", "images", "of")}
            array, rows, names, label = (got[name] for name in ("features", "rows", "names", "label"))
            count, of = len(array), json.loads(str(got["of"]))
            kinds = [array.dtype == np.float32, rows.dtype == np.int64, label.dtype == np.int64, names.dtype.kind == "U"]
            if not all(kinds) or array.ndim != 2 or not isinstance(of, dict):
                raise ValueError("its arrays are of other types")
            if any(item.shape != (count,) for item in (rows, names, label)):
                raise ValueError("its arrays do not fit together")
            has_label = not (label < 0).any()
            return cls(
                array, rows, label if has_label else None, names, tuple(map(str, got["classes"])), int(got["images"]), of
            )
        except (KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error, ValueError, AttributeError) as error:
            raise ValueError(f"{path}: is no whole file of features: {error}") from None


def extract(
    trained: Trained,
    data: DataConfig,
    index: Index,
    *,
    layer: Layer = "features",
    rows: Sequence[int] | None = None,
    world: World = ALONE,
    cache: Path | None = None,
) -> Features | None:
    """Run a network over a data set in float32, without changing it, on all ranks of a group.

    Args:
        data: how images are read and normalized, and with which `eval_view`; as `data_of` gives it.
        layer: `features` (behind `fc`), `pooled` (the last map, averaged), or `map` (the same in four windows, see
            `models.contract.windows`).
        rows: of the index, ascending; by default all.
        world: this process among the ranks, which share the images out.
        cache: a folder, made where it is missing, in which `features-<hash>.npz` is looked for and written. One that is
            damaged or of something else is made anew.

    Returns:
        The features on rank 0, None on the others.

    Raises:
        RecipeError: the network has no such layer, or does not take images of this size.
        DataError, LoaderError: the images cannot be read, or none can be decoded; on every rank.
        OSError: the cache cannot be written.
    """
    raise NotImplementedError


def data_of(trained: Trained, changes: Sequence[str] = ()) -> DataConfig:
    """How to read images as the network's evaluations do: its view and normalization, whatever reads files fastest here.

    Args:
        changes: `data.key=value`, as on the command line of a run: `data.val=photos`, `data.eval_view={crop: whole}`.

    Raises:
        RecipeError: a key or value that `data` cannot take.
    """
    raise NotImplementedError
