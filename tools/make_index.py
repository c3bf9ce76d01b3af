"""Write the index of a data set as one file, which opens at once: no folder is listed, no file is looked at.

    python tools/make_index.py data/imagenet/train data/imagenet/train.index
    python tools/train.py recipes/burn_stage1.yaml data.train=data/imagenet/train.index
    python tools/make_index.py --check data/imagenet/train.index        # is every file still the one that was indexed?

Where the images and the file move together, it still fits. A file that has changed is named when it is met. Exit code 1
if --check finds one.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import _root  # noqa: F401

from engine.errors import guarded
from loaders import DataError, headers, index_file
from loaders.config import Request
from loaders.files import check_writable
from loaders.index import Index
from loaders.sources import open_index

SHOWN = 20


@guarded
def main() -> int:
    """Parse the command line; write or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", type=Path, help="anything that data.train takes, but a .beton")
    parser.add_argument("out", nargs="?", type=Path, help=f"the file to write, ending in {index_file.SUFFIX}")
    parser.add_argument("--check", type=Path, metavar="INDEX", help="compare this file with all of its images instead")
    parser.add_argument("--labels", choices=["auto", "none"], help="as data.labels of a recipe")
    parser.add_argument("--max-pixels", type=int, default=100_000_000, help="as data.max_pixels (%(default)s)")
    arguments = parser.parse_args()
    if arguments.check is None and (arguments.source is None or arguments.out is None):
        parser.error("expected a source and an output, or --check")
    if arguments.max_pixels < 1:
        parser.error(f"--max-pixels: expected at least 1, got {arguments.max_pixels}")
    if arguments.check:
        return check(arguments.check, arguments.max_pixels)
    started = time.perf_counter()
    index = make(arguments.source, arguments.out, Request(arguments.max_pixels, arguments.labels, asks_labels=False))
    size = arguments.out.stat().st_size
    print(
        f"{arguments.out}: {len(index):,} images, {index.reading}; {len(index.problems)} unusable; "
        f"{size / max(len(index), 1):.0f} bytes an image, {time.perf_counter() - started:.1f} s"
    )
    return 0


def make(source: Path, out: Path, request: Request) -> Index:
    """Index `source` and write the file `out`.

    Raises:
        DataError: there is no such data set, or `out` is not the name of an index file.
        OSError: it cannot be written.
    """
    if out.suffix != index_file.SUFFIX:
        raise DataError(f"{out}: expected the name of a file that ends in {index_file.SUFFIX}")
    check_writable(out)
    if source.suffix == ".beton":
        raise DataError(f"{source}: a .beton is its own index; name it in data.train")
    index = open_index(Path(os.path.abspath(source.expanduser())), request)
    if index.pieces and any(file.endswith(b".images") for file in index.pieces.files):
        raise DataError(f"{source}: Parquet is read from a copy on this machine; an index of that could not travel")
    if index.unread:
        row = min(index.unread)
        raise DataError(f"{index.path(row)}: {index.problems[row]}; an index is made of what can be read")
    out.parent.mkdir(parents=True, exist_ok=True)
    index_file.write(index, out)
    return index


def check(path: Path, max_pixels: int) -> int:
    """Compare an index file with its images, and print what differs. Returns the exit code."""
    index = index_file.open_travelled(path, max_pixels)
    index_file.verify(path)
    if index.pieces is None:
        changed = headers.changed_files(index)
    else:
        changed = index_file.short_pieces(index)
    for line in changed[:SHOWN]:
        print(line)
    if len(changed) > SHOWN:
        print(f"and {len(changed) - SHOWN} more")
    print(f"{path}: {len(index):,} images, {len(changed)} changed")
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
