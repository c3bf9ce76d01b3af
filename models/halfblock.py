"""Half a ReActNet block in one pass: BatchNorm, residual, RPReLU and the sign that the next convolution reads.

    u = (c - mean) · rstd · γ + β + residual + shift_in,   h = PReLU(u) + shift_out,   s = sign(h + threshold)

The residual is the stream itself, its 2x2 average (stride 2), or the stream twice (doubling). For the backward pass
only c and the stream are kept: u, h and the mask of the sign's estimator are recomputed from them, which BatchNorm's
backward reads anyway. The formulas are written once in PyTorch, for the CPU and as what the Triton kernels
(`models/halfblock_triton.py`) are tested against; a tensor's device decides which of both runs.

Convolutions before it see signs on both sides, so their results are whole numbers; the weight's scale α enters here:
BN(α·c; ε) = BN(c; ε / α²).
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import triton_op

from models.binary import Estimator
from models.precision import at_least_float32, has_kernels

Residual = Literal["same", "pooled", "doubled"]


class HalfBlock(NamedTuple):
    """What `half_block` returns."""

    stream: Tensor  # h [B, C, H, W]
    sign: Tensor | None  # s of the same shape and dtype, None without a threshold
    mean: Tensor  # [C] of c over the batch, no gradient
    var: Tensor  # [C], biased


class ChannelParameters(NamedTuple):
    """What half a block learns for each channel: [C] each, in at least float32."""

    gamma: Tensor
    beta: Tensor
    eps: Tensor  # BatchNorm's ε over the squared scale of the convolution's weights
    shift_in: Tensor
    slope: Tensor
    shift_out: Tensor
    threshold: Tensor | None  # without one there is no sign


def half_block(
    c: Tensor, stream: Tensor, parameters: ChannelParameters, residual: Residual, estimator: Estimator
) -> HalfBlock:
    """Half a block in training mode.

    Args:
        c: the convolution's result [B, C, H, W], channels_last.
        stream: [B, C, H, W], [B, C, 2H, 2W] (pooled) or [B, C/2, H, W] (doubled), channels_last.
        parameters: see there.
        residual: how `stream` becomes the residual.
        estimator: of the sign's gradient.
    """
    c = c.contiguous(memory_format=torch.channels_last)
    stream = stream.contiguous(memory_format=torch.channels_last)
    return HalfBlock(*_HalfBlock.apply(c, stream, residual, estimator, *parameters))


class _HalfBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, c: Tensor, stream: Tensor, residual: Residual, estimator: Estimator, *parameters: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        # An autograd function takes tensors, not tuples of them; here they get their names back.
        gamma, beta, eps, shift_in, slope, shift_out, threshold = ChannelParameters(*parameters)  # type: ignore[arg-type]
        mean, var = statistics(c)
        rstd = torch.rsqrt(var + eps)
        scale = gamma * rstd
        shift = beta + shift_in - mean * scale
        has_sign = threshold is not None
        vectors = [scale, shift, slope, shift_out, threshold if threshold is not None else shift_out]
        h, s = apply(c, stream, vectors, residual, has_sign)
        ctx.save_for_backward(c, stream, *vectors, mean, rstd)
        ctx.options = (residual, estimator, has_sign)
        ctx.mark_non_differentiable(mean, var)
        return h, s if has_sign else None, mean, var

    @staticmethod
    def backward(ctx: Any, grad_h: Tensor, grad_s: Tensor | None, *_: Any) -> tuple[Any, ...]:
        c, stream, *vectors = ctx.saved_tensors
        scale, _, _, _, _, mean, rstd = vectors
        residual, estimator, has_sign = ctx.options
        grad_h = grad_h.contiguous(memory_format=torch.channels_last)
        uses_sign = has_sign and grad_s is not None
        signs = (grad_s if uses_sign else grad_h).contiguous(memory_format=torch.channels_last)  # type: ignore[union-attr]
        du, sums = backward_sums(grad_h, signs, c, stream, vectors, residual, estimator, uses_sign)
        # shift_in has β's gradient, in memory of its own: two parameters must not share what they add up in.
        d_beta, d_gamma, d_out, d_threshold, d_slope, d_in = torch.cat((sums, sums[:1])).unbind()
        count = c.numel() // c.shape[1]
        m0, m1 = d_beta / count, d_gamma / count
        dc = backward_input(du, c, scale, -scale * rstd * m1, -scale * (m0 - mean * rstd * m1))
        of_parameters = ChannelParameters(
            gamma=d_gamma,
            beta=d_beta,
            eps=None,  # type: ignore[arg-type]
            shift_in=d_in,
            slope=d_slope,
            shift_out=d_out,
            threshold=d_threshold if has_sign else None,
        )
        return dc, _to_stream(du, residual), None, None, *of_parameters


def _to_stream(du: Tensor, residual: str) -> Tensor:
    if residual == "doubled":
        one, other = du.chunk(2, dim=1)
        return one + other
    if residual == "pooled":
        return F.interpolate(du * 0.25, scale_factor=2.0, mode="nearest")
    return du


def per_channel(x: Tensor) -> Tensor:
    """[C] to [1, C, 1, 1]."""
    return x.view(1, -1, 1, 1)


# Each of the four is one kernel on a GPU (and a small sum over its tiles), and plain PyTorch elsewhere. `vectors` are
# scale, shift, slope, shift_out and threshold [C] of the module's formula with u = c · scale + shift + residual.


@triton_op("burn::half_block_statistics", mutates_args=())
def statistics(c: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [C] of [B, C, H, W] over the batch, in at least float32."""
    if has_kernels(c):
        from models import halfblock_triton as kernels

        return kernels.statistics(c)
    var, mean = torch.var_mean(at_least_float32(c), dim=(0, 2, 3), correction=0)
    return mean, var


@triton_op("burn::half_block_apply", mutates_args=())
def apply(c: Tensor, stream: Tensor, vectors: list[Tensor], residual: str, has_sign: bool) -> tuple[Tensor, Tensor]:
    """h and s; s is empty without a sign."""
    if has_kernels(c):
        from models import halfblock_triton as kernels

        return kernels.apply(c, stream, vectors, residual, has_sign)
    scale, shift, slope, shift_out, threshold = vectors
    u = pre_activation(c, stream, scale, shift, residual)
    h = (torch.where(u > 0, u, u * per_channel(slope)) + per_channel(shift_out)).to(c.dtype)
    # The sign of the rounded h, so that forward and backward agree bit for bit.
    s = (at_least_float32(h) + per_channel(threshold)).sign().to(c.dtype) if has_sign else c.new_empty(0)
    return h, s


@triton_op("burn::half_block_backward_sums", mutates_args=())
def backward_sums(
    grad_h: Tensor,
    grad_s: Tensor,
    c: Tensor,
    stream: Tensor,
    vectors: list[Tensor],
    residual: str,
    estimator: str,
    has_sign: bool,
) -> tuple[Tensor, Tensor]:
    """du, which is the stream's gradient too, and [5, C]: dβ (= d shift_in), dγ, d shift_out, d threshold, d slope.
    `vectors` has mean and rstd of c [C] behind the others."""
    if has_kernels(c):
        from models import halfblock_triton as kernels

        return kernels.backward_sums(grad_h, grad_s, c, stream, vectors, residual, estimator, has_sign)
    scale, shift, slope, shift_out, threshold, mean, rstd = vectors
    u = pre_activation(c, stream, scale, shift, residual)
    positive = u > 0
    g = at_least_float32(grad_h)
    d_threshold = torch.zeros_like(mean)
    if has_sign:
        h = (torch.where(positive, u, u * per_channel(slope)) + per_channel(shift_out)).to(c.dtype)
        z = (at_least_float32(h) + per_channel(threshold)).abs()
        through = at_least_float32(grad_s) * ((z <= 1) if estimator == "burn" else (2 - 2 * z).clamp(min=0))
        d_threshold = through.sum(dim=(0, 2, 3))
        g = g + through
    du = torch.where(positive, g, g * per_channel(slope))
    normal = (at_least_float32(c) - per_channel(mean)) * per_channel(rstd)
    d_slope = torch.where(positive, torch.zeros_like(g), g * u).sum(dim=(0, 2, 3))
    sums = [du.sum(dim=(0, 2, 3)), (du * normal).sum(dim=(0, 2, 3)), g.sum(dim=(0, 2, 3)), d_threshold, d_slope]
    return du.to(c.dtype), torch.stack(sums)


@triton_op("burn::half_block_backward_input", mutates_args=())
def backward_input(du: Tensor, c: Tensor, k0: Tensor, k1: Tensor, k2: Tensor) -> Tensor:
    """dc = k0 · du + k1 · c + k2 with k of [C]: BatchNorm's backward."""
    if has_kernels(c):
        from models import halfblock_triton as kernels

        return kernels.backward_input(du, c, k0, k1, k2)
    return (at_least_float32(du) * per_channel(k0) + at_least_float32(c) * per_channel(k1) + per_channel(k2)).to(
        c.dtype
    )


def pre_activation(c: Tensor, stream: Tensor, scale: Tensor, shift: Tensor, residual: str) -> Tensor:
    """u of the module's formula, [B, C, H, W] in at least float32."""
    shortcut = at_least_float32(stream)
    if residual == "pooled":
        shortcut = F.avg_pool2d(shortcut, 2)
    elif residual == "doubled":
        shortcut = torch.cat((shortcut, shortcut), dim=1)
    return at_least_float32(c) * per_channel(scale) + per_channel(shift) + shortcut
