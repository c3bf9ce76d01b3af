"""A recipe: strict YAML, `base:`, `a.b=c` overrides, validated before anything is touched, never changed after.

The sections of methods and loader back ends are declared beside their code (`Config`, `Options`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import yaml
from pydantic import Field, ValidationError, create_model, field_validator, model_validator

import loaders
from engine import dist, precision, strict_yaml
from engine.errors import RecipeError
from engine.explain import explain, suggest
from engine.log import logger
from engine.schedules import PositiveDuration, Schedule
from loaders.config import PathText
from models import methods
from models.contract import Strict

RENAMED = {"evals.*.neighbours": "neighbors", "tasks.*.measure.neighbours": "neighbors"}
"""Keys of older recipes -> what they are called now, `*` for any one name; such recipes still load."""


Momentum = Annotated[float, Field(ge=0, lt=1)]


class OptimConfig(Strict):
    """The optimizer; its learning rate and weight decay are in `schedules`."""

    name: Literal["adam", "adamw", "sgd", "lars", "larc"]
    """`lars` (You et al. 2017) and `larc` (NVIDIA's, as SwAV uses it): SGD with a rate for each tensor, in the
    momentum buffer or after it (`engine/optim.py`)."""
    betas: tuple[Momentum, Momentum] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    momentum: Momentum = 0.9
    nesterov: bool = False
    decay: Literal["all", "weights"] = "all"
    """What weight decay, and the rate for each tensor of lars and larc, apply to: every parameter, or only those
    with more than one axis of length above 1 (so neither biases, nor BatchNorm, PReLU slopes and learned shifts)."""
    trust: float = Field(default=1e-3, gt=0)
    """lars, larc: a tensor's step at lr 1, as a share of its own norm."""
    lr_scale: dict[str, Annotated[float, Field(gt=0)]] = Field(default={})
    """Part of the method -> factor on its learning rate, 1 where a part is not named."""

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> OptimConfig:
        if self.nesterov and (self.name != "sgd" or self.momentum == 0):
            raise ValueError("nesterov: true needs name: sgd and a momentum above 0")
        return self


class RunConfig(Strict):
    """Length and machinery of a run."""

    duration: PositiveDuration
    device: Literal["auto", "cpu", "cuda"] = "auto"
    amp: Literal["off", "bf16", "fp16"] = "off"
    """In a recipe also `auto`: fp16 on a GPU, as the paper; on a CPU bf16 where it computes in it, else off."""
    channels_last: bool = True
    compile: bool = False
    compile_options: dict[str, bool | int | float | str] = Field(default={})
    """Settings of `torch._inductor.config` for the compiled backbones, such as {combo_kernels: true}."""
    kernels: Literal["torch", "fused"] = "torch"
    """`fused`: half-blocks of the binary network in one pass each (`models/halfblock.py`), by Triton on a GPU. Not the
    default until it has been measured on one."""
    optimize_ddp: bool = True
    """Several ranks, compiled: cut the student's graph where its gradients are reduced, so that the first are on their
    way while others are computed; false keeps one graph and reduces at its end."""
    deterministic: bool = False
    """The same bits in every run on one kind of GPU, at the price of slower kernels; a CPU needs no such key."""
    log_every: PositiveDuration = "50it"
    save_every: PositiveDuration = "10ep"
    keep: int = Field(default=2, ge=1)
    """Checkpoints kept; older ones are deleted after a newer one is complete."""
    max_skipped_steps: int = Field(default=20, ge=0)
    """fp16: steps in a row whose gradients may overflow before the run stops."""
    timeout_seconds: int = Field(default=1800, ge=1, le=2**31 // 1000)
    """How long a rank waits for the others in a collective before it gives up."""
    folder: PathText = "runs"
    """The run's own folder is `<folder>/<name>`."""

    @model_validator(mode="after")
    def _options_of_the_compiler(self) -> RunConfig:
        if self.compile_options and not self.compile:
            raise ValueError("compile_options: expected compile: true with it")
        if self.compile_options:
            import torch._inductor  # takes a second

            for name in set(self.compile_options) - set(torch._inductor.list_options()):
                raise ValueError(
                    f"compile_options.{name}: not a setting of torch._inductor.config in PyTorch {torch.__version__}"
                )
        return self

    @field_validator("duration")
    @classmethod
    def _not_relative(cls, duration: str) -> str:
        if duration.endswith("%"):
            raise ValueError(f"expected epochs or steps such as 200ep or 1000it, got {duration!r}")
        return duration


class EvalConfig(Strict):
    """An evaluation during the run; its numbers are labeled online."""

    kind: Literal["knn", "ridge", "accuracy", "baselines", "signs", "detection"]
    """`knn`, `ridge`: what a classifier would see, by its nearest neighbors or by a linear classifier in closed form
    (`engine/ridge.py`). `baselines`: what a logistic regression makes of raw pixels, of the same network at random and
    of the network, and k-NN of raw pixels. `signs`: how many binary weights have another sign than in the network that
    `init` loaded; it needs no images. `detection`: average precision of boxes by PASCAL VOC's rules."""
    every: PositiveDuration = "10%"
    at_start: bool = False
    """Also before the first step: what was learned is what comes on top."""
    neighbors: int = Field(default=20, ge=1)
    temperature: float = Field(default=0.07, gt=0)
    bank: int = Field(default=50_000, ge=1)
    """k-NN, ridge, baselines: at most this many training images, evenly spaced over the index."""
    center: bool = False
    """k-NN: subtract the mean of the training features first, which all cosines have in common otherwise."""
    pixels: bool = False
    """k-NN, ridge: of raw pixels in place of features, what any network has to beat."""
    train: PathText | None = None
    """Labeled images that it learns from, in any form that `data.train` has; by default `data.train` itself."""
    val: PathText | None = None
    """Labeled images that it measures on; by default `data.val`."""
    split: Literal["val", "held_out"] = "val"
    """`held_out`: it measures on the training images that `data.hold_out` keeps from training, to choose by."""

    average_precision: Literal["eleven", "envelope"] = "eleven"
    """Detection: of 11 points, as on VOC 2007, or the area under the monotone curve, as from VOC 2010 on."""
    precise_bn: int = Field(default=0, ge=0)
    """BatchNorm has the mean statistics of this many training micro-batches while it is evaluated; 0 leaves it the
    running ones of training."""

    @property
    def needs_images(self) -> bool:
        """Whether it measures on images."""
        return self.kind != "signs"

    @property
    def needs_train(self) -> bool:
        """Whether it learns from labeled images of its own, besides those that it measures on."""
        return self.kind in ("knn", "ridge", "baselines")

    @model_validator(mode="after")
    def _of_features(self) -> EvalConfig:
        for key, kinds in (("center", ("knn",)), ("pixels", ("knn", "ridge"))):
            if getattr(self, key) and self.kind not in kinds:
                raise ValueError(f"{key}: expected with kind: {' or '.join(kinds)} only, got kind: {self.kind}")
        return self

    @model_validator(mode="after")
    def _on_one_set(self) -> EvalConfig:
        if self.split == "held_out" and (self.val is not None or not self.needs_images):
            raise ValueError(
                "split: held_out measures on training images, expected neither val nor kind: signs with it"
            )
        return self

    @model_validator(mode="after")
    def _runs_the_network(self) -> EvalConfig:
        if self.precise_bn and not self.needs_images:
            raise ValueError(f"precise_bn: expected with a kind that runs the network, got kind: {self.kind}")
        return self


class InitConfig(Strict):
    """Weights to start from: a run folder, one of its checkpoints, or a foreign file (`models/weights.py`)."""

    source: PathText = Field(alias="from")
    load: dict[str, str] = Field(min_length=1)
    """Part of this method -> part of the source; a list of names loads each under its own."""
    drop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Modules of the loaded parts that the networks here do not have, such as `fc`: left out. One that the source does
    not have, or that a network here has, is refused."""

    @field_validator("load", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        return {name: name for name in value} if isinstance(value, list) else value


class Recipe(Strict):
    """A whole run as data. `method` and `data.options` are typed by the method and back end they name."""

    name: str
    seed: int = Field(default=0, ge=0, lt=2**31)
    method: methods.MethodConfig
    data: loaders.DataConfig
    optim: OptimConfig
    schedules: dict[str, Schedule]
    run: RunConfig
    evals: tuple[EvalConfig, ...] = ()
    init: tuple[InitConfig, ...] = ()

    @field_validator("name")
    @classmethod
    def _plain_name(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
            raise ValueError(f"expected letters, digits, '.', '_' and '-', got {name!r}")
        return name

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.run.folder) / self.name

    def chooses(self, evaluation: EvalConfig) -> bool:
        """Whether an evaluation first chooses one of the method's classifiers on held-out images."""
        return evaluation.kind == "accuracy" and bool(self.method.choices)

    def dump(self) -> str:
        """The resolved recipe as YAML that `load` reads back to an equal recipe."""
        content = self.model_dump(mode="json", by_alias=True, serialize_as_any=True)
        return yaml.safe_dump(content, sort_keys=False, width=110)

    @property
    def hash(self) -> str:
        """Of the resolved recipe."""
        return hashlib.sha256(self.dump().encode()).hexdigest()[:16]


def load(path: Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read, merge, override and validate a recipe.

    Args:
        path: a YAML file; `name` defaults to its stem.
        overrides: `section.key=value` with a YAML value; a number addresses an item of a list.

    Raises:
        RecipeError: anything wrong with the file, a key or a value.
    """
    content = strict_yaml.read(path)
    for change in overrides:
        strict_yaml.override(content, change)
    content.setdefault("name", path.stem.encode(errors="replace").decode())
    return resolve(content, path)


def resolve(content: dict[str, Any], path: Path) -> Recipe:
    """Validate the merged content of a recipe; `path` is for messages.

    What it leaves to the machine (`data.backend: auto`, `run.amp: auto`) is decided here, so that the recipe that is
    stored, hashed and compared on resume says what was run.
    """
    content = with_current_names(content, path)
    for section in ("data", "run"):
        content.setdefault(section, {})
    if isinstance(content["data"], dict):
        content["data"].setdefault("options", {})
        content["data"].setdefault("backend", loaders.AUTO)
        _decide(content["data"], content["run"] if isinstance(content["run"], dict) else {})
    config = _named(content, "method", "name", methods.available(), methods.load, path).Config
    # Typed by hand: the section classes of this recipe's method and back end are known only now.
    make: Any = create_model
    data_model = _data_model(content, path)
    model: type[Recipe] = make("Recipe", __base__=Recipe, method=(config, ...), data=(data_model, ...))
    try:
        recipe = model.model_validate_json(json.dumps(content))
    except ValidationError as error:
        raise RecipeError(f"{path}: {explain(error, model, content, partial(_origin, path, content))}") from error
    if problems := _cross_check(recipe):
        said = [f"{key}: {text}{_origin(path, content, key.split('.'))}" for key, text in problems.items()]
        raise RecipeError(f"{path}: {'; '.join(said)}")
    return recipe


def _data_model(content: dict[str, Any], path: Path) -> type[loaders.DataConfig]:
    make: Any = create_model
    options = _named(content, "data", "backend", loaders.backends(), loaders.load, path).Options
    model: type[loaders.DataConfig] = make("DataConfig", __base__=loaders.DataConfig, options=(options, ...))
    return model


def resolve_data(data: dict[str, Any], path: Path, *, device: str = "auto") -> loaders.DataConfig:
    """Validate a `data` section without a run around it.

    Args:
        data: its content; where it names no back end, it gets the best one here that reads all that it names.
        path: for messages.
        device: as `run.device`.

    Raises:
        RecipeError: anything wrong with a key or value.
    """
    roots = [Path(data[name]) for name in ("val", "train") if isinstance(data.get(name), str)]
    content = {"data": {"options": {}, "backend": loaders.AUTO, **data}}
    for root in (*roots, None) if content["data"]["backend"] == loaders.AUTO else ():
        chosen: dict[str, Any] = {"backend": loaders.AUTO, "train": root if root is None else str(root)}
        _decide(chosen, {"device": device})
        content["data"]["backend"] = chosen["backend"]
        if not any(loaders.load(chosen["backend"]).Options.refuses(root) for root in roots):
            break
    make: Any = create_model
    model = make("Reading", __base__=Strict, data=(_data_model(content, path), ...))
    try:
        found: loaders.DataConfig = model.model_validate_json(json.dumps(content)).data
    except ValidationError as error:
        raise RecipeError(f"{path}: {explain(error, model, content)}") from None
    return found


def _origin(path: Path, content: Any, keys: Sequence[str | int]) -> str:
    """Where a key stands, if it is inherited."""
    item, location = content, []
    for key in keys:
        place: Any = int(key) if isinstance(item, list) and str(key).isdecimal() else key
        try:
            item = item[place]
        except (KeyError, IndexError, TypeError):
            return ""
        location.append(place)
    base = strict_yaml.inherited(path, location, item)
    return f" (inherited from {base})" if base else ""


def _decide(data: dict[str, Any], run: dict[str, Any]) -> None:
    """Put what this machine does best in place of `auto`."""
    on_gpu = run.get("device", "auto") != "cpu" and torch.cuda.is_available()
    if data["backend"] == loaders.AUTO:
        train = data.get("train")
        data["backend"] = loaders.choose(on_gpu, Path(train) if isinstance(train, str) else None)
    if run.get("amp") == "auto":
        run["amp"] = precision.choose(on_gpu)


def current_name(key: str) -> str:
    """What a dotted key is called now."""
    parts = key.split(".")
    for old, new in RENAMED.items():
        pattern = old.split(".")
        if len(pattern) == len(parts) and all(p in ("*", part) for p, part in zip(pattern, parts, strict=True)):
            return ".".join((*parts[:-1], new))
    return key


def with_current_names(content: Any, path: Path, prefix: str = "") -> Any:
    """A copy of the merged content of a recipe or a table in which no key has an old name."""
    if isinstance(content, list):
        return [with_current_names(item, path, f"{prefix}{number}.") for number, item in enumerate(content)]
    if not isinstance(content, dict):
        return content
    renamed = {}
    for key, item in content.items():
        now = current_name(prefix + key)
        if now != prefix + key:
            if dist.environment_rank() == 0:
                logger.warning(f"{path}: {prefix}{key} is called {now} now")
        renamed[now.removeprefix(prefix)] = with_current_names(item, path, f"{prefix}{key}.")
    return renamed


def _named(content: dict[str, Any], section: str, key: str, known: list[str], load: Any, path: Path) -> Any:
    part = content.get(section)
    if not isinstance(part, dict) or key not in part:
        raise RecipeError(f"{path}: {section}.{key}: missing, expected one of {', '.join(known)}")
    try:
        return load(part[key])
    except KeyError:
        where = _origin(path, content, [section, key])
        raise RecipeError(
            f"{path}: {section}.{key}: unknown value {part[key]!r}, expected one of {', '.join(known)}{where}"
        ) from None


def _cross_check(recipe: Recipe) -> dict[str, str]:
    """What no section can know alone: key -> what is wrong with it."""
    wrong: dict[str, str] = {}
    method, schedules = recipe.method, recipe.schedules
    views, wants = len(recipe.data.views), method.num_views
    if views < wants or (views > wants and not method.takes_more_views):
        least = "at least " if method.takes_more_views else ""
        wrong["data.views"] = f"expected {least}{wants} for method {method.name}, got {views}"
    wanted, optional = {"lr", *method.schedules}, {"weight_decay"}
    for name in sorted(set(schedules) - wanted - optional):
        wrong[f"schedules.{name}"] = f"unknown key, {suggest(name, wanted | optional)}"
    for name in sorted(wanted - set(schedules)):
        wrong[f"schedules.{name}"] = f"missing, method {method.name} needs it"
    for number, evaluation in enumerate(recipe.evals):
        if evaluation.needs_images and (evaluation.kind == "detection") != method.takes_boxes:
            learns, expected = ("boxes", "detection") if method.takes_boxes else ("no boxes", "knn or accuracy")
            wrong[f"evals.{number}.kind"] = f"method {method.name} learns {learns}, expected {expected}"
        elif evaluation.kind == "accuracy" and method.classes is None:
            wrong[f"evals.{number}.kind"] = f"method {method.name} has no classifier to measure, expected knn"
        if evaluation.split == "held_out" and recipe.data.hold_out is None:
            wrong[f"evals.{number}.split"] = "no images are held out, expected data.hold_out beside it"
        if recipe.chooses(evaluation) and recipe.data.hold_out is None:
            wrong["data.hold_out"] = (
                f"expected a share such as 0.1, to choose one of {len(method.choices)} classifiers by"
            )
    if recipe.data.options.gives_boxes != method.takes_boxes:
        fits = "with boxes" if method.takes_boxes else "with a class for each image"
        wrong["data.backend"] = f"{recipe.data.backend} does not fit method {method.name}, expected a back end {fits}"
    for key, (refused, why) in method.refuses.items():
        if getattr(recipe.run, key) == refused:
            wrong[f"run.{key}"] = f"method {method.name} cannot have {json.dumps(refused)}: {why}"
    for name in method.schedules:  # λ, momenta: each weighs one thing against another
        if name in schedules and max(schedules[name].start, schedules[name].end) > 1:
            wrong[f"schedules.{name}"] = "expected values from 0 to 1"
    if recipe.data.teacher_cache is not None:
        try:
            method.cacheable  # noqa: B018
        except ValueError as error:
            wrong["data.teacher_cache"] = str(error)
    sizes = [(f"data.views.{i}.size", view.size) for i, view in enumerate(recipe.data.views)]
    sizes.append(("data.eval_view.size", recipe.data.eval_view.size))
    for name, network in method.networks.items():
        try:
            network.check_normalization(recipe.data.mean, recipe.data.std)
        except ValueError as error:
            wrong[f"method.{name}"] = str(error)
        for key, size in sizes:
            try:
                network.check_side(size)
            except ValueError as error:
                wrong[key] = str(error)
    return wrong


def micro_steps(recipe: Recipe, world_size: int) -> int:
    """Accumulation steps on `world_size` ranks.

    Raises:
        RecipeError: the batch cannot be divided that way.
    """
    batch, micro = recipe.data.batch_size, recipe.data.micro_batch
    if batch % (micro * world_size):
        legal = [m for m in range(1, batch + 1) if batch % (m * world_size) == 0]
        mend = (
            f"set data.micro_batch to {max((m for m in legal if m <= micro), default=legal[0])}"
            if legal
            else (f"set data.batch_size to a multiple of {world_size}")
        )
        raise RecipeError(
            f"data.micro_batch: {micro} images x {world_size} ranks do not divide data.batch_size {batch}; {mend}"
        )
    return batch // (micro * world_size)
