"""A table of methods as data: which recipes make each row, what is asked of the result, what has to run for that."""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, ValidationError, field_validator, model_validator

from engine import recipe as recipes
from engine import strict_yaml
from engine.errors import RecipeError
from engine.explain import explain
from engine.recipe import EvalConfig, Recipe
from engine.results import runs
from engine.results.chain import Chain, Network, Run, forwards, init_from, network_at, network_of, probe_of
from engine.results.scores import Entry, Outcome
from loaders.config import PathText
from models import backbones
from models.contract import Strict

Grid = dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]]
"""Key of a recipe, as in an override -> the values to try. Every combination is a cell."""
HELD_OUT = 0.1
"""Share of the training images of each class that choices are made on."""
RANDOM_STEPS = 50
"""Batches that BatchNorm of a random network sees."""


class Teacher(Strict):
    """A frozen network that rows learn from: trained here, or brought along."""

    recipe: str | None = None
    """It runs first, once, at its own length and seed. Rows learn from it whose `init` names its run folder."""
    overrides: tuple[str, ...] = ()
    """Of that run."""
    network: backbones.Config | None = None
    """Instead of `recipe`: what the recipes of its rows bring along, to be measured beside them."""
    source: PathText | None = Field(default=None, alias="from")
    """The weights of `network`."""
    part: str = "backbone"
    """Of that file."""

    @model_validator(mode="after")
    def _one_of_both(self) -> Teacher:
        if (self.recipe is None) == (self.network is None):
            raise ValueError("expected either recipe or network")
        if self.network is None and self.source is not None:
            raise ValueError("from: expected with network only")
        if self.recipe is None and self.overrides:
            raise ValueError("overrides: expected with recipe only")
        return self


class Task(Strict):
    """What is asked of every row's network: one column."""

    name: str = Field(min_length=1)
    recipe: str | None = None
    """By default the table's `probe`. A recipe that trains on the network, or that says which images are measured."""
    overrides: tuple[str, ...] = ()
    layer: Literal["pooled", "features"] = "pooled"
    """What it looks at: the pooled map, which every network has and S2-BNN probes, or the network's features, which
    with `pooled_mlp` come after one more layer and its ReLU and are not comparable with those of a network without."""
    measure: EvalConfig | None = None
    """Nothing trains: this evaluation of the frozen network, on the images and in the view of the recipe."""
    evaluation: str = "accuracy"
    """Without `measure`: the evaluation of the recipe whose last score is the result."""
    score: str = "top1"
    """Which of its numbers."""
    grid: Grid = Field(default={})
    """Cells that seed 0 tries; all seeds use the best."""
    chosen_on: Literal["held_out", "val"] = "held_out"
    """`held_out`: the cells learn from nine tenths of the labeled images and are measured on the rest; the best one
    learns from all and is measured once. `val`: the best on the images that the result is of, as is often published."""
    seeds: int | None = Field(default=None, ge=1)
    """At most so many of the row's."""
    on_teachers: bool = False
    """Ask the teachers, too; what is measured always is."""

    @model_validator(mode="after")
    def _closed_forms_have_no_rates(self) -> Task:
        if self.measure is not None and self.grid:
            raise ValueError("grid: expected without measure, which trains nothing")
        return self


class Row(Strict):
    """One network of a table: trained by stages, from a file, or none at all."""

    name: str = Field(min_length=1)
    stages: tuple[str, ...] | dict[str, tuple[str, ...]] = ()
    """Recipes that run one after the other, as paths from the table's folder; or teacher -> such recipes, for a row
    under each of them."""
    overrides: tuple[str, ...] = ()
    """Overrides of all of them."""
    random: bool = False
    """Train at rate 0: nothing is learned, but BatchNorm has seen data."""
    source: PathText | None = Field(default=None, alias="from")
    """Instead of stages: a run folder or a weight file."""
    part: str | None = None
    """Of that; by default what its evaluations measure, or a file's first network."""
    pixels: bool = False
    """Instead of stages: raw pixels, of which only `measure` asks anything."""
    budget: float = Field(default=1.0, gt=0)
    """Times the table's."""
    grid: Grid = Field(default={})
    """Instead of the table's, with as many cells."""
    seeds: int | None = Field(default=None, ge=1)
    """Instead of the table's; by default 1 where nothing is trained."""
    paper: float | None = None
    """The paper's linear top-1 on ImageNet, to print beside ours."""
    ablation: bool = False
    """A variant of another row rather than a method of its own."""

    @model_validator(mode="after")
    def _one_kind(self) -> Row:
        if sum((bool(self.stages), self.source is not None, self.pixels)) != 1:
            raise ValueError("expected one of stages, from and pixels")
        if self.random and any(len(stages) != 1 for stages in self.lists.values()):
            raise ValueError("random: expected with one stage")
        if self.grid and not self.has_rates:
            raise ValueError("grid: expected of a row that trains")
        return self

    @property
    def lists(self) -> dict[str, tuple[str, ...]]:
        """Its stages under each teacher that it names; under "" where it names none."""
        return self.stages if isinstance(self.stages, dict) else {"": self.stages}

    @property
    def has_rates(self) -> bool:
        """Whether there is a rate to choose."""
        return bool(self.stages) and not self.random


class Expectation(Strict):
    """A difference of means that must be there; else the table ends with exit code 1."""

    row: str
    over: str
    by: float
    """Points, at least."""
    task: str


class Table(Strict):
    """A file of `recipes/tables/`."""

    title: str
    views: int | None = Field(default=None, ge=1)
    """The budget of each row, shared equally by its stages: views that the network which is evaluated runs in training.
    A method that runs two of each image gets half as many images as one that runs one."""
    images: int | None = Field(default=None, ge=1)
    """Instead of `views`: the budget in training images, whatever a method does with each."""
    seeds: int = Field(ge=1)
    """How many, from 0."""
    teachers: dict[str, Teacher] = Field(default={})
    """Measured on top, as far as nothing has to be trained for that."""
    probe: str
    """The linear evaluation; also the images and the view of what is measured."""
    tasks: tuple[Task, ...] = Field(min_length=1)
    grid: Grid = Field(default={})
    """Rates that every row tries, with seed 0; never on validation images."""
    tries: int | None = Field(default=None, ge=1)
    """Views (or images) of each try."""
    judge: str | None = None
    """The measured task that chooses, on held-out training images; by default the first."""
    rows: tuple[Row, ...] = Field(min_length=1)
    pairs: tuple[tuple[str, str], ...] = ()
    """Rows whose differences are reported, seed by seed."""
    meters: tuple[str, ...] = ("features/rank",)
    """Scalars of the runs' last log line to print, where a row has them."""
    expect: tuple[Expectation, ...] = ()

    @field_validator("rows")
    @classmethod
    def _different_names(cls, rows: tuple[Row, ...]) -> tuple[Row, ...]:
        _tell_apart("row", [row.name for row in rows])
        return rows

    @field_validator("tasks")
    @classmethod
    def _different_tasks(cls, tasks: tuple[Task, ...]) -> tuple[Task, ...]:
        _tell_apart("task", [task.name for task in tasks])
        return tasks

    @field_validator("teachers")
    @classmethod
    def _different_teachers(cls, teachers: dict[str, Teacher]) -> dict[str, Teacher]:
        _tell_apart("teacher", list(teachers))
        return teachers

    @model_validator(mode="after")
    def _consistent(self) -> Table:
        if (self.views is None) == (self.images is None):
            raise ValueError("expected either views or images")
        names, tasks = {row.name for row in self.rows}, {task.name: task for task in self.tasks}
        for row in self.rows:
            for name in filter(None, row.lists):
                _known(f"row {row.name}: stages", name, self.teachers)
        asked = [("pairs", name) for pair in self.pairs for name in pair]
        for key, name in [*asked, *(("expect", name) for e in self.expect for name in (e.row, e.over))]:
            _known(key, name, names)
        for expectation in self.expect:
            _known("expect", expectation.task, tasks)
        sizes = {row.name: len(cells(row.grid or self.grid)) for row in self.rows if row.has_rates}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"grid: expected as many cells for every row that trains, got {sizes}")
        if any(size > 1 for size in sizes.values()):
            if self.tries is None:
                raise ValueError("tries: missing, the views of each try of grid")
            if self.judge is not None:
                _known("judge", self.judge, tasks)
            if all(task.measure is None for task in ([tasks[self.judge]] if self.judge else self.tasks)):
                raise ValueError("judge: expected a task with measure")
        return self

    @property
    def judging(self) -> Task:
        """The task that chooses rates."""
        return next(task for task in self.tasks if task.measure and self.judge in (None, task.name))


_RESERVED = re.compile(r"teacher.*|stage\d+|measured\d*|tries")
"""Names of folders that are not a row's or a task's."""


def _tell_apart(what: str, names: list[str]) -> None:
    slugs = [slug(name) for name in names]
    for name in names:
        if not slug(name) or _RESERVED.fullmatch(slug(name)):
            raise ValueError(
                f"a {what} needs a name with letters a-z or digits, other than teacher, stage1, measured and tries; "
                f"got {name!r}"
            )
        if slugs.count(slug(name)) > 1:
            raise ValueError(f"two {what}s are named {name!r}")


def _known(key: str, name: str, names: Iterable[str]) -> None:
    if name not in names:
        raise ValueError(f"{key}: {name!r}, expected one of {', '.join(map(repr, names))}")


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
    named = [("probe", table.probe)]
    named += [(f"teachers.{name}.recipe", teacher.recipe) for name, teacher in table.teachers.items() if teacher.recipe]
    named += [(f"tasks.{i}.recipe", task.recipe) for i, task in enumerate(table.tasks) if task.recipe]
    for number, row in enumerate(table.rows):
        for under, stages in row.lists.items():
            place = f"rows.{number}.stages{under and f'.{under}'}"
            named += [(f"{place}.{stage}", name) for stage, name in enumerate(stages)]
    for key, name in named:
        if not (path.parent / name).is_file():
            raise RecipeError(f"{path}: {key}: no recipe {path.parent / name}")
    return table


def slug(name: str) -> str:
    """A name as the name of a folder."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def cells(grid: Grid) -> list[dict[str, Any]]:
    """Every combination of a grid's values; of none, one without changes."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def _evals(evaluations: Iterable[EvalConfig], **changes: Any) -> str:
    """An override of `evals`."""
    return f"evals={json.dumps([evaluation.model_copy(update=changes).model_dump() for evaluation in evaluations])}"


def _changes(cell: dict[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in cell.items()]


class Variant(NamedTuple):
    """A row under one teacher; under None if it learns from none."""

    row: Row
    stages: tuple[str, ...]
    teacher: str | None
    label: str
    """Its name in the table."""


class Plan:
    """What has to run for a table, in folders under `out`.

    Args:
        path: the table's file.
        extra: overrides of every run, from the command line.
    """

    def __init__(self, spec: Table, path: Path, out: Path, extra: Sequence[str] = ()) -> None:
        self.spec, self.path, self.out, self.extra = spec, path, out, list(extra)
        self._rates: dict[str, dict[str, Any]] = {}
        for owner, changes in [(row.name, row.overrides) for row in spec.rows] + [("overrides", tuple(extra))]:
            for change in changes:
                if change.partition("=")[0] in _OWN:
                    raise RecipeError(
                        f"{path}: {owner}: override {change!r}: every run has its own; use --out or --seeds"
                    )

    # ------------------------------------------------------------------------------------------------ chains

    @functools.cached_property
    def variants(self) -> list[Variant]:
        """All rows, each under every teacher."""
        found = []
        for row in self.spec.rows:
            for under, stages in row.lists.items():
                sources = {str(Path(init.source)) for stage in stages for init in self._load(stage).init}
                trained = next((name for name, folder in self._trained.items() if folder in sources), None)
                teacher = under or trained
                label = f"{row.name}, {teacher}" if teacher and len(self.spec.teachers) > 1 else row.name
                found.append(Variant(row, stages, teacher, label))
        try:
            _tell_apart("row", [variant.label for variant in found])
        except ValueError as error:
            raise RecipeError(f"{self.path}: rows: {error}") from None
        return found

    def chains(self, rows: Sequence[str] = ()) -> list[Chain]:
        """All that has to run, what others wait for first.

        Args:
            rows: names of those that are wanted, or with their teacher; by default all.
        """
        wanted = [v for v in self.variants if not rows or v.row.name in rows or v.label in rows]
        asked = {variant.teacher for variant in wanted} | ({*self.spec.teachers} if not rows else set())
        found = [self.teacher_chain(name) for name in self.spec.teachers if name in asked]
        found += [self.tries_chain(variant) for variant in wanted if self._has_choice(variant)]
        for seed in range(max(map(self.seeds, wanted), default=0)):
            found += [self.chain(variant, seed) for variant in wanted if seed < self.seeds(variant)]
        return found

    def seeds(self, variant: Variant) -> int:
        """How many seeds a row has."""
        return variant.row.seeds or (self.spec.seeds if variant.row.stages else 1)

    def teacher_chain(self, name: str) -> Chain:
        """A teacher's run, if it is trained here, and what is measured of it."""

        def make() -> Iterator[Run]:
            folder = self._folder_of(name)
            network, run = self._teacher(name)
            if run is not None:
                yield run
            seed = run.recipe().seed if run is not None else 0
            tasks = [task for task in self.spec.tasks if task.measure or (task.on_teachers and not task.grid)]
            yield from self._tasks(tasks, network, folder, seed, None)

        return Chain(f"teacher {name}", 0, make)

    def tries_chain(self, variant: Variant) -> Chain:
        """The tries of a row's rates."""

        def make() -> Iterator[Run]:
            for number in range(len(self._cells(variant))):
                yield from self._try(variant, number)

        return Chain(variant.label, "tries", make, self._needs(variant))

    def chain(self, variant: Variant, seed: int) -> Chain:
        """The runs of one row and seed: its stages, then its tasks."""

        def make() -> Iterator[Run]:
            folder = self.folder(variant) / f"seed{seed}"
            run = None
            for run in self._stages(variant, seed):
                yield run
            tasks = [task for task in self.spec.tasks if seed < (task.seeds or seed + 1)]
            yield from self._tasks(tasks, self._network(variant, run), folder, seed, variant)

        needs = self._needs(variant)
        if self._has_choice(variant):
            needs += ((variant.label, "tries"),)
        if seed and variant.row.stages and any(task.grid for task in self.spec.tasks):
            needs += ((variant.label, 0),)
        return Chain(variant.label, seed, make, needs)

    def folder(self, variant: Variant) -> Path:
        """Where the runs of a row are."""
        return self.out / slug(variant.label)

    def _needs(self, variant: Variant) -> tuple[tuple[str, int | str], ...]:
        name = variant.teacher
        return ((f"teacher {name}", 0),) if name is not None and self.spec.teachers[name].recipe else ()

    # ------------------------------------------------------------------------------------------------ runs

    def _at(self, name: str) -> Path:
        return Path(os.path.normpath(self.path.parent / name))

    def _load(self, name: str, changes: Sequence[str] = ()) -> Recipe:
        return Run(self._at(name), list(changes)).recipe()

    @functools.cached_property
    def _trained(self) -> dict[str, str]:
        """Teacher that is trained here -> the run folder by which rows name it."""
        return {
            name: str(self._load(teacher.recipe).folder)
            for name, teacher in self.spec.teachers.items()
            if teacher.recipe
        }

    def _teacher(self, name: str) -> tuple[Network, Run | None]:
        teacher = self.spec.teachers[name]
        if teacher.recipe is None:
            assert teacher.network is not None
            return Network(teacher.source, teacher.part, teacher.network), None
        place = [f"run.folder={self.out}", f"name={self._folder_of(name).name}"]
        run = Run(self._at(teacher.recipe), [*place, *teacher.overrides, *self.extra])
        return network_of(run.recipe()), run

    def _folder_of(self, teacher: str) -> Path:
        return self.out / f"teacher_{slug(teacher)}"

    def _stages(
        self, variant: Variant, seed: int, *, cell: dict[str, Any] | None = None, place: Path | None = None
    ) -> Iterator[Run]:
        """The runs that train a row; with a cell those that try it, in their folder.

        `init` entries that name the default run folder of a teacher or of an earlier stage are pointed to where that
        one is here; all others stay.
        """
        row = variant.row
        folder = place or self.folder(variant) / f"seed{seed}"
        budget = self.spec.views or self.spec.images or 0
        total = budget * row.budget if cell is None else (self.spec.tries or 0)
        chosen = [] if row.random else _changes(cell if cell is not None else self._chosen_rate(variant))
        moved = {folder: self._folder_of(name) for name, folder in self._trained.items()}
        for number, stage in enumerate(variant.stages, 1):
            recipe = self._load(stage)
            sources = [
                (moved.get(str(Path(init.source)), init.source), init.load, *([init.drop] if init.drop else []))
                for init in recipe.init
            ]
            changes = [*row.overrides]
            changes += [*chosen, *self.extra]
            known = self._load(stage, changes)
            each = len(variant.stages) * known.data.batch_size * (forwards(known) if self.spec.views else 1)
            steps = RANDOM_STEPS if row.random else max(round(total / each), 1)
            name = f"stage{number}"
            own = [f"run.folder={folder}", f"name={name}", f"seed={seed}", f"run.duration={steps}it", "evals=[]"]
            own += [init_from(*sources), *(["schedules.lr=0"] if row.random else [])]
            if cell is not None:
                changes = [*changes, f"data.hold_out={HELD_OUT}"]
            yield Run(
                self._at(stage), [*own, *changes], cell=None if cell is None else self._cells(variant).index(cell)
            )
            moved[str(recipe.folder)] = folder / name

    def _network(self, variant: Variant, last: Run | None) -> Network | None:
        if variant.row.pixels:
            return None
        if variant.row.source is not None:
            return network_at(Path(variant.row.source), variant.row.part)
        assert last is not None
        return network_of(last.recipe())

    def _tasks(
        self, tasks: Sequence[Task], network: Network | None, folder: Path, seed: int, variant: Variant | None
    ) -> Iterator[Run]:
        """The runs that answer tasks: one for all that is measured on the same images, one for each other.

        Args:
            network: None for raw pixels.
        """
        groups: dict[Any, list[Task]] = {}
        for task in tasks:
            if task.measure is not None:
                groups.setdefault((task.recipe, task.overrides, task.layer), []).append(task)
        for number, group in enumerate(groups.values(), 1):
            name = f"measured{number if number > 1 else ''}"
            yield self._measuring(group, network, folder, name, seed)
        for task in tasks if network is not None else ():
            if task.measure is not None:
                continue
            assert network is not None
            cell: dict[str, Any] = {}
            if task.grid and variant is not None:
                tried = self._task_tries(variant, task)
                if seed == 0:
                    yield from tried
                number = self._best(task, tried) or 0
                cell = cells(task.grid)[number]
                if seed == 0 and task.chosen_on == "val":  # that very run is the result
                    yield tried[number]._replace(cell=None)
                    continue
            yield self._answering(task, network, folder, slug(task.name), seed, [], *_changes(cell))

    def _measuring(
        self,
        tasks: Sequence[Task],
        network: Network | None,
        folder: Path,
        name: str,
        seed: int,
        *,
        is_try: bool = False,
    ) -> Run:
        """One step at rate 0, behind which everything is measured in closed form."""
        changes: dict[str, Any] = {"every": "100%", "at_start": False}
        changes |= {"pixels": True} if network is None else {}
        changes |= {"split": "held_out"} if is_try else {}
        measures = [task.measure for task in tasks if task.measure]
        last = [_evals(measures, **changes), *([f"data.hold_out={HELD_OUT}"] if is_try else [])]
        still = ["schedules={lr: 0.0}", "run.duration=1it", "run.log_every=1it", "run.save_every=1it"]
        run = self._answering(tasks[0], network, folder, name, seed, still, *last)
        return run._replace(tasks=tuple(task.name for task in tasks))

    def _answering(
        self, task: Task, network: Network | None, folder: Path, name: str, seed: int, first: list[str], *last: str
    ) -> Run:
        recipe = task.recipe or self.spec.probe
        place = [f"run.folder={folder}", f"name={name}", f"seed={seed}", *first, *task.overrides]
        changes = ["init=[]"]
        if network is not None:
            try:
                changes = probe_of(network, self._load(recipe, task.overrides), layer=task.layer)
            except ValueError as error:
                raise RecipeError(f"{self.path}: {task.name}: {recipe}: {error}") from None
        return Run(self._at(recipe), [*place, *changes, *self.extra, *last], (task.name,))

    # ------------------------------------------------------------------------------------------------ choices

    def _cells(self, variant: Variant) -> list[dict[str, Any]]:
        return cells(variant.row.grid or self.spec.grid)

    def _has_choice(self, variant: Variant) -> bool:
        return variant.row.has_rates and len(self._cells(variant)) > 1

    def _try(self, variant: Variant, number: int) -> Iterator[Run]:
        """The runs of one cell of a row's grid; the last one is measured on held-out training images."""
        folder = self.folder(variant) / "tries" / str(number)
        run = None
        for run in self._stages(variant, 0, cell=self._cells(variant)[number], place=folder):
            yield run
        assert run is not None
        judge = self.spec.judging
        measured = self._measuring([judge], network_of(run.recipe()), folder, "measured", 0, is_try=True)
        yield measured._replace(cell=number)

    def _chosen_rate(self, variant: Variant) -> dict[str, Any]:
        grid = self._cells(variant)
        if not self._has_choice(variant):
            return grid[0]
        if variant.label not in self._rates:
            number = self._best(self.spec.judging, self._judged(variant))
            if number is None:
                return grid[0]
            self._rates[variant.label] = grid[number]
        return self._rates[variant.label]

    def _judged(self, variant: Variant) -> Iterator[Run]:
        """The run behind each try of a row's rates that is measured."""
        return (list(self._try(variant, number))[-1] for number in range(len(self._cells(variant))))

    def _task_tries(self, variant: Variant, task: Task) -> list[Run]:
        """One run for each cell of a task's grid, on the network of seed 0."""
        folder = self.folder(variant) / "seed0" / "tries" / slug(task.name)
        stages = list(self._stages(variant, 0))
        network = self._network(variant, stages[-1] if stages else None)
        assert network is not None
        more: list[str] = []
        if task.chosen_on == "held_out":
            recipe = self._load(task.recipe or self.spec.probe, [*task.overrides, *self.extra])
            kept = [evaluation for evaluation in recipe.evals if evaluation.kind == task.evaluation]
            more = [f"data.hold_out={HELD_OUT}", _evals(kept, split="held_out")]
        return [
            self._answering(task, network, folder, f"cell{number}", 0, [], *_changes(cell), *more)._replace(cell=number)
            for number, cell in enumerate(cells(task.grid))
        ]

    def _best(self, task: Task, tries: Iterable[Run]) -> int | None:
        """The cell with the best score, the first of equals; None where not all have been run."""
        scores = []
        for run in tries:
            if not run.is_done():
                return None
            scores.append(self.score(run, task))
        return scores.index(max(scores))

    def score(self, run: Run, task: Task) -> float:
        """What a finished run answers to a task, in percent.

        Raises:
            RecipeError: it has no answer.
        """
        recipe = run.recipe()
        if task.measure is None:
            return runs.final(recipe.folder, task.evaluation, task.score)
        return runs.evaluation(recipe, run.tasks.index(task.name))[task.score]

    # ------------------------------------------------------------------------------------------------ results

    def outcome(self, chain: Chain) -> Outcome:
        """What the finished runs of a chain gave, from their own files."""
        tasks = {task.name: task for task in self.spec.tasks}
        everything = [(run, run.recipe()) for run in chain.make() if run.cell is None]
        trained = [(run, recipe) for run, recipe in everything if not run.tasks]
        last = [[row for row in runs.metrics(recipe.folder) if "seconds" in row][-1] for _, recipe in trained]
        costs = [forwards(recipe) for _, recipe in trained]
        return Outcome(
            scores={name: self.score(run, tasks[name]) for run, _ in everything for name in run.tasks},
            images=sum(row["images"] for row in last),
            views=sum(row["images"] * cost for row, cost in zip(last, costs, strict=True)),
            seconds=round(sum(row["seconds"] for row in last), 1),
            monitors={
                name: value
                for name, value in (last[-1] if last else {}).items()
                if "/" in name or name in self.spec.meters
            },
            recipes=[recipe.hash for _, recipe in everything],
        )

    def kinds(self, run: Run) -> list[str]:
        """The evaluations whose scores are read from a run."""
        asked = [task for task in self.spec.tasks if task.name in run.tasks]
        return [task.measure.kind if task.measure else task.evaluation for task in asked]

    def finished(self) -> dict[tuple[str, int | str], Outcome]:
        """What is done of all rows, teachers and seeds, by this call or an earlier one of the same settings."""
        chains = [self.teacher_chain(name) for name in self.spec.teachers]
        for variant in self.variants:
            seeds = (place.name.removeprefix("seed") for place in self.folder(variant).glob("seed*"))
            chains += [self.chain(variant, seed) for seed in sorted(int(seed) for seed in seeds if seed.isdecimal())]
        return {chain.key: self.outcome(chain) for chain in chains if chain.is_done()}

    def entries(self, results: dict[tuple[str, int | str], Outcome]) -> list[Entry]:
        """The rows of the table that have any result, teachers first."""
        found = []
        for name in self.spec.teachers:
            if (f"teacher {name}", 0) in results:
                outcomes = {0: results[f"teacher {name}", 0]}
                found.append(Entry(f"{name} (floating point)", "", name, None, True, outcomes))
        for variant in self.variants:
            outcomes = {
                seed: results[variant.label, seed]
                for seed in sorted(seed for label, seed in results if label == variant.label and isinstance(seed, int))
            }
            if outcomes:
                row, choices = variant.row, self.choices(variant)
                found.append(
                    Entry(variant.label, row.name, variant.teacher, row.paper, row.ablation, outcomes, choices)
                )
        return found

    def choices(self, variant: Variant) -> dict[str, Any]:
        """How a row's rate and the cells of its tasks were chosen, as far as that has happened: name -> what each cell
        scored."""
        found: dict[str, Any] = {}

        def say(name: str, task: Task, grid: list[dict[str, Any]], on: str, tries: Sequence[Run]) -> None:
            number = self._best(task, tries)
            if number is not None:
                both = zip(grid, [self.score(run, task) for run in tries], strict=True)
                found[name] = {
                    "on": on,
                    "judge": task.name,
                    "cells": [{"cell": cell, "score": score} for cell, score in both],
                    "chosen": grid[number],
                }

        if self._has_choice(variant):
            say("tries", self.spec.judging, self._cells(variant), "held_out", list(self._judged(variant)))
        for task in self.spec.tasks if not variant.row.pixels else ():
            if task.grid:
                say(task.name, task, cells(task.grid), task.chosen_on, self._task_tries(variant, task))
        return found
