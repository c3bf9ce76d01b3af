"""What an error says about the machine, and how much memory training takes."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import torch

from engine import dist
from engine.errors import LostRank, MachineError, first_line
from engine.precision import DTYPES
from engine.recipe import Recipe
from loaders import machine
from models import cost, methods

_SLACK = 1.25
"""Peak memory over the counted bytes: gradients in flight, workspaces of convolutions, fragmentation. Assumed."""
_CONTEXT = 1 << 30
"""Bytes that CUDA, cuDNN and NCCL take for themselves. Assumed."""


def fault(error: BaseException, recipe: Recipe, device: torch.device) -> MachineError | None:
    """What an error says about the machine, in one line; None where it says nothing."""
    said = first_line(error)
    if damaged := _damaged_code(error):
        for file in damaged.parent.glob(f"{damaged.name.split('.')[0]}*"):
            file.unlink(missing_ok=True)
        return MachineError(f"{damaged}: damaged code in the compiler's cache, now removed; start again with --resume")
    if _is_out_of_memory(error):
        return OutOfMemory(f"{device}: out of memory with data.micro_batch {recipe.data.micro_batch}")
    if is_lost(error):
        return MachineError(f"{device}: {said}; the GPU's state is lost, start again with --resume")
    if isinstance(error, OSError) or any(words in said for words in _EXHAUSTED):
        return MachineError(f"{said}; see to it and start again with --resume")
    if dist.is_connection(error):
        return LostRank(f"another rank is gone, and with it the connection ({said[:160]}); its own log says why")
    return None


def _damaged_code(error: BaseException) -> Path | None:
    """The file of the compiler's cache that cannot be loaded: a run may have been killed while it wrote it."""
    found = re.search(r"(?m)(?:^|Failed to import )(/\S+\.(?:so(?=: )|py$))", str(error))
    if found is None:
        return None
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(found[1]) if found[1].startswith(f"{cache_dir()}/") else None


_EXHAUSTED = (
    "can't start new thread",
    *(os.strerror(number) for number in (errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC)),
)
"""What libraries say in errors of their own of a machine that has no more of something."""


def ends(error: BaseException) -> bool:
    """Whether nothing can go on after an error: memory ran out, a device or another rank is lost."""
    return _is_out_of_memory(error) or is_lost(error) or dist.is_connection(error)


def _is_out_of_memory(error: BaseException) -> bool:
    is_torchs = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return is_torchs or "can't allocate memory" in first_line(error)


class OutOfMemory(MachineError):
    """Memory ran out."""

    def with_advice(self, recipe: Recipe, device: torch.device) -> OutOfMemory:
        """The same, with a `data.micro_batch` that would fit by the bytes that are counted, which takes a moment."""
        return OutOfMemory(f"{self}; {_fits(recipe, device)}")


def is_lost(error: BaseException) -> bool:
    """Whether the device can compute nothing more in this process."""
    is_cuda = isinstance(error, getattr(torch, "AcceleratorError", ())) or "CUDA error" in str(error)
    return is_cuda and not isinstance(error, torch.OutOfMemoryError)


def _fits(recipe: Recipe, device: torch.device) -> str:
    on_gpu = device.type == "cuda"
    total = torch.cuda.get_device_properties(device).total_memory if on_gpu else machine.memory()["MemTotal"]
    needs = memory(recipe)
    wanted = needs["state"] + recipe.data.micro_batch * needs["per_image"]
    counted = f"{wanted / 2**30:.1f} GiB are counted for it, the device has {total / 2**30:.1f}"
    if best := largest_micro_batch(recipe, total, needs):
        return f"{counted}; data.micro_batch={best} would fit"
    return f"{counted}; not even one image fits: set smaller data.views or another device"


def memory(recipe: Recipe) -> dict[str, int]:
    """Bytes that training takes: `state` (parameters, gradients, optimizer) and `per_image` of a micro-batch, which the
    backward pass needs; counted on the meta device, so without what libraries take for themselves."""
    method = methods.on_meta(recipe.method)
    trained = sum(p.numel() for p in method.parameters() if p.requires_grad)
    moments = 2 if recipe.optim.name in ("adam", "adamw") else 1
    state = sum(t.nbytes for t in (*method.parameters(), *method.buffers())) + 4 * trained * (1 + moments)
    dtype = DTYPES[recipe.run.amp] or torch.float32
    sizes = [view.size for view in recipe.data.views]
    views = sum(3 * size**2 for size in sizes) * dtype.itemsize
    return {"state": state, "per_image": views + round(cost.saved_bytes(method, sizes, dtype))}


def largest_micro_batch(recipe: Recipe, total: int, needs: dict[str, int]) -> int | None:
    """The largest legal `data.micro_batch` below the recipe's that fits into `total` bytes; None if none does."""
    room = total - _CONTEXT - needs["state"]
    micro, batch = recipe.data.micro_batch, recipe.data.batch_size
    fitting = (m for m in range(micro - 1, 0, -1) if batch % m == 0 and m * needs["per_image"] * _SLACK <= room)
    return next(fitting, None)
