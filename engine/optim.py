"""Parameter groups and optimizers."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from engine.recipe import OptimConfig


def build(config: OptimConfig, module: nn.Module) -> torch.optim.Optimizer:
    """The optimizer over everything in `module` that trains; learning rate and decay come with `apply`.

    Group `plain` exists where `decay: weights` exempts parameters from weight decay.
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": members, "name": name}
        for name, members in (
            ("decayed", [p for p in trained if config.decay == "all" or is_weight(p)]),
            ("plain", [p for p in trained if config.decay != "all" and not is_weight(p)]),
        )
        if members
    ]
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=config.momentum, nesterov=config.nesterov)
    kind = torch.optim.Adam if config.name == "adam" else torch.optim.AdamW
    fused = all(parameter.is_cuda for parameter in trained)
    return kind(groups, lr=0.0, betas=config.betas, eps=config.eps, weight_decay=0.0, fused=fused)


def is_weight(parameter: torch.Tensor) -> bool:
    """Whether a parameter is a matrix or a convolution, not a bias, an affine, a slope or a shift [1, C, 1, 1]."""
    return sum(side > 1 for side in parameter.shape) > 1


def apply(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    """Set this step's learning rate and weight decay."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        group["weight_decay"] = weight_decay if group["name"] == "decayed" else 0.0


def gradient_norm(parameters: Iterable[torch.Tensor]) -> torch.Tensor:
    """2-norm of all gradients as one 0-d tensor on their device; not finite if any gradient is not."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return torch.stack(torch._foreach_norm(gradients)).float().norm()
