"""What a recipe names and this machine does not have, and what else a start would refuse, before anything starts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from engine import checkpoint, optim, teacher_cache
from engine.data import open_here, roots_of
from engine.errors import KNOWN, CheckpointError, first_line
from engine.folder import unwritable
from engine.recipe import Recipe
from engine.resume import check_identity, identity, newest_checkpoint, stream_version
from loaders import Index
from loaders.machine import missing_compiler
from loaders.sources import is_there
from models import methods

T = TypeVar("T")


class Problem(NamedTuple):
    """One thing that is missing."""

    key: str
    """Of the recipe, dotted."""
    text: str
    """What is missing and what to do."""

    def __str__(self) -> str:
        return f"{self.key}: {self.text}"


def missing(recipe: Recipe, *, resumes: bool = False) -> list[Problem]:
    """What the recipe names and this machine does not have or cannot use. A start asks this first, before any rank
    waits for another.

    Args:
        resumes: a run that has a checkpoint no longer needs `init`.
    """
    problems = []
    data, run = recipe.data, recipe.run
    if lacks := data.options.missing():
        problems.append(Problem("data.backend", lacks))
    if data.options.reads_files:
        for key, root in roots_of(recipe).items():
            if not root or not is_there(Path(root)):
                text = f"no folder or file {root or None}; expected images there, set {key}=/path/to/images"
                problems.append(Problem(key, text))
            elif not lacks and (why := data.options.refuses(Path(root))):
                problems.append(Problem(key, why))
    if data.teacher_cache is not None and not Path(data.teacher_cache).is_dir():
        text = f"no folder {data.teacher_cache}; make it with tools/cache_teacher.py, or set data.teacher_cache=null"
        problems.append(Problem("data.teacher_cache", text))
    if why := unwritable(recipe):
        problems.append(Problem("run.folder", why))
    for name, network in recipe.method.networks.items():
        if why := network.missing():
            problems.append(Problem(f"method.{name}", why))
    on_gpu = run.device != "cpu" and torch.cuda.is_available()
    compiled = {"run.compile": (run.compile, "false"), "run.kernels": (on_gpu and run.kernels == "fused", "torch")}
    for key, (is_compiled, instead) in compiled.items():
        if is_compiled and (why := missing_compiler(on_gpu)):
            problems.append(Problem(key, f"{why}, or {key}={instead}"))
    has_checkpoint = resumes and checkpoint.latest(recipe.folder / "checkpoints")[0] is not None
    for number, init in enumerate(() if has_checkpoint else recipe.init):
        try:
            checkpoint.source(init)
        except CheckpointError as error:
            problems.append(Problem(f"init.{number}.from", str(error).removeprefix("init.from: ")))
    return problems


class Findings(NamedTuple):
    """What stands in the way of a start."""

    missing: list[Problem]
    refused: list[str]
    """What a start would refuse, in its own words, besides what is missing."""
    indices: dict[str, Index] | None
    """The data sets, as `open_here` gives them; None where one is missing or refused."""


def look(recipe: Recipe, *, resumes: bool = False, allow_changes: bool = False) -> Findings:
    """Try all that a start tries; nothing is written but the cache of indexes, and no device touched.

    Args:
        resumes, allow_changes: as for the start.
    """
    problems = missing(recipe, resumes=resumes)
    lacks = {problem.key for problem in problems}
    said: list[str] = []

    def ask(question: Callable[[], T]) -> T | None:
        try:
            return question()
        except KNOWN as error:
            said.append(first_line(error))
            return None

    method = methods.on_meta(recipe.method)
    has_data = lacks.isdisjoint({"data.backend", *roots_of(recipe)})
    indices = ask(lambda: open_here(recipe)) if has_data else None
    ask(lambda: optim.build(recipe.optim, method))
    if recipe.data.teacher_cache and indices is not None and "data.teacher_cache" not in lacks:
        ask(lambda: teacher_cache.check(recipe, method, indices["train"]))  # all but the weights
    newest = ask(lambda: newest_checkpoint(recipe, resume=resumes))
    if newest is None:
        for number, init in enumerate(recipe.init):
            if lacks.isdisjoint({f"init.{number}.from", *(f"method.{part}" for part in init.load)}):
                ask(lambda init=init: checkpoint.initialize(method, recipe.method, init))  # type: ignore[misc]
    elif indices is not None:
        ask(lambda: _check_resume(recipe, newest, indices, allow_changes))
    return Findings(problems, said, indices)


def _check_resume(recipe: Recipe, path: Path, indices: dict[str, Index], allow_changes: bool) -> None:
    state = checkpoint.load(path)
    then = state["identity"]  # ranks and device are the start's to know
    places = then["world_size"], then.get("device", "cpu")
    now = identity(recipe, *places, indices, stream_version(state, path), teacher_cache.identity(recipe))
    check_identity(state, path, now, allow_changes=allow_changes)
