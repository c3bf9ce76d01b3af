"""Tiny versions of every recipe: small networks on small images; methods and structure stay."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine import recipe as recipes
from engine.recipe import Recipe
from models.contract import BackboneConfig
from models.reactnet import CHANNEL_MULTIPLES

ROOT = Path(__file__).resolve().parent.parent
TABLES = sorted(ROOT.glob("recipes/tables/*.yaml"))
RECIPES = sorted(set(ROOT.glob("recipes/**/*.yaml")) - set(TABLES) - set(ROOT.glob("recipes/base/*.yaml")))
RECIPE_IDS = [str(path.relative_to(ROOT / "recipes")) for path in RECIPES]
SHALLOW = [1, 2, 4, 4]  # one block of each kind, where ReActNet-A has 13 blocks
LARGEST = 48
"""Widths, queues and numbers of prototypes are cut to this."""


def tiny_overrides(path: Path, folder: Path) -> list[str]:
    """What shrinks a recipe to seconds, by the types of its keys and by no name of a method."""
    content = recipes.load(path)
    sizes = sorted({view.size for view in content.data.views})
    small = dict(zip(sizes, (32, 64), strict=False))
    overrides = [
        f"run.folder={folder}",
        "data.backend=synthetic",
        "data.options={num_images: 40, num_val_images: 16, num_classes: 4, side: 36, "
        f"with_boxes: {json.dumps(content.data.options.gives_boxes)}}}",
        "data.expect_images=null",
        "data.batch_size=16",
        "data.micro_batch=8",
        "data.eval_view={crop: center, size: 32, resize: 32}",
        # Two sizes stay two sizes: the smaller crops of multi-crop keep a resolution of their own.
        "data.views=" + json.dumps([{**v.model_dump(), "size": small[v.size]} for v in content.data.views]),
        "run.duration=6it",
        "run.log_every=1it",
        "run.save_every=2it",
        "run.keep=100",
        "run.amp=off",
        "run.compile=false",
        "init=[]",
        *(f"method.{key}={json.dumps(item)}" for key, item in _shrunk(content).items()),
    ]
    for name, schedule in content.schedules.items():
        if schedule.shape == "switch":
            overrides.append(f"schedules.{name}.milestones={json.dumps(['1it'] * len(schedule.milestones))}")
    if content.evals:
        overrides += ["evals.0.every=3it", "evals.0.at_start=false"]
        if content.evals[0].precise_bn:
            overrides += ["evals.0.precise_bn=1"]
    return overrides


def _shrunk(content: Recipe) -> dict[str, Any]:
    method = content.method
    keys: dict[str, Any] = {}
    for key, item in method:
        if isinstance(item, BackboneConfig):
            keys[key] = _shrunk_network(item)
        elif type(item) is int and item == method.classes:
            keys[key] = 4
        elif type(item) is int and item > LARGEST:
            keys[key] = LARGEST
    return keys


def _shrunk_network(network: BackboneConfig) -> dict[str, Any]:
    student = network.model_dump() if network.fusable else {"weights": "real", "activations": "real"}
    return {**student, "arch": "reactnet", "width": 2, "multiples": SHALLOW, "stem_stride": 2}


def tiny(path: Path | str, folder: Path, *more: str) -> Recipe:
    """A tiny version of a recipe of this repository, with further overrides."""
    path = ROOT / "recipes" / path
    return recipes.load(path, [*tiny_overrides(path, folder), *more])


def full_depth(path: Path | str) -> list[str]:
    """Overrides that give the networks of a tiny recipe the 13 blocks of ReActNet-A."""
    networks = recipes.load(ROOT / "recipes" / path).method.networks
    return [f"method.{name}.multiples={list(CHANNEL_MULTIPLES)}" for name in networks]


def distinct() -> list[Path]:
    """Recipes whose tiny versions differ in more than names and numbers: one of each, for what takes long."""
    return _one_of_each(lambda r: (r.method.model_dump_json(), r.optim.name, [view.size for view in r.data.views]))


def of_each_method() -> list[Path]:
    """One recipe of each method with each number of views, for what takes longer."""
    return _one_of_each(lambda r: (r.method.name, r.method.num_views))


def _one_of_each(kind: Callable[[Recipe], Any]) -> list[Path]:
    found: dict[str, Path] = {}
    for path in sorted(RECIPES, key=lambda p: len(p.parts)):
        found.setdefault(str(kind(tiny(path, Path("nowhere")))), path)
    return list(found.values())
