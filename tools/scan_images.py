"""Find the images of a data set that cannot be used, or should be looked at, before a run finds them.

    python tools/scan_images.py data/imagenet/train --report runs/scan
    python tools/train.py recipes/burn_stage1.yaml data.quarantine=runs/scan/quarantine.jsonl

Every image is read and decoded (nothing beyond --max-pixels is). Unusable ones (empty, truncated, not an image, too
large) go to quarantine.jsonl, which every back end honors; CMYK, wrongly named, duplicate and otherwise odd ones are
listed in report.json and stay. Exit code 1 if anything is unusable.
"""

import argparse
import hashlib
import json
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import _root  # noqa: F401
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from loaders import DataError, Index, machine, turbo
from loaders.decode import jpeg_frame
from loaders.errors import BadImage
from loaders.sources import open_index

_SUFFIXES = {
    "JPEG": (".jpg", ".jpeg"),
    "MPO": (".jpg", ".jpeg"),
    "PNG": (".png",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "PPM": (".ppm",),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
}
CHUNK = 64


class Scanner:
    """Looks at rows of an index; called by many threads."""

    def __init__(self, index: Index, *, duplicates: bool) -> None:
        self.index, self.duplicates = index, duplicates
        self._has_core = not turbo.why_missing()

    def __call__(self, rows: list[int]) -> list[tuple[int, str, list[str], bytes]]:
        """For each row: why it cannot be used or "", what is odd about it, and a hash of its bytes."""
        decoded = set()
        if self._has_core:  # several times faster than decoding for real; what it gives up is decoded for real
            job = turbo.Job(self.index, np.array(rows))
            job.run_alone()
            decoded = {row for row, status in zip(rows, job.status.tolist(), strict=True) if status == turbo.DONE}
        return [self._look(row, row in decoded) for row in rows]

    def _look(self, row: int, decodes: bool) -> tuple[int, str, list[str], bytes]:
        index = self.index
        problem, odd, digest = "", [], b""
        try:
            if not decodes:
                index.read(row)
            content = index.content(row)
            if self.duplicates:
                digest = hashlib.blake2b(content, digest_size=16).digest()
            odd = self._oddities(row, content)
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
        if not frame and format not in ("", "RAW"):
            with Image.open(BytesIO(content)) as image:
                if image.mode in ("CMYK", "I;16", "RGBA", "LA", "P"):
                    found.append(f"mode {image.mode}")
                if getattr(image, "n_frames", 1) > 1 and format != "MPO":
                    found.append("animated")
        return found


def scan(index: Index, workers: int, *, duplicates: bool) -> Iterator[tuple[int, str, list[str], bytes]]:
    """Look at every image, in the order of the index, with progress."""
    chunks = [list(range(at, min(at + CHUNK, len(index)))) for at in range(0, len(index), CHUNK)]
    torch.set_num_threads(1)
    scanner = Scanner(index, duplicates=duplicates)
    with ThreadPoolExecutor(workers) as pool, tqdm(total=len(index), unit=" images", disable=None) as progress:
        for found in pool.map(scanner, chunks):
            progress.update(len(found))
            yield from found


def main() -> int:
    """Scan, print, and write the report and the quarantine list."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="anything that data.train takes")
    parser.add_argument("--report", type=Path, help="folder for report.json and quarantine.jsonl")
    parser.add_argument("--max-pixels", type=int, default=100_000_000, help="larger images are unusable (%(default)s)")
    parser.add_argument("--no-duplicates", action="store_true", help="do not look for files with equal bytes")
    parser.add_argument("--workers", type=int, default=machine.cores(), help="threads (%(default)s)")
    arguments = parser.parse_args()
    try:
        index = open_index(arguments.data, max_pixels=arguments.max_pixels)
        report = build_report(index, arguments.workers, duplicates=not arguments.no_duplicates)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for entry in report["unusable"]:
        print(f"unusable: {shown(entry['path'])}: {entry['reason']}")
    for entry in report["odd"]:
        print(f"odd: {shown(entry['path'])}: {', '.join(entry['what'])}")
    for names in report["duplicates"]:
        print(f"equal bytes: {', '.join(map(shown, names))}")
    print(
        f"{report['images']:,} images, {len(report['unusable'])} unusable, {len(report['odd'])} odd, "
        f"{len(report['duplicates'])} groups of equal files; formats {report['formats']}"
    )
    if arguments.report:
        arguments.report.mkdir(parents=True, exist_ok=True)
        (arguments.report / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        lines = "".join(json.dumps(entry) + "\n" for entry in report["unusable"])
        (arguments.report / "quarantine.jsonl").write_text(lines, encoding="utf-8")
        print(f"written: {arguments.report}/report.json and quarantine.jsonl (data.quarantine=...)")
    return 1 if report["unusable"] else 0


def build_report(index: Index, workers: int, *, duplicates: bool = True) -> dict[str, Any]:
    """What a scan found: plain data for JSON, names as `os.fsdecode` gives them."""
    unusable, odd = [], []
    same: dict[bytes, list[int]] = defaultdict(list)
    for row, problem, what, digest in scan(index, workers, duplicates=duplicates):
        name = os.fsdecode(index.name(row))
        if problem:
            unusable.append({"path": name, "reason": problem})
        elif what:
            odd.append({"path": name, "what": what})
        if digest:
            same[digest].append(row)
    return {
        "root": str(index.root),
        "images": len(index),
        "fingerprint": index.fingerprint,
        "formats": dict(Counter(format.decode() or "none" for format in index.format.tolist())),
        "unusable": unusable,
        "odd": odd,
        "duplicates": [[os.fsdecode(index.name(row)) for row in rows] for rows in same.values() if len(rows) > 1],
    }


def shown(name: str) -> str:
    """A name for the terminal: what is not printable is escaped."""
    return os.fsencode(name).decode("utf-8", "backslashreplace").replace("\n", "\\n")


if __name__ == "__main__":
    sys.exit(main())
