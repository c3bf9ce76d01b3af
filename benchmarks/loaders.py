"""Our back ends beside the authors' way (torchvision on PIL) and torchvision v2 on tensors, for four jobs.

    python tools/make_images.py photos data/photos --limit 1200
    python benchmarks/loaders.py data/photos          # about 12 minutes on two cores; a quiet machine

Writes benchmarks/loaders.json, loaders.md and loaders.png. Everything returns uint8 crops of one batch; the
authors' way augments colors in the loader, as theirs does, ours on the training device or after the loader.
"""

import argparse
import io
import os
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import transforms as v1
from torchvision.io import ImageReadMode, decode_image, read_file
from torchvision.transforms import v2

from engine.bench.clock import Candidate, interleave, median_range
from engine.bench.loader import crops_of, decode_floor
from engine.provenance import environment
from engine.results.figures import pyplot
from engine.results.runs import write_json
from loaders import Index, core
from loaders.config import Request
from loaders.sources import open_index
from loaders.views import View

BATCH, SEED = 64, 0
JOBS = {
    "supervised": [{"preset": "crop_flip"}],
    "burn": [{"preset": "burn"}] * 2,
    "swav": [{"preset": "swav_large"}] * 2 + [{"preset": "swav_small"}] * 6,
    "validation": [{"preset": "validation"}],
}
TITLES = {
    "supervised": "supervised, RRC 224 + flip",
    "burn": "BURN, two views",
    "swav": "SwAV, 2x224 + 6x96",
    "validation": "validation, 256/224",
}
ASKED = {  # best CPU back end, torch back end, DALI on the CPU
    "supervised": {"turbo": 2.4, "folder": 1.35, "dali": 1.4},
    "burn": {"turbo": 5.5, "folder": 2.6, "dali": 1.8},
    "swav": {"turbo": 9.5, "folder": 3.8, "dali": 3.2},
    "validation": {"turbo": 2.5, "folder": 1.6, "dali": 1.45},
}


class PilBlur:
    """Pillow's GaussianBlur with a drawn radius, as the authors apply it."""

    def __init__(self, view: View) -> None:
        self.view = view

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(random.uniform(*self.view.blur_sigma)))


def pil_transform(view: View) -> Callable[[Image.Image], torch.Tensor]:
    """The authors' chain for one view: torchvision v1 on a PIL image, uint8 out."""
    mode = v1.InterpolationMode(view.interpolation)
    if view.crop == "center":
        return v1.Compose([v1.Resize(view.resize, mode), v1.CenterCrop(view.size), v1.PILToTensor()])
    chain: list[Any] = [
        v1.RandomResizedCrop(view.size, view.scale, view.ratio, mode),
        v1.RandomHorizontalFlip(view.flip),
    ]
    if view.jitter:
        jitter = v1.ColorJitter(view.brightness, view.contrast, view.saturation, view.hue)
        chain += [v1.RandomApply([jitter], view.jitter), v1.RandomGrayscale(view.gray)]
        chain += [v1.RandomApply([PilBlur(view)], view.blur)]
    return v1.Compose([*chain, v1.PILToTensor()])


def tensor_transform(view: View) -> Callable[[torch.Tensor], torch.Tensor]:
    """The geometry of one view with torchvision v2 on a uint8 tensor."""
    mode = v2.InterpolationMode(view.interpolation)
    if view.crop == "center":
        return v2.Compose([v2.Resize(view.resize, mode, antialias=True), v2.CenterCrop(view.size)])
    crop = v2.RandomResizedCrop(view.size, view.scale, view.ratio, mode, antialias=True)
    return v2.Compose([crop, v2.RandomHorizontalFlip(view.flip)])


class Files(Dataset[Any]):
    """Each image's views; decoded once for all of them by `decode`."""

    def __init__(self, index: Index, decode: Callable[[bytes], Any], transforms: list[Any]) -> None:
        self.paths = [index.location(row)[0] for row in range(len(index))]
        self.label, self.decode, self.transforms = index.label, decode, transforms

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> Any:
        image = self.decode(self.paths[row])
        return [transform(image) for transform in self.transforms], int(self.label[row])


def decode_pil(path: bytes) -> Image.Image:
    with open(path, "rb") as file:
        return Image.open(io.BytesIO(file.read())).convert("RGB")


def decode_tensor(path: bytes) -> torch.Tensor:
    return decode_image(read_file(os.fsdecode(path)), mode=ImageReadMode.RGB)


def peer(name: str, dataset: Dataset[Any], workers: int) -> Candidate:
    """A plain DataLoader that does not end, so that no start of workers is timed."""

    def batches() -> Iterator[Any]:
        endless = RandomSampler(dataset, replacement=True, num_samples=10**6)  # type: ignore[arg-type]
        return iter(DataLoader(dataset, BATCH, sampler=endless, num_workers=workers, prefetch_factor=2))

    return Candidate(name, batches)


def candidates_of(job: str, index: Index, betons: dict[str, Index], workers: int) -> list[Candidate]:
    views = tuple(View.model_validate(view) for view in JOBS[job])
    pil, tensor = [pil_transform(v) for v in views], [tensor_transform(v) for v in views]
    candidates = [
        peer("torchvision v1 on PIL", Files(index, decode_pil, pil), workers),
        peer("torchvision v2 on tensors", Files(index, decode_tensor, tensor), workers),
        decode_floor(index, BATCH, workers, SEED),
    ]
    candidates += [crops_of(name, index, views, BATCH, workers, SEED) for name in ("turbo", "folder", "dali")]
    for mode, beton in betons.items():
        candidates.append(Candidate(f"ffcv, {mode}", crops_of("ffcv", beton, views, BATCH, workers, SEED).open))
    return candidates


def convert(source: Path, folder: Path) -> dict[str, Path]:
    """The `.beton` files that are measured."""
    import subprocess

    made = {}
    for mode, options in {
        "jpg": ["--mode", "jpg", "--max-side", "0"],
        "raw 400": ["--mode", "raw", "--max-side", "400"],
    }.items():
        path = folder / f"{mode.replace(' ', '')}.beton"
        tool = Path(__file__).resolve().parent.parent / "tools" / "convert_imagenet_to_ffcv.py"
        subprocess.run(
            [sys.executable, str(tool), str(source), str(path), *options], check=True, stderr=subprocess.DEVNULL
        )
        made[mode] = path
    return made


def markdown(result: dict[str, Any]) -> str:
    lines = [
        "# Loaders", "",
        "`python tools/make_images.py photos data/photos --limit 1200 && python benchmarks/loaders.py data/photos`", "",
        f"{result['images']} JPEG files of {result['kib']:.0f} KiB on average, in the page cache; {result['workers']} "
        f"threads or workers each, batches of {BATCH}, {result['rounds']} rounds of {result['batches']} batches. "
        "Ratios of images per second to the authors' way in the same round: median (min to max); CPU ratios are of CPU "
        "time per image and suffer less from other load. The decode floor reads and decodes every pixel with "
        "libjpeg-turbo on the same cores and does nothing else. Returning uint8 crops; the authors' way augments "
        "colors in the loader.", "",
        "![ratios](loaders.png)",
    ]  # fmt: skip
    for job, found in result["jobs"].items():
        head = "| loader | images/s ratio | CPU ratio | CPU ms per image | first batch, s | asked |"
        lines += ["", f"## {TITLES[job]}", "", head, "|---|---|---|---|---|---|"]
        for name, speed in found.items():
            asked = ASKED[job].get(name, "")
            lines.append(
                f"| {name} | {median_range(speed['ratio'])} | {median_range(speed['cpu_ratio'])} | "
                f"{median(speed['cpu_ms']):.2f} | {median(speed['first_batch']):.2f} | {asked} |"
            )
    lines += ["", f"Disk: JPEG files {result['kib']:.0f} KiB per image"
              + "".join(f", .beton {mode} {kib:.0f}" for mode, kib in result["beton_kib"].items()) + "."]  # fmt: skip
    return "\n".join(lines) + "\n"


def draw(result: dict[str, Any], path: Path) -> None:
    plt = pyplot()
    figure, axes = plt.subplots(1, len(result["jobs"]), figsize=(4.2 * len(result["jobs"]), 4.2), layout="constrained")
    for axis, (job, found) in zip(np.atleast_1d(axes), result["jobs"].items(), strict=True):
        names = list(found)[::-1]
        ratios = [found[name]["ratio"] for name in names]
        middle = [median(r) for r in ratios]
        error = [[median(r) - min(r) for r in ratios], [max(r) - median(r) for r in ratios]]
        colors = ["tab:gray" if n in ("floor",) or "torchvision" in n else "tab:blue" for n in names]
        axis.barh(["decode floor" if n == "floor" else n for n in names], middle, xerr=error, color=colors)
        axis.set_title(TITLES[job], fontsize=10)
        axis.set_xlabel("images/s over torchvision on PIL")
    figure.savefig(path, dpi=110)


def main() -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with train/ as tools/make_images.py photos writes it")
    parser.add_argument("--jobs", nargs="+", choices=list(JOBS), default=list(JOBS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=14)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", nargs="+", help="only these candidates, beside the authors' way")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    index = open_index(arguments.data / "train", Request(10**8))
    size = np.mean([os.path.getsize(index.location(row)[0]) for row in range(len(index))]) / 1024
    result: dict[str, Any] = {
        "images": len(index), "kib": float(size), "workers": arguments.workers, "rounds": arguments.rounds,
        "batches": arguments.batches, "batch": BATCH, "libjpeg_turbo": core.libjpeg_version(), "jobs": {},
        "environment": environment(),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        paths = convert(arguments.data / "train", Path(folder))
        betons = {mode: open_index(path, Request(10**8)) for mode, path in paths.items()}
        result["beton_kib"] = {
            mode: float(beton.pieces.length.mean() / 1024) for mode, beton in betons.items() if beton.pieces
        }
        for job in arguments.jobs:
            candidates = candidates_of(job, index, betons, arguments.workers)
            if arguments.only:
                candidates = [c for c in candidates if c.name in arguments.only or c is candidates[0]]
            speeds = interleave(candidates, batch=BATCH, batches=arguments.batches, rounds=arguments.rounds)
            base = speeds[candidates[0].name]
            result["jobs"][job] = {
                name: {
                    **asdict(speed),
                    "ratio": [a / b for a, b in zip(speed.images_per_second, base.images_per_second, strict=True)],
                    "cpu_ratio": [b / a for a, b in zip(speed.cpu_ms, base.cpu_ms, strict=True)],
                }
                for name, speed in speeds.items()
            }
            for name, speed in result["jobs"][job].items():
                ratios = f"{median_range(speed['ratio'])}  cpu {median_range(speed['cpu_ratio'])}"
                print(f"{job:12} {name:26} {ratios}  {median(speed['cpu_ms']):.2f} ms", flush=True)
    write_json(result, arguments.out / "loaders.json")
    (arguments.out / "loaders.md").write_text(markdown(result), encoding="utf-8")
    draw(result, arguments.out / "loaders.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
