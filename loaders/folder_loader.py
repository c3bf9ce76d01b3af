"""Back end `folder`: decode once with torchvision, cut every view from it, in the workers of a DataLoader.

Runs everywhere, needs nothing to be built, and is what the other back ends are compared with.
"""

from __future__ import annotations

import gc
import multiprocessing
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from loaders import contract, machine
from loaders.contract import HostBatch, Order
from loaders.errors import DataError, LoaderError, starting
from loaders.host import load_batch
from loaders.views import View


class Options(contract.Options):
    """`data.options` of this back end."""

    prefetch: int = Field(default=3, ge=1)
    """Micro-batches that each worker holds ready."""

    @classmethod
    def preference(cls, on_gpu: bool, root: Path | None) -> int:
        """Where nothing faster is there."""
        return 1

    @classmethod
    def about(cls) -> str:
        """It always works."""
        return "works: torchvision's decoders"

    def warnings(self, views: tuple[View, ...], micro_batch: int, workers: int) -> list[str]:
        """Batches go through shared memory, of which containers have little."""
        needed = workers * (self.prefetch + 1) * micro_batch * sum(3 * view.size**2 for view in views)
        return [f"{text}, or set data.backend=turbo" for text in lacks_shared_memory(needed, workers)]

    def batches(self, order: Order) -> Iterator[HostBatch]:
        """See `contract.Options`."""
        return in_workers(order, partial(load_batch, order.stream, replace=order.replace), self.prefetch)


def lacks_shared_memory(needed: int, workers: int) -> list[str]:
    """A warning where `workers` processes need more bytes than /dev/shm has."""
    free = shutil.disk_usage("/dev/shm").free
    if needed <= free:
        return []
    return [
        f"/dev/shm has {free / 2**20:.0f} MiB free, the {workers} workers may need {needed / 2**20:.0f} and would end "
        "with a bus error; start docker with --shm-size 16g, lower data.workers"
    ]


def in_workers(order: Order, load: Callable[[list[int]], HostBatch], prefetch: int) -> Iterator[HostBatch]:
    """Batches that `load` makes of lists of positions, in the processes of a DataLoader.

    Args:
        prefetch: batches that each process holds ready.

    Raises:
        LoaderError: the processes cannot be started.
    """
    loader = _Loader(
        _Positions(load),
        batch_sampler=order.positions,  # any iterable of lists will do, it need not end
        num_workers=order.workers,
        collate_fn=_same,
        worker_init_fn=_ignore_signals,
        prefetch_factor=prefetch if order.workers else None,
        pin_memory=order.device.type == "cuda",
        # Workers only read and decode: they start by fork, so that the index is shared and not copied.
        multiprocessing_context="fork" if order.workers else None,
    )
    return _Batches(loader)


class _Iterator(_MultiProcessingDataLoaderIter):
    def __del__(self) -> None:
        if hasattr(self, "_workers_status"):  # else not all of its workers could be started, and `_Batches` ends them
            super().__del__()


class _Loader(DataLoader[Any]):
    def _get_iterator(self) -> Any:
        return _Iterator(self) if self.num_workers else super()._get_iterator()


class _Batches:
    """The iterator of a DataLoader whose workers end for certain, and whose errors are one line."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        before = set(multiprocessing.active_children())
        # What is garbage by now, and holds threads that a worker does not have, must not be collected there: DALI's
        # pipelines end the process that does.
        gc.collect()
        gc.freeze()
        try:
            with starting(f"data.backend: {loader.num_workers} worker processes"):
                self._iterator: Any = iter(loader)
        except LoaderError:
            _end(set(multiprocessing.active_children()) - before)
            raise
        finally:
            gc.unfreeze()

    def __iter__(self) -> Iterator[HostBatch]:
        return self

    def __next__(self) -> HostBatch:
        try:
            batch = next(self._iterator)
        except RuntimeError as error:  # of a process or of the thread that pins memory, never of an image
            raise LoaderError(
                f"data.backend: {str(error).splitlines()[0]}; if memory ran out, lower data.workers"
            ) from None
        if isinstance(batch, DataError):
            raise batch
        return batch

    def close(self) -> None:
        """End the workers. They ignore SIGTERM, so Python's own way of ending them at exit would wait forever."""
        workers = getattr(self._iterator, "_workers", [])
        if workers:
            self._iterator._shutdown_workers()
        _end(workers)
        self._iterator = iter(())


def _end(workers: Iterable[Any]) -> None:
    for worker in workers:
        if worker.is_alive():
            worker.kill()
            worker.join()


class _Positions(Dataset[Any]):
    def __init__(self, load: Callable[[list[int]], HostBatch]) -> None:
        self.load = load

    def __getitems__(self, positions: list[int]) -> HostBatch | DataError:
        try:
            return self.load(positions)
        except DataError as error:  # raised in the worker it would come out wrapped in a traceback
            return error


def _ignore_signals(worker: int) -> None:
    # A signal to the whole job is for the training process, which stops in order and then ends its workers.
    for number in machine.SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _same(batch: Any) -> Any:
    return batch
