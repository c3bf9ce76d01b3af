"""The index of a data set: path, label, width, height and format of every image, read once from the headers.

Its columns are arrays that usually lie in a mapped file (`loaders/index_file.py`), which all processes of a machine
share: what a process holds for itself does not grow with the number of images.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from loaders.decode import RAW, decode, from_raw
from loaders.errors import BadImage

_CHUNK = 1 << 20  # rows that are worked on at a time where something is done to all of them


class Names:
    """N names in one array of bytes: each costs its own length and nothing else.

    Args:
        blob: uint8, each name followed by a 0.
        ends: [N], where each name ends, its 0 included.
    """

    def __init__(self, blob: NDArray[np.uint8], ends: NDArray[np.int64]) -> None:
        self.blob, self.ends = blob, ends

    @classmethod
    def of(cls, names: Iterable[bytes]) -> Names:
        """From names without zeros."""
        rest = iter(names)
        chunks = iter(lambda: list(itertools.islice(rest, _CHUNK >> 4)), [])
        return cls.of_parts(b"\0".join(chunk) + b"\0" for chunk in chunks)

    @classmethod
    def of_parts(cls, parts: Iterable[bytes]) -> Names:
        """From any number of names at a time, each of them followed by a 0."""
        blob = bytearray()
        for part in parts:
            blob += part
        array = np.frombuffer(blob or b"", dtype=np.uint8)
        steps = range(0, len(array), _CHUNK)
        ends = [first + 1 + np.flatnonzero(array[first : first + _CHUNK] == 0) for first in steps]
        return cls(array, np.concatenate([np.zeros(0, dtype=np.int64), *ends]))

    @classmethod
    def of_rows(cls, count: int) -> Names:
        """ "0", "1", ...: of images that have no names of their own."""
        return cls.of(b"%d" % row for row in range(count))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, row: int) -> bytes:
        row = row % len(self.ends)
        start = int(self.ends[row - 1]) if row else 0
        return self.blob[start : int(self.ends[row]) - 1].tobytes()

    def __iter__(self) -> Iterator[bytes]:
        for first in range(0, len(self.ends), _CHUNK):
            ends = self.ends[first : first + _CHUNK].tolist()
            start = int(self.ends[first - 1]) if first else 0
            part = self.blob[start : ends[-1]].tobytes()
            yield from part[:-1].split(b"\0")

    def is_sound(self) -> bool:
        """Whether every name lies in the blob and ends with its only 0."""
        blob, ends = self.blob, self.ends
        if not len(ends):
            return not len(blob)
        is_rising = ends[0] > 0 and bool((ends[1:] > ends[:-1]).all()) and ends[-1] == len(blob)
        return is_rising and not blob[ends - 1].any() and int(np.count_nonzero(blob == 0)) == len(ends)

    def take(self, rows: NDArray[np.int64]) -> Names:
        """Those of some rows."""
        return Names.of(self[row] for row in rows.tolist())


class Pieces(NamedTuple):
    """Where the images lie that are not files of their own."""

    files: list[bytes]
    """Paths of the shards."""
    file: NDArray[np.int32]
    """[N], position in `files`."""
    offset: NDArray[np.int64]
    """[N], first byte in that file."""
    length: NDArray[np.int64]
    """[N], bytes."""

    def take(self, rows: NDArray[np.int64]) -> Pieces:
        """Those of some rows."""
        return Pieces(self.files, self.file[rows], self.offset[rows], self.length[rows])


class Objects(NamedTuple):
    """What images show and where: M objects, in the order of their images."""

    image: NDArray[np.int64]
    """[M], the row in the index; never falls."""
    label: NDArray[np.int64]
    """[M], position in the classes."""
    box: NDArray[np.float64]
    """[M, 4]: x1, y1, x2, y2 in pixels of the image as it is stored, continuous: the first pixel is from 0 to 1."""
    difficult: NDArray[np.bool_]
    """[M], hardly to be recognized: trains, but is neither to be found nor wrong to find."""

    def of(self, row: int) -> Objects:
        """Those of one image."""
        first, end = np.searchsorted(self.image, (row, row + 1))
        return self.where(slice(first, end))

    def where(self, chosen: NDArray[np.bool_ | np.int64] | slice) -> Objects:
        """Those that a mask [M], places or a slice choose."""
        return Objects(self.image[chosen], self.label[chosen], self.box[chosen], self.difficult[chosen])

    def take(self, rows: NDArray[np.int64]) -> Objects:
        """Those of some images, in their order, numbered by it."""
        first, end = np.searchsorted(self.image, (rows, rows + 1))
        counts = end - first
        chosen = np.repeat(first - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
        image = np.repeat(np.arange(len(rows)), counts)
        return self.where(chosen)._replace(image=image)


@dataclass(frozen=True, eq=False)
class Index:
    """Everything known about a data set without decoding it. Rows of files are sorted by the folder in the root that
    they lie in, then by path; those of a list, of shards, of Parquet and of a `.beton` keep their order there."""

    root: Path
    """The folder or file, or a name for a data set that is not made of files."""
    classes: list[str]
    """Names; a label is a position in this list. Empty without labels."""
    names: Names
    """N paths below the root, as the file system spells them: names need not be UTF-8."""
    label: NDArray[np.int32] | None
    """[N]; None where nobody has said what an image shows, or where it shows several things."""
    width: NDArray[np.int32]
    """[N], pixels; 1 where the header cannot be read."""
    height: NDArray[np.int32]
    format: NDArray[np.bytes_]
    """[N], as `loaders.decode` names it; b"" where the header cannot be read."""
    problems: dict[int, str]
    """Row -> why its image cannot be used."""
    max_pixels: int
    """Images with more are refused before anything is decoded."""
    size: NDArray[np.int64] | None = None
    """[N], bytes of each file; None where `pieces` has them."""
    modified: NDArray[np.int64] | None = None
    """[N], when each file was last written, in nanoseconds; None where `pieces` says where they lie."""
    pieces: Pieces | None = None
    """Where the images lie, if they are not files of their own."""
    objects: Objects | None = None
    """What they show and where, in data sets of scenes."""
    quarantined: int = 0
    """How many images a quarantine list keeps out of the index."""
    unread: frozenset[int] = frozenset()
    """Rows of `problems` whose image the machine did not let us read: it may be sound, and is looked at again at the
    next start."""
    reading: str = ""
    """What was taken for what, where a data set could be read in more than one way."""
    file: Path | None = None
    """The file that the columns are mapped from."""

    def __len__(self) -> int:
        return len(self.width)

    @property
    def is_labeled(self) -> bool:
        """Whether there is anything to tell apart: labels, of two classes at least."""
        return self.label is not None and len(self.classes) > 1

    def name(self, row: int) -> bytes:
        """Path of an image below the root."""
        return self.names[row]

    def path(self, row: int) -> str:
        """Path of an image, for people: what is not UTF-8 is escaped."""
        return os.path.join(os.fsencode(self.root), self.names[row]).decode("utf-8", errors="backslashreplace")

    def location(self, row: int) -> tuple[bytes, int, int]:
        """File of an image's bytes, the first of them in it, and how many; of a whole file -2 - n, where n is how many
        it has to have, or -1 where that is not known."""
        if self.pieces is None:
            size = -1 if self.size is None else -2 - int(self.size[row])
            return os.path.join(os.fsencode(self.root), self.names[row]), 0, size
        pieces = self.pieces
        return pieces.files[pieces.file[row]], int(pieces.offset[row]), int(pieces.length[row])

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of names, labels, sizes in pixels and objects: two data sets with equal fingerprints give the same
        stream."""
        digest = hashlib.sha256(self.names.blob[:-1].data)
        if self.label is not None:
            _add(digest, self.label, np.dtype(np.int64))
        for array in (self.width, self.height):
            _add(digest, array, np.dtype(np.int32))
        for column in self.objects or ():
            _add(digest, column, column.dtype)
        return digest.hexdigest()[:16]

    def content(self, row: int) -> bytes:
        """The bytes of an image.

        Raises:
            BadImage: they cannot be read, or are not as many as were indexed.
        """
        path, offset, length = self.location(row)
        try:
            # Not blocking: a pipe that has taken the name of a file would wait for its writer.
            with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb", buffering=0) as file:
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    raise BadImage("is not a file")
                file.seek(offset)
                content = file.read() if length < 0 else file.read(length)
        except OSError as error:
            raise BadImage(f"cannot be read: {error.strerror}") from error
        if length >= 0 and len(content) < length:
            raise BadImage("cannot be read: its file is cut short")
        if length < -1 and len(content) != -2 - length:
            raise BadImage(
                f"has changed: {len(content):,} bytes, {-2 - length:,} when it was indexed; start again, or make the "
                ".index file anew with tools/make_index.py"
            )
        return content

    def read(self, row: int) -> Tensor:
        """Decode an image as RGB, uint8 [3, H, W].

        Raises:
            BadImage: it cannot be decoded, or is no longer the file that was indexed.
        """
        if row in self.problems:
            raise BadImage(self.problems[row])
        read = from_raw if self.format[row] == RAW else decode
        return read(self.content(row), int(self.width[row]), int(self.height[row]))

    def at(self, root: Path, files: list[bytes] | None = None) -> Index:
        """The same images in another place.

        Args:
            root: where they are.
            files: those that hold them, if they are not files of their own.
        """
        pieces = self.pieces._replace(files=files) if self.pieces and files is not None else self.pieces
        moved = replace(self, root=root, pieces=pieces)
        moved.__dict__["fingerprint"] = self.fingerprint
        return moved

    def take(self, rows: NDArray[np.int64]) -> Index:
        """The index of some rows, in their order."""
        new = {int(row): number for number, row in enumerate(rows) if int(row) in self.problems}
        columns: dict[str, Any] = {
            name: array[rows]
            for name in ("label", "width", "height", "format", "size", "modified")
            if (array := getattr(self, name)) is not None
        }
        return replace(
            self,
            names=self.names.take(rows),
            problems={new[row]: reason for row, reason in self.problems.items() if row in new},
            unread=frozenset(new[row] for row in self.unread if row in new),
            pieces=self.pieces.take(rows) if self.pieces else None,
            objects=self.objects.take(rows) if self.objects else None,
            file=None,
            **columns,
        )

    def without(self, names: Iterable[bytes]) -> Index:
        """The index without some images, such as those of a quarantine list."""
        left_out = set(names)
        kept = np.array([row for row, name in enumerate(self.names) if name not in left_out], dtype=np.int64)
        return replace(self.take(kept), quarantined=len(self) - len(kept))


def _add(digest: Any, array: NDArray[Any], dtype: np.dtype[Any]) -> None:
    for first in range(0, len(array), _CHUNK):
        digest.update(np.ascontiguousarray(array[first : first + _CHUNK], dtype=dtype).data)
