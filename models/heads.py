"""Heads on a backbone's features: the two-layer perceptron and BatchNorm over all ranks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.collectives import all_reduce_sum, world_size


class SyncBatchNorm1d(nn.BatchNorm1d):
    """BatchNorm1d whose training statistics are those of the batch over all ranks, on any device.

    `torch.nn.SyncBatchNorm` refuses the CPU; this one lets the two-process tests run the code that trains.
    Keys are those of BatchNorm1d. With one process it is BatchNorm1d.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[B, C], or [V, B, C] where each of V views has statistics of its own, to the same shape.

        Every rank must hold the same B. All views share one collective; the running statistics see one after another.
        """
        if not self.training:
            return super().forward(x.flatten(0, -2)).view_as(x)
        if world_size() == 1:
            one = nn.BatchNorm1d.forward
            return one(self, x) if x.ndim == 2 else torch.stack([one(self, view) for view in x])
        # Sums in float64: E[x^2] - E[x]^2 cancels badly in float32. C is small, so the cost is nothing.
        x64 = x.double()
        sums = all_reduce_sum(torch.stack((x64.sum(-2), x64.square().sum(-2))))  # [2, C] or [2, V, C]
        count = x.shape[-2] * world_size()
        mean = sums[0] / count
        var = (sums[1] / count - mean.square()).clamp(min=0)
        with torch.no_grad():
            assert self.running_mean is not None and self.running_var is not None
            assert self.num_batches_tracked is not None and self.momentum is not None
            unbiased = var * (count / max(count - 1, 1))
            for one_mean, one_var in zip(mean.view(-1, x.shape[-1]), unbiased.view(-1, x.shape[-1]), strict=True):
                self.num_batches_tracked += 1
                self.running_mean.lerp_(one_mean.to(self.running_mean.dtype), self.momentum)
                self.running_var.lerp_(one_var.to(self.running_var.dtype), self.momentum)
        normal = (x64 - mean.unsqueeze(-2)) * torch.rsqrt(var + self.eps).unsqueeze(-2)
        return (normal * self.weight + self.bias).to(x.dtype)


class MLP(nn.Module):
    """Linear, BatchNorm, ReLU, Linear: BURN's "classifier" neck and most projection heads.

    Args:
        in_dim, hidden_dim, out_dim: widths; BURN uses 1024 or 2048 -> 2000 -> 2000.
        norm: BatchNorm over all ranks after the first layer (BURN), or none (MoCo v2).

    With the norm, both layers start He-normal with zero bias, as BURN's necks do (`init_linear='kaiming'`);
    without it they keep PyTorch's default, as MoCo's head does.
    """

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int, *, norm: bool) -> None:
        super().__init__()
        self.fc0 = nn.Linear(in_dim, hidden_dim)
        self.bn0 = SyncBatchNorm1d(hidden_dim) if norm else nn.Identity()
        self.fc1 = nn.Linear(hidden_dim, out_dim)
        if norm:
            for layer in (self.fc0, self.fc1):
                nn.init.kaiming_normal_(layer.weight, mode="fan_in", nonlinearity="relu")
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_dim] to [B, out_dim], or views [V, B, in_dim] to [V, B, out_dim]; see `SyncBatchNorm1d`."""
        return self.fc1(torch.relu(self.bn0(self.fc0(x))))
