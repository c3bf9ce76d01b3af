"""A trained ReActNet as what a runtime computes: signs of weights as bits, and five numbers for each channel.

Everything between two convolutions is folded in float64 and rounded once. With c the convolution of signs and
P = -c / 2, what BatchNorm, the residual and RPReLU make of it is

    u = (a · P + b) + residual,   h = u · (1 where u > 0, else slope) + shift,   next sign = h > threshold

where a = -2 α γ / √(σ² + ε), b = β - μ γ / √(σ² + ε) + shift_in, threshold = -(the next shift), and α is the mean |w|
of an output channel (XNOR-Net, eq. 6).
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models.binary import BinaryConv2d, RPReLU, Shift, weight_scale
from models.reactnet import Block, ReActNet

NumberType = Literal["float32", "float16", "int8"]

ONE_ZERO_IN = 100_000
"""Binary weights of which one may be exactly 0: PyTorch's generator draws one in 10 million, pruning makes many."""


class FoldError(ValueError):
    """A network that cannot be packed; one line that says why."""

    exit_code = 2


class FoldedLayer(NamedTuple):
    """One layer and its arrays, by name.

    - stem: `weight` [3, 3, c, o] (ky, kx first), `bias` [o], `threshold` [o] of the first signs; float32.
    - half-block: `bits` [o, taps, ceil(c / 32)] uint32 (bit i of word j: channel 32 j + i; 1 is +1), `a`, `b`, `slope`,
      `shift`, `threshold` [o] float32, the last not in the last half-block.
    - mean: none.
    - linear: `weight` [o, i] in its number type, `scale` [o] float32 with int8 alone, `bias` [o] float32.
    """

    operation: Literal["stem", "half-block", "mean", "linear"]
    kernel: int
    stride: int
    residual: Literal["none", "same", "pooled", "doubled"]
    channels_in: int
    channels_out: int
    number_type: NumberType
    relu: bool
    arrays: dict[str, NDArray[Any]]


class Folded(NamedTuple):
    """What `fold` returns."""

    layers: list[FoldedLayer]
    weights: int  # binary ones
    zeros: int  # of these, exactly 0 and stored as +1


def fold(backbone: nn.Module, classifier: nn.Module | None = None, *, linear: NumberType = "float16") -> Folded:
    """The layers of a network in evaluation mode.

    Args:
        backbone: a `ReActNet` with binary weights and activations; its `fc`, if there is one, becomes a layer.
        classifier: what follows it, a linear layer or BatchNorm and a linear layer; None for features.
        linear: how the weights of linear layers are stored. int8 is symmetric, with a scale for each row.

    Raises:
        FoldError: another network, real weights or activations, an odd width, numbers that are not finite or not once
            folded, too many weights of exactly 0.
    """
    convolutions = _checked(backbone, classifier)
    assert isinstance(backbone, ReActNet)
    weights = sum(conv.weight.numel() for conv in convolutions)
    zeros = sum(int((conv.weight == 0).sum()) for conv in convolutions)
    if zeros * ONE_ZERO_IN > weights:
        raise FoldError(
            f"{zeros} of {weights} binary weights are exactly 0, which has no sign; "
            f"expected at most one in {ONE_ZERO_IN} (is the network pruned, or not trained?)"
        )
    with torch.no_grad(), np.errstate(over="ignore"):  # what is too large becomes infinite, and is refused
        blocks: list[Any] = list(backbone.blocks)
        layers = [_stem(backbone.stem, blocks[0].shift1)]
        for block, after in zip(blocks, [*blocks[1:], None], strict=True):
            layers += _block(block, None if after is None else after.shift1)
        channels = backbone.out_channels
        layers.append(FoldedLayer("mean", 1, 1, "none", channels, channels, "float32", False, {}))
        if backbone.fc is not None:
            layers.append(_linear([backbone.fc], linear, relu=True))
        if classifier is not None:
            layers.append(_linear(list(classifier) if isinstance(classifier, nn.Sequential) else [classifier], linear))
    for number, layer in enumerate(layers):
        for name, array in layer.arrays.items():
            if not np.isfinite(array).all():
                raise FoldError(
                    f"layer {number} ({layer.operation}), {name}: not finite as {array.dtype} once folded; "
                    "expected a network in working order"
                    + (" (or linear float32)" if array.dtype == np.float16 else "")
                )
    return Folded(layers, weights, zeros)


def replace_zeros(backbone: nn.Module) -> None:
    """Make binary weights of exactly 0 the smallest positive number, in place: the network that `fold` describes."""
    with torch.no_grad():
        for conv in _binary(backbone):
            conv.weight[conv.weight == 0] = torch.finfo(conv.weight.dtype).tiny


def _binary(network: nn.Module) -> list[BinaryConv2d]:
    return [module for module in network.modules() if isinstance(module, BinaryConv2d)]


def _checked(backbone: nn.Module, classifier: nn.Module | None) -> list[BinaryConv2d]:
    if not isinstance(backbone, ReActNet):
        raise FoldError(f"{type(backbone).__name__}: only a ReActNet can be packed")
    config = backbone.config
    if config.weights != "binary":
        raise FoldError(
            f"weights: {config.weights}: binary activations with real weights cannot be packed; export a stage 2 run"
        )
    if config.activations != "binary":
        raise FoldError(f"activations: {config.activations}: only binary ones can be packed")
    if config.width % 2:
        raise FoldError(f"width: {config.width}: only an even one can be packed")
    parts = list(classifier) if isinstance(classifier, nn.Sequential) else [classifier] if classifier else []
    if parts and not (isinstance(parts[-1], nn.Linear) and all(isinstance(p, nn.BatchNorm1d) for p in parts[:-1])):
        raise FoldError(f"{classifier}: expected a linear layer, or BatchNorm and one, behind the network")
    for network in (backbone, *parts):
        for name, tensor in network.state_dict().items():
            if not tensor.isfinite().all():
                raise FoldError(f"{name}: holds numbers that are not finite; export an earlier checkpoint")
    return _binary(backbone)


def _stem(stem: nn.Sequential, after: Shift) -> FoldedLayer:
    conv, norm = stem
    assert isinstance(conv, nn.Conv2d)
    scale, bias = _affine(norm)
    weight = (conv.weight.double() * scale.view(-1, 1, 1, 1)).permute(2, 3, 1, 0)
    arrays = {"weight": _float32(weight), "bias": _float32(bias), "threshold": _float32(-_of(after))}
    inputs, outputs = weight.shape[2:]
    return FoldedLayer("stem", 3, conv.stride[0], "none", inputs, outputs, "float32", False, arrays)


def _block(block: Block, after: Shift | None) -> list[FoldedLayer]:
    first = _half([block.conv3x3], [block.norm1], block.act1, block.shift2, "pooled" if block.stride == 2 else "same")
    # Two convolutions of one input are one of twice the channels.
    residual: Literal["same", "doubled"] = "same" if len(block.conv1x1) == 1 else "doubled"
    return [first, _half(list(block.conv1x1), list(block.norm2), block.act2, after, residual)]


def _half(
    convs: list[Any], norms: list[Any], act: RPReLU, after: Shift | None, residual: Literal["same", "pooled", "doubled"]
) -> FoldedLayer:
    weight = torch.cat([conv.weight for conv in convs])
    scale, bias = (torch.cat(parts) for parts in zip(*map(_affine, norms), strict=True))
    arrays = {
        "bits": _bits(weight),
        "a": _float32(-2 * weight_scale(weight.double()).flatten() * scale),
        "b": _float32(bias + _of(act.shift_in)),
        "slope": _float32(act.prelu.weight),
        "shift": _float32(_of(act.shift_out)),
    }
    if after is not None:
        arrays["threshold"] = _float32(-_of(after))
    outputs, inputs, kernel, _ = weight.shape
    return FoldedLayer("half-block", kernel, convs[0].stride[0], residual, inputs, outputs, "float32", False, arrays)


def _linear(parts: list[Any], number_type: NumberType, *, relu: bool = False) -> FoldedLayer:
    *norms, layer = parts
    weight, bias = layer.weight.double(), layer.bias.double()
    for norm in reversed(norms):
        scale, shift = _affine(norm)
        weight, bias = weight * scale, bias + weight @ shift
    arrays = {"weight": weight.cpu().numpy()}
    if number_type == "int8":
        step = weight.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / 127
        arrays = {"weight": (weight / step[:, None]).round().cpu().numpy(), "scale": _float32(step)}
    arrays["weight"] = arrays["weight"].astype(number_type)
    arrays["bias"] = _float32(bias)
    outputs, inputs = weight.shape
    return FoldedLayer("linear", 1, 1, "none", inputs, outputs, number_type, relu, arrays)


def _affine(norm: Any) -> tuple[Tensor, Tensor]:
    """BatchNorm in evaluation mode as a factor and a summand for each channel, float64."""
    scale = torch.rsqrt(norm.running_var.double() + norm.eps)
    if norm.affine:
        scale = scale * norm.weight.double()
    bias = -norm.running_mean.double() * scale
    return scale, bias + norm.bias.double() if norm.affine else bias


def _of(shift: Shift) -> Tensor:
    return shift.bias.double().flatten()


def _bits(weight: Tensor) -> NDArray[np.uint32]:
    """[O, C, k, k] to [O, k * k, ceil(C / 32)]."""
    positive = (weight >= 0).permute(0, 2, 3, 1).reshape(weight.shape[0], -1, weight.shape[1]).cpu().numpy()
    padded = np.pad(positive, ((0, 0), (0, 0), (0, -positive.shape[2] % 32)))
    return np.packbits(padded, axis=2, bitorder="little").view("<u4")


def _float32(x: Tensor) -> NDArray[np.float32]:
    return x.detach().cpu().contiguous().numpy().astype(np.float32)
