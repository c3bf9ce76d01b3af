"""Inductor's CUDA code of a network, and the machine code of its kernels, without a GPU.

A network is traced on the CPU; its forward and backward graphs then go through Inductor as if for CUDA, up to the
Python that launches the kernels. `machine_code` compiles these kernels by Triton and ptxas. Nothing is launched.

    python benchmarks/codegen.py --fused --out build/codegen    # to read what BURN's student becomes

Inductor's internals are replaced here; PyTorch 2.11, 2.12 and 2.14 were tried. Triton keeps the GPU that is not
there until the process ends.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib.util
import math
import re
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor, fx
from torch._dynamo import device_interface
from torch._functorch import config as functorch_config
from torch._inductor import compile_fx, ir
from torch._inductor import config as inductor
from torch._inductor import utils as inductor_utils
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import hints
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CUDA = torch.device("cuda", 0)
Capability = tuple[int, int]
_GPUS = {(8, 0): (108, 40, 166912), (9, 0): (132, 50, 232448), (10, 0): (148, 126, 232448)}
"""Multiprocessors, MB of L2 cache and bytes of shared memory of an A100, H200 and B200."""


class Map(NamedTuple):
    """A tensor of four axes: [B, C, H, W], or [B, H, W, C] for a buffer that custom kernels fill."""

    user: str
    """The operator outside Triton that reads or writes it; empty for a buffer of the graph."""
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def innermost(self) -> int:
        """Size of the axis whose elements are neighbors in memory: C in channels_last, W in contiguous."""
        return min(((s, n) for s, n in zip(self.stride, self.size, strict=True) if n > 1), default=(1, 1))[1]


class Generated(NamedTuple):
    """One graph of a network."""

    code: str
    """Python that launches the kernels, with their sources."""
    bytes: int
    """What all kernels read and write, each buffer once for each kernel."""
    kernels: int
    saved: int
    """Bytes that a forward leaves to the backward, beside what it was given; its few features are among them."""
    maps: list[Map]

    @property
    def launches(self) -> list[str]:
        """What is launched: names of Triton kernels, `extern_kernels.*` and `torch.ops.*`."""
        calls = [ast.unparse(node.func) for node in ast.walk(ast.parse(self.code)) if isinstance(node, ast.Call)]
        found = [re.fullmatch(r"(\w+)\.run|(extern_kernels\.\w+|(?:torch\.ops|aten)\..+)", call) for call in calls]
        return [match[1] or match[2] for match in found if match]

    @property
    def sources(self) -> dict[str, str]:
        """Names of the Triton kernels and the modules that define them."""
        return {
            node.targets[0].id: node.value.args[1].value  # type: ignore[attr-defined]
            for node in ast.parse(self.code).body
            if isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("async_compile.triton(")
        }


class KernelCode(NamedTuple):
    """What a kernel became, for one of the configurations among which Inductor chooses by time."""

    name: str
    config: str
    registers: int
    spilled: int
    """Bytes of local memory for each thread."""
    wide: int
    """Instructions that read or write 16 bytes of global memory."""


class _Finished(Exception):
    """Inductor has written a graph's code; nothing more is wanted of it."""


def _target(capability: Capability) -> GPUTarget:
    return GPUTarget("cuda", 10 * capability[0] + capability[1], 32)


def _activate(capability: Capability) -> None:
    """Give Triton a driver for a GPU that is not there."""
    answers = {"current_target": _target(capability), "active_torch_device": CUDA, "current_device": 0}
    driver = types.SimpleNamespace(**{f"get_{name}": lambda value=value: value for name, value in answers.items()})
    driver.is_active = lambda: True
    triton.runtime.driver.set_active(driver)


@contextlib.contextmanager
def no_device_needed(capability: Capability) -> Iterator[None]:
    """Let Inductor believe in a GPU."""
    processors, cache, shared = _GPUS[capability]
    properties = types.SimpleNamespace(
        name="NVIDIA", major=capability[0], minor=capability[1], multi_processor_count=processors, warp_size=32,
        regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
        shared_memory_per_block=49152, shared_memory_per_block_optin=shared, L2_cache_size=cache << 20,
        shared_memory_per_multiprocessor=shared + 1024, total_memory=80 << 30, is_integrated=0, gcnArchName="",
    )  # fmt: skip
    answers: dict[str, Any] = {"is_available": True, "device_count": 1, "current_device": 0, "_lazy_init": None}
    answers |= {"_get_device_properties": properties, "_exchange_device": 0, "_maybe_exchange_device": 0}
    answers |= {"get_rng_state": torch.zeros(1)}
    replaced: dict[str, Any] = {
        f"torch.cuda.{name}": lambda *_, value=value, **__: value for name, value in answers.items()
    }
    replaced["torch._C._conv_determine_backend_memory_format"] = _cudnn_format
    replaced["torch._inductor.runtime.triton_helpers.set_driver_to_gpu"] = lambda: None
    with contextlib.ExitStack() as stack:
        for target, function in replaced.items():
            stack.enter_context(mock.patch(target, function, create=True))
        _forget()
        stack.callback(_forget)
        yield


def _forget() -> None:
    """Empty what PyTorch remembers of a device."""
    device_interface.caching_worker_device_properties.clear()
    for owner in (hints.DeviceProperties, inductor_utils, torch.utils._triton):
        for name in dir(owner):
            getattr(getattr(owner, name), "cache_clear", lambda: None)()


def _cudnn_format(images: Tensor, weight: Tensor, *_: Any) -> torch.memory_format:
    """cuDNN's answer: channels_last where the images or the weight are."""
    is_last = torch.channels_last in (torch._prims_common.suggest_memory_format(x) for x in (images, weight))
    return torch.channels_last if is_last else torch.contiguous_format


def _bytes(node: Any) -> int:
    if not isinstance(node.node, ir.UserDefinedTritonKernel):
        return node.get_read_write_buffers_sizes()  # of an operator of several results these, too
    inputs: Any = node.node.inputs  # what it writes, too; Inductor counts that twice
    buffers = {x.get_name(): x for x in inputs}.values()
    return sum(math.prod(map(int, x.get_size())) * x.get_dtype().itemsize for x in buffers)


def _maps(graph: GraphLowering) -> list[Map]:
    used: list[tuple[str, Any]] = [("", x) for x in graph.buffers if x.get_name() not in graph.removed_buffers]
    for part in (node.node for node in graph.scheduler.nodes):
        if isinstance(part, ir.MultiOutput):
            used.append((part.inputs[0].python_kernel_name, part))  # type: ignore[union-attr]
        elif isinstance(part, ir.ExternKernel) and not isinstance(part, ir.UserDefinedTritonKernel):
            used += [(part.python_kernel_name or "", x) for x in (*part.inputs, part)]
    shapes = [(user, x.get_size(), x.get_stride()) for user, x in used if x.has_tensor_output()]
    return [Map(user, tuple(map(int, n)), tuple(map(int, strides))) for user, n, strides in shapes if len(n) == 4]


def generate(
    network: Callable[..., Tensor],
    *inputs: Any,
    capability: Capability = (9, 0),
    options: dict[str, Any] | None = None,
    is_trained: bool = True,
) -> list[Generated]:
    """Inductor's code of a network's forward, and of its backward if it is trained, under autocast to bfloat16.

    Args:
        network: on the CPU; its buffers may change.
        inputs: what it is called with, on the CPU. Large batches cost no more than small ones.
        capability: of the GPU.
        options: of `torch._inductor.config`.
        is_trained: whether there is a backward.
    """
    found: list[Generated] = []
    original, codegen = compile_fx.compile_fx_inner, GraphLowering.codegen

    def inner(graph: fx.GraphModule, inputs: Sequence[Any], **rest: Any) -> Callable[[list[Any]], list[Any]]:
        mode: Any = torch._guards.detect_fake_mode(inputs)
        nodes = torch.utils._pytree.tree_leaves(graph.graph.output_node().args[0])
        results = [node.meta["val"] if isinstance(node, fx.Node) else node for node in nodes]
        made = {node: node.meta["val"] for node in nodes if isinstance(node, fx.Node) and node.op != "placeholder"}
        saved = sum(value.nbytes for value in made.values() if isinstance(value, Tensor))

        def moved(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            meta = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
            return FakeTensor(mode, meta, CUDA)

        def write(self: GraphLowering) -> None:
            code: Any = codegen(self)[0]
            nodes = self.scheduler.nodes
            quiet = [isinstance(n.node, ir.MultiOutput) or type(n).__name__.startswith("Nop") for n in nodes]
            total = sum(map(_bytes, nodes))
            found.append(Generated(getattr(code, "value", code), total, quiet.count(False), saved, _maps(self)))
            raise _Finished

        for node in graph.graph.nodes:
            if "device" in node.kwargs:
                node.kwargs = {**node.kwargs, "device": CUDA}
            if "val" in node.meta:
                node.meta["val"] = torch.utils._pytree.tree_map(moved, node.meta["val"])
        graph.recompile()
        before = len(found)
        with no_device_needed(capability), mock.patch.object(GraphLowering, "codegen", write), V.set_fake_mode(mode):
            try:
                original(graph, [moved(value) for value in inputs], **rest)
            except Exception:  # Inductor wraps what is raised inside it
                if len(found) == before:
                    raise

        def run(_: list[Any]) -> list[Any]:
            return [
                torch.empty_strided(x.shape, x.stride(), dtype=x.dtype) if isinstance(x, Tensor) else x for x in results
            ]

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    def backend(graph: fx.GraphModule, inputs: Any) -> Any:
        return compile_fx.compile_fx(graph, inputs, inner_compile=inner)  # type: ignore[arg-type]

    _activate(capability)  # tracing asks Triton, too: what a custom kernel writes
    torch._dynamo.reset()
    compiled = torch.compile(network, backend=backend, fullgraph=True, dynamic=False)
    with (
        functorch_config.patch({"enable_autograd_cache": False}),
        inductor.patch({"fx_graph_cache": False, **(options or {})}),
        torch.autocast("cpu", torch.bfloat16),
        torch.set_grad_enabled(is_trained),
    ):
        result = compiled(*inputs)
        if is_trained:
            result.sum().backward()
    return found


def machine_code(
    generated: Sequence[Generated], capability: Capability, wanted: Callable[[str, str], Any] = lambda *_: True
) -> list[KernelCode]:
    """Compile Triton kernels, each source once, in all the configurations among which Inductor chooses.

    Args:
        generated: for the same capability.
        capability: of the GPU.
        wanted: tells by a kernel's name and source whether to compile it.
    """
    named = [item for graph in generated for item in graph.sources.items() if wanted(*item)]
    sources = {re.sub(r"'kernel_name': '\w+'", "", source): (name, source) for name, source in reversed(named)}
    _activate(capability)
    found = []
    with no_device_needed(capability), tempfile.TemporaryDirectory() as folder:
        for number, (name, source) in enumerate(reversed(sources.values())):
            path = Path(folder) / f"kernel{number}.py"  # Triton reads a function's source from its file
            path.write_text(source, encoding="utf-8")
            spec: Any = importlib.util.spec_from_file_location(path.stem, path)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            (kernel,) = (value for value in vars(module).values() if hasattr(value, "triton_meta"))
            found += [_compile(name, kernel, config, capability) for config in kernel.configs]
    return found


def _compile(name: str, kernel: Any, config: Any, capability: Capability) -> KernelCode:
    meta = kernel.triton_meta
    source = ASTSource(kernel.fn, meta["signature"], {**meta["constants"], **config.kwargs}, meta["configs"][0])
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "sanitize_overflow": False}
    compiled = triton.compile(source, target=_target(capability), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        dump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([dump, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    wide = len(re.findall(r"(?:ld|st)\.global\S*\.(?:v4\.\w32|v2\.\w64)\b", compiled.asm["ptx"]))
    return KernelCode(name, str(config), used["REG"], used["STACK"] + used["LOCAL"], wide)


def main() -> int:
    """Write the code of BURN's student, forward and backward, and say what it launches."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from models import halfblock, weight_signs
    from models.reactnet import Config, ReActNet

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", choices=[f"{a}.{b}" for a, b in _GPUS], default="9.0", help="of the GPU (9.0)")
    parser.add_argument("--fused", action="store_true", help="with the half-blocks of run.kernels: fused")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--out", type=Path, required=True, help="a folder")
    arguments = parser.parse_args()
    weight_signs.has_kernels = halfblock.has_kernels = lambda _: True
    network = ReActNet(Config()).to(memory_format=torch.channels_last).train()
    network.fused = arguments.fused
    images = torch.empty(arguments.batch, 3, 224, 224, dtype=torch.bfloat16)
    major, minor = map(int, arguments.capability.split("."))
    images = images.contiguous(memory_format=torch.channels_last)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, graph in zip(("forward", "backward"), generate(network, images, capability=(major, minor)), strict=True):
        path = arguments.out / f"{name}.py"
        path.write_text(graph.code, encoding="utf-8")
        print(f"{path}: {graph.kernels} kernels, {graph.bytes / 1e6 / arguments.batch:.1f} MB an image and view")
    return 0


if __name__ == "__main__":
    sys.exit(main())
