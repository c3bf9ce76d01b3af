"""Which checkpoint a run continues from, and what may differ between a run and its resumption."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import yaml

from engine import checkpoint
from engine.errors import CheckpointError, FolderError, RecipeError
from engine.log import logger
from engine.recipe import Recipe, current_name, resolve
from engine.schedules import Horizon, value
from loaders import STREAM_VERSION, Index

FREE = ("run.log_every", "run.save_every", "run.keep", "run.timeout_seconds", "run.folder", "data.workers", "evals")
"""Keys that may change without changing a number of the training, with all below them."""
_COVERED = ("data.train", "data.val", "data.expect_images", "data.teacher_cache")  # a fingerprint speaks for them
_STREAM = "version of the stream"
_VAL = "fingerprint of data.val"
_BACKEND = ("data.backend", "data.options")  # another one gives the same crops, its pixels may differ by a level or two


def newest_checkpoint(recipe: Recipe, *, resume: bool) -> Path | None:
    """The newest intact checkpoint of a recipe's run folder, None where there is none.

    Raises:
        FolderError: there is a run, and `resume` does not ask for it.
        CheckpointError: all checkpoints are damaged.
    """
    folder = recipe.folder / "checkpoints"
    newest, damaged = checkpoint.latest(folder)
    if newest is None and not damaged:
        return None
    if not resume:
        raise FolderError(
            f"{recipe.folder}: already contains a run; pass --resume to continue it, or give this one another name "
            "(name=...) or folder (run.folder=...)"
        )
    for path in damaged:
        logger.warning(f"{path}: damaged (content does not match the hash in its name); skipped")
    if newest is None:
        raise CheckpointError(f"{folder}: every checkpoint is damaged; remove them to start over")
    return newest


def stream_version(state: dict[str, Any], path: Path) -> int:
    """The version of the stream that a checkpoint's run began with, and keeps.

    Raises:
        CheckpointError: a version that this engine does not know.
    """
    version: int = state["identity"].get(_STREAM, 1)  # the first did not say
    if version not in range(1, STREAM_VERSION + 1):
        raise CheckpointError(
            f"{path}: its images come in order {version} ({_STREAM}), this engine knows 1 to {STREAM_VERSION}; "
            "continue with the engine that wrote it"
        )
    return version


def identity(
    recipe: Recipe, world_size: int, device: str, indices: dict[str, Index], stream: int, cache: str = ""
) -> dict[str, Any]:
    """What has to be equal for a resumed run to give the same numbers: dotted key -> value.

    Args:
        cache: identity of `data.teacher_cache`, "" without one.
    """
    flat = _keys_that_matter(recipe)
    flat["world_size"], flat["device"], flat[_STREAM] = world_size, device, stream
    for split, index in indices.items():
        flat[f"fingerprint of data.{split}"] = index.fingerprint
    if cache:
        flat["fingerprint of data.teacher_cache"] = cache
    return flat


def check_identity(state: dict[str, Any], path: Path, now: dict[str, Any], *, allow_changes: bool) -> list[str]:
    """Compare a checkpoint's identity with today's; keys that its engine did not know yet have today's defaults.

    Returns:
        A line for each key that changes a number of the training.

    Raises:
        RecipeError: they differ, and `allow_changes` does not permit it; lists each key.
    """
    then = {current_name(key): item for key, item in state["identity"].items()}
    try:
        then = {**_keys_that_matter(resolve(yaml.safe_load(state["recipe"]), path)), **then}
    except RecipeError:
        pass  # it names something that is gone: the comparison below says what
    for key in ("device", _STREAM):  # older ones do not say
        then.setdefault(key, now[key])
    free = (
        *FREE,
        "fingerprint of data.evals",
        *(_BACKEND if then.get("data.backend") != now.get("data.backend") else ()),
    )
    if _VAL not in then or _VAL not in now:
        free = (*free, _VAL)  # there were no evaluations, or are none any more
    changed = [
        f"{key} was {then.get(key)}, is {now.get(key)}"
        for key in {**then, **now}
        if then.get(key) != now.get(key) and not _is_below(key, free)
    ]
    if changed and not allow_changes:
        raise RecipeError(
            f"{path}: cannot be resumed exactly: {'; '.join(changed)}; restore these, or pass "
            f"--allow-changes to continue differently (free to change: {', '.join((*FREE, 'data.backend'))})"
        )
    return changed


def recipe_of(state: dict[str, Any], path: Path) -> Recipe | None:
    """The recipe that made a checkpoint; None where it names something that is gone."""
    try:
        return resolve(yaml.safe_load(state["recipe"]), path)
    except RecipeError:
        return None


def free_changes(then: Recipe, now: Recipe) -> list[str]:
    """A line for each key that differs and may: what `check_identity` has let pass."""
    before, after = (_flatten(yaml.safe_load(recipe.dump())) for recipe in (then, now))
    free = (*FREE, *_COVERED, *(_BACKEND if before["data.backend"] != after["data.backend"] else ()))
    same, near = ", the same images by their fingerprint", ", pixels may differ by a level or two"
    because = {"data.train": same, "data.backend": near}
    return [
        f"{key} was {before.get(key)}, is {after.get(key)}{because.get(key, '')}"
        for key in {**before, **after}
        if before.get(key) != after.get(key)
        and _is_below(key, free)
        and ((key in before and key in after) or key.endswith(".kind"))  # one line for an evaluation that came or went
    ]


def horizon_of(state: dict[str, Any], num_images: int) -> Horizon:
    """The horizon that a checkpoint's steps count in; `num_images` is for older ones, which do not say."""
    if "horizon" in state:
        return Horizon(**state["horizon"])
    return Horizon(state["total_steps"], num_images, yaml.safe_load(state["recipe"])["data"]["batch_size"])


def jumps(then: Recipe, before: Horizon, step: int, now: Recipe, after: Horizon, steps_done: int) -> list[str]:
    """A line for each scheduled scalar that goes on with another value than it stopped with.

    Args:
        then, before, step: the recipe, horizon and step of the checkpoint.
        now, after, steps_done: those that it continues with.
    """
    said = []
    for name, schedule in now.schedules.items():
        if name in then.schedules:
            was, is_ = value(then.schedules[name], step, before), value(schedule, steps_done, after)
            if not math.isclose(was, is_, rel_tol=0.01):
                said.append(f"{name} jumps from {was:.4g} to {is_:.4g}")
    return said


def _is_below(key: str, places: tuple[str, ...]) -> bool:
    return any(key == place or key.startswith(f"{place}.") for place in places)


def _keys_that_matter(recipe: Recipe) -> dict[str, Any]:
    flat = _flatten(yaml.safe_load(recipe.dump()))
    return {key: item for key, item in flat.items() if not _is_below(key, (*FREE, *_COVERED))}


def _flatten(content: Any, prefix: str = "") -> dict[str, Any]:
    items = content.items() if isinstance(content, dict) else enumerate(content)
    flat: dict[str, Any] = {}
    for key, item in items:
        path = f"{prefix}{key}"
        if isinstance(item, dict | list) and item:
            flat.update(_flatten(item, f"{path}."))
        else:
            flat[path] = item
    return flat
