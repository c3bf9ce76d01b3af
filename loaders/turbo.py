"""Batches that threads decode and crop in the compiled core (`turbo.c`), without Python's lock."""

from __future__ import annotations

import ctypes
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loaders import core
from loaders.contract import CropMemory, HostBatch, Order
from loaders.decode import JPEGS, RAW
from loaders.errors import starting
from loaders.host import Row, load_row
from loaders.index import Index
from loaders.sampler import Plan
from loaders.views import View

_SKIP, _JPEG, _RAW = -1, 0, 1  # how the core takes a row's bytes
DONE, WARNED = 0, 3  # status of a row; any other leaves it to the host. WARNED: done in full, though it is damaged


class _View(ctypes.Structure):
    _fields_ = (("size", ctypes.c_int32), ("cubic", ctypes.c_int32), ("out", ctypes.c_void_p))


class _Job(ctypes.Structure):
    _fields_ = (
        ("num_rows", ctypes.c_int32),
        ("num_views", ctypes.c_int32),
        ("max_pixels", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("kind", "path", "data", "offset", "length", "width", "height")),
        *((name, ctypes.c_void_p) for name in ("windows", "flip", "views", "status")),
        ("next", ctypes.c_int32),
    )


Memory = Callable[[NDArray[np.int64]], tuple[NDArray[np.uint64], object]]


class Cut:
    """What of each row is cut, for the core.

    Args:
        views: V of them.
        axes: [b, V, 2, 4]: (low, high, start, scale) of x and y. Output pixel o is centered at
            start + (o + 0.5) · scale and sees source pixels from low to high.
        flip: [b, V] bool.
        crops: G x uint8 [k, b, size, size, 3] to write to, see `contract.CropMemory`.
    """

    def __init__(
        self, views: tuple[View, ...], axes: NDArray[np.float64], flip: NDArray[np.bool_], crops: list[Tensor]
    ) -> None:
        self.views, self.crops = views, crops
        self.axes = np.ascontiguousarray(axes, dtype=np.float64)
        self.flip = np.ascontiguousarray(flip, dtype=np.uint8)

    @classmethod
    def of(cls, plan: Plan, views: tuple[View, ...], crops: list[Tensor]) -> Cut:
        """What a plan asks for."""
        axes = np.empty((*plan.windows.shape[:2], 2, 4))
        size = np.array([view.size for view in views])
        for axis, first in ((0, 1), (1, 0)):  # x has left and right, the odd columns
            start, extent = plan.windows[:, :, first], plan.windows[:, :, first + 2]
            low, high = plan.sees[:, :, first], plan.sees[:, :, first + 2]
            axes[:, :, axis] = np.stack((low, high, start, extent / size), axis=2)
        return cls(views, axes, plan.flip, crops)


class Job:
    """Rows of one batch for the core.

    Args:
        index: the data set.
        rows: [b] of the index.
        cut: what to cut from each; without it everything is decoded and nothing is kept.
        memory: gives the address of each row's bytes, and what has to live as long as they are used.

    Attributes:
        status: [b], what became of each row.
        others: rows that the core leaves to the host, because they are not JPEG or known to be bad.
    """

    def __init__(
        self, index: Index, rows: NDArray[np.int64], cut: Cut | None = None, memory: Memory | None = None
    ) -> None:
        count = len(rows)
        format = index.format[rows]
        kind = np.where(np.isin(format, JPEGS), _JPEG, np.where(format == RAW, _RAW, _SKIP)).astype(np.int32)
        kind[[row in index.problems for row in rows.tolist()]] = _SKIP
        locations = [index.location(row) for row in rows.tolist()]
        if memory is None:
            path = (ctypes.c_char_p * count)(*(location[0] for location in locations))
            data = np.zeros(count, dtype=np.uint64)
        else:
            path = (ctypes.c_char_p * count)()
            data, self._memory = memory(rows)
        outs = [crop[k] for crop in cut.crops for k in range(len(crop))] if cut else []
        views = cut.views if cut else ()
        c_views = (_View * max(len(views), 1))(
            *(_View(v.size, v.interpolation == "bicubic", out.data_ptr()) for v, out in zip(views, outs, strict=True))
        )
        self.status = np.full(count, -1, dtype=np.int32)
        arrays: dict[str, NDArray[Any]] = {
            "kind": kind,
            "data": data,
            "offset": np.array([location[1] for location in locations], dtype=np.int64),
            "length": np.array([location[2] for location in locations], dtype=np.int64),
            "width": np.ascontiguousarray(index.width[rows], dtype=np.int32),
            "height": np.ascontiguousarray(index.height[rows], dtype=np.int32),
            "windows": cut.axes if cut else np.zeros(0),
            "flip": cut.flip if cut else np.zeros(0),
            "status": self.status,
        }
        self.others = np.flatnonzero(kind == _SKIP).tolist()
        self._kept = (path, c_views, outs, arrays)  # the core has only their addresses
        self._job = _Job(
            num_rows=count,
            num_views=len(views),
            max_pixels=index.max_pixels,
            path=ctypes.addressof(path),
            views=ctypes.addressof(c_views),
            **{name: array.ctypes.data for name, array in arrays.items()},
        )

    def run(self, workspace: int) -> None:
        """Work on rows until none is left; several threads may, each with a workspace of its own."""
        core.load()[0].turbo_run(ctypes.addressof(self._job), workspace)

    def run_alone(self) -> None:
        """Work on all rows in this thread."""
        workspace = core.load()[0].turbo_workspace()
        try:
            self.run(workspace)
        finally:
            core.load()[0].turbo_free(workspace)


class Workers:
    """Threads with a workspace each, which do what they are given in the order in which it comes.

    Raises:
        LoaderError: the system refuses another thread.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="turbo")
        self._all = [core.load()[0].turbo_workspace() for _ in range(count)]
        self._free: SimpleQueue[int] = SimpleQueue()
        for workspace in self._all:
            self._free.put(workspace)

    def start(self, work: Callable[[int], None]) -> list[Future[None]]:
        """Let all threads do some work together, each with its workspace."""
        with starting(f"{self.count} threads"):
            return [self._pool.submit(self._run, work) for _ in range(self.count)]

    def _run(self, work: Callable[[int], None]) -> None:
        workspace = self._free.get()
        try:
            work(workspace)
        finally:
            self._free.put(workspace)

    def close(self) -> None:
        """End the threads and free their memory."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        while self._all:
            core.load()[0].turbo_free(self._all.pop())


class _Batch:
    """A batch in the making; the first thread that comes to it plans it for all."""

    def __init__(self, batches: Batches, positions: list[int]) -> None:
        self.positions, self._order, self._batches = positions, batches.order, batches
        self._lock = threading.Lock()
        self._job: Job | None = None
        self.plan: Plan
        self.crops: list[Tensor]
        self._others: deque[int]
        self._by_host: dict[int, Row] = {}
        self.running = batches.workers.start(self._work)

    def _work(self, workspace: int) -> None:
        job = self._prepare()
        job.run(workspace)
        while True:
            try:
                row = self._others.popleft()
            except IndexError:
                return
            self._by_host[row] = self._load(row)

    def _prepare(self) -> Job:
        with self._lock:
            if self._job is None:
                of, stream = self._batches, self._order.stream
                self.plan = stream.plan(self.positions)
                self.crops = of.memory.crops(len(self.positions))
                cut = Cut.of(self.plan, stream.views, self.crops)
                job = Job(stream.index, self.plan.image, cut, of.source)
                self._others = deque(job.others)
                self._job = job
            return self._job

    def _load(self, row: int) -> Row:
        return load_row(self._order.stream, self.plan, row, self.positions[row], replace=self._order.replace)

    def done(self) -> HostBatch:
        """Wait for it; what the core gave up on is done, or found bad, by the host."""
        for future in self.running:
            future.result()
        assert self._job is not None
        stream, plan = self._order.stream, self.plan
        image, color = plan.image, plan.color
        bad: list[tuple[str, str]] = []
        kept = np.ones(len(self.positions), dtype=np.bool_)
        for row in np.flatnonzero(self._job.status != DONE).tolist():
            sample, found = self._by_host.get(row) or self._load(row)
            bad += found
            if sample is None:
                kept[row] = False
                continue
            image[row], color[row], views = sample
            for group, crop in zip(stream.groups, self.crops, strict=True):
                for number, view in enumerate(group):
                    crop[number, row] = views[view]
        if kept.all():
            return HostBatch.of(stream, image, color, self.crops, bad)
        rows = torch.from_numpy(np.flatnonzero(kept))
        return HostBatch.of(stream, image[kept], color[kept], [crop[:, rows] for crop in self.crops], bad)


class Batches:
    """The iterator of a back end that uses the core.

    Args:
        order: what to load.
        prefetch: batches that are worked on ahead of the one in use.
        source: see `memory` of `Job`.
        on_close: called at the end.
    """

    def __init__(
        self, order: Order, *, prefetch: int, source: Memory | None = None, on_close: Callable[[], None] | None = None
    ) -> None:
        self.order, self.source = order, source
        self.memory = CropMemory(order.stream, pinned=order.device.type == "cuda")
        self.workers = Workers(max(1, order.workers))
        self._positions, self._prefetch, self._on_close = iter(order.positions), prefetch, on_close
        self._ahead: deque[_Batch] = deque()
        self._fill()

    def _fill(self) -> None:
        wanted = self._prefetch + 1 - len(self._ahead)
        self._ahead.extend(_Batch(self, positions) for positions in islice(self._positions, wanted))

    def __iter__(self) -> Iterator[HostBatch]:
        return self

    def __next__(self) -> HostBatch:
        self._fill()
        if not self._ahead:
            raise StopIteration
        return self._ahead.popleft().done()

    def close(self) -> None:
        """End the threads; free memory and files."""
        self._ahead.clear()
        self._positions = iter(())
        self.workers.close()
        if self._on_close:
            self._on_close()
            self._on_close = None
