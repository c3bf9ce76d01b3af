"""Independent pieces of work on all cores of a machine; each result is kept as it comes, so that a call that was killed
continues where it was."""

from __future__ import annotations

import contextlib
import fcntl
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

from engine.errors import FolderError, MachineError
from engine.log import duration, logger
from loaders.files import lock

SAYS_EVERY = 10.0
"""Seconds between two lines of progress."""


class Unit(NamedTuple):
    """A piece of work."""

    key: dict[str, Any]
    """All that its result depends on, as plain data."""
    work: Callable[..., Any]
    """A function of a module, which other processes can import; returns plain data."""
    arguments: tuple[Any, ...]
    size: float
    """About how long it takes, in any unit: the longest come first, and the time left is guessed from it."""


class Ledger:
    """Results by key in a file, a line of JSON each; held against other processes until it is closed.

    Args:
        path: the file; its folder is made.

    Raises:
        FolderError: another process holds it.
        OSError: it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self._file = path, open(path, "a+b", buffering=0)
        with contextlib.suppress(OSError):  # there are no locks on some disks
            if not lock(self._file.fileno(), fcntl.lockf):  # which workers do not inherit
                self._file.close()
                raise FolderError(f"{path}: another process is working here; wait for it or name another folder")
        self._results: dict[str, Any] = {}
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1  # what follows was cut where a call was killed
        self._file.truncate(whole)
        for line in content[:whole].splitlines():
            with contextlib.suppress(ValueError, TypeError, KeyError):  # a line changed by hand is done again
                row = json.loads(line)
                self._results[_name(row["key"])] = row["result"]

    def __contains__(self, unit: Unit) -> bool:
        return _name(unit.key) in self._results

    def __getitem__(self, unit: Unit) -> Any:
        return self._results[_name(unit.key)]

    def add(self, unit: Unit, result: Any) -> None:
        """Keep a result."""
        line = json.dumps({"key": unit.key, "result": result}).encode() + b"\n"
        self._results[_name(unit.key)] = json.loads(line)["result"]  # as a later call reads it
        while line:
            line = line[self._file.write(line) :]

    def close(self) -> None:
        """Let others write to it."""
        self._file.close()


def _name(key: dict[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)


def run(
    units: Sequence[Unit],
    ledger: Ledger,
    *,
    prepare: Callable[[], None],
    jobs: int,
    title: str,
) -> list[Any]:
    """Do what the ledger does not have yet.

    Args:
        prepare: called first in every process that works; like `Unit.work` a function that others can import.
        jobs: processes; 1 works in this one.
        title: what the lines of progress begin with.

    Returns:
        The result of every unit, in their order.

    Raises:
        MachineError: a worker was killed. What is done is kept.
    """
    rest = sorted((unit for unit in units if unit not in ledger), key=lambda unit: -unit.size)
    if rest:
        progress = _Progress(title, len(units) - len(rest), rest)
        works = _here(rest, prepare) if jobs == 1 else _apart(rest, prepare, min(jobs, len(rest)))
        with contextlib.closing(works):
            for unit, result in works:
                ledger.add(unit, result)
                progress.done(unit)
    return [ledger[unit] for unit in units]


class _Progress:
    def __init__(self, title: str, before: int, rest: Sequence[Unit]) -> None:
        self.title, self.count, self.total = title, before, before + len(rest)
        self.left, self.did = sum(unit.size for unit in rest), 0.0
        self.started = self.said = time.monotonic()
        if before:
            logger.info(f"{title}: {before:,} of {self.total:,} are there from an earlier call")

    def done(self, unit: Unit) -> None:
        self.count, self.left, self.did = self.count + 1, self.left - unit.size, self.did + unit.size
        now = time.monotonic()
        if now - self.said >= SAYS_EVERY or self.count == self.total:
            self.said = now
            elapsed = now - self.started
            times = f"{duration(elapsed)}, {duration(elapsed * max(self.left, 0) / self.did)} left"
            logger.info(f"{self.title}: {self.count:,} of {self.total:,}, {times}")


def _here(units: Sequence[Unit], prepare: Callable[[], None]) -> Generator[tuple[Unit, Any], None, None]:
    prepare()
    for unit in units:
        yield unit, unit.work(*unit.arguments)


def _apart(units: Sequence[Unit], prepare: Callable[[], None], jobs: int) -> Generator[tuple[Unit, Any], None, None]:
    context = multiprocessing.get_context("forkserver")  # not forked from this process, whose libraries have threads
    others = multiprocessing.active_children()
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_begin, initargs=(prepare,))
    waiting = {pool.submit(unit.work, *unit.arguments): unit for unit in units}
    try:
        while waiting:
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                result = future.result()
                yield waiting.pop(future), result
    except BrokenProcessPool:
        raise MachineError(
            "a worker process was killed or could not begin, perhaps for lack of memory; what is done is kept, start "
            f"again with fewer than {jobs} --jobs"
        ) from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        if waiting:  # what a worker has in hand would take its time
            for child in multiprocessing.active_children():
                if child not in others:
                    child.terminate()


def _begin(prepare: Callable[[], None]) -> None:
    """In a worker: it leaves Ctrl-C to the process that started it, and ends when that is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def outlive() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=outlive, daemon=True).start()
    prepare()
