"""Parameter groups and optimizers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from engine.errors import RecipeError
from engine.recipe import OptimConfig
from models.methods import Method


def build(config: OptimConfig, module: nn.Module) -> torch.optim.Optimizer:
    """The optimizer over everything in `module` that trains; learning rate and decay come with `apply`.

    A group holds the parameters of equal factors on learning rate and weight decay that are all decayed or all exempt
    from weight decay (and from LARS's rates).

    Raises:
        RecipeError: `lr_scale` names a part that the method does not have, or that does not train.
    """
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    parts = {name.split(".", 1)[0] for name in trained}
    for part in set(config.lr_scale) - parts:
        raise RecipeError(f"optim.lr_scale.{part}: not a part that trains, expected one of {', '.join(sorted(parts))}")
    factors = module.factors if isinstance(module, Method) else {}
    members: dict[tuple[float, float, bool], list[str]] = {}
    for name, parameter in trained.items():
        own = next((both for part, both in factors.items() if name.startswith(f"{part}.")), (1.0, 1.0))
        scale = config.lr_scale.get(name.split(".", 1)[0], 1.0) * own[0]
        members.setdefault((scale, own[1], config.decay == "all" or is_weight(parameter)), []).append(name)
    groups = [
        {
            "params": [trained[name] for name in names],
            "names": names,
            "lr_scale": scale,
            "decay_scale": decay_scale,
            "decayed": decayed,
        }
        for (scale, decay_scale, decayed), names in members.items()
    ]
    if config.name in ("lars", "larc"):
        return LARS(groups, momentum=config.momentum, trust=config.trust, rate_in_buffer=config.name == "lars")
    # The fused forms take a loss scaler's verdict as a tensor; the others wait for it.
    fused = all(parameter.is_cuda for parameter in trained.values())
    if config.name == "sgd":
        sgd = torch.optim.SGD(groups, lr=0.0, momentum=config.momentum, nesterov=config.nesterov, fused=fused)
        if config.momentum:
            # If the scaler skips the first step, PyTorch's fused form leaves buffers that it made uninitialized.
            for parameter in trained.values():
                sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return sgd
    kind = torch.optim.Adam if config.name == "adam" else torch.optim.AdamW
    return kind(groups, lr=0.0, betas=config.betas, eps=config.eps, weight_decay=0.0, fused=fused)


def load_state_dict(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> str:
    """Continue with the moments of a checkpoint, parameter by parameter. All else is as the optimizer was built: groups
    and settings are the recipe's, and a GPU's form of the update may be none of a CPU's.

    Returns:
        What starts anew because the checkpoint has nothing for it, in one line, or "".
    """
    own, then = optimizer.state_dict(), state["param_groups"]
    if _kind(own["param_groups"]) != _kind(then):
        return "the optimizer is of another kind: its moments start anew"
    names = [name for group in then for name in group.get("names", ())]
    if not names:  # of an older version, which had the parameters in the same order if it had the same groups
        if [len(group["params"]) for group in then] != [len(group["params"]) for group in own["param_groups"]]:
            return "the optimizer has other groups than this older checkpoint: its moments start anew"
        names = [name for group in own["param_groups"] for name in group["names"]]
    place = dict(zip(names, (number for group in then for number in group["params"]), strict=True))
    moments, lacking = {}, []
    for group in own["param_groups"]:
        for name, number in zip(group["names"], group["params"], strict=True):
            if place.get(name) in state["state"]:
                moments[number] = state["state"][place[name]]
            elif number in own["state"]:
                moments[number] = own["state"][number]
            if name not in place:
                lacking.append(name)
    optimizer.load_state_dict({"state": moments, "param_groups": own["param_groups"]})
    return (
        f"{len(lacking)} parameters, {lacking[0]} first, did not train before: their moments are new" if lacking else ""
    )


def _kind(groups: list[dict[str, Any]]) -> tuple[bool, Any]:
    """Optimizers of one kind can continue each other: their moments mean the same."""
    return "betas" in groups[0], groups[0].get("rate_in_buffer")


class LARS(torch.optim.Optimizer):
    """SGD whose step of each tensor is scaled by ‖w‖ / ‖g + λw‖ (You, Gitman and Ginsburg 2017).

    With d = g + λw and r = trust · ‖w‖ / (‖g‖ + λ‖w‖); r = 1 for tensors exempt from decay and for those that are all
    zero, which could otherwise never move; r = 0 where the gradient is all zero, so that decay alone moves nothing:
    `lars`: v <- μv + lr · r · d, w <- w - v (BYOL; OpenSelfSup).
    `larc`: v <- μv + r · d, w <- w - lr · v (NVIDIA apex without clipping; SwAV).
    Nothing here waits for the device.

    Args:
        params: groups with `lr`, `weight_decay` and `decayed`.
        momentum: μ.
        trust: the trust coefficient, 1e-3 in both papers' code.
        rate_in_buffer: `lars` rather than `larc`.
    """

    # A loss scaler then hands over its verdict as a tensor instead of waiting for it.
    _step_supports_amp_scaling = True

    def __init__(
        self, params: Iterable[dict[str, Any]], *, momentum: float, trust: float, rate_in_buffer: bool
    ) -> None:
        defaults = {"lr": 0.0, "weight_decay": 0.0, "decayed": True, "momentum": momentum, "trust": trust}
        super().__init__(params, {**defaults, "rate_in_buffer": rate_in_buffer})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of all parameters that have a gradient; none where a loss scaler has found an overflow."""
        assert getattr(self, "grad_scale", None) is None, "gradients are unscaled before the step"
        overflow = getattr(self, "found_inf", None)  # 0-d, 0 or more
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if not weights:
                continue
            for weight in weights:
                if not self.state[weight]:
                    self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
            buffers = [self.state[weight]["momentum_buffer"] for weight in weights]
            gradients = [weight.grad for weight in weights]
            updates = torch._foreach_add(gradients, weights, alpha=group["weight_decay"])
            if group["decayed"]:
                torch._foreach_mul_(updates, self._rates(weights, gradients, group))
            lr = group["lr"]
            before = torch._foreach_clone(buffers) if overflow is not None else []
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, updates, alpha=lr if group["rate_in_buffer"] else 1.0)
            if overflow is not None:
                for buffer, old in zip(buffers, before, strict=True):
                    buffer.copy_(torch.where(overflow > 0, old, buffer))
                moves = [torch.where(overflow > 0, torch.zeros_like(buffer), buffer) for buffer in buffers]
            else:
                moves = buffers
            torch._foreach_add_(weights, moves, alpha=-1.0 if group["rate_in_buffer"] else -lr)

    @staticmethod
    def _rates(weights: list[Any], gradients: list[Any], group: dict[str, Any]) -> list[torch.Tensor]:
        w_norm = torch.stack(torch._foreach_norm(weights))  # [number of tensors]
        g_norm = torch.stack(torch._foreach_norm(gradients))
        rate = group["trust"] * w_norm / (g_norm + group["weight_decay"] * w_norm)
        rate = torch.where(w_norm > 0, rate, torch.ones_like(rate))
        return list(torch.where(g_norm > 0, rate, torch.zeros_like(rate)).unbind())


def is_weight(parameter: torch.Tensor) -> bool:
    """Whether a parameter is a matrix or a convolution, not a bias, an affine, a slope or a shift [1, C, 1, 1]."""
    return sum(side > 1 for side in parameter.shape) > 1


def apply(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    """Set this step's learning rate and weight decay."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
        group["weight_decay"] = weight_decay * group["decay_scale"] if group["decayed"] else 0.0


def gradient_norm(parameters: Iterable[torch.Tensor]) -> torch.Tensor:
    """2-norm of all gradients as one 0-d tensor on their device; not finite if any gradient is not."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return torch.stack(torch._foreach_norm(gradients)).float().norm()
