"""Figures of results, as PNG files."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.bench.step import Result
from engine.errors import RecipeError
from engine.results.runs import metrics
from engine.results.scores import Difference, Entry, mean_std


def pyplot() -> Any:
    """Matplotlib, which draws into files only. Imported where something is drawn: it is not needed to train.

    Raises:
        RecipeError: it is missing.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise RecipeError(f"matplotlib, which draws figures, is missing ({error}): pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def score_bars(
    axis: Any,
    places: Sequence[float],
    scores: Sequence[Sequence[float]],
    *,
    color: str | list[str],
    height: float = 0.8,
    label: str | None = None,
) -> None:
    """Draw means of scores over seeds as horizontal bars from 0 to 100 %, with deviations, and as numbers beside them.

    Args:
        axis: of matplotlib.
        places: heights at which the bars lie.
        scores: in percent, of every seed.
    """
    means = [statistics.fmean(values) for values in scores]
    spreads = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in scores]
    both = list(zip(means, spreads, strict=True))
    within = [[min(spread, mean) for mean, spread in both], [min(spread, 100 - mean) for mean, spread in both]]
    axis.barh(places, means, height=height, xerr=within, color=color, label=label)
    beside: Any = {"xycoords": ("axes fraction", "data"), "xytext": (4, 0), "textcoords": "offset points"}
    for place, values in zip(places, scores, strict=True):
        axis.annotate(mean_std(values), (1, place), va="center", fontsize=8, **beside)
    axis.set_xlim(0, 100)


def draw_comparison(
    out: Path,
    title: str,
    entries: Sequence[Entry],
    tasks: Sequence[str],
    pairs: Sequence[Difference],
    curves: dict[str, list[tuple[Path, int]]],
) -> None:
    """Draw a table of methods: the scores of each task, differences of pairs with their intervals, and two monitors
    over training.

    Args:
        out: PNG file.
        title: heading.
        entries: rows, in their order.
        tasks: names, in their order.
        pairs: differences, of all tasks.
        curves: row -> run folders of its stages for one seed, and the views that the network runs of an image there.
    """
    plt = pyplot()
    panels = [task for task in tasks if any(entry.scores(task) for entry in entries)]
    has_paper = any(entry.paper is not None and entry.scores(task) for entry in entries for task in panels[:1])
    count = len(panels) + bool(pairs) + has_paper + 2
    columns = min(count, 3)
    height = 1.2 + 0.3 * max(len(entries), len(pairs))
    lines = -(-count // columns)
    figure, grid = plt.subplots(lines, columns, figsize=(6.5 * columns, max(height, 4.0) * lines), layout="constrained")
    figure.suptitle(title, fontsize=14)
    axes = list(grid.flat)
    for axis, task in zip(axes, panels, strict=False):
        shown = [entry for entry in entries if entry.scores(task)]
        places = list(range(len(shown)))[::-1]
        colors = ["tab:gray" if entry.ablation else "tab:blue" for entry in shown]
        score_bars(axis, places, [list(entry.scores(task).values()) for entry in shown], color=colors)
        axis.set_yticks(places, [entry.name for entry in shown])
        axis.set(title=f"{task}, %")
    rest = axes[len(panels) :]
    if pairs:
        _draw_pairs(rest.pop(0), pairs)
    if has_paper:
        _draw_against_paper(rest.pop(0), entries, panels[0])
    for number, (name, folders) in enumerate(curves.items()):
        style = {"color": f"C{number % 10}", "linestyle": "-" if number < 10 else "--", "linewidth": 1.2}
        for axis, monitor in zip(rest, ("binary/sign_flips", "features/rank"), strict=False):
            start, label = 0.0, name
            for folder, views in folders:
                rows = metrics(folder)
                if found := [row for row in rows if monitor in row]:  # no signs flip where weights are real
                    seen = [start + views * row["images"] for row in found]
                    axis.plot(seen, [row[monitor] for row in found], label=label, **style)
                    label = "_"  # matplotlib's for none
                start += views * max((row["images"] for row in rows), default=0)
    flips, rank, *unused = rest
    flips.set(title="share of weight signs flipped between two logs", xlabel="views")
    if any(value > 0 for drawn in flips.lines for value in drawn.get_ydata()):
        flips.set_yscale("log")
    rank.set(title="effective rank of the features (RankMe)", xlabel="views", ylim=(0, None))
    if rank.lines:
        rank.legend(fontsize=7)
    for axis in unused:
        axis.set_axis_off()
    figure.savefig(out, dpi=100)
    plt.close(figure)


def draw_neighbors(
    out: Path, title: str, images: NDArray[np.uint8], distances: NDArray[np.float32], same: NDArray[np.bool_] | None
) -> None:
    """Draw images, each with those that are nearest to it.

    Args:
        out: PNG file.
        title: heading.
        images: [Q, 1 + K, side, side, 3], the query first.
        distances: [Q, K], printed below.
        same: [Q, K], whether a neighbor is of the query's class: its frame is green or red; None without labels.
    """
    plt = pyplot()
    rows, columns = images.shape[:2]
    size = (1.25 * columns, 1.45 * rows + 0.5)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    figure.suptitle(title, fontsize=10)
    for (row, column), axis in np.ndenumerate(axes):
        axis.imshow(images[row, column], interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        axis.set_xlabel("image" if column == 0 else f"{distances[row, column - 1]:.3f}", fontsize=8, labelpad=2)
        color = "black" if same is None or column == 0 else "tab:green" if same[row, column - 1] else "tab:red"
        for spine in axis.spines.values():
            spine.set(color=color, linewidth=1 if color == "black" else 2.5)
    figure.savefig(out, dpi=110, format="png")
    plt.close(figure)


def _draw_pairs(axis: Any, pairs: Sequence[Difference]) -> None:
    places = list(range(len(pairs)))[::-1]
    for place, pair in zip(places, pairs, strict=True):
        low, high = pair.interval or (pair.mean, pair.mean)
        axis.errorbar(
            pair.mean, place, xerr=[[pair.mean - low], [high - pair.mean]], fmt="o", color="tab:blue", capsize=3
        )
        axis.plot(pair.values, [place] * len(pair.values), "|", color="tab:gray", markersize=8)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(places, [f"{pair.name}: {pair.task}" for pair in pairs], fontsize=8)
    axis.margins(y=0.1)
    axis.set(title="paired differences, 95 % interval", xlabel="points")


def _draw_against_paper(axis: Any, entries: Sequence[Entry], task: str) -> None:
    for entry in entries:
        ours = list(entry.scores(task).values())
        if entry.paper is None or not ours:
            continue
        error = statistics.stdev(ours) if len(ours) > 1 else 0.0
        mark, color = ("s", "tab:gray") if entry.ablation else ("o", "tab:blue")
        axis.errorbar(entry.paper, statistics.fmean(ours), error, fmt=mark, color=color, capsize=3)
        place: Any = {"xytext": (6, -10), "textcoords": "offset points", "fontsize": 8}
        if entry.ablation:
            place |= {"xytext": (-6, 4), "ha": "right"}
        axis.annotate(entry.name, (entry.paper, statistics.fmean(ours)), **place)
    axis.margins(x=0.2, y=0.15)
    axis.set_ylim(top=min(axis.get_ylim()[1], 100.5))
    axis.set(title="against the paper (squares: ablation)", xlabel="paper, ImageNet linear top-1 %")
    axis.set(ylabel=f"here, {task}, %")


def draw_phases(result: Result, out: Path) -> None:
    """Draw a bar of phases for each variant of the step benchmark.

    Args:
        result: what it measured.
        out: PNG file.
    """
    plt = pyplot()
    timings = list(result.variants.values())[::-1]
    names = list(result.variants)[::-1]
    figure, axis = plt.subplots(figsize=(11, 1.6 + 0.7 * len(names)), layout="constrained")
    phases = list(dict.fromkeys(phase for timing in result.variants.values() for phase in timing.phases_ms))
    left = [0.0] * len(names)
    for number, phase in enumerate(phases):
        widths = [timing.phases_ms.get(phase, 0.0) for timing in timings]
        axis.barh(names, widths, left=left, label=phase, color=f"C{number}")
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for row, (end, timing) in enumerate(zip(left, timings, strict=True)):
        ratios = timing.times_reference
        label = f"  {statistics.median(ratios):.2f} x" if ratios else "  too noisy"
        axis.text(end, row, label, va="center", fontsize=9)
    axis.margins(x=0.12)
    axis.set(title=f"{result.recipe} on {result.device}: one step by phase", xlabel="milliseconds")
    axis.legend(ncols=len(phases), fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.25))
    figure.savefig(out, dpi=110)
    plt.close(figure)


def draw_low_shot(
    out: Path, title: str, curves: dict[str, dict[int, tuple[float, float, float]]], levels: dict[str, float]
) -> None:
    """Draw mAP over the number of images that show a class, a line for each network.

    Args:
        out: PNG file.
        title: heading.
        curves: network -> images -> mean, least and most over samples, in percent.
        levels: network -> mAP with all images, drawn as a dotted line.
    """
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(8, 5.5), layout="constrained")
    for number, (name, points) in enumerate(curves.items()):
        shots, color = sorted(points), f"C{number % 10}"
        mean, low, high = zip(*(points[count] for count in shots), strict=True)
        axis.plot(shots, mean, "o-", color=color, label=name)
        axis.fill_between(shots, low, high, color=color, alpha=0.2, linewidth=0)
        if name in levels:
            axis.axhline(levels[name], color=color, linestyle=":", label=f"{name}, all images")
    ticks = sorted({count for points in curves.values() for count in points})
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [str(count) for count in ticks])
    axis.minorticks_off()
    axis.set(title=title, xlabel="images of each class", ylabel="mAP %")
    axis.legend(fontsize=8)
    figure.savefig(out, dpi=110, format="png")
    plt.close(figure)
