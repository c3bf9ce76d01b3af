"""Find the images of a data set that cannot be used, or should be looked at, before a run finds them.

    python tools/scan_images.py data/imagenet/train --report runs/scan
    python tools/train.py recipes/burn_stage1.yaml data.quarantine=runs/scan/quarantine.jsonl

Every image is read and decoded (nothing beyond --max-pixels is). Unusable ones (empty, truncated, not an image, too
large) go to quarantine.jsonl, which every back end honors, as soon as they are found; CMYK, wrongly named, duplicate
and otherwise odd ones are listed in report.json and stay. Exit code 1 if anything is unusable. Stopped by Ctrl-C or
SIGTERM, both files hold what was found so far.
"""

import argparse
import hashlib
import json
import os
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any, TextIO

import _root  # noqa: F401
import numpy as np
import torch
from PIL import ExifTags, Image
from tqdm import tqdm

from engine.errors import guarded
from engine.results.runs import write_json
from loaders import Index, core, machine, turbo
from loaders.config import Request
from loaders.decode import FORMATS, jpeg_frame
from loaders.errors import BadImage
from loaders.files import check_writable
from loaders.sources import open_index

_SUFFIXES = {
    **dict.fromkeys(("JPEG", "JPEG4", "MPO"), (".jpg", ".jpeg", ".jpe", ".jfif")),
    "PNG": (".png",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
}
CHUNK = 64


class Scanner:
    """Looks at rows of an index; called by many threads."""

    def __init__(self, index: Index, *, duplicates: bool) -> None:
        self.index, self.duplicates = index, duplicates
        self._has_core = not core.why_missing()

    def __call__(self, rows: list[int]) -> list[tuple[int, str, list[str], bytes]]:
        """For each row: why it cannot be used or "", what is odd about it, and a hash of its bytes."""
        status = [-1] * len(rows)
        if self._has_core:  # several times faster than decoding for real; what it gives up is decoded for real
            job = turbo.Job(self.index, np.array(rows))
            job.run_alone()
            status = job.status.tolist()
        return [self._look(row, found) for row, found in zip(rows, status, strict=True)]

    def _look(self, row: int, status: int) -> tuple[int, str, list[str], bytes]:
        index = self.index
        problem, odd, digest = "", [], b""
        try:
            if status not in (turbo.DONE, turbo.WARNED):
                index.read(row)
            content = index.content(row)
            if self.duplicates:
                digest = hashlib.blake2b(content, digest_size=16).digest()
            odd = self._oddities(row, content)
            if status == turbo.WARNED:
                odd.append("damaged data: a part of it may be gray or shifted")
        except BadImage as error:
            problem = str(error)
        return row, problem, odd, digest

    def _oddities(self, row: int, content: bytes) -> list[str]:
        format = self.index.format[row].decode()
        found = []
        suffix = os.path.splitext(self.index.name(row))[1].lower().decode("ascii", "replace")
        if self.index.pieces is None and format in _SUFFIXES and suffix not in _SUFFIXES[format]:
            found.append(f"named {suffix} and is {format}")
        frame = jpeg_frame(content)
        if frame and frame.components == 4:
            found.append("CMYK")
        if format not in ("", "RAW") and (not frame or b"Exif\0" in content):
            try:
                with Image.open(BytesIO(content), formats=FORMATS) as image:
                    turn = image.getexif().get(ExifTags.Base.Orientation, 1)
                    if turn in range(2, 9) and format != "TIFF":
                        found.append(f"EXIF orientation {turn} is not applied")
                    if not frame and image.mode in ("CMYK", "I;16", "RGBA", "LA", "P"):
                        found.append(f"mode {image.mode}")
                    if not frame and getattr(image, "n_frames", 1) > 1 and format != "MPO":
                        found.append("animated")
            except Exception as error:  # Pillow raises of every kind beyond the first picture, which is sound
                found.append(f"damaged {'EXIF' if frame else 'after its first picture'} ({type(error).__name__})")
        return found


def scan(index: Index, workers: int, *, duplicates: bool) -> Iterator[tuple[int, str, list[str], bytes]]:
    """Look at every image, in the order of the index, with progress."""
    chunks = [list(range(at, min(at + CHUNK, len(index)))) for at in range(0, len(index), CHUNK)]
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # Pillow's, of what is listed as odd
    scanner = Scanner(index, duplicates=duplicates)
    pool = ThreadPoolExecutor(workers)
    try:
        with tqdm(total=len(index), unit=" images", disable=None) as progress:
            for found in pool.map(scanner, chunks):
                progress.update(len(found))
                yield from found
    finally:
        pool.shutdown(cancel_futures=True)


@guarded
def main() -> int:
    """Scan, print, and write the report and the quarantine list."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="anything that data.train takes")
    parser.add_argument("--report", type=Path, help="folder for report.json and quarantine.jsonl")
    parser.add_argument("--max-pixels", type=int, default=100_000_000, help="larger images are unusable (%(default)s)")
    parser.add_argument("--no-duplicates", action="store_true", help="do not look for files with equal bytes")
    parser.add_argument("--workers", type=int, default=machine.cores(), help="threads (%(default)s)")
    arguments = parser.parse_args()
    for name in ("workers", "max_pixels"):
        if (value := getattr(arguments, name)) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1, got {value}")
    folder = arguments.report
    if folder:
        check_writable(folder / "report.json")
        folder.mkdir(parents=True, exist_ok=True)
    index = open_index(arguments.data, Request(arguments.max_pixels, asks_labels=False))
    with open(folder / "quarantine.jsonl" if folder else os.devnull, "w", encoding="utf-8") as quarantine:
        report, stopped = build_report(index, arguments.workers, quarantine, duplicates=not arguments.no_duplicates)
    if folder:
        write_json(report, folder / "report.json")
    show(report)
    if folder:
        print(f"written: {folder}/report.json and quarantine.jsonl (data.quarantine=...)")
    if stopped:
        raise stopped
    return 1 if report["unusable"] else 0


def show(report: dict[str, Any]) -> None:
    """Print a report."""
    for entry in report["unusable"]:
        print(f"unusable: {shown(entry['path'])}: {entry['reason']}")
    for entry in report["odd"]:
        print(f"odd: {shown(entry['path'])}: {', '.join(entry['what'])}")
    for names in report["duplicates"]:
        print(f"equal bytes: {', '.join(map(shown, names))}")
    print(
        f"{'' if report['complete'] else 'stopped: '}{report['looked_at']:,} of {report['images']:,} images looked at, "
        f"{len(report['unusable'])} unusable, {len(report['odd'])} odd, "
        f"{len(report['duplicates'])} groups of equal files; formats {report['formats']}"
    )


def build_report(
    index: Index, workers: int, quarantine: TextIO, *, duplicates: bool = True
) -> tuple[dict[str, Any], KeyboardInterrupt | None]:
    """What a scan found, and what cut it short: plain data for JSON, names as `os.fsdecode` gives them.

    Args:
        quarantine: where each unusable image is written when it is found.
    """
    unusable, odd, count, stopped = [], [], 0, None
    same: dict[bytes, list[int]] = defaultdict(list)
    try:
        for row, problem, what, digest in scan(index, workers, duplicates=duplicates):
            name, count = os.fsdecode(index.name(row)), count + 1
            if problem:
                unusable.append({"path": name, "reason": problem})
                quarantine.write(json.dumps(unusable[-1]) + "\n")
                quarantine.flush()
            elif what:
                odd.append({"path": name, "what": what})
            if digest:
                same[digest].append(row)
    except KeyboardInterrupt as error:
        stopped = error
    report = {
        "root": str(index.root),
        "images": len(index),
        "looked_at": count,
        "complete": stopped is None,
        "fingerprint": index.fingerprint,
        "formats": dict(Counter(format.decode() or "none" for format in index.format.tolist())),
        "unusable": unusable,
        "odd": odd,
        "duplicates": [[os.fsdecode(index.name(row)) for row in rows] for rows in same.values() if len(rows) > 1],
    }
    return report, stopped


def shown(name: str) -> str:
    """A name for the terminal: what is not printable is escaped."""
    return os.fsencode(name).decode("utf-8", "backslashreplace").replace("\n", "\\n")


if __name__ == "__main__":
    sys.exit(main())
