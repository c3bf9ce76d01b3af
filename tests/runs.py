"""Runs of tiny recipes, whole or step by step, and what they leave behind."""

from __future__ import annotations

from typing import Any

import torch

import loaders
from engine import checkpoint, dist, train
from engine.log import TIMING
from engine.recipe import Recipe
from engine.results.runs import metrics
from engine.train import Trainer
from loaders import Loader


def run(recipe: Recipe, **options: Any) -> dict[str, Any]:
    """Run a recipe to its end; its last checkpoint."""
    train.run(recipe, **options)
    return last_state(recipe)


def last_state(recipe: Recipe) -> dict[str, Any]:
    newest, damaged = checkpoint.latest(recipe.folder / "checkpoints")
    assert newest and not damaged
    return checkpoint.load(newest)


def rows(recipe: Recipe) -> list[dict[str, Any]]:
    """Rows of metrics without what differs between two equal runs."""
    return [{key: item for key, item in row.items() if key not in TIMING} for row in metrics(recipe.folder)]


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Where two nested states are not bit-identical."""
    if isinstance(a, torch.Tensor):
        same = isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
        return [] if same else [path]
    if isinstance(a, dict):
        if not isinstance(b, dict) or a.keys() != b.keys():
            return [path]
        return [found for key in a for found in differences(a[key], b[key], f"{path}.{key}")]
    if isinstance(a, list | tuple):
        if len(a) != len(b):
            return [path]
        return [found for i, (x, y) in enumerate(zip(a, b, strict=True)) for found in differences(x, y, f"{path}.{i}")]
    return [] if a == b else [path]


def assert_same_run(a: Recipe, b: Recipe) -> None:
    """Weights, buffers, optimizer and metrics of two finished runs are bit-identical."""
    one, two = last_state(a), last_state(b)
    for key in ("step", "method", "optimizer", "scaler", "meter", "bad_images"):
        assert differences(one[key], two[key], key) == []
    assert rows(a) == rows(b)


# ------------------------------------------------------------------------------------------------ step by step


def trainer_of(recipe: Recipe, **options: Any) -> Trainer:
    """A trainer alone on the CPU."""
    return Trainer(recipe, dist.start("cpu", 60), **options)


def open_loader(trainer: Trainer) -> Loader:
    """The training batches of a trainer, from its first step."""
    seed, place = trainer.recipe.seed, trainer.world.place
    return loaders.open_train(trainer.recipe.data, trainer.indices["train"], seed=seed, place=place)


def prepare(recipe: Recipe) -> tuple[Trainer, Loader]:
    """A trainer and its batches, to be stepped by hand."""
    trainer = trainer_of(recipe)
    return trainer, open_loader(trainer)


def in_float64(batches: Loader) -> Any:
    """Batches whose views are in float64."""
    return (batch._replace(views=[view.double() for view in batch.views]) for batch in batches)


def losses_in_float64(recipe: Recipe, steps: int) -> list[float]:
    """The loss of each of some steps of a network in float64: the same on every machine to some digits."""
    torch.set_default_dtype(torch.float64)
    try:
        trainer, batches = prepare(recipe)
        batches = in_float64(batches)
        losses = []
        for _ in range(steps):
            trainer.step(batches)
            losses.append(trainer.meter.read()["loss"])
        return losses
    finally:
        torch.set_default_dtype(torch.float32)
