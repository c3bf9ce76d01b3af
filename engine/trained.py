"""Opens what was trained, for use: a run folder, one of its checkpoints, or a published weight file.

trained = open_trained("runs/linear_burn_stage2")
scores = trained.network(trained.image("cat.jpg"))      # [1, classes]; features where nothing classifies
print(trained.classes[scores.argmax()])
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

import loaders
from engine import checkpoint
from engine import recipe as recipes
from engine.errors import CheckpointError
from engine.log import logger
from engine.recipe import Recipe
from loaders import DataConfig, DataError
from loaders.augment import normalized
from loaders.host import read_picture
from loaders.views import View
from models import backbones, weights
from models.contract import Backbone

VALIDATION = View.model_validate({"preset": "validation"})
"""The evaluation view of a published file, which names none."""


@dataclass(frozen=True)
class Trained:
    """A trained network in evaluation mode, on the CPU, and how its images are prepared."""

    network: nn.Sequential
    """Images [B, 3, side, side], normalized, to class scores [B, classes]; to features [B, D] where nothing classifies
    them. Its children are `backbone` and, where there is one, `classifier`."""
    view: View
    """The evaluation view."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    """What images in [0, 1] are normalized with."""
    name: str
    """Of the recipe, or of the published file."""
    source: Path
    """The file that was read."""
    part: str
    """Of the method or file."""
    recipe: Recipe | None = None
    """None of a published file."""
    step: int | None = None
    """Of the checkpoint; None of a published file."""
    is_finished: bool = True
    """Whether the run had reached its end."""

    @property
    def backbone(self) -> Backbone:
        """Images to features."""
        return self.network.get_submodule("backbone")  # type: ignore[return-value]

    @property
    def classifier(self) -> nn.Module | None:
        """Features to class scores, if anything does."""
        return dict(self.network.named_children()).get("classifier")

    @functools.cached_property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes in the order of the scores: those of the run's images, or () where these are not on this
        machine, have no labels, or nothing classifies."""
        if self.recipe is None or self.classifier is None:
            return ()
        for split in ("val", "train"):
            try:
                names = loaders.open_data(self.recipe.data, split).classes
            except DataError:
                continue
            if len(names) == self.recipe.method.classes:
                return tuple(names)
        return ()

    def pixels(self, picture: Path | str) -> Tensor:
        """A picture as evaluations see it before it is normalized: uint8 [side, side, 3].

        Raises:
            DataError: it cannot be decoded.
            OSError: it cannot be read.
        """
        return read_picture(Path(picture), self.view)

    def image(self, picture: Path | str) -> Tensor:
        """A picture as the network takes it: float32 [1, 3, side, side].

        Raises:
            As `pixels`.
        """
        return normalized(self.pixels(picture)[None], self.mean, self.std)


def open_trained(path: Path | str, *, step: int | None = None, part: str | None = None) -> Trained:
    """Open what was trained.

    Args:
        path: a run folder, a checkpoint, or a published weight file in one of the layouts of `models/weights.py`. Such
            a file says neither whether weights are binary nor how large its images are: a ReActNet is taken for an
            all-binary one whose stem halves the image, images for ImageNet's.
        step: of a run folder, the step of the checkpoint; by default the newest that is intact.
        part: a network of the method or file, without a classifier; by default what its evaluations measure.

    Raises:
        CheckpointError: no such file or step, a damaged one, or no such part.
        RecipeError: the checkpoint's recipe names something that is gone.
        models.weights.WeightsError: a published file of an unknown layout or network.
    """
    path = Path(path)
    if path.is_dir():
        path = checkpoint.complete(path, step)
    elif step is not None:
        raise CheckpointError(f"{path}: a step can be chosen in a run folder only, expected one")
    elif checkpoint.is_named(path) and path.exists() and not checkpoint.is_intact(path):
        raise CheckpointError(f"{path}: damaged, its content does not match the hash in its name")
    if checkpoint.is_named(path):
        return _of_run(checkpoint.load(path), path, part)
    content = weights.read_file(path)
    if isinstance(content, Mapping) and {"format", "method", "recipe"} <= content.keys():  # under another name
        return _of_run(checkpoint.load(path), path, part)
    return _published(content, path, part)


def _of_run(state: dict[str, Any], path: Path, part: str | None) -> Trained:
    recipe = recipes.resolve(yaml.safe_load(state["recipe"]), path)
    with torch.random.fork_rng(devices=[]):  # what is drawn is replaced
        method = recipe.method.build()
    try:
        method.load_state_dict(state["method"])
    except RuntimeError as error:
        said = "; ".join(line.strip() for line in str(error).splitlines()[1:3])
        raise CheckpointError(f"{path}: is of another network than its recipe: {said}") from None
    found = {name: child for name, child in method.named_children() if isinstance(child, Backbone)}
    if part is None:
        try:
            backbone, classifier = method.deployed()
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from None
        part = next(name for name, child in found.items() if child is method.evaluated)
    elif part in found:
        backbone, classifier = found[part], None
    else:
        raise CheckpointError(f"{path}: has no network '{part}', expected one of {', '.join(found)}")
    if state["step"] < state["total_steps"]:
        logger.warning(f"{path}: of an unfinished run, step {state['step']} of {state['total_steps']}")
    return Trained(
        _ready(backbone, classifier),
        view=recipe.data.eval_view,
        mean=recipe.data.mean,
        std=recipe.data.std,
        name=recipe.name,
        source=path,
        part=part,
        recipe=recipe,
        step=state["step"],
        is_finished=state["step"] >= state["total_steps"],
    )


def _published(content: Any, path: Path, part: str | None) -> Trained:
    parts = weights.split(content, path)
    heads = {name: state for name, state in parts.items() if not backbones.is_backbone(state)}
    networks = [name for name in parts if name not in heads]
    chosen = part or networks[0]
    if chosen not in networks:
        raise CheckpointError(f"{path}: has no network '{part}', expected one of {', '.join(networks)}")
    try:
        config = backbones.recognized(parts[chosen])
    except ValueError as error:
        raise weights.WeightsError(f"{path}: part '{chosen}': {error}") from None
    with torch.random.fork_rng(devices=[]):
        backbone = config.build()
    weights.load_part(backbone, parts[chosen], part=chosen, path=path)
    classifier = None
    if part is None and "classifier" in heads:
        shape = heads["classifier"]["weight"].shape
        classifier = nn.Linear(shape[1], shape[0])
        weights.load_part(classifier, heads["classifier"], part="classifier", path=path)
    defaults = DataConfig.model_fields
    return Trained(
        _ready(backbone, classifier),
        view=VALIDATION,
        mean=defaults["mean"].default,
        std=defaults["std"].default,
        name=path.name,
        source=path,
        part=chosen,
    )


def _ready(backbone: nn.Module, classifier: nn.Module | None) -> nn.Sequential:
    """One network in evaluation mode, in which nothing trains."""
    parts = (
        OrderedDict(backbone=backbone) if classifier is None else OrderedDict(backbone=backbone, classifier=classifier)
    )
    return nn.Sequential(parts).eval().requires_grad_(False)
