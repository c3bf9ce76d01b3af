"""Evaluations that only measure. One that trains (linear probing) is a recipe of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import loaders
from engine import dist, faults, features
from engine.consensus import Consensus
from engine.dist import World
from engine.errors import EngineError, first_line
from engine.features import Network, Part
from engine.recipe import EvalConfig, Recipe
from loaders import DataConfig, DataError, Index, LoaderError
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
) -> dict[str, float] | None:
    """Run one evaluation on all ranks with rank 0's buffers, in float32; the method is left as it was.

    Args:
        indices: labeled images, `val` and, where it learns from some, `train`.

    Returns:
        `top1` and `per_class`, the mean over classes of the share of their images that are found (and `top5`;
        `baselines` has names of its own) in percent, and the number of images that were measured; None on all ranks
        where a signal cut it short, because a job that is about to be killed has no time for it.

    Raises:
        NotMeasured: it cannot be done, because of images, a loader or an error of its own on any rank.
        MachineError, Ended: memory ran out, a device or a rank is lost; that ends the run.
    """
    was_training, consensus = method.training, dist.consensus(world)
    dist.broadcast_buffers(method)
    method.eval()
    try:
        with torch.no_grad():
            if config.kind == "baselines":
                return _baselines(config, method, recipe, indices, world, consensus)
            return measure(config, method.logits, method.evaluated, recipe.data, indices, world)
    except _Cut:
        return None
    finally:
        method.train(was_training)


@torch.no_grad()
def measure(
    config: EvalConfig, scores: Network, network: Network, data: DataConfig, indices: dict[str, Index], world: World
) -> dict[str, float]:
    """`run` for what needs a network in evaluation mode and no method around it: every kind but `baselines`.

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
        is_plain = isinstance(error, DataError | LoaderError | ValueError)
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


def _knn(
    config: EvalConfig,
    network: Network,
    data: DataConfig,
    indices: dict[str, Index],
    world: World,
    consensus: Consensus,
) -> dict[str, float]:
    train = indices["train"]
    rows = _bank(config.bank, train)
    bank, bank_label, query, query_label = _bank_and_query(network, rows, data, indices, world, consensus)
    # Every rank classifies its own share of the validation images against the whole bank.
    predicted = _apart(
        lambda: knn(bank, bank_label, query, len(train.classes), config.neighbors, config.temperature), consensus
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
) -> Iterator[loaders.Batch]:
    def is_over() -> bool:
        return consensus.asked_to_stop or consensus.ending is not None

    return features.batches(data, index, rows, world, is_over=is_over)


def _labels(batch: loaders.Batch) -> Tensor:
    assert batch.label is not None  # refused at the start
    return batch.label
