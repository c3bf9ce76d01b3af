"""A folder with one folder of images per class; and image files in general."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from loaders import headers
from loaders.errors import DataError
from loaders.index import Index

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".tif", ".tiff", ".webp")


class File(NamedTuple):
    """One image file."""

    path: bytes
    """Below the root."""
    label: int
    bytes: int
    modified: int
    """Nanoseconds."""


def claims(root: Path) -> bool:
    """Never: this is what is tried where no other source claims a path."""
    return False


def open_index(root: Path, max_pixels: int) -> Index:
    """Classes are the folders in `root`, in order of their names; images lie anywhere below them."""
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; expected one folder of images per class in it")
    classes = sorted(e.name for e in os.scandir(root) if e.is_dir() and not e.name.startswith("."))
    if not classes:
        raise DataError(f"{root}: no class folders; expected <root>/<class>/<image>")
    files = []
    for label, name in enumerate(classes):
        paths = sorted(_images(root / name))
        if not paths:
            raise DataError(
                f"{root / name}: class without images; expected files ending in {', '.join(EXTENSIONS)}, "
                "remove the folder or fill it"
            )
        for path in paths:
            status = os.stat(path)
            relative = os.fsencode(os.path.relpath(path, root))
            files.append(File(relative, label, status.st_size, status.st_mtime_ns))
    return index_of(root, root, classes, files, max_pixels)


def _images(folder: Path) -> Iterator[str]:
    for where, folders, names in os.walk(folder):  # does not follow links below the class: no loops
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if name.lower().endswith(EXTENSIONS) and not name.startswith("."):
                yield os.path.join(where, name)


def index_of(root: Path, base: Path, classes: list[str], files: list[File], max_pixels: int) -> Index:
    """The index of image files.

    Args:
        root: what `data.train` names: the key of the cache.
        base: the folder that the files' paths are relative to.
    """

    def scan() -> headers.Arrays:
        paths = [os.path.join(os.fsencode(base), file.path) for file in files]
        return headers.read_headers(root, paths, headers.of_file, max_pixels)

    stamps = (b"\0".join((file.path, f"{file.label} {file.bytes} {file.modified}".encode())) for file in files)
    arrays = headers.cached(root, stamps, max_pixels, scan)
    return Index(
        root=base,
        classes=classes,
        paths=np.array([file.path for file in files], dtype=np.bytes_),
        label=np.array([file.label for file in files], dtype=np.int64),
        max_pixels=max_pixels,
        **headers.columns(arrays),
    )
