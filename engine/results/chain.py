"""Recipes that run one after the other, each from what the last one learned, and a linear evaluation at the end."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from engine import checkpoint
from engine import recipe as recipes
from engine.errors import KNOWN, RecipeError, first_line
from engine.preflight import look
from engine.recipe import Recipe
from engine.results.runs import final, metrics
from engine.results.scores import Outcome
from models import methods


class Run(NamedTuple):
    """One run of a chain, as `tools/train.py` takes it."""

    path: Path
    overrides: list[str]

    def recipe(self) -> Recipe:
        """The resolved recipe."""
        return recipes.load(self.path, self.overrides)

    def is_done(self) -> bool:
        """Whether it has reached its end with exactly this recipe."""
        recipe = self.recipe()
        kept = recipe.folder / "recipe.yaml"
        if not kept.exists() or kept.read_text(encoding="utf-8") != recipe.dump():
            return False
        newest, _ = checkpoint.latest(recipe.folder / "checkpoints")
        if newest is None:
            return False
        state = checkpoint.load(newest)
        return state["step"] == state["total_steps"] and not state.get("due_evals")


class Chain(NamedTuple):
    """All runs of one row and seed, in order; the last one is the linear evaluation."""

    name: str
    seed: int
    runs: list[Run]
    needs_teacher: bool

    def run(self, start: Callable[[Run, Recipe, int], None]) -> Outcome:
        """Run what is not done yet.

        Args:
            start: called with each such run, its recipe and its number from 1; returns when it has ended.
        """
        for number, run in enumerate(self.runs, 1):
            if not run.is_done():
                start(run, run.recipe(), number)
        return self.outcome()

    def outcome(self) -> Outcome:
        """What the finished runs gave, from their own files."""
        *pretraining, probe = [run.recipe() for run in self.runs]
        last = [[row for row in metrics(recipe.folder) if "seconds" in row][-1] for recipe in pretraining]
        return Outcome(
            linear=final(probe.folder, "accuracy"),
            knn=final(pretraining[-1].folder, "knn"),
            images=sum(row["images"] for row in last),
            seconds=round(sum(row["seconds"] for row in last), 1),
            monitors={name: value for name, value in last[-1].items() if "/" in name},
            recipes=[recipe.hash for recipe in (*pretraining, probe)],
            baselines=_baselines(probe.folder),
        )


def check(chains: Iterable[Chain]) -> None:
    """See that every run of these chains would start, before the first does.

    Raises:
        RecipeError: names the row, the recipe and all that is missing or would be refused.
    """
    runs = [(chain, number, run, run.recipe()) for chain in chains for number, run in enumerate(chain.runs)]
    planned = {str(recipe.folder): recipe for *_, recipe in runs}
    for chain, number, run, recipe in runs:
        problems, said, _ = look(recipe, resumes=True)
        lacking = {problem.key: str(problem) for problem in problems}
        kind = {2: "knn", 1: "accuracy"}.get(len(chain.runs) - number)  # what `outcome` reads
        if kind and kind not in [evaluation.kind for evaluation in recipe.evals]:
            said.append(f"evals: expected one of kind {kind}, whose score is what is asked for")
        for place, init in enumerate(recipe.init):
            key, source = f"init.{place}.from", planned.get(init.source)
            if source is not None and key in lacking:
                del lacking[key]
                try:
                    checkpoint.would_fit(methods.on_meta(recipe.method), recipe.method, init, source)
                except KNOWN as error:
                    said.append(first_line(error))
        if wrong := [*lacking.values(), *said]:
            raise RecipeError(f"{chain.name}: {run.path}: {'; '.join(wrong)}")


def _baselines(folder: Path) -> dict[str, float]:
    found = [row for row in metrics(folder) if row.get("evaluation") == "baselines"]
    return {name: value for name, value in found[-1].items() if name.endswith(("_top1", "_knn"))} if found else {}


def probe_of(recipe: Recipe, probe: Recipe, *, layer: Literal["features", "pooled"]) -> list[str]:
    """Overrides that point a linear evaluation at the network that a run trains.

    Args:
        recipe: of the run.
        probe: of the linear evaluation.
        layer: what it looks at: the network's features, or the pooled map below them.
    """
    part = evaluated_part(recipe)
    method = probe.method.probing(recipe.method.networks[part], layer)
    load = dict.fromkeys(method.networks, part)
    return [f"method={method.model_dump_json()}", init_from((recipe.folder, load))]


def init_from(*sources: tuple[Any, ...]) -> str:
    """An `init` override: from these run folders or files, part of the method -> part of the source, and what of it to
    drop, if anything."""
    return "init=" + json.dumps([dict(zip(("from", "load", "drop"), (str(s), *more))) for s, *more in sources])  # noqa: B905


def evaluated_part(recipe: Recipe) -> str:
    """The name of the part of a method that is evaluated, which is also its key in the recipe."""
    method = methods.on_meta(recipe.method)
    return next(name for name, part in method.named_children() if part is method.evaluated)
