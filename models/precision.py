"""Which numbers are computed in which precision, and by what."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """16-bit numbers in float32, others as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def has_kernels(x: Tensor) -> bool:
    """Whether Triton kernels take this tensor. They compute in float32; float64 is there to check them."""
    return x.is_cuda and x.dtype != torch.float64
