"""A linear classifier in closed form: no learning rate to choose, one minimum, seconds instead of minutes."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

PENALTIES = (10.0, 1.0, 1e-1, 1e-2, 1e-3, 1e-4)
"""From strong to weak, as shares of a feature's variance, which is 1 where all are standardized."""


def ridge(train: Tensor, train_label: Tensor, query: Tensor, num_classes: int) -> Tensor:
    """Least squares on one-hot labels with an L2 penalty, on standardized features in float64: the largest output wins.

    The penalty is the one of `PENALTIES` that does best on a tenth of the training features (a fixed draw), the
    stronger of two that are equal; then all of them are fitted with it.

    Args:
        train, query: features [N, D] and [M, D]; N of at least 2.
        train_label: [N].

    Returns:
        Predicted labels [M].
    """
    std, mean = torch.std_mean(train.double(), dim=0, correction=0)
    scale = torch.where(std > 1e-6 * mean.abs(), std, torch.inf)  # what never changes says nothing
    train, query = (train.double() - mean) / scale, (query.double() - mean) / scale
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).to(train.device)
    held_out, fitted = order[: len(order) // 10], order[len(order) // 10 :]
    solve = least_squares(train[fitted], train_label[fitted], num_classes)
    hits = [int((scores(train[held_out], solve(p)).argmax(dim=1) == train_label[held_out]).sum()) for p in PENALTIES]
    best = PENALTIES[hits.index(max(hits))]
    return scores(query, least_squares(train, train_label, num_classes)(best)).argmax(dim=1)


def scores(features: Tensor, weight: Tensor) -> Tensor:
    """Features [N, D] and weights with biases [C, D + 1] to outputs [N, C]."""
    return torch.addmm(weight[:, -1], features, weight[:, :-1].T)


def least_squares(features: Tensor, label: Tensor, num_classes: int) -> Callable[[float], Tensor]:
    """What minimizes mean ‖W x + b - y‖² + penalty ‖W‖² over [N, D] features and one-hot labels y: penalty -> weights
    and biases [C, D + 1]. What all penalties share is computed once."""
    target = F.one_hot(label, num_classes).to(features.dtype)
    mean, share = features.mean(dim=0), target.mean(dim=0)
    centered, count = features - mean, len(features)
    is_wide = features.shape[1] > count  # the same minimum by the smaller of the two matrices
    product = (centered @ centered.T if is_wide else centered.T @ centered) / count
    right = (target - share) / count if is_wide else centered.T @ (target - share) / count

    def solve(penalty: float) -> Tensor:
        found = torch.linalg.solve(product + penalty * torch.eye(len(product)).to(product), right)
        weight = (centered.T @ found if is_wide else found).T  # [C, D]
        return torch.cat((weight, (share - weight @ mean)[:, None]), dim=1)

    return solve
