"""Write a data set as one `.beton` file, which FFCV and our back end `ffcv` read, or check one that is there.

    python tools/convert_imagenet_to_ffcv.py data/imagenet/train data/imagenet/train.beton
    python tools/convert_imagenet_to_ffcv.py data/imagenet/train data/imagenet/train_raw.beton --mode raw --max-side 400
    python tools/convert_imagenet_to_ffcv.py --verify data/imagenet/train.beton

The source is anything that `data.train` takes. With --mode jpg an image that is small enough keeps its bytes, so
nothing is lost; larger ones are resized and encoded. Nothing has the output's name until it is complete. Beside it
lies `<out>.json`: count, classes, sizes, options, fingerprint of the source and a checksum of every page.
"""

import argparse
import random
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import _root  # noqa: F401
import torch
from torch import Tensor
from torchvision.io import encode_jpeg
from torchvision.transforms.v2 import functional as F
from tqdm import tqdm

from engine.errors import guarded
from loaders import DataError, Index, beton, machine
from loaders.config import Request
from loaders.decode import jpeg_frame
from loaders.errors import BadImage
from loaders.files import check_writable
from loaders.sources import check_quarantine, open_index


class Encoder:
    """Turns rows of an index into samples; called by many threads."""

    def __init__(self, index: Index, options: argparse.Namespace) -> None:
        self.index, self.options = index, options

    def __call__(self, row: int) -> beton.Sample | BadImage:
        """The sample of a row, or why it has none."""
        try:
            sample = self._encode(row)
        except BadImage as error:
            return error
        size, page = len(sample.content), self.options.page_mib << 20
        if size > page:
            return BadImage(f"takes {size:,} bytes, a page has {page:,}; give --page-mib or --max-side")
        return sample

    def _encode(self, row: int) -> beton.Sample:
        index, options = self.index, self.options
        pixels = index.read(row)
        height, width = pixels.shape[1:]
        label, mode = None if index.label is None else int(index.label[row]), options.mode
        longest = max(height, width)
        fits = not options.max_side or longest <= options.max_side
        if longest > beton.MAX_SIDE and fits:
            raise BadImage(f"has a side of {longest} pixels, a .beton holds {beton.MAX_SIDE}; give --max-side")
        if mode == "mixed":  # drawn from the row alone: the same file comes out whoever encodes it
            mode = "raw" if random.Random(row).random() < options.raw_share else "jpg"
        if not fits:
            height, width = (max(1, side * options.max_side // longest) for side in (height, width))
            pixels = F.resize(pixels, [height, width], antialias=True)
        if mode == "smart":
            mode = "raw" if pixels.numel() <= options.smart_kib * 1024 else "jpg"
        if mode == "jpg" and fits and not options.reencode:
            content = index.content(row)
            frame = jpeg_frame(content)
            if frame and frame.components in (1, 3):
                return beton.Sample(content, False, width, height, label)
        return beton.Sample(_bytes(pixels, mode, options.quality), mode == "raw", width, height, label)


def _bytes(pixels: Tensor, mode: str, quality: int) -> bytes:
    if mode == "raw":
        return pixels.permute(1, 2, 0).contiguous().numpy().tobytes()
    return encode_jpeg(pixels.contiguous(), quality=quality).numpy().tobytes()


def in_order(pool: ThreadPoolExecutor, encoder: Encoder, rows: Iterable[int], ahead: int) -> Iterator[tuple]:
    """(row, result) in the order of the rows, never more than `ahead` of them in memory."""
    waiting: deque[tuple[int, Future]] = deque()
    iterator = iter(rows)
    for row in islice(iterator, ahead):
        waiting.append((row, pool.submit(encoder, row)))
    while waiting:
        row, future = waiting.popleft()
        yield row, future.result()
        waiting.extend((row, pool.submit(encoder, row)) for row in islice(iterator, 1))


def convert(options: argparse.Namespace) -> int:
    """Write the file and name what it left out. Returns the number of images."""
    source, out = Path(options.source), Path(options.out)
    if out.exists() and source.exists() and out.samefile(source):
        raise DataError(f"{out}: is the source; expected another name for what is written")
    for path in (out, beton.manifest_path(out)):
        check_writable(path)
    quarantine = Path(options.quarantine) if options.quarantine else None
    request = Request(options.max_pixels, options.labels, asks_labels=False)
    index = open_index(source, request, quarantine=quarantine)
    if quarantine and (said := check_quarantine(quarantine, [index])):
        print(said)
    print(f"{source}: {len(index):,} images, {index.reading}", flush=True)
    rows = range(len(index) if options.limit is None else min(options.limit, len(index)))
    left_out: list[dict[str, str]] = []

    def samples(pool: ThreadPoolExecutor) -> Iterator[beton.Sample]:
        results = in_order(pool, Encoder(index, options), rows, ahead=8 * options.workers)
        for row, result in tqdm(results, total=len(rows), unit=" images", disable=None, smoothing=0.05):
            if isinstance(result, beton.Sample):
                yield result
            elif options.on_bad_image == "stop":
                raise DataError(f"{index.path(row)}: {result}; repair it, or leave it out with --on-bad-image skip")
            else:
                left_out.append({"path": index.path(row), "reason": str(result)})
        if len(left_out) == len(rows):
            first = left_out[0]
            raise DataError(f"{source}: none of {len(rows):,} images can be used, {first['path']} {first['reason']}")

    facts = {
        "classes": index.classes,
        "source": str(source),
        "source_fingerprint": index.fingerprint,
        "source_images": len(index),
        "left_out": left_out,
        "options": {
            name: getattr(options, name)
            for name in ("mode", "max_side", "quality", "raw_share", "smart_kib", "reencode", "limit")
        },
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # the threads are ours
    with ThreadPoolExecutor(options.workers) as pool:
        count = beton.write(
            out,
            samples(pool),
            at_most=len(rows),
            page_size=options.page_mib << 20,
            facts=facts,
            has_labels=index.label is not None,
        )
    for entry in left_out:
        print(f"left out: {entry['path']}: {entry['reason']}")
    return count


def verify(path: Path, workers: int) -> list[str]:
    """Read and decode everything again; what is wrong with the file."""
    content = beton.read(path)
    problems = []
    if content.manifest is None:
        print(f"{path}: no manifest beside it, its pages have no checksums; only decoding is checked")
    else:
        pages = beton.damaged_pages(path, content.manifest)
        total = len(content.manifest["pages_crc32"])
        for number, damaged in tqdm(pages, total=total, desc="checksums", unit=" pages", disable=None):
            if damaged:
                problems.append(f"page {number} differs from what was written")
    index = open_index(path, Request(beton.MAX_SIDE**2, asks_labels=False))

    def decodes(row: int) -> str:
        try:
            index.read(row)
        except BadImage as error:
            return f"image {row}: {error}"
        return ""

    torch.set_num_threads(1)
    with ThreadPoolExecutor(workers) as pool:
        found = pool.map(decodes, range(len(index)), chunksize=16)
        problems += [p for p in tqdm(found, total=len(index), desc="decoding", unit=" images", disable=None) if p]
    return problems


@guarded
def main() -> int:
    """Parse the command line; convert or verify."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", help="anything that data.train takes, with or without labels")
    parser.add_argument("out", nargs="?", help="the file to write, ending in .beton")
    parser.add_argument("--verify", type=Path, metavar="BETON", help="check this file instead, reading all of it")
    parser.add_argument("--mode", choices=["jpg", "raw", "mixed", "smart"], default="jpg")
    parser.add_argument(
        "--max-side", type=int, default=500, help="longer images are resized; 0 keeps all (%(default)s)"
    )
    parser.add_argument("--quality", type=int, default=90, help="of images that are encoded (%(default)s)")
    parser.add_argument("--reencode", action="store_true", help="also encode images that could keep their bytes")
    parser.add_argument("--raw-share", type=float, default=0.5, help="mixed: share of raw images (%(default)s)")
    parser.add_argument("--smart-kib", type=int, default=360, help="smart: raw up to this size (%(default)s)")
    parser.add_argument("--on-bad-image", choices=["stop", "skip"], default="stop")
    parser.add_argument("--quarantine", help="list of images to leave out, as tools/scan_images.py writes it")
    parser.add_argument("--labels", choices=["auto", "none"], help="as data.labels of a recipe")
    parser.add_argument("--max-pixels", type=int, default=100_000_000, help="larger images count as bad (%(default)s)")
    parser.add_argument("--page-mib", type=int, default=8, help="page size; an image lies in one (%(default)s)")
    parser.add_argument("--workers", type=int, default=machine.cores(), help="threads (%(default)s)")
    parser.add_argument("--limit", type=int, help="only this many images, from the first")
    options = parser.parse_args()
    if options.verify is None and (options.source is None or options.out is None):
        parser.error("expected a source and an output, or --verify")
    low, high = beton.PAGE_SIZES
    for name, value, legal in (
        ("--out", Path(options.out or "x.beton").suffix, [".beton"]),
        ("--quality", options.quality, range(1, 101)),
        ("--page-mib", options.page_mib, range(low >> 20, high >> 20)),
        ("--workers", options.workers, range(1, 1025)),
        ("--max-side", options.max_side, range(beton.MAX_SIDE + 1)),
        ("--smart-kib", options.smart_kib, range(1 << 21)),
        ("--limit", 1 if options.limit is None else options.limit, range(1, 1 << 40)),
        ("--max-pixels", options.max_pixels, range(1, beton.MAX_SIDE**2 + 1)),
    ):
        if value not in legal:
            expected = f"{legal[0]} to {legal[-1]}" if isinstance(legal, range) else legal[0]
            parser.error(f"{name}: expected {expected}, got {value}")
    if not 0 <= options.raw_share <= 1:
        parser.error(f"--raw-share: expected 0 to 1, got {options.raw_share}")
    started = time.perf_counter()
    if options.verify:
        problems = verify(options.verify, options.workers)
        for problem in problems:
            print(f"{options.verify}: {problem}")
        print(f"{options.verify}: {f'{len(problems)} problems' if problems else 'whole'}")
        return 1 if problems else 0
    count = convert(options)
    seconds, size = time.perf_counter() - started, Path(options.out).stat().st_size
    print(f"{options.out}: {count:,} images, {size / 2**30:.2f} GiB ({size / max(count, 1) / 1024:.0f} KiB per image), "
          f"{count / seconds:.0f} images/s")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
