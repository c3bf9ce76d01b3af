"""The device of a run: found or explained, and set up to be fast or exact."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from engine.errors import DeviceError, first_line, own
from loaders import machine

if TYPE_CHECKING:  # the sections of a recipe import this file
    from engine.recipe import RunConfig

_DRIVERS = {12: 525, 13: 580}
"""CUDA -> the oldest driver that runs it (NVIDIA's compatibility table)."""


def open_device(wanted: str, local_rank: int, local_world_size: int) -> torch.device:
    """The device of this rank, ready for use.

    Args:
        wanted: `run.device`.
        local_rank, local_world_size: of the ranks of this machine, which take one GPU each.

    Raises:
        DeviceError: a GPU is asked for and there is none, fewer than ranks, or one that cannot be used.
    """
    gpus = torch.cuda.device_count()
    if wanted == "cpu" or (wanted == "auto" and not gpus):
        torch.set_num_threads(cpu_threads(local_world_size))
        return torch.device("cpu")
    if gpus < local_world_size:
        why = f" ({hidden})" if not gpus and (hidden := why_hidden()) else ""
        raise DeviceError(
            f"run.device: {local_world_size} ranks on this machine need a GPU each, found {gpus}{why}; "
            "start fewer with --nproc_per_node or set run.device=cpu"
        )
    device = torch.device("cuda", local_rank)
    if problem := why_unusable(device):
        raise own(DeviceError(f"run.device: {problem}; or set run.device=cpu"))
    return device


_MOST_THREADS = 1024
"""More are a slip, and OpenMP ends the process where the machine has not as many."""


def cpu_threads(local_world_size: int) -> int:
    """Threads that a rank computes with on a CPU: OMP_NUM_THREADS, or its share of the cores."""
    return _asked_threads(local_world_size) or max(1, machine.cores() // local_world_size)


def _asked_threads(local_world_size: int) -> int | None:
    """OMP_NUM_THREADS, as far as it is the user's.

    torchrun puts OMP_NUM_THREADS=1 into the environment of several ranks where nothing is set, which cannot be told
    from a user's 1; it is taken for torchrun's, because on a CPU one thread for each rank leaves most cores idle.
    """
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]  # a list has a number for each level of nesting
    is_torchruns = asked == "1" and local_world_size > 1 and "TORCHELASTIC_RUN_ID" in os.environ
    is_number = asked.isdecimal() and 0 < int(asked) <= _MOST_THREADS
    return int(asked) if is_number and not is_torchruns else None


def keep_threads(then: int, local_world_size: int) -> str:
    """Compute with as many CPU threads as a run did before, because sums are rounded by how they are split.

    Returns:
        Why this cannot be, in one line, or "".
    """
    now = torch.get_num_threads()
    if then == now:
        return ""
    changed = f"the run had {then} CPU threads, and has {now} now"
    if _asked_threads(local_world_size):
        return f"{changed} by OMP_NUM_THREADS: numbers differ in rounding; set OMP_NUM_THREADS={then} or unset it"
    if then * local_world_size > machine.cores():
        return f"{changed}, because this machine gives it {machine.cores()} cores: numbers differ in rounding"
    torch.set_num_threads(then)
    return ""


def why_unusable(device: torch.device) -> str:
    """Why nothing can be computed on a GPU that is there and what to do, or "" after trying it."""
    try:
        torch.cuda.set_device(device)
        torch.zeros((), device=device)
    except (RuntimeError, AssertionError) as error:  # "Torch not compiled with CUDA enabled" is an AssertionError
        said = first_line(error)
        if "no NVIDIA driver" in said:
            return f"{device} cannot be used: this machine has no NVIDIA driver"
        built = torch.version.cuda
        oldest = _DRIVERS.get(int(built.split(".")[0])) if built else None
        if oldest and "driver" in said:
            return (
                f"{device} cannot be used: PyTorch {torch.__version__} is built for CUDA {built}, which needs driver "
                f"{oldest} or newer, found {_driver() or 'an older one'}; update the driver or install a PyTorch of an "
                "older CUDA"
            )
        return f"{device} cannot be used: {said}"
    return ""


def why_hidden() -> str:
    """Why a machine with an NVIDIA driver shows no GPU and what to do; "" where there is none to be seen."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return "CUDA_VISIBLE_DEVICES is empty"
    if _driver() or os.environ.get("NVIDIA_VISIBLE_DEVICES", "void") not in ("void", "none"):
        return "NVIDIA's driver or container settings are here but no GPU is; start the container with --gpus all"
    return ""


def _driver() -> str:
    """Version of the kernel's NVIDIA driver, which a container sees though it has no GPU; "" without one."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return ""
    found = re.search(r"\b(\d{3}\.\d+(?:\.\d+)?)\b", text)
    return found[1] if found else ""


# ------------------------------------------------------------------------------------------------ set up


def set_up(run: RunConfig, device: torch.device, local_world_size: int) -> None:
    """Tell PyTorch how exact and how fast to be, for this process.

    With `run.deterministic` a step gives the same bits in every run on one kind of GPU: cuDNN and PyTorch take their
    deterministic kernels, and Inductor measures nothing that decides the order of a sum. Without it cuDNN looks for
    its fastest kernels, once for each of the few shapes.
    """
    exact = run.deterministic
    if torch.are_deterministic_algorithms_enabled() != exact:
        torch.use_deterministic_algorithms(exact, warn_only=True)  # tells Inductor, too
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # no operator here reads what it has not written
    torch.backends.cudnn.deterministic = exact
    torch.backends.cudnn.benchmark = device.type == "cuda" and not exact
    if exact:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before cuBLAS makes its first workspace
    if run.compile or device.type == "cuda":
        from torch._dynamo import config as dynamo
        from torch._inductor import config as inductor

        # Inductor's own count is that of the machine, for every rank.
        inductor.compile_threads = max(1, min(32, machine.cores() // local_world_size))
        dynamo.optimize_ddp = run.optimize_ddp


def usable(run: RunConfig, device: torch.device) -> tuple[RunConfig, list[str]]:
    """What of a recipe's `run` this device can do, and a line for each thing that it cannot."""
    said: list[str] = []
    changes: dict[str, Any] = {}
    if device.type == "cuda" and not machine.compiles(device):
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
        for key, value, instead in (("compile", True, False), ("kernels", "fused", "torch")):
            if getattr(run, key) == value:
                changes[key] = instead
                said.append(
                    f"run.{key}={value}: {torch.cuda.get_device_name(device)} has compute capability {capability}, "
                    f"Triton needs {'.'.join(map(str, machine.TRITON))}; running without, with the same results"
                )
        if "compile" in changes:
            changes["compile_options"] = {}
    return run.model_copy(update=changes), said


def warning(run: RunConfig, device: torch.device) -> str:
    """What a user may not expect of the device that was chosen, or ""."""
    if device.type == "cpu" and run.device == "auto" and (hidden := why_hidden()):
        return f"run.device=auto: training on the CPU: {hidden}"
    return ""
