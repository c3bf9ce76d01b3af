"""A CUDA device that is not there: tensors without content, and everything that would make the host wait for them.

What a fake device cannot show is how a GPU computes. It shows on which device every tensor is, in which type and
layout, and which calls wait.
"""

from __future__ import annotations

import contextlib
import functools
import traceback
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.tiny import ROOT

CUDA = torch.device("cuda", 0)
# Operators whose result the host has to know.
_WAITING = {
    "_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2", "unique_consecutive", "equal",
    "is_nonzero", "allclose", "isin", "bincount", "repeat_interleave",
}  # fmt: skip


class Stream:
    """Stands in for a CUDA stream; knows what waited for it."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.waited_for: list[Stream] = []

    def wait_stream(self, other: Stream) -> None:
        self.waited_for.append(other)


class Event:
    """Stands in for a CUDA event."""

    waits = 0
    """How often the host has waited for one."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, *_: Any) -> None:
        pass

    def synchronize(self) -> None:
        Event.waits += 1

    def query(self) -> bool:
        Event.waits += 1  # what asks, goes on asking
        return True

    def elapsed_time(self, _: Event) -> float:
        return 1.0


class Waits(TorchDispatchMode):
    """Lists every call that would make the host wait for the device, with the line of ours that makes it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        devices = [t.device.type for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        why = self._why(func, args, kwargs, devices)
        if why:
            ours = [
                f for f in traceback.extract_stack() if f.filename.startswith(str(ROOT)) and "/.venv/" not in f.filename
            ]
            ours = [f for f in ours if not f.filename.startswith(str(ROOT / "tests"))] or ours
            where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno} {ours[-1].line}" if ours else "?"
            self.found[f"{why} at {where}"] = self.found.get(f"{why} at {where}", 0) + 1
        return func(*args, **kwargs)

    def _why(self, func: Any, args: Any, kwargs: Any, devices: list[str]) -> str:
        name = func.overloadpacket.__name__
        if "cuda" in devices and name in _WAITING:
            return name
        to = kwargs.get("device")
        goes = to is not None and devices and torch.device(to).type != devices[0]
        if name == "_to_copy" and goes and not kwargs.get("non_blocking"):
            return f"blocking copy {devices[0]} to {torch.device(to).type}"
        if name == "_to_copy" and goes and devices[0] == "cpu" and not _is_pinned(args[0]):
            return "copy from memory that is not pinned"
        if name == "copy_" and len(set(devices[:2])) == 2:
            if not (len(args) > 2 and args[2]) and not kwargs.get("non_blocking"):
                return "blocking copy_"
            if not _is_pinned(args[0] if devices[0] == "cpu" else args[1]):
                return "copy_ with memory that is not pinned"
        if name in ("index", "index_put", "index_put_") and devices[0] == "cuda":
            indices = [t for t in tree_leaves(args[1]) if isinstance(t, torch.Tensor)]
            if any(index.dtype == torch.bool for index in indices):
                return "a mask as index, whose places are counted"
            if any(index.device.type == "cpu" and index.ndim for index in indices):
                return "an index from the host"
        return ""


def _is_pinned(tensor: torch.Tensor) -> bool:
    return getattr(tensor, "_is_pinned_here", False)


def _pin(self: torch.Tensor, *_: Any) -> torch.Tensor:
    copy = self.clone()
    copy._is_pinned_here = True  # type: ignore[attr-defined]
    return copy


_generator = torch.Generator
_bool = torch.Tensor.__bool__


def _draws(device: Any = "cpu") -> Any:
    # PyTorch has no generator of a device that is not there: that of the host's default stands for it.
    is_host = torch.device(device).type == "cpu"
    return _generator() if is_host else types.SimpleNamespace(manual_seed=lambda _: None)


def _read(self: torch.Tensor) -> bool:
    # Memory of the host, which an event has made safe to read; there is nothing in it.
    return False if _is_pinned(self) else _bool(self)


def _copy(self: torch.Tensor, memo: dict[int, Any]) -> torch.Tensor:
    # PyTorch's own would copy memory that is not there.
    return memo.setdefault(id(self), self.detach().clone())


def _allocating(function: Any) -> Any:
    @functools.wraps(function)
    def allocate(*arguments: Any, **options: Any) -> Any:
        is_pinned = options.pop("pin_memory", False)
        result = function(*arguments, **options)
        if is_pinned:
            result._is_pinned_here = True
        return result

    return allocate


@contextlib.contextmanager
def fake_gpu(*, capability: tuple[int, int] = (9, 0)) -> Iterator[FakeTensorMode]:
    """A machine with one GPU on which nothing is computed. torch.compile runs what it is given."""
    side = Stream()
    replaced: dict[str, Any] = {
        "torch.cuda.Stream": Stream,
        "torch.cuda.Event": Event,
        "torch.cuda.current_stream": lambda *_: side,
        "torch.cuda.stream": lambda _: contextlib.nullcontext(),
        "torch.cuda.set_device": lambda _: None,
        "torch.cuda.device_count": lambda: 1,
        "torch.cuda.is_initialized": lambda: False,
        "torch.cuda.synchronize": lambda *_: None,
        "torch.cuda.memory_allocated": lambda *_: 1 << 20,
        "torch.cuda.max_memory_allocated": lambda *_: 3 << 20,
        "torch.cuda.reset_peak_memory_stats": lambda *_: None,
        "torch.cuda.get_device_properties": lambda *_: types.SimpleNamespace(total_memory=80 << 30),
        "torch.cuda.get_device_capability": lambda *_: capability,
        "torch.cuda.get_device_name": lambda *_: "a GPU that is not there",
        "torch.cuda.is_bf16_supported": lambda *_, **__: True,
        "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
        "torch.amp.grad_scaler.torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
        "torch.compile": lambda f=None, **_: f if f is not None else (lambda g: g),
        "torch.Generator": _draws,
        "torch.Tensor.__bool__": _read,
        "torch.Tensor.__deepcopy__": _copy,
        "torch.Tensor.record_stream": lambda *_: None,
        "torch.Tensor.pin_memory": _pin,
        "torch.Tensor.is_pinned": lambda self, *_: _is_pinned(self),
        "torch.empty": _allocating(torch.empty),
        "torch.zeros": _allocating(torch.zeros),
        "torch._fused_sgd_": lambda *_, **__: None,  # PyTorch's has no form for tensors without content
        "torch._C._conv_determine_backend_memory_format": lambda *_: torch.channels_last,  # cuDNN's answer
    }
    torch.utils._device._device_constructors()  # remembers functions that are replaced below
    with contextlib.ExitStack() as stack:
        for target, value in replaced.items():
            stack.enter_context(mock.patch(target, value))
        yield stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))


@contextlib.contextmanager
def trains(recipe: Any) -> Iterator[None]:
    """Let trainers of a recipe be made and stepped on the fake GPU; no gradient is computed, as PyTorch's autograd
    refuses devices that are not there."""
    from engine.train import Trainer

    build, guard, to = type(recipe.method).build, Trainer._guard, torch.nn.Module.to

    def on_gpu(config: Any) -> Any:
        if torch.get_default_device().type == "meta":  # to be counted
            return build(config)
        with torch.device("cuda"):
            return build(config)

    def no_gradients(trainer: Any) -> None:
        trainer._guarded = False  # so that it is called before every update, where gradients are due
        for parameter in trainer.trained:
            parameter.grad = torch.zeros_like(parameter)

    def stay(module: Any, *arguments: Any, **keys: Any) -> Any:
        return module if CUDA in arguments else to(module, *arguments, **keys)

    with (
        mock.patch.object(type(recipe.method), "build", on_gpu),
        mock.patch.object(torch.nn.Module, "to", stay),
        mock.patch.object(torch.Tensor, "backward", lambda *_, **__: None),
        mock.patch.object(Trainer, "_guard", no_gradients),
    ):
        yield
    assert guard is Trainer._guard


def step_of(recipe: Any, *, loads: bool = True) -> tuple[Any, Waits]:
    """A trainer on the fake GPU after two steps, and what waited in the second.

    Args:
        loads: take the images from the loader, not from the device.
    """
    import loaders
    from engine.bench.variants import Resident
    from engine.dist import World
    from engine.train import Trainer

    with trains(recipe):
        trainer = Trainer(recipe, World(0, 1, 0, 1, CUDA))
        index, place, dtype = trainer.indices["train"], trainer.world.place, trainer.amp_dtype
        batches: Any = Resident(recipe, CUDA, dtype=dtype)
        if loads:
            batches = loaders.open_train(recipe.data, index, seed=0, place=place, dtype=dtype)
        trainer.step(batches)
        with Waits() as waits:
            trainer.step(batches)
    return trainer, waits
