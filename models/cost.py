"""Parameters, operations and memory traffic of networks and methods, counted on the meta device."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.backbones import backbones_of
from models.binary import BinaryConv2d
from models.methods import Method


class Cost(NamedTuple):
    """Multiply-accumulates of one image's forward pass; OPs = float + binary / 64 as in Bi-Real Net."""

    float_macs: int
    binary_macs: int

    @property
    def ops(self) -> float:
        """The field's single number: a binary multiply-accumulate counts 1/64."""
        return self.float_macs + self.binary_macs / 64

    @property
    def macs(self) -> int:
        """What training computes: it runs binary convolutions as dense ones."""
        return self.float_macs + self.binary_macs


class Gpu(NamedTuple):
    """What a device can do at best."""

    flops: float
    """FLOP/s of a large product in 16 bit."""
    bytes: float
    """Bytes per second of a large copy, read and written."""
    source: str


# Measured on an H200; for the others the same share of the data sheet's numbers.
GPUS = {
    "H200": Gpu(790e12, 4.3e12, "measured"),
    "H100": Gpu(790e12, 3.0e12, "data sheet x the H200's measured share"),
    "A100": Gpu(249e12, 1.8e12, "data sheet x the H200's measured share"),
}


def count(network: nn.Module, size: int | tuple[int, int, int]) -> Cost:
    """Count convolutions and linear layers for one image [1, 3, size, size], or one input [1, C, H, W] of that `size`.

    A convolution counts as binary when both its weights and its input are. The network must live on the
    meta device (build it under `torch.device("meta")`), so nothing is computed and no memory is taken.
    """
    totals = {"float": 0, "binary": 0}

    def add(module: nn.Module, args: Any, output: Tensor) -> None:
        if isinstance(module, nn.Conv2d):
            macs = output.numel() * module.weight[0].numel()
        else:
            assert isinstance(module, nn.Linear)
            macs = output.numel() * module.in_features
        is_binary = isinstance(module, BinaryConv2d) and module.weights == module.activations == "binary"
        totals["binary" if is_binary else "float"] += macs

    hooks = [
        module.register_forward_hook(add) for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    was_training = network.training
    try:
        with torch.no_grad():
            network.eval()(torch.empty(1, *((3, size, size) if isinstance(size, int) else size), device="meta"))
    finally:
        network.train(was_training)
        for hook in hooks:
            hook.remove()
    return Cost(totals["float"], totals["binary"])


class Part(NamedTuple):
    """A backbone of a method, in training."""

    name: str
    network: nn.Module
    sizes: list[int]
    """Sides of the views that it runs."""
    is_trained: bool


def parts(method: Method, sizes: Sequence[int]) -> Iterator[Part]:
    """The backbones of a method that gets views of these sides."""
    for name, network in backbones_of(method).items():
        is_trained = any(parameter.requires_grad for parameter in network.parameters())
        yield Part(name, network, list(sizes[: method.views_per_backbone]), is_trained)


def training_flops(method: Method, sizes: Sequence[int]) -> float:
    """FLOPs of one image in the backbones, 2 per multiply-accumulate; backward costs twice the forward."""
    return float(
        sum(
            2 * count(part.network, size).macs * (3 if part.is_trained else 1)
            for part in parts(method, sizes)
            for size in part.sizes
        )
    )


class Traffic(NamedTuple):
    """Bytes that kernels read and write for one image."""

    convolutions: float
    others: float


class _Traffic(TorchDispatchMode):
    """Adds up the bytes of the tensors that each operator reads and writes, once for each operator."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions, self.others = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            moved = sum(t.nbytes for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor))
            if "convolution" in str(func):
                self.convolutions += moved
            else:
                self.others += moved
        return out


def eager_traffic(method: Method, sizes: Sequence[int], dtype: torch.dtype = torch.float16) -> Traffic:
    """Bytes of one image through the backbones, one kernel for each operator, in a stream of `dtype`.

    The difference between a batch of three and one of two, so that weights do not count.
    """
    totals = [0.0, 0.0]
    for part in parts(method, sizes):
        network = copy.deepcopy(part.network).to(dtype).train()
        for size in set(part.sizes):
            found = []
            for batch in (2, 3):
                network.zero_grad()
                with _Traffic() as traffic, torch.set_grad_enabled(part.is_trained):
                    features = network(torch.empty(batch, 3, size, size, device="meta", dtype=dtype))
                    if part.is_trained:
                        features.backward(torch.empty_like(features))
                found.append((traffic.convolutions, traffic.others))
            views = part.sizes.count(size)
            totals = [total + views * (more - less) for total, less, more in zip(totals, *found, strict=True)]
    return Traffic(*totals)


def saved_bytes(method: Method, sizes: Sequence[int], dtype: torch.dtype) -> float:
    """Bytes of one image that the backbones keep for the backward pass, run eagerly in a stream of `dtype`.

    The difference between a batch of three and one of two, so that weights do not count.
    """
    total = 0.0
    for part in parts(method, sizes):
        if not part.is_trained:
            continue
        network = copy.deepcopy(part.network).to(dtype).train()
        for size in set(part.sizes):
            few, more = (
                _saved(network, torch.empty(batch, 3, size, size, device="meta", dtype=dtype)) for batch in (2, 3)
            )
            total += part.sizes.count(size) * (more - few)
    return total


def _saved(network: nn.Module, images: Tensor) -> int:
    storages: dict[int, tuple[int, Any]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage.nbytes(), storage  # held, so that no other gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        network(images)
    return sum(size for size, _ in storages.values())


# Shares assumed of the ceilings, and of the eager bytes that are left after fusion by torch.compile (765 of 1,194 MB an
# image for BURN's networks, by Inductor's own account). A prediction to be missed: --benchmark prints it beside what it
# measures.
CONVOLUTION_SHARE, COPY_SHARE, LEFT_AFTER_FUSION = 0.6, 0.82, 0.64


def predicted_images_per_second(gpu: Gpu, flops: float, traffic: Traffic) -> float:
    """Speed of the compiled step: convolutions at their share of the product, all else at its share of the copy."""
    rest = max(LEFT_AFTER_FUSION * (traffic.convolutions + traffic.others) - traffic.convolutions, 0.0)
    return 1 / (flops / (CONVOLUTION_SHARE * gpu.flops) + rest / (COPY_SHARE * gpu.bytes))


def predictions(flops: float, traffic: Traffic) -> dict[str, float]:
    """GPU -> predicted images per second, measured on none of them."""
    return {name: predicted_images_per_second(gpu, flops, traffic) for name, gpu in GPUS.items()}
