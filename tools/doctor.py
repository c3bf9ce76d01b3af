"""Say what works on this machine, what is missing and the line that fixes it, and whether the loader keeps up.

    python tools/doctor.py                                   # the machine
    python tools/doctor.py recipes/burn_stage1.yaml data.train=/data/imagenet/train    # and a recipe on it

With a recipe the loader's images per second are measured against those of the training step on this machine's device.
Exit code 0 if the engine can train here, 1 if what the recipe asks for is missing, 2 for bad input.
"""

import argparse
import contextlib
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median

import _root  # noqa: F401
import torch
import torchvision

import loaders
from engine import accelerator, dist
from engine import recipe as recipes
from engine.bench import loader as loader_bench
from engine.bench import step as step_bench
from engine.errors import first_line, guarded, line
from engine.log import rate
from engine.preflight import missing
from engine.recipe import Recipe
from loaders import machine

GIB = 2**30
MOST_LOST = 0.1
"""Share of its speed that the step may lose to a loader that keeps up."""


def facts() -> Iterator[tuple[str, str]]:
    """(what, how it is) of the machine."""
    for what, ask in QUESTIONS.items():
        yield what, told(ask)


def told(ask: Callable[[], str]) -> str:
    """An answer, or why there is none: what one question meets must not cost the others."""
    try:
        return ask()
    except Exception as error:
        return f"cannot tell: {(line(error) or f'{type(error).__name__}: {first_line(error)}').removeprefix('error: ')}"


def _python() -> str:
    return f"{platform.python_version()}, torch {torch.__version__}, torchvision {torchvision.__version__}"


def _compiler() -> str:
    found = []
    for variable, usual, package in (("CXX", ("g++", "clang++"), "g++"), ("CC", ("gcc", "clang", "cc"), "gcc")):
        name = os.environ.get(variable) or next(filter(shutil.which, usual), "")
        if not shutil.which(name):
            what = f"{variable}={name} is not there" if name else f"no {usual[0]}"
            return (
                f"MISSING: {what}: apt-get install {package}; nothing can be compiled, run.compile=false trains without"
            )
        version = subprocess.run([name, "--version"], capture_output=True, text=True, check=True).stdout
        found.append(version.splitlines()[0])
    return ", ".join(found)


def _gpus() -> str:
    gpus = [_gpu(torch.device("cuda", number)) for number in range(torch.cuda.device_count())]
    return ", ".join(gpus) or f"none; {accelerator.why_hidden() or 'the CPU trains (gloo), slowly'}"


def _threads() -> str:
    cores, gpus = machine.cores(), torch.cuda.device_count()
    ranks = max(1, gpus)
    set_by = " (OMP_NUM_THREADS)" if os.environ.get("OMP_NUM_THREADS") else ""
    computes = "" if gpus else f", {accelerator.cpu_threads(1)} that compute{set_by}"
    return f"{cores} cores, {max(1, cores // ranks)} decoding threads for each of {ranks} rank(s){computes}"


def _load() -> str:
    cores, load = machine.cores(), os.getloadavg()[0]
    busy = " - busy: what is measured here, and what trains here, shares the cores with it" if load > cores / 4 else ""
    return f"{load:.1f} of {cores} cores in the last minute{busy}"


def _memory() -> str:
    memory = machine.memory()
    return f"{memory['MemTotal'] / GIB:.1f} GiB, {memory['MemAvailable'] / GIB:.1f} available"


def _shm() -> str:
    shm = shutil.disk_usage("/dev/shm")
    advice = "docker run --shm-size 16g, or data.backend=turbo, which does not use it"
    return f"{shm.total / GIB:.1f} GiB, {shm.free / GIB:.1f} free" + (f" - small: {advice}" if shm.total < GIB else "")


def _open_files() -> str:
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if files == resource.RLIM_INFINITY:
        return "without limit"
    return f"{files}" + (" - few: ulimit -n 4096" if files < 1024 else "")


QUESTIONS: dict[str, Callable[[], str]] = {
    "python": _python,
    "compiler": _compiler,
    "GPUs": _gpus,
    "threads": _threads,
    "load": _load,
    "memory": _memory,
    "/dev/shm": _shm,
    "open files": _open_files,
}


def _gpu(device: torch.device) -> str:
    if problem := accelerator.why_unusable(device):
        return problem
    old = "" if machine.compiles(device) else " (too old for Triton: run.compile and run.kernels=fused will do nothing)"
    return torch.cuda.get_device_name(device) + old


def back_ends() -> Iterator[tuple[str, str]]:
    """(back end, how it works here or the line that fixes it)."""
    for name in loaders.backends():
        yield name, told(partial(_back_end, name))


def _back_end(name: str) -> str:
    options = loaders.load(name).Options
    reason = options.missing()
    return f"MISSING: {reason}" if reason else options.about()


def _disk(recipe: Recipe | None) -> str:
    with tempfile.TemporaryDirectory() as folder:
        return (
            f"{disk_speed(_some_files(recipe, Path(folder)))} of {'the data set' if recipe else tempfile.gettempdir()}"
        )


def disk_speed(paths: list[bytes]) -> str:
    """Cold read speed of files, at most 256 MiB of them; the page cache is asked to forget them first."""
    total, started = 0, time.perf_counter()
    for path in paths:
        with contextlib.suppress(OSError), open(path, "rb") as file:  # a link to nothing is told by others
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            total += len(file.read(64 << 20))
        if total > 256 << 20 or time.perf_counter() - started > 5:
            break
    seconds = time.perf_counter() - started
    return f"{total / seconds / 1e6:.0f} MB/s ({total / 2**20:.0f} MiB read)"


def _some_files(recipe: Recipe | None, folder: Path) -> list[bytes]:
    if recipe is not None and recipe.data.options.reads_files:
        index = loaders.open_data(recipe.data, "train")
        rows = range(0, len(index), max(1, len(index) // 2000))
        return list(dict.fromkeys(index.location(row)[0] for row in rows))
    path = folder / "probe"
    with open(path, "wb") as file:
        file.write(os.urandom(64 << 20))
        file.flush()
        os.fsync(file.fileno())
    return [os.fsencode(path)]


def step_speeds(recipe: Recipe) -> tuple[float, float]:
    """Images per second of the recipe's training step on this device, from few steps: on resident images, and with the
    recipe's loader at work on the same cores, as it is in training."""
    world = dist.start("auto", 60)
    on_gpu = world.device.type == "cuda"
    batch = recipe.data.micro_batch if on_gpu else min(8, recipe.data.micro_batch)
    ranks = max(1, torch.cuda.device_count())
    workers = loaders.workers_per_rank(recipe.data, ranks)
    sizes = {"batch_size": batch, "micro_batch": batch, "workers": workers, "on_bad_image": "replace"}
    small = recipe.model_copy(update={"data": recipe.data.model_copy(update=sizes)})
    return step_bench.with_and_without_loader(small, world, steps=7 if on_gpu else 3)


@guarded
def main() -> int:
    """Print the findings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", type=Path, help="a YAML file of recipes/")
    parser.add_argument("override", nargs="*", default=[], help="section.key=value, changes the recipe")
    arguments = parser.parse_intermixed_args()
    for what, how in [*facts(), *((f"back end {name}", how) for name, how in back_ends())]:
        print(f"{what:18} {how}", flush=True)
    recipe = recipes.load(arguments.recipe, arguments.override) if arguments.recipe else None
    problems = missing(recipe) if recipe else []
    has_data = not any(problem.key in ("data.train", "data.val") for problem in problems)
    print(f"{'disk, cold':18} {told(lambda: _disk(recipe if has_data else None))}")
    for problem in problems:
        print(f"{'missing':18} {problem}")
    if recipe and has_data and not any(problem.key.startswith("run.") for problem in problems):
        try:
            _keeps_up(recipe)
        except (RuntimeError, ImportError) as error:  # such as a step that cannot be compiled
            if line(error) is not None:
                raise
            print(f"{'verdict':18} cannot tell: {type(error).__name__}: {first_line(error)}")
            return 1
    return 1 if problems else 0


def _keeps_up(recipe: Recipe) -> None:
    print("measuring the loaders ...", flush=True)
    result = loader_bench.measure(recipe, batches=4, rounds=1)
    speeds = {name: median(entry["whole"]["images_per_second"]) for name, entry in result["backends"].items()}
    for name, speed in speeds.items():
        print(f"{'loader ' + name:18} {rate(speed)} images/s")
    print("measuring the step (compiling it first, if the recipe compiles) ...", flush=True)
    ranks = max(1, torch.cuda.device_count())
    best = result["best"]
    fastest = recipe.model_copy(update={"data": loaders.with_backend(recipe.data, best)})
    need, together = (speed * ranks for speed in step_speeds(fastest))
    print(f"{'step':18} {rate(need)} images/s on {result['device']}" + (f" x {ranks}" if ranks > 1 else ""))
    print(f"{'step with loader':18} {rate(together)} images/s, both on the same cores")
    lost = 1 - together / need
    verdict = "keeps up" if lost < MOST_LOST else "is the bottleneck: more cores per GPU, or a .beton of raw pixels"
    other = "" if best == recipe.data.backend else f" (the recipe takes {recipe.data.backend}; set data.backend={best})"
    print(f"{'verdict':18} the best loader here is {best}{other}; alone it gives {speeds[best] / need:.1f} x what the "
          f"step takes, running beside it the step loses {max(0.0, lost):.0%}: it {verdict}")  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
