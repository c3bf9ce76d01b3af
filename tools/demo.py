"""The whole path on real images: teacher, BURN stage 1, stage 2, and a report.

    python tools/demo.py                     # scikit-learn's digits, minutes on two CPU cores
    python tools/demo.py photos/             # your own pictures, no labels needed

Of the digits each network is evaluated with a linear classifier. Of pictures without labels the report shows the meters
that need none, and what the network takes for similar; the features of all pictures lie beside it in a file for numpy.
Recipes are chosen from their number and size and written into the output's folder, to be edited: what lies there is
kept. Started again, either continues where it left off. Nothing
happens here that `tools/train.py` could not do one by one. All methods side by side: tools/compare.py.
"""

import argparse
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import _root
import make_images
import numpy as np
import torch
import yaml
from embed import embed, pixels_of_all
from embed import similar as similar_to
from torch import Tensor

import loaders
from engine import recipe as recipes
from engine import train
from engine.errors import Stopped, guarded
from engine.export import export
from engine.features import Features, data_of
from engine.log import duration, to_console
from engine.provenance import environment
from engine.recipe import Recipe
from engine.results.chain import Run, baselines, init_from, network_of, probe_of
from engine.results.figures import pyplot, score_bars
from engine.results.runs import curve, final, metrics, write_json
from engine.results.scores import Score, mean_std, table
from engine.trained import open_trained
from loaders import DataError
from loaders.augment import to_pixels
from loaders.config import Request
from loaders.files import check_writable
from loaders.sources import open_index

RECIPES = _root.ROOT / "recipes" / "quick"
STAGES = ("stage 1", "stage 2")


class Probed(NamedTuple):
    """A run, and the linear evaluation of its network."""

    title: str
    run: Run
    probe: Run


class Outcome(NamedTuple):
    """What they gave, in percent."""

    linear: float
    knn: float
    baselines: dict[str, float]


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

    def chain(self, title: str, run: Run) -> Probed:
        """A run and the linear evaluation of its network."""
        recipe = run.recipe()
        overrides = probe_of(network_of(recipe), recipes.load(RECIPES / "linear.yaml"), layer="features")
        probe = self.run_of("linear", recipe.folder.parent.name, f"linear_{recipe.name}", recipe.seed, *overrides)
        return Probed(title, run, probe)

    def teacher(self) -> Probed:
        """The floating-point teacher."""
        return self.chain("floating-point teacher (MoCo v2)", self.run_of("moco", "teacher", "moco", 0))

    def students(self, teacher: Recipe, seed: int) -> dict[str, Probed]:
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

    def run(self, chain: Probed) -> Outcome:
        """Run what is left of both in this process."""
        for run, what in ((chain.run, ""), (chain.probe, "linear evaluation of ")):
            self.started += 1
            recipe = run.recipe()
            if run.is_done():
                continue
            print(f"\n=== {self.started} of {self.total}: {what}{chain.title} ({recipe.folder})", flush=True)
            started = time.perf_counter()
            train.run(recipe, resume=True)
            self.seconds += time.perf_counter() - started
        trained, probe = chain.run.recipe().folder, chain.probe.recipe().folder
        return Outcome(final(probe, "accuracy"), final(trained, "knn"), baselines(probe))


def sample_views(recipe: Recipe, count: int = 12) -> list[Tensor]:
    """The first views of the stream as pixels: two tensors uint8 [count, size, size, 3]."""
    data = recipe.data.model_copy(update={"batch_size": count, "micro_batch": count})
    loader = loaders.open_train(data, loaders.open_data(data, "train"), seed=recipe.seed)
    views = next(loader).views
    loader.close()
    return [to_pixels(view, data.mean, data.std) for view in views]


def draw(
    out: Path,
    title: str,
    teacher: Path,
    stages: dict[str, Path],
    views: list[Tensor],
    *,
    scores: Sequence[Score] = (),
    similar: Tensor | None = None,
) -> None:
    """Draw loss, terms, collapse meters, balance, monitors, views; k-NN and the final scores, or what needs no labels.

    Args:
        out: PNG file.
        teacher: run folder of the teacher's pre-training.
        stages: name -> run folder of the BURN stages in order.
        views: two tensors uint8 [N, size, size, 3], the two views of N images.
        scores: bars of the last panel.
        similar: instead of scores, uint8 [Q, 1 + K, size, size, 3]: images, each with the K most similar ones.
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
    if scores:
        along(panels[4], "top1", "student", "tab:blue", "knn")
        panels[4].axhline(final(teacher, "knn"), color="tab:gray", linestyle="--", label="teacher")
        panels[4].set(xlabel="epoch", ylabel="top-1 %")
        panels[4].set_title("online k-NN accuracy", pad=16)
    else:
        along(panels[4], "features/rank", "student", "tab:blue")
        panels[4].axhline(curve(teacher, "features/rank")[1][-1], color="tab:gray", linestyle="--", label="teacher")
        panels[4].set(xlabel="epoch", ylabel="effective rank", ylim=(0, None))
        panels[4].set_title("features: collapsed if near 1", pad=16)
    panels[4].margins(y=0.08)
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

    if similar is not None:
        rows_of_images = [torch.cat(list(row), dim=1) for row in similar]
        panels[6].imshow(torch.cat(rows_of_images).numpy(), interpolation="nearest")
        panels[6].set_title("most similar to the first of each row", fontsize=10)
        panels[6].axis("off")
    else:
        _draw_scores(panels[6], scores)
    figure.savefig(out, dpi=100)
    plt.close(figure)


def _draw_scores(bars: Any, scores: Sequence[Score]) -> None:
    places = list(range(len(scores)))[::-1]
    score_bars(bars, places, [score.values for score in scores], color="tab:blue")
    bars.set_yticks(places, [score.name for score in scores])
    bars.set(title="linear top-1 % on held-out images")


@guarded
def main() -> int:
    """Run the chains of the digits, or of somebody's pictures, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path, nargs="?", help="anything that data.train takes; labels are not used")
    parser.add_argument("--out", type=Path, help="folder of runs and report (runs/demo_digits, runs/<pictures>)")
    parser.add_argument("--images", type=int, help="pictures: training images of each of the three runs")
    parser.add_argument("--plan", action="store_true", help="pictures: write the recipes and train nothing")
    parser.add_argument("--seeds", type=int, default=1, help="digits: how many seeds, from 0 (%(default)s)")
    parser.add_argument("--json", type=Path, help="digits: also write the numbers here")
    arguments = parser.parse_args()
    for name in ("seeds", "images"):
        if (given := getattr(arguments, name)) is not None and given < 1:
            parser.error(f"--{name}: expected at least 1, got {given}")
    to_console(is_main=True)
    pyplot()
    if arguments.json:
        check_writable(arguments.json)
    try:
        if arguments.pictures is None:
            make_images.make("digits", Path("data/digits"))
            run_demo(arguments.out or Path("runs/demo_digits"), arguments.seeds, arguments.json)
        else:
            out = arguments.out or Path("runs") / re.sub(r"\W+", "_", arguments.pictures.resolve().stem)
            run_pictures(arguments.pictures, out, arguments.images, is_plan=arguments.plan)
    except Stopped as error:
        raise Stopped(f"{error}; start this command again") from None
    return 0


def run_demo(out: Path, seeds: int, json: Path | None) -> None:
    """Run what is left, print the table, and write `report.md`, `report.png` and, where it is asked for, JSON."""
    started = time.perf_counter()
    demo = Demo(out, seeds)
    chain = demo.teacher()
    teacher = chain.run.recipe()
    teacher_outcome = demo.run(chain)
    chains = [demo.students(teacher, seed) for seed in range(seeds)]
    outcomes = [{name: demo.run(chain) for name, chain in of_seed.items()} for of_seed in chains]
    names = {
        "random": "binary network, random",
        "stage 1": "BURN stage 1 (binary activations)",
        "stage 2": "BURN stage 2 (all binary)",
    }
    stage2 = chains[0]["stage 2"].run.recipe()
    scores = [Score(name, [of_seed[key].linear for of_seed in outcomes]) for key, name in names.items()]
    scores.append(Score("floating-point teacher", [teacher_outcome.linear]))
    scores += [
        Score("raw pixels, k-NN", [teacher_outcome.baselines["pixels_knn"]]),
        Score("raw pixels, logistic regression", [teacher_outcome.baselines["pixels_top1"]]),
    ]
    folders = {name: chains[0][name].run.recipe().folder for name in STAGES}
    width = stage2.method.networks["student"].model_dump()["width"]
    heading = f"BURN on scikit-learn's digits: ReActNet-A x{width / 32:g}, {seeds} seed(s)"
    figure = out / "report.png"
    draw(figure, heading, teacher.folder, folders, sample_views(stage2), scores=scores)
    text = table(scores)
    gain = [of_seed["stage 2"].linear - of_seed["random"].linear for of_seed in outcomes]
    closing = f"BURN stage 2 is {mean_std(gain)} points above the same network at random initialization."
    elapsed = f"{duration(time.perf_counter() - started)} in this call"
    (out / "report.md").write_text(
        f"# {heading}\n\nLinear evaluation (protocol `linear`) on held-out images.\n\n{text}\n\n{closing}\n\n"
        f"![curves](report.png)\n\nCurves are those of seed 0. Recipes: `recipes/quick/`. {elapsed}.\n",
        encoding="utf-8",
    )
    packed = pack(chains[0]["stage 2"].probe.recipe(), out / "stage2.bnn")
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
            "recipes": {"teacher": teacher.hash, **{name: chains[0][name].run.recipe().hash for name in names}},
            "environment": environment(),
        }
        write_json(record, json)
    print(f"\n{text}\n\n{closing}\n{packed}\nreport: {out / 'report.md'} and {figure}, {elapsed}")


def pack(recipe: Recipe, path: Path) -> str:
    """Export what a run trained, and say how it compares with PyTorch on all validation images."""
    report = export(open_trained(recipe.folder), path, check=sys.maxsize, force=True)
    return (
        f"{path}: {report.bytes:,} bytes, {report.float32_bytes / report.bytes:.1f} times smaller than in float32; "
        f"{report.agreed} of {report.images} images get PyTorch's answer; {report.ms:.2f} ms an image "
        f"({report.kernels}), PyTorch {report.pytorch_ms:.2f}"
    )


# ------------------------------------------------------------------------------------------------ pictures

SIDES = (32, 64, 96, 128, 160, 192, 224)
"""Of views in pixels, that a network whose stem halves them takes."""
SHOWN = (6, 7)
"""Pictures of the report, and how many similar ones stand beside each."""


class Choice(NamedTuple):
    """What is chosen for a set of pictures."""

    side: int
    """Of the views in pixels."""
    width: int
    """Of the networks: channels of the first layer; ReActNet-A has 32."""
    batch: int
    duration: str
    """Of each of the three runs."""
    queue: int
    """Keys that the teacher's contrast looks back on."""


def choose(count: int, shorter_side: int, *, on_gpu: bool, images: int | None) -> Choice:
    """Choose sizes that give a result in minutes on a CPU, in an hour or two on a GPU.

    Args:
        count: pictures.
        shorter_side: median of theirs, in pixels.
        images: training images of each run; by default 20,000 on a CPU and 2 million on a GPU, at most 100 of each.
    """
    side = max((s for s in SIDES if s <= min(shorter_side, 224 if on_gpu else 64)), default=SIDES[0])
    width = 8 if not on_gpu else 16 if count < 50_000 else 32
    batch = min(256 if on_gpu else 64, 1 << (count // 2).bit_length() - 1)
    budget = images or min(2_000_000 if on_gpu else 20_000, 100 * count)
    queue = max(min(4096 if on_gpu else 1024, count // 2) // batch, 1) * batch
    return Choice(side, width, batch, f"{max(budget // batch, 1)}it", queue)


def recipes_of(pictures: Path, out: Path, choice: Choice) -> dict[str, dict[str, Any]]:
    """Recipes of teacher, stage 1 and stage 2, as YAML has them."""
    base = _root.ROOT / "recipes" / "base"
    teacher = {
        "arch": "reactnet", "width": choice.width, "stem_stride": 2, "weights": "real", "activations": "real",
        "pooled_mlp": False,
    }  # fmt: skip
    view = {"size": choice.side, "scale": [0.2, 1.0], "repeat": 2}
    if choice.side < 128:
        view["blur_sigma"] = [0.1, 1.0]  # a blur for 224 pixels leaves nothing of so few
    data = {
        "train": str(pictures.resolve()),
        "labels": "none",
        "on_bad_image": "replace",
        "batch_size": choice.batch,
        "micro_batch": choice.batch,
        "eval_view": {"crop": "center", "size": choice.side, "resize": choice.side},
    }
    run = {"duration": choice.duration, "folder": str(out), "amp": "auto", "log_every": "2%", "save_every": "20%"}
    of_teacher = {"from": str(out / "teacher"), "load": {"teacher": "backbone"}}
    return {
        "teacher": {
            "base": str(base / "small_moco.yaml"),
            "name": "teacher",
            "method": {"backbone": teacher, "queue_size": choice.queue},
            "data": {**data, "views": [{"preset": "moco_v2", **view}]},
            "schedules": {"lr": {"warmup": "5%"}},
            "run": run,
        },
        "stage1": {
            "base": str(base / "small_burn.yaml"),
            "name": "stage1",
            "method": {"student": {"width": choice.width}, "teacher": teacher, "target_gradient": "none"},
            "data": {**data, "views": [{"preset": "burn", **view}]},
            "schedules": {"lr": {"shape": "cosine", "start": 0.02, "warmup": "5%", "warmup_ratio": 1e-4}},
            "run": run,
            "init": [of_teacher],
        },
        "stage2": {
            "base": "stage1.yaml",
            "name": "stage2",
            "method": {"student": {"weights": "binary"}},
            "init": [
                {"from": str(out / "stage1"), "load": ["student", "student_head", "teacher_head"]},
                of_teacher,
            ],
        },
    }


def run_pictures(pictures: Path, out: Path, images: int | None, *, is_plan: bool) -> None:
    """Write recipes for a set of pictures, run what is left of them, and write `report.md` and `report.png`.

    Raises:
        DataError: there are too few pictures, or none that can be read.
    """
    index = open_index(pictures, Request(100_000_000, "none", asks_labels=False))
    sound = np.array([row for row in range(0, len(index), -(-len(index) // 100_000)) if row not in index.problems])
    if len(sound) < LEAST:
        raise DataError(f"{pictures}: {len(sound)} images that can be used; expected at least {LEAST}")
    shorter = int(np.median(np.minimum(index.width[sound], index.height[sound])))
    choice = choose(len(index), shorter, on_gpu=torch.cuda.is_available(), images=images)
    print(f"{pictures}: {len(index):,} images, {len(index.problems)} unusable, shorter side {shorter} pixels (median)")
    print(f"chosen: views of {choice.side} pixels, networks of width {choice.width} (ReActNet-A has 32), batches of "
          f"{choice.batch}, three runs of {choice.duration}")  # fmt: skip
    folder = out / "recipes"
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in recipes_of(pictures, out, choice).items():
        path = folder / f"{name}.yaml"
        if path.exists():
            print(f"{path}: kept as it is")
            continue
        path.write_text(f"# python tools/train.py {path}\n{yaml.safe_dump(content, sort_keys=False)}", encoding="utf-8")
        print(f"\n{path.read_text(encoding='utf-8')}", end="")
    if is_plan:
        return
    started = time.perf_counter()
    done = []
    for number, name in enumerate(("teacher", "stage1", "stage2"), 1):
        recipe = recipes.load(folder / f"{name}.yaml")
        print(f"\n=== {number} of 3: {name} ({recipe.folder})", flush=True)
        if not Run(folder / f"{name}.yaml", []).is_done():
            train.run(recipe, resume=True)
        done.append(recipe)
    teacher, stage1, stage2 = done
    title = f"BURN on {len(index):,} pictures of {pictures}: ReActNet-A x{choice.width / 32:g} at {choice.side} pixels"
    stages = {"stage 1": stage1.folder, "stage 2": stage2.folder}
    print()
    features = embed(open_trained(stage2.folder), pictures, out / FEATURES, UNLABELED, sheet=out / SHEET)
    assert features is not None  # in a process alone
    shown = similar_images(features, stage2, pictures)
    draw(out / "report.png", title, teacher.folder, stages, sample_views(stage2), similar=shown)
    (out / "report.md").write_text(report_of(title, pictures, done), encoding="utf-8")
    elapsed = duration(time.perf_counter() - started)
    print(f"\nreport: {out / 'report.md'} and {out / 'report.png'}; network: {stage2.folder}; features: "
          f"{out / FEATURES}, {out / SHEET}; {elapsed} in this call")  # fmt: skip


LEAST = 16
"""Pictures that something can be learned from at all."""


FEATURES, SHEET = "features.npz", "neighbors.png"
UNLABELED = ("data.labels=none",)


def similar_images(features: Features, recipe: Recipe, pictures: Path) -> Tensor:
    """Some pictures, each with those whose features are nearest by cosine: uint8 [Q, 1 + K, size, size, 3]."""
    data = data_of(open_trained(recipe.folder), UNLABELED, val=pictures)
    index = loaders.open_root(data, str(pictures), labels=data.labels)
    asked, found, _ = similar_to(features, *SHOWN)
    return torch.from_numpy(pixels_of_all(features, data, index, asked, found))


def report_of(title: str, pictures: Path, done: list[Recipe]) -> str:
    """The page: meters of the last rows of all runs, and how to go on."""
    last = [[row for row in metrics(recipe.folder) if "loss" in row][-1] for recipe in done]
    names = [name for name in dict.fromkeys(name for row in last for name in row) if name in METERS]
    lines = [
        f"| `{name}` | {' | '.join(f'{row[name]:.4g}' if name in row else '' for row in last)} | {METERS[name]} |"
        for name in names
    ]
    stage2 = done[2]
    return "\n".join(
        [
            f"# {title}", "", "![curves, views, similar images](report.png)", "",
            "| meter, at the end | teacher | stage 1 | stage 2 | healthy |", "|---|---|---|---|---|", *lines, "",
            f"![each picture with its eight nearest]({SHEET})", "",
            f"The features of all pictures: `{FEATURES}` beside this file, `numpy.load` opens it; of others: "
            f"`python tools/embed.py {stage2.folder} PHOTOS out.npz --neighbors similar.png` (docs/downstream.md).", "",
            "What each meter means, and what to do where it is not healthy: docs/meters.md. A loss that falls shows "
            "nothing by itself: look at the rows of similar images.", "",
            "To go on:", "",
            f"- train longer, wider or larger: edit `{stage2.run.folder}/recipes/*.yaml` and give the runs new names;",
            "- with some labeled images, see what the features are worth: "
            "`evals=[{kind: knn, train: labeled/train, val: labeled/val}]`;",
            f"- the network: `{stage2.folder}/checkpoints`.",
        ]
    ) + "\n"  # fmt: skip


METERS = {
    "loss": "falls, then flattens",
    "target_information": "well above 0: targets differ between images",
    "outputs/information": "well above 0: answers differ between images",
    "features/rank": "well above 1",
    "binary/sign_flips": "falls towards 0",
    "binary/dead_channels": "below 0.5",
    "binary/saturated_channels": "near 0",
}


if __name__ == "__main__":
    sys.exit(main())
