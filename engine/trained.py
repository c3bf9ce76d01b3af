"""Opens what was trained, for use: a run folder, one of its checkpoints, a published weight file, or a packed network.

trained = open_trained("runs/linear_burn_stage2")
scores = trained.network(trained.image("cat.jpg"))      # [1, classes]; features where nothing classifies
print(trained.classes[scores.argmax()])
"""

from __future__ import annotations

import copy
import functools
import hashlib
import itertools
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from pydantic import ValidationError
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
from models.imported import not_imported
from models.statistics import reestimate
from runtime import BnnError, Runtime, bnn, native

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
    names: tuple[str, ...] = ()
    """Of the classes, where the file has them: a packed network's does."""

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
            return self.names
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
        path: a run folder, a checkpoint, a packed network of tools/export.py, or a published weight file in one of the
            layouts of `models/weights.py`. Such a file says neither whether weights are binary nor how large its images
            are: a ReActNet is taken for an all-binary one whose stem halves the image, images for ImageNet's.
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
    if _is_packed(path):
        return _packed(path, part)
    if checkpoint.is_named(path):
        return _of_run(checkpoint.load(path), path, part)
    content = weights.read_file(path)
    if isinstance(content, Mapping) and {"format", "method", "recipe"} <= content.keys():  # under another name
        return _of_run(checkpoint.load(path), path, part)
    return _published(content, path, part)


def readable(data: DataConfig) -> DataConfig:
    """How a run reads its images, with another back end where its own is not installed."""
    return loaders.with_backend(data, "folder") if data.options.missing() else data


def reestimated(trained: Trained, batches: int) -> Trained:
    """The same network with BatchNorm's statistics of this many micro-batches of its run's training images and views.

    Raises:
        CheckpointError: a published file, which names no images.
        DataError: the images are not on this machine.
    """
    if trained.recipe is None:
        raise CheckpointError(f"{trained.source}: names no training images, from which BatchNorm could be re-estimated")
    data = readable(trained.recipe.data)
    loader = loaders.open_train(data, loaders.open_data(data, "train"), seed=trained.recipe.seed)
    network = copy.deepcopy(trained.network)
    try:
        reestimate(network, (batch.views[0] for batch in itertools.islice(loader, batches)))
    finally:
        loader.close()
    return replace(trained, network=network)


def _of_run(state: dict[str, Any], path: Path, part: str | None) -> Trained:
    recipe = recipes.resolve(yaml.safe_load(state["recipe"]), path)
    with torch.random.fork_rng(devices=[]), not_imported():  # what is drawn is replaced; a file's word runs no code
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


# ------------------------------------------------------------------------------------------------ packed networks


class Packed(Backbone):
    """A packed network up to its features, which the runtime computes, on the CPU."""

    layers = ("features",)
    config = None

    def __init__(self, path: Path, content: bytes, network: bnn.Network) -> None:
        """
        Args:
            path: a file, with its `content` and the `network` in it.

        Raises:
            BnnError: it is none, or cannot be run here.
        """
        super().__init__()
        self.runtime = Runtime(path, threads=min(torch.get_num_threads(), native.MAX_THREADS))
        self.out_channels, self._side = self.runtime.info["features"], network.side
        self.register_buffer("content", torch.frombuffer(bytearray(content), dtype=torch.uint8))

    def check_side(self, side: int) -> None:
        """It takes images of one side."""
        if side != self._side:
            raise ValueError(f"image side {side} does not fit, the network is packed for {self._side}")

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, 3, side, side], normalized as the file says, to features [B, D]."""
        images = np.ascontiguousarray(x.cpu().numpy(), dtype=np.float32)
        return torch.from_numpy(self.runtime.features(images)).to(x.device)


def _is_packed(path: Path) -> bool:
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(len(bnn.MAGIC)) == bnn.MAGIC


def _packed(path: Path, part: str | None) -> Trained:
    if part is not None:
        raise CheckpointError(f"{path}: has no network '{part}', a packed one has no parts")
    try:
        content = path.read_bytes()
        network = bnn.read(content)
        backbone = Packed(path, content, network)
    except BnnError as error:
        raise CheckpointError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None
    info = network.metadata
    crop = "whole" if info.get("whole") else "center"
    try:
        view = View.model_validate(
            {"crop": crop, "size": network.side, "resize": info["resize"], "interpolation": info["interpolation"]}
        )
        mean, std = (_three(info[key]) for key in ("mean", "std"))
    except (KeyError, TypeError, ValueError) as error:
        what = "a view" if isinstance(error, ValidationError) else f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path}: does not say how images are cut and normalized ({what})") from None
    classifier = None
    if network.feature_layers < len(network.layers):
        classifier = _linear(network.layers[-1])
    names, step = info.get("classes"), info.get("step")
    is_named = isinstance(names, list) and len(names) == network.outputs and all(isinstance(n, str) for n in names)
    return Trained(
        _ready(backbone, classifier),
        view=view,
        mean=mean,
        std=std,
        name=str(info.get("name", path.name)),
        source=path,
        part=str(info.get("part", "")),
        step=step if isinstance(step, int) else None,
        names=tuple(names) if is_named and classifier is not None else (),  # type: ignore[arg-type]
    )


def _three(numbers: Any) -> tuple[float, float, float]:
    one, two, three = map(float, numbers)
    return one, two, three


def _linear(layer: bnn.Layer) -> nn.Linear:
    """A packed linear layer with its numbers as float32."""
    weight = layer.blobs["weight"].astype(np.float32)
    if "scale" in layer.blobs:
        weight *= layer.blobs["scale"][:, None]
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    linear.weight.data, linear.bias.data = (torch.from_numpy(a.copy()) for a in (weight, layer.blobs["bias"]))
    return linear


def hash_of(network: nn.Module) -> str:
    """Of all that decides what a network answers in evaluation mode, 16 hex digits: the keys of its backbones but for
    those that say how they learn, and names, types and numbers of its tensors."""
    digest = hashlib.sha256()
    for name, part in network.named_modules():
        if isinstance(part, Backbone) and part.config is not None:
            keys = part.config.model_dump_json(exclude=set(part.config.only_in_training))
            digest.update(f"{name} {keys}\n".encode())
    for name, value in network.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _ready(backbone: nn.Module, classifier: nn.Module | None) -> nn.Sequential:
    """One network in evaluation mode, in which nothing trains."""
    parts = (
        OrderedDict(backbone=backbone) if classifier is None else OrderedDict(backbone=backbone, classifier=classifier)
    )
    return nn.Sequential(parts).eval().requires_grad_(False)
