"""How the index and the order grow with the number of images, from ten thousand files to 400 million rows.

    python benchmarks/scale.py                                  # all of it, some 40 minutes on two quiet cores
    python benchmarks/scale.py --only files --sizes 10000 100000
    python benchmarks/scale.py --only order --sizes 10000 --simulated 1280000 --rounds 5
    python benchmarks/scale.py --only shards --shards 40 --shard-mb 25 --folder /mnt/disk
    python benchmarks/scale.py --draw benchmarks/scale.json     # the figure and the table again

Writes scale.json (every round), scale.png and, on standard output, a table in Markdown. Every number comes from a
process of its own; what is compared takes turns (A B A B), and claims are ratios within a round.

- Files are hard links to a few JPEG files, a quarter of them with 20 KB of EXIF, in folders of 1,000: names are real,
  inodes few. Directories are in the cache. The bare loop is a C program that opens, reads (4,096 bytes) and closes the
  same names in the same order with the same number of threads; the index also lists them, and writes its cache.
- Rows of the order are simulated: columns of one number, repeated without memory.
- Shards are read by `turbo`, one small view, a part of an epoch. "Cold": the pages were dropped by posix_fadvise, and
  mincore says how many are left.
"""

import argparse
import contextlib
import ctypes
import io
import json
import mmap
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np

import loaders
from loaders import DataConfig, headers, index_file
from loaders.config import Request
from loaders.index import Index, Names
from loaders.order import VERSION
from loaders.sampler import Stream
from loaders.sources import open_index
from loaders.views import View

OLDER = "f9b53a6"
IMAGENET = 1_280_000
BASE = 10  # images of a start whose memory is that of starting at all
LINKS = 50_000  # to a file: ext4 allows 65,000
MAX_PIXELS = 10**8
MAX_SORTED = 14_000_000  # rows: version 1 takes about 110 bytes for each
POSITIONS, USUAL = 256, 20
BATCH = 64
VIEWS = (View.model_validate({"preset": "burn"}),) * 2
PARTS = ("files", "order", "shards")
CALLS = ("openat", "fstat", "newfstatat", "pread64", "read", "close")

BARE = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static char *names, **name;
static long count, next;
static int base;

static void *work(void *unused) {
  char window[4096];
  long first;
  while ((first = __atomic_fetch_add(&next, 64, __ATOMIC_RELAXED)) < count)
    for (long i = first; i < first + 64 && i < count; i++) {
      const int file = openat(base, name[i], O_RDONLY | O_CLOEXEC);
      if (file < 0 || read(file, window, sizeof window) <= 0 || close(file)) exit(3);
    }
  return unused;
}

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + t.tv_nsec * 1e-9;
}

int main(int argc, char **argv) { /* folder, file of names that end with a 0, threads */
  const int list = open(argv[2], O_RDONLY), threads = atoi(argv[3]);
  struct stat facts;
  if (argc != 4 || threads < 1 || threads > 1024 || fstat(list, &facts)) return 2;
  names = malloc(facts.st_size);
  for (long have = 0, got; have < facts.st_size; have += got)
    if ((got = read(list, names + have, facts.st_size - have)) <= 0) return 2;
  for (long i = 0; i < facts.st_size; i++) count += !names[i];
  name = malloc(count * sizeof *name);
  for (long i = 0, n = 0; n < count; n++) {
    name[n] = names + i;
    while (names[i++]) {}
  }
  base = open(argv[1], O_RDONLY);
  pthread_t ids[1024];
  const double start = now();
  for (int t = 0; t < threads; t++) pthread_create(&ids[t], 0, work, 0);
  for (int t = 0; t < threads; t++) pthread_join(ids[t], 0);
  printf("{\"seconds\": %.9f}\n", now() - start);
  return 0;
}
"""

# What `start` does, for the older code: it runs in that code's tree, where this file is not.
OLDER_START = """
import contextlib, json, sys, time
from pathlib import Path
from loaders.index import open_index
def memory(name, file="/proc/self/status"):
    return next(int(line.split()[1]) for line in open(file) if line.startswith(name + ":"))
with contextlib.suppress(OSError):
    Path("/proc/self/clear_refs").write_text("5")
resident, private = memory("VmRSS"), memory("Anonymous", "/proc/self/smaps_rollup")
started = time.perf_counter()
index = open_index(Path(sys.argv[1]), max_pixels=10**8)
seconds = time.perf_counter() - started
print(json.dumps({"seconds": seconds, "images": len(index), "peak_kib": memory("VmHWM") - resident,
                  "kept_kib": memory("Anonymous", "/proc/self/smaps_rollup") - private}))
"""


# ------------------------------------------------------------------------------------------------ in a fresh process


def memory(name: str, file: str = "/proc/self/status") -> int:
    """A line of Linux's account of this process, KiB."""
    return next(int(line.split()[1]) for line in Path(file).read_text().splitlines() if line.startswith(f"{name}:"))


def private() -> int:
    """Memory that no other process shares, KiB."""
    return memory("Anonymous", "/proc/self/smaps_rollup")


def start(root: str) -> dict[str, Any]:
    """Open a data set: seconds apart from imports, and memory."""
    seconds = {"headers": 0.0}
    of_files = headers.of_files

    def timed(*given: Any) -> Any:
        began = time.perf_counter()
        facts = of_files(*given)
        seconds["headers"] = time.perf_counter() - began
        return facts

    headers.of_files = timed
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on
    resident, before = memory("VmRSS"), private()
    began = time.perf_counter()
    index = open_index(Path(root), Request(MAX_PIXELS))
    return {
        "seconds": time.perf_counter() - began, "headers_seconds": seconds["headers"], "images": len(index),
        "problems": len(index.problems), "peak_kib": memory("VmHWM") - resident, "kept_kib": private() - before,
    }  # fmt: skip


def traced_start(root: str) -> dict[str, Any]:
    """The peak of what Python and NumPy allocate in a first start."""
    tracemalloc.start()
    index = open_index(Path(root), Request(MAX_PIXELS))
    return {"images": len(index), "peak_bytes": tracemalloc.get_traced_memory()[1]}


def kept(small: str, large: str) -> dict[str, Any]:
    """Private memory that a rank keeps of an index: mapped, and three epochs begun."""

    def use(path: str) -> Stream:
        stream = Stream(index_file.open_file(Path(path), max_pixels=MAX_PIXELS, trusted=True), VIEWS, 0)
        for epoch in range(3):
            stream.plan(range(epoch * len(stream.index), epoch * len(stream.index) + POSITIONS))
        return stream

    streams = [use(small)]
    before = private()
    streams.append(use(large))
    print("ready", flush=True)
    sys.stdin.readline()  # until all ranks are here
    return {"images": len(streams[-1].index), "kept_kib": private() - before}


def simulated(count: int) -> Index:
    """Rows without memory."""
    sides = np.broadcast_to(np.int32(300), (count,))
    nothing = Names(np.zeros(0, dtype=np.uint8), np.zeros(0, dtype=np.int64))
    return Index(
        Path("simulated"),
        [],
        nothing,
        None,
        sides,
        sides,
        np.broadcast_to(np.bytes_(b"JPEG"), (count,)),
        {},
        MAX_PIXELS,
    )


def plans(size: int, kind: str, traced: bool) -> dict[str, Any]:
    """Time of the first plan of an epoch and of usual ones, medians over some epochs; or their memory."""

    def stream(count: int) -> Stream:
        window = 8 if kind == "blocks" else None
        return Stream(simulated(count), VIEWS, 0, version=1 if kind == "sorted" else VERSION, window=window)

    def timed(stream: Stream, position: int) -> float:
        began = time.perf_counter()
        stream.plan(range(position, position + POSITIONS))
        return time.perf_counter() - began

    warm = stream(4096)
    for _ in range(USUAL):
        timed(warm, 0)
    if traced:
        tracemalloc.start()
    measured = stream(size)
    first, usual = [], []
    timed(measured, 0)
    epochs = 9 if kind != "sorted" or size <= 10**5 else 1  # version 1 takes up to 10 s for each
    for epoch in range(1, epochs + 1):
        first.append(timed(measured, epoch * size))
        usual += [timed(measured, epoch * size + (size // 2 + 256 * n) % (size - POSITIONS)) for n in range(USUAL)]
    if traced:
        kept_bytes, peak = tracemalloc.get_traced_memory()
        return {"peak_bytes": peak, "kept_bytes": kept_bytes}
    return {"first_seconds": median(first), "usual_seconds": median(usual)}


def shard_config(root: str, order: str, window: int) -> DataConfig:
    """One small view, so that decoding takes as little as it can."""
    return DataConfig(
        backend="turbo", train=root, batch_size=BATCH, micro_batch=BATCH, order=order, window=window,
        views=(View.model_validate({"preset": "crop_flip", "size": 64}),),
        eval_view=View.model_validate({"preset": "validation"}), options=loaders.load("turbo").Options(),
    )  # fmt: skip


def read_shards(root: str, order: str, window: int, batches: int) -> dict[str, Any]:
    """Images per second and bytes from the disk."""

    def from_disk() -> int:
        return int(Path("/proc/self/io").read_text().split("\nread_bytes:")[1].split()[0])

    config = shard_config(root, order, window)
    index = loaders.open_data(config, "train")
    before, began = from_disk(), time.perf_counter()
    loader = loaders.open_train(config, index, seed=0)
    for _ in range(batches):
        next(loader)
    seconds = time.perf_counter() - began
    loader.close()
    return {
        "images_per_second": batches * BATCH / seconds,
        "disk_bytes_per_image": (from_disk() - before) / batches / BATCH,
    }


def count_seeks(root: str, order: str, window: int, batches: int) -> dict[str, Any]:
    """What the order asks of a disk on which the shards lie one after the other; counted, not timed."""
    config = shard_config(root, order, window)
    index = loaders.open_data(config, "train")
    pieces = index.pieces
    assert pieces is not None
    stream = Stream(index, config.views, 0, window=window if order == "blocks" else None)
    _, rows = stream.images(range(batches * BATCH))
    sizes = [os.path.getsize(file) for file in pieces.files]
    at = np.concatenate(([0], np.cumsum(sizes)))[pieces.file[rows]] + pieces.offset[rows]
    distance = np.abs(at[1:] - (at + pieces.length[rows])[:-1])
    chunks = [rows[first : first + 1000] for first in range(0, len(rows), 1000)]
    touched = [len(np.unique(pieces.file[chunk])) for chunk in chunks]
    read = [int(pieces.length[chunk].sum()) for chunk in chunks]
    return {
        "seek_mb": float(distance.mean() / 1e6),
        "shards_per_1000_images": float(np.mean(touched)),
        "mb_per_touched_shard": float(
            np.mean([size / number for size, number in zip(read, touched, strict=True)]) / 1e6
        ),
        "image_bytes": float(pieces.length[rows].mean()),
    }


CHILDREN: dict[str, Callable[..., dict[str, Any]]] = {
    "start": start, "traced_start": traced_start, "kept": kept, "plans": plans, "read_shards": read_shards,
    "count_seeks": count_seeks,
}  # fmt: skip


def command(name: str, **given: Any) -> list[str]:
    return [sys.executable, str(Path(__file__).resolve()), "--child", json.dumps([name, given])]


def result_of(words: list[str], cache: Path, cwd: Path = ROOT) -> dict[str, Any]:
    """Run a process and read the JSON of its last line."""
    done = subprocess.run(
        words, cwd=cwd, capture_output=True, text=True, env={**os.environ, "XDG_CACHE_HOME": str(cache)}
    )
    if done.returncode:
        raise SystemExit(f"scale.py: {' '.join(words)[:400]}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


# ------------------------------------------------------------------------------------------------ what is measured


def jpegs(count: int) -> list[bytes]:
    """JPEG files of several sizes, as large as photos; every fourth with much EXIF before its frame."""
    from PIL import Image

    random = np.random.default_rng(0)
    sides = [(500, 375), (375, 500), (640, 480), (300, 400), (1024, 768), (500, 333)]
    exif = Image.Exif()
    exif[0x010E] = "description " * 1700
    made = []
    for number in range(count):
        width, height = sides[number % len(sides)]
        coarse = Image.fromarray(random.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
        pixels = (pixels + random.normal(0, 12, pixels.shape)).clip(0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=85, exif=exif.tobytes() if number % 4 == 3 else b"")
        made.append(file.getvalue())
    return made


def name_of(number: int) -> str:
    return f"c{number // 1000:06d}/img_{number:09d}.jpg"


def link_files(folder: Path, count: int) -> dict[str, Any]:
    """`count` names of real files, and a list of them beside the folder."""
    originals = []
    for number, content in enumerate(jpegs(max(8, -(-count // LINKS)))):
        originals.append(folder.with_name(f"{folder.name}-{number}"))
        originals[-1].write_bytes(content)
    for number in range(count):
        path = folder / name_of(number)
        if number % 1000 == 0:
            path.parent.mkdir(parents=True)
        os.link(originals[number % len(originals)], path)
    for original in originals:
        original.unlink()
    folder.with_suffix(".names").write_text("".join(f"{name_of(n)}\0" for n in range(count)))
    return {}


def write_rows(path: Path, root: Path, count: int) -> dict[str, Any]:
    """An index file of made-up columns; only the first of its images is there."""
    names = Names.of(name_of(number).encode() for number in range(count))
    sides = np.full(count, 300, dtype=np.int32)
    numbers = np.full(count, 1000, dtype=np.int64)
    label = (np.arange(count) // 1000).astype(np.int32)
    classes = [f"c{number:06d}" for number in range(-(-count // 1000))]
    format = np.full(count, b"JPEG", dtype="S8")
    index_file.write(Index(root, classes, names, label, sides, sides, format, {}, MAX_PIXELS, numbers, numbers), path)
    return {"bytes_per_image": path.stat().st_size / count}


def make_index(root: Path, cache: Path) -> dict[str, Any]:
    """As a user does."""
    out = root.with_suffix(".index")
    words = [sys.executable, str(ROOT / "tools" / "make_index.py"), str(root), str(out)]
    subprocess.run(words, check=True, capture_output=True, env={**os.environ, "XDG_CACHE_HOME": str(cache)})
    return {"bytes_per_image": out.stat().st_size / len(index_file.open_file(out, max_pixels=MAX_PIXELS))}


def ranks(count: int, small: Path, large: Path) -> dict[str, Any]:
    """Memory of `count` processes that map one index at the same time."""
    words = command("kept", small=str(small), large=str(large))
    pipe = subprocess.PIPE
    children = [subprocess.Popen(words, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) for _ in range(count)]
    for child in children:
        assert child.stdout
        if child.stdout.readline() != "ready\n":
            raise SystemExit("scale.py: a rank ended early")
    found = [json.loads(child.communicate("go\n")[0]) for child in children]
    return {"kept_kib": [one["kept_kib"] for one in found]}


def system_calls(root: Path, base: Path, place: Path) -> dict[str, Any]:
    """Calls of a first start for each file, those of a start with `BASE` files taken off."""
    if not shutil.which("strace"):
        return {"reason": "no strace"}
    counts = []
    for folder in (root, base):
        cache, report = place / "cache-traced", place / "strace"
        shutil.rmtree(cache, ignore_errors=True)
        words = ["strace", "-f", "-c", "-o", str(report), *command("start", root=str(folder))]
        images = result_of(words, cache)["images"]
        calls = {}
        for line in report.read_text().splitlines():
            parts = line.split()
            if len(parts) >= 5 and parts[-1] in CALLS:
                calls[parts[-1]] = int(parts[3])
        counts.append((images, calls))
    (more, large), (less, small) = counts
    per_file = {name: (large.get(name, 0) - small.get(name, 0)) / (more - less) for name in CALLS}
    return {"per_file": per_file, "sum": sum(per_file.values())}


def older_code(place: Path) -> tuple[Path | None, str]:
    """The package of the older index in a folder of its own, or why there is none."""
    done = subprocess.run(["git", "archive", OLDER, "loaders"], cwd=ROOT, capture_output=True)
    if done.returncode:
        return None, done.stderr.decode(errors="replace").strip().splitlines()[-1]
    folder = place / "older"
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return folder, ""


def make_shards(folder: Path, count: int, megabytes: float) -> dict[str, Any]:
    """Tar shards, written to the disk."""
    contents = jpegs(64)
    folder.mkdir()
    number = 0
    for shard in range(count):
        path = folder / f"{shard:04d}.tar"
        with tarfile.open(path, "w") as tar:
            while tar.offset < megabytes * 1e6:
                entry = tarfile.TarInfo(f"{number:07d}.jpg")
                entry.size = len(contents[number % len(contents)])
                tar.addfile(entry, io.BytesIO(contents[number % len(contents)]))
                number += 1
    return {"images": number, "bytes": sum(path.stat().st_size for path in folder.iterdir())}


def drop_pages(folder: Path) -> None:
    """Out of the page cache; what is not on the disk yet goes there first."""
    for path in folder.iterdir():
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def resident_share(folder: Path) -> float:
    """Share of the files' pages that are in the page cache, by mincore."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
    found = pages = 0
    for path in folder.iterdir():
        size = path.stat().st_size
        file = os.open(path, os.O_RDONLY)
        at = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file, 0)
        count = -(-size // mmap.PAGESIZE)
        flags = (ctypes.c_ubyte * count)()
        if libc.mincore(ctypes.c_void_p(at), ctypes.c_size_t(size), flags):
            raise OSError(ctypes.get_errno(), "mincore")
        libc.munmap(ctypes.c_void_p(at), ctypes.c_size_t(size))
        os.close(file)
        found, pages = found + sum(flag & 1 for flag in flags), pages + count
    return found / pages


def shards_round(folder: Path, place: Path, order: str, window: int, batches: int, *, cold: bool) -> dict[str, Any]:
    if cold:
        drop_pages(folder)
    else:
        for path in folder.iterdir():
            path.read_bytes()
    resident = resident_share(folder)
    words = command("read_shards", root=str(folder), order=order, window=window, batches=batches)
    return {"resident_before": resident, **result_of(words, place / "cache-shards")}


# ------------------------------------------------------------------------------------------------ the plan


class Step(NamedTuple):
    """One number, or the making of what is measured."""

    what: str
    size: int
    """Images."""
    round: int
    cost: float
    """Rough seconds, for the time that is left."""
    run: Callable[[], dict[str, Any]]


def file_steps(place: Path, sizes: list[int], rounds: int) -> Iterator[Step]:
    older, _ = older_code(place)
    (place / "bare.c").write_text(BARE)
    words = ["cc", "-O2", "-pthread", "-o", str(place / "bare"), str(place / "bare.c")]
    subprocess.run(words, check=True)

    def fresh(root: Path, words: list[str], cache: str, cwd: Path = ROOT) -> dict[str, Any]:
        shutil.rmtree(place / cache, ignore_errors=True)
        return result_of(words, place / cache, cwd)

    def of(size: int) -> Iterator[Step]:
        root = place / f"files-{size}"
        opened, from_file = command("start", root=str(root)), command("start", root=str(root.with_suffix(".index")))
        bare = [
            str(place / "bare"),
            str(root),
            str(root.with_suffix(".names")),
            str(min(headers.THREADS, -(-size // 64))),
        ]
        old = [sys.executable, "-c", OLDER_START, str(root)]
        yield Step("make files", size, 0, 3 + size / 25_000, lambda: link_files(root, size))
        for n in range(rounds):
            yield Step("bare loop", size, n, size / 1e5, lambda: result_of(bare, place))
            yield Step("first start", size, n, 6 + size / 5e4, lambda: fresh(root, opened, "cache"))
            if older:
                yield Step("older first start", size, n, 6 + size / 8e3, lambda: fresh(root, old, "cache-old", older))
            yield Step("later start", size, n, 6 + size / 2e5, lambda: result_of(opened, place / "cache"))
            if older:
                yield Step("older later start", size, n, 6 + size / 1e5,
                           lambda: result_of(old, place / "cache-old", older))  # fmt: skip
            if n == 0:
                yield Step("make index", size, 0, 6 + size / 2e5, lambda: make_index(root, place / "cache"))
            yield Step("index file", size, n, 6, lambda: result_of(from_file, place))
        yield Step("traced start", size, 0, 6 + size / 2e4,
                   lambda: fresh(root, command("traced_start", root=str(root)), "cache"))  # fmt: skip

    yield from of(BASE)
    base = place / f"files-{BASE}"
    for size in sizes:
        yield from of(size)
        root = place / f"files-{size}"
        if size == min(sizes):
            yield Step("system calls", size, 0, 30 + size / 500, lambda root=root: system_calls(root, base, place))
        yield from rank_steps(size, base.with_suffix(".index"), root.with_suffix(".index"), rounds)
        yield Step("remove files", size, 0, size / 4e4, lambda root=root: shutil.rmtree(root) or {})
    rows = place / "rows.index"
    yield Step("make rows", IMAGENET, 0, 8, lambda: write_rows(rows, base, IMAGENET))
    for n in range(rounds):
        words = command("start", root=str(rows))
        yield Step("index file", IMAGENET, n, 6, lambda words=words: result_of(words, place))
    yield from rank_steps(IMAGENET, base.with_suffix(".index"), rows, rounds)


def rank_steps(size: int, small: Path, large: Path, rounds: int) -> Iterator[Step]:
    for n in range(rounds):
        yield Step("one rank", size, n, 6, lambda: ranks(1, small, large))
        yield Step("four ranks", size, n, 14, lambda: ranks(4, small, large))


def order_steps(place: Path, sizes: list[int], rounds: int) -> Iterator[Step]:
    for size in sizes:
        kinds = ["full", "blocks", *(["sorted"] if size <= MAX_SORTED else [])]
        for traced in (False, True):
            for n in range(1 if traced else rounds):
                for kind in kinds:
                    words = command("plans", size=size, kind=kind, traced=traced)
                    cost = 6 + (size / 5e5 if kind == "sorted" else 0)
                    name = f"order {kind}, memory" if traced else f"order {kind}"
                    yield Step(name, size, n, cost, lambda words=words: result_of(words, place))


def shard_steps(place: Path, count: int, megabytes: float, window: int, rounds: int) -> Iterator[Step]:
    folder = place / "shards"
    images: dict[str, Any] = {}

    def make() -> dict[str, Any]:
        images.update(make_shards(folder, count, megabytes))
        return images

    def counted(order: str) -> dict[str, Any]:  # the first one also fills the cache: later starts touch no shard
        words = command("count_seeks", root=str(folder), order=order, window=window, batches=batches())
        return result_of(words, place / "cache-shards")

    def batches() -> int:
        return max(1, images["images"] // 2 // BATCH)

    yield Step("make shards", 0, 0, count * megabytes / 40, make)
    for order in ("full", "blocks"):
        yield Step(f"counted {order}", 0, 0, 6, lambda order=order: counted(order))
    for cold in (True, False):
        for n in range(rounds):
            for order in ("full", "blocks"):
                name = f"{'cold' if cold else 'warm'} {order}"
                yield Step(name, 0, n, 8 + count * megabytes / 60,
                           lambda order=order, cold=cold:
                           shards_round(folder, place, order, window, batches(), cold=cold))  # fmt: skip


def measure(steps: list[Step]) -> list[dict[str, Any]]:
    """Take every step, and say what was found and how much time is left."""
    records = []
    began, done, whole = time.perf_counter(), 0.0, sum(step.cost for step in steps)
    for number, step in enumerate(steps, 1):
        found = step.run()
        done += step.cost
        left = (time.perf_counter() - began) / done * (whole - done)
        shown = ", ".join(f"{key} {value:.4g}" for key, value in found.items() if isinstance(value, int | float))
        at = f"{step.what}, {step.size:,} images" if step.size else step.what
        print(f"[{number}/{len(steps)}] {at}: {shown or 'done'}; {left / 60:.1f} min left", file=sys.stderr, flush=True)
        records.append({"what": step.what, "size": step.size, "round": step.round, **found})
    return records


# ------------------------------------------------------------------------------------------------ what it says


class Found:
    """The records of a result."""

    def __init__(self, records: list[dict[str, Any]]) -> None:
        self.records = records

    def sizes(self, *whats: str) -> list[int]:
        """At which numbers of images any of them was measured, but for the base."""
        return sorted({r["size"] for r in self.records if r["what"] in whats and r["size"] > BASE})

    def of(self, what: str, size: int, key: str) -> list[Any]:
        """One value a round."""
        return [r[key] for r in self.records if r["what"] == what and r["size"] == size and key in r]

    def ratio(self, what: str, other: str, size: int, key: str) -> list[float]:
        """Of two values in the same round."""
        return [a / b for a, b in zip(self.of(what, size, key), self.of(other, size, key), strict=False)]

    def peak(self, what: str, size: int) -> list[float]:
        """Bytes at the peak of a start, without those of a start at all."""
        base = self.of(what, BASE, "peak_kib")
        return [(peak - median(base)) * 1024 for peak in self.of(what, size, "peak_kib")] if base else []

    def most(self, what: str, size: int) -> list[int]:
        """KiB that the process with most keeps."""
        return [max(values) for values in self.of(what, size, "kept_kib")]


def cell(values: list[float], digits: int = 2) -> str:
    from engine.bench.clock import median_range

    return median_range(values, digits) if values else ""


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    kept_rows = [row for row in rows if any(row[1:])]
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *kept_rows)] if kept_rows else []


def markdown(result: dict[str, Any]) -> str:
    """Tables: medians with the range over the rounds."""
    found = Found(result["records"])
    lines: list[str] = []
    sizes = found.sizes("first start", "index file")
    if sizes:
        rows = {
            "first start, files/s": lambda n: cell([n / s for s in found.of("first start", n, "seconds")], 0),
            "of it headers, files/s": lambda n: cell(
                [n / s for s in found.of("first start", n, "headers_seconds") if s], 0
            ),
            "first start: rate over the bare loop's (0.5 or more)": lambda n: cell(
                found.ratio("bare loop", "first start", n, "seconds")
            ),
            f"first start: rate over that of {OLDER} (5 or more)": lambda n: cell(
                found.ratio("older first start", "first start", n, "seconds"), 1
            ),
            "later start, s": lambda n: cell(found.of("later start", n, "seconds")),
            f"later start: rate over that of {OLDER}": lambda n: cell(
                found.ratio("older later start", "later start", n, "seconds"), 1
            ),
            f"start from an index file, s ({IMAGENET:,}: below 2)": lambda n: cell(
                found.of("index file", n, "seconds"), 3
            ),
            "peak of a first start, bytes an image (300 or less)": lambda n: cell(
                [peak / n for peak in found.peak("first start", n)], 0
            ),
            f"the same, {OLDER}": lambda n: cell([peak / n for peak in found.peak("older first start", n)], 0),
            "peak of what Python and NumPy allocate, bytes an image": lambda n: cell(
                [peak / n for peak in found.of("traced start", n, "peak_bytes")], 0
            ),
            "kept per process, one rank, KiB": lambda n: cell(found.most("one rank", n), 0),
            "kept per process, four ranks, the largest, KiB": lambda n: cell(found.most("four ranks", n), 0),
            "index file, bytes an image": lambda n: cell(
                found.of("make index", n, "bytes_per_image") + found.of("make rows", n, "bytes_per_image"), 0
            ),
        }
        body = [[name, *(value(n) for n in sizes)] for name, value in rows.items()]
        lines += [*table(["files", *(f"{n:,}" for n in sizes)], body), ""]
        for record in result["records"]:
            if record["what"] == "system calls" and "per_file" in record:
                parts = ", ".join(f"{name} {count:.2f}" for name, count in record["per_file"].items() if count >= 0.005)
                lines += [f"System calls of a first start for each file: {record['sum']:.2f} ({parts}).", ""]
        if result["older"]:
            lines += [f"{OLDER} was not measured: {result['older']}", ""]
    sizes = found.sizes("order full")
    names = {"full": "full", "blocks": "blocks", "sorted": "version 1"}
    if sizes:
        body = []
        for kind, name in names.items():
            what = f"order {kind}"

            def pause(n: int, what: str = what) -> list[float]:
                first, usual = found.of(what, n, "first_seconds"), found.of(what, n, "usual_seconds")
                return [1e3 * (a - b) for a, b in zip(first, usual, strict=True)]

            body += [
                [f"{name}: plan of {POSITIONS} positions x 2 views, ms",
                 *(cell([1e3 * s for s in found.of(what, n, "usual_seconds")]) for n in sizes)],
                [f"{name}: pause at an epoch's start, ms", *(cell(pause(n)) for n in sizes)],
                [f"{name}: memory at the peak, KiB",
                 *(cell([b / 1024 for b in found.of(f"{what}, memory", n, "peak_bytes")], 0) for n in sizes)],
            ]  # fmt: skip
        lines += [*table(["order", *(f"{n:,}" for n in sizes)], body), ""]
    if found.of("cold full", 0, "images_per_second"):
        body = []
        for state in ("cold", "warm"):
            full, blocks = f"{state} full", f"{state} blocks"
            speeds = found.ratio(blocks, full, 0, "images_per_second")
            bytes_ = [[b / 1e3 for b in found.of(what, 0, "disk_bytes_per_image")] for what in (full, blocks)]
            shares = [[100 * s for s in found.of(what, 0, "resident_before")] for what in (full, blocks)]
            body += [
                [f"{state}: images/s", *(cell(found.of(what, 0, "images_per_second"), 0) for what in (full, blocks)),
                 cell(speeds)],
                [f"{state}: kB from the disk for each image", *(cell(values, 1) for values in bytes_), ""],
                [f"{state}: % of the shards in the page cache before", *(cell(values, 1) for values in shares), ""],
            ]  # fmt: skip
        for key, title in (
            ("seek_mb", "MB between an image and the next, shards in a row"),
            ("shards_per_1000_images", "shards touched by 1,000 images"),
            ("mb_per_touched_shard", "MB read of each of them"),
            ("image_bytes", "bytes of an image"),
        ):
            both = [median(found.of(f"counted {order}", 0, key)) for order in ("full", "blocks")]
            body.append([f"counted: {title}", *(f"{value:,.1f}" for value in both), ""])
        lines += table(["shards", "full", "blocks", "blocks / full"], body)
    return "\n".join(lines).strip() + "\n"


def slope(sizes: list[int], values: list[float]) -> float:
    """Exponent of growth: least squares over logarithms."""
    return round(float(np.polyfit(np.log(sizes), np.log(values), 1)[0]), 2) + 0.0  # no "-0.00"


def draw(result: dict[str, Any], path: Path) -> None:
    """Time of a start, time of a plan and memory against the number of images."""
    from engine.results.figures import pyplot

    found = Found(result["records"])

    def seconds(what: str, key: str = "seconds") -> Callable[[int], list[float]]:
        return lambda n: found.of(what, n, key)

    def milliseconds(kind: str, key: str) -> Callable[[int], list[float]]:
        return lambda n: [1e3 * s for s in found.of(f"order {kind}", n, key)]

    def megabytes(values: Callable[[int], list[Any]], unit: float) -> Callable[[int], list[float]]:
        return lambda n: [value * unit / 1e6 for value in values(n)]

    panels: dict[tuple[str, str], list[tuple[str, str, Callable[[int], list[float]]]]] = {
        ("time of a start", "seconds"): [
            (f"first start, {OLDER}", "tab:gray", seconds("older first start")),
            (f"later start, {OLDER}", "silver", seconds("older later start")),
            ("first start", "tab:blue", seconds("first start")),
            ("bare open, read, close in C", "black", seconds("bare loop")),
            ("later start", "tab:cyan", seconds("later start")),
            ("index file", "tab:green", seconds("index file")),
        ],
        (f"time of a plan, {POSITIONS} positions x 2 views", "milliseconds"): [
            ("first of an epoch, version 1", "tab:gray", milliseconds("sorted", "first_seconds")),
            ("first of an epoch, blocks", "tab:orange", milliseconds("blocks", "first_seconds")),
            ("first of an epoch, full", "tab:blue", milliseconds("full", "first_seconds")),
            ("any other, full", "tab:cyan", milliseconds("full", "usual_seconds")),
        ],
        ("memory of a process", "MB"): [
            (f"peak of a first start, {OLDER}", "tab:gray", megabytes(lambda n: found.peak("older first start", n), 1)),
            ("peak of a first start", "tab:blue", megabytes(lambda n: found.peak("first start", n), 1)),
            ("kept for an index, one rank", "tab:cyan", megabytes(lambda n: found.most("one rank", n), 1024)),
            ("kept for an index, four ranks", "tab:green", megabytes(lambda n: found.most("four ranks", n), 1024)),
            ("order, version 1", "silver", megabytes(lambda n: found.of("order sorted, memory", n, "peak_bytes"), 1)),
            ("order, blocks", "tab:orange", megabytes(lambda n: found.of("order blocks, memory", n, "peak_bytes"), 1)),
            ("order, full", "tab:red", megabytes(lambda n: found.of("order full, memory", n, "peak_bytes"), 1)),
        ],
    }
    sizes = sorted({record["size"] for record in result["records"] if record["size"] > BASE})
    plt = pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(15, 6), layout="constrained")
    for axis, ((title, unit), curves) in zip(axes, panels.items(), strict=True):
        for name, color, values in curves:
            rounds = {n: values(n) for n in sizes}
            # On a logarithmic axis there is no place for nothing.
            points = {n: median(v) for n, v in rounds.items() if v and median(v) > 0}
            if not points:
                continue
            of_curve, middle = list(points), list(points.values())
            label = f"{name}: exponent {slope(of_curve, middle):.2f}" if len(points) > 1 else name
            low = [m - max(min(rounds[n]), m / 100) for n, m in points.items()]
            high = [max(rounds[n]) - m for n, m in points.items()]
            axis.errorbar(of_curve, middle, [low, high], marker="o", markersize=4, capsize=2, color=color, label=label)
        axis.set(title=title, xlabel="images", ylabel=unit, xscale="log", yscale="log")
        axis.grid(alpha=0.3)
        if axis.has_data():
            axis.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.13), frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(words: list[str] | None = None) -> int:
    """Measure, write, draw and print."""
    # Not above: the many processes that measure start sooner without the engine.
    from engine.provenance import environment
    from engine.results.runs import write_json

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to measure")
    parser.add_argument(
        "--sizes", nargs="+", type=int, default=[10**4, 10**5, 10**6], help="numbers of files, and rows"
    )
    parser.add_argument("--simulated", nargs="*", type=int, default=[IMAGENET, 14_000_000, 400_000_000],
                        help="further numbers of rows for the order")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shards", type=int, default=40, help="tar files")
    parser.add_argument("--shard-mb", type=float, default=25, help="MB of each")
    parser.add_argument("--window", type=int, default=4, help="data.window of `blocks`")
    parser.add_argument("--folder", type=Path, help="where the files are made for the time of the measurement")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of scale.json and scale.png")
    parser.add_argument("--draw", type=Path, metavar="JSON", help="measure nothing: draw and print this result again")
    arguments = parser.parse_args(words)
    if arguments.draw:
        result = json.loads(arguments.draw.read_text(encoding="utf-8"))
    else:
        if min([*arguments.sizes, *arguments.simulated]) < 1000 or arguments.rounds < 1:
            parser.error("expected sizes of 1,000 or more, and a round")
        sizes = sorted(set(arguments.sizes))
        rows = sorted({*sizes, *arguments.simulated})
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # nothing is left behind then either
        with tempfile.TemporaryDirectory(prefix="scale-", dir=arguments.folder) as folder:
            place = Path(folder)
            of_part = {
                "files": lambda: file_steps(place, sizes, arguments.rounds),
                "order": lambda: order_steps(place, rows, arguments.rounds),
                "shards": lambda: shard_steps(
                    place, arguments.shards, arguments.shard_mb, arguments.window, arguments.rounds
                ),
            }
            steps = [step for part in PARTS if part in arguments.only for step in of_part[part]()]
            result = {
                "environment": environment(), "rounds": arguments.rounds, "threads": headers.THREADS,
                "older": older_code(place)[1], "records": measure(steps),
            }  # fmt: skip
        write_json(result, arguments.out / "scale.json")
    draw(result, arguments.out / "scale.png")
    print(markdown(result), end="")
    return 0


def child(words: str) -> int:
    """Take one measurement, in a process of its own."""
    name, given = json.loads(words)
    print(json.dumps(CHILDREN[name](**given)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(child(sys.argv[2]) if sys.argv[1:2] == ["--child"] else main())
