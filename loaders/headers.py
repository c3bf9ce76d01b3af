"""Headers of all images of a data set, read in parallel and cached.

The cache lies in `$XDG_CACHE_HOME/burn-engine` (`~/.cache/burn-engine`) and is keyed by the path, size and modification
time of every file.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import sys
import zipfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from loaders.decode import Header, read_header
from loaders.files import aside
from loaders.machine import cores

_FORMAT = 2  # of the cache file; raised when its fields change

Arrays = dict[str, Any]
"""Columns of an index by name."""


def read_headers(root: Path, places: Sequence[Any], read: Callable[[Any], Header], max_pixels: int) -> Arrays:
    """Read the headers of N images.

    Args:
        root: what they belong to, for the progress bar.
        places: N arguments for `read`, which is `of_file` or `of_piece`.
        max_pixels: an image with more is a problem.

    Returns:
        `width`, `height` and `format` [N]; `bad` and `reason` [number of problems].
    """
    with ThreadPoolExecutor(min(32, 4 * cores())) as pool:
        headers = list(
            tqdm(
                pool.map(read, places, chunksize=64),
                total=len(places),
                desc=f"indexing {root}",
                unit=" images",
                disable=not sys.stderr.isatty() or len(places) < 10_000,
            )
        )
    width = np.array([header.width for header in headers], dtype=np.int32)
    height = np.array([header.height for header in headers], dtype=np.int32)
    reasons = {row: header.problem for row, header in enumerate(headers) if header.problem}
    reasons |= too_large(width, height, max_pixels)
    return {
        "width": width,
        "height": height,
        "format": np.array([header.format for header in headers], dtype=np.bytes_),
        "bad": np.array(list(reasons), dtype=np.int64),
        "reason": np.array(list(reasons.values()), dtype=np.str_),
    }


def columns(arrays: Arrays) -> dict[str, Any]:
    """What of an `Index` comes from the headers."""
    problems = dict(zip(arrays["bad"].tolist(), arrays["reason"].tolist(), strict=True))
    return {**{name: arrays[name] for name in ("width", "height", "format")}, "problems": problems}


def too_large(width: Any, height: Any, max_pixels: int) -> dict[int, str]:
    """Row -> what is wrong with an image of more than `max_pixels` pixels; `width` and `height` are [N]."""
    return {
        row: f"has {width[row]}x{height[row]} pixels, more than data.max_pixels {max_pixels}"
        for row in np.flatnonzero(width.astype(np.int64) * height > max_pixels).tolist()
    }


def of_file(path: bytes) -> Header:
    """The header of an image file."""
    try:
        if os.path.getsize(path) == 0:
            return Header.unusable("is empty (0 bytes)")
        with open(path, "rb") as file:
            return read_header(file)
    except OSError as error:
        return Header.unusable(f"is not an image: {error.strerror or type(error).__name__}")


def of_piece(place: tuple[bytes, int, int]) -> Header:
    """The header of an image that is a part of a file: (path, first byte, bytes)."""
    path, offset, length = place
    if length == 0:
        return Header.unusable("is empty (0 bytes)")
    with open(path, "rb") as file:
        return read_header(io.BufferedReader(_Slice(file, offset, length)))


class _Slice(io.RawIOBase):
    """A part of a file as a file, so that a header is read without the rest."""

    def __init__(self, file: BinaryIO, offset: int, length: int) -> None:
        self._file, self._offset, self._length, self._at = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, to: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(0, to + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._offset + self._at)
        content = self._file.read(max(0, min(len(buffer), self._length - self._at)))
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)


def cached(root: Path, stamps: Iterable[bytes], max_pixels: int, scan: Callable[[], Arrays]) -> Arrays:
    """The arrays of `scan`, from the cache if files with the same stamps were scanned before."""
    listing = hashlib.sha256(f"{_FORMAT}\0{max_pixels}\0{root.resolve()}".encode())
    for stamp in stamps:
        listing.update(stamp + b"\n")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cache = home / "burn-engine" / f"index-{listing.hexdigest()[:24]}.npz"
    arrays = _read(cache)
    if arrays is None:
        arrays = scan()
        _write(cache, arrays)
    return arrays


def _read(path: Path) -> Arrays | None:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None  # absent or damaged: it is made again


def _write(path: Path, arrays: Arrays) -> None:
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time only
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside(path) as out, open(out.part, "wb") as file:
            np.savez(file, **arrays)
