"""`--benchmark loader`: what each back end of this machine gives for a recipe, by phase, beside the decode floor."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

import numpy as np
import torch

import loaders
from engine.bench.clock import MOST_NOISE, Candidate, Progress, interleave, rate_range
from engine.log import rate
from engine.provenance import environment
from engine.recipe import Recipe
from loaders import Index, core, turbo
from loaders.contract import HostBatch, Order
from loaders.errors import BadImage
from loaders.sampler import Stream, TrainPositions
from loaders.views import View


class Floor:
    """Reads and decodes images with libjpeg-turbo, every pixel of them, and keeps nothing."""

    def __init__(self, index: Index, rows: Iterator[list[int]], threads: int) -> None:
        self._index, self._rows = index, rows
        self._workers = turbo.Workers(threads)
        self._running = [self._start() for _ in range(3)]

    def _start(self) -> Any:
        return self._workers.start(turbo.Job(self._index, np.array(next(self._rows))).run)

    def __iter__(self) -> Iterator[None]:
        return self

    def __next__(self) -> None:
        for future in self._running.pop(0):
            future.result()
        self._running.append(self._start())

    def close(self) -> None:
        """End the threads."""
        self._workers.close()


def decode_floor(index: Index, batch: int, threads: int, seed: int) -> Candidate:
    """The decode floor over the data set, in its training order."""

    def rows() -> Iterator[list[int]]:
        stream = Stream(index, (), seed)
        for positions in _positions(batch):
            yield stream.images(positions)[1].tolist()

    return Candidate("floor", lambda: Floor(index, rows(), threads))


def crops_of(backend: str, index: Index, views: Sequence[View], batch: int, threads: int, seed: int) -> Candidate:
    """A back end alone: uint8 crops on the host, nothing after that."""
    options = loaders.load(backend).Options()

    def open_backend() -> Iterator[HostBatch]:
        stream = Stream(index, views, seed)
        return options.batches(Order(stream, _positions(batch), True, threads, torch.device("cpu")))

    return Candidate(backend, open_backend)


def _positions(batch: int) -> TrainPositions:
    return TrainPositions(batch_size=batch, micro_batch=batch, rank=0, world_size=1, step=0)


# ------------------------------------------------------------------------------------------------ the mode


def measure(recipe: Recipe, *, batches: int = 12, rounds: int = 3) -> dict[str, Any]:
    """Measure every back end for a recipe's training views on this machine.

    Returns:
        Plain data for JSON: for each back end images per second, per core, CPU milliseconds per image and by phase,
        share of the decode floor; what its rounds differ by, as a share; `best` of them; and what was not measured and
        why.
    """
    data = recipe.data
    index = loaders.open_data(data, "train")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    threads, batch = loaders.workers_per_rank(data, 1), data.micro_batch
    reasons = loaders.why_unusable(data)
    names = [name for name, reason in reasons.items() if not reason]
    has_floor = not core.why_missing() and data.options.reads_files
    candidates = [decode_floor(index, batch, threads, recipe.seed)] if has_floor else []
    for name in names:
        candidates.append(crops_of(name, index, data.views, batch, threads, recipe.seed))
        candidates.append(Candidate(f"{name}, whole", _whole(recipe, name, index, device)))
    with Progress(rounds * len(candidates)) as progress:
        speeds = interleave(candidates, batch=batch, batches=batches, rounds=rounds, begin=progress.begin)
    read_ms = _read_ms(index) if data.options.reads_files else 0.0
    floor_of_rounds = speeds["floor"].cpu_ms if has_floor else [float("nan")] * rounds
    floor_ms = median(floor_of_rounds)
    result: dict[str, Any] = {
        "recipe": recipe.name,
        "views": [f"{view.size} {view.crop} {view.interpolation}" for view in data.views],
        "device": str(device),
        "threads": threads,
        "batch": batch,
        "rounds": rounds,
        "not_measured": {name: reason for name, reason in reasons.items() if reason},
        "floor": asdict(speeds["floor"]) if has_floor else None,
        "backends": {},
        "environment": environment(),
    }
    for name in names:
        crops, whole = speeds[name], speeds[f"{name}, whole"]
        crops_ms, whole_ms = median(crops.cpu_ms), median(whole.cpu_ms)
        result["backends"][name] = {
            "crops": asdict(crops),
            "whole": asdict(whole),
            "per_core": median(whole.images_per_second) / threads,
            "of_floor": median(a / b for a, b in zip(floor_of_rounds, crops.cpu_ms, strict=True)),  # paired rounds
            "noise": (max(whole.images_per_second) - min(whole.images_per_second)) / median(whole.images_per_second),
            "phases_cpu_ms": {
                "read": read_ms,
                "decode": max(0.0, floor_ms - read_ms),
                "crop, resize, return": crops_ms - floor_ms,
                "copy, augment": whole_ms - crops_ms,
            },
        }
    ranked = sorted(names, key=lambda name: -median(speeds[f"{name}, whole"].images_per_second))
    result["best"] = ranked[0] if ranked else None
    return result


def _whole(recipe: Recipe, backend: str, index: Index, device: torch.device) -> Callable[[], Iterator[Any]]:
    changes = {"batch_size": recipe.data.micro_batch, "on_bad_image": "replace"}
    data = loaders.with_backend(recipe.data, backend, **changes)
    return lambda: loaders.open_train(data, index, seed=recipe.seed, place=loaders.Place(device=device))


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
        "| crop, resize, return | copy, augment | of the decode floor | first batch, s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    if floor := result["floor"]:
        lines.append(
            f"| decode floor (libjpeg-turbo) | | | {rate_range(floor['images_per_second'])} "
            f"| {median(floor['cpu_ms']):.2f} in all "
            "| | | | 1.00 | |"
        )
    for name, measured in result["backends"].items():
        phases = " | ".join(f"{ms:.2f}" for ms in measured["phases_cpu_ms"].values())
        whole, crops = measured["whole"], measured["crops"]
        lines.append(
            f"| {name} | {rate_range(whole['images_per_second'])} | {rate(measured['per_core'])} | "
            f"{rate_range(crops['images_per_second'])} | {phases} | {measured['of_floor']:.2f} | "
            f"{median(whole['first_batch']):.2f} |"
        )
    lines += ["", *(f"not measured: {name}: {reason}" for name, reason in result["not_measured"].items())]
    lines += [
        f"{name}: its rounds differ by {100 * measured['noise']:.0f} %, not to be relied on; measure on a quiet machine"
        for name, measured in result["backends"].items()
        if measured["noise"] > MOST_NOISE
    ]
    lines.append(f"best here for this recipe: {result['best']}")
    return "\n".join(lines)
