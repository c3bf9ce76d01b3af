"""Signs and scales of all binary weights of a network at once: what the fused half-blocks convolve with.

The scale α of a weight goes into the BatchNorm after the convolution (`models/halfblock.py`), so that convolutions see
signs on both sides and their results are whole numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from models.binary import BinaryConv2d, Estimator, weight_scale
from models.precision import has_kernels

Groups = tuple[int, ...]
"""How many weights each group has."""


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


class _WeightSigns(torch.autograd.Function):
    """sign(w) of many weights whose scale α is applied after the convolution, with the gradients of `binarize_weight`.

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


def changed(module: nn.Module, before: Mapping[str, Tensor]) -> tuple[int, int]:
    """How many binary weights of a module, of those that train, have another sign than they had.

    Args:
        before: an earlier state of it, under the same keys; it may have more, or lack some.

    Returns:
        Of how many the sign differs, and how many were compared.
    """
    differ = compared = 0
    for name, part in module.named_modules():
        key = f"{name}.weight"
        if isinstance(part, BinaryConv2d) and part.weights == "binary" and part.weight.requires_grad and key in before:
            differ += int((part.weight.detach().sign() != before[key].to(part.weight.device).sign()).sum())
            compared += part.weight.numel()
    return differ, compared


def _in_memory(weight: Tensor) -> Tensor:
    """A dense weight as one row in the order of its memory."""
    return weight.detach().as_strided((weight.numel(),), (1,))
