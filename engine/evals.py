"""Evaluations that only measure. One that trains (linear probing) is a recipe of its own."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import loaders
from engine import dist
from engine.consensus import Consensus
from engine.dist import World
from engine.recipe import EvalConfig
from loaders import DataConfig, Index
from models.methods import Method


def run(
    config: EvalConfig,
    method: Method,
    data: DataConfig,
    indices: dict[str, Index],
    world: World,
) -> dict[str, float] | None:
    """Run one evaluation on all ranks with rank 0's buffers, in float32; the method is left as it was.

    Args:
        indices: labeled images, `val` and, where it learns from some, `train`.

    Returns:
        `top1` (and `top5`) in percent, and the number of images that were measured; None on all ranks where a signal
        cut it short, because a job that is about to be killed has no time for it.
    """
    was_training, consensus = method.training, dist.consensus(world)
    dist.broadcast_buffers(method)
    method.eval()
    try:
        with torch.no_grad():
            if config.kind == "accuracy":
                return _accuracy(method, data, indices["val"], world, consensus)
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
    count = min(config.bank, len(indices["train"]))
    rows = np.linspace(0, len(indices["train"]), count, endpoint=False).astype(np.int64).tolist()
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
    network: nn.Module, data: DataConfig, index: Index, rows: list[int] | None, world: World, consensus: Consensus
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
