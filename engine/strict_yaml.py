"""YAML without surprises: plain scalars of YAML 1.2, no aliases, tags, duplicate keys; `base:` files and overrides."""

from __future__ import annotations

import re
import typing
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import yaml

from engine.errors import RecipeError

_MAX_BYTES = 1_000_000
_NO_TEXT = re.compile("[\\0\ud800-\udfff]")


class _StrictLoader(yaml.SafeLoader):
    """YAML 1.2's plain scalars: `3e-4` is a number, `on` and `010` are text. No aliases, tags or duplicate keys; no
    text that can be neither a name of a file nor UTF-8."""

    yaml_implicit_resolvers: typing.ClassVar[dict[str, Any]] = {}  # type: ignore[misc]  # its own, not the parent's

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            raise RecipeError(f"line {line}: aliases (*name) are not allowed")
        if getattr(event, "tag", None):
            raise RecipeError(f"line {line}: tags ({event.tag!r}) are not allowed")
        if isinstance(event, yaml.ScalarEvent) and _NO_TEXT.search(event.value):
            raise RecipeError(f"line {line}: {event.value!r} holds \\0 or half a surrogate pair, expected text")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if not isinstance(key, str):
                raise RecipeError(f"line {line}: key {key!r} is not a string")
            if key in seen:
                raise RecipeError(f"line {line}: duplicate key {key!r}")
            seen.add(key)
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in (
    ("null", r"null|~|", ["n", "~", ""]),
    ("bool", r"true|false", list("tf")),
    ("int", r"[-+]?(?:0|[1-9][0-9]{0,99})", list("-+0123456789")),  # Python reads no number of any length
    (
        "float",
        r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?",
        list("-+.0123456789"),
    ),
):
    _StrictLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), _first)


def parse(text: str) -> Any:
    """Plain data of a YAML text.

    Raises:
        RecipeError: it is none.
    """
    try:
        # Text goes in, so no byte order mark or other encoding is guessed; nothing but plain data comes out.
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        raise RecipeError(f"not valid YAML: {_yaml_reason(error)}") from None
    except RecursionError:
        raise RecipeError("nested too deeply") from None


def read(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A strict YAML file's content, merged over that of its `base`: one file, or a list of them, later ones winning.

    Raises:
        RecipeError: no such file, or anything wrong with its text.
    """
    if path.resolve() in seen:
        raise RecipeError(f"{path}: base: the recipe is its own base")
    try:
        with open(path, "rb") as file:
            text = file.read(_MAX_BYTES + 1)  # a device has no size
        if len(text) > _MAX_BYTES:
            raise RecipeError(f"{path}: larger than {_MAX_BYTES} bytes, this is not a recipe")
        content = parse(text.decode())
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such file; expected a recipe such as recipes/burn_stage1.yaml") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise RecipeError(f"{path}: is not UTF-8 text") from None
    except RecipeError as error:
        raise error if str(error).startswith(str(path)) else RecipeError(f"{path}: {error}") from None
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: expected sections such as method, data and run")
    bases = content.pop("base", [])
    bases = bases if isinstance(bases, list) else [bases]
    merged: dict[str, Any] = {}
    for base in bases:
        if not isinstance(base, str):
            raise RecipeError(f"{path}: base: expected the path of a recipe or a list of them, got {base!r}")
        merged = _merge(merged, read(path.parent / base, (*seen, path.resolve())))
    return _merge(merged, content)


def inherited(path: Path, location: Sequence[str | int], item: Any) -> Path | None:
    """The `base` file in which a value of the merged content stands; None if it stands in the file itself, or nowhere
    (it may come from an override)."""
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # not a file that can be read: a checkpoint's recipe
    if not isinstance(content, dict) or _at(content, location) is not _NOWHERE:
        return None
    bases = content.get("base", [])
    for base in reversed(bases if isinstance(bases, list) else [bases]):
        below = path.parent / str(base)
        if _at(read(below), location) == item:
            return inherited(below, location, item) or below
    return None


_NOWHERE = object()


def _at(content: Any, location: Sequence[str | int]) -> Any:
    for key in location:
        is_there = (
            key in content if isinstance(content, dict) else isinstance(content, list) and key in range(len(content))
        )
        if not is_there:
            return _NOWHERE
        content = content[key]
    return content


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


def override(content: dict[str, Any], change: str) -> None:
    """Change merged content in place by `section.key=value` with a YAML value; a number addresses an item of a list.

    Raises:
        RecipeError: it is not of that form, or leads nowhere.
    """
    path, equals, text = change.partition("=")
    if not equals or not path:
        raise RecipeError(f"override {change!r}: expected section.key=value")
    try:
        item = parse(text)
    except RecipeError as error:
        raise RecipeError(f"override {change!r:.200}: not a YAML value: {error}") from None
    *parents, last = path.split(".")
    place: Any = content
    for key in parents:
        if isinstance(place, list):
            place = place[_item(place, key, change)]
        else:
            if not isinstance(place.get(key), dict | list):
                place[key] = {}
            place = place[key]
    if isinstance(place, list):
        place[_item(place, last, change)] = item
    elif isinstance(place, dict):
        place[last] = item
    else:
        raise RecipeError(f"override {change!r}: {'.'.join(parents)} is not a section")


def _item(items: list[Any], key: str, change: str) -> int:
    if not items:
        raise RecipeError(f"override {change!r}: the list has no item {key!r}, it is empty; set the whole list")
    if not key.isdecimal() or int(key) >= len(items):
        raise RecipeError(f"override {change!r}: expected a number from 0 to {len(items) - 1}, got {key!r}")
    return int(key)
