"""Tar shards (WebDataset): a folder of them, or a pattern such as `shards/*.tar`. They are read in place."""

from __future__ import annotations

import os
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from loaders import headers
from loaders.errors import DataError
from loaders.index import Index, Pieces
from loaders.machine import cores
from loaders.sources.folders import EXTENSIONS
from loaders.sources.lists import number_classes

_COMPRESSED = (".gz", ".tgz", ".zst", ".bz2", ".xz")


class _Member(NamedTuple):
    name: str
    word: str  # of its class
    offset: int
    length: int


def claims(root: Path) -> bool:
    """By the ending of its name, or because the folder holds a tar file."""
    return any(root.glob("*.tar")) if root.is_dir() else root.suffix in (*_COMPRESSED, ".tar")


def open_index(root: Path, max_pixels: int) -> Index:
    """Images keep the shards' order. The label is the sample's `.cls` member or else the folder that it lies in."""
    shards = _shards(root)

    def scan() -> headers.Arrays:
        members = _all_members(shards)
        pieces = [(shards[number], member.offset, member.length) for number, member in members]
        classes, label = number_classes([member.word for _, member in members])
        return {
            **headers.read_headers(root, pieces, headers.of_piece, max_pixels),
            "classes": np.array(classes),
            "paths": np.array([os.path.basename(shards[n]) + b"/" + os.fsencode(m.name) for n, m in members]),
            "label": np.array(label, dtype=np.int64),
            "shard": np.array([number for number, _ in members], dtype=np.int64),
            "offset": np.array([member.offset for _, member in members], dtype=np.int64),
            "length": np.array([member.length for _, member in members], dtype=np.int64),
        }

    stamps = (b"%s %d %d" % (path, (s := os.stat(path)).st_size, s.st_mtime_ns) for path in shards)
    arrays = headers.cached(root, stamps, max_pixels, scan)
    return Index(
        root=Path(os.fsdecode(os.path.dirname(shards[0]))),
        classes=arrays["classes"].tolist(),
        paths=arrays["paths"],
        label=arrays["label"],
        max_pixels=max_pixels,
        pieces=Pieces(shards, arrays["shard"].astype(np.int32), arrays["offset"], arrays["length"]),
        **headers.columns(arrays),
    )


def _shards(root: Path) -> list[bytes]:
    if root.suffix in _COMPRESSED and not root.is_dir():
        raise DataError(f"{root}: compressed shards cannot be read in place; expected plain .tar files")
    paths = root.glob("*.tar") if root.is_dir() else root.parent.glob(root.name)
    shards = [os.fsencode(path) for path in sorted(paths)]
    if not shards:
        raise DataError(f"{root}: no such shard; expected tar files such as {root.parent}/*.tar")
    return shards


def _all_members(shards: list[bytes]) -> list[tuple[int, _Member]]:
    """(number of the shard, member) of every image."""
    is_quiet = not sys.stderr.isatty() or len(shards) < 8
    with ThreadPoolExecutor(min(16, 2 * cores())) as pool:
        scanned = tqdm(pool.map(_members, shards), total=len(shards), desc="indexing", unit=" shards", disable=is_quiet)
        members = [(number, member) for number, of_shard in enumerate(scanned) for member in of_shard]
    if not members:
        raise DataError(f"{os.fsdecode(shards[0])}: no images in the shards, expected {', '.join(EXTENSIONS)}")
    return members


def _members(shard: bytes) -> list[_Member]:
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
    members = []
    for key, (name, offset, length) in images.items():
        word = labels.get(key) if labels else os.path.basename(os.path.dirname(name))
        if not word:
            raise DataError(f"{path}: {name}: has no label; expected {key}.cls in the shard, or a folder per class")
        members.append(_Member(name, word, offset, length))
    return members
