"""What a file means, in numpy: every other implementation gives these numbers to the bit, linear layers' sums aside.

Arithmetic is IEEE float32, each operation rounded by itself (no fused multiply-add, denormal numbers kept), in the
order written here. Maps are [B, H, W, C], true at a sign of +1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.bnn import DOUBLED, HALF_BLOCK, LINEAR, MEAN, POOLED, RELU, STEM, Layer, Network, check_images

Floats = NDArray[np.float32]
Signs = NDArray[np.bool_]

_SIGNS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little") * np.float32(2) - 1
"""What the bits of a byte stand for [256, 8]."""


def run(network: Network, images: NDArray[Any]) -> Floats:
    """Images, uint8 [B, S, S, 3] or normalized float32 [B, 3, S, S], to the last layer's outputs [B, outputs].

    Raises:
        BnnError: images of another shape or type.
    """
    return stream(network, images, len(network.layers))


def stream(network: Network, images: NDArray[Any], upto: int) -> Floats:
    """What the first `upto` layers, at least the stem, make of images: a map [B, H, W, C], or [B, C] after the mean.

    Raises:
        BnnError: images of another shape or type.
    """
    assert 0 < upto <= len(network.layers)
    check_images(images, network.side)
    first = network.layers[0]
    with np.errstate(all="ignore"):  # infinity and NaN are results like others
        x = stem(first, pixels(first, images))
        before = first
        for layer in network.layers[1:upto]:
            operation = layer.record.operation
            if operation == HALF_BLOCK:
                x = half_block(layer, signs(before, x), x)
            else:
                x = mean(x) if operation == MEAN else linear(layer, x)
            before = layer
    return x


def pixels(layer: Layer, images: NDArray[Any]) -> Floats:
    """What the stem reads [B, 3, S, S]: bytes through the table of their channel, floats as they are."""
    if images.dtype != np.uint8:
        return images
    return np.stack([layer.blobs["table"][c][images[..., c]] for c in range(3)], axis=1)


def stem(layer: Layer, x: Floats) -> Floats:
    """[B, 3, S, S] to [B, H, W, C]: from the bias, one product after another over ky, kx and c; outside is 0."""
    assert layer.record.operation == STEM
    weight, stride = layer.blobs["weight"], layer.record.stride
    count, side = len(x), -(-x.shape[2] // stride)
    x = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    total = np.broadcast_to(layer.blobs["bias"], (count, side, side, weight.shape[3])).astype(np.float32)
    for ky, kx, c in np.ndindex(weight.shape[:3]):
        total += _tap(x[:, c], ky, kx, side, stride)[..., None] * weight[ky, kx, c]
    return total


def signs(layer: Layer, x: Floats) -> Signs:
    """The signs that the next half-block reads: x > threshold; equality and NaN are -1."""
    return x > layer.blobs["threshold"]


def counts(layer: Layer, s: Signs) -> Floats:
    """Signs [B, H, W, C] to P [B, H', W', O], half the surplus of signs that differ from the weights' over those equal.

    Whole numbers. Beyond the map there is no sign, which neither differs nor is equal.
    """
    record = layer.record
    words = np.ascontiguousarray(layer.blobs["bits"]).astype("<u4", copy=False)
    weight = _SIGNS.take(words.view(np.uint8), axis=0).reshape(*words.shape[:2], -1)[..., : record.channels_in]
    batch, side, border = len(s), -(-s.shape[1] // record.stride), record.kernel // 2
    signed = np.pad(np.where(s, np.float32(1), np.float32(-1)), ((0, 0), (border, border), (border, border), (0, 0)))
    c = np.zeros((batch * side * side, record.channels_out), np.float32)
    for tap, (ky, kx) in enumerate(np.ndindex(record.kernel, record.kernel)):
        inside = _tap(signed, ky, kx, side, record.stride).reshape(-1, record.channels_in)
        c += inside @ weight[:, tap].T  # exact in any order: whole numbers far below 2^24
    c = (0 - c) * np.float32(0.5)  # not -c / 2: no count is -0
    return c.reshape(batch, side, side, record.channels_out)


def half_block(layer: Layer, s: Signs, x: Floats) -> Floats:
    """Signs and stream [B, H, W, C] to the stream [B, H', W', O].

        u = (a · P + b) + residual,   h = u · (1 where u > 0, else slope) + shift

    The residual is x, its 2x2 average summed in the order of reading, or x twice along the channels.
    """
    assert layer.record.operation == HALF_BLOCK
    if layer.record.residual == POOLED:
        residual = x[:, ::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, ::2] + x[:, 1::2, 1::2]
        residual *= np.float32(0.25)
    else:
        residual = np.concatenate((x, x), axis=3) if layer.record.residual == DOUBLED else x
    u = counts(layer, s)
    u *= layer.blobs["a"]
    u += layer.blobs["b"]
    u += residual
    return u * np.where(u > 0, np.float32(1), layer.blobs["slope"]) + layer.blobs["shift"]


def mean(x: Floats) -> Floats:
    """[B, H, W, C] to [B, C]: added to 0 pixel by pixel, row by row; then divided by their number."""
    count, height, width, channels = x.shape
    total = np.cumsum(x.reshape(count, height * width, channels), axis=1)[:, -1]
    return (total + np.float32(0)) / np.float32(height * width)  # + 0: a sum that begins at 0 is never -0


def linear(layer: Layer, x: Floats) -> Floats:
    """[B, C] to [B, O]: x · weight (· scale) + bias, then ReLU if it has one. The order of the sums is free."""
    assert layer.record.operation == LINEAR
    weight = layer.blobs["weight"].astype(np.float32)
    y = np.stack([weight @ one for one in x]) if len(x) else np.zeros((0, len(weight)), np.float32)
    y = y * layer.blobs.get("scale", np.float32(1)) + layer.blobs["bias"]
    return np.maximum(y, np.float32(0)) if layer.record.flags & RELU else y


def _tap(x: NDArray[Any], ky: int, kx: int, side: int, stride: int) -> NDArray[Any]:
    """What a tap of the kernel sees of a padded map [B, H, W, ...]: [B, side, side, ...]."""
    end = stride * (side - 1) + 1
    return x[:, ky : ky + end : stride, kx : kx + end : stride]
