"""The whole path on real images: teacher, BURN stage 1, stage 2, linear evaluation of each, and a report.

    python tools/demo.py                     # scikit-learn's digits, minutes on two CPU cores

Started again, it continues where it left off. It runs the recipes moco, burn_stage1, burn_stage2 and linear of
recipes/quick/, and nothing that `tools/train.py` could not run one by one. All methods side by side: tools/compare.py.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _root
import make_images
import torch
from torch import Tensor

import loaders
from engine import evals, train
from engine import recipe as recipes
from engine.errors import KNOWN, Stopped
from engine.log import duration, to_console
from engine.provenance import environment
from engine.recipe import Recipe
from engine.results.chain import Chain, Run, init_from, probe_of
from engine.results.figures import pyplot
from engine.results.runs import curve, final, write_json
from engine.results.scores import Outcome, Score, mean_std, table
from loaders.augment import to_pixels

RECIPES = _root.ROOT / "recipes" / "quick"
NEIGHBORS, TEMPERATURE = 20, 0.07
STAGES = ("stage 1", "stage 2")


class Demo:
    """Chains of runs below one folder; the teacher is shared by all seeds, as a published file would be."""

    def __init__(self, out: Path, seeds: int) -> None:
        self.out, self.seeds = out, seeds
        self.started, self.total = 0, 2 + 6 * seeds
        self.seconds = 0.0
        """Spent training in this call."""

    def run_of(self, recipe_name: str, folder: str, name: str, seed: int, *overrides: str) -> Run:
        """One run of a quick recipe."""
        place = [f"run.folder={self.out / folder}", f"name={name}", f"seed={seed}"]
        return Run(RECIPES / f"{recipe_name}.yaml", [*place, *overrides])

    def chain(self, title: str, run: Run) -> Chain:
        """A run and the linear evaluation of its network."""
        recipe = run.recipe()
        overrides = probe_of(recipe, recipes.load(RECIPES / "linear.yaml"), layer="features")
        probe = self.run_of("linear", recipe.folder.parent.name, f"linear_{recipe.name}", recipe.seed, *overrides)
        return Chain(title, recipe.seed, [run, probe], needs_teacher=False)

    def teacher(self) -> Chain:
        """The floating-point teacher."""
        return self.chain("floating-point teacher (MoCo v2)", self.run_of("moco", "teacher", "moco", 0))

    def students(self, teacher: Recipe, seed: int) -> dict[str, Chain]:
        """The random baseline and both BURN stages of one seed."""
        folder = f"seed{seed}"
        extractor = (teacher.folder, {"teacher": "backbone"})
        kept = {part: part for part in ("student", "student_head", "teacher_head")}
        # A fair random network: nothing is learned, but BatchNorm has seen the data.
        still = ["schedules.lr=0", "run.duration=50it", "evals=[{kind: knn, every: 100%}]", init_from(extractor)]
        stage1 = self.run_of("burn_stage1", folder, "burn_stage1", seed, init_from(extractor))
        sources = init_from((stage1.recipe().folder, kept), extractor)
        return {
            "random": self.chain(
                "binary network, random weights", self.run_of("burn_stage2", folder, "random", seed, *still)
            ),
            "stage 1": self.chain("BURN stage 1: binary activations", stage1),
            "stage 2": self.chain(
                "BURN stage 2: binary weights too", self.run_of("burn_stage2", folder, "burn_stage2", seed, sources)
            ),
        }

    def run(self, chain: Chain) -> Outcome:
        """Run what is left of a chain in this process."""
        before = self.started

        def start(run: Run, recipe: Recipe, number: int) -> None:
            what = "linear evaluation of " if number == len(chain.runs) else ""
            print(f"\n=== {before + number} of {self.total}: {what}{chain.name} ({recipe.folder})", flush=True)
            started = time.perf_counter()
            train.run(recipe, resume=True)
            self.seconds += time.perf_counter() - started

        self.started += len(chain.runs)
        return chain.run(start)


def pixel_baselines(recipe: Recipe) -> dict[str, float]:
    """k-NN and logistic regression on raw pixels: what no network at all would score."""
    from sklearn.linear_model import LogisticRegression

    def pixels(split: str) -> tuple[Tensor, Tensor]:
        loader = loaders.open_eval(recipe.data, loaders.open_data(recipe.data, split))  # type: ignore[arg-type]
        batches = list(loader)
        loader.close()
        return torch.cat([b.views[0][:, 0].flatten(1) for b in batches]), torch.cat(
            [b.label for b in batches if b.label is not None]
        )

    (train_x, train_y), (val_x, val_y) = pixels("train"), pixels("val")
    classes = int(train_y.max()) + 1
    nearest = evals.knn(train_x, train_y, val_x, classes, NEIGHBORS, TEMPERATURE)
    regression = LogisticRegression(max_iter=100).fit(train_x.numpy(), train_y.numpy())
    return {
        "raw pixels, k-NN": 100 * (nearest == val_y).float().mean().item(),
        "raw pixels, logistic regression": 100 * regression.score(val_x.numpy(), val_y.numpy()),
    }


def sample_views(recipe: Recipe, count: int = 12) -> list[Tensor]:
    """The first views of the stream as pixels: two tensors uint8 [count, size, size, 3]."""
    data = recipe.data.model_copy(update={"batch_size": count, "micro_batch": count})
    loader = loaders.open_train(data, loaders.open_data(data, "train"), seed=recipe.seed)
    views = next(loader).views
    loader.close()
    return [to_pixels(view, data.mean, data.std) for view in views]


def draw(
    out: Path, title: str, teacher: Path, stages: dict[str, Path], scores: Sequence[Score], views: list[Tensor]
) -> None:
    """Draw loss, terms, collapse meters, balance, k-NN, monitors, views and the final scores.

    Args:
        out: PNG file.
        teacher: run folder of the teacher's pre-training.
        stages: name -> run folder of the BURN stages in order.
        scores: bars of the last panel.
        views: two tensors uint8 [N, size, size, 3], the two views of N images.
    """
    plt = pyplot()
    figure = plt.figure(figsize=(19, 8.5), layout="constrained")
    figure.suptitle(title, fontsize=14)
    rows: Any = figure.subfigures(2, 1)
    upper, lower = rows
    panels = [*upper.subplots(1, 4), *lower.subplots(1, 4, width_ratios=(1, 1.2, 1.3, 1))]

    panels[0].plot(*curve(teacher, "loss"), color="tab:gray")
    panels[0].set(title="teacher: MoCo v2 loss", xlabel="epoch", ylabel="InfoNCE loss")

    lengths = [max(curve(folder, "loss")[0]) for folder in stages.values()]
    starts = [sum(lengths[:number]) for number in range(len(lengths))]

    def along(axis: Any, name: str, label: str, color: str, evaluation: str | None = None) -> None:
        """One scalar over the stages, end to end."""
        for number, folder in enumerate(stages.values()):
            epochs, values = curve(folder, name, evaluation)
            shifted = [epoch + starts[number] for epoch in epochs]
            axis.plot(shifted, values, color=color, label=label if number == 0 else None)

    for axis in (*panels[1:5], panels[7]):
        for stage, start, length in zip(stages, starts, lengths, strict=True):
            axis.axvline(start, color="black", linewidth=0.8, linestyle=":")
            position: Any = {"xycoords": ("data", "axes fraction"), "xytext": (0, 2), "textcoords": "offset points"}
            axis.annotate(stage, (start + length / 2, 1), ha="center", va="bottom", fontsize=8, **position)

    for name, label, color in (
        ("loss", "loss", "tab:blue"),
        ("kl", "KL", "tab:orange"),
        ("feature", "feature similarity", "tab:green"),
    ):
        along(panels[1], name, label, color)
    panels[1].set(xlabel="epoch", yscale="log")
    panels[1].set_title("BURN: loss and its terms", pad=16)
    along(panels[2], "balance", "λ", "tab:purple")
    panels[2].set(xlabel="epoch", ylabel="λ (weight of the KL term)")
    panels[2].set_title("dynamic balancing", pad=16)
    along(panels[3], "target_entropy", "mean entropy", "tab:red")
    along(panels[3], "target_entropy_of_mean", "entropy of the mean", "tab:brown")
    panels[3].set(xlabel="epoch", ylabel="nats", ylim=(0, None))
    panels[3].set_title("targets: collapsed if both reach 0", pad=16)
    along(panels[4], "top1", "student", "tab:blue", "knn")
    panels[4].axhline(final(teacher, "knn"), color="tab:gray", linestyle="--", label="teacher")
    panels[4].set(xlabel="epoch", ylabel="top-1 %")
    panels[4].margins(y=0.08)
    panels[4].set_title("online k-NN accuracy", pad=16)
    for name, label, color in (
        ("binary/sign_flips", "signs flipped since the last log", "tab:blue"),
        ("binary/dead_channels", "dead channels", "tab:red"),
        ("binary/saturated_channels", "saturated channels", "tab:orange"),
        ("binary/latent_beyond_one", "latent weights beyond ±1", "tab:green"),
    ):
        along(panels[7], name, label, color)
    panels[7].set(xlabel="epoch", ylabel="share", ylim=(0, 1))
    panels[7].set_yscale("symlog", linthresh=1e-4)
    panels[7].set_title("the student's binary layers", pad=16)
    for panel in (panels[1], panels[3], panels[4], panels[7]):
        panel.legend(fontsize=8)

    grid = torch.cat([torch.cat(list(view), dim=1) for view in views], dim=0)  # two rows of images
    halves = grid.chunk(2, dim=1)
    panels[5].imshow(torch.cat(halves, dim=0).numpy(), interpolation="nearest")
    panels[5].set_title("the student's two views (rows 1-2, 3-4: same images)", fontsize=10)
    panels[5].axis("off")

    bars = panels[6]
    names = [score.name for score in scores][::-1]
    means = [statistics.fmean(score.values) for score in scores][::-1]
    errors = [statistics.stdev(s.values) if len(s.values) > 1 else 0 for s in scores][::-1]
    drawn = bars.barh(names, means, xerr=errors if any(errors) else None, color="tab:blue")
    bars.bar_label(drawn, labels=[str(score) for score in scores][::-1], padding=-36, color="white", fontsize=9)
    bars.set(title="linear top-1 % on held-out images", xlim=(0, 100))
    figure.savefig(out, dpi=100)
    plt.close(figure)


def main() -> int:
    """Run the chain for every seed and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds, from 0")
    parser.add_argument("--out", type=Path, default=Path("runs/demo_digits"), help="folder of runs and report")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    arguments = parser.parse_args()
    if arguments.seeds < 1:
        parser.error(f"--seeds: expected at least 1, got {arguments.seeds}")
    to_console(is_main=True)
    make_images.make("digits", Path("data/digits"))
    try:
        run_demo(arguments.out, arguments.seeds, arguments.json)
    except KNOWN as error:
        print(
            f"{error}; start this command again" if isinstance(error, Stopped) else f"error: {error}", file=sys.stderr
        )
        return error.exit_code
    return 0


def run_demo(out: Path, seeds: int, json: Path | None) -> None:
    """Run what is left, print the table, and write `report.md`, `report.png` and, where it is asked for, JSON."""
    started = time.perf_counter()
    demo = Demo(out, seeds)
    chain = demo.teacher()
    teacher = chain.runs[0].recipe()
    teacher_outcome = demo.run(chain)
    chains = [demo.students(teacher, seed) for seed in range(seeds)]
    outcomes = [{name: demo.run(chain) for name, chain in of_seed.items()} for of_seed in chains]
    names = {
        "random": "binary network, random",
        "stage 1": "BURN stage 1 (binary activations)",
        "stage 2": "BURN stage 2 (all binary)",
    }
    stage2 = chains[0]["stage 2"].runs[0].recipe()
    scores = [Score(name, [of_seed[key].linear for of_seed in outcomes]) for key, name in names.items()]
    scores.append(Score("floating-point teacher", [teacher_outcome.linear]))
    scores += [Score(name, [value]) for name, value in pixel_baselines(stage2).items()]
    folders = {name: chains[0][name].runs[0].recipe().folder for name in STAGES}
    width = stage2.method.networks["student"].model_dump()["width"]
    heading = f"BURN on scikit-learn's digits: ReActNet-A x{width / 32:g}, {seeds} seed(s)"
    figure = out / "report.png"
    draw(figure, heading, teacher.folder, folders, scores, sample_views(stage2))
    text = table(scores)
    gain = [of_seed["stage 2"].linear - of_seed["random"].linear for of_seed in outcomes]
    closing = f"BURN stage 2 is {mean_std(gain)} points above the same network at random initialization."
    elapsed = f"{duration(time.perf_counter() - started)} in this call"
    (out / "report.md").write_text(
        f"# {heading}\n\nLinear evaluation (protocol `linear`) on held-out images.\n\n{text}\n\n{closing}\n\n"
        f"![curves](report.png)\n\nCurves are those of seed 0. Recipes: `recipes/quick/`. {elapsed}.\n",
        encoding="utf-8",
    )
    if json:
        record = {
            "title": heading,
            "top1": {score.name: score.values for score in scores},
            "stage2_minus_random": gain,
            "knn_online": {
                "teacher": teacher_outcome.knn,
                **{name: [of_seed[name].knn for of_seed in outcomes] for name in STAGES},
            },
            "seconds_in_this_call": round(demo.seconds),
            "recipes": {"teacher": teacher.hash, **{name: chains[0][name].runs[0].recipe().hash for name in names}},
            "environment": environment(),
        }
        write_json(record, json)
    print(f"\n{text}\n\n{closing}\nreport: {out / 'report.md'} and {figure}, {elapsed}")


if __name__ == "__main__":
    sys.exit(main())
