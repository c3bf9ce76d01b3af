"""Networks for the runtime: random ones, and folded ones as the content of a file."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from models.fold import Folded
from runtime.bnn import (
    DOUBLED,
    FLOAT16,
    FLOAT32,
    HALF_BLOCK,
    INT8,
    LINEAR,
    MEAN,
    NO_RESIDUAL,
    NUMBER_TYPES,
    OPERATIONS,
    POOLED,
    RELU,
    RESIDUALS,
    SAME,
    STEM,
    Layer,
    Network,
    Record,
)


def random_network(
    *,
    width: int = 2,
    multiples: tuple[int, ...] = (1, 2, 4, 4),
    side: int = 8,
    stem_stride: int = 2,
    number_type: int = FLOAT16,
    classes: int = 3,
    seed: int = 0,
    metadata: dict[str, Any] | None = None,
) -> Network:
    """A ReActNet of random numbers, slopes below 0 and above 1 among them, with a linear layer and a classifier.

    The counts are scaled so that about half of all signs change from image to image.
    """
    random = np.random.default_rng(seed)

    def normal(*shape: int, by: float = 1.0) -> Any:
        return (by * random.normal(size=shape)).astype(np.float32)

    def half(kernel: int, residual: int, c: int, o: int, is_last: bool = False) -> Layer:
        bits = np.packbits(np.pad(random.random((o, kernel**2, c)) < 0.5, ((0, 0), (0, 0), (0, -c % 32))), 2, "little")
        blobs = {
            "bits": bits.view("<u4"),
            "a": normal(o, by=1 / np.sqrt(c * kernel**2)),
            "b": normal(o),
            "slope": normal(o),
            "shift": normal(o),
        }
        if not is_last:
            blobs["threshold"] = normal(o)
        record = Record(HALF_BLOCK, kernel, 2 if residual == POOLED else 1, residual, c, o, FLOAT32, 0)
        return Layer(record, blobs)

    def linear(c: int, o: int, flags: int) -> Layer:
        if number_type == INT8:
            blobs = {"weight": random.integers(-127, 128, (o, c), np.int8), "scale": normal(o, by=0.01)}
        else:
            weight = normal(o, c, by=1 / np.sqrt(c))
            blobs = {"weight": weight.astype(np.float16 if number_type == FLOAT16 else np.float32)}
        blobs["bias"] = normal(o)
        return Layer(Record(LINEAR, 1, 1, NO_RESIDUAL, c, o, number_type, flags), blobs)

    channels = [width * multiple for multiple in multiples]
    c = channels[0]
    stem = {"weight": normal(3, 3, 3, c), "bias": normal(c), "threshold": normal(c), "table": normal(3, 256)}
    layers = [Layer(Record(STEM, 3, stem_stride, NO_RESIDUAL, 3, c, FLOAT32, 0), stem)]
    for number, (c, o) in enumerate(pairwise(channels)):
        is_last = number == len(channels) - 2
        layers.append(half(3, POOLED if o != c and number else SAME, c, c))
        layers.append(half(1, DOUBLED if o != c else SAME, c, o, is_last))
    last = channels[-1]
    layers.append(Layer(Record(MEAN, 1, 1, NO_RESIDUAL, last, last, FLOAT32, 0), {}))
    layers += [linear(last, last, RELU), linear(last, classes, 0)]
    return Network(side, classes, layers, metadata or {})


def packed(folded: Folded, side: int) -> Network:
    """A folded network, with bytes 0 to 255 as numbers from -2 to 2."""
    table = np.linspace(-2, 2, 256, dtype=np.float32)
    layers = []
    for one in folded.layers:
        numbers = (one.kernel, one.stride, RESIDUALS.index(one.residual), one.channels_in, one.channels_out)
        kind = (NUMBER_TYPES.index(one.number_type), RELU * one.relu)
        layers.append(Layer(Record(OPERATIONS.index(one.operation), *numbers, *kind), dict(one.arrays)))
    layers[0].blobs["table"] = np.stack([table] * 3)
    return Network(side, layers[-1].record.channels_out, layers, {})


def random_images(count: int, side: int, seed: int = 0) -> Any:
    """Bytes [count, side, side, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), np.uint8)
