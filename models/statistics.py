"""BatchNorm's running statistics, estimated anew."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def reestimate(network: nn.Module, batches: Iterable[Tensor]) -> None:
    """Make running statistics of BatchNorm the mean of those of some batches, in place ("precise BatchNorm", Wu and
    Johnson 2021, arXiv:2105.07576, section 3).

    Running averages lag behind weights that still move, and in a binary network signs sit on thresholds. All layers are
    estimated in one pass, each on what comes through the batch statistics of those before it, as in training; modes,
    momenta and all else stay as they were. Without a batch nothing changes.

    Args:
        batches: of images [B, 3, H, W], B at least 2.
    """
    norms = [
        module
        for module in network.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
    ]
    kept = [(norm.momentum, norm.training) for norm in norms]
    is_first = True
    try:
        with torch.no_grad():
            for images in batches:
                if is_first:
                    for norm in norms:
                        norm.reset_running_stats()
                        norm.momentum = None  # the mean over all batches
                        norm.training = True
                    is_first = False
                network(images)
    finally:
        for norm, (momentum, training) in zip(norms, kept, strict=True):
            norm.momentum, norm.training = momentum, training
