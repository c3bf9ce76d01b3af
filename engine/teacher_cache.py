"""A frozen teacher's features of every fixed view, made once and read in training (in the spirit of Fast Knowledge
Distillation, Shen and Xing, ECCV 2022, which keeps soft labels of crops); and whether a cache is the one that a run
needs.

A view is a function of (seed, image, number of the draw), so that a cache knows nothing of steps, ranks or the order.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import loaders
from engine import accelerator, checkpoint, dist, precision
from engine.data import open_indices
from engine.dist import World
from engine.errors import RecipeError
from engine.log import duration, logger, rate
from engine.recipe import Recipe
from engine.trained import hash_of
from loaders import DataError, FeatureCache, Index, Place
from loaders.features import principal_components
from models import backbones
from models.methods import Method

BLOCKS = 8
"""Blocks of a rank between two marks of what is done: so many are made again after a kill."""
SAMPLE = 4096
"""Views that principal components are found from, at least four for each of them."""
TOLERANCE = 0.02
"""What a feature vector may differ from the live one, as a share of its length: 16 bits, and other batches."""
_WEIGHTS = "the weights of its network"


def about(recipe: Recipe, method: Method, index: Index) -> dict[str, Any]:
    """What the features of a recipe's teacher depend on, by name; on the meta device there are no weights to name."""
    name = recipe.method.cacheable
    data, network = recipe.data, recipe.method.networks[name]
    said: dict[str, Any] = {
        "its network": network.model_dump(mode="json", exclude=set(network.only_in_training)),
        "data.views": [view.model_dump(mode="json") for view in data.views],
        "data.mean": list(data.mean),
        "data.std": list(data.std),
        "data.fixed_views": data.fixed_views,
        "seed": recipe.seed,
        "the fingerprint of data.train": index.fingerprint,
    }
    part = method.get_submodule(name)
    if not any(value.is_meta for value in part.state_dict().values()):
        said[_WEIGHTS] = hash_of(part)
    return said


def identity(recipe: Recipe) -> str:
    """What tells the cache of a recipe from all others, or "" without one.

    Raises:
        DataError: it is none.
    """
    return FeatureCache.identity_of(Path(recipe.data.teacher_cache)) if recipe.data.teacher_cache else ""


def check(recipe: Recipe, method: Method, index: Index) -> None:
    """See that `data.teacher_cache` has the features of this run's teacher, of its views; all of them.

    Raises:
        RecipeError: it has others, which are named, or not all.
        DataError: it is none, or damaged.
    """
    cache = FeatureCache.open(Path(recipe.data.teacher_cache or ""))
    cache.close()
    if said := _differences(cache, about(recipe, method, index)):
        raise RecipeError(f"data.teacher_cache: {cache.folder} is of others than this run: {said}")
    if cache.shape[1:3] != (len(index), len(recipe.data.views)):
        raise RecipeError(f"data.teacher_cache: {cache.folder} is damaged: its shape is {cache.shape}; make it again")
    if not cache.is_complete:
        raise RecipeError(
            f"data.teacher_cache: {cache.folder} has {100 * cache.done.mean():.0f} % of its features; "
            "finish it with tools/cache_teacher.py"
        )


def _differences(cache: FeatureCache, now: dict[str, Any]) -> str:
    then = cache.about
    return "; ".join(
        f"{name} was {_short(then.get(name))}, is {_short(value)}"
        for name, value in now.items()
        if then.get(name) != value
    )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else f"another ({hashlib.sha256(text.encode()).hexdigest()[:8]})"


# ------------------------------------------------------------------------------------------------ making it


class Maker:
    """Makes the cache of a recipe's teacher, or what is missing of one.

    Args:
        recipe: with `data.fixed_views`.
        world: the ranks, which share the work and the folder.

    Raises:
        RecipeError, DataError, CheckpointError, WeightsError, NetworkError: the recipe cannot be used here.
    """

    def __init__(self, recipe: Recipe, world: World) -> None:
        recipe = recipe.model_copy(update={"evals": ()})  # their data sets are not needed
        self.recipe, self.world = recipe, world
        self.index = open_indices(recipe, world)["train"]
        usable, _ = accelerator.usable(recipe.run, world.device)
        accelerator.set_up(usable, world.device, world.local_world_size)
        torch.manual_seed(recipe.seed)
        self.method = recipe.method.build()
        self.name = recipe.method.cacheable
        dist.together(self._load)
        self.method.to(world.device)
        backbones.prepare(
            self.method,
            channels_last=usable.channels_last,
            fused=False,
            compiled=usable.compile,
            compile_options=usable.compile_options,
        )
        self.method.eval()
        self.network = backbones.backbones_of(self.method)[self.name]
        self.dtype = precision.DTYPES[recipe.run.amp]

    def _load(self) -> None:
        given = [init for init in self.recipe.init if self.name in init.load]
        for init in given:
            own = init.model_copy(update={"load": {self.name: init.load[self.name]}})
            checkpoint.initialize(self.method, self.recipe.method, own)
        if not given and self.world.is_main:
            logger.warning(f"{self.name} is frozen and random: no entry of init loads it")

    @torch.no_grad()
    def _features(self, views: Sequence[Tensor]) -> Tensor:
        """Views, V x [B, 3, H, W], to the live features [B, V, D']."""
        inputs = [view.to(self.dtype) for view in views] if self.dtype else views
        with torch.autocast(self.world.device.type, self.dtype, enabled=self.dtype is not None):
            return torch.stack([self.network(view).float() for view in inputs], dim=1)

    def make(self, folder: Path, components: int | None = None) -> FeatureCache:
        """Fill a folder, from where an earlier call was stopped.

        Args:
            components: keep so many principal components in place of all features.

        Returns:
            The complete cache, its file closed.

        Raises:
            RecipeError: the folder has features of something else.
            DataError: an image or the folder cannot be used.
            OSError: the disk refuses.
        """
        dist.together(lambda: self._open(folder, components) if self.world.is_main else None)
        cache = FeatureCache.open(folder)
        try:
            self._fill(cache)
        finally:
            cache.close()
        return cache

    def _open(self, folder: Path, components: int | None) -> None:
        """Begin the cache, or see that the one that is there is this one."""
        recipe, data = self.recipe, self.recipe.data
        assert data.fixed_views is not None
        width = self.network.out_channels
        if components is not None and components >= width:
            raise RecipeError(f"--components: expected less than the {width} features of {self.name}, got {components}")
        now = about(recipe, self.method, self.index)
        if (folder / "cache.json").exists():
            cache = FeatureCache.open(folder)
            cache.close()
            said = _differences(cache, now)
            if cache.shape[3] != (components or width):
                said = f"{said}; " * bool(said) + f"--components was {cache.shape[3]}, is {components or width}"
            if said:
                raise RecipeError(f"{folder}: holds other features: {said}; give another folder, or remove it")
            return
        basis = None
        if components is not None:
            basis, kept = principal_components(self._sample(components), components)
            logger.info(f"{components} of {width} principal components keep {100 * kept:.1f} % of the variance")
        shape = (data.fixed_views, len(self.index), len(data.views), components or width)
        FeatureCache.create(folder, now, shape, block=min(data.eval_batch, len(self.index)), basis=basis).close()

    def _sample(self, components: int) -> Tensor:
        views = len(self.recipe.data.views)
        count = min(len(self.index), -(-max(SAMPLE, 4 * components) // views))
        if count * views <= components:
            raise RecipeError(f"--components: {components} need more than {count * views} views of the data set")
        rows = [place * len(self.index) // count for place in range(count)]
        size = self.recipe.data.eval_batch
        loader = self._loader([(0, rows[first : first + size]) for first in range(0, count, size)])
        try:
            found = [self._features(batch.views).flatten(0, 1).cpu() for batch in loader]
        finally:
            loader.close()
        return torch.cat(found)

    def _loader(self, parts: Sequence[tuple[int, Sequence[int]]]) -> loaders.Loader:
        recipe, place = self.recipe, self.world.place
        return loaders.open_fixed(recipe.data, self.index, parts, seed=recipe.seed, place=place, dtype=self.dtype)

    def _fill(self, cache: FeatureCache) -> None:
        draws, blocks = cache.done.shape
        todo = [(draw, block) for draw in range(draws) for block in range(blocks) if not cache.done[draw, block]]
        if not todo:
            return
        mine = todo[self.world.rank :: self.world.world_size]
        loader = self._loader([(draw, cache.rows(block)) for draw, block in mine])
        started, seen = time.perf_counter(), 0
        total = sum(len(cache.rows(block)) for _, block in todo)
        rounds = -(-len(todo) // (self.world.world_size * BLOCKS))
        try:
            for number in range(rounds):
                part = mine[number * BLOCKS : (number + 1) * BLOCKS]
                dist.together(lambda part=part: self._write(cache, loader, part))  # type: ignore[misc]
                done = cache.done.copy()
                for draw, block in (place for places in dist.gather_objects(part) for place in places):
                    done[draw, block] = True
                    seen += len(cache.rows(block))
                dist.together(lambda done=done: cache.mark(done) if self.world.is_main else None)  # type: ignore[misc]
                cache.done = done
                speed = seen / (time.perf_counter() - started)
                logger.info(
                    f"{100 * done.mean():.1f} % of {draws} x {cache.shape[1]:,} images in {cache.shape[2]} views, "
                    f"{rate(speed)} images/s, {duration((total - seen) / speed)} left"
                )
        finally:
            loader.close()

    def _write(self, cache: FeatureCache, loader: loaders.Loader, part: Sequence[tuple[int, int]]) -> None:
        for draw, _ in part:
            batch = next(loader)
            cache.write(draw, batch.rows, self._features(batch.views))
        cache.flush()

    def compare(self, folder: Path) -> float:
        """Hold a complete cache against the live teacher: the first batch of the first and of the last draw, through
        the loader that training has.

        Returns:
            The largest difference of a feature vector, as a share of its length; with components, of what they keep.

        Raises:
            DataError: it is larger than rounding.
        """
        draws = self.recipe.data.fixed_views
        assert draws is not None
        shares = dist.together(lambda: [self._compare(folder, d) for d in {0, draws - 1}] if self.world.is_main else [])
        worst: float = max(dist.gather_objects(shares)[0])
        if not worst <= TOLERANCE:
            raise DataError(
                f"{folder}: differs from the live teacher by {100 * worst:.1f} %; remove it and make it again"
            )
        return worst

    def _compare(self, folder: Path, draw: int) -> float:
        data = self.recipe.data.model_copy(update={"teacher_cache": str(folder)})
        step = -(-draw * len(self.index) // data.batch_size)
        place = Place(device=self.world.device)
        loader = loaders.open_train(data, self.index, seed=self.recipe.seed, step=step, place=place, dtype=self.dtype)
        try:
            batch = next(loader)
        finally:
            loader.close()
        assert batch.features is not None and loader.cache is not None
        live = loader.cache.kept(self._features(batch.views)).transpose(0, 1)  # [V, B, D']
        return float(((batch.features - live).norm(dim=2) / live.norm(dim=2).clamp(min=1e-12)).max())
