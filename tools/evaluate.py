"""Measure a trained network again, on any labeled images: its own classifier, or k-NN or least squares on its features.

    python tools/evaluate.py runs/linear_burn_stage2 data.val=other/val
    python tools/evaluate.py weights/resnet50.pth data.val=data/imagenet/val
    torchrun --nproc_per_node=8 tools/evaluate.py runs/burn_stage2 --kind knn data.train=set/train data.val=set/val

Prints one line of JSON: top-1, top-5 and the mean recall of the classes in percent, how many images were measured, on
what, seen how, and a hash of the weights. Progress goes to standard error. Nothing is trained or written; a classifier
for other classes is trained by a recipe, such as recipes/linear.yaml.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, Literal

import _root  # noqa: F401
from torch import nn

import loaders
from engine import dist, evals
from engine.data import check_classes, open_once
from engine.dist import World
from engine.errors import RecipeError, shared
from engine.features import check, data_of
from engine.log import logger, to_console
from engine.recipe import EvalConfig
from engine.trained import Trained, hash_of, open_trained
from loaders import DataConfig, DataError, Index


def main() -> int:
    """Parse the command line, measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a run folder, a checkpoint, a published weight file, or a .bnn file")
    parser.add_argument("override", nargs="*", default=[], help="data.key=value; not set: the run's own data")
    parser.add_argument(
        "--kind",
        choices=["accuracy", "knn", "ridge"],
        help="ridge: a linear classifier in closed form (accuracy where there is a classifier, else knn)",
    )
    parser.add_argument("--part", help="a network of a pre-training run, such as teacher (the one that is evaluated)")
    parser.add_argument("--step", type=int, help="of a run folder (the newest)")
    for name, text in (("neighbors", "how many vote"), ("bank", "training images at most, evenly spaced; ridge, too")):
        default = EvalConfig.model_fields[name].default
        parser.add_argument(f"--{name}", type=int, default=default, help=f"knn: {text} (%(default)s)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="(%(default)s)")
    arguments = parser.parse_intermixed_args()
    for name in ("neighbors", "bank"):
        if (given := getattr(arguments, name)) < 1:
            parser.error(f"--{name}: expected at least 1, got {given}")
    to_console(is_main=dist.environment_rank() == 0, progress=sys.stderr)
    trained = open_trained(arguments.source, step=arguments.step, part=arguments.part)
    kind: Literal["accuracy", "knn", "ridge"] = arguments.kind or ("knn" if trained.classifier is None else "accuracy")
    if kind == "accuracy" and trained.classifier is None:
        raise RecipeError(f"{trained.source}: has no classifier to measure, expected --kind knn or ridge")
    data = data_of(trained, arguments.override, device=arguments.device)
    check(trained, "features", data.eval_view.size)
    config = EvalConfig(kind=kind, neighbors=arguments.neighbors, bank=arguments.bank)
    with dist.group(arguments.device, 1800) as world:
        result = evaluate(trained, data, config, world)
    if world.is_main:
        print(json.dumps(result))
    return 0


def evaluate(trained: Trained, data: DataConfig, config: EvalConfig, world: World) -> dict[str, Any]:
    """One evaluation on all ranks, in float32.

    Returns:
        Plain data: `top1` and what else the evaluation has, and what it was of.

    Raises:
        DataError: the images are not there, have no labels, or have other classes; on all ranks.
    """

    def open_them() -> dict[str, Index]:
        use = f"--kind {config.kind}"
        opened = {"val": loaders.open_data(data, "val", for_labels=use)}
        return opened | ({"train": loaders.open_data(data, "train", for_labels=use)} if config.needs_train else {})

    indices = open_once(open_them, data, world)
    val = indices["val"]
    names = {split: str(index.root) for split, index in indices.items()}
    if data.options.reads_files:  # of a list the file, not its folder
        names = {split: getattr(data, split) for split in indices}
    dist.together(lambda: _check_classes(trained, indices, names) if world.is_main else None)
    trained.network.to(world.device)
    network = trained.network if config.kind == "accuracy" else trained.backbone
    try:
        scores = evals.measure(config, trained.network, trained.backbone, data, indices, world)
    except evals.NotMeasured as error:
        raise shared(DataError(f"{names['val']}: {error}")) from None
    return {
        "kind": config.kind,
        **scores,
        "measured": round(scores["measured"]),
        "images": len(val),
        "data": names,
        "fingerprint": {split: index.fingerprint for split, index in indices.items()},
        "source": str(trained.source),
        "part": trained.part,
        "step": trained.step,
        "weights": hash_of(network),
        "view": data.eval_view.model_dump(mode="json", include={"crop", "size", "resize", "interpolation"}),
        **(config.model_dump(include={"neighbors", "temperature", "bank"}) if config.needs_train else {}),
    }


def _check_classes(trained: Trained, indices: dict[str, Index], names: dict[str, str]) -> None:
    """See that answers and labels are of the same classes, before anything is measured."""
    ours = indices["val"].classes
    if "train" in indices:
        check_classes(names["val"], ours, names["train"], indices["train"].classes)
        return
    assert trained.classifier is not None
    if trained.classes:
        check_classes(names["val"], ours, str(trained.source), trained.classes)
        return
    outputs = [layer.out_features for layer in trained.classifier.modules() if isinstance(layer, nn.Linear)][-1]
    if len(ours) != outputs:
        raise DataError(f"{names['val']}: {len(ours)} classes, the classifier of {trained.source} knows {outputs}")
    logger.warning(f"{trained.source}: does not say what its {outputs} classes are; taken for those of {names['val']}")


if __name__ == "__main__":
    dist.leave(main)
