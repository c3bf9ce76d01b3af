"""Headers of all images of a data set: by the compiled core where they are JPEG, by Pillow where they are not, or where
the core was not built; by many threads, because a network file system answers many requests at once."""

from __future__ import annotations

import ctypes
import errno
import io
import logging
import os
import stat
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from loaders import core
from loaders.decode import Header, read_header
from loaders.errors import DataError
from loaders.index import Index, Names, Pieces
from loaders.index_file import too_large
from loaders.machine import cores

THREADS = 64
"""Requests to the file system at a time."""
_FOUND, _OTHER, _EMPTY, _IRREGULAR = 0, 1, 2, 3  # what the core says of a row; less is an errno
_EVERY = 0.5  # seconds between two looks at the progress
_MANY = 10_000  # images from which on progress is shown
_SAID_EVERY = 30  # seconds between two lines of it in a log
logger = logging.getLogger("burn.loaders")


class _Job(ctypes.Structure):
    _fields_ = (
        ("num_rows", ctypes.c_int64),
        ("rows", ctypes.c_void_p),
        ("base", ctypes.c_int32),
        ("only_facts", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("names", "ends", "offset", "length")),
        *((name, ctypes.c_void_p) for name in ("size", "modified", "width", "height", "status")),
        ("next", ctypes.c_int64),
    )


class Facts(NamedTuple):
    """What the headers of N images say."""

    size: NDArray[np.int64]
    """[N], bytes; -1 where there is no file. Empty for pieces."""
    modified: NDArray[np.int64]
    """[N], nanoseconds. Empty for pieces."""
    width: NDArray[np.int32]
    height: NDArray[np.int32]
    format: NDArray[np.bytes_]
    problems: dict[int, str]
    unread: set[int]
    """Rows of `problems` that the machine did not let us read."""

    @classmethod
    def empty(cls, count: int, *, are_files: bool) -> Facts:
        """Room for N images of which nothing is known."""
        files = count if are_files else 0
        return cls(
            np.full(files, -1, dtype=np.int64),
            np.zeros(files, dtype=np.int64),
            np.ones(count, dtype=np.int32),
            np.ones(count, dtype=np.int32),
            np.zeros(count, dtype="S8"),
            {},
            set(),
        )


class _Places(NamedTuple):
    """Where N images lie: files below a folder, or pieces of one file; both are open as `base`."""

    base: int
    names: Names | None = None
    offset: NDArray[np.int64] | None = None
    length: NDArray[np.int64] | None = None

    def open(self, row: int) -> BinaryIO:
        """The bytes of an image as a file; a pipe is opened without waiting for its writer."""
        if self.names is not None:
            flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
            return open(os.open(self.names[row], flags, dir_fd=self.base), "rb")
        assert self.offset is not None and self.length is not None
        return io.BufferedReader(_Slice(self.base, int(self.offset[row]), int(self.length[row])))


def of_files(root: Path, base: Path, names: Names) -> Facts:
    """Read the headers of N files.

    Args:
        root: what they belong to, for the progress bar.
        base: the folder that their names are relative to.

    Raises:
        DataError: the folder cannot be opened.
    """
    facts = Facts.empty(len(names), are_files=True)
    folder = _open(base)
    try:
        _read(f"indexing {root}", _Places(folder, names), facts, None)
    finally:
        os.close(folder)
    return facts


def of_pieces(root: Path, pieces: Pieces) -> Facts:
    """Read the headers of N images that are pieces of other files; see `of_files`."""
    facts = Facts.empty(len(pieces.file), are_files=False)
    order = np.argsort(pieces.file, kind="stable")
    starts = np.searchsorted(pieces.file[order], np.arange(len(pieces.files) + 1))
    is_quiet = len(pieces.file) < _MANY
    for number in tqdm(range(len(pieces.files)), f"indexing {root}", unit=" shards", disable=is_quiet or None):
        rows = order[starts[number] : starts[number + 1]]
        shard = _open(Path(os.fsdecode(pieces.files[number])))
        try:
            _read("", _Places(shard, None, pieces.offset, pieces.length), facts, rows)
        finally:
            os.close(shard)
    return facts


def refreshed(index: Index, base: Path) -> Index:
    """An index of files in which every file that has changed, or could not be read before, was read again; the same
    index where there is none."""
    folder = _open(base)
    try:
        now, rows_changed = _changed(index, folder)
        changed = {*rows_changed, *index.unread}
        if not changed:
            return index
        rows = np.array(sorted(changed), dtype=np.int64)
        facts = now._replace(
            width=index.width.copy(),
            height=index.height.copy(),
            format=index.format.copy(),
            problems={row: text for row, text in index.problems.items() if row not in changed},
        )
        for array in (facts.width, facts.height):
            array[rows] = 1
        facts.format[rows] = b""
        _read(f"indexing {index.root}", _Places(folder, index.names), facts, rows)
    finally:
        os.close(folder)
    return replace(index, file=None, **columns(facts, index.max_pixels))


def changed_files(index: Index) -> list[str]:
    """Which files of an index are no longer what they were: names with what is different, in their order.

    Raises:
        DataError: the folder cannot be opened.
    """
    assert index.size is not None
    folder = _open(index.root)
    try:
        now, rows = _changed(index, folder)
    finally:
        os.close(folder)
    return [
        f"{index.path(row)}: "
        + (
            "is gone"
            if now.size[row] < 0
            else f"{now.size[row]:,} bytes, was {index.size[row]:,}"
            if now.size[row] != index.size[row]
            else "was written again"
        )
        for row in rows
    ]


def _changed(index: Index, folder: int) -> tuple[Facts, list[int]]:
    """Sizes and times of the files of an index today, and the rows in which they differ from then."""
    assert index.size is not None and index.modified is not None
    now = Facts.empty(len(index), are_files=True)
    _stat(_Places(folder, index.names), now, f"looking at {index.root}")
    return now, np.flatnonzero((now.size != index.size) | (now.modified != index.modified)).tolist()


def columns(facts: Facts, max_pixels: int) -> dict[str, Any]:
    """The fields of an `Index` that come from the headers."""
    return {
        "width": facts.width,
        "height": facts.height,
        "format": facts.format,
        "size": facts.size if len(facts.size) else None,
        "modified": facts.modified if len(facts.size) else None,
        "problems": facts.problems | too_large(facts.width, facts.height, max_pixels),
        "unread": frozenset(facts.unread),
        "max_pixels": max_pixels,
    }


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def _read(title: str, places: _Places, facts: Facts, rows: NDArray[np.int64] | None) -> None:
    """Read headers into `facts`: of all images, or of some rows."""
    status = _by_core(title, places, facts, rows, only_facts=False) if not core.why_missing() else None
    chosen = np.arange(len(facts.width)) if rows is None else rows
    if status is None:
        _by_pillow(title, places, facts, chosen.tolist())
        return
    found = status[chosen]
    # Once more, one at a time: too many open files, or a server that was busy.
    failed = chosen[found < 0]
    if len(failed):
        status[failed] = _by_core("", places, facts, failed, only_facts=False, threads=1)[failed]
        found = status[chosen]
    facts.format[chosen[found == _FOUND]] = b"JPEG"
    _say(facts, chosen, found)
    _by_pillow(title, places, facts, chosen[found == _OTHER].tolist())


def _stat(places: _Places, facts: Facts, title: str) -> None:
    if not core.why_missing():
        _by_core(title, places, facts, None, only_facts=True)
        return
    assert places.names is not None
    for row, name in enumerate(places.names):
        try:
            found = os.stat(name, dir_fd=places.base)
        except OSError:
            continue
        facts.size[row], facts.modified[row] = found.st_size, found.st_mtime_ns


def _say(facts: Facts, rows: NDArray[np.int64], status: NDArray[np.int32]) -> None:
    for row in rows[status == _EMPTY].tolist():
        facts.problems[row] = "is empty (0 bytes)"
    for row in rows[status == _IRREGULAR].tolist():
        facts.problems[row] = "is not a file"
    for row, code in zip(rows[status < 0].tolist(), status[status < 0].tolist(), strict=True):
        _unreadable(facts, row, -code)


def _unreadable(facts: Facts, row: int, code: int) -> None:
    hint = " (a link to nothing?)" if code == errno.ENOENT else ""
    facts.problems[row] = f"cannot be read: {os.strerror(code)}{hint}"
    facts.unread.add(row)


def _by_core(
    title: str,
    places: _Places,
    facts: Facts,
    rows: NDArray[np.int64] | None,
    *,
    only_facts: bool,
    threads: int = THREADS,
) -> NDArray[np.int32]:
    """Let the core look at images; what it says of each, [N]."""
    count = len(facts.width) if rows is None else len(rows)
    status = np.zeros(len(facts.width), dtype=np.int32)
    given: dict[str, NDArray[Any] | None] = {
        "rows": rows,
        "names": places.names.blob if places.names is not None else None,
        "ends": places.names.ends if places.names is not None else None,
        "offset": places.offset,
        "length": places.length,
        "size": facts.size,
        "modified": facts.modified,
        "width": facts.width,
        "height": facts.height,
        "status": status,
    }
    job = _Job(num_rows=count, base=places.base, only_facts=only_facts, next=0)
    for name, array in given.items():
        if array is not None:
            assert array.flags.c_contiguous
            setattr(job, name, array.ctypes.data)
    run = core.load()[0].turbo_headers
    # Threads of their own, not a pool: when the main one is interrupted, they have to see that nothing is left to do.
    workers = [
        threading.Thread(target=run, args=(ctypes.byref(job),), daemon=True)
        for _ in range(min(threads, -(-count // 64)))
    ]
    bar = tqdm(total=count, desc=title, unit=" images", disable=None if title and count >= _MANY else True)
    started = said = time.monotonic()
    running = []
    try:
        for worker in workers:
            try:
                worker.start()
            except RuntimeError:  # the system allows no more: fewer do, or this one alone
                break
            running.append(worker)
        if not running:
            run(ctypes.byref(job))
        for worker in running:
            while worker.is_alive():
                worker.join(_EVERY)
                done = min(job.next, count)
                bar.update(done - bar.n)
                if title and count >= _MANY and time.monotonic() - said >= _SAID_EVERY:
                    said = time.monotonic()
                    left = (said - started) * (count - done) / max(done, 1)
                    logger.info(f"{title}: {done:,} of {count:,} images, {left:.0f} s left")
    finally:
        job.next = count
        for worker in running:
            worker.join()
        bar.close()
    return status


def _by_pillow(title: str, places: _Places, facts: Facts, rows: list[int]) -> None:
    """Let Pillow look at some images."""

    def look(row: int) -> tuple[int, Header | OSError]:
        try:
            with places.open(row) as file:
                if places.names is not None:
                    found = os.fstat(file.fileno())
                    facts.size[row], facts.modified[row] = found.st_size, found.st_mtime_ns
                    if not stat.S_ISREG(found.st_mode):
                        return row, Header.unusable("is not a file")
                    if not found.st_size:
                        return row, Header.unusable("is empty (0 bytes)")
                return row, read_header(file)
        except OSError as error:
            return row, error

    is_quiet = not title or len(rows) < _MANY
    with ThreadPoolExecutor(min(THREADS, 4 * cores())) as pool:
        looked: Iterable[tuple[int, Header | OSError]]
        try:
            looked = pool.map(look, rows)
        except RuntimeError:  # the system allows no more threads
            looked = map(look, rows)
        for row, header in tqdm(looked, title, len(rows), unit=" images", disable=is_quiet or None):
            if isinstance(header, OSError):
                _unreadable(facts, row, header.errno or errno.EIO)
                continue
            facts.width[row], facts.height[row] = header.width, header.height
            facts.format[row] = header.format.encode()
            if header.problem:
                facts.problems[row] = header.problem


class _Slice(io.RawIOBase):
    """A part of an open file as a file, so that a header is read without the rest."""

    def __init__(self, file: int, offset: int, length: int) -> None:
        self._file, self._offset, self._length, self._at = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, to: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(0, to + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        content = os.pread(self._file, max(0, min(len(buffer), self._length - self._at)), self._offset + self._at)
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)
