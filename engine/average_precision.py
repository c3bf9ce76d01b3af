"""Average precision of rankings and of detected boxes, in float64. The one place where it is defined.

Four definitions go by the same name and differ by several points on small sets:

| mode | what | where |
|---|---|---|
| `envelope` | area under the precision-recall curve, made monotone | VOC from 2010 on; the test of the VOC07 SVM |
| `step` | mean precision at the hits, the curve as it is | scikit-learn; cross-validation of the VOC07 SVM |
| `eleven` | mean of the monotone curve at recalls 0, 0.1 ... 1 | VOC 2007 (Everingham et al. 2010, section 4.2) |
| `coco` | the same at `numpy.linspace(0, 1, 101)` | COCO |

`eleven` compares recalls as whole numbers. The usual `numpy.arange(0, 1.1, 0.1)` has 0.3, 0.6 and 0.7 one unit in the
last place too high, so that a recall of exactly 0.3 misses its own point. `coco` keeps such misses, because its numbers
are those of pycocotools.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from loaders import Objects

Mode = Literal["envelope", "step", "eleven", "coco"]
THRESHOLDS = np.arange(50, 100, 5) / 100
"""Overlaps at which boxes are matched: 0.50, 0.55 ... 0.95."""
_AP50, _AP75 = 0, 5


def average_precision(hits: ArrayLike, positives: int, mode: Mode) -> float:
    """Average precision of a ranking, from 0 to 1; NaN where there is nothing to find.

    Args:
        hits: [D], whether each of what was found is right, the most certain first.
        positives: how many there are to find.
    """
    is_hit = np.asarray(hits, dtype=bool)
    if positives == 0:
        return float("nan")
    found = np.cumsum(is_hit)
    assert found.max(initial=0) <= positives, "more hits than positives"
    precision = found / np.arange(1, len(found) + 1)
    if mode == "step":
        return float(precision[is_hit].sum() / positives)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    if mode == "envelope":
        return float(envelope[is_hit].sum() / positives)
    if mode == "eleven":
        first = np.searchsorted(10 * found, positives * np.arange(11))
    else:
        first = np.searchsorted(found / positives, np.linspace(0, 1, 101))
    return float(np.append(envelope, 0)[first].mean())


def classified(target: ArrayLike, score: ArrayLike, mode: Mode) -> float:
    """Average precision of images [N] that are ranked for one class; equal scores count in their order here.

    Args:
        target: [N], 1 where the class is there, 0 where it is not, -1 where it is too difficult to count: left out.
        score: [N], higher where the class is believed to be there.
    """
    of_image, certainty = np.asarray(target), np.asarray(score, dtype=np.float64)
    counted = of_image != -1
    of_image, certainty = of_image[counted], certainty[counted]
    ranked = of_image[np.argsort(-certainty, kind="stable")] == 1
    return average_precision(ranked, int(ranked.sum()), mode)


class Detections(NamedTuple):
    """D boxes that a network claims; where scores are equal, those of lower images come first, then those that come
    first here."""

    image: NDArray[np.int64]  # [D]
    label: NDArray[np.int64]  # [D]
    score: NDArray[np.float64]  # [D]
    box: NDArray[np.float64]  # [D, 4]: x1, y1, x2, y2, continuous coordinates

    def where(self, chosen: NDArray[np.bool_]) -> Detections:
        """Those that a mask [D] chooses."""
        return Detections(self.image[chosen], self.label[chosen], self.score[chosen], self.box[chosen])


class DetectionScores(NamedTuple):
    """Average precision of detections, from 0 to 1; means are over the classes that have objects which count."""

    ap50: float
    """At an overlap of 0.5."""
    ap: float
    """Mean over the ten `THRESHOLDS`."""
    ap75: float
    """At an overlap of 0.75."""
    of_class: NDArray[np.float64]
    """[C, 10], each class at each of the `THRESHOLDS`; NaN for a class without objects that count."""


def detection_scores(
    found: Detections, truth: Objects, num_classes: int, *, mode: Mode = "eleven", rules: Literal["voc", "coco"] = "voc"
) -> DetectionScores:
    """Score the detections of a data set, whose boxes are in the pixels of the images as they are stored.

    Args:
        mode: `eleven` for VOC 2007, `envelope` for VOC 2012, `coco` with its own rules.

    Raises:
        ValueError: no object counts.
    """
    rows = []
    for label in range(num_classes):
        of_class = truth.where(truth.label == label)
        hits, misses = match(found.where(found.label == label), of_class, rules=rules)
        positives = int((~of_class.difficult).sum())
        counted = zip(hits, hits | misses, strict=True)
        rows.append([average_precision(is_hit[counts], positives, mode) for is_hit, counts in counted])
    scores = np.array(rows)
    known = scores[~np.isnan(scores[:, 0])]
    if not len(known):
        raise ValueError("no object counts: each is difficult, or there is none")
    ap50, ap, ap75 = known[:, _AP50].mean(), known.mean(), known[:, _AP75].mean()
    return DetectionScores(float(ap50), float(ap), float(ap75), scores)


def match(
    found: Detections,
    truth: Objects,
    thresholds: NDArray[np.float64] = THRESHOLDS,
    rules: Literal["voc", "coco"] = "voc",
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which detections of one class are right, by descending score; labels are not looked at.

    VOC (the development kit of 2007): the object that a detection overlaps most is the one it stands for. Overlap not
    above the threshold: a miss. A difficult object: neither hit nor miss. An object that a better detection has: a
    miss. COCO: the free object that it overlaps most, at the threshold or above; without difficult objects.

    Args:
        thresholds: [T].

    Returns:
        Hits and misses, [T, D] each; what is neither does not count.
    """
    order = np.lexsort((found.image, -found.score))
    image, box = found.image[order], found.box[order]
    if rules == "coco":
        assert not truth.difficult.any(), "COCO's rules know no difficult objects"
        return _match_free(image, box, truth, thresholds)
    return _match_nearest(image, box, truth, thresholds)


def _match_nearest(
    image: NDArray[np.int64], box: NDArray[np.float64], truth: Objects, thresholds: NDArray[np.float64]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    nearest, overlap = np.zeros(len(image), dtype=np.int64), np.zeros(len(image))
    for here, objects in _of_each_image(image, truth.image):
        overlaps = iou(box[here], truth.box[objects])  # [d, m]
        nearest[here], overlap[here] = objects[overlaps.argmax(axis=1)], overlaps.max(axis=1)
    is_near = overlap > thresholds[:, None]  # [T, D]
    passed_over = is_near & np.append(truth.difficult, False)[nearest]  # one too many: there may be no object
    hits = np.zeros_like(is_near)
    for row, takes in enumerate(is_near & ~passed_over):
        candidates = np.flatnonzero(takes)
        first = np.unique(nearest[candidates], return_index=True)[1]  # the best detection of each object
        hits[row, candidates[first]] = True
    return hits, ~hits & ~passed_over


def _match_free(
    image: NDArray[np.int64], box: NDArray[np.float64], truth: Objects, thresholds: NDArray[np.float64]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    hits = np.zeros((len(thresholds), len(image)), dtype=bool)
    for here, objects in _of_each_image(image, truth.image):
        overlaps = iou(box[here], truth.box[objects])
        for row, threshold in enumerate(thresholds):
            free = np.ones(len(objects), dtype=bool)
            for place, of_place in zip(here, overlaps, strict=True):
                candidates = np.where(free, of_place, -1)
                last = len(objects) - 1 - int(candidates[::-1].argmax())  # of equals the last, as pycocotools
                if candidates[last] >= threshold:
                    hits[row, place], free[last] = True, False
    return hits, ~hits


def _of_each_image(
    image: NDArray[np.int64], of_truth: NDArray[np.int64]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Places of the detections and of the objects of each image that has both."""
    for number in np.intersect1d(image, of_truth):
        yield np.flatnonzero(image == number), np.flatnonzero(of_truth == number)


def iou(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Intersection over union of boxes [N, 4] and [M, 4] as (x1, y1, x2, y2) in continuous coordinates: [N, M].

    VOC's own formula counts inclusive pixels, with a + 1 on every side; a box read as (xmin - 1, ymin - 1, xmax, ymax)
    has the same overlap without it.
    """
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    both = (high - low).clip(min=0).prod(axis=2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(axis=1) for boxes in (a, b)]
    union = areas[0][:, None] + areas[1][None, :] - both
    return np.divide(both, union, out=np.zeros_like(both), where=union > 0)
