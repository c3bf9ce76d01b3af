"""The `.beton` file of FFCV (format 2): read and written here, without FFCV.

Layout (FFCV 1.0.2, `ffcv/types.py`): a header, a description of each field, one fixed-size record per sample, pages of
image bytes, and at the end a table of (sample, place, size). FFCV itself reads what is written here. Beside a file
lies its manifest, `<name>.beton.json`: what it was made from and a checksum of every page.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from loaders.errors import DataError
from loaders.files import aside

_VERSION = 2
_HEADER = np.dtype(
    [("version", "<u2"), ("num_fields", "<u2"), ("page_size", "<u4"), ("num_samples", "<u8"), ("table", "<u8")],
    align=True,
)
_FIELD = np.dtype([("type", "<u1"), ("name", ("<u1", 16)), ("arguments", ("<u1", (1024,)))], align=True)
_IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("place", "<u8")])
# Records by FFCV's type numbers: float, int, image; bytes and arrays only have their place in the record.
_TYPES = {0: np.dtype("<f8"), 1: np.dtype("<i8"), 2: _IMAGE}
_TABLE = np.dtype([("sample", "<u8"), ("place", "<u8"), ("size", "<u8")])
_JPEG_MODE, _RAW_MODE = 0, 1
PAGE_SIZES = (1 << 21, 1 << 31)  # what FFCV accepts
MAX_SIDE = 65535  # of an image, in the record
MAX_CLASSES = 1_000_000  # more are an error of whoever wrote the labels


class Beton(NamedTuple):
    """The records of a file, N samples."""

    classes: list[str]
    label: NDArray[np.int64] | None  # None without labels
    width: NDArray[np.int32]
    height: NDArray[np.int32]
    is_raw: NDArray[np.bool_]
    offset: NDArray[np.int64]
    length: NDArray[np.int64]
    page_size: int
    manifest: dict[str, Any] | None


def manifest_path(path: Path) -> Path:
    """The manifest beside a file."""
    return path.with_name(path.name + ".json")


def read(path: Path) -> Beton:
    """Read the records of a file and check them against its size and its manifest.

    Raises:
        DataError: it is not a whole `.beton` with an image, or not the one of its manifest.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            header, image, label, table = _records(file, size)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except _Damaged as error:
        raise DataError(f"{path}: is not a whole .beton file: {error}") from None
    order = np.argsort(table["place"], kind="stable")
    found = np.searchsorted(table["place"][order], image["place"])
    row = order[np.minimum(found, len(order) - 1)] if len(order) else np.zeros(0, dtype=np.int64)
    if len(image) and (len(order) == 0 or not np.array_equal(table["place"][row], image["place"])):
        raise DataError(f"{path}: is not a whole .beton file: an image has no place in its table")
    offset, length = table["place"][row].astype(np.int64), table["size"][row].astype(np.int64)
    if len(image) and (offset.min() < 0 or length.min() < 0 or (offset > size - length).any()):
        raise DataError(f"{path}: is not a whole .beton file: an image lies beyond its end")
    if label is not None and len(label) and not 0 <= label.min() <= label.max() < MAX_CLASSES:
        raise DataError(f"{path}: labels from {label.min()} to {label.max()}; expected 0 to {MAX_CLASSES - 1}")
    manifest = _manifest(path, size)
    last = -1 if label is None else int(label.max(initial=-1))
    classes = manifest["classes"] if manifest else [str(number) for number in range(last + 1)]
    if last >= len(classes):
        raise DataError(f"{path}: label {last}, its manifest has {len(classes)} classes")
    return Beton(
        classes=classes,
        label=None if label is None else label.astype(np.int64),
        width=image["width"].astype(np.int32),
        height=image["height"].astype(np.int32),
        is_raw=image["mode"] == _RAW_MODE,
        offset=offset,
        length=length,
        page_size=int(header["page_size"]),
        manifest=manifest,
    )


class _Damaged(Exception):
    pass


def _records(file: Any, size: int) -> tuple[Any, Any, Any, Any]:
    def array(dtype: np.dtype[Any], count: int, at: int) -> Any:
        if count < 0 or at < 0 or at + count * dtype.itemsize > size:
            raise _Damaged(f"it has {size} bytes and needs {at + count * dtype.itemsize}")
        file.seek(at)
        return np.frombuffer(file.read(count * dtype.itemsize), dtype=dtype)

    header = array(_HEADER, 1, 0)[0]
    if header["version"] != _VERSION:
        raise _Damaged(f"version {header['version']}, expected {_VERSION}")
    num_samples, table_at = int(header["num_samples"]), int(header["table"])
    fields = array(_FIELD, int(header["num_fields"]), _HEADER.itemsize)
    names = [bytes(field["name"]).rstrip(b"\0").decode("ascii", "replace") for field in fields]
    unknown = [int(field["type"]) for field in fields if int(field["type"]) not in _TYPES]
    if unknown:
        raise _Damaged(f"a field of type {unknown[0]}; expected images, integers and floats")
    types = [int(field["type"]) for field in fields]
    if types.count(2) != 1:
        raise _Damaged(f"fields {', '.join(names)}; expected one image, and an integer label where there are labels")
    record = np.dtype([(f"f{number}", _TYPES[kind]) for number, kind in enumerate(types)], align=True)
    samples = array(record, num_samples, _HEADER.itemsize + fields.nbytes)
    if table_at == 0:
        raise _Damaged("its writer did not finish")
    table = array(_TABLE, (size - table_at) // _TABLE.itemsize, table_at)
    integers = [number for number, kind in enumerate(types) if kind == 1]
    number = next((number for number in integers if names[number] == "label"), integers[0] if integers else None)
    label = None if number is None else samples[f"f{number}"]
    return header, samples[f"f{types.index(2)}"], label, table


def _manifest(path: Path, size: int) -> dict[str, Any] | None:
    """The manifest of a file, or None for one that FFCV wrote."""
    beside = manifest_path(path)
    try:
        manifest = json.loads(beside.read_text(encoding="utf-8"))
        expected = int(manifest["bytes"])
        is_of_file = expected == size and manifest["records_sha256"] == _records_digest(path, manifest)
        classes = [str(name) for name in manifest["classes"]]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise DataError(
            f"{beside}: is not the manifest of a .beton file: {error!r}; remove it or write both again"
        ) from None
    if not is_of_file:
        raise DataError(
            f"{path}: is not the file that {beside.name} describes ({size:,} bytes, expected {expected:,}, or other "
            "records); write it again with tools/convert_imagenet_to_ffcv.py"
        )
    return {**manifest, "classes": classes}


def _records_digest(path: Path, manifest: dict[str, Any]) -> str:
    """Hash of all that is neither a page nor padding: what a reader trusts."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        first = int(manifest["first_page"])
        digest.update(file.read(min(first, 1 << 31)))
        file.seek(first + len(manifest["pages_crc32"]) * int(manifest["page_size"]))
        digest.update(file.read())
    return digest.hexdigest()


def damaged_pages(path: Path, manifest: dict[str, Any]) -> Iterator[tuple[int, bool]]:
    """Read every page again: (its number, whether it differs from what was written)."""
    with open(path, "rb") as file:
        file.seek(manifest["first_page"])
        for number, expected in enumerate(manifest["pages_crc32"]):
            yield number, zlib.crc32(file.read(manifest["page_size"])) != expected


class Sample(NamedTuple):
    """One image to write."""

    content: bytes
    is_raw: bool
    width: int
    height: int
    label: int | None


def write(
    path: Path,
    samples: Iterable[Sample],
    *,
    at_most: int,
    page_size: int,
    facts: dict[str, Any],
    has_labels: bool = True,
) -> int:
    """Write a file and its manifest, aside and then renamed: what has the name is whole.

    Args:
        at_most: room is made for the records of this many samples.
        page_size: bytes; a sample lies in one page. Between `PAGE_SIZES`.
        facts: further entries of the manifest, `classes` among them.
        has_labels: whether the samples have labels; without them the file has no field for one.

    Returns:
        The number of samples.

    Raises:
        DataError: a sample is larger than a page.
        OSError: it cannot be written; nothing is left of it.
    """
    beside = manifest_path(path)
    with aside(beside) as manifest_out:
        with aside(path, durable=True) as out:
            with open(out.part, "wb") as file:
                writer = _Writer(file, at_most, page_size, has_labels)
                for sample in samples:
                    writer.add(sample)
                writer.finish()
            manifest = {
                "format": "beton 2",
                **facts,
                "count": writer.count,
                "bytes": out.part.stat().st_size,
                "page_size": page_size,
                "first_page": writer.first_page,
                "pages_crc32": writer.checksums,
            }
            manifest["records_sha256"] = _records_digest(out.part, manifest)
            manifest_out.part.write_text(json.dumps(manifest), encoding="utf-8")
            beside.unlink(missing_ok=True)  # an old manifest beside the new file would be a lie
    return writer.count


class _Writer:
    def __init__(self, file: Any, at_most: int, page_size: int, has_labels: bool) -> None:
        self.file, self.page_size, self.count, self.has_labels = file, page_size, 0, has_labels
        fields = [(2, b"image"), (1, b"label")][: 1 + has_labels]
        self.record = np.dtype([(f"f{number}", _TYPES[kind]) for number, (kind, _) in enumerate(fields)], align=True)
        self.records = np.zeros(at_most, dtype=self.record)
        self.fields = np.zeros(len(fields), dtype=_FIELD)
        for field, (kind, name) in zip(self.fields, fields, strict=True):
            field["type"] = kind
            field["name"][: len(name)] = np.frombuffer(name, dtype="<u1")
        self.records_at = _HEADER.itemsize + self.fields.nbytes
        self.first_page = -(-(self.records_at + self.records.nbytes) // page_size) * page_size
        self.table: list[tuple[int, int, int]] = []
        self.page = bytearray()
        self.checksums: list[int] = []
        file.seek(self.first_page)

    def add(self, sample: Sample) -> None:
        size = len(sample.content)
        if size > self.page_size:
            raise DataError(
                f"an image of {sample.width}x{sample.height} pixels takes {size:,} bytes, a page has "
                f"{self.page_size:,}; expected a smaller maximum side or larger pages"
            )
        if len(self.page) + size > self.page_size:
            self._end_page()
        place = self.first_page + len(self.checksums) * self.page_size + len(self.page)
        self.page += sample.content
        mode = _RAW_MODE if sample.is_raw else _JPEG_MODE
        image = (mode, sample.width, sample.height, place)
        self.records[self.count] = (image, sample.label) if self.has_labels else (image,)
        self.table.append((self.count, place, size))
        self.count += 1

    def _end_page(self) -> None:
        page = bytes(self.page).ljust(self.page_size, b"\0")
        self.checksums.append(zlib.crc32(page))
        self.file.write(page)
        self.page = bytearray()

    def finish(self) -> None:
        if self.page:
            self._end_page()
        end = self.file.tell()
        self.file.write(np.array(self.table, dtype=_TABLE).tobytes())
        header = np.zeros(1, dtype=_HEADER)
        header["version"], header["num_fields"], header["page_size"] = _VERSION, len(self.fields), self.page_size
        header["num_samples"], header["table"] = self.count, end
        self.file.seek(0)
        self.file.write(header.tobytes() + self.fields.tobytes() + self.records[: self.count].tobytes())
