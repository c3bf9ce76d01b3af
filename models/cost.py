"""Parameters and operations of a network, counted on the meta device."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.binary import BinaryConv2d


class Cost(NamedTuple):
    """Multiply-accumulates of one image's forward pass; OPs = float + binary / 64 as in Bi-Real Net."""

    float_macs: int
    binary_macs: int

    @property
    def ops(self) -> float:
        """The field's single number: a binary multiply-accumulate counts 1/64."""
        return self.float_macs + self.binary_macs / 64


def count(network: nn.Module, size: int) -> Cost:
    """Count convolutions and linear layers for one image [1, 3, size, size].

    A convolution counts as binary when both its weights and its input are. The network must live on the
    meta device (build it under `torch.device("meta")`), so nothing is computed and no memory is taken.
    """
    totals = {"float": 0, "binary": 0}

    def add(module: nn.Module, args: Any, output: Tensor) -> None:
        if isinstance(module, nn.Conv2d):
            macs = output.numel() * module.weight[0].numel()
        else:
            assert isinstance(module, nn.Linear)
            macs = output.numel() * module.in_features
        is_binary = isinstance(module, BinaryConv2d) and module.weights == module.activations == "binary"
        totals["binary" if is_binary else "float"] += macs

    hooks = [
        module.register_forward_hook(add) for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    was_training = network.training
    try:
        with torch.no_grad():
            network.eval()(torch.empty(1, 3, size, size, device="meta"))
    finally:
        network.train(was_training)
        for hook in hooks:
            hook.remove()
    return Cost(totals["float"], totals["binary"])
