"""A list file: `<image>` or `<image> <class>` on each line, paths relative to the list or absolute."""

from __future__ import annotations

import codecs
import os
import re
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from loaders.beton import MAX_CLASSES
from loaders.config import Request
from loaders.errors import DataError
from loaders.index import Index, Names
from loaders.sources.folders import EXTENSIONS, index_of

WHAT = "a list"
SUFFIXES = (".txt", ".tsv", ".lst")
_INTEGER = re.compile(r"-?[0-9]+")
_ENDINGS = tuple(extension.encode() for extension in EXTENSIONS)


def claims(root: Path) -> bool:
    """By the ending of its name."""
    return root.suffix.lower() in SUFFIXES and not os.path.isdir(root)


def open_index(root: Path, request: Request) -> Index:
    """Images keep the list's order. Integers are used as labels unchanged, words are names of classes.

    Raises:
        DataError: it cannot be read, a line is not as expected, or a file that it names is not there.
    """
    words = Words()

    def paths() -> Iterator[bytes]:
        for _, name, word in _lines(root):
            words.add(word)
            yield name

    names = Names.of(paths())
    if not len(names):
        raise DataError(f"{root}: no images; expected `<image>` or `<image> <class>` on each line")
    if request.labels == "none" or not words:
        reading = "a list without labels" if not words else "a list, its classes left out"
        index = index_of(root, root.parent, names, None, [], reading, request)
    else:
        classes, label = words.numbered(root)
        index = index_of(root, root.parent, names, label, classes, f"a list with {len(classes)} classes", request)
    for row in sorted(index.unread):
        if "No such file" in index.problems[row]:
            number = next(number for at, (number, _, _) in enumerate(_lines(root)) if at == row)
            raise DataError(f"{root}: line {number}: {index.path(row)}: no such file; expected a path relative to the "
                            "list's folder, or an absolute one")  # fmt: skip
    return index


def _lines(root: Path) -> Iterator[tuple[int, bytes, str | None]]:
    """Number, path and class of every line that is not empty; the first one says whether there are classes."""
    try:
        with open(root, "rb") as file:
            start = file.read(4)
            if start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                raise DataError(f"{root}: is UTF-16; expected UTF-8 or plain bytes")
            file.seek(len(codecs.BOM_UTF8) if start.startswith(codecs.BOM_UTF8) else 0)
            has_classes: bool | None = None
            for number, line in enumerate(file, 1):
                line = line.rstrip(b"\r\n")
                if not line.strip():
                    continue
                name, word = _parts(line)
                if has_classes is None:
                    has_classes = word is not None
                if not name or b"\0" in name:
                    raise DataError(f"{root}: line {number}: expected the path of an image, got {line[:80]!r}")
                if word == "":
                    raise DataError(f"{root}: line {number}: expected a class behind the tab, got {line[:80]!r}")
                if (word is not None) != has_classes:
                    has, first = ("a", "none") if word is not None else ("no", "one")
                    raise DataError(
                        f"{root}: line {number}: has {has} class, the first line has {first}: {line[:80]!r}; expected "
                        "`<image> <class>` on every line, or `<image>` on every line"
                    )
                yield number, name, word
    except OSError as error:
        raise DataError(f"{root}: cannot be read: {error.strerror}") from None


def _parts(line: bytes) -> tuple[bytes, str | None]:
    if b"\t" in line:
        name, word = line.rsplit(b"\t", 1)
    elif line.strip().lower().endswith(_ENDINGS) or len(line.split(None, 1)) == 1:  # blanks may be part of a path
        return line.strip(), None
    else:
        name, word = line.strip().rsplit(None, 1)
    return name, word.strip().decode("utf-8", "backslashreplace")


class Words:
    """The classes of N images as words, each word kept once."""

    def __init__(self) -> None:
        self._number: dict[str, int] = {}
        self._of_row = array("i")

    def __bool__(self) -> bool:
        return bool(self._number)

    def add(self, word: str | None) -> None:
        """The next image's class; None for one without."""
        if word is not None:
            self._of_row.append(self._number.setdefault(word, len(self._number)))

    def numbered(self, root: Path) -> tuple[list[str], NDArray[np.int32]]:
        """Names of the classes in their order, and the label of each image [N].

        Raises:
            DataError: an integer that is not a plausible label; names `root`.
        """
        classes, number = number_classes(root, list(self._number))
        return classes, np.array(number, dtype=np.int32)[np.frombuffer(self._of_row, dtype=np.int32)]


def number_classes(root: Path, words: Sequence[str]) -> tuple[list[str], list[int]]:
    """Class names and the position of each word among them; integers from 0 keep their value.

    Raises:
        DataError: an integer that is not a plausible label; names `root`.
    """
    if all(map(_INTEGER.fullmatch, words)):
        digits = [word.lstrip("0") or "0" for word in words]
        wrong = next((d for d in digits if d[0] == "-" or len(d) > 9 or int(d) >= MAX_CLASSES), None)
        if wrong:
            raise DataError(f"{root}: label {wrong[:20]}; expected 0 to {MAX_CLASSES - 1}, or data.labels=none")
        numbers = [int(d) for d in digits]
        return [str(number) for number in range(max(numbers) + 1)], numbers
    classes = sorted(set(words))
    label = {word: number for number, word in enumerate(classes)}
    return classes, [label[word] for word in words]
