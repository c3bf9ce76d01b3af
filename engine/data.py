"""The data sets of a run, and whether they are those that its recipe was written for."""

from __future__ import annotations

import loaders
from engine import dist
from engine.dist import World
from engine.log import logger
from engine.recipe import Recipe
from loaders import DataError, Index


def open_indices(recipe: Recipe, world: World) -> dict[str, Index]:
    """Index training images, and validation images where there are evaluations: split -> index, the same on all ranks.
    One process of each machine makes the cache, the others read it.

    Raises:
        DataError: they cannot be used, or do not fit the recipe.
        RankError: on another rank.
    """
    splits = ["train", *(["val"] if recipe.evals else [])]

    def open_here() -> dict[str, Index]:
        indices = {split: loaders.open_data(recipe.data, split) for split in splits}  # type: ignore[arg-type]
        _check(recipe, indices)
        return indices

    first = dist.together(lambda: open_here() if world.local_rank == 0 else None)
    return dist.together(lambda: first or open_here())


def _check(recipe: Recipe, indices: dict[str, Index]) -> None:
    train = indices["train"]
    expected = recipe.data.expect_images
    count = len(train) + train.quarantined
    if expected is not None and count != expected:
        raise DataError(
            f"{train.root}: {count} images, the recipe expects {expected}; complete the data set, or set "
            f"data.expect_images={count}"
        )
    if "val" in indices and indices["val"].classes != train.classes:
        raise DataError(f"{indices['val'].root}: its classes differ from those of {train.root}")
    try:
        recipe.method.check_classes(len(train.classes))
    except ValueError as error:
        raise DataError(f"{train.root}: {len(train.classes)} classes, {error}") from None
    for split, index in indices.items():
        if index.problems:
            row, reason = next(iter(index.problems.items()))
            text = f"{index.root}: {len(index.problems)} of {len(index)} images are unusable, the first is "
            text += f"{index.path(row)}: {reason}"
            if split == "train" and recipe.data.on_bad_image == "stop":
                raise DataError(f"{text}; remove or repair them, or set data.on_bad_image=replace")
            logger.warning(text)
