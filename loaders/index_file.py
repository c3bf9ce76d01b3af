"""An index as one file of arrays that all processes map: `x.index`, and the cache of what was indexed before.

Layout: 8 bytes that say what it is, the length of a header, the header in JSON, and the columns, each at a multiple of
64 bytes. Nothing of it is code. The cache lies in `$XDG_CACHE_HOME/burn-engine` (`~/.cache/burn-engine`); where that
cannot be written, the file is a temporary one that goes with its process.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import mmap
import os
import tempfile
import weakref
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loaders.errors import DataError
from loaders.files import aside
from loaders.index import Index, Names, Pieces

SUFFIX = ".index"
_MAGIC = b"BURNIDX\x01"
_READING = b"3"
"""Version of how headers are read: what an older one found is not used again."""
_ALIGNED = 64
_CHECKED = 1 << 30
"""A file of at most so many bytes is compared with its checksums when it is opened (a second); a larger one by
`tools/make_index.py --check` alone."""
_COLUMNS = {
    "blob": "|u1", "ends": "<i8", "label": "<i4", "width": "<i4", "height": "<i4", "format": "|S8",
    "size": "<i8", "modified": "<i8", "file": "<i4", "offset": "<i8", "length": "<i8",
}  # fmt: skip
_LOOKED_AT = 16
"""Images, at least, by which an index that has travelled finds its place."""
HOW_TO_MAKE = "make it again with tools/make_index.py"


def write(index: Index, path: Path, stamp: str = "") -> None:
    """Write an index.

    Args:
        stamp: what it was made from, for a cache.

    Raises:
        OSError: it cannot be written; nothing is left.
    """
    columns = _columns_of(index)
    described: list[dict[str, Any]] = []
    at = end = 0
    for name, array in columns.items():
        at = -(-end // _ALIGNED) * _ALIGNED
        end = at + array.nbytes
        described.append({"name": name, "count": len(array), "at": at, "crc32": _checksum(array)})
    sizes = [int(index.width.max(initial=0)), int(index.height.max(initial=0))]
    of_recipe = _too_large_rows(index)
    header = {
        "root": _text(os.fsencode(index.root)),
        "from_here": _text(os.fsencode(os.path.relpath(os.path.abspath(index.root), os.path.abspath(path.parent)))),
        "classes": index.classes,
        "files": [_text(file) for file in index.pieces.files] if index.pieces else None,
        "count": len(index),
        "problems": [[row, reason] for row, reason in index.problems.items() if row not in of_recipe],
        "unread": sorted(index.unread),
        "quarantined": index.quarantined,
        "reading": index.reading,
        "fingerprint": index.fingerprint,
        "largest": sizes[0] * sizes[1],
        "stamp": stamp,
        "columns": described,
    }
    text = json.dumps(header).encode()
    first = _after(len(text))
    path.parent.mkdir(parents=True, exist_ok=True)
    with aside(path) as out, open(out.part, "wb") as file:
        file.write(_MAGIC + len(text).to_bytes(8, "little") + zlib.crc32(text).to_bytes(4, "little") + text)
        for name, place in zip(columns, described, strict=True):
            file.seek(first + place["at"])
            columns[name].tofile(file)
        file.truncate(first + end)


def _columns_of(index: Index) -> dict[str, NDArray[Any]]:
    pieces = index.pieces
    found = {
        "blob": index.names.blob, "ends": index.names.ends, "label": index.label, "width": index.width,
        "height": index.height, "format": index.format, "size": index.size, "modified": index.modified,
        "file": pieces.file if pieces else None, "offset": pieces.offset if pieces else None,
        "length": pieces.length if pieces else None,
    }  # fmt: skip
    return {
        name: np.ascontiguousarray(array, dtype=_COLUMNS[name]) for name, array in found.items() if array is not None
    }


def open_file(path: Path, *, max_pixels: int, root: Path | None = None, trusted: bool = False) -> Index:
    """Map an index.

    Args:
        max_pixels: an image with more is a problem.
        root: where the images are, if not where the file says.
        trusted: it has been checked by another process of this machine.

    Raises:
        DataError: it is not a whole index file.
    """
    with _whole(path):
        header, first, mapped = _mapped(path)
        return _index_of(path, header, first, mapped, max_pixels, root, trusted)


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[None]:
    """Whatever a damaged or foreign file leads to is one line of it."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except DataError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
        raise DataError(f"{path}: is not a whole index file: {error or type(error).__name__}; {HOW_TO_MAKE}") from None


def _mapped(path: Path) -> tuple[dict[str, Any], int, mmap.mmap]:
    """Header of a file, where its columns begin, and all of it."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(len(_MAGIC) + 12)
        if start[: len(_MAGIC)] != _MAGIC:
            raise DataError(f"{path}: is not an index file of this version; {HOW_TO_MAKE}")
        length = int.from_bytes(start[8:16], "little")
        text = file.read(min(length, size))
        if len(text) != length or zlib.crc32(text) != int.from_bytes(start[16:20], "little"):
            raise ValueError("its header is damaged")
        return json.loads(text), _after(length), mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)


def _after(length: int) -> int:
    """Where the columns begin, after a header of `length` bytes."""
    return -(-(len(_MAGIC) + 12 + length) // _ALIGNED) * _ALIGNED


def _index_of(
    path: Path, header: dict[str, Any], first: int, mapped: mmap.mmap, max_pixels: int, root: Path | None, trusted: bool
) -> Index:
    arrays: dict[str, NDArray[Any]] = {}
    for place in header["columns"]:
        dtype = np.dtype(_COLUMNS[place["name"]])
        if place["at"] < 0 or place["count"] < 0 or first + place["at"] + place["count"] * dtype.itemsize > len(mapped):
            raise ValueError("it is cut short")
        arrays[place["name"]] = np.frombuffer(mapped, dtype=dtype, count=place["count"], offset=first + place["at"])
        if not trusted and len(mapped) <= _CHECKED and _checksum(arrays[place["name"]]) != place["crc32"]:
            raise ValueError(f"its column {place['name']} is damaged")
    count = header["count"]
    blob = arrays.pop("blob")
    names = Names(blob, arrays.pop("ends"))
    pieces = None
    if header["files"] is not None:
        files = [_bytes(text) for text in header["files"]]
        pieces = Pieces(files, arrays.pop("file"), arrays.pop("offset"), arrays.pop("length"))
        if len(pieces.file) and not trusted and not 0 <= pieces.file.min() <= pieces.file.max() < len(files):
            raise ValueError("an image lies in a shard that it does not name")
    label = arrays.pop("label", None)
    sides = (len(names), *(len(array) for array in arrays.values()), count if label is None else len(label))
    if set(sides) != {count} or (pieces and len(pieces.file) != count):
        raise ValueError("its columns differ in length")
    if not trusted and not names.is_sound():
        raise ValueError("its names are damaged")
    if label is not None and count and not trusted and not 0 <= label.min() <= label.max() < len(header["classes"]):
        raise ValueError("a label has no class")
    index = Index(
        root=root or Path(os.fsdecode(_bytes(header["root"]))),
        classes=[str(name) for name in header["classes"]],
        names=names,
        label=label,
        problems={int(row): str(reason) for row, reason in header["problems"]},
        max_pixels=max_pixels,
        pieces=pieces,
        quarantined=int(header["quarantined"]),
        unread=frozenset(header["unread"]),
        reading=str(header["reading"]),
        file=path,
        objects=None,  # a file has no room for them
        **arrays,
    )
    index.__dict__["fingerprint"] = str(header["fingerprint"])  # computed when it was written
    if header["largest"] > max_pixels:
        index.problems.update(too_large(index.width, index.height, max_pixels))
    return index


def stamp_in(path: Path) -> str | None:
    """What an index file says that it was made from; None where there is no whole one."""
    with contextlib.suppress(DataError), _whole(path):
        return str(_mapped(path)[0]["stamp"])
    return None


def _checksum(array: NDArray[Any]) -> int:
    return zlib.crc32(array.view(np.uint8).data)


def _text(name: bytes) -> str:
    # Names need not be UTF-8, and JSON must be.
    try:
        return "=" + name.decode()
    except UnicodeDecodeError:
        return base64.b64encode(name).decode()


def _bytes(text: str) -> bytes:
    return text[1:].encode() if text.startswith("=") else base64.b64decode(text)


def too_large(width: NDArray[np.int32], height: NDArray[np.int32], max_pixels: int) -> dict[int, str]:
    """Row -> what is wrong with an image of more than `max_pixels` pixels; `width` and `height` are [N]."""
    found = {}
    for first in range(0, len(width), 1 << 20):
        w, h = width[first : first + (1 << 20)], height[first : first + (1 << 20)]
        for row in np.flatnonzero(w.astype(np.int64) * h > max_pixels).tolist():
            found[first + row] = f"has {w[row]}x{h[row]} pixels, more than data.max_pixels {max_pixels}"
    return found


def _too_large_rows(index: Index) -> set[int]:
    # They depend on the recipe, not on the file.
    return {row for row in index.problems if int(index.width[row]) * int(index.height[row]) > index.max_pixels}


# ------------------------------------------------------------------------------------------------ the cache


def cache_path(root: Path, *key: str) -> Path | None:
    """Where the index of a data set is kept between runs; None where this user has no such place."""
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # no HOME, and no entry of this user
        return None
    digest = hashlib.sha256(b"\0".join((_READING, os.fsencode(os.path.realpath(root)), *map(str.encode, key))))
    return home / "burn-engine" / f"{digest.hexdigest()[:24]}{SUFFIX}"


def stamp_of(files: list[bytes]) -> str:
    """What tells some files from what they were or will be: their sizes and times.

    Raises:
        DataError: one cannot be read; one that is not there counts as empty.
    """
    digest = hashlib.sha256()
    for file in files:
        try:
            found = os.stat(file)
            digest.update(b"%d %d " % (found.st_size, found.st_mtime_ns))
        except FileNotFoundError:
            pass
        except OSError as error:
            raise DataError(f"{os.fsdecode(file)}: cannot be read: {error.strerror}") from None
        digest.update(file + b"\0")
    return digest.hexdigest()


def cached(root: Path, key: tuple[str, ...], stamp: str, max_pixels: int, make: Callable[[], Index]) -> Index:
    """What `make` gives, from the cache if it was made from the same before.

    Args:
        root: of the data set.
        key: what else tells its index from others of this root.
        stamp: what it is made from: an index with another stamp is made anew.
    """
    path = cache_path(root, *key)
    if path is not None and stamp_in(path) == stamp:
        with contextlib.suppress(DataError):  # damaged: it is made again
            return open_file(path, max_pixels=max_pixels)
    return stored(make(), path, stamp)


def stored(index: Index, path: Path | None, stamp: str = "") -> Index:
    """The same index, mapped from the cache at `path`, or from a temporary file where that cannot be written."""
    if path is not None:
        with contextlib.suppress(OSError):
            write(index, path, stamp)
            return open_file(path, max_pixels=index.max_pixels, root=index.root, trusted=True)
    try:
        descriptor, name = tempfile.mkstemp(SUFFIX, "burn-engine-")
        os.close(descriptor)
        write(index, Path(name), stamp)
    except OSError:
        return index  # no place at all: every process has its own
    mapped = open_file(Path(name), max_pixels=index.max_pixels, root=index.root, trusted=True)
    weakref.finalize(mapped.names, _forget, name)  # which the same images in another place share
    return mapped


def _forget(name: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(name)


# ------------------------------------------------------------------------------------------------ indexes that travel


def open_travelled(path: Path, max_pixels: int) -> Index:
    """An index file that `data.train` names. Nothing is looked at but a few of its images.

    Raises:
        DataError: it is not one, or is that of a folder that is not here.
    """
    with _whole(path):
        header, first, mapped = _mapped(path)
        index = _index_of(path, header, first, mapped, max_pixels, None, trusted=False)
        beside = Path(os.path.normpath(path.absolute().parent / os.fsdecode(_bytes(header["from_here"]))))
    some = range(0, len(index), max(1, len(index) // _LOOKED_AT))  # any one of them may have gone since
    for root in (beside, index.root):
        moved = _moved(index, root)
        if not some or any(os.path.exists(moved.location(row)[0]) for row in some):
            return moved
    missing = index.location(0)[0].decode("utf-8", "backslashreplace")
    raise DataError(f"{path}: is the index of another place: {missing} is not here; {HOW_TO_MAKE}")


def verify(path: Path) -> None:
    """Compare every column of an index file with its checksum, however large it is.

    Raises:
        DataError: one is damaged.
    """
    with _whole(path):
        header, first, mapped = _mapped(path)
        for place in header["columns"]:
            at = first + place["at"]
            end = at + place["count"] * np.dtype(_COLUMNS[place["name"]]).itemsize
            if not 0 <= at <= end <= len(mapped):
                raise ValueError("it is cut short")
            found = 0
            for part in range(at, end, 1 << 24):
                found = zlib.crc32(mapped[part : min(end, part + (1 << 24))], found)
            if found != place["crc32"]:
                raise ValueError(f"its column {place['name']} is damaged")


def short_pieces(index: Index) -> list[str]:
    """Images of an index that no longer lie where it says: the first of each shard that is gone or too short."""
    assert index.pieces is not None
    ends = np.zeros(len(index.pieces.files), dtype=np.int64)
    np.maximum.at(ends, index.pieces.file, index.pieces.offset + index.pieces.length)
    found = []
    for file, end in zip(index.pieces.files, ends.tolist(), strict=True):
        size = os.path.getsize(file) if os.path.exists(file) else -1
        if size < end:
            found.append(
                f"{os.fsdecode(file)}: " + ("is gone" if size < 0 else f"{size:,} bytes, an image ends at {end:,}")
            )
    return found


def _moved(index: Index, root: Path) -> Index:
    if not index.pieces or root == index.root:
        return index.at(root)
    old, new = os.fsencode(index.root), os.fsencode(root)
    return index.at(root, [os.path.join(new, os.path.relpath(file, old)) for file in index.pieces.files])
