"""Evaluations that only measure. One that trains (linear probing) is a recipe of its own."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import loaders
from engine import checkpoint, dist, faults, features
from engine.average_precision import Detections, Objects, detection_scores
from engine.consensus import Consensus
from engine.dist import World
from engine.errors import CheckpointError, EngineError, first_line
from engine.features import Network, Part
from engine.log import logger
from engine.recipe import EvalConfig, Recipe
from engine.ridge import ridge
from loaders import Batch, DataConfig, DataError, Index, LoaderError
from loaders.files import aside
from models import weight_signs
from models.methods import Method
from models.statistics import reestimate

T = TypeVar("T")
PIXELS = 32
"""Longest side at which raw pixels are compared."""
WARM_UP = 512
"""Images that the random network's BatchNorm has seen."""


class NotMeasured(Exception):
    """An evaluation that cannot be done, raised on all ranks in the same words; it has no number."""


class _Cut(Exception):
    """A signal has cut an evaluation short, on all ranks."""


def run(
    config: EvalConfig,
    method: Method,
    recipe: Recipe,
    indices: dict[str, Index],
    world: World,
    step: int | None = None,
) -> dict[str, Any] | None:
    """Run one evaluation on all ranks with rank 0's buffers, in float32; the method is left as it was, but that of
    several classifiers the best on held-out images is chosen.

    Args:
        indices: labeled images, `val` and, where it learns from some, `train`, where it chooses by some, `held_out`;
            where BatchNorm is estimated anew, `trained_on`.
        step: of the run, under whose number what was detected is kept in the run folder; None keeps nothing.

    Returns:
        `top1` and `per_class`, the mean over classes of the share of their images that are found (and `top5`;
        `baselines`, `signs` and `detection` have names of their own) in percent, and the number of images that were
        measured; of several classifiers also which is `chosen`, and the top-1 of each on both sets; None on all ranks
        where a signal cut it short, because a job that is about to be killed has no time for it.

    Raises:
        NotMeasured: it cannot be done, because of images, a loader or an error of its own on any rank.
        MachineError, Ended: memory ran out, a device or a rank is lost; that ends the run.
    """
    was_training, consensus = method.training, dist.consensus(world)
    dist.broadcast_buffers(method)
    method.eval()
    try:
        with torch.no_grad(), _precise(config.precise_bn, method, recipe, indices, world, consensus):
            if config.kind == "signs":
                return _signs(method, recipe, world, consensus)
            if config.kind == "baselines":
                return _baselines(config, method, recipe, indices, world, consensus)
            if config.kind == "detection":
                return _detection(config, method, recipe, indices, world, consensus, step)
            chosen = _choose(method, recipe, indices, world, consensus) if recipe.chooses(config) else {}
            network = pixels if config.pixels else method.features
            return {**measure(config, method.logits, network, recipe.data, indices, world), **chosen}
    except _Cut:
        return None
    finally:
        method.train(was_training)


@torch.no_grad()
def measure(
    config: EvalConfig, scores: Network, network: Network, data: DataConfig, indices: dict[str, Index], world: World
) -> dict[str, float]:
    """`run` for what needs a network in evaluation mode and no method around it: `accuracy`, `knn` and `ridge`.

    Args:
        scores: images [B, 3, H, W] to class scores [B, classes].
        network: images [B, 3, H, W] to features [B, D].
    """
    consensus = dist.consensus(world)
    if config.kind == "accuracy":
        return _accuracy(scores, data, indices["val"], world, consensus)
    return _knn(config, network, data, indices, world, consensus)


def _apart(action: Callable[[], T], consensus: Consensus) -> T:
    """Do what a rank does without the others; where one cannot, or is asked to stop, all learn of it here.

    Raises:
        NotMeasured, _Cut: on all ranks.
    """
    result: T | None = None
    problem = ""
    try:
        result = action()
    except Exception as error:
        if isinstance(error, EngineError) or faults.ends(error):
            raise
        is_plain = isinstance(error, DataError | LoaderError | ValueError)  # WeightsError is one
        problem = first_line(error) if is_plain else f"{type(error).__name__}: {first_line(error)}"
    if consensus.stops():
        raise _Cut
    for rank, text in enumerate(dist.gather_objects(problem)):
        if text:
            raise NotMeasured(f"rank {rank}: {text}" if consensus.world_size > 1 else text)
    return cast(T, result)


def _percent(hits: Tensor, measured: Tensor | int) -> list[float]:
    """Counts of hits [n] on this rank, of `measured` images, as percent over all ranks, and the images of all."""
    *counts, images = dist.total(torch.stack((*hits, torch.as_tensor(measured, device=hits.device))).double()).tolist()
    if not images:
        raise NotMeasured("no validation image can be decoded")
    return [*(100 * count / images for count in counts), images]


def _accuracy(scores: Network, data: DataConfig, index: Index, world: World, consensus: Consensus) -> dict[str, float]:
    classes = len(index.classes)

    def count() -> Tensor:
        counts = torch.zeros(2 + 2 * classes, dtype=torch.float64, device=world.device)  # top-5 hits, images, by class
        for batch in _batches(data, index, None, world, consensus):
            label = _labels(batch)
            hits = scores(batch.views[0]).topk(min(5, classes), dim=1).indices == label[:, None]  # [B, 5]
            both = hits.sum(), torch.tensor(len(label), device=world.device)
            counts += torch.cat((torch.stack(both), *_by_class(hits[:, 0], label, classes)))
        return counts

    counts = _apart(count, consensus)
    (in_five, images_seen), found, there = counts[:2], *counts[2:].chunk(2)
    top1, top5, measured = _percent(torch.stack((found.sum(), in_five)), images_seen)
    return {"top1": top1, "top5": top5, "per_class": recall(found, there), "measured": measured}


def _by_class(hit: Tensor, label: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """How many images of each class are found, and how many there are: two of [classes]."""
    return torch.bincount(label[hit], minlength=classes), torch.bincount(label, minlength=classes)


def recall(found: Tensor, there: Tensor) -> float:
    """Mean over classes of the share of their images that are found, in percent, over all ranks; classes without images
    left out.

    Args:
        found, there: images of each class on this rank [classes].
    """
    found, there = dist.total(torch.stack((found, there)).double())
    return float(100 * (found[there > 0] / there[there > 0]).mean())


def _choose(
    method: Method, recipe: Recipe, indices: dict[str, Index], world: World, consensus: Consensus
) -> dict[str, Any]:
    """Choose the classifier with the best top-1 on held-out images, the first of equals; and what all of them have."""
    names = recipe.method.choices
    found: dict[str, list[float]] = {}
    for split in ("held_out", "val"):

        def count(index: Index = indices[split]) -> Tensor:
            counts = torch.zeros(len(names) + 1, dtype=torch.float64, device=world.device)  # hits of each, images
            for batch in _batches(recipe.data, index, None, world, consensus):
                label = _labels(batch)
                counts[:-1] += (method.candidates(batch.views[0]).argmax(dim=2) == label).sum(dim=1)
                counts[-1] += len(label)
            return counts

        *hits, images_seen = _apart(count, consensus)
        *found[split], _ = _percent(torch.stack(hits), images_seen)
    best = max(range(len(names)), key=found["held_out"].__getitem__)
    method.choose(best)
    of_all = {"held_out": found["held_out"], "top1": found["val"]}
    each = {f"{key}/{name}": value for key, values in of_all.items() for name, value in zip(names, values, strict=True)}
    return {"chosen": names[best], "held_out": found["held_out"][best], **each}


def _signs(method: Method, recipe: Recipe, world: World, consensus: Consensus) -> dict[str, float]:
    """The share of binary weights that have another sign than in the networks that `init` loaded, in percent."""

    def count() -> tuple[int, int]:
        changed = compared = 0
        for init in recipe.init if world.is_main else ():
            try:
                parts = checkpoint.parts_of(init)
            except CheckpointError as error:  # no reason to end a run
                raise DataError(str(error)) from None
            for target, part in init.load.items():
                both = weight_signs.changed(method.get_submodule(target), parts[part])
                changed, compared = changed + both[0], compared + both[1]
        return changed, compared

    changed, compared = dist.gather_objects(_apart(count, consensus))[0]
    if not compared:
        raise NotMeasured("no entry of init has loaded a network with binary weights that trains")
    return {"changed_signs": 100 * changed / compared, "binary_weights": compared}


def _knn(
    config: EvalConfig,
    network: Network,
    data: DataConfig,
    indices: dict[str, Index],
    world: World,
    consensus: Consensus,
) -> dict[str, float]:
    """What nothing has to be trained for: k-NN, or a linear classifier in closed form."""
    train = indices["train"]
    rows = _bank(config.bank, train)
    bank, bank_label, query, query_label = _bank_and_query(network, rows, data, indices, world, consensus)
    if config.center:
        bank, query = centered(bank, query)
    # Every rank classifies its own share of the validation images against the whole bank.
    predicted = _apart(
        lambda: (
            ridge(bank, bank_label, query, len(train.classes))
            if config.kind == "ridge"
            else knn(bank, bank_label, query, len(train.classes), config.neighbors, config.temperature)
        ),
        consensus,
    )
    hit = predicted == query_label
    top1, images_seen = _percent(hit.sum()[None], len(query))
    per_class = recall(*_by_class(hit, query_label, len(train.classes)))
    return {"top1": top1, "per_class": per_class, "measured": images_seen}


def _baselines(
    config: EvalConfig,
    method: Method,
    recipe: Recipe,
    indices: dict[str, Index],
    world: World,
    consensus: Consensus,
) -> dict[str, float]:
    """Whether the network is worth anything: logistic regression on raw pixels, on the same network at random and on
    this one, and k-NN on raw pixels."""
    train = indices["train"]
    rows, classes = _bank(config.bank, train), len(train.classes)
    untrained = _apart(lambda: _untrained(recipe, train, rows, world, consensus), consensus)
    dist.broadcast_buffers(untrained)
    scores: dict[str, Tensor] = {}
    for name, extract in (("logistic", method.features), ("random", untrained.features), ("pixels", pixels)):
        bank, bank_label, query, query_label = _bank_and_query(extract, rows, recipe.data, indices, world, consensus)
        answers = {"top1": lambda: logistic(bank, bank_label, query, classes)}  # noqa: B023
        if extract is pixels:
            answers["knn"] = lambda: knn(bank, bank_label, query, classes, config.neighbors, config.temperature)  # noqa: B023
        for kind, answer in answers.items():
            scores[f"{name}_{kind}"] = (_apart(answer, consensus) == query_label).sum()
    *percent, images_seen = _percent(torch.stack(list(scores.values())), len(query))
    return dict(sorted(zip(scores, percent, strict=True))) | {"measured": images_seen}


def _detection(
    config: EvalConfig,
    method: Method,
    recipe: Recipe,
    indices: dict[str, Index],
    world: World,
    consensus: Consensus,
    step: int | None,
) -> dict[str, float]:
    """Average precision of boxes in the pixels of the images as they are stored; the same for any number of ranks."""
    index = indices["val"]
    mine = _apart(lambda: _boxes(method, recipe.data, index, world, consensus), consensus)
    found, images = (dist.gather_rows(rows.to(world.device)).cpu() for rows in mine)
    found = found[found[:, 0].argsort(stable=True)]  # an image is on one rank, its boxes in order
    images = images.sort().values
    if step is not None and world.is_main:
        paths = [index.path(row) for row in images.tolist()]
        _keep(
            recipe.folder / f"detections-{step}.npz",
            {"detections": found, "images": images, "paths": paths, "classes": index.classes},
        )
    assert index.objects is not None  # refused at the start
    truth = Objects(*index.objects.where(np.isin(index.objects.image, images.numpy())))
    row, label, score, *_ = found.numpy().T
    claimed = Detections(row.astype(np.int64), label.astype(np.int64), score, found[:, 3:].numpy())
    scores = _apart(
        lambda: detection_scores(claimed, truth, len(index.classes), mode=config.average_precision), consensus
    )
    of_class = {f"ap50/{name}": ap for name, ap in zip(index.classes, scores.of_class[:, 0], strict=True)}
    percent = {"ap50": scores.ap50, "ap": scores.ap, "ap75": scores.ap75, **of_class}
    return {name: 100 * float(ap) for name, ap in percent.items() if not math.isnan(ap)} | {
        "measured": float(len(images))
    }


def _boxes(method: Method, data: DataConfig, index: Index, world: World, consensus: Consensus) -> tuple[Tensor, Tensor]:
    """What is found on this rank's share of an index, [n, 7] float64 with rows (row of the index, class, score, box in
    pixels of the image as it is stored), and the rows [k] of the images that were looked at. On the host."""
    found, images = [torch.zeros(0, 7, dtype=torch.float64)], [torch.zeros(0, dtype=torch.int64)]
    for batch in _batches(data, index, None, world, consensus):
        label = _labels(batch)
        detections = method.detections(batch.views[0], label)
        for row, of_image, size in zip(batch.rows.tolist(), detections, label[:, 0, 3:5].cpu(), strict=True):
            scale = torch.tensor([index.width[row], index.height[row]], dtype=torch.float64) / size
            first = torch.full((len(of_image), 1), row, dtype=torch.float64)
            boxes = of_image.double().cpu()
            found.append(torch.cat((first, boxes[:, :2], boxes[:, 2:] * scale.repeat(2)), dim=1))
        images.append(batch.rows)
    return torch.cat(found), torch.cat(images)


@contextmanager
def _precise(
    count: int, method: Method, recipe: Recipe, indices: dict[str, Index], world: World, consensus: Consensus
) -> Iterator[None]:
    """BatchNorm with the statistics of `count` training micro-batches, if any. Each rank measures the same ones, so
    that the number of ranks is nowhere in the statistics."""
    if not count:
        yield
        return
    data = recipe.data.model_copy(update={"teacher_cache": None})
    zeros = {name: torch.zeros((), device=world.device) for name in recipe.method.schedules}
    before = [buffer.clone() for buffer in method.buffers()]

    def measure() -> None:
        twin = copy.deepcopy(method)  # a method may keep something for the end of its step, which no step ends here
        torch.manual_seed(recipe.seed)  # the next step seeds anew
        place = world.place._replace(rank=0, world_size=1)
        loader = loaders.open_train(data, indices["trained_on"], seed=recipe.seed, place=place)
        try:
            batches = itertools.takewhile(lambda _: not consensus.asked_to_stop, itertools.islice(loader, count))
            reestimate(twin, batches, lambda batch: twin(batch.views, batch.label, zeros))
        finally:
            loader.close()
        for buffer, new in zip(method.buffers(), twin.buffers(), strict=True):
            buffer.copy_(new)

    try:
        _apart(measure, consensus)
        dist.broadcast_buffers(method)  # two devices may round differently
        yield
    finally:
        for buffer, old in zip(method.buffers(), before, strict=True):
            buffer.copy_(old)


def _keep(path: Path, columns: dict[str, Any]) -> None:
    """Write what was detected: `detections` [n, 7] as of `_boxes`, rows and paths of the `images` that were looked at,
    names of the `classes`. A full disk must not cost the run."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays: Any = {name: np.asarray(column) for name, column in columns.items()}
        with aside(path) as out, open(out.part, "wb") as file:
            np.savez(file, **arrays)
    except OSError as error:
        logger.warning(f"{path} cannot be written: {error.strerror}; training continues")


def pixels(images: Tensor) -> Tensor:
    """Images [B, 3, H, W] as features [B, D], averaged down to a side of at most `PIXELS`."""
    if max(images.shape[2:]) > PIXELS:
        images = F.interpolate(images, size=(PIXELS, PIXELS), mode="area")
    return images.flatten(1)


def _untrained(recipe: Recipe, train: Index, rows: list[int], world: World, consensus: Consensus) -> Method:
    """The method of a recipe at random, the same on all ranks; its BatchNorm has seen some training images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        method = recipe.method.build()
    method.to(world.device).eval()
    batches = _batches(recipe.data, train, rows[:: max(1, len(rows) // WARM_UP)], world, consensus)
    reestimate(method.evaluated, (batch.views[0] for batch in batches if len(batch.rows) > 1))
    return method


def logistic(train: Tensor, train_label: Tensor, query: Tensor, num_classes: int) -> Tensor:
    """Multinomial logistic regression on standardized features, by L-BFGS.

    The L2 penalty is the one of four that does best on a tenth of the training features (a fixed draw), on which it is
    then fitted, too.

    Args:
        train, query: features [N, D] and [M, D].
        train_label: [N].

    Returns:
        Predicted labels [M].
    """
    std, mean = torch.std_mean(train.double(), dim=0, correction=0)
    scale = torch.where(std > 1e-6 * mean.abs(), std, torch.inf)  # what never changes says nothing

    def standardized(features: Tensor) -> Tensor:
        return (features.float() - mean.float()) / scale.float()

    train, query = standardized(train), standardized(query)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).to(train.device)
    held_out, fitted = order[: len(order) // 10], order[len(order) // 10 :]
    weight = train.new_zeros(num_classes, train.shape[1] + 1)
    best, best_hits = PENALTIES[0], -1
    for penalty in PENALTIES:  # from strong to weak: each starts from the one before
        weight = _fit(train[fitted], train_label[fitted], weight, penalty)
        hits = int((_scores(train[held_out], weight).argmax(dim=1) == train_label[held_out]).sum())
        if hits > best_hits:
            best, best_hits, chosen = penalty, hits, weight
    return _scores(query, _fit(train, train_label, chosen, best)).argmax(dim=1)


PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4)
"""Of half the squared norm of the weights, beside the mean cross-entropy."""


def _scores(features: Tensor, weight: Tensor) -> Tensor:
    return torch.addmm(weight[:, -1], features, weight[:, :-1].T)


def _fit(features: Tensor, label: Tensor, start: Tensor, penalty: float) -> Tensor:
    """Weights and biases [C, D + 1] from `start` on."""
    weight = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([weight], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(_scores(features, weight), label) + penalty / 2 * weight[:, :-1].square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    return weight.detach()


def _bank(most: int, index: Index) -> list[int]:
    """At most this many rows, evenly spaced over an index."""
    return np.linspace(0, len(index), min(most, len(index)), endpoint=False).astype(np.int64).tolist()


def knn(
    bank: Tensor, bank_label: Tensor, query: Tensor, num_classes: int, neighbors: int, temperature: float
) -> Tensor:
    """Weighted k-nearest-neighbor vote by cosine, weights exp(cos / T) (Wu et al. 2018, section 3.4), as shares of the
    largest one: exp(cos / T) itself overflows below T = 0.0113.

    Args:
        bank, query: features [N, D] and [M, D].
        bank_label: [N].

    Returns:
        Predicted labels [M].
    """
    return knn_ranked(bank, bank_label, query, num_classes, (neighbors,), temperature, most=1)[0, :, 0]


def knn_ranked(
    bank: Tensor,
    bank_label: Tensor,
    query: Tensor,
    num_classes: int,
    neighbors: Sequence[int],
    temperature: float,
    *,
    most: int = 5,
    done: Callable[[int], None] = lambda queries: None,
) -> Tensor:
    """`knn` with any numbers of neighbors in one pass, and more than the first answer.

    Args:
        done: told after each part how many queries there are answers for.

    Returns:
        [len(neighbors), M, most], classes by descending vote, equal ones in their order; -1 where no neighbor votes.
    """
    bank, query = F.normalize(bank.float(), dim=1), F.normalize(query.float(), dim=1)
    most = min(most, num_classes)
    ranked = bank_label.new_empty(len(neighbors), len(query), most)
    for start in range(0, len(query), size := max(1, min(1024, _SIMILARITIES // max(len(bank), 1)))):
        chunk = query[start : start + size]
        similarity, nearest = (chunk @ bank.T).topk(min(max(neighbors), len(bank)), dim=1)  # [m, k], largest first
        weight, label = ((similarity - similarity[:, :1]) / temperature).exp(), bank_label[nearest]
        for number, count in enumerate(neighbors):
            votes = torch.zeros(len(chunk), num_classes, device=bank.device)
            votes.scatter_add_(1, label[:, :count], weight[:, :count])
            votes, classes = votes.sort(dim=1, descending=True, stable=True)
            ranked[number, start : start + len(chunk)] = classes.where(votes > 0, -1)[:, :most]
        done(start + len(chunk))
    return ranked


_SIMILARITIES = 1 << 28
"""That are computed at a time: 1 GiB."""


def centered(bank: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
    """Features [N, D] and [M, D] without the mean of the first: what all have in common tells none from another, and a
    cosine is mostly that."""
    mean = bank.double().mean(dim=0)
    return (bank - mean).to(bank.dtype), (query - mean).to(query.dtype)


def _bank_and_query(
    network: Network,
    rows: list[int],
    data: DataConfig,
    indices: dict[str, Index],
    world: World,
    consensus: Consensus,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features [N, D] and labels [N] of the bank, in the order of the index for any number of ranks, and both of this
    rank's share of the validation images."""
    mine, query = _apart(
        lambda: (
            _features(network, data, indices["train"], rows, world, consensus),
            _features(network, data, indices["val"], None, world, consensus),
        ),
        consensus,
    )
    bank = features.gathered(mine)
    if not len(bank.rows):
        raise NotMeasured("no training image can be decoded")
    assert bank.label is not None and query.label is not None
    return bank.array, bank.label, query.array, query.label


def _features(
    network: Network, data: DataConfig, index: Index, rows: Sequence[int] | None, world: World, consensus: Consensus
) -> Part:
    found = features.parts(network, _batches(data, index, rows, world, consensus))
    return features.joined(found, network, data, world.device)


def _batches(
    data: DataConfig, index: Index, rows: Sequence[int] | None, world: World, consensus: Consensus
) -> Iterator[Batch]:
    def is_over() -> bool:
        return consensus.asked_to_stop or consensus.ending is not None

    return features.batches(data, index, rows, world, is_over=is_over)


def _labels(batch: Batch) -> Tensor:
    assert batch.label is not None  # refused at the start
    return batch.label
