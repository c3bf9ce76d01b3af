"""What a result depends on besides its recipe: commit, versions, machine."""

from __future__ import annotations

import contextlib
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import loaders
from engine.errors import first_line
from loaders import machine


def environment() -> dict[str, Any]:
    """What a result depends on besides its recipe."""
    here = Path(__file__).parent
    return {
        "commit": _git(here, "rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git(here, "status", "--porcelain")),
        "python": platform.python_version(),
        "versions": versions(),
        "cpu": platform.processor() or platform.machine(),
        "cores": machine.cores(),
        "gpus": [_gpu(number) for number in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        "argv": sys.argv,
    }


def _gpu(number: int) -> str:
    try:
        return torch.cuda.get_device_name(number)
    except RuntimeError as error:  # it is there, and its driver is too old for it to be used
        return first_line(error)


def engine_version() -> str:
    """Of this engine, "" where it runs without being installed."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version("burn-engine")
    return ""


def versions() -> dict[str, str]:
    """Versions of the packages that numbers and pixels depend on."""
    found = {"torch": str(torch.__version__)}
    for package in ("torchvision", "numpy", "pillow"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    for backend in loaders.backends():
        found |= loaders.load(backend).Options.versions()
    return found


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
