"""Features of every fixed view of every image in one file, to be read in place of running the network that made them.

A folder of two files: `features` is float16 [K, N, V, D] (K fixed draws, N rows of the index, V views, D numbers), so
that an epoch, which has one draw, reads one part of it; `cache.json` says what they are of, and which parts are there.
With components the D numbers are coordinates in a basis of D' features, which lies in `basis.npy`.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loaders.errors import DataError
from loaders.files import aside

FORMAT = 1
_FEATURES, _ABOUT, _BASIS = "features", "cache.json", "basis.npy"
_LARGEST = float(np.finfo(np.float16).max)


class FeatureCache:
    """A folder of features, being made or complete.

    Attributes:
        about: what the features are of: names and values, compared as they are.
        shape: (K, N, V, D).
        done: [K, blocks], which blocks of `block` rows are there.
        identity: of this folder and its copies, and of no other.
    """

    def __init__(self, folder: Path, content: Mapping[str, Any]) -> None:
        self.folder = folder
        self.about: dict[str, Any] = content["about"]
        self.shape: tuple[int, int, int, int] = tuple(content["shape"])
        self.block: int = content["block"]
        self.identity: str = content["identity"]
        self.done: NDArray[np.bool_] = np.array(content["done"], dtype=bool)
        self._bytes = 2 * self.shape[2] * self.shape[3]  # of a row
        self._file = os.open(folder / _FEATURES, os.O_RDWR if not self.done.all() else os.O_RDONLY)
        self._basis: Tensor | None = None
        if content["components"]:
            self._basis = torch.from_numpy(np.load(folder / _BASIS, allow_pickle=False))  # [D + 1, D']

    # -------------------------------------------------------------------------------------------- in the making

    @classmethod
    def create(
        cls,
        folder: Path,
        about: Mapping[str, Any],
        shape: tuple[int, int, int, int],
        *,
        block: int,
        basis: NDArray[np.float32] | None = None,
    ) -> FeatureCache:
        """An empty cache of features of `about`, with all of its room on the disk.

        Args:
            shape: (K, N, V, D).
            block: rows that are written at a time.
            basis: [D + 1, D']: the mean of the features and the principal components that D numbers are coordinates in.

        Raises:
            OSError: the disk has no room.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if basis is not None:
            with aside(folder / _BASIS) as out, open(out.part, "wb") as file:
                np.save(file, basis)
        with aside(folder / _FEATURES) as out, open(out.part, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, 2 * int(np.prod(shape)))
        done = np.zeros((shape[0], -(-shape[1] // block)), dtype=bool)
        content = {
            "format": FORMAT,
            "identity": secrets.token_hex(8),
            "about": dict(about),
            "shape": list(shape),
            "block": block,
            "components": basis is not None,
        }
        _write(folder, {**content, "done": done.astype(int).tolist()})
        return cls.open(folder)

    def rows(self, block: int) -> range:
        """The rows of a block."""
        return range(block * self.block, min((block + 1) * self.block, self.shape[1]))

    def write(self, draw: int, rows: Tensor, features: Tensor) -> None:
        """Put features [B, V, D'] of rows [B] of one draw in their places.

        Raises:
            DataError: numbers that 16 bits do not hold.
            OSError: the disk refuses.
        """
        features = features.detach().to("cpu", torch.float32)  # as the basis is, in a process that writes
        if self._basis is not None:
            features = (features - self._basis[0]) @ self._basis[1:].T
        if not bool((features.abs() <= _LARGEST).all()):
            raise DataError(f"{self.folder}: features beyond {_LARGEST:.0f}, or not numbers, do not fit 16 bits")
        content = features.to(torch.float16).contiguous().numpy()
        for row, numbers in zip(rows.tolist(), content, strict=True):
            os.pwrite(self._file, numbers.tobytes(), self._place(draw, row))

    def flush(self) -> None:
        """Have all that this process wrote on the disk.

        Raises:
            OSError: the disk refuses.
        """
        os.fsync(self._file)

    def mark(self, done: NDArray[np.bool_]) -> None:
        """Say which blocks [K, blocks] are there. One process does so, when all have flushed them.

        Raises:
            OSError: the disk refuses.
        """
        _write(self.folder, {**_read(self.folder), "done": done.astype(int).tolist()})

    # -------------------------------------------------------------------------------------------- in use

    @classmethod
    def open(cls, folder: Path) -> FeatureCache:
        """A cache as it is, complete or not.

        Raises:
            DataError: there is none, or it is damaged.
        """
        content = _read(folder)
        try:
            cache = cls(folder, content)
            size = os.fstat(cache._file).st_size
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{folder}: damaged ({type(error).__name__}: {error}); remove it and make it again"
            ) from None
        expected = cache.shape[0] * cache.shape[1] * cache._bytes
        if size != expected:
            cache.close()
            raise DataError(
                f"{folder / _FEATURES}: {size} bytes, expected {expected}; remove {folder} and make it again"
            )
        return cache

    @staticmethod
    def identity_of(folder: Path) -> str:
        """What tells the cache of a folder, and its copies, from all others.

        Raises:
            DataError: there is none.
        """
        return str(_read(folder).get("identity"))

    @property
    def is_complete(self) -> bool:
        """Whether all blocks are there."""
        return bool(self.done.all())

    def read(self, rows: Tensor, draws: NDArray[np.int64]) -> Tensor:
        """What lies there of rows [B] in draws [B]: float16 [B, V, D].

        Raises:
            DataError: the file has become shorter, or the disk fails.
        """
        found = bytearray(len(rows) * self._bytes)
        for number, (row, draw) in enumerate(zip(rows.tolist(), draws.tolist(), strict=True)):
            try:
                content = os.pread(self._file, self._bytes, self._place(draw, row))
            except OSError as error:
                raise DataError(f"{self.folder / _FEATURES}: cannot be read: {error.strerror}") from None
            if len(content) != self._bytes:
                raise DataError(f"{self.folder / _FEATURES}: has become shorter while it is read")
            found[number * self._bytes : (number + 1) * self._bytes] = content
        return torch.frombuffer(found, dtype=torch.float16).view(len(rows), *self.shape[2:])

    def features(self, read: Tensor) -> Tensor:
        """Features [V, B, D'] in float32 of what `read` gave, [B, V, D], on its device."""
        numbers = read.float()
        if self._basis is not None:
            self._basis = self._basis.to(read.device)
            numbers = numbers @ self._basis[1:] + self._basis[0]
        return numbers.transpose(0, 1).contiguous()

    def kept(self, features: Tensor) -> Tensor:
        """What components keep of features [B, V, D'], in float32: themselves without components."""
        if self._basis is None:
            return features
        self._basis = self._basis.to(features.device)
        mean, components = self._basis[0], self._basis[1:]
        return (features - mean) @ components.T @ components + mean

    def _place(self, draw: int, row: int) -> int:
        return (draw * self.shape[1] + row) * self._bytes

    def close(self) -> None:
        """Close the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def principal_components(features: Tensor, count: int) -> tuple[NDArray[np.float32], float]:
    """Basis of features.

    Args:
        features: [M, D'], with M > count.
        count: D, of components.

    Returns:
        [D + 1, D']: their mean and their first principal components, largest first; and the share of the variance that
        these keep.
    """
    x = features.double()
    mean = x.mean(dim=0)
    _, values, vectors = torch.linalg.svd(x - mean, full_matrices=False)
    kept = float(values[:count].square().sum() / values.square().sum().clamp(min=torch.finfo(x.dtype).tiny))
    # The sign of a component is free: its largest entry is positive.
    basis = vectors[:count]
    basis = basis * basis.gather(1, basis.abs().argmax(dim=1, keepdim=True)).sign()
    return torch.cat((mean[None], basis)).float().numpy(), kept


def _read(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"{folder}: no {_ABOUT} there; expected a folder that tools/cache_teacher.py has made"
        ) from None
    except NotADirectoryError:
        raise DataError(f"{folder}: is a file, expected a folder that tools/cache_teacher.py has made") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / _ABOUT}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DataError(f"{folder / _ABOUT}: expected a cache of format {FORMAT}; make it again")
    return content


def _write(folder: Path, content: Mapping[str, Any]) -> None:
    with aside(folder / _ABOUT, durable=True) as out:
        out.part.write_text(json.dumps(content), encoding="utf-8")
