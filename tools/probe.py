"""Measure what frozen features are worth: k-NN, the linear SVMs of VOC07, and its low-shot SVMs.

    python tools/probe.py runs/burn_stage2 --task svm lowshot --data data/VOCdevkit#2007
    python tools/probe.py runs/burn_stage2 weights/moco_v2.pth.tar --task knn --data data/imagenet
    python tools/probe.py runs/burn_stage2 --task svm --data train=data/flowers/train val=data/flowers/test
    torchrun --nproc_per_node=8 tools/probe.py ...        # features on all ranks, the rest on the first
    python tools/probe.py weights/resnet50.pth --task svm lowshot --data data/VOCdevkit#2007 --check torchvision

Features are extracted once and every fit is kept as it comes: a call that is started again goes on where it was. Exit
codes: 0 done; 1 --check found a number too far from the known one; 2 bad input, found before any feature is extracted;
6 the machine failed, a worker of it perhaps; 130 or 143 stopped.
"""

import argparse
import itertools
import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import _root  # noqa: F401
import numpy as np
import torch

import loaders
from engine import dist, evals, provenance, svm
from engine.data import check_classes, open_once
from engine.dist import World
from engine.errors import RecipeError
from engine.features import ALONE, Features, check, data_of, extract
from engine.log import Progress, logger, to_console
from engine.pool import Ledger, Pool, Unit
from engine.results import figures, runs
from engine.trained import Trained, open_trained
from loaders import DataConfig, DataError, Index, machine, voc
from loaders.files import aside, check_writable
from loaders.views import View
from models.contract import LAYERS, Layer

TASKS = ("knn", "svm", "lowshot")
NEIGHBORS = (10, 20, 100, 200)
TEMPERATURE = 0.07
TIMEOUT = 1800
"""Seconds that a rank waits for others."""
ANSWERS = {
    "torchvision": (87.17, (52.99, 63.55, 73.7, 78.79, 81.76, 83.75, 85.18, 85.97)),
    "moco_v2_200": (84.26, (43.0, 52.48, 63.43, 71.74, 76.35, 78.9, 81.31, 82.45)),
    "byol_200": (85.10, (44.48, 52.09, 62.88, 70.87, 76.18, 79.45, 81.88, 83.08)),
}
"""VOC07 mAP % of published ResNet-50s, in OpenSelfSup's table: of the SVM, and low-shot for each of `svm.SHOTS`."""
WITHIN = (0.3, 1.0)
"""How far ours may be from both: a choice of ours. Other draws alone move the low-shot numbers."""


@dataclass(frozen=True)
class Labeled:
    """A data set and what its images show."""

    name: str
    index: Index
    classes: tuple[str, ...]
    targets: svm.Targets
    """[N, C] of all rows of the index."""


class Plan(NamedTuple):
    """How features are taken for some of the tasks."""

    layer: Layer
    crop: str
    """"" for the view of the network's evaluations."""
    size: int | None
    """Of the view's side; None for that of the network's evaluations."""

    def side(self, trained: Trained) -> int:
        """Of the images that the network is given."""
        return self.size or trained.view.size


def main() -> int:
    """Parse the command line, check everything, extract, measure, write."""
    arguments = parse()
    to_console(is_main=dist.environment_rank() == 0, progress=sys.stderr)
    out: Path = arguments.out
    for name in ("probe.json", "probe.md", "probe.png", "results.jsonl"):
        check_writable(out / name)
    if fits(arguments) and (problem := svm.missing()):
        raise RecipeError(f"--task {' '.join(arguments.task)}: {problem}")
    if "lowshot" in arguments.task:
        figures.pyplot()
    roots = roots_of(arguments.data)
    with dist.group(arguments.device, TIMEOUT) as world:
        networks = dist.together(
            lambda: {str(path): open_trained(path, part=arguments.part) for path in arguments.source}
        )
        for trained, plan in itertools.product(networks.values(), plans(arguments).values()):
            check(trained, plan.layer, plan.side(trained))
        reading = reading_of(next(iter(networks.values())), roots, arguments)
        sets = open_sets(roots, reading, arguments, world)
        shots = dist.together(lambda: checked(sets, arguments))
        ledger = dist.together(lambda: Ledger(out / "results.jsonl") if world.is_main else None)
        call = Call(arguments, roots, sets, shots, world.device)
        for trained, plan in itertools.product(networks.values(), dict.fromkeys(plans(arguments).values())):
            features_of(trained, plan, call, world)  # into the cache: those of all networks may be more than fits
    if ledger is None:
        return 0
    with Pool(ledger, arguments.jobs) as pool:
        found = {name: measure(name, trained, call, pool) for name, trained in networks.items()}
    result = {**about(call), "networks": found}
    failed = checked_answers(result, arguments.check) if arguments.check else []
    write(result, out)
    return 1 if failed else 0


def parse() -> argparse.Namespace:
    """The command line, as far as it can be judged by itself."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="+", type=Path, help="run folders, checkpoints or published weight files")
    parser.add_argument("--task", nargs="+", choices=TASKS, required=True, help="what to measure")
    parser.add_argument(
        "--data",
        nargs="+",
        required=True,
        help="a devkit of VOC with a year (trainval and test of it), a folder with train and val, or train=... val=...",
    )
    parser.add_argument("--out", type=Path, help="folder of features, results, table and figure (runs/probe_<source>)")
    parser.add_argument("--part", help="a network of a pre-training run or file, such as teacher (the one evaluated)")
    parser.add_argument(
        "--protocol",
        choices=list(svm.PROTOCOLS),
        default="voc07",
        help="of the SVMs: Goyal et al. 2019, or PCL's, whose numbers are others (%(default)s)",
    )
    parser.add_argument("--layer", choices=LAYERS, help="of the network (the protocol's; for knn features)")
    parser.add_argument("--size", type=int, help="side of the image for SVMs of voc07 (that of the run's evaluations)")
    parser.add_argument("--costs", nargs="+", type=float, help="of the SVMs (the protocol's, 19 of voc07)")
    parser.add_argument("--shots", nargs="+", type=int, help="low-shot k (the protocol's, 1 2 4 ... 64 96 of voc07)")
    parser.add_argument("--samples", type=Path, help="folder of published low-shot files, instead of draws of our own")
    parser.add_argument("--seed", type=int, default=0, help="of the low-shot draws (%(default)s)")
    parser.add_argument("--any-counts", action="store_true", help="VOC07 with other numbers of images than published")
    parser.add_argument("--jobs", type=int, default=machine.cores(), help="processes that fit SVMs (one a core)")
    parser.add_argument(
        "--device", default="auto", choices=["auto", "cpu", "cuda"], help="of the network (%(default)s)"
    )
    parser.add_argument(
        "--check", choices=sorted(ANSWERS), help="compare with known answers of this ResNet-50 on VOC07"
    )
    arguments = parser.parse_intermixed_args()
    first = arguments.source[0]
    arguments.out = arguments.out or Path("runs") / f"probe_{first.resolve().name.split('.')[0]}"
    arguments.task = [task for task in TASKS if task in arguments.task]
    protocol = svm.PROTOCOLS[arguments.protocol]
    for name in ("costs", "shots"):
        setattr(arguments, name, list(getattr(arguments, name) or getattr(protocol, name)))
    if arguments.samples and arguments.protocol != "voc07":
        parser.error("--samples: published files are of --protocol voc07")
    if arguments.size is not None and (arguments.size < 1 or not protocol.crop or not fits(arguments)):
        parser.error("--size: expected at least 1, and SVMs of voc07: other views are those of the run's evaluations")
    if len(set(arguments.source)) < len(arguments.source):
        parser.error("source: one is there twice")
    if arguments.jobs < 1:
        parser.error(f"--jobs: expected at least 1, got {arguments.jobs}")
    for name, low in (("costs", 0.0), ("shots", 0)):
        given = getattr(arguments, name)
        if not all(low < number < float("inf") for number in given) or len(set(given)) < len(given):
            parser.error(f"--{name}: expected different numbers above 0, got {' '.join(map('{:g}'.format, given))}")
    if not 0 <= arguments.seed < 2**64:
        parser.error(f"--seed: expected 0 to 2^64 - 1, got {arguments.seed}")
    if arguments.check:
        is_full = tuple(arguments.costs) == svm.COSTS and not (arguments.layer or arguments.size) and fits(arguments)
        is_voc07 = arguments.protocol == "voc07" and arguments.data[0].endswith("#2007") and not arguments.any_counts
        if len(arguments.source) > 1 or not is_full or not is_voc07:
            parser.error("--check: expected one source, --task svm or lowshot, all costs and --data .../VOCdevkit#2007")
    return arguments


def fits(arguments: argparse.Namespace) -> bool:
    """Whether any task fits SVMs."""
    return bool({"svm", "lowshot"} & set(arguments.task))


def plans(arguments: argparse.Namespace) -> dict[str, Plan]:
    """Task -> how its features are taken."""
    protocol = svm.PROTOCOLS[arguments.protocol]
    of_svm = Plan(arguments.layer or protocol.layer, protocol.crop, arguments.size)
    of_knn = Plan(arguments.layer or "features", "", None)
    return {task: of_knn if task == "knn" else of_svm for task in arguments.task}


# ------------------------------------------------------------------------------------------------ data


def roots_of(words: Sequence[str]) -> dict[str, str]:
    """`--data` as `train` and `val`.

    Raises:
        RecipeError: it does not name both.
    """
    named = {split: os.path.expanduser(root) for split, _, root in (word.partition("=") for word in words)}
    if named.keys() == {"train", "val"} and len(words) == 2:
        return {split: named[split] for split in ("train", "val")}
    if len(words) == 1:
        root = os.path.expanduser(words[0])
        if "#" in root and "_" not in root.rpartition("#")[2]:
            return {"train": f"{root}_trainval", "val": f"{root}_test"}
        if all((Path(root) / split).is_dir() for split in ("train", "val")):
            return {split: str(Path(root) / split) for split in ("train", "val")}
    raise RecipeError(
        f"--data: expected data/VOCdevkit#2007, a folder with train and val in it, or train=... val=..., got "
        f"{' '.join(words)}"
    )


def reading_of(trained: Trained, roots: dict[str, str], arguments: argparse.Namespace) -> DataConfig:
    """How images are read and normalized for a network."""
    changes = [f"data.{split}={json.dumps(root)}" for split, root in roots.items()]
    return data_of(trained, changes, device=arguments.device)


def open_sets(
    roots: dict[str, str], reading: DataConfig, arguments: argparse.Namespace, world: World
) -> dict[str, Labeled]:
    """Both data sets, on all ranks.

    Raises:
        DataError: one cannot be used, or their classes differ.
    """
    kits = dist.together(
        lambda: {
            split: voc.read(root, any_counts=arguments.any_counts) for split, root in roots.items() if voc.is_kit(root)
        }
    )
    asks = f"--task {' '.join(arguments.task)}"
    indices = open_once(
        lambda: {
            split: loaders.open_root(reading, root, for_labels="" if split in kits else asks)
            for split, root in roots.items()
        },
        reading,
        world,
    )
    sets = {}
    for split, index in indices.items():
        kit = kits.get(split)
        classes, targets = (kit.classes, kit.targets) if kit else (index.classes, one_hot(index))
        if not svm.PROTOCOLS[arguments.protocol].has_difficult:
            targets = np.maximum(targets, 0)
        sets[split] = Labeled(roots[split], index, tuple(classes), targets)
    train, val = sets["train"], sets["val"]
    dist.together(lambda: check_classes(val.name, val.classes, train.name, train.classes))
    return sets


def one_hot(index: Index) -> svm.Targets:
    """Targets [N, C] of images with a label each."""
    assert index.label is not None  # refused where there is none
    return (index.label[:, None] == np.arange(len(index.classes))).astype(np.int8)


def checked(sets: dict[str, Labeled], arguments: argparse.Namespace) -> list[int]:
    """See that the tasks can be done, as far as the labels tell.

    Returns:
        Numbers of shots for which every class has enough images.

    Raises:
        DataError, RecipeError: they cannot.
    """
    train = sets["train"]
    classes = train.classes
    if "knn" in arguments.task and any(one.index.label is None for one in sets.values()):
        raise RecipeError(f"--task knn: expected one class for each image, {train.name} has several")
    if fits(arguments):
        check_counts(sets, {split: one.targets for split, one in sets.items()}, arguments)
    if "lowshot" not in arguments.task:
        return []
    shots = svm.possible(train.targets, arguments.shots)
    if not shots:
        raise DataError(
            f"{train.name}: {svm.rarest(train.targets, classes)}, too few for --shots {min(arguments.shots)}"
        )
    if dropped := [number for number in arguments.shots if number not in shots]:
        said = " and ".join(map(str, dropped))
        if dist.environment_rank() == 0:
            logger.warning(f"--shots {said}: left out, {train.name}: {svm.rarest(train.targets, classes)}")
    if arguments.samples:
        for number in shots:
            for sample in range(svm.SAMPLES):
                svm.read_draw(arguments.samples, train.targets, number, sample)
    return shots


def check_counts(sets: dict[str, Labeled], targets: dict[str, svm.Targets], arguments: argparse.Namespace) -> None:
    """See that every class can be learned and tested; again where some images could not be decoded.

    Raises:
        DataError: it cannot.
    """
    least = {"train": svm.FOLDS if "svm" in arguments.task and len(arguments.costs) > 1 else 1, "val": 1}
    for split, one in sets.items():
        svm.check(targets[split], one.classes, one.name, least[split])


class Call(NamedTuple):
    """What all networks of a call share."""

    arguments: argparse.Namespace
    roots: dict[str, str]
    sets: dict[str, Labeled]
    shots: list[int]
    device: torch.device


def features_of(trained: Trained, plan: Plan, call: Call, world: World = ALONE) -> list[Features | None]:
    """Features of both sets, from the cache where they are there; None on ranks other than the first."""
    reading = reading_of(trained, call.roots, call.arguments)
    if plan.crop:
        view = View.model_validate({"crop": plan.crop, "size": plan.side(trained)})
        reading = reading.model_copy(update={"eval_view": view})
    return [
        extract(trained, reading, call.sets[split].index, layer=plan.layer, world=world, cache=call.arguments.out)
        for split in ("train", "val")
    ]


# ------------------------------------------------------------------------------------------------ measuring


def measure(name: str, trained: Trained, call: Call, pool: Pool) -> dict[str, Any]:
    """All tasks of one network, on the first rank."""
    result: dict[str, Any] = {"part": trained.part, "step": trained.step}
    for task, plan in plans(call.arguments).items():
        train, val = features_of(trained, plan, call)
        assert train is not None and val is not None
        result["weights"] = train.of["weights"]
        found = knn(name, train, val, call, pool) if task == "knn" else fitted(task, name, train, val, call, pool)
        result[task] = {
            "layer": plan.layer,
            "view": train.of["view"],
            "width": train.array.shape[1],
            "images": [len(train.rows), len(val.rows)],
            "left_out": [train.left_out, val.left_out],
            **found,
        }
    return result


def fitted(task: str, name: str, train: Features, val: Features, call: Call, pool: Pool) -> dict[str, Any]:
    """The SVMs of a task."""
    targets = {split: call.sets[split].targets[one.rows] for split, one in (("train", train), ("val", val))}
    check_counts(call.sets, targets, call.arguments)
    ready = svm.Sets(svm.normalized(train.array), targets["train"], svm.normalized(val.array), targets["val"])
    parent = call.arguments.out / "rows"  # it may be left of a call that was killed

    def work(units: list[Unit], title: str) -> list[Any]:
        return pool.run(units, f"{name}: {title}")

    try:
        folder, costs = ready.write(parent), call.arguments.costs
        if task == "svm":
            return svm.measure(folder, targets["train"], call.sets["train"].classes, costs, work)
        draws = {
            (number, sample): drawn(call.sets["train"], train.rows, number, sample, call.arguments)
            for number in call.shots
            for sample in range(svm.SAMPLES)
        }
        return svm.measure_low_shot(folder, draws, costs, work)
    finally:
        shutil.rmtree(parent, ignore_errors=True)


def knn(name: str, train: Features, val: Features, call: Call, pool: Pool) -> dict[str, Any]:
    """k-NN, kept in the ledger like every fit."""
    unit = Unit(
        {"features": [train.hash, val.hash], "task": "knn", "neighbors": NEIGHBORS, "temperature": TEMPERATURE},
        nearest_neighbors,
        (train, val, call.device),
        size=1,
    )
    (found,) = pool.run([unit], f"{name}: k-NN", here=True)
    return {"neighbors": found}


def nearest_neighbors(train: Features, val: Features, device: torch.device) -> dict[str, dict[str, float]]:
    """Number of neighbors -> top-1 and top-5 in percent; a class that no neighbor has is no answer."""
    assert train.label is not None and val.label is not None
    bank, bank_label, query, label = (
        torch.from_numpy(array).to(device) for array in (train.array, train.label, val.array, val.label)
    )
    progress = Progress("k-NN", len(query), "images")
    ranked = evals.knn_ranked(
        bank, bank_label, query, len(train.classes), NEIGHBORS, TEMPERATURE, most=5, done=progress.update
    )
    hits = ranked == label[:, None]  # [k, M, 5]
    return {
        str(count): {"top1": percent(hits[number, :, :1]), "top5": percent(hits[number])}
        for number, count in enumerate(NEIGHBORS)
    }


def percent(hits: torch.Tensor) -> float:
    """Of rows [M, n] with a hit."""
    return 100 * int(hits.any(dim=1).sum()) / len(hits)


def drawn(train: Labeled, rows: np.ndarray, shots: int, sample: int, arguments: argparse.Namespace) -> svm.Targets:
    """A low-shot draw among the images that could be decoded."""
    if not arguments.samples:
        draw = svm.PROTOCOLS[arguments.protocol].draw
        return draw(train.targets[rows], rows, shots, sample, arguments.seed)
    found = svm.read_draw(arguments.samples, train.targets, shots, sample)
    lost = np.ones(len(found), dtype=bool)
    lost[rows] = False
    for row in np.flatnonzero(lost & (found != svm.UNUSED).any(axis=1))[:1]:
        raise DataError(f"{train.index.path(row)}: cannot be decoded, and {arguments.samples} has drawn it")
    return found[rows]


# ------------------------------------------------------------------------------------------------ results


def about(call: Call) -> dict[str, Any]:
    """What all numbers of a call share."""
    arguments = call.arguments
    packages = ["scikit-learn", "scipy"] if fits(arguments) else []
    return {
        "protocol": {
            "tasks": arguments.task,
            "knn": {"neighbors": NEIGHBORS, "temperature": TEMPERATURE, "similarity": "cosine"},
            "svm": {"name": arguments.protocol, **svm.SHARED},
            "difficult": "left out of tests, never drawn, absent in training"
            if svm.PROTOCOLS[arguments.protocol].has_difficult
            else "absent",
            "costs": arguments.costs,
            "shots": call.shots,
            "draws": f"files of {arguments.samples}" if arguments.samples else f"ours, seed {arguments.seed}",
            "percent": "all scores are in percent",
        },
        "data": {
            split: {
                "name": one.name,
                "fingerprint": one.index.fingerprint,
                "images": len(one.index),
                "positives": dict(zip(one.classes, (one.targets == 1).sum(axis=0).tolist(), strict=True)),
                "difficult": int((one.targets == -1).sum()),
            }
            for split, one in call.sets.items()
        },
        "versions": {**provenance.versions(), **{package: metadata.version(package) for package in packages}},
    }


def checked_answers(result: dict[str, Any], known_as: str) -> list[str]:
    """Compare with known answers: a line for each, all in the result under `check`; those that failed."""
    (network,) = result["networks"].values()
    full, low_shot = ANSWERS[known_as]
    rows = [("SVM", network["svm"]["map"], full, WITHIN[0])] if "svm" in network else []
    known = dict(zip(svm.SHOTS, low_shot, strict=True))
    for number, found in network.get("lowshot", {}).get("shots", {}).items():
        if int(number) in known:
            rows.append((f"low-shot k = {number}", found["chosen_on_test"]["mean"], known[int(number)], WITHIN[1]))
    result["check"] = [
        {"what": what, "got": got, "expected": expected, "within": within, "passed": abs(got - expected) <= within}
        for what, got, expected, within in rows
    ]
    lines = [
        f"{'pass' if row['passed'] else 'FAIL'} {row['what']}: {row['got']:.2f}, {known_as} has "
        f"{row['expected']:.2f} ± {row['within']:.1f}"
        for row in result["check"]
    ]
    print("\n".join(lines))
    return [line for line in lines if line.startswith("FAIL")]


def write(result: dict[str, Any], out: Path) -> None:
    """The JSON, the table and the figure."""
    runs.write_json(result, out / "probe.json")
    said = table(result)
    with aside(out / "probe.md") as file:
        file.part.write_text(said, encoding="utf-8")
    print(said)
    networks = result["networks"]
    curves, levels = {}, {}
    for name, network in networks.items():
        if "lowshot" in network:
            curves[name] = {
                int(number): tuple(found["chosen_on_test"][key] for key in ("mean", "min", "max"))
                for number, found in network["lowshot"]["shots"].items()
            }
            if "svm" in network:
                levels[name] = network["svm"]["map"]
    if curves:
        title = f"low-shot SVMs on {result['data']['train']['name']}, cost chosen on the test set"
        with aside(out / "probe.png") as file:
            figures.draw_low_shot(file.part, title, curves, levels)


def table(result: dict[str, Any]) -> str:
    """Everything for people, in Markdown."""
    networks, data = result["networks"], result["data"]
    lines = [f"# Frozen features: {data['train']['name']}, tested on {data['val']['name']}", ""]
    if (name := result["protocol"]["svm"]["name"]) != "voc07":
        lines += [f"SVMs by protocol {name}: not to be compared with voc07's.", ""]
    if found := {name: network["svm"] for name, network in networks.items() if "svm" in network}:
        classes = list(data["train"]["positives"])
        lines += [
            "## SVM, average precision %",
            "",
            *head("", found),
            row("**mean**", (n["map"] for n in found.values())),
        ]
        lines += [row(c, (network["ap"][c] for network in found.values())) for c in classes]
        lines += ["", "Cost of each class by cross-validation on the training set.", ""]
    if found := {name: network["lowshot"] for name, network in networks.items() if "lowshot" in network}:
        shots = list(next(iter(found.values()))["shots"])
        lines += [
            f"## Low-shot SVM, mAP %, mean ± deviation of {svm.SAMPLES} samples",
            "",
            *head("network, cost", shots),
        ]
        for name, network in found.items():
            costs = result["protocol"]["costs"]
            best = "chosen on the test set" if len(costs) > 1 else f"{costs[0]:g}"
            for key, said in (("chosen_on_test", best), ("at_cost_1", "1")):
                cells = [network["shots"][number][key] for number in shots]
                if None not in cells and not (key == "at_cost_1" and len(costs) == 1):
                    said = f"| {name}, {said} | "
                    lines.append(said + " | ".join(f"{c['mean']:.2f} ± {c['std']:.2f}" for c in cells) + " |")
        note = "Published numbers have a cost that was chosen on the test set; the cost 1 was not."
        lines += ["", f"{note} Draws: {result['protocol']['draws']}.", ""]
    if found := {name: network["knn"] for name, network in networks.items() if "knn" in network}:
        lines += ["## k-NN, top-1 % / top-5 %", "", *head("network", map(str, NEIGHBORS))]
        for name, network in found.items():
            cells = network["neighbors"].values()
            lines.append(f"| {name} | " + " | ".join(f"{c['top1']:.2f} / {c['top5']:.2f}" for c in cells) + " |")
        lines.append("")
    return "\n".join(lines)


def head(first: str, names: Any) -> list[str]:
    """The first two lines of a table."""
    names = list(names)
    return [f"| {' | '.join([first, *names])} |", f"|{'---|' * (1 + len(names))}"]


def row(first: str, numbers: Any) -> str:
    """A line of a table."""
    return f"| {first} | {' | '.join(f'{number:.2f}' for number in numbers)} |"


if __name__ == "__main__":
    dist.leave(main)
