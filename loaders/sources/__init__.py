"""Where images come from: one file for each kind of source, found automatically.

A file here has `claims(root) -> bool`, whether a path is of its kind, and `open_index(root, max_pixels) -> Index`,
which raises `DataError` where it is not laid out as expected. What none of them claims is treated as class folders.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
from pathlib import Path
from types import ModuleType

from loaders.errors import DataError
from loaders.index import Index
from loaders.sources import folders


def open_index(root: Path, *, max_pixels: int, quarantine: Path | None = None) -> Index:
    """Index a data set, from the cache when nothing changed.

    Args:
        root: a folder `<root>/<class>/**/<image>`; a list file with `<image> <class>` on each line, paths relative
            to it; a folder or pattern of tar shards (`shards/*.tar`); or a `.beton` file.
        max_pixels: an image with more is a problem and is never decoded.
        quarantine: list of images to leave out, as `tools/scan_images.py` writes it.

    Raises:
        DataError: there is no such data set, or it is not laid out as expected.
    """
    index = _source_of(root).open_index(root, max_pixels)
    return index.without(read_quarantine(quarantine)) if quarantine else index


def _source_of(root: Path) -> ModuleType:
    for name in sorted(module.name for module in pkgutil.iter_modules(__path__)):
        source = importlib.import_module(f"{__name__}.{name}")
        if source.claims(root):
            return source
    return folders


def is_there(root: Path) -> bool:
    """Whether there is anything to index at a path or pattern."""
    return root.exists() or bool(list(root.parent.glob(root.name)))


def read_quarantine(path: Path) -> dict[bytes, str]:
    """Image below the root -> reason, from a quarantine list: lines of JSON with `path` and `reason`.

    Raises:
        DataError: no such file, or a line that does not belong to a quarantine list.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as a quarantine list: {error}") from None
    names: dict[bytes, str] = {}
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            names[os.fsencode(entry["path"])] = str(entry["reason"])
        except (ValueError, TypeError, KeyError):
            raise DataError(
                f'{path}: line {number}: expected {{"path": ..., "reason": ...}} as tools/scan_images.py writes it'
            ) from None
    return names
