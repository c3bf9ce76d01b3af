"""Collectives that are part of the math of a method. Each is the identity without a process group, and gives the same
through a group of one."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of processes of the run; 1 without a process group."""
    return dist.get_world_size() if is_grouped() else 1


def is_grouped() -> bool:
    """Whether there is a process group, be it of one rank."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's place in the run; 0 without a process group."""
    return dist.get_rank() if world_size() > 1 else 0


def all_gather(x: Tensor) -> Tensor:
    """Concatenate `x` [B, ...] of all ranks along the first axis, in rank order; no gradient."""
    if not is_grouped():
        return x
    x = x.contiguous()
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x)
    return torch.cat(parts)


class _AllReduceSum(torch.autograd.Function):
    """Sum over ranks; its gradient is the sum over ranks of the gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum `x` over all ranks, differentiably."""
    return _AllReduceSum.apply(x) if is_grouped() else x
