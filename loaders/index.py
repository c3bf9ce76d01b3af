"""The index of a data set: path, label, width, height and format of every image, read once from the headers."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from loaders.decode import RAW, decode, from_raw
from loaders.errors import BadImage


class Pieces(NamedTuple):
    """Where the images lie that are not files of their own."""

    files: list[bytes]
    """Paths of the shards."""
    file: NDArray[np.int32]
    """[N], position in `files`."""
    offset: NDArray[np.int64]
    """[N], first byte in that file."""
    length: NDArray[np.int64]
    """[N], bytes."""

    def take(self, rows: NDArray[np.int64]) -> Pieces:
        """Those of some rows."""
        return Pieces(self.files, self.file[rows], self.offset[rows], self.length[rows])


@dataclass(frozen=True, eq=False)
class Index:
    """Everything known about a data set without decoding it. Rows are sorted by class name, then path; those of a list,
    of shards and of a `.beton` keep the order they have there."""

    root: Path
    """The folder or file, or a name for a data set that is not made of files."""
    classes: list[str]
    """Names; a label is a position in this list."""
    paths: NDArray[np.bytes_]
    """[N], below the root, as the file system spells them: names need not be UTF-8."""
    label: NDArray[np.int64]
    """[N]."""
    width: NDArray[np.int32]
    """[N], pixels; 1 where the header cannot be read."""
    height: NDArray[np.int32]
    format: NDArray[np.bytes_]
    """[N], as Pillow names it; b"" where the header cannot be read."""
    problems: dict[int, str]
    """Row -> why its image cannot be used."""
    max_pixels: int
    """Images with more are refused before anything is decoded."""
    pieces: Pieces | None = None
    """Where the images lie, if they are not files of their own."""
    quarantined: int = 0
    """How many images a quarantine list keeps out of the index."""

    def __len__(self) -> int:
        return len(self.label)

    def name(self, row: int) -> bytes:
        """Path of an image below the root."""
        return bytes(self.paths[row])

    def path(self, row: int) -> str:
        """Path of an image, for people: what is not UTF-8 is escaped."""
        return os.path.join(os.fsencode(self.root), self.paths[row]).decode("utf-8", errors="backslashreplace")

    def location(self, row: int) -> tuple[bytes, int, int]:
        """File of an image's bytes, the first of them in it, and how many (-1: to the end)."""
        if self.pieces is None:
            return os.path.join(os.fsencode(self.root), self.paths[row]), 0, -1
        pieces = self.pieces
        return pieces.files[pieces.file[row]], int(pieces.offset[row]), int(pieces.length[row])

    @property
    def fingerprint(self) -> str:
        """Hash of names, labels and sizes: two data sets with equal fingerprints give the same stream."""
        digest = hashlib.sha256(b"\0".join(self.paths.tolist()))
        for array in (self.label, self.width, self.height):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:16]

    def content(self, row: int) -> bytes:
        """The bytes of an image.

        Raises:
            BadImage: they cannot be read.
        """
        path, offset, length = self.location(row)
        try:
            with open(path, "rb", buffering=0) as file:
                file.seek(offset)
                content = file.read() if length < 0 else file.read(length)
        except OSError as error:
            raise BadImage(f"cannot be read: {error.strerror}") from error
        if length >= 0 and len(content) < length:
            raise BadImage("cannot be read: its file is cut short")
        return content

    def read(self, row: int) -> Tensor:
        """Decode an image as RGB, uint8 [3, H, W].

        Raises:
            BadImage: it cannot be decoded, or is no longer the file that was indexed.
        """
        if row in self.problems:
            raise BadImage(self.problems[row])
        read = from_raw if self.format[row] == RAW else decode
        return read(self.content(row), int(self.width[row]), int(self.height[row]))

    def take(self, rows: NDArray[np.int64]) -> Index:
        """The index of some rows, in their order."""
        new = {int(row): number for number, row in enumerate(rows)}
        return replace(
            self,
            paths=self.paths[rows],
            label=self.label[rows],
            width=self.width[rows],
            height=self.height[rows],
            format=self.format[rows],
            problems={new[row]: reason for row, reason in self.problems.items() if row in new},
            pieces=self.pieces.take(rows) if self.pieces else None,
        )

    def without(self, names: Iterable[bytes]) -> Index:
        """The index without some images, such as those of a quarantine list."""
        kept = np.flatnonzero(~np.isin(self.paths, np.array(list(names), dtype=np.bytes_)))
        return replace(self.take(kept), quarantined=len(self) - len(kept))
