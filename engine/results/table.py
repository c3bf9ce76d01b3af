"""A table of methods as data: which recipes make each row, and what has to run for one row and one seed."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field, ValidationError, field_validator

from engine import recipe as recipes
from engine.recipe import EvalConfig, Recipe, RecipeError, Section, explain
from models import methods


class Row(Section):
    """One method of a table."""

    name: str = Field(min_length=1)
    stages: tuple[str, ...] = Field(min_length=1)
    """Recipes that run one after the other, as paths from the table's folder."""
    overrides: tuple[str, ...] = ()
    """Overrides of all of them."""
    paper: float | None = None
    """The paper's linear top-1 on ImageNet, to print beside ours."""
    ablation: bool = False
    """A variant of another row rather than a method of its own."""


class Table(Section):
    """A file of `recipes/tables/`."""

    title: str
    images: int = Field(ge=1)
    """Training images of each row, shared equally by its stages: the budget."""
    seeds: int = Field(ge=1)
    """How many, from 0."""
    teacher: str | None = None
    """A recipe that runs once, at its own length and seed; rows name its run folder in their `init`."""
    probe: str
    """The linear evaluation of every row."""
    layer: Literal["pooled", "features"] = "pooled"
    """What it looks at: the pooled map, which every network has and S2-BNN probes, or the network's features, which
    with `pooled_mlp` lie behind one more layer and its ReLU and are not comparable with those of a network without."""
    knn: EvalConfig = EvalConfig(kind="knn", every="100%")
    rows: tuple[Row, ...] = Field(min_length=1)

    @field_validator("rows")
    @classmethod
    def _different_names(cls, rows: tuple[Row, ...]) -> tuple[Row, ...]:
        slugs = [slug(row.name) for row in rows]
        for row in rows:
            if slugs.count(slug(row.name)) > 1:
                raise ValueError(f"two rows are named {row.name!r}")
        return rows


class Run(NamedTuple):
    """One run of a chain, as `tools/train.py` takes it."""

    path: Path
    overrides: list[str]

    def recipe(self) -> Recipe:
        """The resolved recipe."""
        return recipes.load(self.path, self.overrides)


class Chain(NamedTuple):
    """All runs of one row and seed, in order; the last one is the linear evaluation."""

    name: str
    seed: int
    runs: list[Run]
    needs_teacher: bool


def load(path: Path) -> Table:
    """Read and validate a table.

    Raises:
        RecipeError: anything wrong with the file, a key, a value, or a recipe that it names.
    """
    content = recipes.read(path)
    try:
        table = Table.model_validate_json(json.dumps(content))
    except ValidationError as error:
        raise RecipeError(f"{path}: {explain(error, Table, content)}") from error
    named = [("probe", table.probe), *([("teacher", table.teacher)] if table.teacher else [])]
    named += [(f"rows.{i}.stages.{j}", s) for i, row in enumerate(table.rows) for j, s in enumerate(row.stages)]
    for key, name in named:
        if not (path.parent / name).is_file():
            raise RecipeError(f"{path}: {key}: no recipe {path.parent / name}")
    return table


def slug(name: str) -> str:
    """A row's name as the name of a folder."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def teacher_chain(table: Table, path: Path, out: Path, extra: list[str]) -> Chain | None:
    """The teacher's run and its linear evaluation, if the table has one."""
    if table.teacher is None:
        return None
    place = [f"run.folder={out / 'teacher'}", "name=teacher", f"evals={_knn(table, '20%')}", *extra]
    run = Run(_at(path, table.teacher), place)
    return Chain("teacher", 0, [run, _probe(table, path, run, out / "teacher", 0, extra)], False)


def chain(table: Table, row: Row, seed: int, path: Path, out: Path, extra: list[str]) -> Chain:
    """The runs of one row and seed in folders under `out`.

    `init` entries that name the default run folder of the teacher or of an earlier stage are led to where that one
    runs here; all others stay.

    Args:
        path: the table's file.
        extra: overrides of every run, from the command line.
    """
    folder = out / slug(row.name) / f"seed{seed}"
    moved: dict[str, Path] = {}
    if table.teacher is not None:
        moved[str(recipes.load(_at(path, table.teacher)).folder)] = out / "teacher" / "teacher"
    runs: list[Run] = []
    needs_teacher = False
    for number, stage in enumerate(row.stages):
        recipe = recipes.load(_at(path, stage))
        name = f"stage{number + 1}"
        sources = []
        for entry in recipe.init:
            place = moved.get(str(Path(entry.source)))
            needs_teacher |= place is not None and place == out / "teacher" / "teacher"
            sources.append((place or entry.source, entry.load))
        steps = max(round(table.images / len(row.stages) / recipe.data.batch_size), 1)
        runs.append(
            Run(
                _at(path, stage),
                [
                    f"run.folder={folder}",
                    f"name={name}",
                    f"seed={seed}",
                    f"run.duration={steps}it",
                    f"evals={_knn(table, '100%')}",
                    init(*sources),
                    *row.overrides,
                    *extra,
                ],
            )
        )
        moved[str(recipe.folder)] = folder / name
    return Chain(row.name, seed, [*runs, _probe(table, path, runs[-1], folder, seed, extra)], needs_teacher)


def _at(path: Path, name: str) -> Path:
    return Path(os.path.normpath(path.parent / name))


def _knn(table: Table, every: str) -> str:
    return json.dumps([{**table.knn.model_dump(), "every": every}])


def _probe(table: Table, path: Path, run: Run, folder: Path, seed: int, extra: list[str]) -> Run:
    overrides = probe(run.recipe(), below_mlp=table.layer == "pooled")
    return Run(_at(path, table.probe), [f"run.folder={folder}", "name=linear", f"seed={seed}", *overrides, *extra])


def probe(recipe: Recipe, *, below_mlp: bool = False) -> list[str]:
    """Overrides that point a linear evaluation at the network of a run; `below_mlp` at its pooled map."""
    part = evaluated_part(recipe)
    network: Any = dict(recipe.method)[part]
    overrides = [f"method.backbone={network.model_dump_json()}", init((recipe.folder, {"backbone": part}))]
    if below_mlp and getattr(network, "pooled_mlp", False):
        overrides.append("method.trains=pre-fc")
    return overrides


def init(*sources: tuple[Path | str, dict[str, str]]) -> str:
    """An `init` override: from these run folders or files, part of the method -> part of the source."""
    return "init=" + json.dumps([{"from": str(source), "load": load} for source, load in sources])


def evaluated_part(recipe: Recipe) -> str:
    """The name of the part of a method that is evaluated, which is also its key in the recipe."""
    method = methods.on_meta(recipe.method)
    return next(name for name, part in method.named_children() if part is method.evaluated)
