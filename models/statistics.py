"""BatchNorm's statistics, measured anew."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import nn

from models.backbones import backbones_of

T = TypeVar("T")


@torch.no_grad()
def reestimate(network: nn.Module, batches: Iterable[T], run: Callable[[T], Any] | None = None) -> None:
    """Give every BatchNorm that trains the mean over some batches of their means and variances, in place of the
    running averages of training, which lag behind the weights ("precise BN", Wu and Johnson 2021, section 3). A sign
    sits on its threshold: stale statistics flip it.

    Modes and momenta are restored; a BatchNorm that does not train (frozen, or without statistics) is left alone.

    Args:
        batches: what the network is called with, one after the other.
        run: calls the network with a batch otherwise than as `network(batch)`.

    Raises:
        ValueError: there are no batches; nothing has changed.
    """
    batches = iter(batches)
    try:
        first = next(batches)
    except StopIteration:
        raise ValueError("BatchNorm cannot be measured: there are no batches") from None
    modes = {module: module.training for module in network.modules()}
    network.train()
    norms = [
        module
        for module in network.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training and module.track_running_stats
    ]
    momenta = [norm.momentum for norm in norms]
    # The fused form knows no mean over batches.
    fused = [part for part in backbones_of(network).values() if part.fused]
    try:
        for part in fused:
            part.fused = False
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # PyTorch's name for the mean over all batches
        for batch in itertools.chain([first], batches):
            (run or network)(batch)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for part in fused:
            part.fused = True
        for module, mode in modes.items():
            module.training = mode
