"""A table of methods as data: which recipes make each row, and what has to run for one row and one seed."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from engine import recipe as recipes
from engine.recipe import EvalConfig, Recipe, RecipeError, explain
from models import methods


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Row(_Section):
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


class Table(_Section):
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
        for init in recipe.init:
            place = moved.get(str(Path(init.source)))
            needs_teacher |= place is not None and place == out / "teacher" / "teacher"
            sources.append({"from": str(place or init.source), "load": init.load})
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
                    f"init={json.dumps(sources)}",
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
    recipe = run.recipe()
    part = evaluated_part(recipe)
    network: Any = dict(recipe.method)[part]
    init = [{"from": str(recipe.folder), "load": {"backbone": part}}]
    below = table.layer == "pooled" and getattr(network, "pooled_mlp", False)
    return Run(
        _at(path, table.probe),
        [
            f"run.folder={folder}",
            "name=linear",
            f"seed={seed}",
            f"method.backbone={network.model_dump_json()}",
            f"init={json.dumps(init)}",
            *(["method.trains=pre-fc"] if below else []),
            *extra,
        ],
    )


def evaluated_part(recipe: Recipe) -> str:
    """The name of the part of a method that is evaluated, which is also its key in the recipe."""
    with torch.device("meta"):
        method = methods.load(recipe.method.name).Method(recipe.method)
    return next(name for name, part in method.named_children() if part is method.evaluated)
