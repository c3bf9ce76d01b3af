"""What is wrong with a section, on one line: where, what was expected, what was given."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Callable, Iterable
from typing import Any

from pydantic import BaseModel, ValidationError


def explain(
    error: ValidationError,
    model: type[BaseModel],
    content: dict[str, Any],
    origin: Callable[[list[str | int]], str] = lambda location: "",
) -> str:
    """All problems on one line: misspelled keys first, which may be the cause of the others.

    Args:
        model, content: what was validated, and against what.
        origin: adds to a location where it stands, if that is not where the reader looks.
    """
    said: dict[str, str] = {}
    meant: set[str] = set()
    problems = error.errors(include_url=False)
    for problem in sorted(problems, key=lambda problem: not _is_misspelled(problem, model)):
        location = _location(problem["loc"], content)
        key = ".".join(map(str, location))
        if problem["type"] == "extra_forbidden":
            known = _fields(model, problem["loc"][:-1])
            text = f"unknown key, {suggest(str(location[-1]), known)}"
            meant |= {".".join(map(str, (*location[:-1], close))) for close in _close(str(location[-1]), known)}
        elif problem["type"] == "missing":
            if key in meant:
                continue  # that is the misspelled one
            text = "missing"
        else:
            reason = problem["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
            given = problem["input"]
            shown = "" if isinstance(given, dict | list) or "got" in reason else f", got {given!r:.200}"
            text = reason[0].lower() + reason[1:] + shown
        said.setdefault(key, f"{key}: {text}{origin(location)}" if key else text)  # of all keys together
    return "; ".join(said.values())


def _is_misspelled(problem: Any, model: type[BaseModel]) -> bool:
    if problem["type"] != "extra_forbidden":
        return False
    return bool(_close(str(problem["loc"][-1]), _fields(model, problem["loc"][:-1])))


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


def _close(name: str, known: Iterable[str]) -> list[str]:
    return difflib.get_close_matches(name, list(known), n=1)


def suggest(name: str, known: Iterable[str]) -> str:
    """The known name that was probably meant, or all of them."""
    close = _close(name, known)
    return f"did you mean '{close[0]}'?" if close else f"expected one of {', '.join(sorted(known))}"
