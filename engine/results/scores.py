"""Scores over seeds, and tables of them in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class Score(NamedTuple):
    """One row of the table: a name and its value for each seed, in percent."""

    name: str
    values: list[float]

    def __str__(self) -> str:
        return mean_std(self.values)


@dataclass(frozen=True)
class Outcome:
    """What one row of a table and one seed gave."""

    linear: float
    """Linear top-1 in percent."""
    knn: float
    """k-NN top-1 in percent."""
    images: int
    """Of pre-training."""
    seconds: float
    monitors: dict[str, float]
    """The last monitors of pre-training."""
    recipes: list[str]
    """Hashes of all runs, in order."""
    baselines: dict[str, float] = field(default_factory=dict)
    """What the probe's `baselines` evaluation found, where its recipe has one."""


class Entry(NamedTuple):
    """One row of a table of methods."""

    name: str
    paper: float | None
    """The paper's linear top-1 on ImageNet in percent."""
    ablation: bool
    outcomes: list[Outcome]
    """One for each seed."""

    @property
    def linear(self) -> list[float]:
        """Of every seed."""
        return [outcome.linear for outcome in self.outcomes]

    @property
    def knn(self) -> list[float]:
        """Of every seed."""
        return [outcome.knn for outcome in self.outcomes]


def mean_std(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds as text."""
    mean = statistics.fmean(values)
    return f"{mean:.1f}" if len(values) == 1 else f"{mean:.1f} ± {statistics.stdev(values):.1f}"


def table(scores: Sequence[Score]) -> str:
    """The closing table, for a terminal and for Markdown."""
    width = max(len(score.name) for score in scores)
    lines = [f"| {'features':{width}} | top-1 % |", f"| {'-' * width} | ------- |"]
    return "\n".join([*lines, *(f"| {score.name:{width}} | {score!s:7} |" for score in scores)])


def comparison(entries: Sequence[Entry], layer: str) -> str:
    """A table of methods in Markdown; `layer` is what its linear evaluations look at."""
    head = ("pre-training", "paper, ImageNet", f"linear top-1 % ({layer})", "k-NN top-1 %", "images", "minutes")
    rows = [
        (
            entry.name,
            "" if entry.paper is None else f"{entry.paper:.2f}",
            mean_std(entry.linear),
            mean_std(entry.knn),
            f"{round(statistics.fmean(outcome.images for outcome in entry.outcomes)):,}",
            f"{statistics.fmean(outcome.seconds for outcome in entry.outcomes) / 60:.1f}",
        )
        for entry in entries
    ]
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    lines = [
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))} |" for row in (head, *rows)
    ]
    return "\n".join([lines[0], f"|{'|'.join('-' * (width + 2) for width in widths)}|", *lines[1:]])
