"""A table of methods as data: which recipes make each row, and what has to run for one row and one seed."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, field_validator

from engine import recipe as recipes
from engine import strict_yaml
from engine.errors import RecipeError
from engine.explain import explain
from engine.recipe import EvalConfig
from engine.results.chain import Chain, Run, init_from, probe_of
from models.contract import Strict


class Row(Strict):
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


class Table(Strict):
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
    with `pooled_mlp` come after one more layer and its ReLU and are not comparable with those of a network without."""
    knn: EvalConfig = EvalConfig(kind="knn", every="100%")
    rows: tuple[Row, ...] = Field(min_length=1)

    @field_validator("rows")
    @classmethod
    def _different_names(cls, rows: tuple[Row, ...]) -> tuple[Row, ...]:
        slugs = [slug(row.name) for row in rows]
        for row in rows:
            if slug(row.name) in ("", "teacher"):
                raise ValueError(f"a row needs a name with letters a-z or digits, other than teacher; got {row.name!r}")
            if slugs.count(slug(row.name)) > 1:
                raise ValueError(f"two rows are named {row.name!r}")
        return rows


_OWN = ("name", "seed", "run.folder")
"""What tells the runs of a table apart."""


def load(path: Path) -> Table:
    """Read and validate a table.

    Raises:
        RecipeError: anything wrong with the file, a key, a value, or a recipe that it names.
    """
    content = recipes.with_current_names(strict_yaml.read(path), path)
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

    `init` entries that name the default run folder of the teacher or of an earlier stage are pointed to where that one
    runs here; all others stay.

    Args:
        path: the table's file.
        extra: overrides of every run, from the command line.
    """
    for change in (*row.overrides, *extra):
        if change.partition("=")[0] in _OWN:
            raise RecipeError(f"{path}: {row.name}: override {change!r}: every run has its own; use --out or --seeds")
    folder = out / slug(row.name) / f"seed{seed}"
    teacher = out / "teacher" / "teacher"
    moved: dict[str, Path] = {}
    if table.teacher is not None:
        moved[str(recipes.load(_at(path, table.teacher)).folder)] = teacher
    runs: list[Run] = []
    needs_teacher = False
    for number, stage in enumerate(row.stages):
        recipe = recipes.load(_at(path, stage))
        name = f"stage{number + 1}"
        sources = []
        for entry in recipe.init:
            here = moved.get(str(Path(entry.source)))
            needs_teacher |= here == teacher
            sources.append((here or entry.source, entry.load, entry.drop))
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
                    init_from(*sources),
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
    place = [f"run.folder={folder}", "name=linear", f"seed={seed}"]
    try:
        changes = probe_of(run.recipe(), recipes.load(_at(path, table.probe)), layer=table.layer)
    except ValueError as error:
        raise RecipeError(f"{path}: probe: {table.probe}: {error}") from None
    return Run(_at(path, table.probe), [*place, *changes, *extra])
