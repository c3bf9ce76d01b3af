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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
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


class Pool:
    """Processes that do units of work, each with one in hand; they start with the first and stay until `close`.

    Args:
        ledger: what is done already, and where results go.
        jobs: processes; with 1 this one does the work.
    """

    def __init__(self, ledger: Ledger, jobs: int) -> None:
        self.ledger, self.jobs = ledger, jobs
        self._executor: ProcessPoolExecutor | None = None
        self._others = multiprocessing.active_children()
        self._waiting: dict[Future[Any], Unit] = {}

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, units: Sequence[Unit], title: str, *, here: bool = False) -> list[Any]:
        """Do what the ledger does not have yet.

        Args:
            title: what the lines of progress begin with.
            here: in this process, whatever `jobs` says.

        Returns:
            The result of every unit, in their order.

        Raises:
            MachineError: a worker was killed. What is done is kept.
        """
        rest = sorted((unit for unit in units if unit not in self.ledger), key=lambda unit: -unit.size)
        if rest:
            progress = _Progress(title, len(units) - len(rest), rest)
            for unit, result in self._apart(rest) if self.jobs > 1 and not here else self._here(rest):
                self.ledger.add(unit, result)
                progress.done(unit)
        return [self.ledger[unit] for unit in units]

    def _here(self, units: Sequence[Unit]) -> Iterator[tuple[Unit, Any]]:
        for unit in units:
            yield unit, unit.work(*unit.arguments)

    def _apart(self, units: Sequence[Unit]) -> Iterator[tuple[Unit, Any]]:
        if self._executor is None:
            context = multiprocessing.get_context("forkserver")  # a fork of this one would lack its libraries' threads
            self._executor = ProcessPoolExecutor(self.jobs, mp_context=context, initializer=_begin)
        try:
            self._waiting = {self._executor.submit(unit.work, *unit.arguments): unit for unit in units}
            while self._waiting:
                for future in wait(self._waiting, return_when=FIRST_COMPLETED).done:
                    result = future.result()
                    yield self._waiting.pop(future), result
        except BrokenProcessPool:
            raise MachineError(
                "a worker process was killed or could not begin, perhaps for lack of memory; what is done is kept, "
                f"start again with fewer than {self.jobs} --jobs"
            ) from None

    def close(self) -> None:
        """End the processes and close the ledger."""
        if self._executor is not None:
            self._executor.shutdown(wait=not self._waiting, cancel_futures=True)
            if self._waiting:  # what a worker has in hand would take its time
                for child in multiprocessing.active_children():
                    if child not in self._others:
                        child.terminate()
        self.ledger.close()


def _begin() -> None:
    """In a worker: it leaves Ctrl-C to the process that started it, and ends when that is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def outlive() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=outlive, daemon=True).start()


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
