"""From what was trained to one bit-packed file, which is compared with PyTorch before it takes its name."""

from __future__ import annotations

import copy
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

import loaders
from engine.errors import ExportError
from engine.provenance import engine_version
from engine.trained import Trained, readable
from loaders import DataError, LoaderError
from loaders.augment import normalized, to_pixels
from loaders.files import aside
from models import weights
from models.fold import Folded, FoldedLayer, FoldError, NumberType, fold, replace_zeros
from models.reactnet import Block, ReActNet
from runtime import Runtime, bnn, reference
from runtime.bnn import BnnError, Layer, Network, Record

LAYER_TOLERANCE = 1e-5
"""Of a layer's largest value: float32 in another order, never a sign."""
LEAST_AGREEMENT = 0.99
SAME_FEATURES = 0.999
"""Cosine from which on two features count as one answer."""
LAYER_IMAGES = 4
"""Images that are compared layer by layer."""
SECONDS = 1.0
"""For the two times of the report."""
_CHUNK = 32

_OPERATIONS = {"stem": bnn.STEM, "half-block": bnn.HALF_BLOCK, "mean": bnn.MEAN, "linear": bnn.LINEAR}
_RESIDUALS = {"none": bnn.NO_RESIDUAL, "same": bnn.SAME, "pooled": bnn.POOLED, "doubled": bnn.DOUBLED}
_NUMBERS = {"float32": bnn.FLOAT32, "float16": bnn.FLOAT16, "int8": bnn.INT8}


class Disagreement(NamedTuple):
    """An image that gets another answer once it is packed."""

    image: int
    """Its number among the images that were compared."""
    pytorch: int
    packed: int
    """The classes; of features 0 and 0."""
    margin: float
    """Of PyTorch's answer: its best score less the second, as a share of the scores' spread; of features 1 - cosine."""


@dataclass
class Report:
    """What an export wrote, and how it compares."""

    file: str
    bytes: int
    sha256: str
    bytes_of: dict[str, int]
    """Bytes by part."""
    float32_bytes: int
    """Of the same weights in float32."""
    source: str
    source_bytes: int
    """Of the file that was read: a checkpoint has the optimizer's moments and other networks in it, too."""
    part: str
    linear: NumberType
    binary_weights: int
    zero_weights: int
    """Of the binary ones, exactly 0: stored as +1."""
    layer_difference: float
    """The largest of any layer, given PyTorch's input to it, as a share of the layer's largest value."""
    images_from: str
    images: int = 0
    """Compared from end to end."""
    agreed: int = 0
    undecided: int = 0
    """Images that differ, but on which PyTorch's float32 and float64 do not agree either."""
    disagreements: list[Disagreement] = field(default_factory=list)
    output_difference: float = 0.0
    """The largest of an image that agrees, as a share of its scores' spread."""
    kernels: str = ""
    ms: float = 0.0
    pytorch_ms: float = 0.0
    """Of one image on one thread, the best call on this machine, taken in turns."""

    @property
    def agreement(self) -> float | None:
        """Share of the images that get PyTorch's answer, of those on which PyTorch agrees with itself; None of none."""
        decided = self.images - self.undecided
        return self.agreed / decided if decided else None


def export(
    trained: Trained, path: Path, *, linear: NumberType = "float16", check: int = 256, force: bool = False
) -> Report:
    """Write the network as one file that `runtime` runs.

    Before the file takes its name it is compared with PyTorch: each layer on the same inputs, and the answers to images
    of the run's validation set (or training set), where they are on this machine; else layers alone, on noise.

    Args:
        linear: how the weights of the linear layers are stored.
        check: images that are compared from end to end.
        force: write although the answers do not agree.

    Raises:
        ExportError: the network cannot be packed, or its answers do not agree; nothing is written.
        OSError: the file cannot be written.
    """
    backbone = trained.backbone
    try:
        folded = fold(backbone, trained.classifier, linear=linear)
        assert isinstance(backbone, ReActNet)
        backbone.config.check_side(trained.view.size)
        content = bnn.to_bytes(packed(trained, folded))
        network = bnn.read(content)
    except (FoldError, BnnError, ValueError) as error:
        raise ExportError(f"{trained.source}: {error}") from None
    pixels, said = images_of(trained, check)
    with aside(path) as out, torch.no_grad():
        out.part.write_bytes(content)
        report = Report(
            file=str(path),
            bytes=len(content),
            sha256=hashlib.sha256(content).hexdigest(),
            bytes_of=_bytes_of(network, len(content)),
            float32_bytes=sum(value.numel() * 4 for value in trained.network.state_dict().values()),
            source=str(trained.source),
            source_bytes=os.path.getsize(trained.source),
            part=trained.part,
            linear=linear,
            binary_weights=folded.weights,
            zero_weights=folded.zeros,
            layer_difference=_compare_layers(trained, network, pixels[:LAYER_IMAGES]),
            images_from=said or "noise",
        )
        with_zeros = copy.deepcopy(trained.network)
        replace_zeros(with_zeros)
        try:
            runtime = Runtime(out.part)
        except BnnError as error:  # BNN_KERNELS names others than this CPU has
            raise ExportError(f"{trained.source}: packed, but cannot be run here: {error}") from None
        if said:
            _compare_answers(report, trained, with_zeros, runtime, pixels)
            if not force:
                _judge(report)
        report.kernels = runtime.info["kernels"]
        report.ms, report.pytorch_ms = _times(runtime, with_zeros, trained, pixels[:1])
    return report


def packed(trained: Trained, folded: Folded) -> Network:
    """What the file holds, with metadata for people and for `python -m runtime`."""
    view = trained.view
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 256, 1).expand(1, 1, 256, 3)
    table = normalized(levels, trained.mean, trained.std)[0, :, 0]  # [3, 256], the very bits that training sees
    layers = [_layer(layer) for layer in folded.layers]
    layers[0].blobs["table"] = table.contiguous().numpy()
    metadata: dict[str, Any] = {
        "classes": list(trained.classes),
        "resize": None if view.crop == "whole" else view.resize,
        "crop": view.size,
        "whole": view.crop == "whole",
        "interpolation": view.interpolation,
        "mean": list(trained.mean),
        "std": list(trained.std),
        "name": trained.name,
        "part": trained.part,
        "step": trained.step,
        "recipe": trained.recipe.hash if trained.recipe else None,
        "engine": engine_version(),
        "source_sha256": hashlib.sha256(trained.source.read_bytes()).hexdigest(),
        "binary_weights": folded.weights,
        "zero_weights": folded.zeros,
    }
    return Network(view.size, layers[-1].record.channels_out, layers, metadata)


def _layer(layer: FoldedLayer) -> Layer:
    record = Record(
        _OPERATIONS[layer.operation],
        layer.kernel,
        layer.stride,
        _RESIDUALS[layer.residual],
        layer.channels_in,
        layer.channels_out,
        _NUMBERS[layer.number_type],
        bnn.RELU if layer.relu else 0,
    )
    return Layer(record, dict(layer.arrays))


def _bytes_of(network: Network, total: int) -> dict[str, int]:
    parts = dict.fromkeys(("stem", "binary weights", "constants of binary layers", "linear layers"), 0)
    for layer in network.layers:
        for name, blob in layer.blobs.items():
            kind = {bnn.STEM: "stem", bnn.LINEAR: "linear layers"}.get(layer.record.operation)
            parts[kind or ("binary weights" if name == "bits" else "constants of binary layers")] += blob.nbytes
    return parts | {"header, metadata, padding": total - sum(parts.values())}


# ------------------------------------------------------------------------------------------------ comparison


def images_of(trained: Trained, count: int) -> tuple[NDArray[np.uint8], str]:
    """Up to `count` images of the run's validation set (else its training set), evenly spaced, as its evaluations see
    them: uint8 [N, side, side, 3], and where they are from. Noise and "" where there are none on this machine."""
    for split in ("val", "train"):
        try:
            if trained.recipe is None:
                break
            data = readable(trained.recipe.data)
            index = loaders.open_data(data, split)
            rows = np.linspace(0, len(index), min(count, len(index)), endpoint=False).astype(np.int64).tolist()
            loader = loaders.open_eval(data, index, rows=rows)
            try:
                views = [batch.views[0] for batch in loader if len(batch.rows)]
            finally:
                loader.close()
        except (DataError, LoaderError):
            continue
        if views:
            return to_pixels(torch.cat(views), data.mean, data.std).numpy(), f"data.{split}: {index.root}"
    side = trained.view.size
    return np.random.default_rng(0).integers(0, 256, (LAYER_IMAGES, side, side, 3), dtype=np.uint8), ""


def layer_differences(trained: Trained, network: Network, pixels: NDArray[np.uint8]) -> Iterator[float]:
    """The largest difference of each layer up to the mean from PyTorch's in float64, given PyTorch's input to it in
    float32: a share of the layer's largest value.

    What one layer does is compared for itself: through several, one sign on the threshold would change all that comes
    after it, in PyTorch as here.
    """
    twin: Any = copy.deepcopy(trained.backbone).double()
    replace_zeros(twin)
    streams: list[Tensor] = []

    def record(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        streams.append(output.float())
        return streams[-1].double()  # what comes next sees float32, as in the file

    def off_threshold(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return torch.where(output == 0, -1.0, output)  # has no sign in training, and -1 in the file

    twin.stem.register_forward_hook(record)
    for block in twin.blocks:
        assert isinstance(block, Block)
        block.shift1.register_forward_hook(off_threshold)
        block.shift2.register_forward_hook(off_threshold)
        block.act1.register_forward_hook(record)
        block.act2.register_forward_hook(record)
    streams.append(twin.pooled(_float32(trained, pixels).double()).float())
    maps = [stream.numpy() if stream.ndim == 2 else stream.permute(0, 2, 3, 1).numpy() for stream in streams]
    layers = network.layers
    yield _apart(reference.stem(layers[0], reference.pixels(layers[0], pixels)), maps[0])
    for before, layer, x, expected in zip(layers, layers[1:], maps, maps[1:], strict=False):
        if layer.record.operation == bnn.HALF_BLOCK:
            yield _apart(reference.half_block(layer, reference.signs(before, x), x), expected)
        else:
            yield _apart(reference.mean(x), expected)


def _float32(trained: Trained, pixels: NDArray[np.uint8]) -> Tensor:
    return normalized(torch.from_numpy(pixels), trained.mean, trained.std)


def _apart(got: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    scale = np.abs(expected).max()
    return float(np.abs(got - expected).max() / scale) if scale else float(np.abs(got).max())


def _compare_layers(trained: Trained, network: Network, pixels: NDArray[np.uint8]) -> float:
    differences = list(layer_differences(trained, network, pixels))
    for number, difference in enumerate(differences):
        if not difference <= LAYER_TOLERANCE:
            raise ExportError(
                f"{trained.source}: layer {number} differs from PyTorch's by {difference:.1e} of its largest value, "
                f"expected at most {LAYER_TOLERANCE:.0e}; nothing was written, and this is a defect: please report it"
            )
    return max(differences)


def _compare_answers(
    report: Report, trained: Trained, network: nn.Module, runtime: Runtime, pixels: NDArray[np.uint8]
) -> None:
    """Put into the report how the answers to images compare."""
    in_float64 = copy.deepcopy(network).double()
    same = _same_classes if trained.classifier is not None else _same_features
    for start in range(0, len(pixels), _CHUNK):
        chunk = pixels[start : start + _CHUNK]
        images = _float32(trained, chunk)
        expected, got = network(images), torch.from_numpy(runtime.run(chunk))
        agrees = same(expected, got)
        exact = expected.double()
        if not agrees.all():
            exact[~agrees] = in_float64(images[~agrees].double())
        is_decided = same(expected.double(), exact)
        spread = (expected.amax(1) - expected.amin(1)).clamp(min=torch.finfo(torch.float32).tiny)
        report.images += len(chunk)
        report.agreed += int(agrees.sum())
        report.undecided += int((~is_decided).sum())
        if agrees.any():
            apart = (got - expected).abs().amax(1) / spread
            report.output_difference = max(report.output_difference, float(apart[agrees].max()))
        for row in (~agrees & is_decided).nonzero().flatten().tolist():
            report.disagreements.append(_disagreement(start + row, expected[row], got[row], trained))


def _same_classes(a: Tensor, b: Tensor) -> Tensor:
    return a.argmax(1) == b.argmax(1)


def _same_features(a: Tensor, b: Tensor) -> Tensor:
    return F.cosine_similarity(a, b, dim=1) >= SAME_FEATURES


def _disagreement(image: int, expected: Tensor, got: Tensor, trained: Trained) -> Disagreement:
    if trained.classifier is None:
        return Disagreement(image, 0, 0, float(1 - F.cosine_similarity(expected, got, dim=0)))
    best = expected.topk(2).values
    margin = float((best[0] - best[1]) / (expected.max() - expected.min()))
    return Disagreement(image, int(expected.argmax()), int(got.argmax()), margin)


def _judge(report: Report) -> None:
    if report.agreement is not None and report.agreement < LEAST_AGREEMENT:
        margins = ", ".join(f"{one.margin:.2%}" for one in report.disagreements[:5])
        raise ExportError(
            f"{report.source}: {len(report.disagreements)} of {report.images} images get another answer than in "
            f"PyTorch (margins {margins} of the spread), expected at most {1 - LEAST_AGREEMENT:.0%}; nothing was "
            "written; is the network trained? --linear float32 is the most exact form, --force writes all the same"
        )


def _times(runtime: Runtime, network: nn.Module, trained: Trained, pixels: NDArray[np.uint8]) -> tuple[float, float]:
    """Milliseconds of one image on one thread, here and in PyTorch, in turns."""
    image, threads = _float32(trained, pixels), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        turns = [(_best(lambda: runtime.run(pixels)), _best(lambda: network(image))) for _ in range(3)]
    finally:
        torch.set_num_threads(threads)
    ours, theirs = (1000 * min(times) for times in zip(*turns, strict=True))
    return ours, theirs


def _best(call: Callable[[], Any]) -> float:
    best, started = float("inf"), time.perf_counter()
    while True:
        before = time.perf_counter()
        call()
        after = time.perf_counter()
        best = min(best, after - before)
        if after - started > SECONDS / 6:
            return best


# ------------------------------------------------------------------------------------------------ other PyTorch code


def write_safetensors(trained: Trained, path: Path) -> None:
    """Write a ReActNet's weights under their published names, for other PyTorch code; a classifier is one linear layer,
    with what standardizes its input folded into it.

    Raises:
        ExportError: another network, or safetensors is not installed.
        OSError: the file cannot be written.
    """
    if problem := weights.missing_safetensors():
        raise ExportError(f"{path}: {problem}")
    try:
        folded = fold(trained.backbone, trained.classifier, linear="float32")
    except FoldError as error:
        raise ExportError(f"{trained.source}: {error}") from None
    classifier = None
    if isinstance(trained.classifier, nn.Linear):
        classifier = trained.classifier.state_dict()
    elif trained.classifier is not None:
        classifier = {name: torch.from_numpy(array) for name, array in folded.layers[-1].arrays.items()}
    with aside(path) as out:
        out.part.write_bytes(weights.as_safetensors(weights.published(trained.backbone.state_dict(), classifier)))
