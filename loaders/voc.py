"""PASCAL VOC's files, in the layout of its development kit: the one place where they are read.

`data/VOCdevkit#2007_trainval+2012_trainval` stands for splits of one kit: `VOC<year>/ImageSets/Main/<split>.txt` lists
the images of a split, `VOC<year>/JPEGImages/<id>.jpg` is one, `VOC<year>/Annotations/<id>.xml` has its objects, and
`VOC<year>/ImageSets/Main/<class>_<split>.txt` says in which images a class is: 1, or -1 where it is not, or 0 where
all of its objects are difficult.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from loaders.errors import DataError
from loaders.index import Index, Objects

EXPECTED = "splits of a PASCAL VOC development kit, such as data/VOCdevkit#2007_trainval+2012_trainval"
CLASSES = tuple(
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant sheep "
    "sofa train tvmonitor".split()
)
"""Of the real sets."""
DIFFICULT = -1
"""In `Scenes.targets`: only objects that hardly anybody would recognize."""


class Counts(NamedTuple):
    """What a whole split of the real VOC 2007 has."""

    images: int
    positives: tuple[int, ...]
    """Images with each of `CLASSES`."""
    difficult: tuple[int, ...] | None = None
    """Images in which all objects of a class are difficult."""


COUNTS = {
    (2007, "trainval"): Counts(
        5011, (238, 243, 330, 181, 244, 186, 713, 337, 445, 141, 200, 421, 287, 245, 2008, 245, 96, 229, 261, 256)
    ),
    (2007, "test"): Counts(
        4952,
        (204, 239, 282, 172, 212, 174, 721, 322, 417, 127, 190, 418, 274, 222, 2007, 224, 97, 223, 259, 229),
        (1, 11, 7, 4, 28, 9, 54, 10, 128, 0, 57, 15, 5, 11, 90, 30, 1, 132, 0, 26),
    ),
}


class Scenes(NamedTuple):
    """N images of one or more splits, and what is in each; ids rise within each split."""

    root: Path
    """The development kit."""
    ids: list[str]
    """[N], such as 000005 or 2008_000008."""
    names: list[str]
    """[N], images below the root."""
    annotations: list[Path]
    """[N], where the objects of each are written."""
    classes: list[str]
    """C names in alphabetical order."""
    targets: NDArray[np.int8]
    """[N, C]: 1 where a class is in the image, 0 where it is not, `DIFFICULT`."""


class Split(NamedTuple):
    """A split of one year."""

    folder: Path
    """`VOC<year>` of the kit."""
    year: int
    name: str

    @property
    def list(self) -> Path:
        """The file that lists its images."""
        return self.folder / "ImageSets" / "Main" / f"{self.name}.txt"


def is_kit(data: str | Path) -> bool:
    """Whether a path stands for splits of a kit: it has a `#` in its last part, and there is no such file or folder."""
    path = Path(data)
    return "#" in path.name and not os.path.lexists(path)


def kit_of(data: str | Path) -> Path:
    """The folder of the kit that a path stands for."""
    path = Path(data)
    return path.with_name(path.name.split("#")[0]) if path.name.split("#")[0] else path.parent


def splits_of(data: str | Path) -> list[Split]:
    """What a path stands for.

    Raises:
        DataError: it is written in another way, names a split twice, or one that the kit does not have.
    """
    root, splits = kit_of(data), []
    for word in Path(data).name.partition("#")[2].split("+"):
        found = re.fullmatch(r"([0-9]{4})_([A-Za-z0-9]+)", word)
        if found is None:
            raise DataError(f"{data}: {word!r}: expected <year>_<split>; {EXPECTED}")
        split = Split(root / f"VOC{found[1]}", int(found[1]), found[2])
        if split in splits:
            raise DataError(f"{data}: {word} is named twice")
        if not split.list.is_file():
            known = sorted(path.stem for path in split.list.parent.glob("*.txt") if "_" not in path.stem)
            there = f"there are {', '.join(known)}" if known else "there are no lists at all"
            raise DataError(f"{split.list}: no such file; {there}; expected {EXPECTED}")
        splits.append(split)
    return splits


def image_names(data: str | Path) -> list[str]:
    """Images below the root [N], as `Scenes.names`; nothing but the lists is read."""
    return [name for split in splits_of(data) for name in _names(split, _ids(split))]


def read(data: str | Path, *, any_counts: bool = False) -> Scenes:
    """The images of splits of a kit and the classes in each, from the files of the classes, or from the annotations
    where there are none.

    Args:
        any_counts: take a split of the real VOC 2007 that is not whole.

    Raises:
        DataError: a file is missing or damaged, or a real set has other counts than it should; names the file.
    """
    root = kit_of(data)
    parts: list[Scenes] = []
    for split in splits_of(data):
        ids = _ids(split)
        files = _annotations(split, ids)
        classes = sorted(
            path.stem.removesuffix(f"_{split.name}") for path in split.list.parent.glob(f"*_{split.name}.txt")
        )
        if classes:
            columns = [_of_class(split.list.with_name(f"{name}_{split.name}.txt"), ids) for name in classes]
            targets = np.stack(columns, axis=1)
        else:
            found = [_parsed(file) for file in files]
            classes = sorted({name for objects in found for name, *_ in objects})
            targets = targets_of(_objects(files, found, classes), len(ids), len(classes))
        scenes = Scenes(root, ids, _names(split, ids), files, classes, targets)
        if not any_counts and tuple(classes) == CLASSES and (split.year, split.name) in COUNTS:
            _check_counts(split, scenes, COUNTS[split.year, split.name])
        if parts and parts[0].classes != classes:
            only = ", ".join(sorted({*parts[0].classes} ^ {*classes}))
            raise DataError(f"{data}: its splits have different classes: only one of them has {only}")
        parts.append(scenes)
    return Scenes(
        root,
        [name for part in parts for name in part.ids],
        [name for part in parts for name in part.names],
        [path for part in parts for path in part.annotations],
        parts[0].classes,
        np.concatenate([part.targets for part in parts]),
    )


def read_objects(scenes: Scenes, index: Index) -> Objects:
    """The objects of all images, those that are difficult too.

    VOC's boxes are in pixels from 1 on, both ends inclusive, and may have fractions; here they are continuous, (xmin -
    1, ymin - 1, xmax, ymax).

    Args:
        index: of the same images: their sizes are what the boxes are checked against.

    Raises:
        DataError: an annotation is missing or damaged, or a box has no area or leaves its image; names file and object.
    """
    objects = _objects(scenes.annotations, [_parsed(file) for file in scenes.annotations], scenes.classes)
    width, height = index.width[objects.image], index.height[objects.image]
    x1, y1, x2, y2 = objects.box.T
    wrong = (x1 < 0) | (y1 < 0) | (x2 > width) | (y2 > height)
    wrong &= ~np.isin(objects.image, list(index.problems))  # their sizes are not known
    if wrong.any():
        at = int(np.flatnonzero(wrong)[0])
        row = int(objects.image[at])
        number = at - int(np.searchsorted(objects.image, row)) + 1
        x1, y1, x2, y2 = objects.box[at] + [1, 1, 0, 0]
        raise DataError(
            f"{scenes.annotations[row]}: object {number} ({scenes.classes[objects.label[at]]}): the box from "
            f"({x1:g}, {y1:g}) to ({x2:g}, {y2:g}) leaves the image of {width[at]}x{height[at]} pixels"
        )
    return objects


def targets_of(objects: Objects, num_images: int, num_classes: int) -> NDArray[np.int8]:
    """Which classes are in which images, [N, C] as `Scenes.targets`."""
    targets = np.zeros((num_images, num_classes), dtype=np.int8)
    targets[objects.image, objects.label] = DIFFICULT
    plain = objects.where(~objects.difficult)
    targets[plain.image, plain.label] = 1
    return targets


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: is not UTF-8; expected text") from None


def _ids(split: Split) -> list[str]:
    ids = sorted(_text(split.list).split())
    if not ids:
        raise DataError(f"{split.list}: names no image")
    for one, other in zip(ids, [*ids[1:], ""], strict=True):
        if one == other or not re.fullmatch(r"\w+", one):
            what = "twice" if one == other else "expected the name of an image without its ending"
            raise DataError(f"{split.list}: {one[:40]!r}: {what}")
    return ids


def _names(split: Split, ids: list[str]) -> list[str]:
    return [f"{split.folder.name}/JPEGImages/{name}.jpg" for name in ids]


def _annotations(split: Split, ids: list[str]) -> list[Path]:
    return [split.folder / "Annotations" / f"{name}.xml" for name in ids]


def _of_class(path: Path, ids: list[str]) -> NDArray[np.int8]:
    meaning = {"1": 1, "-1": 0, "0": DIFFICULT}
    said: dict[str, int] = {}
    for number, line in enumerate(_text(path).splitlines(), 1):
        words = line.split()
        if not words:
            continue
        if len(words) != 2 or words[1] not in meaning:
            raise DataError(f"{path}: line {number}: expected `<image> <1, 0 or -1>`, got {line[:60]!r}")
        said[words[0]] = meaning[words[1]]
    lacks = next((name for name in ids if name not in said), None)
    if lacks is not None or len(said) != len(ids):
        which = f"has no line for {lacks}" if lacks else f"has {len(said)} images, its split {len(ids)}"
        raise DataError(f"{path}: {which}; expected a line for each image of the split")
    return np.array([said[name] for name in ids], dtype=np.int8)


def _parsed(path: Path) -> list[tuple[str, tuple[float, float, float, float], bool]]:
    """Class, continuous box and difficulty of each object of an annotation."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    # Entities can make gigabytes of a few bytes, and are in no annotation; in UTF-16 they would not be seen here.
    if b"<!" in content.replace(b"<!--", b"") or b"\0" in content:
        raise DataError(f"{path}: declares a document type or entities; expected plain XML in UTF-8")
    try:
        tree = ElementTree.fromstring(content)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise DataError(f"{path}: is not XML ({error}); expected an annotation of PASCAL VOC") from None
    found = []
    for number, item in enumerate(tree.findall("object"), 1):  # not its parts, which have names and boxes too
        name = (item.findtext("name") or "").strip()
        try:
            low_x, low_y, x2, y2 = (float(item.findtext(f"bndbox/{key}") or "") for key in _CORNERS)
        except ValueError:
            raise DataError(
                f"{path}: object {number} ({name}): expected numbers in bndbox/{', '.join(_CORNERS)}"
            ) from None
        if not name or not (x2 > low_x - 1 and y2 > low_y - 1):  # not so with NaN, either
            what = f"the box from ({low_x:g}, {low_y:g}) to ({x2:g}, {y2:g}) has no area" if name else "has no name"
            raise DataError(f"{path}: object {number} ({name}): {what}")
        found.append((name, (low_x - 1, low_y - 1, x2, y2), (item.findtext("difficult") or "0").strip() == "1"))
    return found


_CORNERS = ("xmin", "ymin", "xmax", "ymax")


def _objects(
    files: list[Path], found: list[list[tuple[str, tuple[float, float, float, float], bool]]], classes: list[str]
) -> Objects:
    number = {name: label for label, name in enumerate(classes)}
    for file, objects in zip(files, found, strict=True):
        for at, (name, *_) in enumerate(objects, 1):
            if name not in number:
                known = ", ".join(classes[:25])
                raise DataError(f"{file}: object {at}: unknown class {name!r}; expected one of {known}")
    flat = [item for objects in found for item in objects]
    return Objects(
        image=np.repeat(np.arange(len(found)), [len(objects) for objects in found]),
        label=np.array([number[name] for name, _, _ in flat], dtype=np.int64),
        box=np.array([box for _, box, _ in flat], dtype=np.float64).reshape(-1, 4),
        difficult=np.array([is_difficult for *_, is_difficult in flat], dtype=bool),
    )


def _check_counts(split: Split, scenes: Scenes, expected: Counts) -> None:
    wrong = []
    if len(scenes.ids) != expected.images:
        wrong.append(f"{len(scenes.ids):,} images instead of {expected.images:,}")
    for value, counts, what in ((1, expected.positives, ""), (DIFFICULT, expected.difficult, " difficult")):
        found = (scenes.targets == value).sum(axis=0).tolist()
        for name, count, right in zip(CLASSES, found, counts or found, strict=True):
            if count != right:
                wrong.append(f"{name} in {count}{what} instead of {right}")
    if wrong:
        raise DataError(
            f"{split.folder}: {split.name} of VOC {split.year} is not whole: {'; '.join(wrong[:3])}; get it again, or "
            "allow any counts"
        )
