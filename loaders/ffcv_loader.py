"""Back end `ffcv`: one memory-mapped `.beton` file, JPEG or raw pixels, in FFCV's format.

Only the format is FFCV's. Its Loader draws crops from a generator that no seed reaches, recompiles for every
loader and hangs when one of its threads fails, so our own core takes its place: same order, windows and pixels as
every other back end, first batch at once. Without the compiled core each image is cut on the host, as in `folder`.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from loaders import contract, core, folder_loader, turbo
from loaders.contract import HostBatch, Order
from loaders.errors import DataError
from loaders.index import Index
from loaders.machine import memory

_BLOCK = 4096  # bytes; offsets and lengths of direct reads are multiples of it
HOW_TO_INSTALL = "run `apt-get install gcc g++ pkg-config libturbojpeg0-dev libopencv-dev` and then `pip install ffcv`"
"""FFCV itself is needed for nothing here but comparisons; it has no wheels."""


class Options(contract.Options):
    """`data.options` of this back end."""

    strategy: Literal["page_cache", "ram", "direct"] = "page_cache"
    """`page_cache`: mapped, the system keeps what fits. `ram`: all of it is read at the start and held, one copy for
    all ranks of a machine. `direct`: read past the page cache, for a file much larger than memory on a fast disk."""
    prefetch: int = Field(default=2, ge=1)
    """Micro-batches that are worked on ahead of the one in use."""

    @classmethod
    def refuses(cls, root: Path) -> str:
        """It reads one kind of file."""
        if root.suffix == ".beton":
            return ""
        return (
            f"{root}: data.backend=ffcv needs a .beton file; make one with tools/convert_imagenet_to_ffcv.py, or set "
            "data.backend=turbo"
        )

    @classmethod
    def preference(cls, on_gpu: bool, root: Path | None) -> int:
        """The first choice for the files it is made for."""
        return 4 if root is not None and not cls.refuses(root) else 0

    @classmethod
    def about(cls) -> str:
        """What works, and whether FFCV itself is there to compare with."""
        ours = "works, reads and writes .beton" + (" (slowly, without the compiled core)" if core.why_missing() else "")
        # In a process of its own: its import fails in many ways, and what it starts can keep this one from ending.
        code = (
            "import ffcv, os; from importlib.metadata import version; print(version('ffcv'), flush=True); os._exit(0)"
        )
        try:
            tried = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
        except subprocess.TimeoutExpired:
            reason = "its import does not end"
        else:
            if tried.returncode == 0:
                return f"{ours}; the FFCV package is here too ({tried.stdout.strip()})"
            reason = (tried.stderr.strip().splitlines() or [f"exit code {tried.returncode}"])[-1][:160]
        return f"{ours}; the FFCV package is not needed and not usable ({reason}): {HOW_TO_INSTALL}"

    def batches(self, order: Order) -> Iterator[HostBatch]:
        """See `contract.Options`."""
        index = order.stream.index
        if problem := self.refuses(index.root):
            raise DataError(problem)
        if core.why_missing():
            return folder_loader.Options(prefetch=self.prefetch).batches(order)
        source = _Direct(index) if self.strategy == "direct" else _Mapped(index, hold=self.strategy == "ram")
        return turbo.Batches(order, prefetch=self.prefetch, source=source, on_close=source.close)


class _File:
    """A `.beton` that is held open, and has to stay as it is.

    Raises:
        DataError: it cannot be opened as `flags` ask.
    """

    def __init__(self, index: Index, flags: int = 0) -> None:
        assert index.pieces is not None
        self.pieces, self.root = index.pieces, index.root
        try:
            self.number = os.open(index.pieces.files[0], os.O_RDONLY | flags)
        except OSError as error:
            if not flags:
                raise DataError(f"{self.root}: cannot be read: {error.strerror}") from None
            raise DataError(
                f"data.options.strategy: direct: {self.root} cannot be read past the page cache: {error.strerror}; "
                "set data.options.strategy=page_cache"
            ) from None
        facts = os.fstat(self.number)
        self.size, self._modified = facts.st_size, facts.st_mtime_ns

    def must_be_the_same(self) -> None:
        """See that nobody has written to it.

        Raises:
            DataError: somebody has.
        """
        now = os.fstat(self.number)
        if (now.st_size, now.st_mtime_ns) != (self.size, self._modified):
            raise DataError(
                f"{self.root}: was written while it was read ({now.st_size:,} bytes, {self.size:,} at the start); "
                "continue with --resume once it is whole, and write new files beside old ones"
            )

    def close(self) -> None:
        if self.number >= 0:
            os.close(self.number)
            self.number = -1


class _Mapped:
    """Addresses of images in the mapped file."""

    def __init__(self, index: Index, *, hold: bool) -> None:
        self._file = _File(index)
        self._offset, size = self._file.pieces.offset.view(np.uint64), self._file.size
        try:
            if hold and size > (free := memory()["MemAvailable"]):
                raise DataError(
                    f"data.options.strategy: ram needs {size / 2**30:.1f} GiB for {index.root}, {free / 2**30:.1f} are "
                    "free; set data.options.strategy=page_cache"
                )
            # Shared, so that the pages are the page cache's own: one copy, however many ranks.
            flags = mmap.MAP_SHARED | (mmap.MAP_POPULATE if hold else 0)
            self._map = mmap.mmap(self._file.number, size, flags=flags, prot=mmap.PROT_READ)
        except BaseException:
            self._file.close()
            raise
        self._map.madvise(mmap.MADV_RANDOM)
        self._view = np.frombuffer(self._map, dtype=np.uint8)
        core.load()[0].turbo_guard()  # who cuts the file short takes pages away that are read right now
        if hold:  # held against other files' pages where the limit allows; without that they are only likely to stay
            ctypes.CDLL(None).mlock(ctypes.c_void_p(self._view.ctypes.data), ctypes.c_size_t(size))

    def __call__(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.uint64], object]:
        self._file.must_be_the_same()
        return np.uint64(self._view.ctypes.data) + self._offset[rows], self._view

    def close(self) -> None:
        del self._view
        self._map.close()
        self._file.close()


class _Direct:
    """Addresses of images that were read past the page cache, in a buffer for each batch."""

    def __init__(self, index: Index) -> None:
        self._file = _File(index, os.O_DIRECT)
        self.close = self._file.close

    def __call__(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.uint64], mmap.mmap]:
        self._file.must_be_the_same()
        offset, length = self._file.pieces.offset[rows], self._file.pieces.length[rows]
        start = offset // _BLOCK * _BLOCK
        count = -(-(offset + length - start) // _BLOCK) * _BLOCK
        place = np.concatenate(([0], np.cumsum(count)))
        buffer = mmap.mmap(-1, int(place[-1]))  # aligned to pages, and gone with the batch
        whole = memoryview(buffer)
        for at, first, size in zip(place.tolist(), start.tolist(), count.tolist(), strict=False):
            got = os.preadv(self._file.number, [whole[at : at + size]], first)
            if got < min(size, self._file.size - first):
                raise DataError(f"{self._file.root}: cannot be read at byte {first}; is it still the same file?")
        whole.release()
        base = np.frombuffer(buffer, dtype=np.uint8).ctypes.data
        return (base + place[:-1] + offset - start).astype(np.uint64), buffer
