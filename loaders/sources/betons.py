"""One `.beton` file in FFCV's format (`loaders/beton.py`)."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from loaders import beton, index_file
from loaders.config import Request
from loaders.decode import RAW
from loaders.index import Index, Names, Pieces

WHAT = "a .beton"


def claims(root: Path) -> bool:
    """By the ending of its name."""
    return root.suffix == ".beton"


def open_index(root: Path, request: Request) -> Index:
    """Images keep the file's order; their names are their numbers.

    Raises:
        DataError: it is not a whole `.beton`.
    """

    def make() -> Index:
        content = beton.read(root)
        label = None if request.labels == "none" else content.label
        count = len(content.width)
        return Index(
            root=root,
            classes=[] if label is None else content.classes,
            names=Names.of_rows(count),
            label=None if label is None else label.astype(np.int32),
            width=content.width,
            height=content.height,
            format=np.where(content.is_raw, RAW, b"JPEG").astype("S8"),
            problems=index_file.too_large(content.width, content.height, request.max_pixels),
            max_pixels=request.max_pixels,
            pieces=Pieces([os.fsencode(root)], np.zeros(count, dtype=np.int32), content.offset, content.length),
            reading="images without labels" if label is None else f"{len(content.classes)} classes",
        )

    stamp = index_file.stamp_of([os.fsencode(root), os.fsencode(beton.manifest_path(root))])
    index = index_file.cached(root, ("beton", request.labels or ""), stamp, request.max_pixels, make)
    return index.at(root, [os.fsencode(root)])
