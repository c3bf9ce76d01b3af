"""Bytes and kernels of the compiled networks on an H200, without one: Inductor's own account of the graphs it makes.

    python benchmarks/traffic.py         # some eight minutes on two cores

The networks are traced on the CPU; forward and backward graphs then go through Inductor's passes, lowering and
scheduler as if for CUDA, which plans every kernel and compiles none. A number is the slope over the batch, so that
weights do not count, for one image in two views. Writes benchmarks/traffic.json.

Inductor's internals are replaced here, so this follows one version of PyTorch (2.14); the engine does not use it.
"""

import contextlib
import json
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
import triton
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch._inductor import compile_fx, ir
from torch._inductor import config as inductor
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensor
from triton.backends.compiler import GPUTarget

from engine.provenance import environment
from models import halfblock, resnet, weight_signs
from models.reactnet import Config, ReActNet

HERE = Path(__file__).resolve().parent
CUDA = torch.device("cuda", 0)
BATCHES = (64, 128)  # smaller ones split reductions otherwise
PROPERTIES = types.SimpleNamespace(
    name="NVIDIA H200", major=9, minor=0, total_memory=141 << 30, multi_processor_count=132, warp_size=32,
    regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
    shared_memory_per_block=49152, shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 << 20, is_integrated=0, gcnArchName="", uuid="0", pci_bus_id=0,
)  # fmt: skip


class Planned(NamedTuple):
    """One graph of a network."""

    bytes: int
    kernels: int
    saved: int
    """Bytes that a forward leaves to the backward, beside what it was given; its few features are among them."""


class _Planned(Exception):
    """Inductor has planned a graph; nothing more is wanted of it."""


class _Driver:
    """What Triton asks of a GPU that is not there."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return CUDA

    def get_current_device(self) -> int:
        return 0

    def is_active(self) -> bool:
        return True


def _bytes(node: Any) -> int:
    """What a planned kernel reads and writes, each buffer once."""
    part = node.node
    if isinstance(part, ir.UserDefinedTritonKernel):  # Inductor counts what such a kernel writes as read, too
        read = {name.get_name(): name for name in part.inputs}
        return sum(_size(buffer) for buffer in read.values())
    if isinstance(part, ir.MultiOutput):  # nor what an operator of several results writes
        return _size(part)
    return node.get_read_write_buffers_sizes()


def _size(buffer: Any) -> int:
    count = 1
    for side in buffer.get_size():
        count *= int(side)
    return count * buffer.get_dtype().itemsize


@contextlib.contextmanager
def no_device_needed(found: list[Planned], saved: int) -> Iterator[None]:
    """Let Inductor plan for an H200 and stop there."""

    def plan(self: GraphLowering) -> None:
        self.init_wrapper_code()
        self._update_scheduler()
        sizes = {node.get_name(): _bytes(node) for node in self.scheduler.nodes}
        kernels = sum(
            not isinstance(getattr(node, "node", None), ir.MultiOutput) and type(node).__name__[:3] != "Nop"
            for node in self.scheduler.nodes
        )
        found.append(Planned(sum(sizes.values()), kernels, saved))
        raise _Planned

    replaced: dict[str, Any] = {
        "torch.cuda._get_device_properties": lambda *_: PROPERTIES,
        "torch.cuda.get_device_properties": lambda *_: PROPERTIES,
        "torch.cuda.get_device_capability": lambda *_: (9, 0),
        "torch.cuda.is_available": lambda: True,
        "torch.cuda.is_bf16_supported": lambda *_, **__: True,
        "torch.cuda.device_count": lambda: 1,
        "torch.cuda.current_device": lambda: 0,
        "torch.cuda.current_stream": lambda *_: None,
        "torch.cuda.get_rng_state": lambda *_: torch.zeros(1),
        "torch.cuda.set_rng_state": lambda *_: None,
        "torch.cuda._lazy_init": lambda: None,
        "torch.cuda._exchange_device": lambda *_: 0,
        "torch.cuda._maybe_exchange_device": lambda *_: 0,
        "torch._C._conv_determine_backend_memory_format": lambda *_: torch.channels_last,  # cuDNN's answer
        "torch._inductor.scheduler.has_triton": lambda *_: True,
        "torch._inductor.graph.GraphLowering.codegen": plan,
    }
    with contextlib.ExitStack() as stack:
        for target, value in replaced.items():
            stack.enter_context(mock.patch(target, value, create=True))
        yield


def planned(network: nn.Module, images: Tensor, *, options: dict[str, Any], is_trained: bool) -> list[Planned]:
    """Plan a network's forward, and its backward if it is trained, under autocast."""
    found: list[Planned] = []
    original = compile_fx.compile_fx_inner

    def inner(graph: Any, inputs: list[Any], **rest: Any) -> Callable[[list[Any]], list[Any]]:
        mode = torch._guards.detect_fake_mode(inputs)
        (output,) = (node for node in graph.graph.nodes if node.op == "output")
        nodes = torch.utils._pytree.tree_leaves(output.args[0])
        results = [node.meta["val"] if isinstance(node, torch.fx.Node) else node for node in nodes]
        made = {
            node: node.meta["val"] for node in nodes if isinstance(node, torch.fx.Node) and node.op != "placeholder"
        }
        saved = sum(value.nbytes for value in made.values() if isinstance(value, Tensor))

        def moved(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            meta = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
            return FakeTensor(mode, meta, CUDA)

        for node in graph.graph.nodes:
            if "device" in node.kwargs:
                node.kwargs = {**node.kwargs, "device": CUDA}
            if "val" in node.meta:
                node.meta["val"] = torch.utils._pytree.tree_map(moved, node.meta["val"])
        graph.recompile()
        try:
            with no_device_needed(found, saved), V.set_fake_mode(mode):
                original(graph, [moved(value) for value in inputs], **rest)
        except Exception as error:
            if not isinstance(error, _Planned) and not isinstance(error.__cause__ or error.__context__, _Planned):
                raise

        def run(_: list[Any]) -> list[Any]:
            return [
                torch.empty_strided(r.shape, r.stride(), dtype=r.dtype) if isinstance(r, Tensor) else r for r in results
            ]

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    def backend(graph: Any, inputs: Any) -> Any:
        return compile_fx.compile_fx(graph, inputs, inner_compile=inner)

    torch._dynamo.reset()
    compiled = torch.compile(network, backend=backend, fullgraph=True, dynamic=False)
    with inductor.patch({"fx_graph_cache": False, **options}), torch.autocast("cpu", torch.bfloat16):
        with torch.set_grad_enabled(is_trained):
            features = compiled(images)
        if is_trained:
            features.sum().backward()
    return found


def slope(network: nn.Module, *, options: dict[str, Any], is_trained: bool) -> dict[str, float]:
    """MB for one image in two views, and kernels of a step of two views."""
    graphs = []
    for batch in BATCHES:
        images = torch.zeros(batch, 3, 224, 224, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
        graphs.append(planned(network, images, options=options, is_trained=is_trained))
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
    functorch_config.enable_autograd_cache = False
    triton.runtime.driver.set_active(_Driver())
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
