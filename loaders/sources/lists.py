"""A list file: `<image> <class>` on each line, paths relative to the list."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from loaders.beton import MAX_CLASSES
from loaders.errors import DataError
from loaders.index import Index
from loaders.sources.folders import File, index_of

SUFFIXES = (".txt", ".tsv", ".lst")


def claims(root: Path) -> bool:
    """By the ending of its name."""
    return root.suffix in SUFFIXES and not root.is_dir()


def open_index(root: Path, max_pixels: int) -> Index:
    """Images keep the list's order. Integers are used as labels unchanged, words are names of classes."""
    try:
        lines = root.read_bytes().splitlines()
    except OSError as error:
        raise DataError(f"{root}: cannot be read: {error.strerror}") from None
    entries = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        parts = line.rsplit(b"\t" if b"\t" in line else None, 1)
        if len(parts) != 2:
            raise DataError(f"{root}: line {number}: expected `<image> <class>`, got {line[:80]!r}")
        name = parts[0]
        if name.startswith(b"/") or b"\0" in name or b".." in name.split(b"/"):
            raise DataError(f"{root}: line {number}: expected a path below the list's folder, got {name[:80]!r}")
        try:
            status = os.stat(os.path.join(os.fsencode(root.parent), name))
        except OSError as error:
            raise DataError(f"{root}: line {number}: {name[:80]!r}: {error.strerror}") from None
        entries.append((name, parts[1].strip().decode("utf-8", "backslashreplace"), status))
    if not entries:
        raise DataError(f"{root}: no images; expected `<image> <class>` on each line")
    classes, label = number_classes([word for _, word, _ in entries])
    files = [File(name, n, s.st_size, s.st_mtime_ns) for (name, _, s), n in zip(entries, label, strict=True)]
    return index_of(root, root.parent, classes, files, max_pixels)


def number_classes(words: Sequence[str]) -> tuple[list[str], list[int]]:
    """Class names and the position of each word among them; integers from 0 keep their value.

    Raises:
        DataError: an integer that is not a plausible label.
    """
    if all(word.isdecimal() for word in words):
        last = max(map(int, words))
        if last >= MAX_CLASSES:
            raise DataError(f"label {last}; expected 0 to {MAX_CLASSES - 1}")
        return [str(number) for number in range(last + 1)], [int(word) for word in words]
    classes = sorted(set(words))
    label = {word: number for number, word in enumerate(classes)}
    return classes, [label[word] for word in words]
