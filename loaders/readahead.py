"""With `data.order: blocks` one knows what comes: the next window's shards are asked for while this one's are used."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Iterable, Iterator

import numpy as np

from loaders.index import Index
from loaders.order import Blocks
from loaders.sampler import Stream

_PART = 128 << 10  # bytes; Linux cuts what one call asks for to its readahead, which is this by default


def read_ahead(stream: Stream, positions: Iterable[list[int]]) -> Iterable[list[int]]:
    """The positions as they are; where images lie in shards and come in blocks, their files are read ahead.

    It is advice: a system or file system that does not take it reads later, and nothing else changes.
    """
    pieces = stream.index.pieces
    if not isinstance(stream.order, Blocks) or pieces is None or len(pieces.files) < 2:
        return positions
    return _ahead(stream.index, stream.order, positions) if hasattr(os, "posix_fadvise") else positions


def _ahead(index: Index, order: Blocks, positions: Iterable[list[int]]) -> Iterator[list[int]]:
    try:
        adviser = _Adviser(index)
    except RuntimeError:  # the system allows no more threads
        yield from positions
        return
    asked = -1  # the last window that was asked for, counted over epochs
    try:
        for batch in positions:
            epoch, place = divmod(batch[-1], len(index))
            wanted = epoch * order.windows + order.window_of(epoch, place) + 1
            for window in range(max(asked + 1, wanted - 1), wanted + 1):
                for rows in order.rows(*divmod(window, order.windows)):
                    adviser.blocks.put(rows)
            asked = max(asked, wanted)
            yield batch
    finally:
        adviser.leave()


class _Adviser(threading.Thread):
    """Asks in a thread of its own: a call waits where the disk has many requests already."""

    def __init__(self, index: Index) -> None:
        super().__init__(name="read ahead", daemon=True)
        self.blocks: queue.SimpleQueue[range | None] = queue.SimpleQueue()
        """Rows of one shard each; None ends the thread."""
        self._index, self._leaves = index, threading.Event()
        self.start()

    def run(self) -> None:
        while (rows := self.blocks.get()) is not None:
            try:
                self._ask(rows)
            except OSError:
                pass  # a file system without advice, or no file: who reads the image says what is wrong

    def _ask(self, rows: range) -> None:
        pieces, part = self._index.pieces, slice(rows.start, rows.stop)
        assert pieces is not None
        first, end = int(pieces.offset[part].min()), int(np.max(pieces.offset[part] + pieces.length[part]))
        file = os.open(pieces.files[pieces.file[rows.start]], os.O_RDONLY)
        try:
            for offset in range(first, end, _PART):
                if self._leaves.is_set():
                    return
                os.posix_fadvise(file, offset, min(_PART, end - offset), os.POSIX_FADV_WILLNEED)
        finally:
            os.close(file)

    def leave(self) -> None:
        """End the thread."""
        self._leaves.set()
        self.blocks.put(None)
