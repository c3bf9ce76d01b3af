"""Parameter groups and optimizers."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from engine.recipe import OptimConfig, RecipeError


def build(config: OptimConfig, module: nn.Module) -> torch.optim.Optimizer:
    """The optimizer over everything in `module` that trains; learning rate and decay come with `apply`.

    A group holds the parameters of equal `lr_scale` that are all decayed or all exempt from weight decay.

    Raises:
        RecipeError: `lr_scale` names a part that the method has not, or that does not train.
    """
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    parts = {name.split(".", 1)[0] for name in trained}
    for part in set(config.lr_scale) - parts:
        raise RecipeError(f"optim.lr_scale.{part}: not a part that trains, expected one of {', '.join(sorted(parts))}")
    members: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in trained.items():
        scale = config.lr_scale.get(name.split(".", 1)[0], 1.0)
        members.setdefault((scale, config.decay == "all" or is_weight(parameter)), []).append(parameter)
    groups = [
        {"params": parameters, "lr_scale": scale, "decayed": decayed}
        for (scale, decayed), parameters in members.items()
    ]
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=config.momentum, nesterov=config.nesterov)
    kind = torch.optim.Adam if config.name == "adam" else torch.optim.AdamW
    fused = all(parameter.is_cuda for parameter in trained.values())
    return kind(groups, lr=0.0, betas=config.betas, eps=config.eps, weight_decay=0.0, fused=fused)


def is_weight(parameter: torch.Tensor) -> bool:
    """Whether a parameter is a matrix or a convolution, not a bias, an affine, a slope or a shift [1, C, 1, 1]."""
    return sum(side > 1 for side in parameter.shape) > 1


def apply(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    """Set this step's learning rate and weight decay."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
        group["weight_decay"] = weight_decay if group["decayed"] else 0.0


def gradient_norm(parameters: Iterable[torch.Tensor]) -> torch.Tensor:
    """2-norm of all gradients as one 0-d tensor on their device; not finite if any gradient is not."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return torch.stack(torch._foreach_norm(gradients)).float().norm()
