"""Say what works on this machine, what is missing and the line that mends it, and whether the loader keeps up.

    python tools/doctor.py                                   # the machine
    python tools/doctor.py recipes/burn_stage1.yaml data.train=/data/imagenet/train    # and a recipe on it

With a recipe the loader's images per second are measured against those of the training step on this machine's device.
Exit code 0 if the engine can train here, 1 if what the recipe asks for is missing, 2 for bad input.
"""

import argparse
import importlib
import os
import platform
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import _root  # noqa: F401
import torch
import torchvision

import loaders
from engine import bench, dist
from engine import recipe as recipes
from engine.describe import missing
from engine.recipe import Recipe, RecipeError
from engine.train import Trainer
from loaders import DataError, dali_loader, turbo
from loaders.ffcv_loader import HOW_TO_INSTALL

GIB = 2**30


def machine() -> Iterator[tuple[str, str]]:
    """(what, how it is) of the machine."""
    cores = len(os.sched_getaffinity(0))
    memory = {key: int(value.split()[0]) * 1024 for key, value in _meminfo()}
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    yield "python", f"{platform.python_version()}, torch {torch.__version__}, torchvision {torchvision.__version__}"
    yield "GPUs", ", ".join(gpus) if gpus else "none; the CPU trains (gloo, bf16), slowly"
    ranks = max(1, len(gpus))
    yield "threads", f"{cores} cores, {max(1, cores // ranks)} decoding threads for each of {ranks} rank(s)"
    yield "memory", f"{memory['MemTotal'] / GIB:.1f} GiB, {memory['MemAvailable'] / GIB:.1f} available"
    shm = shutil.disk_usage("/dev/shm")
    small = (
        " - small: docker run --shm-size 16g, or data.backend=turbo, which does not use it" if shm.total < GIB else ""
    )
    yield "/dev/shm", f"{shm.total / GIB:.1f} GiB, {shm.free / GIB:.1f} free{small}"
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    yield "open files", f"{files}" + (" - few: ulimit -n 4096" if files < 1024 else "")


def _meminfo() -> Iterator[tuple[str, str]]:
    for line in Path("/proc/meminfo").read_text().splitlines():
        key, value = line.split(":")
        yield key, value.strip()


def back_ends() -> Iterator[tuple[str, str]]:
    """(back end, works or the line that mends it)."""
    if reason := turbo.why_missing():
        yield "turbo", f"MISSING: {reason}"
    else:
        vectors = "AVX2" if turbo.use_vectors(True) else "plain (no AVX2)"
        yield "turbo", f"works: libjpeg-turbo {turbo.libjpeg_version()}, {vectors}"
    yield "folder", "works: torchvision's decoders"
    yield "dali", _dali()
    beton = "works, reads and writes .beton" + (
        "" if not turbo.why_missing() else " (slowly, without the compiled core)"
    )
    try:
        importlib.import_module("ffcv")
        yield "ffcv", f"{beton}; the FFCV package is here too ({metadata.version('ffcv')})"
    except Exception as error:  # its imports fail in many ways
        yield "ffcv", f"{beton}; the FFCV package is not needed and not usable ({_first_line(error)}): {HOW_TO_INSTALL}"


def _dali() -> str:
    if reason := dali_loader.missing():
        return f"MISSING: {reason}"
    tried = {"CPU": None, **({"GPU": 0} if torch.cuda.is_available() else {})}
    states = [f"on the {name} {dali_loader.try_device(device)}" for name, device in tried.items()]
    return f"DALI {', '.join(states)}"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]


def disk_speed(paths: list[bytes]) -> str:
    """Cold read speed of files, at most 256 MiB of them; the page cache is asked to forget them first."""
    total, started = 0, time.perf_counter()
    for path in paths:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            total += len(file.read(64 << 20))
        if total > 256 << 20 or time.perf_counter() - started > 5:
            break
    seconds = time.perf_counter() - started
    return f"{total / seconds / 1e6:.0f} MB/s ({total / 2**20:.0f} MiB read)"


def _some_files(recipe: Recipe | None, folder: Path) -> list[bytes]:
    if recipe is not None and recipe.data.backend != "synthetic":
        index = loaders.open_data(recipe.data, "train")
        rows = range(0, len(index), max(1, len(index) // 2000))
        return list(dict.fromkeys(index.location(row)[0] for row in rows))
    path = folder / "probe"
    with open(path, "wb") as file:
        file.write(os.urandom(64 << 20))
        file.flush()
        os.fsync(file.fileno())
    return [os.fsencode(path)]


def step_speed(recipe: Recipe) -> float:
    """Images per second of the recipe's training step on this device, from few steps on synthetic images."""
    on_gpu = torch.cuda.is_available()
    batch = recipe.data.micro_batch if on_gpu else min(8, recipe.data.micro_batch)
    classes = getattr(recipe.method, "num_classes", 10)
    content: dict[str, Any] = {
        "data.backend": "synthetic",
        "data.batch_size": batch,
        "data.micro_batch": batch,
        "data.expect_images": "null",
        "data.options": f"{{num_images: 512, num_val_images: 8, num_classes: {classes}, side: 256}}",
    }
    overrides = [*(f"{key}={value}" for key, value in content.items()), "init=[]", "evals=[]", "run.duration=100it"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(recipe.dump(), encoding="utf-8")
        small = recipes.load(path, [*overrides, f"run.folder={folder}"])
        trainer = Trainer(small, dist.start("auto", 60))
        trainer.loader = loaders.open_train(
            small.data, trainer.indices["train"], seed=0, step=0, rank=0, world_size=1, local_world_size=1,
            device=trainer.world.device,
        )  # fmt: skip
        # The same batch again and again: the step alone, not the loader.
        fixed = next(trainer.loader)
        trainer.loader.close()
        trainer.loader = iter(lambda: fixed, None)  # type: ignore[assignment]
        times = []
        for _ in range(8 if on_gpu else 3):
            started = time.perf_counter()
            trainer.step()
            if on_gpu:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
    return batch / median(times[1:])


def main() -> int:
    """Print the findings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", type=Path, help="a YAML file of recipes/")
    parser.add_argument("override", nargs="*", help="section.key=value, changes the recipe")
    arguments = parser.parse_intermixed_args()
    for what, how in [*machine(), *((f"back end {name}", how) for name, how in back_ends())]:
        print(f"{what:18} {how}", flush=True)
    try:
        recipe = recipes.load(arguments.recipe, arguments.override) if arguments.recipe else None
        problems = missing(recipe) if recipe else []
        has_data = not any(problem.startswith("data.") for problem in problems)
        with tempfile.TemporaryDirectory() as folder:
            files = _some_files(recipe if has_data else None, Path(folder))
            of = "the data set" if recipe and has_data else tempfile.gettempdir()
            print(f"{'disk, cold':18} {disk_speed(files)} of {of}")
        for problem in problems:
            print(f"{'missing':18} {problem}")
        if recipe and has_data:
            _keeps_up(recipe)
    except (RecipeError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 1 if problems else 0


def _keeps_up(recipe: Recipe) -> None:
    print("measuring the loaders ...", flush=True)
    found = bench.loader(recipe, batches=4, rounds=1)
    speeds = {name: median(entry["whole"]["images_per_second"]) for name, entry in found["backends"].items()}
    for name, speed in speeds.items():
        print(f"{'loader ' + name:18} {speed:,.0f} images/s")
    print("measuring the step ...", flush=True)
    ranks = max(1, torch.cuda.device_count())
    need = step_speed(recipe) * ranks
    print(f"{'step':18} {need:,.0f} images/s on {found['device']}" + (f" x {ranks}" if ranks > 1 else ""))
    best = found["best"]
    verdict = "keeps up" if speeds[best] >= need else "is the bottleneck: more cores per GPU, or a .beton of raw pixels"
    other = "" if best == recipe.data.backend else f" (the recipe names {recipe.data.backend}; data.backend={best})"
    print(f"{'verdict':18} the best loader here is {best}{other}; it gives {speeds[best] / need:.1f} x what the step "
          f"takes and {verdict}")  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
