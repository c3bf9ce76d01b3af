"""Scores over seeds, their differences, and tables of them in Markdown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Score(NamedTuple):
    """One row of a table: a name and its value for each seed, in percent."""

    name: str
    values: list[float]

    def __str__(self) -> str:
        return mean_std(self.values)


@dataclass(frozen=True)
class Outcome:
    """What one row of a table and one seed gave."""

    scores: dict[str, float]
    """Task -> percent."""
    images: int
    """Of training."""
    views: int
    """Of them that the network ran."""
    seconds: float
    """Of training."""
    monitors: dict[str, float]
    """The last ones of training."""
    recipes: list[str]
    """Hashes of all runs, in order."""


@dataclass(frozen=True)
class Entry:
    """One row of a table of methods."""

    name: str
    """With its teacher, where there are several."""
    row: str
    """Its name in the table's file; that of a teacher has none there."""
    teacher: str | None
    paper: float | None
    """The paper's linear top-1 on ImageNet in percent."""
    ablation: bool
    outcomes: dict[int, Outcome]
    """Seed -> what it gave."""
    choices: dict[str, Any] = field(default_factory=dict)
    """How its rates were chosen."""

    def scores(self, task: str) -> dict[int, float]:
        """Seed -> percent, where there is an answer."""
        return {seed: found.scores[task] for seed, found in sorted(self.outcomes.items()) if task in found.scores}


class Difference(NamedTuple):
    """Of two rows in one task, seed by seed."""

    name: str
    task: str
    values: list[float]
    """Of the seeds that both have, in points."""

    @property
    def mean(self) -> float:
        """In points."""
        return statistics.fmean(self.values)

    @property
    def interval(self) -> tuple[float, float] | None:
        """Within which the mean over all seeds lies with 95 %, if differences are normal (Student 1908); None of one
        seed."""
        count = len(self.values)
        if count < 2:
            return None
        half = t_quantile(count - 1) * statistics.stdev(self.values) / math.sqrt(count)
        return self.mean - half, self.mean + half

    def __str__(self) -> str:
        if self.interval is None:
            return f"{self.mean:+.1f} (one seed)"
        low, high = self.interval
        return f"{self.mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def differences(entries: Sequence[Entry], pairs: Sequence[tuple[str, str]], tasks: Sequence[str]) -> list[Difference]:
    """First minus second of every pair of rows, under each teacher that both have; one without stands against all."""
    found = []
    for first, second in pairs:
        for a in (entry for entry in entries if entry.row == first):
            for b in (entry for entry in entries if entry.row == second):
                if a.teacher != b.teacher and None not in (a.teacher, b.teacher):
                    continue
                for task in tasks:
                    ours, theirs = a.scores(task), b.scores(task)
                    if values := [ours[seed] - theirs[seed] for seed in ours if seed in theirs]:
                        found.append(Difference(f"{a.name} - {b.name}", task, values))
    return found


def t_quantile(freedom: int, confidence: float = 0.95) -> float:
    """The t within which Student's distribution has this share, of so many degrees of freedom.

    Args:
        freedom: at least 1.
        confidence: above 0, below 1.
    """
    low, high = 0.0, 1.0
    while t_share(high, freedom) < confidence:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if t_share(middle, freedom) < confidence else (low, middle)
    return (low + high) / 2


def t_share(t: float, freedom: int) -> float:
    """The share of Student's distribution between -t and t: a finite sum (Abramowitz and Stegun 1964, 26.7.3 and 4)."""
    angle = math.atan2(t, math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    is_odd = freedom % 2
    term = total = (cosine if freedom > 1 else 0.0) if is_odd else 1.0
    for k in range(3 if is_odd else 2, freedom - 1, 2):
        term *= (k - 1) / k * cosine**2
        total += term
    return 2 / math.pi * (angle + sine * total) if is_odd else sine * total


def mean_std(values: Sequence[float]) -> str:
    """Mean and sample standard deviation over seeds as text."""
    mean = statistics.fmean(values)
    return f"{mean:.1f}" if len(values) == 1 else f"{mean:.1f} ± {statistics.stdev(values):.1f}"


def table(scores: Sequence[Score]) -> str:
    """The closing table of a few scores, for a terminal and for Markdown."""
    return aligned([("features", "top-1 %"), *((score.name, str(score)) for score in scores)])


def comparison(entries: Sequence[Entry], tasks: Sequence[str], meters: Sequence[str]) -> str:
    """A table of methods in Markdown: a column for each task and each meter that a row has."""
    known = [meter for meter in meters if any(meter in o.monitors for e in entries for o in e.outcomes.values())]
    has_paper = any(entry.paper is not None for entry in entries)
    head = ["", *(["paper, ImageNet"] if has_paper else []), *tasks, *known, "views", "minutes"]
    rows = [head]
    for entry in entries:
        outcomes = list(entry.outcomes.values())
        paper = "" if entry.paper is None else f"{entry.paper:.2f}"
        row = [entry.name, *([paper] if has_paper else [])]
        row += [mean_std(list(values.values())) if (values := entry.scores(task)) else "" for task in tasks]
        for meter in known:
            found = [outcome.monitors[meter] for outcome in outcomes if meter in outcome.monitors]
            row.append(f"{statistics.fmean(found):.3g}" if found else "")
        trained = statistics.fmean(outcome.views for outcome in outcomes)
        row.append(f"{round(trained):,}" if trained else "")
        row.append(f"{statistics.fmean(outcome.seconds for outcome in outcomes) / 60:.1f}" if trained else "")
        rows.append(row)
    return aligned(rows)


def pairs_table(found: Sequence[Difference], tasks: Sequence[str]) -> str:
    """Differences in Markdown: a line for each pair, a column for each task."""
    rows = [["difference, points", *tasks, "seeds"]]
    for name in dict.fromkeys(difference.name for difference in found):
        of_pair = {difference.task: difference for difference in found if difference.name == name}
        counts = sorted({len(difference.values) for difference in of_pair.values()})
        rows.append(
            [name, *(str(of_pair[task]) if task in of_pair else "" for task in tasks), ", ".join(map(str, counts))]
        )
    return aligned(rows)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown whose columns line up in a terminal, too; the first row is its head."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [f"| {' | '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))} |" for row in rows]
    return "\n".join([lines[0], f"|{'|'.join('-' * (width + 2) for width in widths)}|", *lines[1:]])
