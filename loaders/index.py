"""The index of a data set: path, label, width, height and format of every image, read once from the headers."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from tqdm import tqdm

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".tif", ".tiff", ".webp")
_FORMAT = 1  # of the cache file; raised when its fields change


class DataError(ValueError):
    """Data that cannot be used; one line that names the path, what was expected and what to do."""


class BadImage(Exception):
    """One image that cannot be decoded; the message is the reason, without the path."""


class Index:
    """Everything known of a data set without decoding it. Rows are sorted by class name, then path.

    Attributes:
        root: the folder, or a name for a data set that is not made of files.
        classes: names; a label is a place in this list.
        label, width, height, format: [N]; 1, 1 and b"" where the header cannot be read.
        problems: row -> why its image cannot be used.
        max_pixels: images with more are refused before anything is decoded.
    """

    def __init__(
        self,
        root: Path,
        classes: list[str],
        paths: NDArray[np.bytes_],
        label: NDArray[np.int64],
        width: NDArray[np.int32],
        height: NDArray[np.int32],
        format: NDArray[np.bytes_],
        problems: dict[int, str],
        max_pixels: int,
    ) -> None:
        self.root, self.classes, self._paths = root, classes, paths
        self.label, self.width, self.height, self.format = label, width, height, format
        self.problems, self.max_pixels = problems, max_pixels

    def __len__(self) -> int:
        return len(self.label)

    def path_bytes(self, row: int) -> bytes:
        """Path of an image as the file system spells it: names need not be UTF-8."""
        return os.path.join(os.fsencode(self.root), self._paths[row])

    def path(self, row: int) -> str:
        """Path of an image, for people: what is not UTF-8 is escaped."""
        return self.path_bytes(row).decode("utf-8", errors="backslashreplace")

    @property
    def fingerprint(self) -> str:
        """Hash of names, labels and sizes: two data sets with equal fingerprints give the same stream."""
        digest = hashlib.sha256(b"\0".join(self._paths.tolist()))
        for array in (self.label, self.width, self.height):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:16]

    def read(self, row: int) -> Tensor:
        """Decode an image as RGB, uint8 [3, H, W]. An EXIF orientation is not applied, as in the reference.

        Raises:
            BadImage: it cannot be decoded, or is no longer the file that was indexed.
        """
        if row in self.problems:
            raise BadImage(self.problems[row])
        try:
            with open(self.path_bytes(row), "rb") as file:
                content = file.read()
        except OSError as error:
            raise BadImage(f"cannot be read: {error.strerror}") from error
        image = _decode(content)
        expected = (3, int(self.height[row]), int(self.width[row]))
        if tuple(image.shape) != expected:
            raise BadImage(f"is {image.shape[2]}x{image.shape[1]} pixels, the index says {expected[2]}x{expected[1]}")
        return image


def _decode(content: bytes) -> Tensor:
    try:
        data = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        image = decode_image(data, mode=ImageReadMode.RGB)
        if image.dtype == torch.uint16:  # a PNG of 16 bits: keep the upper 8
            image = (image.int() >> 8).to(torch.uint8)
        if image.ndim == 3:  # an animation has four axes
            return image
    except (RuntimeError, ValueError):
        pass  # a format or variant that torchvision does not read: Pillow reads more, and says why it cannot
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of palettes and EXIF, which do not matter here
            picture = Image.open(BytesIO(content)).convert("RGB")
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    except Exception as error:
        raise BadImage(f"cannot be decoded: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    # Pillow's "cannot identify image file <_io.BytesIO object at 0x...>" names an address, not a reason.
    text = str(error).split("<_io", 1)[0].strip()
    return text or type(error).__name__


def open_index(root: Path, *, max_pixels: int) -> Index:
    """Index an ImageFolder tree `<root>/<class>/**/<image>`, from the cache when nothing changed.

    The cache lies in `$XDG_CACHE_HOME/burn-engine` (`~/.cache/burn-engine`) and is keyed by the path, size and
    modification time of every file.

    Raises:
        DataError: no such folder, no class folders, or a class without images.
    """
    classes, files = _list(root)
    listing = hashlib.sha256(f"{_FORMAT}\0{max_pixels}\0{root.resolve()}".encode())
    for path, label, size, modified in files:
        listing.update(b"\0".join((path, f"{label} {size} {modified}".encode())) + b"\n")
    cache_home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cache = cache_home / "burn-engine" / f"index-{listing.hexdigest()[:24]}.npz"
    arrays = _read_cache(cache)
    if arrays is None:
        arrays = _scan(root, files, max_pixels)
        _write_cache(cache, arrays)
    return Index(
        root=root,
        classes=classes,
        paths=np.array([path for path, *_ in files], dtype=np.bytes_),
        label=np.array([label for _, label, *_ in files], dtype=np.int64),
        width=arrays["width"],
        height=arrays["height"],
        format=arrays["format"],
        problems=dict(zip(arrays["bad"].tolist(), arrays["reason"].tolist(), strict=True)),
        max_pixels=max_pixels,
    )


def _list(root: Path) -> tuple[list[str], list[tuple[bytes, int, int, int]]]:
    """Class names, and (relative path, label, bytes, mtime) of every image in index order."""
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; expected one folder of images per class in it")
    classes = sorted(e.name for e in os.scandir(root) if e.is_dir() and not e.name.startswith("."))
    if not classes:
        raise DataError(f"{root}: no class folders; expected <root>/<class>/<image>")
    files = []
    for label, name in enumerate(classes):
        found = sorted(_images(root / name))
        if not found:
            raise DataError(
                f"{root / name}: class without images; expected files ending in {', '.join(EXTENSIONS)}, "
                "remove the folder or fill it"
            )
        for path in found:
            status = os.stat(path)
            relative = os.fsencode(os.path.relpath(path, root))
            files.append((relative, label, status.st_size, status.st_mtime_ns))
    return classes, files


def _images(folder: Path) -> Iterator[str]:
    for where, folders, names in os.walk(folder):  # does not follow links below the class: no loops
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if name.lower().endswith(EXTENSIONS) and not name.startswith("."):
                yield os.path.join(where, name)


def _scan(root: Path, files: list[tuple[bytes, int, int, int]], max_pixels: int) -> dict[str, Any]:
    paths = [os.path.join(os.fsencode(root), path) for path, *_ in files]
    with ThreadPoolExecutor(min(32, 4 * (os.cpu_count() or 1))) as pool:
        headers = list(
            tqdm(
                pool.map(_header, paths, chunksize=64),
                total=len(paths),
                desc=f"indexing {root}",
                unit=" files",
                disable=not sys.stderr.isatty() or len(paths) < 10_000,
            )
        )
    width = np.array([header[0] for header in headers], dtype=np.int32)
    height = np.array([header[1] for header in headers], dtype=np.int32)
    reasons = {row: header[3] for row, header in enumerate(headers) if header[3]}
    for row in np.flatnonzero(width.astype(np.int64) * height > max_pixels).tolist():
        reasons[row] = f"has {width[row]}x{height[row]} pixels, more than data.max_pixels {max_pixels}"
    return {
        "width": width,
        "height": height,
        "format": np.array([header[2] for header in headers], dtype=np.bytes_),
        "bad": np.array(list(reasons), dtype=np.int64),
        "reason": np.array(list(reasons.values()), dtype=np.str_),
    }


def _header(path: bytes) -> tuple[int, int, str, str]:
    """Width, height, format and "" of an image file, or 1, 1, "" and why it is none."""
    try:
        if os.path.getsize(path) == 0:
            return 1, 1, "", "is empty (0 bytes)"
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of decompression bombs: `max_pixels` refuses those
            with Image.open(file) as image:
                return image.width, image.height, image.format or "", ""
    except Image.DecompressionBombError:
        return 1, 1, "", "is a decompression bomb: more pixels than Pillow opens"
    except OSError as error:
        return 1, 1, "", f"is not an image: {error.strerror or _reason(error)}"
    except Exception as error:
        return 1, 1, "", f"is not an image: {_reason(error)}"


def _read_cache(path: Path) -> dict[str, Any] | None:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in ("width", "height", "format", "bad", "reason")}
    except (OSError, ValueError, KeyError, EOFError):
        return None  # absent or damaged: it is made anew


def _write_cache(path: Path, arrays: dict[str, Any]) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time only
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(aside, "wb") as file:
                np.savez(file, **arrays)
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)


class SyntheticIndex(Index):
    """A data set without files: images drawn from their number, with a coarse pattern for each class."""

    def __init__(self, num_images: int, num_classes: int, side: int) -> None:
        names = [f"class{label}" for label in range(num_classes)]
        super().__init__(
            root=Path("synthetic"),
            classes=names,
            paths=np.array([f"{row}" for row in range(num_images)], dtype=np.bytes_),
            label=np.arange(num_images, dtype=np.int64) % num_classes,
            width=np.full(num_images, side, dtype=np.int32),
            height=np.full(num_images, side, dtype=np.int32),
            format=np.full(num_images, b"noise"),
            problems={},
            max_pixels=side * side,
        )
        self.side = side

    def read(self, row: int) -> Tensor:
        """uint8 [3, side, side], the same for the same row on every machine."""
        pattern = torch.Generator().manual_seed(int(self.label[row]))
        noise = torch.Generator().manual_seed(1_000_000 + row)
        coarse = torch.randint(0, 160, (3, 4, 4), generator=pattern, dtype=torch.int32)
        scale = -(-self.side // 4)
        image = coarse.repeat_interleave(scale, 1).repeat_interleave(scale, 2)[:, : self.side, : self.side]
        image = image + torch.randint(0, 96, (3, self.side, self.side), generator=noise, dtype=torch.int32)
        return image.to(torch.uint8)
