"""Where images come from: one file for each kind of source, found automatically.

A file here has `WHAT`, what it reads in a few words; `claims(root) -> bool`, whether a path is of its kind; and
`open_index(root, request) -> Index`, which raises `DataError` where it is not laid out as expected. A path that two of
them claim is refused.
"""

from __future__ import annotations

import codecs
import hashlib
import importlib
import itertools
import json
import os
import pkgutil
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from loaders import index_file
from loaders.config import Request
from loaders.errors import DataError
from loaders.index import Index
from loaders.sources import devkits, folders, shards
from loaders.voc import kit_of


def open_index(root: Path, request: Request, *, quarantine: Path | None = None) -> Index:
    """Index a data set, from the cache when nothing changed.

    Args:
        root: a folder of images, flat, in class folders or in a tree; a list file with `<image>` or `<image> <class>`
            on each line; a folder or pattern of tar shards (`shards/*.tar`) or Parquet files; a `.beton` file; splits
            of a PASCAL VOC kit (`VOCdevkit#2007_test`); or an `.index` file that tools/make_index.py wrote.
        quarantine: list of images to leave out, as `tools/scan_images.py` writes it.

    Raises:
        DataError: there is no such data set, or it is not laid out as expected.
    """
    root = root.expanduser()
    if root.suffix == index_file.SUFFIX and not os.path.isdir(root):
        index = _of_file(root, request)
    else:
        index = source_of(root).open_index(root, request)
    if quarantine is None:
        return index
    reasons = read_quarantine(quarantine)
    if index.objects is not None:  # the cache has no room for them
        return index.without(reasons)
    digest = hashlib.sha256(b"\0".join(sorted(reasons)))
    stamp = f"{index.fingerprint} {digest.hexdigest()} {index.root} {sorted(index.unread)}"
    key = ("quarantine", request.labels or "", digest.hexdigest())
    without = index_file.cached(root, key, stamp, request.max_pixels, lambda: index.without(reasons))
    return without.at(index.root, index.pieces.files if index.pieces else None)


def _of_file(path: Path, request: Request) -> Index:
    index = index_file.open_travelled(path, request.max_pixels)
    if request.labels == "none" and index.label is not None:
        raise DataError(f"{path}: has labels, and data.labels is none; make it again with --labels none")
    return index


def source_of(root: Path) -> ModuleType:
    """The source that reads a path.

    Raises:
        DataError: none does, or more than one.
    """
    if "\0" in str(root):
        raise DataError(f"{str(root)!r}: no path has a NUL in it")
    modules = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    found = [module for module in modules if module.claims(root)]
    if len(found) > 1:
        kinds = " and ".join(module.WHAT for module in found)
        raise DataError(
            f"{root}: holds {kinds}, which are two data sets; move one of them away, or name one of them, such as "
            f"{root}/*.tar"
        )
    return found[0] if found else folders


def is_there(root: Path) -> bool:
    """Whether there is anything to index at a path or pattern; True also where the machine does not let us see."""
    root = root.expanduser()
    if devkits.claims(root):
        root = kit_of(root)
    try:
        os.stat(root)
    except (FileNotFoundError, NotADirectoryError):
        return any(map(os.path.exists, itertools.chain.from_iterable(map(shards.matching, shards.expand(str(root))))))
    except (OSError, ValueError):
        pass
    return True


def check_quarantine(path: Path, indices: Iterable[Index]) -> str:
    """See whether a quarantine list belongs to data sets that were opened without its images.

    Returns:
        A line of what is odd, or "".

    Raises:
        DataError: none of its lines names an image of theirs.
    """
    lines = read_quarantine(path)
    different = {(index.root, index.fingerprint): index for index in indices}.values()
    where = " or ".join(dict.fromkeys(str(index.root) for index in different))
    left_out = sum(index.quarantined for index in different)
    first = os.fsdecode(next(iter(lines), b"")).encode(errors="backslashreplace").decode()
    if lines and not left_out:
        count = sum(map(len, different))
        raise DataError(
            f"{path}: matches none of the {count:,} images; its first line names {first}, expected paths relative to "
            f"{where}"
        )
    if left_out < len(lines):
        return f"{path}: {len(lines) - left_out} of its {len(lines)} lines match no image of {where}"
    return ""


def read_quarantine(path: Path) -> dict[bytes, str]:
    """Image below the root -> reason, from a quarantine list: lines of JSON with `path` and `reason`.

    Raises:
        DataError: no such file, or a line that does not belong to a quarantine list.
    """
    try:
        content = path.read_bytes()
        if content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise DataError(f"{path}: is UTF-16; expected a quarantine list in UTF-8")
        lines = content.decode("utf-8-sig").split("\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be read as a quarantine list: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: cannot be read as a quarantine list: {error}") from None
    names: dict[bytes, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            names[os.fsencode(entry["path"])] = str(entry["reason"])
        except (ValueError, TypeError, KeyError, RecursionError):
            raise DataError(
                f'{path}: line {number}: expected {{"path": ..., "reason": ...}} as tools/scan_images.py writes it'
            ) from None
    return names
