"""`--benchmark loader`: what each back end of this machine gives for a recipe, by phase, beside the decode floor.

Arms take turns (A B C A B C) in one process. An arm is opened anew for each turn, runs until what it had prefetched is
used up, and is then timed at its steady pace; CPU time is that of this process and its children.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch

import loaders
from engine.log import environment
from engine.recipe import Recipe
from loaders import DataConfig, Index, turbo
from loaders.contract import HostBatch
from loaders.index import BadImage
from loaders.sampler import Stream, TrainPositions
from loaders.views import View

WARM_UP = 6  # batches, more than any back end prefetches per worker and enough for its first ones to be over
_TICKS = os.sysconf("SC_CLK_TCK")


class Arm(NamedTuple):
    """Something to measure: `open` gives an endless iterator, with a `close` if it has to be ended."""

    name: str
    open: Callable[[], Iterator[Any]]


class Measured(NamedTuple):
    """What one arm gave over all rounds."""

    images_per_second: list[float]
    cpu_ms: list[float]
    """CPU milliseconds per image."""
    first_batch: list[float]
    """Seconds from opening to the first batch."""


def measure(arms: Sequence[Arm], *, batch: int, batches: int, rounds: int) -> dict[str, Measured]:
    """Time the arms in turn.

    Args:
        batch: images in a batch of every arm.
        batches: timed in each turn, after `WARM_UP` more.
        rounds: turns of each arm.
    """
    found = {arm.name: Measured([], [], []) for arm in arms}
    for _, arm in itertools.product(range(rounds), arms):
        opened = time.perf_counter()
        iterator = arm.open()
        next(iterator)
        found[arm.name].first_batch.append(time.perf_counter() - opened)
        for _ in range(WARM_UP):
            next(iterator)
        cpu, started = _cpu_seconds(), time.perf_counter()
        for _ in range(batches):
            next(iterator)
        seconds, cpu = time.perf_counter() - started, _cpu_seconds() - cpu
        found[arm.name].images_per_second.append(batch * batches / seconds)
        found[arm.name].cpu_ms.append(1000 * cpu / (batch * batches))
        if hasattr(iterator, "close"):
            iterator.close()
    return found


def _cpu_seconds() -> float:
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


def spread(values: Sequence[float], digits: int = 2) -> str:
    """`median (min to max)`."""
    return f"{median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


# ------------------------------------------------------------------------------------------------ arms


class Floor:
    """Reads and decodes images with libjpeg-turbo, every pixel of them, and keeps nothing."""

    def __init__(self, index: Index, rows: Iterator[list[int]], threads: int) -> None:
        self._index, self._rows = index, rows
        self._workers = turbo.Workers(threads)
        self._running = [self._start() for _ in range(3)]

    def _start(self) -> Any:
        job = turbo.Job(self._index, np.array(next(self._rows)))
        return self._workers.start(lambda: job)

    def __iter__(self) -> Iterator[None]:
        return self

    def __next__(self) -> None:
        for future in self._running.pop(0):
            future.result()
        self._running.append(self._start())

    def close(self) -> None:
        """End the threads."""
        self._workers.close()


def floor_arm(index: Index, batch: int, threads: int, seed: int) -> Arm:
    """The decode floor over the data set's own order of training."""

    def rows() -> Iterator[list[int]]:
        stream = Stream(index, (), seed)
        for positions in _positions(batch):
            yield stream.images(positions)[1].tolist()

    return Arm("floor", lambda: Floor(index, rows(), threads))


def crops_arm(backend: str, index: Index, views: Sequence[View], batch: int, threads: int, seed: int) -> Arm:
    """A back end alone: uint8 crops on the host, nothing after."""
    module = loaders.load(backend)
    device = torch.device("cpu")

    def open_backend() -> Iterator[HostBatch]:
        stream = Stream(index, views, seed)
        return module.open(
            stream, _positions(batch), replace=True, workers=threads, device=device, options=module.Options()
        )

    return Arm(backend, open_backend)


def _positions(batch: int) -> TrainPositions:
    return TrainPositions(batch_size=batch, micro_batch=batch, rank=0, world_size=1, step=0)


# ------------------------------------------------------------------------------------------------ the mode


def usable(data: DataConfig) -> dict[str, str]:
    """Back end -> "" or why it cannot be measured for this data set."""
    is_beton = Path(data.train or "").suffix == ".beton"
    reasons = {}
    for name in loaders.backends():
        if name == "synthetic":
            reasons[name] = "" if data.backend == name else "its images are not those of the data set"
        elif data.backend == "synthetic":
            reasons[name] = "the recipe's data set has no files"
        elif name == "ffcv" and not is_beton:
            reasons[name] = "the data set is no .beton; tools/convert_imagenet_to_ffcv.py makes one"
        else:
            reasons[name] = loaders.load(name).missing()
    return reasons


def loader(recipe: Recipe, *, batches: int = 12, rounds: int = 3) -> dict[str, Any]:
    """Measure every back end for a recipe's training views on this machine.

    Returns:
        Plain data for JSON: for each back end images per second, per core, CPU milliseconds per image and by phase,
        share of the decode floor; `best` of them; and what was not measured and why.
    """
    data = recipe.data
    index = loaders.open_data(data, "train")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    threads, batch = loaders.workers_per_rank(data, 1), data.micro_batch
    reasons = usable(data)
    names = [name for name, reason in reasons.items() if not reason]
    has_floor = not turbo.why_missing() and data.backend != "synthetic"
    arms = [floor_arm(index, batch, threads, recipe.seed)] if has_floor else []
    for name in names:
        arms.append(crops_arm(name, index, data.views, batch, threads, recipe.seed))
        arms.append(Arm(f"{name}, whole", _whole(recipe, name, index, device)))
    found = measure(arms, batch=batch, batches=batches, rounds=rounds)
    read_ms = _read_ms(index) if data.backend != "synthetic" else 0.0
    floor_ms = median(found["floor"].cpu_ms) if has_floor else float("nan")
    result: dict[str, Any] = {
        "recipe": recipe.name,
        "views": [f"{view.size} {view.crop} {view.interpolation}" for view in data.views],
        "device": str(device),
        "threads": threads,
        "batch": batch,
        "rounds": rounds,
        "not_measured": {name: reason for name, reason in reasons.items() if reason},
        "floor": found["floor"]._asdict() if has_floor else None,
        "backends": {},
        "environment": environment(),
    }
    for name in names:
        crops, whole = found[name], found[f"{name}, whole"]
        crops_ms, whole_ms = median(crops.cpu_ms), median(whole.cpu_ms)
        result["backends"][name] = {
            "crops": crops._asdict(),
            "whole": whole._asdict(),
            "per_core": median(whole.images_per_second) / threads,
            "of_floor": floor_ms / crops_ms,
            "phases_cpu_ms": {
                "read": read_ms,
                "decode": max(0.0, floor_ms - read_ms),
                "crop, resize, hand over": crops_ms - floor_ms,
                "copy, augment": whole_ms - crops_ms,
            },
        }
    ranked = sorted(names, key=lambda name: -median(found[f"{name}, whole"].images_per_second))
    result["best"] = ranked[0] if ranked else None
    return result


def _whole(recipe: Recipe, backend: str, index: Index, device: torch.device) -> Callable[[], Iterator[Any]]:
    module = loaders.load(backend)
    options = recipe.data.options if backend == recipe.data.backend else module.Options()
    data = recipe.data.model_copy(
        update={
            "backend": backend,
            "batch_size": recipe.data.micro_batch,
            "on_bad_image": "replace",
            "options": options,
        }
    )
    return lambda: loaders.open_train(
        data, index, seed=recipe.seed, step=0, rank=0, world_size=1, local_world_size=1, device=device
    )


def _read_ms(index: Index) -> float:
    """CPU milliseconds to read one image's bytes, from the page cache after the first time."""
    rows = range(min(len(index), 256))
    times = []
    for _ in range(3):
        started = time.process_time()
        for row in rows:
            if row not in index.problems:
                try:
                    index.content(row)
                except BadImage:
                    continue
        times.append(1000 * (time.process_time() - started) / len(rows))
    return min(times)


def table(result: dict[str, Any]) -> str:
    """The result for people, in Markdown."""
    lines = [
        f"{result['recipe']}: {', '.join(result['views'])}; {result['threads']} threads, batches of {result['batch']}, "
        f"device {result['device']}; median (min to max) of {result['rounds']} rounds",
        "",
        "| back end | images/s, whole loader | per core | images/s, uint8 crops | CPU ms: read | decode "
        "| crop, resize, hand over | copy, augment | of the decode floor | first batch, s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    if floor := result["floor"]:
        lines.append(
            f"| decode floor (libjpeg-turbo) | | | {spread(floor['images_per_second'], 0)} "
            f"| {median(floor['cpu_ms']):.2f} in all "
            "| | | | 1.00 | |"
        )
    for name, found in result["backends"].items():
        phases = " | ".join(f"{ms:.2f}" for ms in found["phases_cpu_ms"].values())
        whole, crops = found["whole"], found["crops"]
        lines.append(
            f"| {name} | {spread(whole['images_per_second'], 0)} | {found['per_core']:.0f} | "
            f"{spread(crops['images_per_second'], 0)} | {phases} | {found['of_floor']:.2f} | "
            f"{median(whole['first_batch']):.2f} |"
        )
    lines += ["", *(f"not measured: {name}: {reason}" for name, reason in result["not_measured"].items())]
    lines.append(f"best here for this recipe: {result['best']}")
    return "\n".join(lines)


def write(result: dict[str, Any], path: Path) -> None:
    """Save a result as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2, default=str) + "\n", encoding="utf-8")
