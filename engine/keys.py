"""The reference of all keys of a recipe, from the sections themselves: types, bounds, defaults and what they say."""

from __future__ import annotations

import ast
import inspect
import json
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

import loaders
from engine.recipe import EvalConfig, InitConfig, OptimConfig, Recipe, RunConfig
from engine.schedules import Schedule
from models import methods
from models.contract import BackboneConfig

_PLAIN = {int: "whole number", float: "number", str: "text", bool: "true or false", type(None): "null"}
_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def page() -> str:
    """`docs/recipe_keys.md`."""
    parts = [
        "# Keys of a recipe",
        "Made by `python tools/train.py --keys`; a test holds it against the code. A key without a default must be "
        "given. Durations are epochs, steps or shares of the run: `200ep`, `1000it`, `5%`.",
    ]
    for title, model in _sections():
        parts += [f"## {title}", _text(inspect.getdoc(model)), _table(model)]
    return "\n\n".join(parts) + "\n"


def _sections() -> Iterator[tuple[str, type[BaseModel]]]:
    yield "The recipe", Recipe
    networks: dict[str, type[BaseModel]] = {}
    for name in methods.available():
        config = methods.load(name).Config
        yield f"method: {name}", config
        found = (model for field in config.model_fields.values() for model in _models(field.annotation))
        networks |= {model.__module__: model for model in found if issubclass(model, BackboneConfig)}
    for module in sorted(networks):
        yield f"A network: {module.rpartition('.')[2]}", networks[module]
    data = loaders.DataConfig
    yield "data", data
    yield "data.views, data.eval_view", next(_models(data.model_fields["eval_view"].annotation))
    for name in loaders.backends():
        yield f"data.options: {name}", loaders.load(name).Options
    yield "optim", OptimConfig
    yield "schedules", Schedule
    yield "run", RunConfig
    yield "evals", EvalConfig
    yield "init", InitConfig


def _table(model: type[BaseModel]) -> str:
    if not model.model_fields:
        return "No keys."
    rows = ["| key | value | default | |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        default = "" if field.default is PydanticUndefined else f"`{_json(field.default)}`"
        cells = (f"`{field.alias or name}`", _value(field), default, _docstring(model, name))
        rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |".replace("  |", " |"))
    return "\n".join(rows)


def _json(value: Any) -> str:
    return json.dumps(value.model_dump(mode="json") if isinstance(value, BaseModel) else value)


def _value(field: FieldInfo) -> str:
    if any("_check_duration" in str(item) for item in field.metadata):
        return "duration"
    bounds = [
        f"{word} {getattr(item, key)}" for item in field.metadata for key, word in _BOUNDS.items() if hasattr(item, key)
    ]
    return ", ".join([_type(field.annotation), *bounds])


def _type(annotation: Any) -> str:
    """A type in words."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{item}`" if isinstance(item, str) else str(item) for item in arguments)
    if origin is typing.Annotated:
        return "duration" if "_check_duration" in str(arguments) else _type(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(_type, arguments)))
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return f"list of {_type(arguments[0])}"
        return f"[{', '.join(map(_type, arguments))}]"
    if origin is dict:
        return f"name: {_type(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "a network" if issubclass(annotation, BackboneConfig) else "a section"
    return _PLAIN.get(annotation, "any")


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _models(argument)


def _docstring(model: type[BaseModel], name: str) -> str:
    """What stands below a key in the class that declares it."""
    owner = next(place for place in model.__mro__ if name in vars(place).get("__annotations__", {}))
    (node,) = ast.parse(inspect.cleandoc("\n" + inspect.getsource(owner))).body
    assert isinstance(node, ast.ClassDef)
    for before, after in zip(node.body, node.body[1:], strict=False):
        if isinstance(before, ast.AnnAssign) and isinstance(before.target, ast.Name) and before.target.id == name:
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                return _text(str(after.value.value))
    return ""


def _text(docstring: str | None) -> str:
    """A docstring on one line; of several paragraphs the first."""
    return " ".join((docstring or "").split("\n\n")[0].split())
