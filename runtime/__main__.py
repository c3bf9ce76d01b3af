"""Run a packed network: the five likeliest classes of pictures, what is in the file, how fast it is here.

    python -m runtime net.bnn cat.jpg dog.jpg        # pictures take Pillow; .npy is uint8 [side, side, 3], already cut
    python -m runtime net.bnn --info
    python -m runtime net.bnn --benchmark --threads 2

Exit codes: 0 done; 2 bad input, in one line.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime import Runtime, bnn
from runtime.bnn import BnnError, Network

TOP = 5
WARM_UP, CALLS = 20, 100
SECONDS = 10.0
"""After about so long a benchmark ends."""
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
"""As Pillow names them; those that networks are trained with."""
_MOST_RESIZED = 1 << 24  # pixels
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # TIFF 6.0


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, run, and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m runtime", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("network", type=Path, help="a file of tools/export.py")
    parser.add_argument("images", type=Path, nargs="*", help="pictures, or .npy files")
    parser.add_argument("--info", action="store_true", help="what the file holds, what is float and what is binary")
    parser.add_argument("--benchmark", action="store_true", help="milliseconds an image")
    parser.add_argument("--batch", type=int, default=1, help="--benchmark: images in a call (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="how many (%(default)s)")
    parser.add_argument("--kernels", help="which, such as plain or numpy (the fastest here)")
    parser.add_argument("--save", type=Path, help="also write the outputs [images, outputs] here, float32 .npy")
    given = parser.parse_args(arguments)
    for name in ("batch", "threads"):
        if getattr(given, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(given, name)}")
    if not (given.images or given.info or given.benchmark):
        parser.error("expected images, --info or --benchmark")
    try:
        network = bnn.read(given.network)
        runtime = Runtime(given.network, threads=given.threads, kernels=given.kernels)
        if given.info:
            print(info(given.network, network, runtime))
        if given.images:
            outputs = [answer(path, network, runtime) for path in given.images]
            if given.save:
                with open(given.save, "wb") as file:  # np.save would add a suffix to the name
                    np.save(file, np.stack(outputs))
        if given.benchmark:
            print(benchmark(network, runtime, given.batch, given.threads))
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except (BnnError, OSError, MemoryError) as error:
        where = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else error
        print(f"error: {where or 'out of memory'}", file=sys.stderr)
        return 2
    return 0


# ------------------------------------------------------------------------------------------------ pictures


def answer(path: Path, network: Network, runtime: Runtime) -> NDArray[np.float32]:
    """Print what the network says to one picture; its outputs [outputs]."""
    pixels = read_image(path, network)
    start = time.perf_counter()
    outputs: NDArray[np.float32] = runtime.run(pixels[None])[0]
    print(f"{path}: {1000 * (time.perf_counter() - start):.2f} ms")
    if network.feature_layers == len(network.layers):
        print(f"  {len(outputs)} features of norm {np.linalg.norm(outputs):.4g} (--save writes them)")
        return outputs
    shares = np.exp(outputs - outputs.max())
    shares /= shares.sum()
    for number in np.argsort(-outputs, kind="stable")[:TOP]:
        print(f"  {shares[number]:7.2%}  {class_name(network, int(number))}")
    return outputs


def class_name(network: Network, number: int) -> str:
    """The name of a class, or its number where the file has none; a file may hold anything."""
    names = network.metadata.get("classes")
    if not isinstance(names, list) or len(names) != network.outputs or not isinstance(names[number], str):
        return f"class {number}"
    return names[number] if names[number].isprintable() else repr(names[number])


def read_image(path: Path, network: Network) -> NDArray[np.uint8]:
    """A picture as the network's evaluations saw it, uint8 [side, side, 3].

    Raises:
        BnnError: it cannot be decoded, is of another size (.npy), or the file does not say how to cut it.
        OSError: it cannot be read.
    """
    if path.suffix == ".npy":
        return _read_array(path, network.side)
    try:
        from PIL import Image
    except ImportError:
        raise BnnError(
            f"{path}: takes Pillow, which is not installed; pip install pillow, or give a .npy of uint8 "
            f"[{network.side}, {network.side}, 3]"
        ) from None
    resize, mode = _view(path, network)
    content = path.read_bytes()
    try:
        picture = _rgb(Image, content)
    except Exception as error:  # damage makes Pillow's readers raise whatever there is
        reason = str(error).split("<_io", 1)[0].strip() or type(error).__name__
        raise BnnError(f"{path}: cannot be decoded: {reason}") from None
    if resize is None:
        return np.array(picture.resize((network.side, network.side), Image.Resampling[mode.upper()]))
    shorter = min(picture.size)
    width, height = (resize * side // shorter for side in picture.size)
    if width * height > _MOST_RESIZED:
        raise BnnError(f"{path}: {picture.width}x{picture.height} pixels are too long and thin; cut it before")
    resized = picture.resize((width, height), Image.Resampling[mode.upper()])
    left, top = round((width - network.side) / 2), round((height - network.side) / 2)
    return np.array(resized.crop((left, top, left + network.side, top + network.side)))


def _rgb(image_module: Any, content: bytes) -> Any:
    """A picture in RGB, as in training: its EXIF orientation is not applied, of more than 8 bits the upper 8 are kept,
    and a TIFF whose zero is white is inverted. What does not say what is white (floats, signed integers) is an error.
    """
    from io import BytesIO

    picture = image_module.open(BytesIO(content), formats=FORMATS)
    tags = getattr(picture, "tag_v2", {}) if picture.format == "TIFF" else {}
    is_deep = picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format in ("PNG", "PPM"))
    if is_deep:
        bits = int(tags.get(_BITS_PER_SAMPLE, (16,))[0])
        gray = (np.asarray(picture) >> (bits - 8)).astype(np.uint8)
        if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
            gray = 255 - gray
        return image_module.fromarray(np.repeat(gray[:, :, None], 3, axis=2))
    if picture.mode in ("I", "F"):
        raise ValueError("holds floats or signed integers, expected unsigned ones of 8 or 16 bits")
    return picture.convert("RGB")


def _view(path: Path, network: Network) -> tuple[int | None, str]:
    """Shorter side after resizing, None where all of the picture is resized to a square; and how it is resized."""
    metadata = network.metadata
    resize, crop, mode = (metadata.get(key) for key in ("resize", "crop", "interpolation"))
    if metadata.get("whole") is True:
        is_known = resize is None
    else:
        is_known = type(resize) is int and network.side <= resize <= 8192
    if not is_known or mode not in ("bilinear", "bicubic") or crop != network.side:
        raise BnnError(
            f"{path}: the network's file does not say how pictures are resized; give a .npy of uint8 "
            f"[{network.side}, {network.side}, 3]"
        )
    return resize, str(mode)


def _read_array(path: Path, side: int) -> NDArray[np.uint8]:
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise BnnError(f"{path}: cannot be read as an array: {error}") from None
    if not isinstance(array, np.ndarray) or array.dtype != np.uint8 or array.shape != (side, side, 3):
        found = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else "several arrays"
        raise BnnError(f"{path}: expected uint8 [{side}, {side}, 3], got {found}")
    return array


# ------------------------------------------------------------------------------------------------ file and speed


def info(path: Path, network: Network, runtime: Runtime) -> str:
    """What a file holds, layer by layer."""
    said = {key: value for key, value in network.metadata.items() if key != "classes"}
    binary = sum(blob.nbytes for layer in network.layers for name, blob in layer.blobs.items() if name == "bits")
    total = path.stat().st_size
    lines = [
        f"{path}: {total:,} bytes, {binary:,} of them binary weights; format {bnn.MAJOR}.{bnn.MINOR}",
        f"images of {network.side}x{network.side}, {network.outputs} "
        + ("features" if network.feature_layers == len(network.layers) else "classes"),
        *(f"{key}: {value}" for key, value in said.items()),
        f"kernels: {runtime.info['kernels']}",
        "",
        f"{'layer':>5}  {'operation':<10}  {'weights':<8}  {'kernel':<6}  {'stride':>6}  {'in':>5}  {'out':>5}  "
        f"{'residual':<8}  {'bytes':>10}",
    ]
    for number, layer in enumerate(network.layers):
        record = layer.record
        weights = {bnn.HALF_BLOCK: "binary", bnn.MEAN: ""}.get(record.operation, bnn.NUMBER_TYPES[record.number_type])
        lines.append(
            f"{number:>5}  {bnn.OPERATIONS[record.operation]:<10}  {weights:<8}  {record.kernel}x{record.kernel:<4}  "
            f"{record.stride:>6}  {record.channels_in:>5}  {record.channels_out:>5}  "
            f"{bnn.RESIDUALS[record.residual]:<8}  {sum(blob.nbytes for blob in layer.blobs.values()):>10,}"
        )
    lines += ["", "The stream between layers, what BatchNorm and RPReLU became, and all sums are float32."]
    return "\n".join(line.rstrip() for line in lines)


def benchmark(network: Network, runtime: Runtime, batch: int, threads: int) -> str:
    """Milliseconds an image, best and median of some calls on noise."""
    images = np.random.default_rng(0).integers(0, 256, (batch, network.side, network.side, 3), dtype=np.uint8)
    wall, cpu = _timed(lambda: runtime.run(images))
    return (
        f"{1000 * min(wall) / batch:.3f} ms an image (best of {len(wall)} calls, median "
        f"{1000 * median(wall) / batch:.3f}; CPU time {1000 * min(cpu) / batch:.3f}), batch {batch}, {threads} "
        f"thread{'s' * (threads > 1)}, {runtime.info['kernels']}"
    )


def _timed(call: Callable[[], Any]) -> tuple[list[float], list[float]]:
    """Seconds of each call after some to warm up: of the clock, and of the CPU."""
    wall: list[float] = []
    cpu: list[float] = []
    for least, most in ((1, WARM_UP), (3, CALLS)):
        wall, cpu, started = [], [], time.perf_counter()
        while len(wall) < least or (len(wall) < most and time.perf_counter() - started < SECONDS / 2):
            before, used = time.perf_counter(), time.process_time()
            call()
            wall.append(time.perf_counter() - before)
            cpu.append(time.process_time() - used)
    return wall, cpu


if __name__ == "__main__":
    sys.exit(main())
