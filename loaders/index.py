"""The index of a data set: path, label, width, height and format of every image, read once from the headers.

A data set is a folder of class folders, a list file, tar shards (WebDataset) or one `.beton` file of FFCV; what is
around the bytes of an image is known here and nowhere else.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import struct
import sys
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from tqdm import tqdm

from loaders import beton
from loaders.beton import RAW, DataError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".tif", ".tiff", ".webp")
LISTS = (".txt", ".tsv", ".lst")
_FORMAT = 2  # of the cache file; raised when its fields change


class BadImage(Exception):
    """One image that cannot be decoded; the message is the reason, without the path."""


class Pieces(NamedTuple):
    """Where the images lie that are not files of their own."""

    files: list[bytes]
    """Paths of the shards."""
    file: NDArray[np.int32]
    """[N], place in `files`."""
    offset: NDArray[np.int64]
    """[N], first byte in that file."""
    length: NDArray[np.int64]
    """[N], bytes."""

    def take(self, rows: NDArray[np.int64]) -> Pieces:
        """Those of some rows."""
        return Pieces(self.files, self.file[rows], self.offset[rows], self.length[rows])


class Index:
    """Everything known of a data set without decoding it. Rows are sorted by class name, then path; those of a list,
    of shards and of a `.beton` keep the order they have there.

    Attributes:
        root: the folder or file, or a name for a data set that is not made of files.
        classes: names; a label is a place in this list.
        label, width, height, format: [N]; 1, 1 and b"" where the header cannot be read.
        problems: row -> why its image cannot be used.
        max_pixels: images with more are refused before anything is decoded.
        pieces: where the images lie, if they are not files of their own.
        quarantined: how many images a quarantine list keeps out of the index.
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
        pieces: Pieces | None = None,
    ) -> None:
        self.root, self.classes, self._paths = root, classes, paths
        self.label, self.width, self.height, self.format = label, width, height, format
        self.problems, self.max_pixels, self.pieces = problems, max_pixels, pieces
        self.quarantined = 0

    def __len__(self) -> int:
        return len(self.label)

    def name(self, row: int) -> bytes:
        """Path of an image below the root, as the file system spells it: names need not be UTF-8."""
        return bytes(self._paths[row])

    def path(self, row: int) -> str:
        """Path of an image, for people: what is not UTF-8 is escaped."""
        return os.path.join(os.fsencode(self.root), self._paths[row]).decode("utf-8", errors="backslashreplace")

    def location(self, row: int) -> tuple[bytes, int, int]:
        """File of an image's bytes, the first of them in it, and how many (-1: to the end)."""
        if self.pieces is None:
            return os.path.join(os.fsencode(self.root), self._paths[row]), 0, -1
        piece = self.pieces
        return piece.files[piece.file[row]], int(piece.offset[row]), int(piece.length[row])

    @property
    def fingerprint(self) -> str:
        """Hash of names, labels and sizes: two data sets with equal fingerprints give the same stream."""
        digest = hashlib.sha256(b"\0".join(self._paths.tolist()))
        for array in (self.label, self.width, self.height):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:16]

    def content(self, row: int) -> bytes:
        """The bytes of an image.

        Raises:
            BadImage: they cannot be read.
        """
        path, offset, length = self.location(row)
        try:
            with open(path, "rb", buffering=0) as file:
                file.seek(offset)
                content = file.read() if length < 0 else file.read(length)
        except OSError as error:
            raise BadImage(f"cannot be read: {error.strerror}") from error
        if length >= 0 and len(content) < length:
            raise BadImage("cannot be read: its file is cut short")
        return content

    def read(self, row: int) -> Tensor:
        """Decode an image as RGB, uint8 [3, H, W]. An EXIF orientation is not applied, as in the reference.

        Raises:
            BadImage: it cannot be decoded, or is no longer the file that was indexed.
        """
        if row in self.problems:
            raise BadImage(self.problems[row])
        content, width, height = self.content(row), int(self.width[row]), int(self.height[row])
        if self.format[row] == RAW:
            if len(content) != 3 * width * height:
                raise BadImage(f"has {len(content)} bytes, expected {width} x {height} x 3")
            return torch.frombuffer(bytearray(content), dtype=torch.uint8).view(height, width, 3).permute(2, 0, 1)
        return _decode(content, width, height)

    def without(self, names: dict[bytes, str]) -> Index:
        """The index without some images, such as those of a quarantine list."""
        rows = np.flatnonzero(~np.isin(self._paths, np.array(list(names), dtype=np.bytes_)))
        place = {int(row): new for new, row in enumerate(rows)}
        index = Index(
            self.root,
            self.classes,
            self._paths[rows],
            self.label[rows],
            self.width[rows],
            self.height[rows],
            self.format[rows],
            {place[row]: reason for row, reason in self.problems.items() if row in place},
            self.max_pixels,
            self.pieces.take(rows) if self.pieces else None,
        )
        index.quarantined = len(self) - len(rows)
        return index


def _decode(content: bytes, width: int, height: int) -> Tensor:
    # The size is read again before anything of that size is made: the file may be another one by now.
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of bombs, palettes and EXIF, which do not matter here
            frame = jpeg_frame(content)
            found = frame[:2] if frame else Image.open(BytesIO(content)).size
    except Exception as error:
        raise BadImage(f"cannot be decoded: {_reason(error)}") from error
    if found != (width, height):
        raise BadImage(f"is {found[0]}x{found[1]} pixels, the index says {width}x{height}")
    try:
        data = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        image = decode_image(data, mode=ImageReadMode.RGB)
        if image.dtype == torch.uint16:  # a PNG of 16 bits: keep the upper 8
            image = (image.int() >> 8).to(torch.uint8)
        if tuple(image.shape) == (3, height, width):  # an animation has four axes
            return image
    except (RuntimeError, ValueError):
        pass  # a format or variant that torchvision does not read: Pillow reads more, and says why it cannot
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            picture = Image.open(BytesIO(content)).convert("RGB")
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    except Exception as error:
        raise BadImage(f"cannot be decoded: {_reason(error)}") from error


class Frame(NamedTuple):
    """What a JPEG's frame header says."""

    width: int
    height: int
    components: int


def jpeg_frame(content: bytes) -> Frame | None:
    """The frame header of a JPEG; None if it is no JPEG, or an odd one."""
    if content[:2] != b"\xff\xd8":
        return None
    at = 2
    while at + 10 <= len(content) and content[at] == 0xFF:
        marker = content[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width, components = struct.unpack_from(">HHB", content, at + 5)
            return Frame(width, height, components)
        else:
            at += 2 + struct.unpack_from(">H", content, at + 2)[0]
    return None


def _reason(error: Exception) -> str:
    # Pillow's "cannot identify image file <_io.BytesIO object at 0x...>" names an address, not a reason.
    text = str(error).split("<_io", 1)[0].strip()
    return text or type(error).__name__


# ------------------------------------------------------------------------------------------------ opening


def open_index(root: Path, *, max_pixels: int, quarantine: Path | None = None) -> Index:
    """Index a data set, from the cache when nothing changed.

    Args:
        root: a folder `<root>/<class>/**/<image>`; a list file with `<image> <class>` on each line, paths relative
            to it; a folder or pattern of tar shards (`shards/*.tar`); or a `.beton` file.
        max_pixels: an image with more is a problem and is never decoded.
        quarantine: list of images to leave out, as `tools/scan_images.py` writes it.

    The cache lies in `$XDG_CACHE_HOME/burn-engine` (`~/.cache/burn-engine`) and is keyed by the path, size and
    modification time of every file.

    Raises:
        DataError: there is no such data set, or it is not laid out as expected.
    """
    if root.suffix == ".beton":
        index = _beton_index(root, max_pixels)
    elif shards := _shard_files(root):
        index = _shard_index(root, shards, max_pixels)
    else:
        index = _file_index(root, *(_listed(root) if root.suffix in LISTS else _list(root)), max_pixels)
    return index.without(read_quarantine(quarantine)) if quarantine else index


def is_there(root: Path) -> bool:
    """Whether there is anything to index at a place."""
    return root.exists() or bool(list(root.parent.glob(root.name)))


def read_quarantine(path: Path) -> dict[bytes, str]:
    """Image below the root -> reason, from a quarantine list: lines of JSON with `path` and `reason`.

    Raises:
        DataError: no such file, or a line that is none of a quarantine list.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as a quarantine list: {error}") from None
    names: dict[bytes, str] = {}
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            names[os.fsencode(entry["path"])] = str(entry["reason"])
        except (ValueError, TypeError, KeyError):
            raise DataError(
                f'{path}: line {number}: expected {{"path": ..., "reason": ...}} as tools/scan_images.py writes it'
            ) from None
    return names


def _file_index(root: Path, classes: list[str], files: list[tuple[bytes, int, int, int]], max_pixels: int) -> Index:
    base = root.parent if root.suffix in LISTS else root

    def scan() -> dict[str, Any]:
        paths = [os.path.join(os.fsencode(base), path) for path, *_ in files]
        return _headers(root, paths, _file_header, max_pixels)

    stamps = (b"\0".join((path, f"{label} {size} {at}".encode())) for path, label, size, at in files)
    arrays = _cached(root, stamps, max_pixels, scan)
    return Index(
        root=base,
        classes=classes,
        paths=np.array([path for path, *_ in files], dtype=np.bytes_),
        label=np.array([label for _, label, *_ in files], dtype=np.int64),
        width=arrays["width"],
        height=arrays["height"],
        format=arrays["format"],
        problems=_problems(arrays),
        max_pixels=max_pixels,
    )


def _shard_index(root: Path, shards: list[bytes], max_pixels: int) -> Index:
    def scan() -> dict[str, Any]:
        members = _members(shards)
        pieces = [(shards[file], offset, length) for file, offset, length in zip(*members[3:], strict=True)]
        arrays = _headers(root, pieces, _piece_header, max_pixels)
        names = ("classes", "paths", "label", "shard", "offset", "length")
        return {**arrays, **{name: np.array(column) for name, column in zip(names, members, strict=True)}}

    stamps = (b"%s %d %d" % (path, (s := os.stat(path)).st_size, s.st_mtime_ns) for path in shards)
    arrays = _cached(root, stamps, max_pixels, scan)
    return Index(
        root=Path(os.fsdecode(os.path.dirname(shards[0]))),
        classes=arrays["classes"].tolist(),
        paths=arrays["paths"],
        label=arrays["label"].astype(np.int64),
        width=arrays["width"],
        height=arrays["height"],
        format=arrays["format"],
        problems=_problems(arrays),
        max_pixels=max_pixels,
        pieces=Pieces(shards, arrays["shard"].astype(np.int32), arrays["offset"], arrays["length"]),
    )


def _beton_index(root: Path, max_pixels: int) -> Index:
    content = beton.read(root)
    area = content.width.astype(np.int64) * content.height
    text = "has {}x{} pixels, more than data.max_pixels {}"
    return Index(
        root=root,
        classes=content.classes,
        paths=np.array([b"%d" % row for row in range(len(content.label))], dtype=np.bytes_),
        label=content.label,
        width=content.width,
        height=content.height,
        format=np.where(content.is_raw, RAW, b"JPEG"),
        problems={
            int(row): text.format(content.width[row], content.height[row], max_pixels)
            for row in np.flatnonzero(area > max_pixels)
        },
        max_pixels=max_pixels,
        pieces=Pieces([os.fsencode(root)], np.zeros(len(area), dtype=np.int32), content.offset, content.length),
    )


def _problems(arrays: dict[str, Any]) -> dict[int, str]:
    return dict(zip(arrays["bad"].tolist(), arrays["reason"].tolist(), strict=True))


# ------------------------------------------------------------------------------------------------ listing


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


def _listed(path: Path) -> tuple[list[str], list[tuple[bytes, int, int, int]]]:
    """The same from a list file. Integers are labels as they stand, words are names of classes."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    entries = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        parts = line.rsplit(b"\t" if b"\t" in line else None, 1)
        if len(parts) != 2:
            raise DataError(f"{path}: line {number}: expected `<image> <class>`, got {line[:80]!r}")
        name = parts[0]
        if name.startswith(b"/") or b"\0" in name or b".." in name.split(b"/"):
            raise DataError(f"{path}: line {number}: expected a path below the list's folder, got {name[:80]!r}")
        try:
            status = os.stat(os.path.join(os.fsencode(path.parent), name))
            entries.append((name, parts[1].strip().decode("utf-8", "backslashreplace"), status))
        except OSError as error:
            raise DataError(f"{path}: line {number}: {name[:80]!r}: {error.strerror}") from None
    if not entries:
        raise DataError(f"{path}: no images; expected `<image> <class>` on each line")
    classes, label = _labels([word for _, word, _ in entries])
    return classes, [
        (name, place, s.st_size, s.st_mtime_ns) for (name, _, s), place in zip(entries, label, strict=True)
    ]


def _labels(words: Sequence[str]) -> tuple[list[str], list[int]]:
    """Class names and the place of each word among them; integers from 0 keep their value."""
    if all(word.isdecimal() for word in words):
        last = max(map(int, words))
        if last >= beton.MAX_CLASSES:
            raise DataError(f"label {last}; expected 0 to {beton.MAX_CLASSES - 1}")
        return [str(number) for number in range(last + 1)], [int(word) for word in words]
    classes = sorted(set(words))
    place = {word: number for number, word in enumerate(classes)}
    return classes, [place[word] for word in words]


def _shard_files(root: Path) -> list[bytes]:
    """The tar shards of a folder, a pattern, or one path; none if it is something else."""
    if root.suffix in (".gz", ".tgz", ".zst", ".bz2", ".xz"):
        raise DataError(f"{root}: compressed shards cannot be read at a place; expected plain .tar files")
    if root.is_dir():
        found = [path for path in root.iterdir() if path.suffix == ".tar"]
    elif root.suffix == ".tar":
        found = list(root.parent.glob(root.name))
        if not found:
            raise DataError(f"{root}: no such shard; expected tar files such as {root.parent}/*.tar")
    else:
        return []
    return [os.fsencode(path) for path in sorted(found)]


def _members(shards: list[bytes]) -> tuple[Any, ...]:
    """Class names and, for every image of the shards: name, label, shard, offset, length. The label is the sample's
    `.cls` member (WebDataset) or else the folder that the image lies in."""
    names: list[bytes] = []
    words: list[str] = []
    places: list[tuple[int, int, int]] = []
    quiet = not sys.stderr.isatty() or len(shards) < 8
    with ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1))) as pool:
        for number, found in enumerate(
            tqdm(pool.map(_shard_members, shards), total=len(shards), desc="indexing", unit=" shards", disable=quiet)
        ):
            for name, word, offset, length in found:
                names.append(os.path.basename(shards[number]) + b"/" + os.fsencode(name))
                words.append(word)
                places.append((number, offset, length))
    if not names:
        raise DataError(f"{os.fsdecode(shards[0])}: no images in the shards, expected {', '.join(EXTENSIONS)}")
    classes, label = _labels(words)
    return classes, names, label, *(np.array(column, dtype=np.int64) for column in zip(*places, strict=True))


def _shard_members(shard: bytes) -> list[tuple[str, str, int, int]]:
    path = os.fsdecode(shard)
    images: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, str] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, base = os.path.split(member.name)
                if not member.isreg() or member.issparse() or base.startswith("."):
                    continue
                key, _, extension = base.partition(".")
                key = os.path.join(folder, key)
                if base.lower().endswith(EXTENSIONS):
                    images[key] = (member.name, member.offset_data, member.size)
                elif extension == "cls" and member.size < 1000:
                    file = tar.extractfile(member)
                    assert file
                    labels[key] = file.read().decode("utf-8", "backslashreplace").strip()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"{path}: is not a whole tar file: {error}") from None
    found = []
    for key, (name, offset, size) in images.items():
        word = labels.get(key) if labels else os.path.basename(os.path.dirname(name))
        if not word:
            raise DataError(f"{path}: {name}: has no label; expected {key}.cls in the shard, or a folder per class")
        found.append((name, word, offset, size))
    return found


# ------------------------------------------------------------------------------------------------ headers, cache


def _headers(
    root: Path, places: Sequence[Any], header: Callable[[Any], tuple[int, int, str, str]], max_pixels: int
) -> dict[str, Any]:
    with ThreadPoolExecutor(min(32, 4 * (os.cpu_count() or 1))) as pool:
        headers = list(
            tqdm(
                pool.map(header, places, chunksize=64),
                total=len(places),
                desc=f"indexing {root}",
                unit=" images",
                disable=not sys.stderr.isatty() or len(places) < 10_000,
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


def _file_header(path: bytes) -> tuple[int, int, str, str]:
    """Width, height, format and "" of an image file, or 1, 1, "" and why it is none."""
    try:
        if os.path.getsize(path) == 0:
            return 1, 1, "", "is empty (0 bytes)"
        with open(path, "rb") as file:
            return _header(file)
    except OSError as error:
        return 1, 1, "", f"is not an image: {error.strerror or _reason(error)}"


def _piece_header(place: tuple[bytes, int, int]) -> tuple[int, int, str, str]:
    path, offset, length = place
    if length == 0:
        return 1, 1, "", "is empty (0 bytes)"
    with open(path, "rb") as file:
        return _header(io.BufferedReader(_Slice(file, offset, length)))


class _Slice(io.RawIOBase):
    """A part of a file as a file, so that a header is read without the rest."""

    def __init__(self, file: BinaryIO, offset: int, length: int) -> None:
        self._file, self._offset, self._length, self._at = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, to: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(0, to + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._offset + self._at)
        content = self._file.read(max(0, min(len(buffer), self._length - self._at)))
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)


def _header(file: Any) -> tuple[int, int, str, str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of decompression bombs: `max_pixels` refuses those
            with Image.open(file) as image:
                return image.width, image.height, image.format or "", ""
    except Image.DecompressionBombError:
        return 1, 1, "", "is a decompression bomb: more pixels than Pillow opens"
    except OSError as error:
        return 1, 1, "", f"is not an image: {error.strerror or _reason(error)}"
    except Exception as error:
        return 1, 1, "", f"is not an image: {_reason(error)}"


def _cached(root: Path, stamps: Iterator[bytes], max_pixels: int, scan: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The arrays of `scan`, from the cache if files with the same stamps were scanned before."""
    listing = hashlib.sha256(f"{_FORMAT}\0{max_pixels}\0{root.resolve()}".encode())
    for stamp in stamps:
        listing.update(stamp + b"\n")
    cache_home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cache = cache_home / "burn-engine" / f"index-{listing.hexdigest()[:24]}.npz"
    arrays = _read_cache(cache)
    if arrays is None:
        arrays = scan()
        _write_cache(cache, arrays)
    return arrays


def _read_cache(path: Path) -> dict[str, Any] | None:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
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
