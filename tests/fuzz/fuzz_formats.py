"""Damaged images of every format through the decoders, in processes of their own, for as long as one likes.

    python tests/fuzz/fuzz_formats.py SECONDS

A round is a folder of damaged files: their headers are read, all are decoded on the host and the JPEGs in the compiled
core through windows at random. What ends a process, or gives two verdicts, is kept: the exit code is 1 and its folder
is named. The seeds are those of the rounds, so that a second run begins with the same files.
"""

import argparse
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import numpy as np

from loaders import core, sources, turbo
from loaders.config import Request
from loaders.contract import CropMemory
from loaders.errors import BadImage
from loaders.sampler import Stream
from loaders.views import View
from tests.images import damaged, variants

OF_EACH = 25
VIEW = View(size=16, crop="random", scale=(0.01, 0.3))


def write(folder: Path, seed: int) -> None:
    """The damaged files of a round; every other one is damaged twice."""
    rng = np.random.default_rng(seed)
    for name, content in variants().items():
        stem, suffix = name.rsplit(".", 1)
        for number in range(OF_EACH):
            broken = damaged(content, rng)
            (folder / f"{stem}_{number}.{suffix}").write_bytes(damaged(broken, rng) if number % 2 else broken)


def look(folder: Path, seed: int) -> None:
    """Decode them all; exit code 3 if the core takes what the host refuses."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)  # libjpeg and libtiff write about each
    index = sources.open_index(folder, Request(10**8, asks_labels=False))
    bad = set()
    for row in range(len(index)):
        try:
            index.read(row)
        except BadImage:
            bad.add(row)
    if core.why_missing():
        return
    stream = Stream(index, (VIEW,), seed)
    plan = stream.plan(range(len(index)))
    job = turbo.Job(index, plan.image, turbo.Cut.of(plan, (VIEW,), CropMemory(stream).crops(len(index))))
    job.run_alone()
    done = {int(row) for row, status in zip(plan.image, job.status, strict=True) if status == turbo.DONE}
    if wrong := done & bad:
        print(*(index.path(row) for row in wrong), sep="\n", flush=True)
        raise SystemExit(3)


def main() -> int:
    """Rounds until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seconds", type=float)
    seconds = parser.parse_args().seconds
    os.environ["XDG_CACHE_HOME"] = os.devnull  # no index of them is kept
    started, files, seed = time.monotonic(), 0, 0
    context = multiprocessing.get_context("fork")
    while (spent := time.monotonic() - started) < seconds or not seed:
        folder = Path(tempfile.mkdtemp(prefix="burn_fuzz_"))
        write(folder, seed)
        process = context.Process(target=look, args=(folder, seed))
        process.start()
        process.join()
        if process.exitcode:
            print(f"round {seed}: exit code {process.exitcode}; its files: {folder}")
            return 1
        files += len(list(folder.iterdir()))
        shutil.rmtree(folder)
        seed += 1
        if seed % 20 == 0:
            print(f"{files:,} files, {max(0.0, seconds - spent):.0f} s left", flush=True)
    print(f"{files:,} damaged files, none ended a process, no verdict differs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
