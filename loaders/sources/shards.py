"""Tar shards (WebDataset): a folder of them, or a pattern such as `shards/*.tar` or `part-{000..146}.tar`. They are
read in place."""

from __future__ import annotations

import glob
import itertools
import logging
import os
import posixpath
import re
import sys
import tarfile
from array import array
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from loaders import headers, index_file
from loaders.config import Request
from loaders.errors import DataError
from loaders.index import Index, Names, Pieces
from loaders.machine import cores
from loaders.sources.folders import EXTENSIONS
from loaders.sources.lists import Words

WHAT = "tar shards"
_COMPRESSED = (".gz", ".tgz", ".zst", ".bz2", ".xz")
_COUNT = re.compile(r"(\d{1,18})\.\.(\d{1,18})(?:\.\.(\d{1,18}))?", re.ASCII)
_MOST = 1_000_000  # names that one pattern may stand for
_LABEL_BYTES = 1000  # a `.cls` member has a few
logger = logging.getLogger("burn.loaders")


def claims(root: Path) -> bool:
    """By the ending of its name, or because the folder holds a tar file."""
    return bool(in_folder(root, ".tar")) if os.path.isdir(root) else root.suffix.lower() in (*_COMPRESSED, ".tar")


def open_index(root: Path, request: Request) -> Index:
    """Images keep the shards' order. The label is the sample's `.cls` member or else the folder that it lies in.

    Raises:
        DataError: a shard is missing or damaged, or only some images have a label.
    """
    shards = files_of(root)

    def make() -> Index:
        return _index_of(root, shards, request)

    key = ("shards", request.labels or "")
    index = index_file.cached(root, key, index_file.stamp_of(shards), request.max_pixels, make)
    if index.unread:  # what the machine did not let us read may be sound
        path = index_file.cache_path(root, *key)
        index = index_file.stored(_index_of(root, shards, request), path, index_file.stamp_of(shards))
    return index.at(folder_of(shards), shards)


def files_of(root: Path) -> list[bytes]:
    """The shards that a folder, a name or a pattern stands for, sorted.

    Raises:
        DataError: there is none, one is missing, or they are compressed.
    """
    if root.suffix.lower() in _COMPRESSED and not os.path.isdir(root):
        raise DataError(f"{root}: compressed shards cannot be read in place; expected plain .tar files")
    shards: list[str] = []
    for pattern in expand(str(root)):
        found = in_folder(Path(pattern), ".tar") if os.path.isdir(pattern) else matching(pattern)
        if not found:
            folder = os.path.dirname(pattern) or "."
            raise DataError(f"{pattern}: no such shard; expected tar files such as {folder}/*.tar")
        shards += found
    return [os.fsencode(shard) for shard in sorted(set(shards))]


def matching(pattern: str) -> list[str]:
    """The files of a name or a pattern with `*`, `?` and `[...]`; what is there as it is written is no pattern."""
    there, rest = _as_written(pattern)
    return [pattern] if not rest else sorted(glob.glob(glob.escape(there) + rest))


def expand(pattern: str) -> list[str]:
    """The names that braces stand for, as in a shell: `{000..146}` counts with leading zeros, `{a,b}` lists, one pair
    may lie in another. What is there as it is written is no pattern.

    Raises:
        DataError: they stand for more names than any data set has.
    """
    there, rest = _as_written(pattern)
    names = [there + name for name in itertools.islice(_expanded(rest), _MOST + 1)]
    if len(names) > _MOST:
        raise DataError(f"{pattern}: stands for more than {_MOST:,} files; expected those that there are")
    return names


def _as_written(pattern: str) -> tuple[str, str]:
    """The part of a path that is there, character for character, and the rest."""
    end = len(pattern)
    while end > 0 and not os.path.exists(pattern[:end]):
        end = pattern.rfind("/", 0, end)
    return (pattern[:end], pattern[end:]) if end > 0 else ("", pattern)


def _expanded(text: str) -> Iterator[str]:
    for start, end in _pairs(text):
        body = text[start + 1 : end]
        if count := _COUNT.fullmatch(body):
            first, last, step = int(count[1]), int(count[2]), int(count[3] or 1) or 1
            is_padded = any(len(number) > 1 and number.startswith("0") for number in (count[1], count[2]))
            width = max(len(count[1]), len(count[2])) if is_padded else 0
            numbers = range(first, last + 1, step) if first <= last else range(first, last - 1, -step)
            choices: Iterator[str] = (f"{number:0{width}d}" for number in numbers)
        elif len(parts := _split(body)) > 1:
            choices = (name for part in parts for name in _expanded(part))
        else:
            continue
        for choice in choices:
            for rest in _expanded(text[end + 1 :]):
                yield text[:start] + choice + rest
        return
    yield text


def _pairs(text: str) -> Iterator[tuple[int, int]]:
    """Where each `{` and the `}` that belongs to it are."""
    for start, sign in enumerate(text):
        depth = 0
        for end in range(start, len(text)) if sign == "{" else ():
            depth += (text[end] == "{") - (text[end] == "}")
            if not depth:
                yield start, end
                break


def _split(text: str) -> list[str]:
    """Parts between the commas that lie in no pair of braces."""
    parts, depth = [""], 0
    for sign in text:
        depth += (sign == "{") - (sign == "}")
        if sign == "," and not depth:
            parts.append("")
        else:
            parts[-1] += sign
    return parts


def in_folder(root: Path, ending: str) -> list[str]:
    """The files in a folder whose names end so, without those that are hidden, sorted."""
    try:
        names = os.listdir(root)
    except OSError:  # a source that needs the folder says so
        return []
    found = (os.path.join(root, name) for name in names if name.lower().endswith(ending) and name[0] != ".")
    return sorted(path for path in found if not os.path.isdir(path))


def folder_of(shards: list[bytes]) -> Path:
    """The folder that all shards lie in or below."""
    folders = {os.path.dirname(shard) for shard in shards}
    common = folders.pop() if len(folders) == 1 else os.path.commonpath(map(os.path.abspath, folders))
    return Path(os.fsdecode(common))


def _index_of(root: Path, shards: list[bytes], request: Request) -> Index:
    words, folder = Words(), folder_of(shards)
    file, offset, length = array("i"), array("q"), array("q")
    labeled: tuple[str, str] | None = None  # an image with a label, and one without
    unlabeled: tuple[str, str] | None = None

    def names() -> Iterator[bytes]:
        nonlocal labeled, unlabeled
        is_quiet = not sys.stderr.isatty() or len(shards) < 8
        with ThreadPoolExecutor(min(16, 2 * cores())) as pool:
            # Few at a time: what was found in a shard is let go before the next one is looked at.
            for first in range(0, len(shards), 64):
                scanned = pool.map(_scan, shards[first : first + 64])
                bar = tqdm(scanned, "looking into shards", len(shards), initial=first, unit=" shards", disable=is_quiet)
                for number, shard in enumerate(bar, first):
                    path = os.fsdecode(shards[number])
                    prefix = os.fsencode(os.path.relpath(path, folder)) + b"/"
                    for member in shard.members:
                        file.append(number)
                        offset.append(member.offset)
                        length.append(member.length)
                        words.add(member.word)
                        if member.word is None:
                            unlabeled = unlabeled or (path, member.name)
                        else:
                            labeled = labeled or (path, member.name)
                        yield prefix + os.fsencode(member.name)
                    if shard.left_out:
                        logger.warning(f"{path}: {len(shard.left_out)} members are left out: {_some(shard.left_out)}")

    found = Names.of(names())
    if not len(found):
        raise DataError(f"{os.fsdecode(shards[0])}: no images in the shards, expected {', '.join(EXTENSIONS)}")
    if labeled and unlabeled and request.labels != "none":
        raise DataError(
            f"{unlabeled[0]}: {unlabeled[1]}: has no label, {labeled[1]} of {os.path.basename(labeled[0])} has one; "
            "expected a .cls member or a folder for every image, or data.labels=none"
        )
    pieces = Pieces(
        shards,
        np.frombuffer(file, dtype=np.int32),
        np.frombuffer(offset, dtype=np.int64),
        np.frombuffer(length, dtype=np.int64),
    )
    has_labels = bool(words) and request.labels != "none"
    classes, label = words.numbered(root) if has_labels else ([], None)
    facts = headers.of_pieces(root, pieces)
    return Index(
        root=folder,
        classes=classes,
        names=found,
        label=label,
        pieces=pieces,
        reading=f"shards, classes: {len(classes)}" if has_labels else "shards without labels",
        **headers.columns(facts, request.max_pixels),
    )


def _some(names: list[str]) -> str:
    return "; ".join(names[:5]) + (f"; and {len(names) - 5} more" if len(names) > 5 else "")


class _Member(NamedTuple):
    name: str
    word: str | None  # of its class
    offset: int
    length: int


class _Shard(NamedTuple):
    members: list[_Member]
    left_out: list[str]  # images in it that are not used, and why


def _scan(shard: bytes) -> _Shard:
    path = os.fsdecode(shard)
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, str] = {}
    left_out: list[str] = []
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                name = member.name
                base = posixpath.basename(name)
                is_image = base.lower().endswith(EXTENSIONS)
                if base.startswith("."):
                    continue
                if is_image and name in images:
                    left_out.append(f"{name} (more than once in the shard, the last one is used)")
                if member.isreg() and not member.issparse() and is_image:
                    images[name] = (member.offset_data, member.size)
                elif is_image and (member.islnk() or member.issym()):
                    target = member.linkname
                    if member.issym():
                        target = posixpath.normpath(posixpath.join(posixpath.dirname(name), target))
                    if target in images:
                        images[name] = images[target]
                    else:
                        left_out.append(f"{name} (a link to {member.linkname}, which is not before it in the shard)")
                elif is_image and not member.isdir():
                    left_out.append(f"{name} (sparse, or not a file)")
                elif member.isreg() and base.lower().endswith(".cls") and member.size < _LABEL_BYTES:
                    file = tar.extractfile(member)
                    assert file
                    labels[name[:-4]] = file.read().decode("utf-8", "backslashreplace").strip()
            _check_end(path, tar)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (tarfile.TarError, EOFError) as error:
        raise DataError(f"{path}: is not a whole tar file: {error}") from None
    members = []
    for name in _one_of_each_sample(images, left_out):
        word = _label_of(name, labels) if labels else _folder_name(name)
        members.append(_Member(name.split("\0")[0], word, *images[name]))
    return _Shard(members, left_out)


def _check_end(path: str, tar: tarfile.TarFile) -> None:
    """See that no member is missing where the headers end: Python reads on to the first that is damaged, in silence."""
    assert tar.fileobj
    tar.fileobj.seek(tar.offset)
    block = tar.fileobj.read(tarfile.BLOCKSIZE)
    if block.strip(b"\0"):
        raise tarfile.ReadError(f"the header of a member is damaged at byte {tar.offset:,}")
    if not block:
        logger.warning(f"{path}: has no mark at its end; it may be cut short")


def _key(name: str) -> str:
    """What the members of a WebDataset sample share: the name up to the first dot of its last part."""
    folder, base = posixpath.split(name)
    return posixpath.join(folder, base.partition(".")[0])


def _one_of_each_sample(images: dict[str, tuple[int, int]], left_out: list[str]) -> Iterator[str]:
    """Names without the masks and depth maps of a sample (`a.seg.png` beside `a.jpg`). Where no name of a key is plain
    (`img.0001.jpg`, `img.0002.jpg`), dots are part of the names, and each is an image of its own."""
    of_key: dict[str, list[str]] = defaultdict(list)
    for name in images:
        of_key[_key(name)].append(name)
    for name in images:
        key = _key(name)
        plain = [other for other in of_key[key] if "." not in other[len(key) + 1 :]]
        if len(of_key[key]) > 1 and plain and name not in plain:
            left_out.append(f"{name} (belongs to {plain[0]})")
        else:
            yield name


def _folder_name(name: str) -> str | None:
    """Of the folder that a member lies in; `./a.jpg` lies in none."""
    return posixpath.basename(posixpath.dirname(posixpath.normpath(name))) or None


def _label_of(name: str, labels: dict[str, str]) -> str | None:
    return labels.get(posixpath.splitext(name)[0]) or labels.get(_key(name)) or None
