"""Which decoder takes a JPEG in DALI's pipeline: asked of nvImageCodec's own log, in a process of its own."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from torchvision.io import write_jpeg

PATIENCE = 180
"""Seconds that the process may take: it starts CUDA and builds one pipeline."""
_ROOT = Path(__file__).resolve().parent.parent
# Lines of nvImageCodec 0.9 at level 3. The hardware decoder takes a batch as a whole, without a line for each sample.
_TOOK = re.compile(r"(?m)^(?:\x1b\[[\d;]*m)*\[INFO\] (?:\x1b\[[\d;]*m)*\[nvimgcodec\] \d+: (\w+) process #(\d+)\s*$")
_BATCH = re.compile(r"ImageGenericDecoder::decode num_samples=(\d+)")
_FAILED = re.compile(r"Sample #\d+ can't be processed|set failure #\d+|Trying next: ")
_VERSION = re.compile(r"nvJPEG version: ([\d.]+\d)")


class Probed(NamedTuple):
    """How JPEGs are decoded here."""

    decoder: str
    """`hardware`, `CUDA` (kernels of nvJPEG) or `host` (libjpeg-turbo); empty if nothing was decoded."""
    nvjpeg: str
    """The version that was loaded, empty if none was."""
    problem: str
    """Why there is no better decoder, or none, and what to do; empty if there is nothing to improve."""

    def __str__(self) -> str:
        if not self.decoder:
            return f"FAILS: {self.problem}"
        how = {"hardware": "the GPU's JPEG decoder", "CUDA": "CUDA kernels", "host": "the host"}[self.decoder]
        version = f" (nvJPEG {self.nvjpeg})" if self.nvjpeg else ""
        return f"JPEGs are decoded by {how}{version}{'; ' if self.problem else ''}{self.problem}"


def probe(device: torch.device) -> Probed:
    """Decode a small 4:2:0 JPEG through the loader's own pipeline and see which decoder took it."""
    with tempfile.TemporaryDirectory() as folder:
        write_probe(Path(folder) / "class")
        device_id = str(device.index or 0) if device.type == "cuda" else "cpu"
        paths = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
        environment = {"DALI_NVIMGCODEC_LOG_LEVEL": "3", "PYTHONPATH": paths, "XDG_CACHE_HOME": folder}
        command = [sys.executable, "-m", "loaders.dali_probe", folder, device_id]
        try:
            done = subprocess.run(
                command, env={**os.environ, **environment}, capture_output=True, text=True, errors="replace",
                timeout=PATIENCE,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return Probed("", "", f"DALI decodes no JPEG within {PATIENCE} s on {device}")
    return read(done.stderr, device) if done.returncode == 0 else Probed("", "", _reason(done))


def write_probe(folder: Path) -> None:
    """Write two small 4:2:0 JPEGs into a new folder."""
    folder.mkdir()
    ramp = torch.arange(64 * 48 * 3, dtype=torch.int64).view(3, 48, 64)
    for number in range(2):
        write_jpeg((ramp * (number + 3) % 251).to(torch.uint8), str(folder / f"{number}.jpg"))


def read(log: str, device: torch.device) -> Probed:
    """What a log says of the only batch in it."""
    decoder = decoder_of(log)
    version = _VERSION.search(log)
    nvjpeg = version[1] if version and device.type == "cuda" else ""
    problem = "" if decoder else "DALI's log does not say what decoded the image"
    if device.type == "cuda" and decoder == "host":
        refused = re.search(r"ROI decode with fancy upsampling[^\n]*|Failed to load nvJPEG library[^\n]*", log)
        problem = refused[0] if refused else "nvJPEG refused it"
    elif device.type == "cuda" and decoder == "CUDA":
        problem = why_no_hardware(log)
    return Probed(decoder, nvjpeg, problem)


def decoder_of(log: str) -> str:
    """`hardware`, `CUDA` or `host`, the slowest of those that decoded the only batch of a log; "" if none did."""
    batch = _BATCH.search(log)
    if not batch:
        return ""
    took = {sample: decoder for decoder, sample in _TOOK.findall(log)}  # the last one that tried
    kinds = {"CUDA" if name.startswith("nvjpeg_") else "host" for name in took.values()}
    for kind in ("host", "CUDA"):
        if kind in kinds:
            return kind
    is_untold = int(batch[1]) > len(took) and not _FAILED.search(log)
    return "hardware" if is_untold and "create nvjpeg_hw_decoder " in log else ""


def why_no_hardware(log: str) -> str:
    """Why CUDA kernels decode and not the GPU's JPEG decoder."""
    try:
        ctypes.CDLL("libnvcuvid.so.1")
    except OSError:
        return (
            "not by its JPEG decoder, whose libnvcuvid.so.1 cannot be loaded: start the container with "
            "NVIDIA_DRIVER_CAPABILITIES=compute,utility,video"
        )
    if "HW decoder not supported by this platform" in log:
        return "this GPU has no JPEG decoder that nvJPEG can use"
    return "its JPEG decoder did not take it"


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("\x1b")]
    said = next((line for line in lines if "Error" in line or "failed" in line), lines[-1] if lines else "no word")
    return f"{said.strip()[:200]} (exit code {done.returncode})"


def main(folder: str, device_id: str) -> None:
    """Take one batch from the loader's pipeline."""
    from loaders import dali_loader, sources
    from loaders.config import Request
    from loaders.contract import Order
    from loaders.sampler import Stream
    from loaders.views import View

    device = torch.device("cpu" if device_id == "cpu" else f"cuda:{device_id}")
    index = sources.open_index(Path(folder), Request(10**6))
    stream = Stream(index, (View(size=32, crop="random"),), 0)
    order = Order(stream, iter([[0, 1]]), replace=False, workers=1, device=device)
    batch = next(dali_loader.Options(prefetch=1).batches(order))
    assert not batch.bad and batch.crops[0].device.type == device.type, batch.bad


if __name__ == "__main__":
    main(*sys.argv[1:])
