"""The report of a chain of runs: a figure, a table and a page, from what the runs wrote."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Score(NamedTuple):
    """One row of the table: a name and its value for each seed, in percent."""

    name: str
    values: list[float]

    def __str__(self) -> str:
        return spread(self.values)


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds as text."""
    mean = statistics.fmean(values)
    return f"{mean:.1f}" if len(values) == 1 else f"{mean:.1f} ± {statistics.stdev(values):.1f}"


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's `metrics.jsonl`."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def final(folder: Path, evaluation: str, name: str = "top1") -> float:
    """The last score of an evaluation in a run."""
    return [row[name] for row in metrics(folder) if row.get("evaluation") == evaluation][-1]


def curve(folder: Path, name: str, evaluation: str | None = None) -> tuple[list[float], list[float]]:
    """Epochs and values of a scalar of a run."""
    rows = [row for row in metrics(folder) if row.get("evaluation") == evaluation and name in row]
    return [row["epoch"] for row in rows], [row[name] for row in rows]


def table(scores: Sequence[Score]) -> str:
    """The closing table, for a terminal and for Markdown."""
    width = max(len(score.name) for score in scores)
    lines = [f"| {'features':{width}} | top-1 % |", f"| {'-' * width} | ------- |"]
    return "\n".join([*lines, *(f"| {score.name:{width}} | {score!s:7} |" for score in scores)])


def draw(
    out: Path, title: str, teacher: Path, stages: dict[str, Path], scores: Sequence[Score], views: list[Tensor]
) -> None:
    """Draw loss, terms, collapse meters, balance, k-NN, views and the final scores.

    Args:
        out: PNG file.
        teacher: run folder of the teacher's pre-training.
        stages: name -> run folder of the BURN stages in order.
        scores: bars of the last panel.
        views: two tensors uint8 [N, size, size, 3], the two views of N images.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure = plt.figure(figsize=(19, 8.5), layout="constrained")
    figure.suptitle(title, fontsize=14)
    rows: Any = figure.subfigures(2, 1)
    upper, lower = rows
    panels = [*upper.subplots(1, 4), *lower.subplots(1, 3, width_ratios=(1, 1.2, 1.7))]

    panels[0].plot(*curve(teacher, "loss"), color="tab:gray")
    panels[0].set(title="teacher: MoCo v2 loss", xlabel="epoch", ylabel="InfoNCE loss")

    lengths = [max(curve(folder, "loss")[0]) for folder in stages.values()]
    starts = [sum(lengths[:number]) for number in range(len(lengths))]

    def along(axis: Any, name: str, label: str, colour: str, evaluation: str | None = None) -> None:
        """One scalar over the stages, end to end."""
        for number, folder in enumerate(stages.values()):
            epochs, values = curve(folder, name, evaluation)
            shifted = [epoch + starts[number] for epoch in epochs]
            axis.plot(shifted, values, color=colour, label=label if number == 0 else None)

    for axis in panels[1:5]:
        for stage, start, length in zip(stages, starts, lengths, strict=True):
            axis.axvline(start, color="black", linewidth=0.8, linestyle=":")
            place = {"xycoords": ("data", "axes fraction"), "xytext": (0, 2), "textcoords": "offset points"}
            axis.annotate(stage, (start + length / 2, 1), ha="center", va="bottom", fontsize=8, **place)

    for name, label, colour in (
        ("loss", "loss", "tab:blue"),
        ("kl", "KL", "tab:orange"),
        ("feature", "feature similarity", "tab:green"),
    ):
        along(panels[1], name, label, colour)
    panels[1].set(xlabel="epoch", yscale="log")
    panels[1].set_title("BURN: loss and its terms", pad=16)
    along(panels[2], "balance", "λ", "tab:purple")
    panels[2].set(xlabel="epoch", ylabel="λ (weight of the KL term)")
    panels[2].set_title("dynamic balancing", pad=16)
    along(panels[3], "target_entropy", "mean entropy", "tab:red")
    along(panels[3], "target_entropy_of_mean", "entropy of the mean", "tab:brown")
    panels[3].set(xlabel="epoch", ylabel="nats", ylim=(0, None))
    panels[3].set_title("targets: collapsed if both reach 0", pad=16)
    along(panels[4], "top1", "student", "tab:blue", "knn")
    panels[4].axhline(final(teacher, "knn"), color="tab:gray", linestyle="--", label="teacher")
    panels[4].set(xlabel="epoch", ylabel="top-1 %")
    panels[4].margins(y=0.08)
    panels[4].set_title("online k-NN accuracy", pad=16)
    for panel in (panels[1], panels[3], panels[4]):
        panel.legend(fontsize=8)

    grid = torch.cat([torch.cat(list(view), dim=1) for view in views], dim=0)  # two rows of images
    halves = grid.chunk(2, dim=1)
    panels[5].imshow(torch.cat(halves, dim=0).numpy(), interpolation="nearest")
    panels[5].set_title("the student's two views (rows 1-2, 3-4: same images)", fontsize=10)
    panels[5].axis("off")

    bars = panels[6]
    names = [score.name for score in scores][::-1]
    means = [statistics.fmean(score.values) for score in scores][::-1]
    errors = [statistics.stdev(s.values) if len(s.values) > 1 else 0 for s in scores][::-1]
    drawn = bars.barh(names, means, xerr=errors if any(errors) else None, color="tab:blue")
    bars.bar_label(drawn, labels=[str(score) for score in scores][::-1], padding=4, fontsize=9)
    bars.set(title="top-1 % on held-out images, linear classifier on frozen features", xlim=(0, 112))
    figure.savefig(out, dpi=100)
    plt.close(figure)
