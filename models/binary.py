"""Binary layers: the only place of the project where a sign is taken."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Precision = Literal["real", "binary"]
Estimator = Literal["burn", "reactnet"]
Groups = tuple[int, ...]
"""How many weights each group has."""


def has_kernels(x: Tensor) -> bool:
    """Whether Triton kernels take this tensor. They compute in float32; float64 is there to check them."""
    return x.is_cuda and x.dtype != torch.float64


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


class _WeightSigns(torch.autograd.Function):
    """sign(w) of many weights whose scale α is applied after the convolution, with the gradients of the two above.

    The gradient that arrives is that of the unscaled convolution, α times the scaled one's: just what BURN's
    estimator wants, and to be divided by α for ReActNet's.
    """

    @staticmethod
    def forward(
        ctx: Any, estimator: Estimator, dtype: torch.dtype, groups: Groups, *weights: Tensor
    ) -> tuple[Any, ...]:
        signs, scales = signs_and_scales(list(weights), dtype)
        ctx.estimator, ctx.groups, ctx.dtypes = estimator, groups, [weight.dtype for weight in weights]
        ctx.save_for_backward(scales, *(weights if estimator == "reactnet" else ()))
        ctx.mark_non_differentiable(scales)
        # Weights of a group lie one behind the other: together they are one weight of more output channels.
        start, number, merged = 0, 0, []
        for count in groups:
            first = weights[number]
            shape = (sum(len(weight) for weight in weights[number : number + count]), *first.shape[1:])
            size = shape[0] * first[0].numel()
            merged.append(signs[start : start + size].as_strided(shape, first.stride(), start))
            start, number = start + size, number + count
        return scales, *merged

    @staticmethod
    def backward(ctx: Any, _: Tensor, *grads: Tensor) -> tuple[Any, ...]:
        scales, *weights = ctx.saved_tensors
        parts = [part for grad, count in zip(grads, ctx.groups, strict=True) for part in grad.chunk(count)]
        parts = [part.to(dtype) for part, dtype in zip(parts, ctx.dtypes, strict=True)]
        if ctx.estimator == "reactnet":
            rows = scales.clamp(min=torch.finfo(scales.dtype).tiny).split([len(weight) for weight in weights])
            parts = [
                part / scale.to(part.dtype).view(-1, 1, 1, 1) * (weight.abs() <= 1)
                for part, scale, weight in zip(parts, rows, weights, strict=True)
            ]
        return None, None, None, *parts


@torch.library.custom_op("burn::weight_signs", mutates_args=())
def signs_and_scales(weights: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Signs and scales of many weights, on a GPU by one kernel.

    Args:
        weights: [C_out, C_in, k, k] each, dense.
        dtype: of the signs.

    Returns:
        All signs in one row, in the order in which each weight lies in memory; and α of every output channel of
        every weight, in at least float32.
    """
    if has_kernels(weights[0]) and weights[0].dtype == torch.float32:
        from models import halfblock_triton as kernels

        return kernels.weight_signs(weights, dtype)
    rows = [_in_memory(weight) for weight in weights]
    return torch.cat([row.sign().to(dtype) for row in rows]), torch.cat([weight_scale(w).flatten() for w in weights])


@signs_and_scales.register_fake
def _(weights: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    first = weights[0]
    return (
        first.new_empty(sum(weight.numel() for weight in weights), dtype=dtype),
        first.new_empty(sum(len(weight) for weight in weights)),
    )


def _in_memory(weight: Tensor) -> Tensor:
    """A dense weight as one row in the order of its memory."""
    return weight.detach().as_strided((weight.numel(),), (1,))


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

    Padding adds zeros after binarisation: a third value at the borders, as in the releases of BURN and
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


def on_signs(groups: Sequence[Sequence[BinaryConv2d]], dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """What to convolve signs with instead of a network's scaled weights.

    Args:
        groups: convolutions of one stage and estimator; those of a group read the same input.
        dtype: of the stream.

    Returns:
        For each group its weights [ΣC_out, C_in, k, k] in `dtype`, binary or real, and the scale [ΣC_out] that belongs
        on the result.
    """
    one = groups[0][0]
    if one.weights == "real":
        weights = [torch.cat([conv.weight for conv in group]) for group in groups]
        return [(weight.to(dtype), torch.ones_like(weight[:, 0, 0, 0])) for weight in weights]
    flat = [conv.weight for group in groups for conv in group]
    sizes = tuple(len(group) for group in groups)
    scales, *signs = _WeightSigns.apply(one.estimator, dtype, sizes, *flat)
    return list(zip(signs, scales.split([len(sign) for sign in signs]), strict=True))


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
