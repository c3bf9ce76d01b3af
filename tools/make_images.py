"""Write a public data set as ImageFolder trees, <out>/train/<class> and <out>/val/<class>, complete or not at all.
Scenes are written as PASCAL VOC's development kit lays them out, for detection and for several labels an image.

    python tools/make_images.py digits data/digits
    python tools/make_images.py fashion_mnist data/fashion_mnist
    python tools/make_images.py imagenette data/imagenette --source imagenette2-160.tgz
    python tools/make_images.py cifar10 data/cifar10 --source cifar-10-binary.tar.gz
    python tools/make_images.py cifar100 data/cifar100 --source cifar-100-binary.tar.gz
    python tools/make_images.py photos data/photos --limit 2000
    python tools/make_images.py digit_scenes data/digit_scenes

`digits` is scikit-learn's (1,797 images of 8x8, in its wheel, no network). `fashion_mnist` is read from Debian's
package dataset-fashion-mnist, or from a folder with its four idx files. `imagenette` reads fast.ai's imagenette2.tgz,
imagenette2-320.tgz or imagenette2-160.tgz (9,469 + 3,925 photographs) and makes the shorter side 128 pixels, JPEG of
quality 90. `cifar10` reads cifar-10-binary.tar.gz or cifar-10-python.tar.gz, `cifar100` cifar-100-binary.tar.gz alone
(50,000 + 10,000 images each); both write JPEG of quality 95 with full color resolution, which every loader reads; --png
keeps the exact pixels, for the loaders `folder` and `dali`. `photos` is for measuring loaders: pictures of ImageNet's
sizes, detail and JPEG variants (about 480x400 pixels, 100 KB), mixed by a seeded generator from the two photographs in
scikit-learn's wheel and noise; their classes mean nothing. `digit_scenes` are 600 + 150 pictures of one to four of
scikit-learn's digits on clouds, by a seeded generator, with boxes: <out>#2007_trainval has the digits of `digits`'
training images, <out>#2007_test the others.
"""

import argparse
import gzip
import io
import os
import pickle
import re
import sys
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import _root  # noqa: F401
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile
from tqdm import tqdm

from engine.errors import first_line, guarded
from loaders import DataError
from loaders.files import aside, check_writable

DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")
FASHION_CLASSES = "tshirt trouser pullover dress coat sandal shirt sneaker bag boot".split()
CIFAR_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()
CIFAR_FILES = [("train", f"data_batch_{number}") for number in range(1, 6)] + [("val", "test_batch")]
CIFAR_MOST = 40_000_000
"""Bytes of a file of CIFAR-10; the true ones have 31 million."""
CIFAR100_FILES = {"train.bin": "train", "test.bin": "val"}
CIFAR100_NAMES = "fine_label_names.txt"
CLASSES = 10
"""Of every set here but CIFAR-100, which has 100."""
SHORTER_SIDE = 128
KIT_YEAR = "VOC2007"
"""Folder of the scenes, so that nothing in their reader is special."""
IMAGENETTE_URL = "https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-160.tgz"
CIFAR_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR100_URL = "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz"
USUAL: dict[str, Any] = {"format": "JPEG", "quality": 95}


class Picture(NamedTuple):
    """One image of a data set."""

    split: str
    label: str
    """The class's name."""
    image: Image.Image
    options: dict[str, Any]
    """How to save it."""


# ------------------------------------------------------------------------------------------------ small sets


def digits() -> Iterator[Picture]:
    """Every fifth image of each class goes to validation; pixels of 0..16 become 0..255, 8x8 becomes 32x32."""
    data = _sklearn_datasets().load_digits()
    seen: Counter[int] = Counter()
    for pixels, label in zip(data.images, data.target.tolist(), strict=True):
        image = Image.fromarray(np.round(pixels * (255 / 16)).astype(np.uint8))
        split = "val" if seen[label] % 5 == 4 else "train"
        seen[label] += 1
        yield Picture(split, f"digit{label}", image.resize((32, 32), Image.Resampling.BICUBIC), USUAL)


def _sklearn_datasets() -> Any:
    try:
        from sklearn import datasets
    except ImportError as error:
        raise DataError(
            f"scikit-learn, which holds these images, is missing ({error}): pip install scikit-learn"
        ) from None
    return datasets


def fashion_mnist(source: Path) -> Iterator[Picture]:
    """60,000 training and 10,000 test images of 28x28."""
    for split, prefix in (("train", "train"), ("val", "t10k")):
        images = _idx(source / f"{prefix}-images-idx3-ubyte.gz", header=16).reshape(-1, 28, 28)
        labels = _idx(source / f"{prefix}-labels-idx1-ubyte.gz", header=8)
        for pixels, label in zip(images, labels.tolist(), strict=True):
            yield Picture(split, FASHION_CLASSES[label], Image.fromarray(pixels), USUAL)


def _idx(path: Path, header: int) -> NDArray[np.uint8]:
    if not path.is_file():
        raise DataError(
            f"{path}: no such file; run `apt-get install dataset-fashion-mnist`, or give the folder of the idx files "
            "with --source"
        )
    try:
        return np.frombuffer(gzip.decompress(path.read_bytes()), dtype=np.uint8, offset=header)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(f"{path}: not a whole idx file packed with gzip ({first_line(error)})") from None


# ------------------------------------------------------------------------------------------------ archives


def imagenette(source: Path) -> Iterator[Picture]:
    """The photographs of an archive of fast.ai, the shorter side at most 128 pixels."""
    place = re.compile(r"[^/]+/(train|val)/(n\d{8})/[^/]+\.JPEG")
    seen = set()
    for name, read in members(source, IMAGENETTE_URL):
        found = place.fullmatch(name)
        if found is None:
            continue
        try:
            opened = Image.open(io.BytesIO(read()))
            image = opened.convert("L" if opened.mode == "L" else "RGB")
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(f"{source}: {name}: not a readable image ({first_line(error)})") from None
        scale = SHORTER_SIDE / min(image.size)
        if scale < 1:
            width, height = (round(side * scale) for side in image.size)
            image = image.resize((width, height), Image.Resampling.LANCZOS)
        seen.add(found.groups())
        yield Picture(found[1], found[2], image, {"format": "JPEG", "quality": 90})
    lacks = [split for split in ("train", "val") if sum(s == split for s, _ in seen) != CLASSES]
    if lacks:
        raise DataError(
            f"{source}: expected {CLASSES} folders such as imagenette2-160/{lacks[0]}/n01440764 with .JPEG files, "
            f"found {sum(s == lacks[0] for s, _ in seen)}; get {IMAGENETTE_URL}"
        )


def cifar10(source: Path, png: bool) -> Iterator[Picture]:
    """The images of an official archive, binary or pickled."""
    options = _exact(png)
    splits = {name: split for split, name in CIFAR_FILES}
    seen = set()
    for name, read in members(source, CIFAR_URL):
        last = name.rsplit("/", 1)[-1]
        stem = last.removesuffix(".bin")
        if stem not in splits:
            continue
        content = read(CIFAR_MOST)
        try:
            labels, images = _records(content) if last.endswith(".bin") else _pickled(content)
        except Exception as error:  # a pickle can raise anything
            raise DataError(f"{source}: {name}: not a file of CIFAR-10 ({first_line(error)})") from None
        seen.add(stem)
        for label, pixels in zip(labels, images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), strict=True):
            yield Picture(splits[stem], CIFAR_CLASSES[label], Image.fromarray(pixels), options)
    if lacks := [name for name in splits if name not in seen]:
        raise DataError(f"{source}: no {', '.join(lacks)} in it, expected an archive of CIFAR-10; get {CIFAR_URL}")


def cifar100(source: Path, png: bool) -> Iterator[Picture]:
    """The images of the official binary archive, by their fine labels."""
    names: list[str] = []
    files = []
    for name, read in members(source, CIFAR100_URL):
        files.append(name.rsplit("/", 1)[-1])
        if files[-1] == CIFAR100_NAMES:
            names = read(CIFAR_MOST).decode("ascii", "replace").split()
    if lacks := [name for name in (*CIFAR100_FILES, CIFAR100_NAMES) if name not in files]:
        raise DataError(
            f"{source}: is CIFAR-100 as pickles, which can run code when they are read; expected the binary version; "
            f"get {CIFAR100_URL}"
            if "train" in files
            else f"{source}: no {', '.join(lacks)} in it, expected the binary archive of CIFAR-100; get {CIFAR100_URL}"
        )
    if len(set(names)) != 100 or not all(re.fullmatch(r"\w+", name) for name in names):
        raise DataError(f"{source}: {CIFAR100_NAMES}: expected the names of 100 classes, got {len(set(names))}")
    for name, read in members(source, CIFAR100_URL):
        last = name.rsplit("/", 1)[-1]
        if last not in CIFAR100_FILES:
            continue
        try:
            labels, images = _records(read(5 * CIFAR_MOST), labels=2, classes=100)
        except ValueError as error:
            raise DataError(f"{source}: {name}: not a file of CIFAR-100 ({first_line(error)})") from None
        for label, pixels in zip(labels, images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), strict=True):
            yield Picture(CIFAR100_FILES[last], names[label], Image.fromarray(pixels), _exact(png))


def _exact(png: bool) -> dict[str, Any]:
    return {"format": "PNG"} if png else {**USUAL, "subsampling": 0}


def _records(content: bytes, labels: int = 1, classes: int = CLASSES) -> tuple[list[int], NDArray[np.uint8]]:
    """Some bytes of labels, of which the last counts, and 3,072 of pixels for each image."""
    records, length = np.frombuffer(content, dtype=np.uint8), labels + 3072
    if not len(records) or len(records) % length:
        raise ValueError(f"{len(records)} bytes, expected a multiple of {length}")
    records = records.reshape(-1, length)
    return _checked(records[:, labels - 1].tolist(), records[:, labels:], classes)


def _pickled(content: bytes) -> tuple[list[int], NDArray[np.uint8]]:
    batch = _Arrays(io.BytesIO(content), encoding="bytes").load()
    return _checked(batch[b"labels"], batch[b"data"], CLASSES)


def _checked(labels: list[int], images: NDArray[np.uint8], classes: int) -> tuple[list[int], NDArray[np.uint8]]:
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.shape != (len(labels), 3072):
        raise ValueError("expected uint8 pixels [N, 3072] and N labels")
    if not all(isinstance(label, int) and 0 <= label < classes for label in labels):
        raise ValueError(f"expected labels from 0 to {classes - 1}")
    return labels, images


class _Arrays(pickle.Unpickler):
    """Reads dictionaries, lists, bytes and arrays; a pickle that names anything else to call is refused."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {
            ("multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
            ("_codecs", "encode"): _latin1,  # bytes, as Python 3 writes them for Python 2
        }
        try:
            return allowed[module.removeprefix("numpy.core.").removeprefix("numpy._core."), name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no array needs") from None


def _latin1(text: str, encoding: str) -> bytes:
    return text.encode("latin-1")


def members(source: Path, url: str) -> Iterator[tuple[str, Callable[..., bytes]]]:
    """Name and content (a function that takes the most bytes) of the files of a tar archive, which is never unpacked.

    Raises:
        DataError: it is not there, of another kind, cut short, or names a path outside of its own folder.
    """
    if not source.is_file():
        raise DataError(f"{source}: no such file; get {url} and give it with --source")
    try:
        with tarfile.open(source) as archive:
            for member in archive:
                parts = member.name.split("/")
                if member.name.startswith("/") or ".." in parts or member.issym() or member.islnk() or member.isdev():
                    raise DataError(f"{source}: {member.name!r} is a link or leaves the folder; expected plain files")
                if member.isfile():
                    yield member.name.removeprefix("./"), _reader(archive, member, source)
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise DataError(f"{source}: not a whole tar archive ({first_line(error)}); get it again from {url}") from None


def _reader(archive: tarfile.TarFile, member: tarfile.TarInfo, source: Path) -> Callable[..., bytes]:
    def read(most: int = 1 << 28) -> bytes:
        if member.size > most:
            raise DataError(f"{source}: {member.name}: {member.size:,} bytes, expected at most {most:,}")
        try:
            content = archive.extractfile(member).read()  # type: ignore[union-attr]
        except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
            raise DataError(f"{source}: {member.name}: the archive ends inside it ({first_line(error)})") from None
        if len(content) != member.size:
            raise DataError(f"{source}: {member.name}: the archive ends inside it")
        return content

    return read


# ------------------------------------------------------------------------------------------------ photos


def clouds(rng: np.random.Generator, height: int, width: int, octaves: int) -> NDArray[np.float64]:
    """1/f noise [height, width] around 0."""
    total = np.zeros((height, width))
    for octave in range(octaves):
        coarse = rng.normal(size=(2 ** (octave + 1) + 1,) * 2).astype(np.float32)
        total += np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)) / 2**octave
    return total


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

    mask = (1 / (1 + np.exp(-4 * clouds(rng, height, width, 4))))[:, :, None]
    pixels = mask * cut() + (1 - mask) * cut() + rng.uniform(4, 14) * clouds(rng, height, width, 8)[:, :, None]
    pixels += rng.normal(0, rng.uniform(4, 12), pixels.shape)  # the sensor's
    picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    if rng.random() < 0.01:
        picture = picture.convert("L")
    subsampling = int(rng.choice([2, 1, 0], p=[0.78, 0.07, 0.15]))  # 4:2:0, 4:2:2, 4:4:4
    quality, progressive = int(rng.integers(88, 97)), bool(rng.random() < 0.02)
    return picture, {"quality": quality, "subsampling": subsampling, "progressive": progressive}


def photos(count: int) -> Iterator[Picture]:
    """`count` pictures for training and a tenth as many for validation, in ten classes."""
    ImageFile.MAXBLOCK = 1 << 22  # Pillow writes a progressive file in one piece
    sources = list(_sklearn_datasets().load_sample_images().images)
    for split, first, many in (("train", 0, count), ("val", 1_000_000, max(10, count // 10))):
        for number in range(many):
            image, options = photo(first + number, sources)
            yield Picture(split, f"class{number % CLASSES}", image, {"format": "JPEG", **options})


# ------------------------------------------------------------------------------------------------ scenes


class Digit(NamedTuple):
    """One object of a scene."""

    label: str
    box: tuple[int, int, int, int]
    """xmin, ymin, xmax, ymax of its ink, from pixel 1 on and inclusive, as VOC counts."""
    difficult: bool


def scene(number: int, pool: list[tuple[int, NDArray[np.float64]]], seed: int = 0) -> tuple[Image.Image, list[Digit]]:
    """Picture `number`: one to four digits of a pool of (label, [8, 8] from 0 to 1), drawn one over the other.

    One that is more than half covered, or whose box has fewer than 16 x 16 pixels, is difficult; not all of them are.
    """
    rng = np.random.default_rng((seed, number))
    while True:
        sides = int(rng.integers(176, 225)), int(rng.integers(128, 176))
        width, height = sides if rng.random() < 0.5 else sides[::-1]
        pixels = (128 + 30 * clouds(rng, height, width, 6)).clip(64, 192)
        inks: list[tuple[int, NDArray[np.bool_]]] = []
        for _ in range(int(rng.integers(1, 5))):
            label, shape = pool[int(rng.integers(len(pool)))]
            side, gray = int(rng.integers(24, 81)), rng.choice([rng.uniform(0, 40), rng.uniform(215, 255)])
            left, top = int(rng.integers(width - side + 1)), int(rng.integers(height - side + 1))
            large = Image.fromarray(shape.astype(np.float32)).resize((side, side), Image.Resampling.BICUBIC)
            opacity = np.zeros((height, width))
            opacity[top : top + side, left : left + side] = np.array(large).clip(0, 1)
            pixels += opacity * (gray - pixels)
            inks.append((label, opacity > 0.3))
        covering = np.zeros((height, width), dtype=bool)
        digits = []
        for label, ink in inks[::-1]:  # from the last one drawn, which nothing covers
            y, x = np.nonzero(ink)
            box = int(x.min()) + 1, int(y.min()) + 1, int(x.max()) + 1, int(y.max()) + 1
            is_small = (box[2] - box[0] + 1) * (box[3] - box[1] + 1) < 16**2
            digits.append(Digit(f"digit{label}", box, is_small or bool((ink & covering).sum() * 2 > ink.sum())))
            covering |= ink
        if not all(digit.difficult for digit in digits):
            return Image.fromarray(pixels.round().astype(np.uint8)), digits[::-1]


def write_scenes(out: Path, count: int) -> None:
    """`count` scenes for training and a quarter as many for test, as VOC2007 of a development kit."""
    data = _sklearn_datasets().load_digits()
    pools: dict[str, list[tuple[int, NDArray[np.float64]]]] = {"trainval": [], "test": []}
    seen: Counter[int] = Counter()
    for pixels, label in zip(data.images, data.target.tolist(), strict=True):
        pools["test" if seen[label] % 5 == 4 else "trainval"].append((label, pixels / 16))  # as `digits`
        seen[label] += 1
    splits = [("trainval", number) for number in range(count)]
    splits += [("test", 1_000_000 + number) for number in range(max(10, count // 4))]
    lists: dict[str, list[tuple[str, list[Digit]]]] = {"trainval": [], "test": []}
    out.parent.mkdir(parents=True, exist_ok=True)
    with aside(out) as tree:
        year = tree.part / KIT_YEAR
        for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
            (year / folder).mkdir(parents=True)
        for place, (split, number) in enumerate(
            tqdm(splits, desc=out.name, unit=" images", disable=not sys.stderr.isatty()), 1
        ):
            name = f"{place:06d}"
            picture, digits = scene(number, pools[split])
            content = io.BytesIO()
            picture.convert("RGB").save(content, **USUAL)
            (year / "JPEGImages" / f"{name}.jpg").write_bytes(content.getbuffer())
            (year / "Annotations" / f"{name}.xml").write_bytes(annotation(name, picture.size, digits))
            lists[split].append((name, digits))
        for split, images in lists.items():
            main = year / "ImageSets/Main"
            (main / f"{split}.txt").write_text("".join(f"{name}\n" for name, _ in images))
            for label in (f"digit{number}" for number in range(CLASSES)):
                lines = []
                for name, digits in images:
                    difficult = [digit.difficult for digit in digits if digit.label == label]
                    lines.append(f"{name} {-1 if not difficult else 0 if all(difficult) else 1:2d}\n")
                (main / f"{label}_{split}.txt").write_text("".join(lines))


def annotation(name: str, size: tuple[int, int], digits: list[Digit]) -> bytes:
    """What is in an image, as VOC writes it."""
    root = ElementTree.Element("annotation")

    def add(parent: ElementTree.Element, **values: Any) -> None:
        for key, value in values.items():
            ElementTree.SubElement(parent, key).text = str(value)

    add(root, folder=KIT_YEAR, filename=f"{name}.jpg")
    add(ElementTree.SubElement(root, "size"), width=size[0], height=size[1], depth=3)
    for digit in digits:
        item = ElementTree.SubElement(root, "object")
        add(item, name=digit.label, pose="Unspecified", truncated=0, difficult=int(digit.difficult))
        box = dict(zip(("xmin", "ymin", "xmax", "ymax"), digit.box, strict=True))
        add(ElementTree.SubElement(item, "bndbox"), **box)
    ElementTree.indent(root)
    return ElementTree.tostring(root) + b"\n"


# ------------------------------------------------------------------------------------------------ writing


def write(pictures: Iterator[Picture], out: Path, limit: int | None = None, classes: int = CLASSES) -> None:
    """A tree that has its name is complete.

    Args:
        limit: at most this many images of each split, as many of every one of the `classes`.
    """
    counts: Counter[tuple[str, str]] = Counter()
    numbers: Counter[str] = Counter()
    out.parent.mkdir(parents=True, exist_ok=True)
    with aside(out) as tree:
        for picture in tqdm(pictures, desc=out.name, unit=" images", disable=not sys.stderr.isatty()):
            place = picture.split, picture.label
            if limit is not None and counts[place] >= limit // classes:
                continue
            folder = tree.part / picture.split / picture.label
            if not counts[place]:
                folder.mkdir(parents=True)
            suffix = "png" if picture.options["format"] == "PNG" else "jpg"
            content = io.BytesIO()  # Pillow takes half a write to a file for a whole one
            picture.image.save(content, **picture.options)
            (folder / f"{numbers[picture.split]:05d}.{suffix}").write_bytes(content.getbuffer())
            counts[place] += 1
            numbers[picture.split] += 1


def make(dataset: str, out: Path, *, source: Path | None = None, limit: int | None = None, png: bool = False) -> None:
    """Write a data set, unless it is there already.

    Raises:
        DataError: what is asked for, or what it is made of, cannot be used.
        OSError: the disk refuses.
    """
    classes = 100 if dataset == "cifar100" else CLASSES
    if limit is not None and limit < classes:
        raise DataError(f"--limit: expected at least {classes}, one image of each class, got {limit}")
    if png and dataset not in ("cifar10", "cifar100"):
        raise DataError(f"--png: expected with cifar10 or cifar100 only, got {dataset}")
    is_kit = dataset == "digit_scenes"
    if (is_kit and (out / KIT_YEAR).is_dir()) or all(any((out / s).glob("*/*.*")) for s in ("train", "val")):
        print(f"{out} is there already")
        return
    if os.path.lexists(out):
        where = KIT_YEAR if is_kit else "train and val"
        raise DataError(f"{out}: is there and holds no images in {where}; give another name, or remove it")
    check_writable(out)
    archives = {"imagenette": IMAGENETTE_URL, "cifar10": CIFAR_URL, "cifar100": CIFAR100_URL}
    if source is None and dataset in archives:
        raise DataError(f"{dataset}: expected its archive with --source; get {archives[dataset]}")
    if dataset == "photos":
        write(photos(limit or 2000), out)
    elif is_kit:
        write_scenes(out, limit or 600)
    elif dataset == "digits":
        write(digits(), out, limit)
    elif dataset == "fashion_mnist":
        write(fashion_mnist(source or DEBIAN_FASHION), out, limit)
    elif dataset == "imagenette":
        write(imagenette(source), out, limit)  # type: ignore[arg-type]
    elif dataset == "cifar100":
        write(cifar100(source, png), out, limit, classes)  # type: ignore[arg-type]
    else:
        write(cifar10(source, png), out, limit)  # type: ignore[arg-type]


@guarded
def main() -> int:
    """Parse the command line and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ["digits", "fashion_mnist", "imagenette", "cifar10", "cifar100", "photos", "digit_scenes"]
    parser.add_argument("dataset", choices=names)
    parser.add_argument("out", type=Path, help="folder to make; nothing is done if it is there already")
    parser.add_argument("--source", type=Path, help="the archive, or the folder of Fashion-MNIST's idx files")
    parser.add_argument("--limit", type=int, help="at most this many images of each split")
    parser.add_argument("--png", action="store_true", help="cifar10, cifar100: exact pixels instead of JPEG")
    arguments = parser.parse_args()
    make(arguments.dataset, arguments.out, source=arguments.source, limit=arguments.limit, png=arguments.png)
    return 0


if __name__ == "__main__":
    sys.exit(main())
