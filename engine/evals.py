"""Evaluations that only measure. One that trains (linear probing) is a recipe of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import loaders
from engine import dist
from engine.consensus import Consensus
from engine.dist import World
from engine.recipe import EvalConfig, Recipe
from loaders import DataConfig, Index
from models.methods import Method

PIXELS = 32
"""Longest side at which raw pixels are compared."""
WARM_UP = 512
"""Images that the random network's BatchNorm has seen."""


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
        `top1` (and `top5`; `baselines` has names of its own) in percent, and the number of images that were measured;
        None on all ranks where a signal cut it short, because a job that is about to be killed has no time for it.
    """
    data = recipe.data
    was_training, consensus = method.training, dist.consensus(world)
    dist.broadcast_buffers(method)
    method.eval()
    try:
        with torch.no_grad():
            if config.kind == "accuracy":
                return _accuracy(method, data, indices["val"], world, consensus)
            if config.kind == "baselines":
                return _baselines(config, method, recipe, indices, world, consensus)
            return _knn(config, method.evaluated, data, indices, world, consensus)
    finally:
        method.train(was_training)


def _accuracy(
    method: Method, data: DataConfig, index: Index, world: World, consensus: Consensus
) -> dict[str, float] | None:
    counts = torch.zeros(3, dtype=torch.float64, device=world.device)  # top-1 hits, top-5 hits, images
    for images, label in _batches(data, index, None, world, consensus):
        ranked = method.logits(images).topk(min(5, len(index.classes)), dim=1).indices  # [B, 5]
        hits = ranked == label[:, None]
        counts += torch.stack((hits[:, :1].sum(), hits.sum(), torch.tensor(len(label), device=world.device)))
    if consensus.stops():
        return None
    top1, top5, images_seen = dist.total(counts).tolist()
    return {"top1": 100 * top1 / images_seen, "top5": 100 * top5 / images_seen, "measured": images_seen}


def _knn(
    config: EvalConfig,
    network: nn.Module,
    data: DataConfig,
    indices: dict[str, Index],
    world: World,
    consensus: Consensus,
) -> dict[str, float] | None:
    rows = _bank(config.bank, indices["train"])
    own_bank = _features(network, data, indices["train"], rows, world, consensus)
    query, query_label = _features(network, data, indices["val"], None, world, consensus)
    if consensus.stops():
        return None
    bank, bank_label = (dist.gather_rows(part) for part in own_bank)
    # Every rank classifies its own share of the validation images against the whole bank.
    predicted = knn(bank, bank_label, query, len(indices["train"].classes), config.neighbors, config.temperature)
    hits = (predicted == query_label).sum()
    counts = torch.stack((hits, torch.tensor(len(query), device=hits.device))).double()
    top1, images_seen = dist.total(counts).tolist()
    return {"top1": 100 * top1 / images_seen, "measured": images_seen}


def _baselines(
    config: EvalConfig,
    method: Method,
    recipe: Recipe,
    indices: dict[str, Index],
    world: World,
    consensus: Consensus,
) -> dict[str, float] | None:
    """Whether the network is worth anything: logistic regression on raw pixels, on the same network at random and on
    this one, and k-NN on raw pixels."""
    data, train = recipe.data, indices["train"]
    rows = _bank(config.bank, train)
    untrained = _untrained(recipe, indices["train"], rows, world, consensus)
    scores: dict[str, Tensor] = {}
    for name, extract in (("logistic", method.features), ("random", untrained.features), ("pixels", pixels)):
        own_bank = _features(extract, data, train, rows, world, consensus)
        query, query_label = _features(extract, data, indices["val"], None, world, consensus)
        if consensus.stops():
            return None
        # In the order of the index, for every number of ranks: the loader deals images out in turns.
        bank, bank_label = (_dealt(dist.gather_rows(part), world.world_size) for part in own_bank)
        classes = len(train.classes)
        scores[f"{name}_top1"] = logistic(bank, bank_label, query, classes) == query_label
        if extract is pixels:
            nearest = knn(bank, bank_label, query, classes, config.neighbors, config.temperature)
            scores[f"{name}_knn"] = nearest == query_label
    hits = [*scores.values(), torch.ones_like(query_label, dtype=torch.bool)]
    *counts, images_seen = dist.total(torch.stack([hit.sum() for hit in hits]).double()).tolist()
    percent = {name: 100 * count / images_seen for name, count in zip(scores, counts, strict=True)}
    return {name: percent[name] for name in sorted(percent)} | {"measured": images_seen}


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
    method.to(world.device)
    method.eval()
    method.evaluated.train()
    for part in method.evaluated.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.momentum = None  # the mean over all batches
    for images, _ in _batches(recipe.data, train, rows[:: max(1, len(rows) // WARM_UP)], world, consensus):
        if len(images) > 1:
            method.features(images)
    dist.broadcast_buffers(method)
    return method.eval()


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


def _dealt(rows: Tensor, world_size: int) -> Tensor:
    """Rows gathered rank by rank, back in the order in which they were dealt out in turns."""
    places = torch.cat([torch.arange(rank, len(rows), world_size) for rank in range(world_size)])
    ordered = torch.empty_like(rows)
    ordered[places.to(rows.device)] = rows
    return ordered


def knn(
    bank: Tensor, bank_label: Tensor, query: Tensor, num_classes: int, neighbors: int, temperature: float
) -> Tensor:
    """Weighted k-nearest-neighbor vote by cosine, weights exp(cos / T) (Wu et al. 2018, section 3.4).

    Args:
        bank, query: features [N, D] and [M, D].
        bank_label: [N].

    Returns:
        Predicted labels [M].
    """
    bank, query = F.normalize(bank.float(), dim=1), F.normalize(query.float(), dim=1)
    predicted = []
    for chunk in query.split(1024):
        similarity, nearest = (chunk @ bank.T).topk(min(neighbors, len(bank)), dim=1)  # [m, k]
        votes = torch.zeros(len(chunk), num_classes, device=bank.device)
        votes.scatter_add_(1, bank_label[nearest], (similarity / temperature).exp())
        predicted.append(votes.argmax(dim=1))
    return torch.cat(predicted) if predicted else bank_label.new_empty(0)


def _features(
    network: Callable[[Tensor], Tensor],
    data: DataConfig,
    index: Index,
    rows: list[int] | None,
    world: World,
    consensus: Consensus,
) -> tuple[Tensor, Tensor]:
    features, labels = [], []
    for images, label in _batches(data, index, rows, world, consensus):
        features.append(network(images))
        labels.append(label)
    if not features:  # fewer images than ranks
        width = network(torch.zeros(1, 3, *(data.eval_view.size,) * 2, device=world.device)).shape[1]
        return torch.zeros(0, width, device=world.device), torch.zeros(0, dtype=torch.int64, device=world.device)
    return torch.cat(features), torch.cat(labels)


def _batches(
    data: DataConfig, index: Index, rows: list[int] | None, world: World, consensus: Consensus
) -> Iterator[tuple[Tensor, Tensor]]:
    loader = loaders.open_eval(data, index, rows=rows, place=world.place)
    try:
        for batch in loader:
            if consensus.asked_to_stop or consensus.ending is not None:
                return
            assert batch.label is not None  # refused at the start
            if len(batch.label):
                yield batch.views[0], batch.label
    finally:
        loader.close()
