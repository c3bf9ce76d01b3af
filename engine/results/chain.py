"""Recipes that run one after the other, each from what the last one learned, and what is measured of the result."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from engine import checkpoint
from engine import recipe as recipes
from engine.errors import KNOWN, CheckpointError, RecipeError, first_line
from engine.preflight import look
from engine.recipe import Recipe
from engine.results.runs import metrics
from models import backbones, methods, weights
from models.contract import BackboneConfig
from models.methods import MethodConfig


class Run(NamedTuple):
    """One run of a chain, as `tools/train.py` takes it."""

    path: Path
    overrides: list[str]
    tasks: tuple[str, ...] = ()
    """Names of the tasks that it answers; none of one that trains the network."""
    cell: int | None = None
    """Of a grid, which point it tries; None of a run whose scores are results."""

    def recipe(self) -> Recipe:
        """The resolved recipe."""
        return _resolved(self.path, tuple(self.overrides))[0]

    def is_done(self) -> bool:
        """Whether it has reached its end with exactly this recipe."""
        recipe, text = _resolved(self.path, tuple(self.overrides))
        kept = recipe.folder / "recipe.yaml"
        if not kept.exists() or kept.read_text(encoding="utf-8") != text:
            return False
        newest, _ = checkpoint.latest(recipe.folder / "checkpoints")
        return newest is not None and _is_last(newest)


@functools.lru_cache(maxsize=8192)
def _resolved(path: Path, overrides: tuple[str, ...]) -> tuple[Recipe, str]:
    """A recipe, and as text. Chains ask again and again; a file that is changed meanwhile counts at the next start."""
    recipe = recipes.load(path, overrides)
    return recipe, recipe.dump()


@functools.lru_cache(maxsize=8192)
def _is_last(path: Path) -> bool:
    """Whether a checkpoint, whose name has its hash, is the end of its run."""
    state = checkpoint.load(path)
    return bool(state["step"] == state["total_steps"] and not state.get("due_evals"))


class Chain(NamedTuple):
    """All runs of one row and seed, in order."""

    name: str
    seed: int | str
    """A number; of the runs that choose a rate `rates`."""
    make: Callable[[], Iterator[Run]]
    """The runs. Each has ended when the next is asked for, which may depend on its scores; where it has not been run, a
    choice is the first cell of its grid."""
    needs: tuple[tuple[str, int | str], ...] = ()
    """(name, seed) of the chains that must have ended before."""

    @property
    def key(self) -> tuple[str, int | str]:
        """What tells it from others."""
        return self.name, self.seed

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.name}, {self.seed if isinstance(self.seed, str) else f'seed {self.seed}'}"

    def run(self, start: Callable[[Run, Recipe, int], None]) -> None:
        """Run what is not done yet.

        Args:
            start: called with each such run, its recipe and its number from 1; returns when it has ended.
        """
        for number, run in enumerate(self.make(), 1):
            if not run.is_done():
                start(run, run.recipe(), number)

    def is_done(self) -> bool:
        """Whether all of its runs are."""
        return all(run.is_done() for run in self.make())


def check(chains: Iterable[Chain], wanted: Callable[[Run], Iterable[str]] = lambda _: ()) -> None:
    """See that every run of these chains would start, before the first does; of a grid, that of its first cell, and
    that the others are recipes.

    Args:
        wanted: run -> kinds of evaluations whose scores are read from it.

    Raises:
        RecipeError: names the row, the recipe and all that is missing or would be refused.
    """
    runs = [(chain, run, run.recipe()) for chain in chains for run in chain.make()]
    planned = {str(recipe.folder): recipe for *_, recipe in runs}
    for chain, run, recipe in runs:
        if run.cell:
            continue
        problems, said, _ = look(recipe, resumes=True)
        lacking = {problem.key: str(problem) for problem in problems}
        kinds = [evaluation.kind for evaluation in recipe.evals]
        said += [
            f"evals: expected one of kind {kind}, whose score is what is asked for"
            for kind in wanted(run)
            if kind not in kinds
        ]
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


def forwards(recipe: Recipe) -> int:
    """Views of one image that the network which is evaluated runs in training: what an image costs of a budget."""
    return len(recipe.data.views[: _of_method(type(recipe.method), recipe.method.model_dump_json())[1]])


def baselines(folder: Path) -> dict[str, float]:
    """What the last evaluation `baselines` of a run found."""
    found = [row for row in metrics(folder) if row.get("evaluation") == "baselines"]
    return {name: value for name, value in found[-1].items() if name.endswith(("_top1", "_knn"))} if found else {}


class Network(NamedTuple):
    """A trained network, or one that will be."""

    source: Path | str | None
    """Run folder or file; None of one that needs no weights of its own."""
    part: str
    config: BackboneConfig


def network_of(recipe: Recipe) -> Network:
    """The network that a run trains and evaluates."""
    part = evaluated_part(recipe)
    return Network(recipe.folder, part, recipe.method.networks[part])


def network_at(path: Path, part: str | None) -> Network:
    """The network in a run folder, a checkpoint or a weight file.

    Args:
        part: by default what the run evaluates, or the file's first network.

    Raises:
        CheckpointError: there is no such file or part.
        models.weights.WeightsError: a file of an unknown layout or network.
    """
    file = checkpoint.complete(path) if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(f"{path}: no such file or run folder")
    if checkpoint.is_named(file):
        recipe = recipes.resolve(yaml.safe_load(checkpoint.load(file)["recipe"]), file)
        known = recipe.method.networks
        chosen = part or evaluated_part(recipe)
    else:
        parts = {
            name: state
            for name, state in weights.split(weights.read_file(file), file).items()
            if backbones.is_backbone(state)
        }
        chosen = part or next(iter(parts), "")
        try:
            known = {name: backbones.recognized(state) for name, state in parts.items()}
        except ValueError as error:
            raise weights.WeightsError(f"{file}: {error}") from None
    if chosen not in known:
        raise CheckpointError(f"{file}: has no network '{chosen}', expected one of {', '.join(known)}")
    return Network(path, chosen, known[chosen])


def probe_of(network: Network, probe: Recipe, *, layer: Literal["features", "pooled"]) -> list[str]:
    """Overrides that point an evaluation which trains at a network.

    Args:
        probe: of the evaluation: a linear one, or a fine-tuning.
        layer: what it looks at: the network's features, or the pooled map below them.
    """
    method = probe.method.probing(network.config, layer)
    sources = []
    if network.source is not None:
        dropped = ["fc"] if network.config.has_fc and not all(own.has_fc for own in method.networks.values()) else []
        sources = [(network.source, dict.fromkeys(method.networks, network.part), *([dropped] if dropped else []))]
    return [f"method={method.model_dump_json()}", init_from(*sources)]


def init_from(*sources: tuple[Any, ...]) -> str:
    """An `init` override: from these run folders or files, part of the method -> part of the source, and what of it to
    drop, if anything."""
    return "init=" + json.dumps([dict(zip(("from", "load", "drop"), (str(s), *more))) for s, *more in sources])  # noqa: B905


def evaluated_part(recipe: Recipe) -> str:
    """The name of the part of a method that is evaluated, which is also its key in the recipe."""
    return _of_method(type(recipe.method), recipe.method.model_dump_json())[0]


@functools.lru_cache(maxsize=1024)
def _of_method(config: type[MethodConfig], keys: str) -> tuple[str, int | None]:
    """The part of a method that is evaluated, and the views that it runs; building it is what takes time."""
    method = methods.on_meta(config.model_validate_json(keys))
    part = next(name for name, part in method.named_children() if part is method.evaluated)
    return part, method.views_per_backbone
