"""A packed network as a graph for OpenVINO, the x86 runtime that keeps bits: exact, and a second opinion about ours.

`BinaryConvolution` counts as our files do: bits of 1 and 0, "xnor-popcount", taps beyond the map left out. Everything
around it is float32, in the order of `runtime/reference.py`; what OpenVINO fuses may round otherwise in the last digit.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import ExportError
from loaders.files import aside
from runtime import bnn
from runtime.bnn import Layer, Network

CHANNELS = 8
"""It packs this many to a byte, and counts wrongly where they do not fill one (seen in 2026.4.1)."""


def missing() -> str:
    """Why nothing can be written here, or ""."""
    try:
        import openvino  # noqa: F401
    except ImportError as error:
        return f"openvino is missing ({error}): pip install openvino"
    return ""


def model(network: Network) -> Any:
    """The graph: normalized images [1, 3, side, side] float32 to the last layer's outputs [1, outputs] float32;
    for other batches call its `reshape` (binary convolutions of a batch that is not known cannot be compiled).

    Raises:
        ExportError: openvino is not installed, or the network too narrow for it.
    """
    if problem := missing():
        raise ExportError(problem)
    import openvino
    from openvino import opset8 as ops

    for number, layer in enumerate(network.layers):
        if layer.record.operation == bnn.HALF_BLOCK and layer.record.channels_in % CHANNELS:
            raise ExportError(
                f"layer {number} has {layer.record.channels_in} channels, expected a multiple of {CHANNELS}: OpenVINO "
                "counts others wrongly"
            )

    def constant(values: NDArray[Any]) -> Any:
        return ops.constant(np.ascontiguousarray(values, dtype=np.float32))

    def channels(values: NDArray[np.float32]) -> Any:
        return constant(values.reshape(1, -1, 1, 1))

    def signs(before: Layer, x: Any) -> Any:
        threshold = channels(before.blobs["threshold"])
        return ops.fake_quantize(
            x, threshold, threshold, constant(np.zeros((1, 1, 1, 1))), constant(np.ones((1, 1, 1, 1))), 2
        )

    def stem(layer: Layer, x: Any) -> Any:
        weight = constant(layer.blobs["weight"].transpose(3, 2, 0, 1))
        stride = layer.record.stride
        return ops.add(ops.convolution(x, weight, [stride] * 2, [1, 1], [1, 1], [1, 1]), channels(layer.blobs["bias"]))

    def half_block(before: Layer, layer: Layer, x: Any) -> Any:
        record, blobs = layer.record, layer.blobs
        border, kernel = [record.kernel // 2] * 2, record.kernel
        bits = np.unpackbits(np.ascontiguousarray(blobs["bits"], dtype="<u4").view(np.uint8), axis=2, bitorder="little")
        bits = bits[..., : record.channels_in].transpose(0, 2, 1)  # [O, C, taps]
        shape = openvino.Shape([record.channels_out, record.channels_in, kernel, kernel])
        tensor = openvino.Tensor(openvino.Type.u1, shape)
        tensor.data[:] = np.packbits(bits.reshape(-1), bitorder="little").reshape(tensor.data.shape)
        weight = openvino.op.Constant(tensor)
        counted = ops.binary_convolution(
            signs(before, x), weight, [record.stride] * 2, border, border, [1, 1], "xnor-popcount", 0.0, "explicit"
        )
        if record.residual == bnn.POOLED:
            x = ops.avg_pool(x, [2, 2], [0, 0], [0, 0], [2, 2], True)
        elif record.residual == bnn.DOUBLED:
            x = ops.concat([x, x], 1)
        # It counts c = -2 P; halving the factor is exact.
        u = ops.add(ops.multiply(counted, channels(blobs["a"] * np.float32(-0.5))), channels(blobs["b"]))
        activated = ops.prelu(ops.add(u, x), constant(blobs["slope"]))
        return ops.add(activated, channels(blobs["shift"]))

    def linear(layer: Layer, x: Any) -> Any:
        weight = layer.blobs["weight"].astype(np.float32)
        y = ops.matmul(x, constant(weight), False, True)
        if "scale" in layer.blobs:
            y = ops.multiply(y, constant(layer.blobs["scale"][None]))
        y = ops.add(y, constant(layer.blobs["bias"][None]))
        return ops.relu(y) if layer.record.flags & bnn.RELU else y

    images = ops.parameter([1, 3, network.side, network.side], dtype=np.float32, name="images")
    before = network.layers[0]
    x: Any = stem(before, images)
    for layer in network.layers[1:]:
        if layer.record.operation == bnn.HALF_BLOCK:
            x = half_block(before, layer, x)
        elif layer.record.operation == bnn.MEAN:
            x = ops.reduce_mean(x, ops.constant(np.array([2, 3])), False)
        else:
            x = linear(layer, x)
        before = layer
    return openvino.Model([x], [images], "burn-engine")


def write(network: Network, path: Path) -> None:
    """Write the graph as `path` and its weights beside it, with the ending .bin.

    Raises:
        ExportError: as `model`.
        OSError: a file cannot be written.
    """
    graph = model(network)
    import openvino

    with (
        aside(path.with_suffix(".bin")) as weights,
        aside(path) as out,
        tempfile.TemporaryDirectory(prefix=".", dir=path.parent) as folder,  # it insists on the endings of names
    ):
        openvino.serialize(graph, f"{folder}/net.xml", f"{folder}/net.bin")
        os.replace(f"{folder}/net.bin", weights.part)
        os.replace(f"{folder}/net.xml", out.part)


def opened(path: Path, *, threads: int = 1, batch: int = 1) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    """Compile a written graph for this CPU: a function of normalized images [batch, 3, side, side]."""
    import openvino

    core = openvino.Core()
    graph = core.read_model(path)
    graph.reshape([batch, *graph.input(0).shape[1:]])
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
    request = core.compile_model(graph, "CPU", settings).create_infer_request()

    def run(images: NDArray[np.float32]) -> NDArray[np.float32]:
        request.infer({0: images})
        return request.get_output_tensor(0).data.copy()

    return run
