"""The precision of training, `run.amp`: what a machine computes in, and what it only emulates."""

from __future__ import annotations

import torch

from loaders import machine

DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
NATIVE_BF16 = (8, 0)
"""The oldest compute capability of a GPU with instructions for bf16."""


def choose(on_gpu: bool) -> str:
    """What `run.amp: auto` stands for: fp16 on a GPU, as BURN's paper; on a CPU bf16 where it has instructions for it,
    else float32."""
    if on_gpu:
        return "fp16"
    return "bf16" if {"avx512_bf16", "amx_bf16"} & machine.cpu_flags() else "off"


def warning(amp: str, device: torch.device) -> str:
    """What a run in this precision will suffer from on this device and what to do, or ""."""
    if device.type == "cuda":
        if amp != "bf16" or torch.cuda.get_device_capability(device) >= NATIVE_BF16:
            return ""
        return f"run.amp=bf16 is emulated on {torch.cuda.get_device_name(device)}; set run.amp=fp16"
    if amp in ("off", choose(on_gpu=False)):
        return ""
    return f"run.amp={amp} is emulated on this CPU, which is slower than float32; set run.amp={choose(on_gpu=False)}"
