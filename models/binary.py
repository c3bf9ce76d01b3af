"""Binary layers: the only place of the project where a sign is taken."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Precision = Literal["real", "binary"]
Estimator = Literal["burn", "reactnet"]


class _SignClip(torch.autograd.Function):
    """sign(x); gradient passed where -1 <= x <= 1, both ends included (clip straight-through, BURN)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sign()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * (x.abs() <= 1)


class _SignQuadratic(torch.autograd.Function):
    """sign(x); gradient (2 - 2|x|) for -1 <= x < 1 (Bi-Real Net's piecewise quadratic, used by ReActNet)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sign()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * (2 - 2 * x.abs()).clamp_(min=0)


class _WeightIdentity(torch.autograd.Function):
    """α·sign(w); gradient α·g: straight through the sign, with the scale kept (BURN)."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return weight.sign() * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (scale,) = ctx.saved_tensors
        return grad * scale, None


class _WeightClamp(torch.autograd.Function):
    """α·sign(w); gradient of clamp(w, -1, 1), without the scale (ReActNet)."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return weight.sign() * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return grad * (weight.abs() <= 1), None


_ACTIVATION = {"burn": _SignClip, "reactnet": _SignQuadratic}
_WEIGHT = {"burn": _WeightIdentity, "reactnet": _WeightClamp}


def binarize_activation(x: Tensor, estimator: Estimator = "burn") -> Tensor:
    """sign(x) in {-1, 0, +1} of any shape, with the estimator's gradient; sign(0) = 0 as in both releases."""
    return _ACTIVATION[estimator].apply(x)


def binarize_weight(weight: Tensor, estimator: Estimator = "burn") -> Tensor:
    """α_c·sign(w) of a weight [C_out, C_in, k, k], with α_c the detached mean of |w| over one output channel.

    The scale is computed in the weight's own precision (XNOR-Net, eq. 6; ReActNet, section 3).
    """
    return _WEIGHT[estimator].apply(weight, weight_scale(weight))


def weight_scale(weight: Tensor) -> Tensor:
    """α [C_out, 1, 1, 1]: the detached mean of |w| over one output channel."""
    return weight.detach().abs().mean(dim=(1, 2, 3), keepdim=True)


class BinaryConv2d(nn.Conv2d):
    """A convolution without bias whose weights and input are each real or binary.

    Padding adds zeros after binarization: a third value at the borders, as in the releases of BURN and
    ReActNet (a 1-bit kernel has to correct for it).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        weights: Precision = "binary",
        activations: Precision = "binary",
        estimator: Estimator = "burn",
    ) -> None:
        """`weights` and `activations` name the stage; `estimator` the gradient of both signs."""
        super().__init__(in_channels, out_channels, kernel_size, stride=stride, padding=kernel_size // 2, bias=False)
        self.weights, self.activations, self.estimator = weights, activations, estimator

    def forward(self, x: Tensor) -> Tensor:
        """[B, C_in, H, W] to [B, C_out, H', W']."""
        if self.activations == "binary":
            x = binarize_activation(x, self.estimator)
        weight = self.weight
        if self.weights == "binary":
            weight = binarize_weight(weight, self.estimator)
        return F.conv2d(x, weight, stride=self.stride, padding=self.padding)

    def extra_repr(self) -> str:
        """Name the precision beside the shape."""
        return f"{super().extra_repr()}, weights={self.weights}, activations={self.activations}"


class Shift(nn.Module):
    """A learned bias per channel, zero at first (ReActNet's "LearnableBias", the threshold of its RSign)."""

    def __init__(self, channels: int) -> None:
        """One value for each of `channels`."""
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to the same shape; the bias is cast so that a 16-bit stream stays 16-bit."""
        return x + self.bias.to(x.dtype)


class RPReLU(nn.Module):
    """PReLU between two learned shifts (ReActNet, eq. 5), one slope per channel starting at 0.25."""

    def __init__(self, channels: int) -> None:
        """Slope and both shifts have one value for each of `channels`."""
        super().__init__()
        self.shift_in = Shift(channels)
        self.prelu = nn.PReLU(channels)
        self.shift_out = Shift(channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to the same shape."""
        return self.shift_out(self.prelu(self.shift_in(x)))
