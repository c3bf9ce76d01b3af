"""Checkpoints: one file with all that must survive, complete or absent.

A file is `step-<step>-<hash>.pt`, a plain `torch.save` of tensors and plain data whose name carries the first 16
hex digits of its SHA-256. It is written aside, flushed to the disk and renamed, so a name that exists is a file
that was complete; the hash reveals what a disk did to it later.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import io
import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

import torch
import yaml
from torch import Tensor, nn

from engine.errors import CheckpointError, NotFiniteState
from engine.log import logger
from engine.recipe import InitConfig, Recipe
from loaders.files import aside
from models import methods, weights
from models.contract import BackboneConfig
from models.methods import MethodConfig

FORMAT = 2
_KEYS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("method", "optimizer", "scaler", "meter", "monitors", "bad_images", "identity", "versions"), dict),
    **{"step": int, "total_steps": int, "seconds": (int, float), "recipe": str, "skipped": Tensor},
}
"""What every checkpoint of this format has; what came later may be missing."""
_NAME = re.compile(r"step-(\d{9})-([0-9a-f]{16})\.pt")


class _HashingFile(io.RawIOBase):
    """Passes writes on and hashes them, so that a large file is not read again."""

    def __init__(self, path: Path) -> None:
        self._file, self.digest = open(path, "wb"), hashlib.sha256()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self._file.write(data)

    def close(self) -> None:
        self._file.close()
        super().close()


def save(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write a checkpoint, then delete all but the newest `keep`.

    Raises:
        NotFiniteState: a tensor of the method is not finite; the last good checkpoint stays.
        CheckpointError: the disk refuses (full, no permission); nothing half-written is left behind.
    """
    broken = [name for name, value in state["method"].items() if not _is_finite(value)]
    if broken:
        raise NotFiniteState(
            f"{folder}: step {step} is not saved, not finite: {', '.join(broken[:5])}; the last good checkpoint stays"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with aside(folder / "step", durable=True) as out:  # one name for all: what a killed run left goes
            with _HashingFile(out.part) as file:
                torch.save({"format": FORMAT, "step": step, **state}, cast(IO[bytes], file))
            out.path = path = folder / f"step-{step:09d}-{file.digest.hexdigest()[:16]}.pt"
    except (OSError, RuntimeError) as error:  # torch.save turns some write errors into RuntimeError
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
        raise CheckpointError(f"{folder}: step {step} cannot be saved: {reason}") from error
    others = [old for old in _newest_first(folder) if old != path]
    damaged = [old for old in others if old.name.startswith(f"step-{step:09d}-")]  # the run has passed here before
    for old in [*damaged, *[old for old in others if old not in damaged][keep - 1 :]]:
        try:
            old.unlink()
        except OSError as error:
            logger.warning(f"{old}: cannot be deleted: {error.strerror}")
    return path


def latest(folder: Path) -> tuple[Path | None, list[Path]]:
    """The newest checkpoint whose content matches its hash, and the damaged ones that were skipped."""
    damaged: list[Path] = []
    for path in _newest_first(folder):
        if is_intact(path):
            return path, damaged
        damaged.append(path)
    return None, damaged


def is_intact(path: Path) -> bool:
    """Whether a checkpoint's content matches the hash in its name.

    Raises:
        CheckpointError: this user may not read it, or the machine does not let it be read.
    """
    match = _NAME.fullmatch(path.name)
    if not match:
        return False
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):  # a pipe or a device may have no end
            return False
        digest = _digest(path, found.st_ino, found.st_size, found.st_mtime_ns)
    except OSError as error:
        if error.errno in (errno.EIO, errno.ENOENT, errno.ELOOP):  # of this file: the one before may be whole
            return False
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    return digest.startswith(match[2])


@functools.lru_cache(maxsize=64)
def _digest(path: Path, *as_it_is: int) -> str:
    """SHA-256 of a file; of one that is as it was, once: a start asks several times."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint of this engine; no code of the file is run.

    Raises:
        CheckpointError: not one of ours, or of another format version.
    """
    try:
        state = weights.read_file(path)
    except weights.WeightsError as error:
        raise CheckpointError(str(error)) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise CheckpointError(f"{path}: not a checkpoint of format {FORMAT}, found {found}")
    if wrong := [key for key, kind in _KEYS.items() if not isinstance(state.get(key), kind)]:
        raise CheckpointError(
            f"{path}: incomplete or changed by hand, at {', '.join(wrong)}; remove it to go on from the one before"
        )
    return state


def is_named(path: Path) -> bool:
    """Whether a file has the name of a checkpoint, which `is_intact` can judge."""
    return bool(_NAME.fullmatch(path.name))


def complete(run: Path, step: int | None = None) -> Path:
    """The newest intact checkpoint of a run folder, or that of a step.

    Raises:
        CheckpointError: there is none.
    """
    folder = run / "checkpoints"
    if step is not None:
        steps = {int(path.name[5:14]): path for path in _newest_first(folder) if is_intact(path)}
        if step not in steps:
            found = ", ".join(map(str, sorted(steps))) or "none"
            raise CheckpointError(f"{run}: no complete checkpoint of step {step}, found {found}")
        return steps[step]
    newest, damaged = latest(folder)
    if newest is None:
        what = f"only damaged ones: {', '.join(map(str, damaged))}" if damaged else "none yet"
        raise CheckpointError(f"{run}: expected a complete checkpoint in it, found {what}")
    return newest


def source(init: InitConfig) -> Path:
    """The file that an `init` entry means: itself, or the newest checkpoint of a run folder.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(init.source)
    if os.path.isdir(path):
        try:
            return complete(path)
        except CheckpointError as error:
            raise CheckpointError(f"init.from: {error}") from None
    if not os.path.isfile(path):
        raise CheckpointError(f"init.from: {path}: no such file or run folder")
    return path


def initialize(module: nn.Module, config: MethodConfig, init: InitConfig) -> None:
    """Load parts of a source into a method's children, strictly; on the meta device only see whether they fit.

    Args:
        config: what the method was built from.

    Raises:
        CheckpointError: no such source, a part that either side does not have, or a network that is frozen here and was
            trained as another one.
        models.weights.WeightsError: keys or shapes that do not fit; all of them are listed.
    """
    path, content = _read(init)
    if isinstance(content, dict) and content.get("step", 0) < content.get("total_steps", 0):
        logger.warning(f"{path}: of an unfinished run, step {content['step']} of {content['total_steps']}")
    _take(module, config, init, content, path)
    for target, part in init.load.items():
        logger.info(f"{target} starts from {part} of {path}")


def parts_of(init: InitConfig) -> dict[str, weights.State]:
    """The parts of the source of an `init` entry.

    Raises:
        CheckpointError, models.weights.WeightsError: as `initialize`.
    """
    path, content = _read(init)
    return weights.split(content, path)


def _read(init: InitConfig) -> tuple[Path, Any]:
    path = source(init)
    if is_named(path) and not is_intact(path):
        raise CheckpointError(f"{path}: damaged, its content does not match the hash in its name")
    return path, weights.read_file(path)


def would_fit(module: nn.Module, config: MethodConfig, init: InitConfig, source: Recipe) -> None:
    """Whether the run of a recipe, which has not been made, will be a source for a method on the meta device.

    Raises:
        As `initialize`.
    """
    content = {"format": FORMAT, "method": methods.on_meta(source.method).state_dict(), "recipe": source.dump()}
    _take(module, config, init, content, Path(init.source))


def _take(module: nn.Module, config: MethodConfig, init: InitConfig, content: Any, path: Path) -> None:
    is_whole = set(init.load.values()) == {weights.WHOLE}
    parts = {weights.WHOLE: weights.whole(content, path)} if is_whole else weights.split(content, path)
    children = dict(module.named_children())
    unmatched = list(init.drop)
    for target, part in init.load.items():
        if target not in children:
            raise CheckpointError(
                f"init.load.{target}: the method has no such part, expected one of {', '.join(children)}"
            )
        if part not in parts:
            raise CheckpointError(f"{path}: has no part '{part}', expected one of {', '.join(parts)}")
        state, dropped = parts[part], [name for name in init.drop if weights.has(parts[part], name)]
        for name in dropped:
            if weights.has(children[target].state_dict(), name):
                raise CheckpointError(
                    f"{path}: init.drop: {target} has '{name}' here, expected a module that it has not"
                )
            state = {key: value for key, value in state.items() if not key.startswith(f"{name}.")}
        unmatched = [name for name in unmatched if name not in dropped]
        weights.load_part(children[target], state, part=part, path=path)
        is_frozen = not all(parameter.requires_grad for parameter in children[target].parameters())
        if is_frozen and target in config.networks:
            network, then = config.networks[target], trained_as(content, part)
            _must_be_trained_as(target, network, _without(then, network, dropped), part, path)
    if unmatched:
        raise CheckpointError(
            f"{path}: init.drop: no module '{unmatched[0]}' in {', '.join(init.load.values())}; drop names what the "
            "source has and the network here has not"
        )


def _without(keys: dict[str, Any], network: BackboneConfig, dropped: list[str]) -> dict[str, Any]:
    """The keys of a network without those that only put on top what is dropped."""
    return {key: value for key, value in keys.items() if network.on_top.get(key) not in dropped}


def trained_as(content: Any, part: str) -> dict[str, Any]:
    """The keys of the network that a part of a checkpoint was trained as; none where the file does not say."""
    recipe = yaml.safe_load(content["recipe"]) if isinstance(content, dict) and "recipe" in content else {}
    keys = recipe.get("method", {}).get(part)
    return keys if isinstance(keys, dict) else {}


def _must_be_trained_as(name: str, network: BackboneConfig, keys: dict[str, Any], part: str, path: Path) -> None:
    own = network.model_dump(mode="json")
    differs = [key for key in own if key in keys and own[key] != keys[key] and key not in network.only_in_training]
    if differs:
        then = ", ".join(f"{key}: {json.dumps(keys[key])}" for key in differs)
        now = ", ".join(f"{key}: {json.dumps(own[key])}" for key in differs)
        remedy = " ".join(f"method.{name}.{key}={json.dumps(keys[key])}" for key in differs)
        raise CheckpointError(
            f"{path}: its {part} was trained with {then}, and {name} is frozen here with {now}; set {remedy}"
        )


def _newest_first(folder: Path) -> Iterator[Path]:
    try:
        names = os.listdir(folder) if folder.is_dir() else []
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be listed: {error.strerror}") from None
    return (folder / name for name in sorted(filter(_NAME.fullmatch, names), reverse=True))


def _is_finite(value: Any) -> bool:
    return not isinstance(value, Tensor) or not value.is_floating_point() or bool(value.isfinite().all())
