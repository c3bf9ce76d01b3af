"""Heads on a backbone's features: the two-layer perceptron, and BatchNorm and a running mean over all ranks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.collectives import all_reduce_sum, world_size
from models.precision import at_least_float32


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
        x64 = x.double()
        mean, var, count = _moments(x64)
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


def _moments(x64: Tensor) -> tuple[Tensor, Tensor, int]:
    """Mean and biased variance [C] or [V, C] of [B, C] or [V, B, C] over all ranks, in one collective; and all B."""
    # Sums in float64: E[x^2] - E[x]^2 cancels badly in float32. C is small, so the cost is nothing.
    sums = all_reduce_sum(torch.stack((x64.sum(-2), x64.square().sum(-2))))
    count = x64.shape[-2] * world_size()
    mean = sums[0] / count
    return mean, (sums[1] / count - mean.square()).clamp(min=0), count


def batch_normalized(x: Tensor, eps: float = 1e-5) -> Tensor:
    """BatchNorm over all ranks without scale, shift and memory: [B, C], or [V, B, C] with statistics for each view, to
    the same shape in at least float32."""
    x64 = x.double()
    mean, var, _ = _moments(x64)
    return ((x64 - mean.unsqueeze(-2)) * torch.rsqrt(var + eps).unsqueeze(-2)).to(at_least_float32(x).dtype)


class RunningMean(nn.Module):
    """The running mean of features over batches, to be taken from them: the plain mean of all batches so far, and once
    there were 1 / (1 - momentum) of them an exponential one. A batch is all of an optimizer step, over ranks and views.

    Args:
        width: D of the features.
        momentum: 0.99 remembers some hundred batches.
    """

    def __init__(self, width: int, momentum: float = 0.99) -> None:
        super().__init__()
        self.momentum = momentum
        self.mean: Tensor
        self.batches: Tensor
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("batches", torch.zeros((), dtype=torch.long))
        self._new: list[Tensor] = []

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """[..., D] less the mean of the batches before, without a gradient; in training it waits for `update`."""
        if self.training:
            self._new.append(x.flatten(0, -2).mean(dim=0).to(self.mean.dtype))
        return x - self.mean

    @torch.no_grad()
    def update(self) -> None:
        """Let the features of this step count. Every rank must hold as many."""
        batch = all_reduce_sum(torch.stack(self._new).mean(dim=0)) / world_size()
        self._new.clear()
        self.batches += 1
        share = (1 / self.batches.to(batch.dtype)).clamp(min=1 - self.momentum)
        self.mean += share * (batch - self.mean)


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
