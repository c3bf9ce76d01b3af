"""A folder of images: one folder per class, a tree of any depth, or all in one place; and image files in general."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from loaders import headers, index_file
from loaders.config import Request
from loaders.errors import DataError
from loaders.index import Index, Names

WHAT = "images"
EXTENSIONS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".pbm", ".pnm", ".tif", ".tiff", ".webp",
)  # fmt: skip
_USUAL = {".jpg", ".JPG", ".png", ".PNG"}  # ends of most names: found without a lower-case copy
_OF_THE_SYSTEM = {
    "lost+found", "@eaDir", "@tmp", "#recycle", "#snapshot", "@Recycle", "@Recently-Snapshot", "$RECYCLE.BIN",
    "RECYCLER", "System Volume Information", "__MACOSX",
}  # fmt: skip
"""Folders that file systems and storage servers put beside the user's; some hold thumbnails."""


def claims(root: Path) -> bool:
    """A folder with an image somewhere in it."""
    return os.path.isdir(root) and _has_image(root)


def open_index(root: Path, request: Request) -> Index:
    """Rows in order of the folders in `root`, then of paths. These folders are the classes.

    Raises:
        DataError: there is no image, a folder cannot be listed, or labels are asked for and not all images have one.
    """
    folders, loose = _inside(root)
    folders.sort()
    loose.sort()
    has_folders = any(_has_image(root / name) for name in folders)
    if loose and has_folders and request.labels is None:
        raise DataError(
            f"{root}: holds both images ({loose[0]}) and folders of images, which can be read in two ways; set "
            "data.labels=none to take all of them without labels, or data.labels=auto for the folders as classes, "
            "without the others"
        )
    has_classes = has_folders and request.labels != "none"
    counts: list[int] = []

    def names() -> Iterator[bytes]:  # many at a time: a million names one by one take a second
        if not has_classes:
            yield _joined("", loose)
        for name in folders:
            below = [(place, here) for place, here in _walk(root / name, f"{name}/") if here]
            counts.append(sum(len(here) for _, here in below))
            if len(below) == 1:
                place, here = below[0]
                here.sort()
                yield _joined(place, here)
            else:
                yield _joined("", sorted(place + image for place, here in below for image in here))

    found = Names.of_parts(names())
    if not len(found):
        others = [name for name in os.listdir(root) if name[0] != "." and not os.path.isdir(root / name)]
        there = f"; found {len(others)} others, such as {min(others)}" if others else ""
        raise DataError(f"{root}: no images; expected files ending in {', '.join(EXTENSIONS)}{there}")
    if not has_classes:
        return index_of(root, root, found, None, [], "images without labels", request)
    empty = [name for name, count in zip(folders, counts, strict=True) if not count]
    if empty and request.asks_labels:
        raise DataError(
            f"{root / empty[0]}: class without images; expected files ending in {', '.join(EXTENSIONS)}, "
            "remove the folder or fill it"
        )
    classes = [name for name in folders if name not in set(empty)]
    label = np.repeat(np.arange(len(classes), dtype=np.int32), [count for count in counts if count])
    number = "one folder as the only class" if len(classes) == 1 else f"{len(classes)} folders as classes"
    reading = f"{number} (data.labels=none: the same images without labels)"
    if loose:
        reading += f", without the {len(loose)} images beside them"
    return index_of(root, root, found, label, classes, reading, request)


def _joined(place: str, names: list[str]) -> bytes:
    return os.fsencode(place + f"\0{place}".join(names) + "\0") if names else b""


def _inside(folder: str | Path) -> tuple[list[str], list[str]]:
    """Names of the folders and of the images right in a folder."""
    folders, images = [], []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:  # one at a time: an entry takes three times as much memory as its name
                name = entry.name
                if name[0] == ".":
                    continue
                if not entry.is_file(follow_symlinks=False) and _is_folder(entry):
                    folders.append(name)
                elif name[-4:] in _USUAL or name.lower().endswith(EXTENSIONS):
                    images.append(name)
    except FileNotFoundError:
        raise DataError(f"{folder}: no such folder; expected images in it, or one folder of images per class") from None
    except NotADirectoryError:
        raise DataError(
            f"{folder}: is no folder, and its name says of no list or shards that it is one; expected a folder of "
            "images, or a file that ends in .txt, .tsv, .lst, .tar, .parquet, .beton or .index"
        ) from None
    except OSError as error:  # left out in silence, its images would be missing from the data set
        raise DataError(f"{folder}: cannot be listed: {error.strerror}") from None
    return [name for name in folders if name not in _OF_THE_SYSTEM], images


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle
        return False


def _walk(folder: str | Path, prefix: str, above: tuple[tuple[int, int], ...] = ()) -> Iterator[tuple[str, list[str]]]:
    """Every folder in a folder, itself first, and the images right in it, as the prefix of their paths and their names.
    Links are followed, but not in circles."""
    try:
        here = os.stat(folder)
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed: {error.strerror}") from None
    if (here.st_dev, here.st_ino) in above:
        return
    folders, images = _inside(folder)
    yield prefix, images
    for name in folders:
        yield from _walk(os.path.join(folder, name), f"{prefix}{name}/", (*above, (here.st_dev, here.st_ino)))


def _has_image(folder: str | Path) -> bool:
    return any(names for _, names in _walk(folder, ""))


def index_of(
    root: Path,
    base: Path,
    names: Names,
    label: NDArray[np.int32] | None,
    classes: list[str],
    reading: str,
    request: Request,
) -> Index:
    """The index of image files, from the cache where nothing changed; only changed files are read again.

    Args:
        root: what `data.train` names: the key of the cache.
        base: the folder that the names are relative to.
    """
    digest = hashlib.sha256(names.blob.data)
    digest.update(b"" if label is None else label.data)
    digest.update("\0".join([reading, *classes]).encode("utf-8", "surrogateescape"))
    stamp = f"files {digest.hexdigest()}"
    path = index_file.cache_path(root, "files", request.labels or "")
    if path is not None and index_file.stamp_in(path) == stamp:
        try:
            known = index_file.open_file(path, max_pixels=request.max_pixels, root=base)
        except DataError:
            pass  # damaged: it is made again
        else:
            now = headers.refreshed(known, base)
            return known if now is known else index_file.stored(now, path, stamp)
    facts = headers.of_files(root, base, names)
    index = Index(
        root=base,
        classes=classes,
        names=names,
        label=label,
        reading=reading,
        **headers.columns(facts, request.max_pixels),
    )
    return index_file.stored(index, path, stamp)
