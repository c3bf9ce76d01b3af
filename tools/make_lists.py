"""Write list files (`<image><tab><class>` on each line, as data.train takes them) from what people have.

    python tools/make_lists.py simclr 1percent.txt data/imagenet data/imagenet/simclr_1percent.txt
    python tools/make_lists.py cub CUB_200_2011 data/cub                    # data/cub/train.txt and val.txt
    python tools/make_lists.py birdsnap birdsnap data/birdsnap
    python tools/make_lists.py places205 places205 data/places205 --images places205/images256
    python tools/make_lists.py holdout data/cub/train.txt rest.txt held_out.txt --share 0.2
    python tools/make_lists.py subset data/digits/train five.txt --count 5

`simclr` takes SimCLR's own 1percent.txt or 10percent.txt (google-research/simclr, imagenet_subsets/), knows both by
their SHA-256, and checks that every image is there. Where class folders are numbers, --classes names the file whose
line i, from 0 on, is the WordNet id of folder i, and --val writes the validation list that goes with it. `cub`,
`birdsnap` and `places205` read the data sets as they are distributed. `holdout` and `subset` draw images of each class
of any labeled set of files: a function of --seed and the order of the images alone. A run can hold images out by
itself, from shards too: data.hold_out. Paths are relative to the list where the images lie below it, else absolute.
"""

import argparse
import hashlib
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import _root  # noqa: F401
import numpy as np
from tqdm import tqdm

from engine.errors import guarded
from loaders import DataError, Index, subsets
from loaders.config import Request
from loaders.files import aside, check_writable
from loaders.sources import lists, open_index

SIMCLR = {
    "71e82a48ba78252683ae334c4d019ebd5c6e855b9599c1389fbe83eb9549cf17": ("1percent.txt", 12_811),
    "6d09de11e7bdaf5b1f3b1f249b6183695f97310cdd20f0c03e7235b6b9392091": ("10percent.txt", 128_116),
}
"""SHA-256 -> name and lines."""
SIMCLR_URL = "https://github.com/google-research/simclr/tree/master/imagenet_subsets"
PUBLISHED = {"cub": (5_994, 5_794), "places205": (2_448_873, 20_500)}
"""Images for training and testing, as the sets' authors count them."""


class Entry(NamedTuple):
    """One image of a list."""

    image: str
    label: str
    """The class's name or number."""
    source: Path
    number: int
    """The line of `source`, or the row of its index, that names it."""

    def __str__(self) -> str:
        return f"{self.source}: line {self.number}"


# ------------------------------------------------------------------------------------------------ reading


def lines_of(path: Path) -> Iterator[tuple[int, str]]:
    """Number and text of each line that is not empty.

    Raises:
        DataError: it cannot be read.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    for number, line in enumerate(content.decode("utf-8-sig", "surrogateescape").split("\n"), 1):
        if line.strip():
            yield number, line.strip()


def pairs_of(path: Path, what: str) -> dict[str, tuple[str, int]]:
    """Key -> value and line number, from a file of `<key> <value>`.

    Raises:
        DataError: a line is not as expected, or a key comes twice.
    """
    found: dict[str, tuple[str, int]] = {}
    for number, line in lines_of(path):
        key, _, value = line.partition(" ")
        if not value or key in found:
            wrong = f"{key} comes twice, first in line {found[key][1]}" if key in found else repr(line[:80])
            raise DataError(f"{path}: line {number}: expected {what}, got {wrong}")
        found[key] = value.strip(), number
    return found


def check_there(entries: list[Entry]) -> None:
    """See that every image is there, by listing each folder once.

    Raises:
        DataError: says how many are not, and where the first of them is named.
    """
    if lacking := missing(entries):
        raise DataError(
            f"{lacking[0]}: {lacking[0].image}: no such file; {len(lacking):,} of {len(entries):,} images are missing, "
            "expected all of them"
        )


def missing(entries: list[Entry]) -> list[Entry]:
    """Those whose image is not there, in their order."""
    there: dict[str, frozenset[str]] = {}
    folders = {os.path.dirname(entry.image) for entry in entries}
    for folder in tqdm(folders, desc="looking", unit=" folders", disable=not sys.stderr.isatty()):
        try:
            there[folder] = frozenset(os.listdir(folder))
        except OSError:
            there[folder] = frozenset()
    places = (os.path.split(entry.image) for entry in entries)
    return [entry for entry, (folder, name) in zip(entries, places, strict=True) if name not in there[folder]]


# ------------------------------------------------------------------------------------------------ data sets


def simclr(source: Path, imagenet: Path, classes: Path | None) -> list[Entry]:
    """The images of one of SimCLR's lists, labeled by WordNet id."""
    lines = list(lines_of(source))
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    if digest not in SIMCLR:
        expected = ", ".join(f"{name} ({count:,} lines, {sha[:16]}...)" for sha, (name, count) in SIMCLR.items())
        raise DataError(
            f"{source}: {len(lines):,} lines with the SHA-256 {digest[:16]}...; expected {expected}; get it from "
            f"{SIMCLR_URL}"
        )
    folder_of = numbered_folders(imagenet / "train", classes) if classes else None
    entries = []
    for number, line in lines:
        match = re.fullmatch(r"(n\d{8})_\d+\.JPEG", line)
        if match is None:
            raise DataError(f"{source}: line {number}: expected a name such as n04235860_14959.JPEG, got {line[:80]!r}")
        wnid = match[1]
        if folder_of is not None and wnid not in folder_of:
            raise DataError(
                f"{source}: line {number}: {wnid} is not in {classes}; expected the ids of all folders there"
            )
        folder = folder_of[wnid] if folder_of is not None else wnid
        entries.append(Entry(os.path.join(imagenet, "train", folder, line), wnid, source, number))
    check_there(entries)
    return entries


def numbered_folders(root: Path, classes: Path) -> dict[str, str]:
    """WordNet id -> name of its folder, which is a number: line i of `classes`, from 0 on, belongs to folder i."""
    folders = {}
    for name in os.listdir(root):
        if not os.path.isdir(root / name):
            continue
        if not name.isdecimal() or int(name) in folders:
            raise DataError(f"{root / name}: expected folders named by different numbers, as --classes says")
        folders[int(name)] = name
    found: dict[str, str] = {}
    for place, (number, wnid) in enumerate(lines_of(classes)):
        if not re.fullmatch(r"n\d{8}", wnid) or wnid in found:
            raise DataError(f"{classes}: line {number}: expected a new id such as n01440764, got {wnid[:80]!r}")
        if place not in folders:
            raise DataError(f"{classes}: line {number}: {root} has no folder {place}")
        found[wnid] = folders[place]
    if len(found) != len(folders):
        raise DataError(f"{classes}: {len(found)} ids, expected one for each of the {len(folders)} folders in {root}")
    return found


def numbered(root: Path, classes: Path) -> list[Entry]:
    """All images of numbered folders, labeled by WordNet id."""
    wnid_of = {folder: wnid for wnid, folder in numbered_folders(root, classes).items()}
    index = files_of(root)
    return [entry._replace(label=wnid_of[entry.label]) for entry in of_rows(index, range(len(index)))]


def cub(source: Path) -> dict[str, list[Entry]]:
    """CUB-200-2011 as it is distributed; classes are named as in classes.txt."""
    images = pairs_of(source / "images.txt", "`<id> <path>`")
    names = pairs_of(source / "classes.txt", "`<id> <class>`")
    labels = pairs_of(source / "image_class_labels.txt", "`<image id> <class id>`")
    splits = pairs_of(source / "train_test_split.txt", "`<image id> <1 or 0>`")
    for path, table in (("image_class_labels.txt", labels), ("train_test_split.txt", splits)):
        for key in table.keys() - images.keys():
            raise DataError(f"{source / path}: line {table[key][1]}: image {key} is not in images.txt")
    found: dict[str, list[Entry]] = {"train": [], "val": []}
    for key, (path, number) in images.items():
        entry = Entry(os.path.join(source, "images", path), "", source / "images.txt", number)
        if key not in labels or key not in splits:
            lacks = "image_class_labels.txt" if key not in labels else "train_test_split.txt"
            raise DataError(f"{entry}: image {key} is not in {lacks}")
        label, split = labels[key][0], splits[key][0]
        if label not in names:
            raise DataError(
                f"{source / 'image_class_labels.txt'}: line {labels[key][1]}: no class {label} in classes.txt"
            )
        if split not in ("0", "1"):
            raise DataError(
                f"{source / 'train_test_split.txt'}: line {splits[key][1]}: expected 1 for training or 0, got {split!r}"
            )
        found["train" if split == "1" else "val"].append(entry._replace(label=names[label][0]))
    check_there([*found["train"], *found["val"]])
    return found


def birdsnap(source: Path) -> dict[str, list[Entry]]:
    """Birdsnap as it is distributed: of images.txt those that could be downloaded, test_images.txt for validation."""
    rows = lines_of(source / "images.txt")
    _, header = next(rows, (1, ""))
    columns = header.split("\t")
    if not {"path", "species_id"} <= set(columns):
        raise DataError(f"{source / 'images.txt'}: line 1: expected columns path and species_id, got {header[:80]!r}")
    test = {line: number for number, line in lines_of(source / "test_images.txt") if line != "path"}
    entries: dict[str, Entry] = {}
    species: dict[str, str] = {}
    for number, line in rows:
        cells = dict(zip(columns, line.split("\t"), strict=False))
        path, number_of = cells.get("path", ""), cells.get("species_id", "")
        folder = os.path.dirname(path)
        entry = Entry(os.path.join(source, "images", path), folder, source / "images.txt", number)
        if not folder or not number_of.isdecimal():
            raise DataError(
                f"{entry}: expected `<species>/<image>` as path and a number as species_id, got {line[:80]!r}"
            )
        if species.setdefault(number_of, folder) != folder:
            raise DataError(f"{entry}: species {number_of} is in {folder}, and before in {species[number_of]}")
        entries[path] = entry
    for path, number in test.items():
        if path not in entries:
            raise DataError(f"{source / 'test_images.txt'}: line {number}: {path[:80]} is not in images.txt")
    lacking = {entry.image for entry in missing(list(entries.values()))}
    found: dict[str, list[Entry]] = {"train": [], "val": []}
    for path, entry in entries.items():
        if entry.image not in lacking:
            found["val" if path in test else "train"].append(entry)
    print(
        f"{source}: {len(entries) - len(lacking):,} of the {len(entries):,} images of images.txt are here; numbers of "
        "copies with other images do not compare"
    )
    for split, kept in found.items():
        if not kept:
            raise DataError(f"{source / 'images'}: no image for {split}, expected those of images.txt")
    return found


def places205(source: Path, images: Path) -> dict[str, list[Entry]]:
    """Places205 as it is distributed: `<path> <label>`, or with a comma or tab between them."""
    found: dict[str, list[Entry]] = {}
    for split in ("train", "val"):
        path = source / f"{split}_places205.csv"
        found[split] = []
        for number, line in lines_of(path):
            match = re.fullmatch(r"(.+?)[\s,]+(\d{1,3})", line)
            if match is None:
                raise DataError(f"{path}: line {number}: expected `<image> <label>`, got {line[:80]!r}")
            found[split].append(Entry(os.path.join(images, match[1]), match[2], path, number))
    check_there([*found["train"], *found["val"]])
    return found


# ------------------------------------------------------------------------------------------------ draws


def files_of(source: Path) -> Index:
    """The index of a labeled set of files.

    Raises:
        DataError: it has no labels, lies in shards, or its classes cannot be named in a list.
    """
    index = open_index(Path(os.path.abspath(source.expanduser())), Request(100_000_000))
    if index.pieces is not None:
        raise DataError(
            f"{source}: its images are no files of their own; set data.hold_out in the run, which needs none"
        )
    if not index.is_labeled:
        raise DataError(f"{source}: has no labels of two classes or more, expected some to draw by")
    return index


def check_names(source: Path, index: Index) -> None:
    """See that a list can name the classes of an index so that their order stays.

    Raises:
        DataError: it cannot.
    """
    classes, _ = lists.number_classes(source, index.classes)
    if classes != index.classes:
        raise DataError(
            f"{source}: its classes, {', '.join(index.classes[:3])}..., are numbers, which a list takes for labels "
            "from 0 on; name the folders otherwise, or set data.hold_out in the run, which needs no list"
        )


def of_rows(index: Index, rows: Iterable[int]) -> list[Entry]:
    """The images of some rows."""
    assert index.label is not None
    root = os.path.abspath(index.root)
    return [
        Entry(os.path.join(root, os.fsdecode(index.name(row))), index.classes[index.label[row]], index.root, row)
        for row in rows
    ]


# ------------------------------------------------------------------------------------------------ writing


def check_out(path: Path) -> None:
    """See that a list can have this name.

    Raises:
        DataError, OSError: it cannot.
    """
    if path.suffix not in lists.SUFFIXES:
        raise DataError(f"{path}: expected the name of a list, ending in {', '.join(lists.SUFFIXES)}")
    check_writable(path)


def write(path: Path, entries: list[Entry]) -> None:
    """Write a list, complete or not at all, and say what is in it.

    Raises:
        DataError: a name that no line can hold.
        OSError: the disk refuses.
    """
    folder = os.path.abspath(path.parent)
    lines = []
    for entry in entries:
        image = os.path.abspath(entry.image)
        name = os.path.relpath(image, folder) if image.startswith(folder.rstrip(os.sep) + os.sep) else image
        if re.search(r"[\r\n]", name) or entry.label != entry.label.strip() or re.search(r"[\t\r\n]", entry.label):
            raise DataError(f"{entry.source}: {name!r} of class {entry.label!r}: a list cannot hold such a name")
        lines.append(f"{name}\t{entry.label}\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    with aside(path) as out:
        out.part.write_bytes(os.fsencode("".join(lines)))
    counts = Counter(entry.label for entry in entries).values()
    print(f"{path}: {len(entries):,} images of {len(counts):,} classes, {min(counts)} to {max(counts)} of each")


def share(text: str) -> float:
    """A share above 0 and below 1."""
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"expected a share above 0 and below 1, got {text}")
    return value


def positive(text: str) -> int:
    """A whole number above 0."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text}")
    return value


def seed(text: str) -> int:
    """A seed of a draw."""
    value = int(text)
    if not 0 <= value < 2**64:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to 2^64 - 1, got {text}")
    return value


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    of = kinds.add_parser("simclr", help="SimCLR's 1 %% or 10 %% of ImageNet")
    of.add_argument("source", type=Path, help="1percent.txt or 10percent.txt")
    of.add_argument("imagenet", type=Path, help="the folder that holds train/")
    of.add_argument("out", type=Path, help="the list to write")
    of.add_argument("--classes", type=Path, help="WordNet ids of numbered folders, one a line")
    of.add_argument("--val", type=Path, help="with --classes: also write the list of val/ here")
    for name in ("cub", "birdsnap", "places205"):
        of = kinds.add_parser(name, help="train.txt and val.txt from the data set as it is distributed")
        of.add_argument("source", type=Path, help="its folder")
        of.add_argument("out", type=Path, help="the folder of the two lists")
        if name == "places205":
            of.add_argument("--images", type=Path, help="the folder that its paths begin in, if not its own")
    of = kinds.add_parser("holdout", help="two lists: the rest, and a held-out share of each class")
    of.add_argument("source", type=Path, help="a labeled folder or list")
    of.add_argument("out", type=Path, help="the list of the rest")
    of.add_argument("held_out", type=Path, help="the list of what is held out")
    of.add_argument("--share", type=share, default=0.1, help="held out of each class, at least one image (%(default)s)")
    of.add_argument("--seed", type=seed, default=0, help="of the draw (%(default)s, as data.hold_out)")
    of = kinds.add_parser("subset", help="a list of a few images of each class")
    of.add_argument("source", type=Path, help="a labeled folder or list")
    of.add_argument("out", type=Path, help="the list to write")
    of.add_argument("--share", type=share, help="of each class, at least one image")
    of.add_argument("--count", type=positive, help="images of each class")
    of.add_argument("--seed", type=seed, default=0, help="of the draw (%(default)s)")
    return parser


@guarded
def main() -> int:
    """Parse the command line and write."""
    options = parser()
    arguments = options.parse_args()
    kind, source, out = arguments.kind, arguments.source, arguments.out
    written: dict[Path, list[Entry]] = {}
    if kind == "simclr":
        if arguments.val and not arguments.classes:
            options.error("--val: expected with --classes only; folders named by WordNet id need no list")
        for path in filter(None, (out, arguments.val)):
            check_out(path)
        written[out] = simclr(source, arguments.imagenet, arguments.classes)
        if arguments.val:
            written[arguments.val] = numbered(arguments.imagenet / "val", arguments.classes)
    elif kind in ("holdout", "subset"):
        if kind == "subset" and (arguments.share is None) == (arguments.count is None):
            options.error("expected --share or --count")
        outs = [out] if kind == "subset" else [out, arguments.held_out]
        for path in outs:
            check_out(path)
        index = files_of(source)
        check_names(source, index)
        if kind == "subset":
            rows = subsets.subset(index, share=arguments.share, count=arguments.count, seed=arguments.seed)
            written[out] = of_rows(index, rows.tolist())
        else:
            taken = subsets.held_out(index, arguments.share, arguments.seed)
            for path, chosen in zip(outs, (~taken, taken), strict=True):
                written[path] = of_rows(index, np.flatnonzero(chosen).tolist())
    else:
        outs = [out / "train.txt", out / "val.txt"]
        for path in outs:
            check_out(path)
        read = {"cub": cub, "birdsnap": birdsnap}.get(kind)
        found = read(source) if read else places205(source, arguments.images or source)
        written = dict(zip(outs, (found["train"], found["val"]), strict=True))
        if kind in PUBLISHED and tuple(map(len, written.values())) != PUBLISHED[kind]:
            print("{}: published with {:,} images for training and {:,} for testing".format(source, *PUBLISHED[kind]))
    for path, entries in written.items():
        write(path, entries)
    return 0


if __name__ == "__main__":
    sys.exit(main())
