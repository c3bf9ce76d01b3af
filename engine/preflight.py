"""What a recipe names and this machine does not have, before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from engine import checkpoint
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
        for split in ("train", *(["val"] if recipe.evals else [])):
            root = getattr(data, split)
            if root is None or not is_there(Path(root)):
                text = f"no folder {root}; expected one folder of images per class, set data.{split}=/path/to/{split}"
                problems.append(Problem(f"data.{split}", text))
    has_checkpoint = resumes and checkpoint.latest(recipe.folder / "checkpoints")[0] is not None
    for number, init in enumerate(() if has_checkpoint else recipe.init):
        try:
            checkpoint.source(init)
        except CheckpointError as error:
            problems.append(Problem(f"init.{number}.from", str(error).removeprefix("init.from: ")))
    return problems
