"""Write a small public data set as ImageFolder trees of JPEG files, <out>/train/<class> and <out>/val/<class>.

    python tools/make_images.py digits data/digits
    python tools/make_images.py fashion_mnist data/fashion_mnist
    python tools/make_images.py photos data/photos --limit 2000

`digits` is scikit-learn's (1,797 images of 8x8, in its wheel, no network). `fashion_mnist` is read from Debian's
package dataset-fashion-mnist, or from a folder with its four idx files (--source). `photos` is for measuring loaders:
pictures of ImageNet's sizes, detail and JPEG variants (about 480x400 pixels, 100 KB), mixed by a seeded generator
from the two photographs in scikit-learn's wheel and noise; their classes mean nothing.
"""

import argparse
import gzip
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _root  # noqa: F401
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile
from tqdm import tqdm

from loaders.files import aside

DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")
FASHION_CLASSES = "tshirt trouser pullover dress coat sandal shirt sneaker bag boot".split()
Split = tuple[str, NDArray[np.uint8], NDArray[np.int64], list[str]]


def digits() -> Iterator[Split]:
    """Every fifth image of each class goes to validation; pixels of 0..16 become 0..255, 8x8 becomes 32x32."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = np.round(data.images * (255 / 16)).astype(np.uint8)
    images = np.stack([np.array(Image.fromarray(i).resize((32, 32), Image.Resampling.BICUBIC)) for i in images])
    place = np.zeros(len(images), dtype=np.int64)
    for label in range(10):
        rows = np.flatnonzero(data.target == label)
        place[rows] = np.arange(len(rows))
    for name, rows in (("train", place % 5 != 4), ("val", place % 5 == 4)):
        yield name, images[rows], data.target[rows], [f"digit{label}" for label in range(10)]


def fashion_mnist(source: Path) -> Iterator[Split]:
    """60,000 training and 10,000 test images of 28x28."""
    for name, prefix in (("train", "train"), ("val", "t10k")):
        images = _idx(source / f"{prefix}-images-idx3-ubyte.gz", header=16).reshape(-1, 28, 28)
        labels = _idx(source / f"{prefix}-labels-idx1-ubyte.gz", header=8).astype(np.int64)
        yield name, images, labels, FASHION_CLASSES


def _idx(path: Path, header: int) -> NDArray[np.uint8]:
    if not path.is_file():
        raise SystemExit(
            f"error: {path}: no such file; run `apt-get install dataset-fashion-mnist`, or give the folder of the "
            "idx files with --source"
        )
    return np.frombuffer(gzip.decompress(path.read_bytes()), dtype=np.uint8, offset=header)


def write(splits: Iterator[Split], out: Path, limit: int | None) -> None:
    """A tree that exists is complete."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with aside(out) as tree:
        for split, images, labels, names in splits:
            for name in names:
                (tree.part / split / name).mkdir(parents=True)
            rows = range(len(images) if limit is None else min(limit, len(images)))
            for row in tqdm(rows, desc=f"{out.name}/{split}", unit=" images", disable=not sys.stderr.isatty()):
                path = tree.part / split / names[labels[row]] / f"{row:05d}.jpg"
                Image.fromarray(images[row]).save(path, quality=95)


def photo(number: int, sources: list[NDArray[np.uint8]]) -> tuple[Image.Image, dict[str, Any]]:
    """Picture `number` and the options to save it with; the same for the same versions of numpy and Pillow."""
    rng = np.random.default_rng((20240, number))
    kinds = [(500, 375), (375, 500), (500, 333), (int(rng.integers(200, 640)), int(rng.integers(200, 640)))]
    width, height = kinds[rng.choice(4, p=[0.6, 0.12, 0.13, 0.15])]

    def cut() -> NDArray[np.float64]:
        source = sources[rng.integers(len(sources))]
        zoom = rng.uniform(0.35, 0.95)
        h, w = int(source.shape[0] * zoom), int(source.shape[1] * zoom)
        top, left = rng.integers(source.shape[0] - h + 1), rng.integers(source.shape[1] - w + 1)
        part = Image.fromarray(source[top : top + h, left : left + w]).resize((width, height), Image.Resampling.LANCZOS)
        turned = np.array(part, dtype=float)[:: rng.choice([1, -1]), :: rng.choice([1, -1])]
        return turned[:, :, rng.permutation(3)] * rng.uniform(0.7, 1.2, 3) + rng.uniform(-25, 25, 3)

    def clouds(octaves: int) -> NDArray[np.float64]:  # 1/f noise
        total = np.zeros((height, width))
        for octave in range(octaves):
            coarse = rng.normal(size=(2 ** (octave + 1) + 1,) * 2).astype(np.float32)
            total += np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)) / 2**octave
        return total

    mask = (1 / (1 + np.exp(-4 * clouds(4))))[:, :, None]
    pixels = mask * cut() + (1 - mask) * cut() + rng.uniform(4, 14) * clouds(8)[:, :, None]
    pixels += rng.normal(0, rng.uniform(4, 12), pixels.shape)  # the sensor's
    picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    if rng.random() < 0.01:
        picture = picture.convert("L")
    subsampling = int(rng.choice([2, 1, 0], p=[0.78, 0.07, 0.15]))  # 4:2:0, 4:2:2, 4:4:4
    quality, progressive = int(rng.integers(88, 97)), bool(rng.random() < 0.02)
    return picture, {"quality": quality, "subsampling": subsampling, "progressive": progressive}


def write_photos(out: Path, count: int) -> None:
    """`count` pictures for training and a tenth as many for validation, in ten classes."""
    from sklearn.datasets import load_sample_images

    ImageFile.MAXBLOCK = 1 << 22  # Pillow writes a progressive file in one piece
    sources = list(load_sample_images().images)
    out.parent.mkdir(parents=True, exist_ok=True)
    with aside(out) as tree:
        for split, first, many in (("train", 0, count), ("val", 1_000_000, max(10, count // 10))):
            for number in tqdm(range(many), desc=f"{out.name}/{split}", unit=" images", disable=None):
                picture, options = photo(first + number, sources)
                path = tree.part / split / f"class{number % 10}" / f"{number:06d}.JPEG"
                path.parent.mkdir(parents=True, exist_ok=True)
                picture.save(path, "JPEG", **options)


def main() -> int:
    """Parse the command line and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=["digits", "fashion_mnist", "photos"])
    parser.add_argument("out", type=Path, help="folder to make; nothing is done if it is there already")
    parser.add_argument("--source", type=Path, default=DEBIAN_FASHION, help="folder of Fashion-MNIST's idx files")
    parser.add_argument("--limit", type=int, help="at most this many images of each split")
    arguments = parser.parse_args()
    make(arguments.dataset, arguments.out, source=arguments.source, limit=arguments.limit)
    return 0


def make(dataset: str, out: Path, *, source: Path = DEBIAN_FASHION, limit: int | None = None) -> None:
    """Write a data set, unless it is there already."""
    if out.exists():
        print(f"{out} is there already")
    elif dataset == "photos":
        write_photos(out, limit or 2000)
    else:
        write(digits() if dataset == "digits" else fashion_mnist(source), out, limit)


if __name__ == "__main__":
    sys.exit(main())
