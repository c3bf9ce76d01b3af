"""One `.beton` file in FFCV's format (`loaders/beton.py`)."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from loaders import beton
from loaders.decode import RAW
from loaders.headers import too_large
from loaders.index import Index, Pieces


def claims(root: Path) -> bool:
    """By the ending of its name."""
    return root.suffix == ".beton"


def open_index(root: Path, max_pixels: int) -> Index:
    """Images keep the file's order; their names are their numbers."""
    content = beton.read(root)
    count = len(content.label)
    return Index(
        root=root,
        classes=content.classes,
        paths=np.array([b"%d" % row for row in range(count)], dtype=np.bytes_),
        label=content.label,
        width=content.width,
        height=content.height,
        format=np.where(content.is_raw, RAW, b"JPEG"),
        problems=too_large(content.width, content.height, max_pixels),
        max_pixels=max_pixels,
        pieces=Pieces([os.fsencode(root)], np.zeros(count, dtype=np.int32), content.offset, content.length),
    )
