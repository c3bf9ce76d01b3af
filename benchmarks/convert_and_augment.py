"""Two ratios on one machine, rounds in turn (A B A B): the converter against its floor, and colors on a CPU.

    python benchmarks/convert_and_augment.py data/photos      # two minutes; writes convert_and_augment.json

Conversion: tools/convert_imagenet_to_ffcv.py with every image decoded and encoded again, against decoding and encoding
the same images in as many threads and keeping nothing. Colors: `augment_batch` image by image, as on a CPU, against
the branch-free frame of GPUs, uncompiled, both on one thread.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import convert_imagenet_to_ffcv as converter
import torch
from torchvision.io import encode_jpeg

from engine.bench.clock import median_range
from engine.provenance import environment
from engine.results.runs import write_json
from loaders.augment import augment_batch
from loaders.config import Request
from loaders.index import Index
from loaders.sampler import Stream
from loaders.sources import open_index
from loaders.views import View


def seconds(action: Callable[[], Any]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def paired(one: Callable[[], Any], other: Callable[[], Any], rounds: int) -> list[float]:
    """Time of `other` divided by that of `one`, for each round."""
    return [seconds(other) / seconds(one) for _ in range(rounds)]


def conversion(source: Path, index: Index, workers: int, rounds: int) -> list[float]:
    def encode(row: int) -> None:
        encode_jpeg(index.read(row).contiguous(), quality=90)

    def floor() -> None:
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(encode, range(len(index))))

    with tempfile.TemporaryDirectory() as folder:
        options = argparse.Namespace(
            source=source, out=Path(folder) / "x.beton", mode="jpg", max_side=0, quality=90, reencode=True,
            raw_share=0.5, smart_kib=360, on_bad_image="stop", quarantine=None, max_pixels=10**8, page_mib=8,
            workers=workers, limit=None,
        )  # fmt: skip
        return paired(floor, lambda: converter.convert(options), rounds)


def colors(index: Index, preset: str, rounds: int, batch: int = 32) -> list[float]:
    view = View.model_validate({"preset": preset})
    images = torch.randint(0, 256, (batch, view.size, view.size, 3), dtype=torch.uint8)
    color = torch.from_numpy(Stream(index, [view], 0).plan(range(batch)).color[:, 0])
    mean, std = torch.zeros(3), torch.ones(3)

    def run(alone: bool) -> Callable[[], Any]:
        return lambda: augment_batch(images, color, [view], mean, std, alone=alone)

    run(True)(), run(False)()
    return paired(run(True), run(False), rounds)


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with train/ as tools/make_images.py photos writes it")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    index = open_index(arguments.data / "train", Request(10**8))
    conversion(arguments.data / "train", index, arguments.workers, 1)  # files into the page cache
    result: dict[str, Any] = {
        "conversion_time_over_floor": conversion(arguments.data / "train", index, arguments.workers, 5),
        "batched_time_over_image_by_image": {p: colors(index, p, 7) for p in ("burn", "moco_v2", "swav_small")},
        "workers": arguments.workers,
        "environment": environment(),
    }
    print("conversion, times the floor", median_range(result["conversion_time_over_floor"]))
    for preset, ratios in result["batched_time_over_image_by_image"].items():
        print(f"colors, batched over image by image: {preset}", median_range(ratios))
    write_json(result, Path(__file__).with_suffix(".json"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
