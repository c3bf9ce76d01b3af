"""What more classifiers cost beside one network: the step of `recipes/quick/linear.yaml` with one and with six of them.

    python benchmarks/rates.py --json benchmarks/rates.json

Both trainers are in this process and take turns, a round of steps each, on one thread and on crops that stay in memory;
the processor's time is counted, which other processes disturb less than the clock's.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import loaders
from engine import dist
from engine import recipe as recipes
from engine.provenance import versions
from engine.train import Trainer

ROOT = Path(__file__).resolve().parent.parent
RATES = [0.03, 0.1, 0.3, 1.0, 3.0, 10.0]


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the result here")
    parser.add_argument("--rounds", type=int, default=12, help="turns of each (%(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="steps of a turn (%(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        runs = {name: prepared(rates, folder) for name, rates in (("one", [1.0]), ("six", RATES))}
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(arguments.rounds + 1):
            for name, (trainer, batches) in runs.items():
                started = time.process_time()
                for _ in range(arguments.steps):
                    trainer.step(batches)
                times[name].append(1000 * (time.process_time() - started) / arguments.steps)
    kept = {name: values[1:] for name, values in times.items()}  # the first is to warm up
    ratios = [six / one for one, six in zip(kept["one"], kept["six"], strict=True)]
    result = {
        "versions": versions(),
        "milliseconds": {name: [round(value, 2) for value in values] for name, values in kept.items()},
        "median_ratio": round(statistics.median(ratios), 3),
        "quartiles": [round(value, 3) for value in statistics.quantiles(ratios, n=4)[::2]],
    }
    low, high = result["quartiles"]
    print(f"six classifiers take {result['median_ratio']} times the step of one, quartiles {low} to {high}")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def prepared(rates: list[float], folder: str) -> tuple[Trainer, loaders.Loader]:
    """A trainer and batches that stay in memory."""
    overrides = [
        f"method.rates={rates}", "data.hold_out=0.1", "data.backend=synthetic", "init=[]", "evals=[]",
        "data.options={num_images: 1442, num_classes: 10, side: 32}", f"run.folder={folder}", "run.device=cpu",
    ]  # fmt: skip
    recipe = recipes.load(ROOT / "recipes/quick/linear.yaml", overrides)
    trainer = Trainer(recipe, dist.start("cpu", 60))
    data, index = recipe.data, trainer.indices["train"]
    return trainer, loaders.open_resident(data, index, count=4, seed=0)


if __name__ == "__main__":
    sys.exit(main())
