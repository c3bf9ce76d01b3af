"""What can be told of the training step without a GPU: ratios of small runs, saved bytes of the real networks, growth.

    python benchmarks/step_cpu.py        # some fifteen minutes on two quiet cores, most of it compilation

Writes benchmarks/step_cpu.json, step_cpu.png (phases) and growth.png.
"""

import argparse
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from engine import dist
from engine import recipe as recipes
from engine.bench import step as step_bench
from engine.bench.variants import Resident, variants
from engine.log import to_console
from engine.provenance import environment
from engine.recipe import Recipe
from engine.results.figures import draw_phases, pyplot
from engine.results.runs import write_json

SMALL = ["data.backend=synthetic", "data.options={}", "run.device=cpu", "init=[]", "evals=[]"]
HERE = Path(__file__).resolve().parent


def small(*overrides: str) -> Recipe:
    """BURN stage 2 of the demo on noise."""
    return recipes.load(ROOT / "recipes/quick/burn_stage2.yaml", [*SMALL, *overrides])


def saved_bytes() -> dict[str, float]:
    """MB per image that BURN's step at 224 keeps for the backward: the slope over the batch, without weights."""
    loaded = recipes.load(
        ROOT / "recipes/burn_stage2.yaml",
        [*SMALL, "data.expect_images=null", "data.batch_size=2", "data.micro_batch=2"],
    )
    world = dist.start("cpu", 60)
    found = {}
    for variant in variants(loaded, world.device):
        for amp in ("off", "bf16"):
            if variant.is_reference != (amp == "off") or not variant.same_maths:
                continue
            run = variant.recipe.run.model_copy(update={"amp": amp})
            recipe = variant.recipe.model_copy(update={"run": run})
            trainer = variant._replace(recipe=recipe).trainer(world)
            sizes = [step_bench.saved_bytes(trainer, next(Resident(recipe, world.device, n))) for n in (2, 4)]
            name = f"{variant.name}, {'float32' if amp == 'off' else '16-bit'}"
            found[name] = (sizes[1] - sizes[0]) / 2 / 1e6
            print(name, f"{found[name]:.1f} MB per image", flush=True)
            torch._dynamo.reset()
    return found


def one(overrides: list[str]) -> float:
    """Images per second of the eager step on one thread per rank."""
    recipe = small(*overrides)
    world = dist.start("cpu", 60)
    torch.set_num_threads(1)
    eager = next(variant for variant in variants(recipe, world.device) if variant.name == "eager")
    speed = step_bench.images_per_second(eager.recipe, world, warm_up=3, steps=10)
    dist.stop()
    return speed


def measured(ranks: int, *overrides: str) -> float:
    """`one` in processes of its own."""
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone"]
    command = [*start, str(Path(__file__).resolve()), "--one", *overrides]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    return float(next(line for line in done.stdout.splitlines() if line.startswith("speed ")).split()[1])


def growth() -> dict[str, dict[str, float]]:
    """Milliseconds per image against batch, side, views and ranks, in turn."""
    view = "{crop: random, size: %d, scale: [0.4, 1.0]}"

    def batch(size: int) -> list[str]:
        return [f"data.batch_size={size}", f"data.micro_batch={size}"]

    swav = ["method={name: swav, backbone: {arch: reactnet, width: 8}, num_prototypes: 100, hidden_dim: 256}",
            "schedules={lr: 1e-3, prototypes: 1, queue: 0}", "optim={name: adam}"]  # fmt: skip
    plans: dict[str, dict[str, tuple[int, list[str]]]] = {
        "images in a batch": {str(n): (1, batch(n)) for n in (16, 32, 64, 128, 256)},
        "side in pixels": {
            str(s): (1, [*batch(16), f"data.views=[{view % s}, {view % s}]", "data.options={side: 256}"])
            for s in (32, 64, 96, 128)
        },
        "views (SwAV)": {
            str(v): (1, [*batch(32), *swav, f"data.views=[{', '.join([view % 32] * v)}]"]) for v in (2, 4, 6, 8)
        },
        "ranks (64 images each)": {str(r): (r, [f"data.batch_size={64 * r}", "data.micro_batch=64"]) for r in (1, 2)},
    }
    found: dict[str, dict[str, float]] = {}
    for title, points in plans.items():
        rounds = [{name: measured(ranks, *overrides) for name, (ranks, overrides) in points.items()} for _ in range(3)]
        found[title] = {name: median(r[name] for r in rounds) for name in points}
        print(title, found[title], flush=True)
    return found


def draw_growth(found: dict[str, dict[str, float]], out: Path) -> None:
    """Four panels: milliseconds per image, and images per second for ranks."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 4, figsize=(17, 4), layout="constrained")
    for axis, (title, points) in zip(axes, found.items(), strict=True):
        x, speed = [int(name) for name in points], list(points.values())
        if title.startswith("ranks"):
            axis.plot(x, speed, "o-", label="measured")
            axis.plot(x, [speed[0] * n for n in x], ":", color="gray", label="perfect")
            axis.set(ylabel="images/s", xticks=x)
        else:
            ms = [1000 / s for s in speed]
            axis.plot(x, ms, "o-", label="measured")
            if title.startswith("side"):
                axis.plot(x, [ms[0] * (n / x[0]) ** 2 for n in x], ":", color="gray", label="by pixels")
            if title.startswith("views"):
                axis.plot(x, [ms[0] * n / x[0] for n in x], ":", color="gray", label="by views")
            axis.set(ylabel="milliseconds per image")
        axis.set(xlabel=title, ylim=(0, None))
        axis.legend(fontsize=8)
    figure.suptitle("BURN stage 2 x1/4 at 32 pixels, eager, one CPU thread per rank", fontsize=12)
    figure.savefig(out, dpi=100)
    plt.close(figure)


def main() -> int:
    """Measure everything and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs="+", metavar="OVERRIDE", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    to_console(is_main=False)
    if arguments.one:
        speed = one(arguments.one)
        if dist.environment_rank() == 0:
            print(f"speed {speed}")
        return 0
    result: dict[str, Any] = {"environment": environment()}

    def keep() -> None:
        write_json(result, HERE / "step_cpu.json")

    # What fails soonest comes first; each part is kept when it is done.
    result["images_per_second"] = growth()
    draw_growth(result["images_per_second"], HERE / "growth.png")
    keep()
    timed = step_bench.measure(small(), "step", steps=10, rounds=6, warm_up=4)
    result["step"] = asdict(timed)
    print(step_bench.table(timed), flush=True)
    draw_phases(timed, HERE / "step_cpu.png")
    keep()
    result["saved_mb_per_image"] = saved_bytes()
    keep()
    return 0


if __name__ == "__main__":
    sys.exit(main())
