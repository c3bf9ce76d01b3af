"""Which checkpoint a run continues from, and what may differ between a run and its resumption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from engine import checkpoint
from engine.errors import CheckpointError, FolderError, RecipeError
from engine.log import logger
from engine.recipe import Recipe, current_name, resolve
from loaders import STREAM_VERSION, Index

FREE = ("run.log_every", "run.save_every", "run.keep", "run.timeout_seconds", "run.folder", "data.workers")
"""Keys that may change without changing a number that the run computes."""
_COVERED = ("data.train", "data.val", "data.expect_images")  # the fingerprint speaks for them
_STREAM = "version of the stream"


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


def identity(recipe: Recipe, world_size: int, device: str, indices: dict[str, Index], stream: int) -> dict[str, Any]:
    """What has to be equal for a resumed run to give the same numbers: dotted key -> value."""
    flat = _keys_that_matter(recipe)
    flat["world_size"], flat["device"], flat[_STREAM] = world_size, device, stream
    for split, index in indices.items():
        flat[f"fingerprint of data.{split}"] = index.fingerprint
    return flat


def check_identity(state: dict[str, Any], path: Path, now: dict[str, Any], *, allow_changes: bool) -> None:
    """Compare a checkpoint's identity with today's; keys that its engine did not know yet have today's defaults.

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
    changed = [
        f"{key} was {then.get(key)}, is {now.get(key)}" for key in {**then, **now} if then.get(key) != now.get(key)
    ]
    if changed and not allow_changes:
        raise RecipeError(
            f"{path}: cannot be resumed exactly: {'; '.join(changed)}; restore these, or pass "
            f"--allow-changes to continue differently (free to change: {', '.join(FREE)})"
        )


def _keys_that_matter(recipe: Recipe) -> dict[str, Any]:
    flat = _flatten(yaml.safe_load(recipe.dump()))
    return {key: item for key, item in flat.items() if key not in (*FREE, *_COVERED)}


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
