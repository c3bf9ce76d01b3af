"""Parquet files in the Hugging Face form: a column `image` of {bytes, path}, and a column `label` if there are labels.

A row of Parquet cannot be read alone: its bytes lie compressed among those of hundreds of others. So the images are
copied once into a file of the cache, as they are, and read from there.
"""

from __future__ import annotations

import json
import os
import shutil
from array import array
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from loaders import headers, index_file
from loaders.config import Request
from loaders.errors import DataError
from loaders.files import aside
from loaders.index import Index, Names, Pieces
from loaders.sources.lists import number_classes
from loaders.sources.shards import expand, folder_of, in_folder, matching

WHAT = "Parquet files"
_ROWS = 64  # that are in memory at a time
HOW_TO_INSTALL = "Parquet needs pyarrow: pip install pyarrow"


def claims(root: Path) -> bool:
    """By the ending of its name, or because the folder holds such a file."""
    return bool(in_folder(root, ".parquet")) if os.path.isdir(root) else root.suffix.lower() == ".parquet"


def open_index(root: Path, request: Request) -> Index:
    """Images keep the files' order.

    Raises:
        DataError: a file is missing or damaged, has no images, or pyarrow is not installed; or there is no room.
    """
    files = _files_of(root)
    stamp = index_file.stamp_of(files)
    key = ("parquet", request.labels or "")
    path = index_file.cache_path(root, *key)
    if path is None:
        raise DataError(f"{root}: Parquet is copied into a cache, and there is no place for one; set XDG_CACHE_HOME")
    copy = path.with_name(f"{path.stem}-{stamp[:16]}.images")

    def make() -> Index:
        return _unpacked(root, files, copy, request)

    places = [os.fsencode(copy)]
    if copy.exists():
        index = index_file.cached(root, key, stamp, request.max_pixels, make).at(root, places)
        if not index_file.short_pieces(index):
            return index
    return index_file.stored(make(), path, stamp).at(root, places)  # an index alone is worth nothing


def _files_of(root: Path) -> list[bytes]:
    if os.path.isdir(root):
        return [os.fsencode(path) for path in in_folder(root, ".parquet")]
    found = [file for pattern in expand(str(root)) for file in matching(pattern) or [pattern]]
    for file in found:
        if not os.path.isfile(file):
            raise DataError(
                f"{file}: no such file; expected Parquet files such as {os.path.dirname(file) or '.'}/*.parquet"
            )
    return [os.fsencode(file) for file in sorted(set(found))]


class _Column(NamedTuple):
    image: str
    label: str | None
    names: list[str] | None  # of the classes


def _columns_of(file: str, schema: Any) -> _Column:
    import pyarrow as pa

    names = None
    try:
        described = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        names = [str(name) for name in described["label"]["names"]]
    except (ValueError, KeyError, TypeError):
        pass
    image = next(
        (
            field.name
            for field in schema
            if field.name in ("image", "img", "jpg", "png")
            and (
                pa.types.is_binary(field.type)
                or pa.types.is_large_binary(field.type)
                or (pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0)
            )
        ),
        None,
    )
    if image is None:
        raise DataError(f"{file}: has columns {', '.join(schema.names)}; expected one `image` of {{bytes, path}}")
    return _Column(image, "label" if "label" in schema.names else None, names)


def _unpacked(root: Path, files: list[bytes], copy: Path, request: Request) -> Index:
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise DataError(f"{root}: {HOW_TO_INSTALL}") from None
    offset, length = array("q"), array("q")
    words: list[Any] = []
    column: _Column | None = None
    names_of: list[bytes] = []
    needed = sum(os.path.getsize(file) for file in files)
    copy.parent.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(copy.parent).free) < needed:
        raise DataError(
            f"{root}: its images are copied once into {copy.parent}, which has {free / 2**30:.1f} GiB free of the "
            f"{needed / 2**30:.1f} that they need; set XDG_CACHE_HOME to a larger place"
        )
    for old in copy.parent.glob(f"{copy.name.split('-')[0]}-*.images"):  # of files that have changed since
        old.unlink(missing_ok=True)
    try:
        with (
            aside(copy.with_name(copy.name.split("-")[0])) as out,  # one name for all: what a killed copy left goes
            open(out.part, "wb") as images,
            tqdm(total=needed, desc=f"copying {root}", unit="B", unit_scale=True, disable=None) as bar,
        ):
            at, out.path = 0, copy
            folder = folder_of(files)
            for file in map(os.fsdecode, files):
                name = os.path.relpath(file, folder)
                with pq.ParquetFile(file) as table:
                    found = _columns_of(file, table.schema_arrow)
                    column = column or found
                    if (found.label is None) != (column.label is None) and request.labels != "none":
                        raise DataError(
                            f"{file}: has {'no' if found.label is None else 'a'} column `label`, unlike "
                            f"{os.fsdecode(files[0])}; expected it in all files, or data.labels=none"
                        )
                    wanted = [found.image, *([found.label] if found.label else [])]
                    row = 0
                    for batch in table.iter_batches(_ROWS, columns=wanted):
                        columns = batch.to_pydict()
                        words += columns[found.label] if found.label else []
                        for image in columns[found.image]:
                            content = (image.get("bytes") if isinstance(image, dict) else image) or b""
                            images.write(content)
                            offset.append(at)
                            length.append(len(content))
                            at += len(content)
                            names_of.append(os.fsencode(f"{name}/{row}"))
                            row += 1
                bar.update(os.path.getsize(file))
    except OSError as error:
        raise DataError(f"{root}: cannot be copied into {copy.parent}: {error.strerror or error}") from None
    except (ValueError, RuntimeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{root}: cannot be read as Parquet: {str(error).splitlines()[0]}") from None
    if not names_of:
        raise DataError(f"{root}: no images; expected rows in its Parquet files")
    classes, label = _labels(root, words, column) if words and request.labels != "none" else ([], None)
    count = len(names_of)
    pieces = Pieces(
        [os.fsencode(copy)],
        np.zeros(count, dtype=np.int32),
        np.frombuffer(offset, dtype=np.int64),
        np.frombuffer(length, dtype=np.int64),
    )
    facts = headers.of_pieces(root, pieces)
    return Index(
        root=root,
        classes=classes,
        names=Names.of(names_of),
        label=label,
        pieces=pieces,
        reading=f"Parquet with {len(classes)} classes" if label is not None else "Parquet without labels",
        **headers.columns(facts, request.max_pixels),
    )


def _labels(root: Path, words: list[Any], column: _Column | None) -> tuple[list[str], Any]:
    missing = [row for row, word in enumerate(words) if word is None or word == -1]
    if len(missing) == len(words):  # a test set whose labels are kept secret
        return [], None
    if missing:
        raise DataError(
            f"{root}: row {missing[0]} has no label, others have; expected all or none, or data.labels=none"
        )
    classes, label = number_classes(root, [str(word) for word in words])
    names = column.names if column else None
    return (names if names and len(names) >= len(classes) and all(isinstance(w, int) for w in words) else classes), (
        np.array(label, dtype=np.int32)
    )
