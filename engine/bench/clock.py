"""Clocks: candidates interleaved, phases of a step, CPU time of all processes, and how measurements are summarized."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from engine.log import duration, logger, rate

WARM_UP = 6  # batches, more than any back end prefetches per worker and enough to get past its first ones
MOST_NOISE = 0.2
"""Share by which two halves of a variant's steps, or a loader's rounds, may differ; above it no ratio is printed."""
_TICKS = os.sysconf("SC_CLK_TCK")


class Candidate(NamedTuple):
    """Something to measure: `open` gives an endless iterator, with a `close` if it has to be ended."""

    name: str
    open: Callable[[], Iterator[Any]]


@dataclass
class Speed:
    """What one candidate gave, a number for each round."""

    images_per_second: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    """CPU milliseconds per image."""
    first_batch: list[float] = field(default_factory=list)
    """Seconds from opening to the first batch."""


def interleave(
    candidates: Sequence[Candidate],
    *,
    batch: int,
    batches: int,
    rounds: int,
    begin: Callable[[str], None] = lambda what: None,
) -> dict[str, Speed]:
    """Time candidates in turn (A B C A B C): each is reopened for each round, runs until what it had prefetched is
    used up, and is then timed at its steady pace.

    Args:
        batch: images in a batch of every candidate.
        batches: timed in each round, after `WARM_UP` more.
        rounds: of all candidates.
        begin: called with what comes next.
    """
    speeds = {candidate.name: Speed() for candidate in candidates}
    for number, candidate in itertools.product(range(rounds), candidates):
        begin(f"{candidate.name}, round {number + 1} of {rounds}")
        speed = speeds[candidate.name]
        opened = time.perf_counter()
        iterator = candidate.open()
        next(iterator)
        speed.first_batch.append(time.perf_counter() - opened)
        for _ in range(WARM_UP):
            next(iterator)
        cpu, started = cpu_seconds(), time.perf_counter()
        for _ in range(batches):
            next(iterator)
        seconds, cpu = time.perf_counter() - started, cpu_seconds() - cpu
        speed.images_per_second.append(batch * batches / seconds)
        speed.cpu_ms.append(1000 * cpu / (batch * batches))
        if hasattr(iterator, "close"):
            iterator.close()
    return speeds


class Progress:
    """Lines about a measurement that takes minutes: where each part begins, and while one goes on.

    Args:
        parts: how many there will be; time left is counted as if they took equally long.
        every: seconds between two lines while a part goes on.
    """

    def __init__(self, parts: int, every: float = 20.0) -> None:
        self.parts, self.every = parts, every
        self._begun, self._what, self._started = 0, "", time.perf_counter()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._remind, daemon=True)

    def begin(self, what: str) -> None:
        """The next part begins."""
        self._begun, self._what = self._begun + 1, what
        seconds, done = time.perf_counter() - self._started, self._begun - 1
        left = f", about {duration(seconds / done * (self.parts - done))} left" if done else ""
        logger.info(f"[{self._begun} of {self.parts}] {what}{left}")

    def _remind(self) -> None:
        while not self._over.wait(self.every):
            if self._what:
                logger.info(f"    {self._what}: {duration(time.perf_counter() - self._started)} since the start")

    def __enter__(self) -> Progress:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def cpu_seconds() -> float:
    """CPU time of this process and its descendants, those included that have ended and were waited for."""
    own = os.getpid()
    total, waiting = time.process_time(), [own]
    while waiting:
        process = waiting.pop()
        try:
            fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
            for thread in Path(f"/proc/{process}/task").iterdir():
                waiting += [int(child) for child in (thread / "children").read_text().split()]
        except OSError:
            continue  # it has ended
        # Its own, and of its children that ended. Ticks are 10 ms: too coarse for this process, which may be all.
        total += sum(int(ticks) for ticks in fields[13 if process == own else 11 : 15]) / _TICKS
    return total


class Phases:
    """Where a step's time goes: marks on the device's stream, read after a block of steps."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []
        self._steps: list[list[tuple[str, Any]]] = []

    def mark(self, phase: str) -> None:
        """A phase begins, the one before ends."""
        if self._cuda:
            now: Any = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self._marks.append((phase, now))

    def end_step(self) -> None:
        """The last phase of a step ends."""
        self.mark("end")
        self._steps.append(self._marks)
        self._marks = []

    def read(self) -> list[dict[str, float]]:
        """Milliseconds by phase of each step since the last reading; waits for the device."""
        if self._cuda:
            torch.cuda.synchronize()
        steps = []
        for marks in self._steps:
            times: dict[str, float] = {}
            for (phase, begin), (_, end) in itertools.pairwise(marks):
                ms = begin.elapsed_time(end) if self._cuda else 1000 * (end - begin)
                times[phase] = times.get(phase, 0.0) + ms
            steps.append(times)
        self._steps = []
        return steps


def device_seconds(work: Callable[[], Any]) -> float:
    """Median time of some work on the GPU."""
    times = []
    for number in range(23):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        if number >= 3:
            times.append(begin.elapsed_time(end) / 1000)
    return median(times)


@dataclass(frozen=True)
class Ceilings:
    """What a GPU can do at best."""

    copy_bytes_per_second: float
    """Of a large copy, read and written."""
    matmul_flops: float
    """FLOP/s of a large 16-bit product."""


def ceilings(device: torch.device) -> Ceilings | None:
    """Measured on this device; None on a CPU."""
    if device.type != "cuda":
        return None

    def copy_time() -> float:
        source = torch.randn(1 << 29, device=device)
        target = torch.empty_like(source)
        return device_seconds(lambda: target.copy_(source))

    copy = 2 * 4 * (1 << 29) / copy_time()
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.float16) for _ in range(2))
    return Ceilings(copy, 2 * 8192**3 / device_seconds(lambda: a @ b))


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Median, p10 and p90."""
    ranked = sorted(values)
    last = len(ranked) - 1
    return {"median": median(ranked), "p10": ranked[round(0.1 * last)], "p90": ranked[round(0.9 * last)]}


def rate_range(speeds: Sequence[float]) -> str:
    """`median (min to max)` of speeds."""
    return f"{rate(median(speeds))} ({rate(min(speeds))} to {rate(max(speeds))})"


def median_range(values: Sequence[float], digits: int = 2) -> str:
    """`median (min to max)`."""
    return f"{median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"
