"""Bytes and kernels of the compiled networks on an H200, without one: Inductor's own account of the graphs it makes.

    python benchmarks/traffic.py         # some ten minutes on two cores

The networks' code is generated as for CUDA and nothing is launched (benchmarks/codegen.py). A number is the slope over
the batch, so that weights do not count, for one image in two views. Writes benchmarks/traffic.json.

Inductor's internals are replaced there, so this follows one version of PyTorch (2.14); the engine does not use it.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from torch import nn

from benchmarks import codegen
from engine.provenance import environment
from models import halfblock, resnet, weight_signs
from models.reactnet import Config, ReActNet

HERE = Path(__file__).resolve().parent
BATCHES = (64, 128)  # smaller ones split reductions otherwise


def slope(network: nn.Module, *, options: dict[str, Any], is_trained: bool) -> dict[str, float]:
    """MB for one image in two views, and kernels of a step of two views."""
    graphs = []
    for batch in BATCHES:
        images = torch.zeros(batch, 3, 224, 224, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
        graphs.append(codegen.generate(network, images, options=options, is_trained=is_trained))
    names = ("forward", "backward") if is_trained else ("forward",)
    per_image = 2 / (BATCHES[1] - BATCHES[0]) / 1e6
    found = {
        f"{name}_mb": (more.bytes - less.bytes) * per_image for name, less, more in zip(names, *graphs, strict=True)
    }
    found["mb"] = sum(found.values())
    if is_trained:
        found["saved_mb"] = (graphs[1][0].saved - graphs[0][0].saved) * per_image
    return {**found, "kernels": 2 * sum(graph.kernels for graph in graphs[1])}


def student(kernels: str) -> nn.Module:
    """BURN's binary student in training."""
    network = ReActNet(Config()).to(memory_format=torch.channels_last).train()
    network.fused = kernels == "fused"
    return network


def teacher(bn: str) -> nn.Module:
    """BURN's frozen ResNet-50."""
    network = resnet.ResNet(resnet.Config(arch="resnet50")).requires_grad_(False)
    network.folds = bn == "eval"
    return network.to(memory_format=torch.channels_last).train(bn == "train")


def main() -> int:
    """Plan everything and write it."""
    weight_signs.has_kernels = halfblock.has_kernels = lambda _: True
    result: dict[str, Any] = {"environment": environment(), "networks": {}}
    plans: list[tuple[str, Callable[[], nn.Module], bool]] = [
        ("student, compiled", lambda: student("torch"), True),
        ("student, fused", lambda: student("fused"), True),
        ("teacher, teacher_bn train", lambda: teacher("train"), False),
        ("teacher, teacher_bn eval", lambda: teacher("eval"), False),
    ]
    for name, build, is_trained in plans:
        for combo in (False, True):
            full = f"{name}{', combo kernels' if combo else ''}"
            options = {"combo_kernels": combo}
            found = slope(build(), options=options, is_trained=is_trained)
            result["networks"][full] = found
            print(full, {key: round(value, 1) for key, value in found.items()}, flush=True)
    (HERE / "traffic.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
