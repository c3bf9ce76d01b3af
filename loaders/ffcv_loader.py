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


class _Mapped:
    """Addresses of images in the mapped file."""

    def __init__(self, index: Index, *, hold: bool) -> None:
        assert index.pieces is not None
        self._offset = index.pieces.offset.view(np.uint64)
        file = os.open(index.pieces.files[0], os.O_RDONLY)
        try:
            size = os.fstat(file).st_size
            if hold and size > (free := memory()["MemAvailable"]):
                raise DataError(
                    f"data.options.strategy: ram needs {size / 2**30:.1f} GiB for {index.root}, {free / 2**30:.1f} are "
                    "free; set data.options.strategy=page_cache"
                )
            # Shared, so that the pages are the page cache's own: one copy, however many ranks.
            flags = mmap.MAP_SHARED | (mmap.MAP_POPULATE if hold else 0)
            self._map = mmap.mmap(file, size, flags=flags, prot=mmap.PROT_READ)
        finally:
            os.close(file)
        self._map.madvise(mmap.MADV_RANDOM)
        self._view = np.frombuffer(self._map, dtype=np.uint8)
        if hold:  # held against other files' pages where the limit allows; without that they are only likely to stay
            ctypes.CDLL(None).mlock(ctypes.c_void_p(self._view.ctypes.data), ctypes.c_size_t(size))

    def __call__(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.uint64], object]:
        return np.uint64(self._view.ctypes.data) + self._offset[rows], self._view

    def close(self) -> None:
        del self._view
        self._map.close()


class _Direct:
    """Addresses of images that were read past the page cache, in a buffer for each batch."""

    def __init__(self, index: Index) -> None:
        assert index.pieces is not None
        self._pieces, self._root = index.pieces, index.root
        self._size = os.path.getsize(index.pieces.files[0])
        try:
            self._file = os.open(index.pieces.files[0], os.O_RDONLY | os.O_DIRECT)
        except OSError as error:
            raise DataError(
                f"data.options.strategy: direct: {index.root} cannot be read past the page cache: {error.strerror}; "
                "set data.options.strategy=page_cache"
            ) from None

    def __call__(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.uint64], mmap.mmap]:
        start = self._pieces.offset[rows] // _BLOCK * _BLOCK
        count = -(-(self._pieces.offset[rows] + self._pieces.length[rows] - start) // _BLOCK) * _BLOCK
        place = np.concatenate(([0], np.cumsum(count)))
        buffer = mmap.mmap(-1, int(place[-1]))  # aligned to pages, and gone with the batch
        whole = memoryview(buffer)
        for at, first, length in zip(place.tolist(), start.tolist(), count.tolist(), strict=False):
            got = os.preadv(self._file, [whole[at : at + length]], first)
            if got < min(length, self._size - first):
                raise DataError(f"{self._root}: cannot be read at byte {first}; is it still the same file?")
        whole.release()
        base = np.frombuffer(buffer, dtype=np.uint8).ctypes.data
        return (base + place[:-1] + self._pieces.offset[rows] - start).astype(np.uint64), buffer

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
