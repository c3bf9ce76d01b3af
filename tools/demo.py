"""The whole path on real images: teacher, BURN stage 1, stage 2, linear evaluation of each, and a report.

    python tools/demo.py                                   # digits, minutes on two CPU cores
    python tools/demo.py fashion_mnist --seeds 3           # the benchmark of benchmarks/fashion_mnist.md

Started again, it goes on where it was stopped. It runs the recipes moco, burn_stage1, burn_stage2 and linear of a
folder of recipes/, and nothing that `tools/train.py` could not run one by one.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import _root
import torch

import loaders
from engine import evals, report, train
from engine import recipe as recipes
from engine.log import duration, environment, to_console
from engine.recipe import Recipe
from engine.report import Score

SETS = {"digits": ("quick", "scikit-learn's digits"), "fashion_mnist": ("fashion", "Fashion-MNIST")}
NEIGHBOURS, TEMPERATURE = 20, 0.07


class Chain:
    """The runs of one seed."""

    RUNS = 8  # of one seed

    def __init__(self, recipe_folder: str, out: Path, seed: int, num_seeds: int) -> None:
        self.done, self.total = self.RUNS * seed, self.RUNS * num_seeds
        self.recipe_folder, self.out = recipe_folder, out / f"seed{seed}"
        self.common = [f"run.folder={self.out}", f"seed={seed}"]
        self.seconds = 0.0

    def run(self, title: str, name: str, *overrides: str, as_name: str | None = None) -> Recipe:
        """Run one recipe to its end, or what is left of it."""
        path = _root.ROOT / "recipes" / self.recipe_folder / f"{name}.yaml"
        recipe = recipes.load(path, [*self.common, f"name={as_name or name}", *overrides])
        self.done += 1
        print(f"\n=== {self.done} of {self.total}: {title} ({recipe.folder})", flush=True)
        started = time.perf_counter()
        train.run(recipe, resume=True)
        self.seconds += time.perf_counter() - started
        return recipe

    def init(self, *sources: tuple[str, dict[str, str]]) -> str:
        """An `init` override from runs of this chain."""
        return "init=" + json.dumps([{"from": str(self.out / run), "load": load} for run, load in sources])

    def pretrain(self) -> dict[str, Recipe]:
        """Teacher, both stages, and the random baseline."""
        teacher = ("moco", {"teacher": "backbone"})
        kept = {part: part for part in ("student", "student_head", "teacher_head")}
        runs = {"teacher": self.run("floating-point teacher (MoCo v2)", "moco")}
        runs["stage 1"] = self.run("BURN stage 1: binary activations", "burn_stage1", self.init(teacher))
        runs["stage 2"] = self.run(
            "BURN stage 2: binary weights too", "burn_stage2", self.init(("burn_stage1", kept), teacher)
        )
        # A fair random network: nothing is learned, but BatchNorm has seen the data.
        runs["random"] = self.run(
            "the same binary network, random, with BatchNorm statistics only", "burn_stage2", self.init(teacher),
            "schedules.lr=0", "run.duration=50it", "evals=[]", as_name="random",
        )  # fmt: skip
        return runs

    def probe(self, runs: dict[str, Recipe]) -> dict[str, float]:
        """Linear top-1 of every network."""
        scores = {}
        for name, recipe in runs.items():
            part = "backbone" if name == "teacher" else "student"
            network = dict(recipe.method)[part].model_dump_json()
            probe = self.run(
                f"linear evaluation of {name}", "linear", f"method.backbone={network}",
                self.init((recipe.name, {"backbone": part})), as_name=f"linear_{recipe.name}",
            )  # fmt: skip
            scores[name] = report.final(probe.folder, "accuracy")
        return scores


def pixel_baselines(recipe: Recipe) -> dict[str, float]:
    """k-NN and logistic regression on raw pixels: what no network at all would score."""
    from sklearn.linear_model import LogisticRegression

    def pixels(split: str) -> tuple[torch.Tensor, torch.Tensor]:
        index = loaders.open_data(recipe.data, split)  # type: ignore[arg-type]
        loader = loaders.open_eval(
            recipe.data, index, rank=0, world_size=1, local_world_size=1, device=torch.device("cpu")
        )
        batches = list(loader)
        loader.close()
        return torch.cat([b.views[0][:, 0].flatten(1) for b in batches]), torch.cat([b.label for b in batches])

    (train_x, train_y), (val_x, val_y) = pixels("train"), pixels("val")
    classes = int(train_y.max()) + 1
    nearest = evals.knn(train_x, train_y, val_x, classes, NEIGHBOURS, TEMPERATURE)
    regression = LogisticRegression(max_iter=100).fit(train_x.numpy(), train_y.numpy())
    return {
        "raw pixels, k-NN": 100 * (nearest == val_y).float().mean().item(),
        "raw pixels, logistic regression": 100 * regression.score(val_x.numpy(), val_y.numpy()),
    }


def sample_views(recipe: Recipe, count: int = 12) -> list[torch.Tensor]:
    """The first views of the stream as pixels: two tensors uint8 [count, size, size, 3]."""
    data = recipe.data.model_copy(update={"batch_size": count, "micro_batch": count})
    loader = loaders.open_train(
        data, loaders.open_data(data, "train"), seed=recipe.seed, step=0, rank=0, world_size=1, local_world_size=1,
        device=torch.device("cpu"),
    )  # fmt: skip
    views = next(loader).views
    loader.close()
    mean, std = (torch.tensor(x)[:, None, None] for x in (data.mean, data.std))
    return [((v * std + mean) * 255).clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1) for v in views]


def main() -> int:
    """Run the chain for every seed and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", nargs="?", choices=list(SETS), default="digits")
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds, from 0")
    parser.add_argument("--out", type=Path, help="folder of runs and report (runs/demo_<dataset>)")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    arguments = parser.parse_args()
    to_console(is_main=True)
    recipe_folder, title = SETS[arguments.dataset]
    out = arguments.out or Path("runs") / f"demo_{arguments.dataset}"
    started = time.perf_counter()
    make = [sys.executable, str(_root.ROOT / "tools" / "make_images.py"), arguments.dataset]
    if subprocess.run([*make, f"data/{arguments.dataset}"]).returncode:
        return train.EXIT_BAD_INPUT
    chains = [Chain(recipe_folder, out, seed, arguments.seeds) for seed in range(arguments.seeds)]
    all_runs, all_scores = [], []
    try:
        for chain in chains:
            all_runs.append(chain.pretrain())
            all_scores.append(chain.probe(all_runs[-1]))
    except train.Stopped as stopped:
        print(f"{stopped}; start this command again")
        return train.EXIT_STOPPED
    first = all_runs[0]
    names = {
        "random": "binary network, random",
        "stage 1": "BURN stage 1 (binary activations)",
        "stage 2": "BURN stage 2 (all binary)",
        "teacher": "floating-point teacher",
    }
    scores = [Score(name, [seed[key] for seed in all_scores]) for key, name in names.items()]
    scores += [Score(name, [value]) for name, value in pixel_baselines(first["stage 2"]).items()]
    stages = {name: first[name].folder for name in ("stage 1", "stage 2")}
    width = dict(first["stage 2"].method)["student"].width
    heading = f"BURN on {title}: ReActNet-A x{width / 32:g}, {arguments.seeds} seed(s)"
    figure = out / "report.png"
    report.draw(figure, heading, first["teacher"].folder, stages, scores, sample_views(first["stage 2"]))
    text = report.table(scores)
    gain = [seed["stage 2"] - seed["random"] for seed in all_scores]
    closing = f"BURN stage 2 is {report.spread(gain)} points above the same network at random initialisation."
    elapsed = f"{duration(time.perf_counter() - started)} in this call"
    (out / "report.md").write_text(
        f"# {heading}\n\nLinear evaluation (protocol `linear`) on held-out images.\n\n{text}\n\n{closing}\n\n"
        f"![curves](report.png)\n\nCurves are those of seed 0. Recipes: `recipes/{recipe_folder}/`. {elapsed}.\n",
        encoding="utf-8",
    )
    if arguments.json:
        record = {
            "title": heading,
            "top1": {score.name: score.values for score in scores},
            "stage2_minus_random": gain,
            "knn_online": {
                name: [report.final(runs[name].folder, "knn") for runs in all_runs]
                for name in ("teacher", "stage 1", "stage 2")
            },
            "training_seconds": [round(chain.seconds) for chain in chains],
            "recipes": {name: recipe.hash for name, recipe in first.items()},
            "environment": environment(),
        }
        arguments.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"\n{text}\n\n{closing}\nreport: {out / 'report.md'} and {figure}, {elapsed}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
