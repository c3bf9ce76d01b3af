"""Reports from what runs wrote: of the demo's chain of runs, and of a table of methods."""

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


class Entry(NamedTuple):
    """One row of a table of methods."""

    name: str
    paper: float | None
    """The paper's linear top-1 on ImageNet in percent."""
    ablation: bool
    results: list[dict[str, Any]]
    """For each seed `linear` and `knn` in percent, `images` and `seconds` of pre-training."""

    def values(self, key: str) -> list[float]:
        """One number of every seed."""
        return [result[key] for result in self.results]


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
    """Draw loss, terms, collapse meters, balance, k-NN, monitors, views and the final scores.

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
    panels = [*upper.subplots(1, 4), *lower.subplots(1, 4, width_ratios=(1, 1.2, 1.3, 1))]

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

    for axis in (*panels[1:5], panels[7]):
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
    for name, label, colour in (
        ("binary/sign_flips", "signs flipped since the last log", "tab:blue"),
        ("binary/dead_channels", "dead channels", "tab:red"),
        ("binary/saturated_channels", "saturated channels", "tab:orange"),
        ("binary/latent_beyond_one", "latent weights beyond ±1", "tab:green"),
    ):
        along(panels[7], name, label, colour)
    panels[7].set(xlabel="epoch", ylabel="share", ylim=(0, 1))
    panels[7].set_yscale("symlog", linthresh=1e-4)
    panels[7].set_title("the student's binary layers", pad=16)
    for panel in (panels[1], panels[3], panels[4], panels[7]):
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
    bars.set(title="linear top-1 % on held-out images", xlim=(0, 125))
    figure.savefig(out, dpi=100)
    plt.close(figure)


def comparison(entries: Sequence[Entry]) -> str:
    """A table of methods in Markdown."""
    head = ("pre-training", "paper, ImageNet", "linear top-1 %", "k-NN top-1 %", "images", "minutes")
    rows = [
        (
            entry.name,
            "" if entry.paper is None else f"{entry.paper:.2f}",
            spread(entry.values("linear")),
            spread(entry.values("knn")),
            f"{round(statistics.fmean(entry.values('images'))):,}",
            f"{statistics.fmean(entry.values('seconds')) / 60:.1f}",
        )
        for entry in entries
    ]
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    lines = [
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))} |" for row in (head, *rows)
    ]
    return "\n".join([lines[0], f"|{'|'.join('-' * (width + 2) for width in widths)}|", *lines[1:]])


def draw_comparison(out: Path, title: str, entries: Sequence[Entry], curves: dict[str, list[Path]]) -> None:
    """Draw a table of methods: scores, the paper's beside ours, and two monitors over training.

    Args:
        out: PNG file.
        title: heading.
        entries: rows, in their order.
        curves: row -> run folders of its stages for one seed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(15, 10), layout="constrained")
    figure.suptitle(title, fontsize=14)
    bars, versus, flips, rank = axes.flat
    places = list(range(len(entries)))[::-1]
    for shift, key, label, colour in ((0.2, "linear", "linear", "tab:blue"), (-0.2, "knn", "k-NN", "tab:orange")):
        values = [entry.values(key) for entry in entries]
        errors = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]
        drawn = bars.barh(
            [place + shift for place in places],
            [statistics.fmean(v) for v in values],
            height=0.38,
            xerr=errors,
            color=colour,
            label=label,
        )
        bars.bar_label(drawn, labels=[spread(v) for v in values], padding=4, fontsize=8)
    bars.set_yticks(places, [entry.name for entry in entries])
    bars.set(title="top-1 % on held-out images", xlim=(0, 112))
    bars.legend(loc="lower right", fontsize=8)

    for entry in entries:
        if entry.paper is None:
            continue
        scores = entry.values("linear")
        error = statistics.stdev(scores) if len(scores) > 1 else 0.0
        mark = "s" if entry.ablation else "o"
        colour = "tab:gray" if entry.ablation else "tab:blue"
        versus.errorbar(entry.paper, statistics.fmean(scores), error, fmt=mark, color=colour, capsize=3)
        place: Any = {"xytext": (6, -10), "textcoords": "offset points", "fontsize": 8}
        if entry.ablation:
            place |= {"xytext": (-6, 4), "ha": "right"}
        versus.annotate(entry.name, (entry.paper, statistics.fmean(scores)), **place)
    versus.margins(x=0.2, y=0.15)
    versus.set(title="against the paper (squares: ablation)", xlabel="paper, ImageNet linear top-1 %")
    versus.set(ylabel="here, linear top-1 %")

    for number, (name, folders) in enumerate(curves.items()):
        style = {"color": f"C{number % 10}", "linestyle": "-" if number < 10 else "--", "linewidth": 1.2}
        for axis, monitor in ((flips, "binary/sign_flips"), (rank, "features/rank")):
            start = 0.0
            for stage, folder in enumerate(folders):
                rows = [row for row in metrics(folder) if monitor in row]
                if rows:
                    images = [start + row["images"] for row in rows]
                    axis.plot(images, [row[monitor] for row in rows], label=name if stage == 0 else None, **style)
                    start = images[-1]
    flips.set(title="share of weight signs flipped between two logs", xlabel="images", yscale="log")
    rank.set(title="effective rank of the features (RankMe)", xlabel="images", ylim=(0, None))
    flips.legend(fontsize=7)
    figure.savefig(out, dpi=100)
    plt.close(figure)


def draw_phases(result: dict[str, Any], out: Path) -> None:
    """Draw a bar of phases for each arm of the step benchmark (`engine/bench_step.py`).

    Args:
        result: what it measured.
        out: PNG file.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(11, 1.6 + 0.7 * len(result["arms"])), layout="constrained")
    names = list(result["arms"])[::-1]
    phases = list(dict.fromkeys(p for arm in result["arms"].values() for p in arm["phases_ms"]))
    left = [0.0] * len(names)
    for number, phase in enumerate(phases):
        widths = [result["arms"][name]["phases_ms"].get(phase, 0.0) for name in names]
        axis.barh(names, widths, left=left, label=phase, color=f"C{number}")
        left = [a + b for a, b in zip(left, widths, strict=True)]
    labels = [f"  {result['arms'][name]['times_reference']:.2f} x" for name in names]
    for place, (end, label) in enumerate(zip(left, labels, strict=True)):
        axis.text(end, place, label, va="center", fontsize=9)
    axis.margins(x=0.12)
    axis.set(title=f"{result['recipe']} on {result['device']}: one step by phase", xlabel="milliseconds")
    axis.legend(ncols=len(phases), fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.25))
    figure.savefig(out, dpi=110)
    plt.close(figure)
