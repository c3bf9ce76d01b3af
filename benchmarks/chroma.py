"""What JPEG decoding without "fancy" upsampling of colors would cost in pixels, against libjpeg-turbo's way of it.

    python benchmarks/chroma.py                       # three photographs that scikit-learn and matplotlib bring
    python benchmarks/chroma.py --images FOLDER       # the 4:2:0 JPEGs of a folder

A GPU's decoder may upsample subsampled colors by repeating them; nvImageCodec's host decoder can do the same, so the
difference is measured without a GPU. Photographs are recompressed as 4:2:0 where they are not. Writes
benchmarks/chroma.json: absolute differences in levels of 255, of whole images and of random resized crops.
"""

import argparse
import io
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import matplotlib
import numpy as np
import sklearn
from nvidia import nvimgcodec
from PIL import Image
from torch import from_numpy

from engine.provenance import environment
from engine.results.runs import write_json
from loaders.host import cut
from loaders.views import View

SIZES = (224, 96)
CROPS = 16  # of each image and size


def photographs() -> list[Path]:
    """Real ones that every developer has."""
    samples = Path(sklearn.__file__).parent / "datasets/images"
    sample_data = Path(matplotlib.get_data_path()) / "sample_data"
    return [samples / "china.jpg", samples / "flower.jpg", sample_data / "grace_hopper.jpg"]


def subsampled(path: Path) -> bytes:
    """The file if its colors have half the resolution, else recompressed so, at quality 90."""
    image = Image.open(path)
    if getattr(image, "layer", None) and image.layer[0][1:3] == (2, 2):
        return path.read_bytes()
    out = io.BytesIO()
    image.convert("RGB").save(out, "JPEG", quality=90, subsampling=2)
    return out.getvalue()


def decoder(fancy: bool) -> Any:
    """nvImageCodec's host decoder."""
    host = nvimgcodec.Backend(nvimgcodec.BackendKind.CPU_ONLY)
    no_device = -99999  # NVIMGCODEC_DEVICE_CPU_ONLY
    options = f"libjpeg_turbo_decoder:fancy_upsampling={fancy:d}"
    return nvimgcodec.Decoder(device_id=no_device, max_num_cpu_threads=1, backends=[host], options=options)


def _on_host(image: Any) -> Any:
    return image.cpu() if hasattr(image, "cpu") else image


def summary(differences: list[np.ndarray]) -> dict[str, float]:
    """Mean, 99th percentile and maximum."""
    together = np.concatenate([d.ravel() for d in differences])
    return {"mean": float(together.mean()), "p99": float(np.quantile(together, 0.99)), "max": float(together.max())}


def main() -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="a folder of JPEGs")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/chroma.json")
    arguments = parser.parse_args()
    paths = sorted(arguments.images.rglob("*.jp*g")) if arguments.images else photographs()
    fancy, plain = decoder(True), decoder(False)
    rng = np.random.default_rng(0)
    found: dict[str, list[np.ndarray]] = {"whole": [], **{f"crop {size}": [] for size in SIZES}}
    for path in paths:
        content = subsampled(path)
        pixels = [np.asarray(_on_host(d.decode(content))).copy() for d in (fancy, plain)]
        wanted = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
        assert np.array_equal(pixels[0], wanted), f"{path}: fancy upsampling is not that of libjpeg-turbo"
        found["whole"].append(np.abs(pixels[0].astype(np.int16) - pixels[1]))
        planes = [from_numpy(p).permute(2, 0, 1) for p in pixels]
        height, width = wanted.shape[:2]
        for size in SIZES:
            view = View(size=size, crop="random")
            for _ in range(CROPS):
                side = np.sqrt(rng.uniform(*view.scale)) * np.array([height, width])
                top_left = rng.uniform(0, 1, 2) * (np.array([height, width]) - side)
                window = np.floor(np.concatenate((top_left, np.maximum(side, 1))))
                one, other = (cut(p, window, view).numpy().astype(np.int16) for p in planes)
                found[f"crop {size}"].append(np.abs(one - other))
    result = {
        "images": len(paths),
        "source": "a folder" if arguments.images else "scikit-learn's china and flower, matplotlib's grace_hopper",
        "levels_of_255": {name: summary(differences) for name, differences in found.items()},
        "environment": environment(),
    }
    write_json(result, arguments.out)
    print(json.dumps(result["levels_of_255"], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
