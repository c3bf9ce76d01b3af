"""Linear SVMs on frozen features, one class against the rest: the protocols of VOC07, full and low-shot.

Goyal et al., "Scaling and Benchmarking Self-Supervised Visual Representation Learning", ICCV 2019, whose costs, folds,
weights and average precisions these are; docs/downstream.md has all of it, with what differs. Targets are int8 [N, C]:
1 where an image shows the class, 0 where it does not, -1 where all that it shows of it is difficult.
"""

from __future__ import annotations

import functools
import hashlib
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.average_precision import classified
from engine.pool import Unit
from loaders import DataError
from loaders.philox import uniform
from models.contract import Layer

Floats = NDArray[np.float64]
Targets = NDArray[np.int8]

COSTS = (1.0, 10.0, 100.0, *(2.0**-power for power in range(4, 20)))
"""In the order in which they are tried: the first of equals is chosen."""
SHOTS = (1, 2, 4, 8, 16, 32, 64, 96)
"""Images that show a class; the rarest of VOC07 has 96."""
SAMPLES = 5
"""Draws for each number of shots."""
FOLDS = 3
POSITIVE_WEIGHT = 2.0
"""Of what shows the class, in the loss."""
EPSILON = 1e-5
TOLERANCE = 1e-6
"""Of the solver, on the norm of the gradient relative to that at 0; it is scaled by the share of the rarer side."""
ITERATIONS = 1000
"""Newton steps at most; some tens are usual."""
UNUSED = -1
"""Of a draw: the row takes no part."""
PUBLISHED = {
    1: "751a97b21354fbb6",
    2: "af4849d75d1a420e",
    4: "e2b01781e9d5be15",
    8: "73bf13cb8ee6147e",
    16: "bd3dfc07ccff40ec",
    32: "829154364c8f14cc",
    64: "28a2548bbb0bedd5",
    96: "0417eee9d1d5d32c",
}
"""Shots -> `digest` of the first sample that the protocol's authors published for VOC07."""


def missing() -> str:
    """What is not installed, with what to do, or ""."""
    try:
        import sklearn.svm  # noqa: F401
    except ImportError as error:
        return f"scikit-learn, which fits the SVMs, is missing ({error}): pip install 'scikit-learn>=1.4'"
    return ""


# ------------------------------------------------------------------------------------------------ mathematics


def normalized(features: NDArray[Any]) -> Floats:
    """Features [N, D] as float64, each row divided by its norm + 1e-5."""
    rows = features.astype(np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True) + EPSILON
    return rows


class Classifier(NamedTuple):
    """A linear classifier of one class."""

    weight: Floats  # [D]
    bias: float
    converged: bool

    def scores(self, rows: Floats) -> Floats:
        """Decision values [N] of rows [N, D]."""
        return rows @ self.weight + self.bias


def fit(rows: Floats, positive: NDArray[np.bool_], cost: float, *, tolerance: float = TOLERANCE) -> Classifier:
    """The minimum of |w|²/2 + b²/2 + cost · Σ c_i max(0, 1 - y_i (w·x_i + b))², c_i = 2 where y_i = 1, else 1.

    It is strictly convex: there is one minimum. The primal solver finds it in some Newton steps and draws nothing; the
    dual one, which others use, gives up before it at large costs.

    Args:
        rows: [N, D].
        positive: [N], of both kinds.
    """
    from sklearn.svm import LinearSVC

    model = LinearSVC(
        dual=False,
        C=cost,
        class_weight={1: POSITIVE_WEIGHT, -1: 1.0},
        intercept_scaling=1.0,
        tol=tolerance,
        max_iter=ITERATIONS,
    )
    model.fit(rows, np.where(positive, 1, -1))
    steps = int(np.max(model.n_iter_))
    return Classifier(model.coef_[0], float(model.intercept_[0]), converged=steps < ITERATIONS)


def folds(positive: NDArray[np.bool_], count: int = FOLDS) -> list[NDArray[np.int64]]:
    """Rows of each fold, as scikit-learn stratifies them: in their order, without a shuffle."""
    from sklearn.model_selection import StratifiedKFold

    parts = StratifiedKFold(count).split(np.zeros(len(positive)), positive)
    return [test.astype(np.int64) for _, test in parts]


def cross_validated(rows: Floats, positive: NDArray[np.bool_], cost: float) -> list[float]:
    """Average precision of each fold under a classifier of the others: scikit-learn's, a step function."""
    found = []
    for fold in folds(positive):
        others = np.ones(len(rows), dtype=bool)
        others[fold] = False
        classifier = fit(rows[others], positive[others], cost)
        found.append(classified(positive[fold], classifier.scores(rows[fold]), "step"))
    return found


# ------------------------------------------------------------------------------------------------ low-shot samples


def draw(targets: Targets, rows: NDArray[np.int64], shots: int, sample: int, seed: int = 0) -> Targets:
    """Draw images for every class: `shots` that show it and (C - 1) · `shots` that do not.

    Every class, number of shots and sample draws by itself, so that they are not nested; an image that shows one class
    may stand for what another is not. Difficult ones are not drawn. A draw depends on the numbers of the rows, not on
    their order: of a symbol, the rows with the smallest u(row, class, 1024 · sample + shots), Philox's.

    Args:
        targets: [N, C].
        rows: [N], their numbers in the data set.
        sample: from 0.

    Returns:
        [N, C]: 1, 0, or -1 where a row is not used, as in the published files.

    Raises:
        DataError: a class has too few.
    """
    drawn = np.full_like(targets, UNUSED)
    for number in range(targets.shape[1]):
        for symbol, count in _counts(targets, shots):
            drawn[_first(targets, rows, number, symbol, count, 1024 * sample + shots, seed), number] = symbol
    return drawn


def draw_images(targets: Targets, rows: NDArray[np.int64], shots: int, sample: int, seed: int = 0) -> Targets:
    """Draw `shots` images that show a class, for every class, and train all classes on all of them (Li et al.,
    "Prototypical Contrastive Learning", ICLR 2021); an image that is drawn for two classes counts once.

    Args, Returns, Raises:
        As `draw`.
    """
    found = [_first(targets, rows, number, 1, shots, 1024 * sample + shots, seed) for number in range(targets.shape[1])]
    drawn, used = np.full_like(targets, UNUSED), np.unique(np.concatenate(found))
    drawn[used] = targets[used] == 1
    return drawn


def _first(
    targets: Targets, rows: NDArray[np.int64], number: int, symbol: int, count: int, epoch: int, seed: int
) -> NDArray[np.int64]:
    """Places of the `count` images of a symbol whose numbers are smallest."""
    u = uniform(rows, np.full_like(rows, number), np.full_like(rows, epoch), 1, seed)[:, 0]
    order = np.lexsort((rows, u))
    places = order[targets[order, number] == symbol][:count]
    if len(places) < count:
        raise DataError(f"class {number}: {len(places)} images of target {symbol}, {count} are to be drawn")
    return places


def _counts(targets: Targets, shots: int) -> tuple[tuple[int, int], ...]:
    return (1, shots), (0, (targets.shape[1] - 1) * shots)


def possible(targets: Targets, shots: Sequence[int]) -> list[int]:
    """Of some numbers of shots those for which every class has images enough."""
    least = {symbol: int((targets == symbol).sum(axis=0).min()) for symbol in (1, 0)}
    return [number for number in shots if all(least[symbol] >= count for symbol, count in _counts(targets, number))]


def read_draw(folder: Path, targets: Targets, shots: int, sample: int) -> Targets:
    """`draw`, from a file as the protocol's authors published it, `train_targets_sample{1..5}_k{shots}.npy`.

    Args:
        targets: [N, C], rows by ascending name, classes in alphabetical order; what the file must agree with.
        sample: from 0; files count from 1.

    Raises:
        DataError: no such file, not an array of that shape, or another number of images than `draw` takes.
    """
    path = folder / f"train_targets_sample{sample + 1}_k{shots}.npy"
    try:
        found = np.load(path, allow_pickle=False)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read: {error.strerror or error}; expected a published low-shot file"
        ) from None
    except ValueError as error:
        raise DataError(f"{path}: is no array of numbers: {error}") from None
    if not isinstance(found, np.ndarray) or found.shape != targets.shape or found.dtype.kind not in "iu":
        what = f"{found.dtype} {list(found.shape)}" if isinstance(found, np.ndarray) else "an archive"
        raise DataError(f"{path}: expected integers {list(targets.shape)} (images, classes), got {what}")
    if odd := set(np.unique(found).tolist()) - {1, 0, UNUSED}:
        raise DataError(f"{path}: holds {min(odd)}, expected 1, 0 and -1 alone")
    for symbol, count in _counts(targets, shots):
        counts = (found == symbol).sum(axis=0)
        for number in np.flatnonzero(counts != count)[:1]:
            raise DataError(f"{path}: class {number} has {counts[number]} entries of {symbol}, expected {count}")
    wrong = np.argwhere((found != UNUSED) & (found != targets))
    for row, number in wrong[:1]:
        raise DataError(
            f"{path}: row {row} of class {number} is {found[row, number]}, the data set says {targets[row, number]}; "
            "expected the images by ascending name and the classes in alphabetical order"
        )
    return found.astype(np.int8)


def digest(targets: NDArray[Any]) -> str:
    """The first 16 hex digits of SHA-256 over an array as little-endian int64."""
    return hashlib.sha256(np.ascontiguousarray(targets, dtype="<i8").tobytes()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------------ work

NAMES = ("train", "train_targets", "test", "test_targets")


class Sets(NamedTuple):
    """Normalized features and targets of both sets."""

    train: Floats
    train_targets: Targets
    test: Floats
    test_targets: Targets

    def digest(self) -> str:
        """Hash of everything."""
        found = hashlib.sha256()
        for array in self:
            found.update(f"{array.dtype.str} {array.shape} ".encode())
            found.update(np.ascontiguousarray(array).data)
        return found.hexdigest()[:16]

    def write(self, parent: Path) -> Path:
        """Into a folder of files that all processes map, named by `digest`; returns it."""
        folder = parent / self.digest()
        folder.mkdir(parents=True, exist_ok=True)
        for name, array in zip(NAMES, self, strict=True):
            np.save(folder / f"{name}.npy", np.asarray(array), allow_pickle=False)
        return folder


@functools.lru_cache(maxsize=1)
def _open(folder: Path) -> Sets:
    return Sets(*(np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in NAMES))


def _one_thread() -> Any:
    from threadpoolctl import threadpool_limits  # comes with scikit-learn

    return threadpool_limits(1)


def _cross_validate(folder: Path, number: int, cost: float) -> list[float]:
    sets = _open(folder)
    with _one_thread():
        return cross_validated(sets.train, sets.train_targets[:, number] == 1, cost)


def _test(folder: Path, number: int, cost: float) -> dict[str, Any]:
    sets = _open(folder)
    with _one_thread():
        found = fit(sets.train, sets.train_targets[:, number] == 1, cost)
        ap = classified(sets.test_targets[:, number], found.scores(sets.test), "envelope")
    return {"ap": ap, "converged": found.converged}


def _low_shot(folder: Path, number: int, drawn: Targets, costs: Sequence[float]) -> dict[str, Any]:
    sets, used = _open(folder), np.flatnonzero(drawn != UNUSED)
    with _one_thread():
        rows, positive = sets.train[used], drawn[used] == 1
        found = [fit(rows, positive, cost) for cost in costs]
        weights = np.stack([one.weight for one in found], axis=1)  # all costs in one pass over the test rows
        scores = sets.test @ weights + np.array([one.bias for one in found])
        ap = [classified(sets.test_targets[:, number], of_cost, "envelope") for of_cost in scores.T]
    return {"ap": ap, "converged": all(one.converged for one in found)}


def cost_units(folder: Path, targets: Targets, costs: Sequence[float]) -> list[Unit]:
    """Cross-validation of every class (outer) at every cost; of each, the average precision of every fold.

    Args:
        folder: that `Sets.write` gave.
        targets: of the training set.
    """
    classes = range(targets.shape[1])
    return [_unit("cost", _cross_validate, folder, targets, number, cost) for number in classes for cost in costs]


def test_units(folder: Path, targets: Targets, chosen: Sequence[float]) -> list[Unit]:
    """The classifier of every class on all rows at its chosen cost, tested."""
    return [_unit("test", _test, folder, targets, number, cost) for number, cost in enumerate(chosen)]


def _unit(task: str, work: Callable[..., Any], folder: Path, targets: Targets, number: int, cost: float) -> Unit:
    """A piece of work on one class at one cost, which takes the longer the larger the cost is."""
    key = {"data": folder.name, "task": task, "class": number, "cost": cost}
    return Unit(key, work, (folder, number, cost), size=len(targets) * (0.5 + cost**0.5))


def low_shot_units(folder: Path, draws: dict[tuple[int, int], Targets], costs: Sequence[float]) -> list[Unit]:
    """Every (shots, sample), then every class: all costs, tested.

    Args:
        draws: (shots, sample) -> [N, C].
    """
    return [
        Unit(
            {
                "data": folder.name,
                "task": "low-shot",
                "shots": shots,
                "sample": sample,
                "class": number,
                "draw": digest(drawn[:, number]),
                "costs": list(costs),
            },
            _low_shot,
            (folder, number, drawn[:, number], tuple(costs)),
            size=(4 + shots) * len(costs),
        )
        for (shots, sample), drawn in draws.items()
        for number in range(drawn.shape[1])
    ]


# ------------------------------------------------------------------------------------------------ results


class Protocol(NamedTuple):
    """What the SVMs are told and how they are judged, beside what all protocols here share."""

    layer: Layer
    """Of the network."""
    crop: str
    """Of the view; "" for that of the network's evaluations."""
    costs: tuple[float, ...]
    shots: tuple[int, ...]
    draw: Callable[[Targets, NDArray[np.int64], int, int, int], Targets]
    has_difficult: bool
    """Whether difficult images are left out of tests and draws; else they do not show their class."""


PROTOCOLS = {
    "voc07": Protocol("map", "whole", COSTS, SHOTS, draw, has_difficult=True),
    "pcl": Protocol("pooled", "", (0.5,), (1, 2, 4, 8, 16), draw_images, has_difficult=False),
}
"""Goyal et al. 2019, and Li et al. 2021: their numbers do not compare."""
SHARED = {
    "solver": f"scikit-learn LinearSVC(dual=False), squared hinge, l2, bias regularized, tol {TOLERANCE:g}",
    "positive_weight": POSITIVE_WEIGHT,
    "folds": FOLDS,
    "rows": f"x / (|x| + {EPSILON:g}), float64",
    "cost_of_svm": "of each class, by step average precision, mean over folds of the training set",
    "ap": "all points, monotone envelope",
    "samples": SAMPLES,
}
"""How numbers come about in every protocol, for the results."""

Work = Callable[[list[Unit], str], list[Any]]
"""Does units, with a title for what is said; their results in order."""


def measure(
    folder: Path, targets: Targets, classes: Sequence[str], costs: Sequence[float], work: Work
) -> dict[str, Any]:
    """The full protocol: a cost for every class by cross-validation, a classifier on all training rows, its test.

    Args:
        folder: that `Sets.write` gave.
        targets: [N, C] of the training set.

    Returns:
        `map` and `ap` of each class in percent; `cost` of each class; `cross_validation`, class -> percent for each
        cost, or None where one cost leaves nothing to choose; `unconverged`, how many classifiers are.
    """
    chosen, means = [costs[0]] * len(classes), None
    if len(costs) > 1:
        found = work(cost_units(folder, targets, costs), "SVM, costs")
        means = 100 * np.array(found).mean(axis=1).reshape(len(classes), len(costs))
        chosen = [costs[choose(scores)] for scores in means.tolist()]
    tests = work(test_units(folder, targets, chosen), "SVM, tests")
    ap = [100 * test["ap"] for test in tests]
    return {
        "map": statistics.fmean(ap),
        "ap": dict(zip(classes, ap, strict=True)),
        "cost": dict(zip(classes, chosen, strict=True)),
        "cross_validation": None if means is None else dict(zip(classes, means.tolist(), strict=True)),
        "unconverged": sum(not test["converged"] for test in tests),
    }


def measure_low_shot(
    folder: Path, draws: dict[tuple[int, int], Targets], costs: Sequence[float], work: Work
) -> dict[str, Any]:
    """Low-shot: every draw, class and cost.

    Args:
        folder: that `Sets.write` gave.
        draws: (shots, sample) -> [N, C], samples of one number of shots one after the other.

    Returns:
        `shots`: number -> `low_shot_result`, in percent; `draws`: number -> the `digest` of each sample; `published`:
        whether all first samples are those that the protocol's authors published; `unconverged`.
    """
    found = work(low_shot_units(folder, draws, costs), "low-shot SVM")
    numbers = list(dict.fromkeys(shots for shots, _ in draws))
    classes = next(iter(draws.values())).shape[1]
    ap = 100 * np.array([one["ap"] for one in found]).reshape(len(numbers), -1, classes, len(costs))
    digests = {number: [digest(drawn) for (shots, _), drawn in draws.items() if shots == number] for number in numbers}
    return {
        "shots": {str(number): low_shot_result(ap[place], costs) for place, number in enumerate(numbers)},
        "draws": {str(number): of_number for number, of_number in digests.items()},
        "published": all(PUBLISHED.get(number) == of_number[0] for number, of_number in digests.items()),
        "unconverged": sum(not one["converged"] for one in found),
    }


def choose(scores: Sequence[float]) -> int:
    """Place of the best score, the first of equals."""
    return int(np.argmax(scores))


def over_samples(scores: Sequence[float]) -> dict[str, Any]:
    """Mean, range and population standard deviation over samples, as the protocol reports them."""
    return {
        "mean": statistics.fmean(scores),
        "min": min(scores),
        "max": max(scores),
        "std": statistics.pstdev(scores),
        "samples": list(scores),
    }


def low_shot_result(precisions: Floats, costs: Sequence[float]) -> dict[str, Any]:
    """What is reported for one number of shots.

    Args:
        precisions: [samples, classes, costs].

    Returns:
        `chosen_on_test`: at the cost of the best mean over samples, as published numbers are; `at_cost_1`: at a cost
        that nothing was looked at for, None where 1 is not among the costs. Each has `over_samples` of the mAP and `ap`
        [samples][classes].
    """
    maps = precisions.mean(axis=1)  # [samples, costs]

    def at(place: int) -> dict[str, Any]:
        return {"cost": costs[place], **over_samples(maps[:, place].tolist()), "ap": precisions[:, :, place].tolist()}

    return {
        "chosen_on_test": at(choose(maps.mean(axis=0).tolist())),
        "at_cost_1": at(list(costs).index(1.0)) if 1.0 in costs else None,
    }


def check(targets: Targets, classes: Sequence[str], name: str, least: int) -> None:
    """See that every class can be told in a set.

    Args:
        targets: [N, C].
        name: of the set, for the message.
        least: images of each kind.

    Raises:
        DataError: naming the set and the class.
    """
    for symbol, what in ((1, "show it"), (0, "do not")):
        counts = (targets == symbol).sum(axis=0)
        for number in np.flatnonzero(counts < least)[:1]:
            said = f"{counts[number]} images {what}, expected at least {least}"
            raise DataError(f"{name}: class '{classes[number]}': {said}")


def rarest(targets: Targets, classes: Sequence[str]) -> str:
    """What limits the number of shots, in words."""
    fewest = {symbol: (targets == symbol).sum(axis=0) for symbol in (1, 0)}
    shown, not_shown = (int(counts.argmin()) for counts in fewest.values())
    said = f"{fewest[1][shown]} images show '{classes[shown]}', and {fewest[0][not_shown]} do not"
    return said if shown == not_shown else f"{said} show '{classes[not_shown]}'"
