"""The whole path on real images: teacher, BURN stage 1, stage 2, linear evaluation of each, and a report.

    python tools/demo.py                     # scikit-learn's digits, minutes on two CPU cores

Started again, it goes on where it was stopped. It runs the recipes moco, burn_stage1, burn_stage2 and linear of
recipes/quick/, and nothing that `tools/train.py` could not run one by one. All methods side by side: tools/compare.py.
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
from engine import evals, report, table, train
from engine import recipe as recipes
from engine.log import duration, environment, to_console
from engine.recipe import Recipe
from engine.report import Score
from loaders.augment import to_pixels

RECIPES = _root.ROOT / "recipes" / "quick"
NEIGHBOURS, TEMPERATURE = 20, 0.07


class Chain:
    """Runs in one folder, one after the other; the teacher is shared by all seeds, as a published file would be."""

    def __init__(self, out: Path, num_seeds: int) -> None:
        self.out = out
        self.done, self.total = 0, 2 + 6 * num_seeds
        self.seconds = 0.0

    def run(self, title: str, recipe_name: str, folder: str, *overrides: str, seed: int, name: str = "") -> Recipe:
        """Run one recipe to its end, or what is left of it."""
        path = RECIPES / f"{recipe_name}.yaml"
        place = [f"run.folder={self.out / folder}", f"name={name or recipe_name}", f"seed={seed}"]
        recipe = recipes.load(path, [*place, *overrides])
        self.done += 1
        print(f"\n=== {self.done} of {self.total}: {title} ({recipe.folder})", flush=True)
        started = time.perf_counter()
        train.run(recipe, resume=True)
        self.seconds += time.perf_counter() - started
        return recipe

    def teacher(self) -> Recipe:
        """The floating-point teacher."""
        return self.run("floating-point teacher (MoCo v2)", "moco", "teacher", seed=0)

    def students(self, teacher: Recipe, seed: int) -> dict[str, Recipe]:
        """The random baseline and both BURN stages of one seed."""
        folder = f"seed{seed}"
        extractor = (teacher.folder, {"teacher": "backbone"})
        kept = {part: part for part in ("student", "student_head", "teacher_head")}
        # A fair random network: nothing is learned, but BatchNorm has seen the data.
        still = ["schedules.lr=0", "run.duration=50it", "evals=[]", table.init(extractor)]
        runs = {"random": self.run("random weights, BatchNorm statistics only", "burn_stage2", folder, *still,
                                   seed=seed, name="random")}  # fmt: skip
        runs["stage 1"] = self.run(
            "BURN stage 1: binary activations", "burn_stage1", folder, table.init(extractor), seed=seed
        )
        sources = table.init((runs["stage 1"].folder, kept), extractor)
        runs["stage 2"] = self.run("BURN stage 2: binary weights too", "burn_stage2", folder, sources, seed=seed)
        return runs

    def probe(self, name: str, recipe: Recipe) -> float:
        """Linear top-1 of a run's network."""
        probe = self.run(
            f"linear evaluation of {name}",
            "linear",
            recipe.folder.parent.name,
            *table.probe(recipe),
            seed=recipe.seed,
            name=f"linear_{recipe.name}",
        )
        return report.final(probe.folder, "accuracy")


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
    return [to_pixels(view, data.mean, data.std) for view in views]


def main() -> int:
    """Run the chain for every seed and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds, from 0")
    parser.add_argument("--out", type=Path, default=Path("runs/demo_digits"), help="folder of runs and report")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    arguments = parser.parse_args()
    to_console(is_main=True)
    out = arguments.out
    started = time.perf_counter()
    make = [sys.executable, str(_root.ROOT / "tools" / "make_images.py"), "digits", "data/digits"]
    if subprocess.run(make).returncode:
        return train.EXIT_BAD_INPUT
    chain = Chain(out, arguments.seeds)
    students, scores_of = [], []
    try:
        teacher = chain.teacher()
        teacher_score = chain.probe("the teacher", teacher)
        for seed in range(arguments.seeds):
            students.append(chain.students(teacher, seed))
            scores_of.append({name: chain.probe(name, run) for name, run in students[-1].items()})
    except train.Stopped as stopped:
        print(f"{stopped}; start this command again")
        return train.EXIT_STOPPED
    names = {
        "random": "binary network, random",
        "stage 1": "BURN stage 1 (binary activations)",
        "stage 2": "BURN stage 2 (all binary)",
    }
    first = students[0]
    scores = [Score(name, [seed[key] for seed in scores_of]) for key, name in names.items()]
    scores.append(Score("floating-point teacher", [teacher_score]))
    scores += [Score(name, [value]) for name, value in pixel_baselines(first["stage 2"]).items()]
    stages = {name: first[name].folder for name in ("stage 1", "stage 2")}
    width = dict(first["stage 2"].method)["student"].width
    heading = f"BURN on scikit-learn's digits: ReActNet-A x{width / 32:g}, {arguments.seeds} seed(s)"
    figure = out / "report.png"
    report.draw(figure, heading, teacher.folder, stages, scores, sample_views(first["stage 2"]))
    text = report.table(scores)
    gain = [seed["stage 2"] - seed["random"] for seed in scores_of]
    closing = f"BURN stage 2 is {report.spread(gain)} points above the same network at random initialisation."
    elapsed = f"{duration(time.perf_counter() - started)} in this call"
    (out / "report.md").write_text(
        f"# {heading}\n\nLinear evaluation (protocol `linear`) on held-out images.\n\n{text}\n\n{closing}\n\n"
        f"![curves](report.png)\n\nCurves are those of seed 0. Recipes: `recipes/quick/`. {elapsed}.\n",
        encoding="utf-8",
    )
    if arguments.json:
        record = {
            "title": heading,
            "top1": {score.name: score.values for score in scores},
            "stage2_minus_random": gain,
            "knn_online": {
                "teacher": report.final(teacher.folder, "knn"),
                **{name: [report.final(seed[name].folder, "knn") for seed in students] for name in stages},
            },
            "seconds_in_this_call": round(chain.seconds),
            "recipes": {"teacher": teacher.hash, **{name: recipe.hash for name, recipe in first.items()}},
            "environment": environment(),
        }
        arguments.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"\n{text}\n\n{closing}\nreport: {out / 'report.md'} and {figure}, {elapsed}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
