"""What a recipe names and this machine does not have, before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from engine import checkpoint
from engine.data import roots_of
from engine.errors import CheckpointError
from engine.recipe import Recipe
from loaders.sources import is_there


class Problem(NamedTuple):
    """One thing that is missing."""

    key: str
    """Of the recipe, dotted."""
    text: str
    """What is missing and what to do."""

    def __str__(self) -> str:
        return f"{self.key}: {self.text}"


def missing(recipe: Recipe, *, resumes: bool = False) -> list[Problem]:
    """What the recipe names and this machine does not have.

    Args:
        resumes: a run that has a checkpoint no longer needs `init`.
    """
    problems = []
    data = recipe.data
    if lacks := data.options.missing():
        problems.append(Problem("data.backend", lacks))
    if data.options.reads_files:
        for key, root in roots_of(recipe).items():
            if root is None or not is_there(Path(root)):
                text = f"no folder or file {root}; expected images there, set {key}=/path/to/images"
                problems.append(Problem(key, text))
    has_checkpoint = resumes and checkpoint.latest(recipe.folder / "checkpoints")[0] is not None
    for number, init in enumerate(() if has_checkpoint else recipe.init):
        try:
            checkpoint.source(init)
        except CheckpointError as error:
            problems.append(Problem(f"init.{number}.from", str(error).removeprefix("init.from: ")))
    return problems
