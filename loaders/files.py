"""Writing a file or folder so that its name never stands for half of it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Aside:
    """A file or folder in the making."""

    part: Path
    """Where to write it."""
    path: Path
    """The name that it takes at the end; may be set until then."""


@contextmanager
def aside(path: Path, *, durable: bool = False) -> Iterator[Aside]:
    """Write beside `path` and rename at the end; if anything is raised, nothing is left and an older file stays.

    Args:
        durable: flush the content and the new name to the disk, so that a power cut leaves the old file or the new one.

    Raises:
        OSError: the disk refuses.
    """
    out = Aside(path.with_name(f".{path.name}.{os.getpid()}.part"), path)
    _remove(out.part)
    try:
        yield out
        if durable:
            sync(out.part)
        os.replace(out.part, out.path)
        if durable:
            sync(out.path.parent)
    finally:
        _remove(out.part)


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(part: Path) -> None:
    if part.is_dir():
        shutil.rmtree(part, ignore_errors=True)
    else:
        part.unlink(missing_ok=True)
