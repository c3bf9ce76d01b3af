"""The data sets of a run, and whether they are those that its recipe was written for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

import loaders
from engine import dist
from engine.dist import World
from engine.errors import RecipeError
from engine.log import logger
from engine.recipe import Recipe
from loaders import DataConfig, DataError, Index
from loaders.sources import check_quarantine
from models import methods
from models.collectives import world_size

HELD_OUT = "held_out"
"""The name of the training images that `data.hold_out` keeps from training."""
TRAINED_ON = "trained_on"
"""Of an evaluation: what the run trains on, where BatchNorm is estimated anew on it. It needs no labels."""


def open_indices(recipe: Recipe, world: World) -> dict[str, Index]:
    """Index training images, and those of the evaluations: name (`train`, `held_out`, `val`, or the key of an
    evaluation that has a set of its own, such as `evals.0.val`) -> index, the same on all ranks.

    One process of each machine reads, the others map what it found.

    Raises:
        DataError: they cannot be used, or do not fit the recipe.
        RankError: on another rank.
    """
    found = open_once(lambda: open_here(recipe), recipe.data, world)
    if world.local_rank == 0:
        _say(recipe, found)
    return found


def open_once(open_them: Callable[[], dict[str, Index]], data: DataConfig, world: World) -> dict[str, Index]:
    """Data sets by name, the same on all ranks: one process of each machine opens, the others map what it found.

    Raises:
        DataError: what `open_them` raises.
        RankError: on another rank.
    """
    first = dist.together(lambda: open_them() if world.local_rank == 0 else None)
    places = dist.gather_objects({name: loaders.place_of(index) for name, index in first.items()} if first else {})
    ours = places[world.rank - world.local_rank]  # of this machine's reader

    def mapped() -> dict[str, Index]:
        found = {name: loaders.map_index(data, place) for name, place in ours.items() if place}
        return found if len(found) == len(ours) else open_them()  # nowhere to write, or nothing to read

    return dist.together(lambda: first or mapped())


def open_here(recipe: Recipe) -> dict[str, Index]:
    """`open_indices` in this process alone.

    Raises:
        DataError: the data sets cannot be used, or do not fit the recipe.
    """
    opened: dict[str, Index] = {}
    by_root: dict[str, str] = {}
    for name, open_it in _wanted(recipe).items():
        root = _own_root(recipe, name)
        if root is not None and root in by_root:
            opened[name] = opened[by_root[root]]
            continue
        opened[name] = open_it()
        if root is not None:
            by_root[root] = name
    _check(recipe, opened)
    return opened


def _wanted(recipe: Recipe) -> dict[str, Callable[[], Index]]:
    """Name -> what opens it."""
    asks = {
        name: f"evals.{number} ({config.kind}; evals=[] goes without)"
        for number, config in enumerate(recipe.evals)
        for which, name in names_of(recipe, number).items()
        if which != TRAINED_ON
    }
    if recipe.method.needs_labels:
        asks["train"] = f"method {recipe.method.name}"
    wanted: dict[str, Callable[[], Index]] = {}
    held_out = [HELD_OUT] if recipe.data.hold_out is not None else []
    for name in dict.fromkeys(["train", *held_out, *sorted(asks)]):
        if (root := _own_root(recipe, name)) is not None:
            wanted[name] = partial(loaders.open_root, recipe.data, root, for_labels=asks[name])
        else:
            wanted[name] = partial(loaders.open_data, recipe.data, name, for_labels=asks.get(name, ""))  # type: ignore[arg-type]
    return wanted


def names_of(recipe: Recipe, number: int) -> dict[str, str]:
    """The data sets of evaluation `number`: `train` (where it needs one), `val`, `held_out` (where it chooses by them)
    and `trained_on` (where it estimates BatchNorm anew) -> name in `open_indices`."""
    config = recipe.evals[number]
    if not config.needs_images:
        return {}
    names = {
        which: which if getattr(config, which) is None else f"evals.{number}.{which}"
        for which in ("train", "val")
        if which == "val" or config.needs_train
    }
    if config.split == HELD_OUT:
        names["val"] = HELD_OUT
    if recipe.chooses(config):
        names[HELD_OUT] = HELD_OUT
    if config.precise_bn:
        names[TRAINED_ON] = "train"
    return names


def roots_of(recipe: Recipe) -> dict[str, str | None]:
    """Dotted key -> what it names, for all that a recipe reads."""
    of_evals = [name for number in range(len(recipe.evals)) for name in names_of(recipe, number).values()]
    own = {name: _own_root(recipe, name) for name in dict.fromkeys(["train", *of_evals]) if name != HELD_OUT}
    return {f"data.{name}" if root is None else name: root or getattr(recipe.data, name) for name, root in own.items()}


def _own_root(recipe: Recipe, name: str) -> str | None:
    if not name.startswith("evals."):
        return None
    _, number, which = name.split(".")
    return getattr(recipe.evals[int(number)], which)


def sets_of(recipe: Recipe, number: int, indices: dict[str, Index]) -> dict[str, Index]:
    """The data sets of evaluation `number` as `names_of` names them."""
    return {which: indices[name] for which, name in names_of(recipe, number).items()}


def _check(recipe: Recipe, indices: dict[str, Index]) -> None:
    train, root = indices["train"], _named(recipe, "train", indices)
    if recipe.data.quarantine and recipe.data.options.reads_files:
        check_quarantine(Path(recipe.data.quarantine), indices.values())
    expected = recipe.data.expect_images
    count = len(train) + train.quarantined + len(indices.get(HELD_OUT, ()))
    if expected is not None and count != expected:
        raise DataError(
            f"{root}: {count} images, the recipe expects {expected}; complete the data set, or set "
            f"data.expect_images={count}"
        )
    for number in range(len(recipe.evals)):
        _check_classes(recipe, number, indices)
    if recipe.method.classes is not None and train.classes:
        try:
            recipe.method.check_classes(len(train.classes))
        except ValueError as error:
            raise DataError(f"{root}: {len(train.classes)} classes, {error}") from None
    if why := _too_few(recipe):
        raise RecipeError(f"data.micro_batch: 1 image per forward on one rank, {why}; set data.micro_batch=2 or more")
    if train.problems and recipe.data.on_bad_image == "stop":
        raise DataError(f"{_unusable(train)}; remove or repair them, or set data.on_bad_image=replace")


def _too_few(recipe: Recipe) -> str:
    """Why one image at a time is too few for the method, or "". Several ranks are not looked at: statistics over them
    have more images."""
    if recipe.data.micro_batch > 1 or world_size() > 1:
        return ""
    method = methods.on_meta(recipe.method).train()
    views = [torch.empty(1, 3, view.size, view.size, device="meta") for view in recipe.data.views]
    label = torch.zeros((1, 2, 6) if recipe.method.takes_boxes else 1, device="meta").long()
    zeros = {name: torch.zeros((), device="meta") for name in recipe.method.schedules}
    normalizing: list[str] = []
    for name, module in method.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.register_forward_pre_hook(lambda *_, name=name: normalizing.append(name))
    try:
        with torch.no_grad():
            method(views, label, zeros)
    except ValueError:  # BatchNorm's
        return f"{normalizing[-1]} normalizes over a batch" if normalizing else ""
    except RuntimeError:  # the meta device knows no loss; all networks have run by then
        pass
    return ""


def _say(recipe: Recipe, indices: dict[str, Index]) -> None:
    """What each machine's reader has to say once: how the images were read, and how many cannot be used."""
    train = indices["train"]
    if recipe.data.quarantine and recipe.data.options.reads_files:
        if said := check_quarantine(Path(recipe.data.quarantine), indices.values()):
            logger.warning(said)
    logger.info(f"data.train: {recipe.data.train or train.root}: {len(train):,} images, {train.reading or 'noise'}")
    for index in indices.values():
        if index.problems:
            logger.warning(_unusable(index))


def _unusable(index: Index) -> str:
    row, reason = next(iter(index.problems.items()))
    count = f"{len(index.problems)} of {len(index)} images"
    return f"{index.root}: {count} are unusable, the first is {index.path(row)}: {reason}"


def _check_classes(recipe: Recipe, number: int, indices: dict[str, Index]) -> None:
    names = names_of(recipe, number)
    if not names:
        return
    known = names.get("train", "train")  # what answers are given in
    check_classes(
        _named(recipe, names["val"], indices),
        indices[names["val"]].classes,
        _named(recipe, known, indices),
        indices[known].classes,
    )


def check_classes(name: str, ours: Sequence[str], other: str, theirs: Sequence[str]) -> None:
    """Refuse a data set whose classes are not those that answers are given in.

    Args:
        name, ours: of the data set, and its classes.
        other, theirs: of what the answers come from, and its classes.

    Raises:
        DataError: they are others, or in another order.
    """
    if list(ours) != list(theirs):
        only = {"first": sorted({*ours} - {*theirs}), "second": sorted({*theirs} - {*ours})}
        said = [f"only the {which} has {_some(found)}" for which, found in only.items() if found]
        raise DataError(
            f"{name}: its {len(ours)} classes differ from the {len(theirs)} of {other}: "
            f"{'; '.join(said) or 'the same in another order'}"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _named(recipe: Recipe, name: str, indices: dict[str, Index]) -> str:
    """What a recipe names as a data set: of a list the file, not its folder."""
    if not recipe.data.options.reads_files:
        return str(indices[name].root)
    return _own_root(recipe, name) or getattr(recipe.data, "train" if name == HELD_OUT else name)
