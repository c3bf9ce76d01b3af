"""A recipe: strict YAML, one `base:`, `a.b=c` overrides, validated before anything is touched, never changed after.

The sections of methods and loader back ends are declared beside their code (`Config`, `Options`).
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import typing
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, field_validator, model_validator

import loaders
from engine.schedules import PositiveDuration, Schedule
from models import methods
from models.reactnet import Config as ReActNetConfig
from models.reactnet import check_side

_MAX_BYTES = 1_000_000


class RecipeError(ValueError):
    """A recipe that cannot be run; one line with the file, the key and what was expected."""


class Section(BaseModel):
    """A part of a recipe or table: unknown keys refused, no silent type conversion, never changed."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_by_name=False)


Momentum = Annotated[float, Field(ge=0, lt=1)]


class OptimConfig(Section):
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
    lr_scale: dict[str, Annotated[float, Field(gt=0)]] = {}
    """Part of the method -> factor on its learning rate, 1 where a part is not named."""

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> OptimConfig:
        if self.nesterov and (self.name != "sgd" or self.momentum == 0):
            raise ValueError("nesterov: true needs name: sgd and a momentum above 0")
        return self


class RunConfig(Section):
    """Length and machinery of a run."""

    duration: PositiveDuration
    device: Literal["auto", "cpu", "cuda"] = "auto"
    amp: Literal["off", "bf16", "fp16"] = "off"
    channels_last: bool = True
    compile: bool = False
    compile_options: dict[str, bool | int | float | str] = {}
    """Settings of `torch._inductor.config` for the compiled backbones, such as {combo_kernels: true}."""
    kernels: Literal["torch", "fused"] = "torch"
    """`fused`: half-blocks of the binary network in one pass each (`models/halfblock.py`), by Triton on a GPU. Not the
    default before it was measured on one."""
    log_every: PositiveDuration = "50it"
    save_every: PositiveDuration = "10ep"
    keep: int = Field(default=2, ge=1)
    """Checkpoints kept; older ones are deleted after a newer one is complete."""
    max_skipped_steps: int = Field(default=20, ge=0)
    """fp16: steps in a row whose gradients may overflow before the run stops."""
    timeout_seconds: int = Field(default=1800, ge=1)
    """How long a rank waits for the others in a collective before it gives up."""
    folder: str = "runs"
    """The run's own folder is `<folder>/<name>`."""

    @model_validator(mode="after")
    def _options_of_the_compiler(self) -> RunConfig:
        if self.compile_options and not self.compile:
            raise ValueError("compile_options: expected compile: true beside it")
        if self.compile_options:
            import torch._inductor  # takes a second

            for name in set(self.compile_options) - set(torch._inductor.list_options()):
                raise ValueError(
                    f"compile_options.{name}: no setting of torch._inductor.config of PyTorch {torch.__version__}"
                )
        return self

    @field_validator("duration")
    @classmethod
    def _not_relative(cls, duration: str) -> str:
        if duration.endswith("%"):
            raise ValueError(f"expected epochs or steps such as 200ep or 1000it, got {duration!r}")
        return duration


class EvalConfig(Section):
    """An evaluation during the run; its numbers are labelled online."""

    kind: Literal["knn", "accuracy"]
    every: PositiveDuration = "10%"
    neighbours: int = Field(default=20, ge=1)
    temperature: float = Field(default=0.07, gt=0)
    bank: int = Field(default=50_000, ge=1)
    """k-NN: at most this many training images, evenly spaced over the index."""


class InitConfig(Section):
    """Weights to start from: a run folder, one of its checkpoints, or a foreign file (`models/weights.py`)."""

    source: str = Field(alias="from")
    load: dict[str, str] = Field(min_length=1)
    """Part of this method -> part of the source; a list of names loads each under its own."""

    @field_validator("load", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        return {name: name for name in value} if isinstance(value, list) else value


class Recipe(Section):
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
        overrides: `section.key=value` with a YAML value; a number addresses a place in a list.

    Raises:
        RecipeError: anything wrong with the file, a key or a value.
    """
    content = read(path)
    for override in overrides:
        _override(content, override)
    content.setdefault("name", path.stem)
    return resolve(content, path)


def resolve(content: dict[str, Any], path: Path) -> Recipe:
    """Validate the merged content of a recipe; `path` is for messages."""
    content.setdefault("data", {})
    if isinstance(content["data"], dict):
        content["data"].setdefault("options", {})
    config = _named(content, "method", "name", methods.available(), methods.load, path).Config
    options = _named(content, "data", "backend", loaders.backends(), loaders.load, path).Options
    # Typed by hand: the section classes of this recipe's method and back end are known only now.
    make: Any = create_model
    data = make("DataConfig", __base__=loaders.DataConfig, options=(options, ...))
    model: type[Recipe] = make("Recipe", __base__=Recipe, method=(config, ...), data=(data, ...))
    try:
        recipe = model.model_validate_json(json.dumps(content))
    except ValidationError as error:
        raise RecipeError(f"{path}: {explain(error, model, content)}") from error
    _cross_check(recipe, path)
    return recipe


def _named(content: dict[str, Any], section: str, key: str, known: list[str], load: Any, path: Path) -> Any:
    part = content.get(section)
    if not isinstance(part, dict) or key not in part:
        raise RecipeError(f"{path}: {section}.{key}: missing, expected one of {', '.join(known)}")
    try:
        return load(part[key])
    except KeyError:
        raise RecipeError(
            f"{path}: {section}.{key}: unknown value {part[key]!r}, expected one of {', '.join(known)}"
        ) from None


def _cross_check(recipe: Recipe, path: Path) -> None:
    """What no section can know alone."""
    method = methods.load(recipe.method.name).Method
    views, wants = len(recipe.data.views), recipe.method.num_views
    if views < wants or (views > wants and not recipe.method.takes_more_views):
        least = "at least " if recipe.method.takes_more_views else ""
        raise RecipeError(f"{path}: data.views: expected {least}{wants} for method {recipe.method.name}, got {views}")
    wanted, optional = {"lr", *recipe.method.schedules}, {"weight_decay"}
    for name in wanted - set(recipe.schedules):
        raise RecipeError(f"{path}: schedules.{name}: missing, method {recipe.method.name} needs it")
    for name in set(recipe.schedules) - wanted - optional:
        raise RecipeError(f"{path}: schedules.{name}: unknown key, {_suggest(name, wanted | optional)}")
    for number, evaluation in enumerate(recipe.evals):
        if evaluation.kind == "accuracy" and not method.classifies:
            raise RecipeError(
                f"{path}: evals.{number}.kind: method {recipe.method.name} has no classifier to measure, expected knn"
            )
    for name in recipe.method.schedules:  # λ, momenta: each weighs one thing against another
        schedule = recipe.schedules[name]
        if max(schedule.start, schedule.end) > 1:
            raise RecipeError(f"{path}: schedules.{name}: expected values from 0 to 1")
    sizes = [(f"data.views.{i}.size", view.size) for i, view in enumerate(recipe.data.views)]
    sizes.append(("data.eval_view.size", recipe.data.eval_view.size))
    for network in dict(recipe.method).values():
        if isinstance(network, ReActNetConfig):
            for key, size in sizes:
                try:
                    check_side(size, network.stem_stride)
                except ValueError as error:
                    raise RecipeError(f"{path}: {key}: {error}") from None


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


# ------------------------------------------------------------------------------------------------ YAML


class _StrictLoader(yaml.SafeLoader):
    """YAML 1.2's plain scalars: `3e-4` is a number, `on` and `010` are text. No aliases, no duplicate keys."""

    yaml_implicit_resolvers: typing.ClassVar[dict[str, Any]] = {}  # type: ignore[misc]  # its own, not the parent's

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise RecipeError(f"line {self.peek_event().start_mark.line + 1}: aliases (*name) are not allowed")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if not isinstance(key, str):
                raise RecipeError(f"line {line}: key {key!r} is not a word")
            if key in seen:
                raise RecipeError(f"line {line}: duplicate key {key!r}")
            seen.add(key)
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in (
    ("null", r"null|~|", ["n", "~", ""]),
    ("bool", r"true|false", list("tf")),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?",
        list("-+.0123456789"),
    ),
):
    _StrictLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), _first)


def _parse(text: str) -> Any:
    # Text goes in, so no byte order mark or other encoding is guessed; nothing but plain data comes out.
    return yaml.load(text, Loader=_StrictLoader)


def read(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A strict YAML file's content, merged over that of its `base`.

    Raises:
        RecipeError: no such file, or anything wrong with its text.
    """
    if path.resolve() in seen:
        raise RecipeError(f"{path}: base: the recipe is its own base")
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise RecipeError(f"{path}: larger than {_MAX_BYTES} bytes, this is no recipe")
        content = _parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such file; expected a recipe such as recipes/burn_stage1.yaml") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise RecipeError(f"{path}: is not UTF-8 text") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not valid YAML: {_yaml_reason(error)}") from None
    except RecursionError:
        raise RecipeError(f"{path}: nested too deeply") from None
    except RecipeError as error:
        raise error if str(error).startswith(str(path)) else RecipeError(f"{path}: {error}") from None
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: expected sections such as method, data and run")
    base = content.pop("base", None)
    if base is None:
        return content
    if not isinstance(base, str):
        raise RecipeError(f"{path}: base: expected the path of a recipe, got {base!r}")
    return _merge(read(path.parent / base, (*seen, path.resolve())), content)


def _yaml_reason(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    reason = getattr(error, "problem", None) or str(error).splitlines()[0]
    return f"line {mark.line + 1}: {reason}" if mark else reason


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Sections merge key by key; lists and scalars are replaced."""
    merged = dict(base)
    for key, item in over.items():
        both = isinstance(item, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], item) if both else item
    return merged


def _override(content: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise RecipeError(f"override {override!r}: expected section.key=value")
    try:
        item = _parse(text)
    except (yaml.YAMLError, RecipeError) as error:
        raise RecipeError(f"override {override!r}: not a YAML value") from error
    *parents, last = path.split(".")
    place: Any = content
    for key in parents:
        if isinstance(place, list):
            place = place[_list_place(place, key, override)]
        else:
            if not isinstance(place.get(key), dict | list):
                place[key] = {}
            place = place[key]
    if isinstance(place, list):
        place[_list_place(place, last, override)] = item
    elif isinstance(place, dict):
        place[last] = item
    else:
        raise RecipeError(f"override {override!r}: {'.'.join(parents)} is not a section")


def _list_place(items: list[Any], key: str, override: str) -> int:
    if not key.isdigit() or int(key) >= len(items):
        raise RecipeError(f"override {override!r}: expected a place from 0 to {len(items) - 1}, got {key!r}")
    return int(key)


# ------------------------------------------------------------------------------------------------ messages


def explain(error: ValidationError, model: type[BaseModel], content: dict[str, Any]) -> str:
    """The first problem in one line, and how many more there are."""
    problems = error.errors(include_url=False)
    problem = problems[0]
    location = _location(problem["loc"], content)
    key = ".".join(map(str, location))
    if problem["type"] == "extra_forbidden":
        text = f"unknown key, {_suggest(str(location[-1]), _fields(model, problem['loc'][:-1]))}"
    elif problem["type"] == "missing":
        text = "missing"
    else:
        reason = problem["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
        given = problem["input"]
        shown = "" if isinstance(given, dict | list) or "got" in reason else f", got {given!r}"
        text = reason[0].lower() + reason[1:] + shown
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{key}: {text}{more}"


def _location(loc: tuple[str | int, ...], content: Any) -> list[str | int]:
    """The keys of a location, without the tags that pydantic adds for unions."""
    keys: list[str | int] = []
    place = content
    for number, key in enumerate(loc):
        if isinstance(place, dict) and key in place:
            place = place[key]
        elif isinstance(place, list) and isinstance(key, int) and key < len(place):
            place = place[key]
        elif number < len(loc) - 1:
            continue
        keys.append(key)
    return keys


def _fields(model: type[BaseModel], loc: tuple[str | int, ...]) -> set[str]:
    """Names of the keys that are allowed at a location."""
    places = {model}
    for key in loc:
        inner = {
            found
            for place in places
            for name, field in place.model_fields.items()
            if key in (name, field.alias)
            for found in _models_in(field.annotation)
        }
        tagged = {place for place in places if key in _tags(place)}
        places = inner or tagged or places
    return {field.alias or name for place in places for name, field in place.model_fields.items()}


def _models_in(annotation: Any) -> set[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {annotation}
    return {found for argument in typing.get_args(annotation) for found in _models_in(argument)}


def _tags(model: type[BaseModel]) -> set[Any]:
    return {item for field in model.model_fields.values() for item in typing.get_args(field.annotation)}


def _suggest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean '{close[0]}'?" if close else f"expected one of {', '.join(sorted(known))}"
