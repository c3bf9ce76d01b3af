"""What this process may use of its machine."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import signal
from pathlib import Path

import torch

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
"""What asks a run to save and stop: people, a lost terminal, warnings of schedulers. Workers leave it to the run."""

TRITON = (7, 0)
"""The oldest compute capability that Triton, and with it torch.compile, generates code for."""


def cores() -> int:
    """CPU cores that this process may run on, which a container or `taskset` can make fewer than the machine has."""
    return len(os.sched_getaffinity(0))


@functools.cache
def kernel() -> str:
    """A name for this machine since it was started; its containers share it."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
    except OSError:
        return hashlib.sha256(os.uname().nodename.encode()).hexdigest()[:8]


def memory() -> dict[str, int]:
    """Bytes by name, as /proc/meminfo lists them: `MemTotal`, `MemAvailable`, ..."""
    rows = (line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return {name: int(value.split()[0]) * 1024 for name, value in rows}


def cpu_flags() -> set[str]:
    """Names of the instruction sets of an x86 processor, such as `avx2`; none on others."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return set(line.split(":", 1)[1].split())
    return set()


def compiles(device: torch.device) -> bool:
    """Whether torch.compile can be used for a device: a GPU may be too old for Triton."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= TRITON


def missing_compiler(on_gpu: bool) -> str:
    """What torch.compile needs and this machine does not have, with what to do, or "": a C++ compiler for a CPU
    (Inductor), a C compiler for a GPU (Triton)."""
    if on_gpu:
        tried = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
        what = "C compiler; apt-get install gcc, or set CC"
    else:
        tried = [os.environ.get("CXX", "g++")]
        what = "C++ compiler; apt-get install g++, or set CXX"
    return "" if any(map(shutil.which, tried)) else f"{' and '.join(tried)}: not found, expected a {what}"
