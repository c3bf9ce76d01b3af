"""The `data` section of a recipe, and from it batches on the device."""

from __future__ import annotations

import importlib
import itertools
import pkgutil
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

import loaders
from loaders import index_file, sources, subsets
from loaders.augment import augmenter
from loaders.config import PathText, Request, Strict
from loaders.contract import HostBatch, Options, Order, on_device
from loaders.errors import DataError
from loaders.features import FeatureCache
from loaders.index import Index
from loaders.machine import cores
from loaders.order import VERSION
from loaders.readahead import read_ahead
from loaders.sampler import EvalPositions, Stream, TrainPositions
from loaders.views import View
from loaders.voc import EXPECTED as DEVKIT

SUFFIX = "_loader"
AUTO = "auto"
"""The value of `data.backend` that stands for the best back end of this machine."""


def backends() -> list[str]:
    """Names that `data.backend` can take."""
    names = (module.name for module in pkgutil.iter_modules(loaders.__path__))
    return sorted(name.removesuffix(SUFFIX) for name in names if name.endswith(SUFFIX))


def load(backend: str) -> ModuleType:
    """Return the module of a back end, with its `Options`.

    Raises:
        KeyError: no file of that name.
    """
    if backend not in backends():
        raise KeyError(backend)
    return importlib.import_module(f"loaders.{backend}{SUFFIX}")


def choose(on_gpu: bool, root: Path | None) -> str:
    """The back end that `data.backend: auto` means on this machine.

    Args:
        on_gpu: whether a GPU trains.
        root: the training images, as far as they are known.
    """
    wanted = {name: load(name).Options.preference(on_gpu, root) for name in backends()}
    ranked = sorted((name for name in wanted if wanted[name]), key=lambda name: -wanted[name])
    return next(name for name in ranked if not load(name).Options.missing())


Positive = Annotated[float, Field(gt=0)]


class DataConfig(Strict):
    """The `data` section of a recipe."""

    backend: str = AUTO
    """A file of `loaders/`, or `auto`: the fastest that this machine has for these data; the run says which."""
    train: PathText | None = None
    """Training images: a folder of images, flat, with one folder per class or a tree of any depth; a list file
    (`<image>` or `<image> <class>` on each line); tar shards or Parquet files (a folder of them, or a pattern such as
    `shards/*.tar`); a `.beton` file; splits of a PASCAL VOC kit (`VOCdevkit#2007_trainval+2012_trainval`); or an
    `.index` file of `tools/make_index.py`."""
    val: PathText | None = None
    """The same for validation, with labels."""
    hold_out: float | None = Field(default=None, gt=0, lt=1)
    """This share of the training images of each class is held out (`loaders/subsets.py`): no step trains on them, and
    evaluations with `split: held_out` measure on them. The draw is the same for every seed of a run."""
    labels: Literal["auto", "none"] | None = None
    """Of `train` and `val`. `none`: no image has a label, and nothing of the layout is taken for one. `auto`: labels as
    the layout has them. Not set, it is `auto`, but that a folder with both images and folders of images is refused."""
    expect_images: int | None = Field(default=None, ge=1)
    """Number of training images the recipe was written for, those in quarantine included: a data set of another
    size is refused."""
    batch_size: int = Field(ge=1)
    """Images per optimizer step, over all ranks and accumulation steps."""
    micro_batch: int = Field(ge=1)
    """Images per rank and forward; what BatchNorm sees. Accumulation steps follow from it."""
    views: tuple[View, ...] = Field(min_length=1)
    eval_view: View
    eval_batch: int = Field(default=256, ge=1)
    """Images per rank and forward in evaluations."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)
    order: Literal["full", "blocks"] = "full"
    """`full`: in an epoch any image may come at any time. `blocks`: few shards at a time (or runs of rows, where there
    are no shards), for disks and networks that are slow at random places."""
    window: int = Field(default=8, ge=1)
    """With `order: blocks`, the number of blocks whose images are mixed."""
    fixed_views: int | None = Field(default=None, ge=1)
    """Every image has this many fixed draws of its views; epoch e shows number e mod `fixed_views`."""
    teacher_cache: PathText | None = None
    """Folder of `tools/cache_teacher.py`: the frozen network's features of each of the `fixed_views`, read in place of
    running it."""
    on_bad_image: Literal["stop", "replace"] = "stop"
    """A training image that cannot be decoded ends the run, or gives way to its successor in the order.
    Evaluations leave such images out and say how many they measured."""
    quarantine: PathText | None = None
    """List of images to leave out, of training and validation alike, as `tools/scan_images.py` writes it."""
    max_pixels: int = Field(default=100_000_000, ge=1)
    """An image with more pixels counts as one that cannot be decoded."""
    workers: int | None = Field(default=None, ge=0)
    """Decoding threads or processes per rank; by default the machine's cores divided by its ranks."""
    options: Options

    @field_validator("views", mode="before")
    @classmethod
    def _repeat(cls, value: Any) -> Any:
        # `{preset: swav_small, repeat: 6}` stands for six views.
        if not isinstance(value, list | tuple):
            return value
        views: list[Any] = []
        for number, view in enumerate(value):
            times = view.get("repeat", 1) if isinstance(view, dict) else 1
            if type(times) is not int or not 1 <= times <= 64:
                raise ValueError(f"{number}.repeat: expected a whole number from 1 to 64, got {times!r}")
            content = {k: v for k, v in view.items() if k != "repeat"} if isinstance(view, dict) else view
            views += [content] * times
        return tuple(views)

    @model_validator(mode="after")
    def _consistent(self) -> DataConfig:
        if self.batch_size % self.micro_batch:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of micro_batch {self.micro_batch}")
        if self.teacher_cache is not None and self.fixed_views is None:
            raise ValueError("teacher_cache: expected fixed_views with it, as many as the cache was made with")
        if self.eval_view.crop == "random":
            raise ValueError("eval_view: expected crop: center or whole, evaluations draw nothing")
        return self


def with_backend(config: DataConfig, backend: str, **changes: Any) -> DataConfig:
    """The same data through another back end, with its default options where it is not the config's own."""
    options = config.options if backend == config.backend else load(backend).Options()
    return config.model_copy(update={"backend": backend, "options": options, **changes})


def on_noise(config: DataConfig, *, num_images: int, num_classes: int, side: int) -> DataConfig:
    """The same views of images that need no files, for benchmarks."""
    from loaders.synthetic_loader import Options as Synthetic

    boxes = config.options.gives_boxes
    options = Synthetic(num_images=num_images, num_classes=num_classes, side=side, with_boxes=boxes)
    changes = {"backend": "synthetic", "options": options, "expect_images": None, "teacher_cache": None}
    return config.model_copy(update=changes)


def why_unusable(config: DataConfig) -> dict[str, str]:
    """Every back end -> "" or why it cannot stand in for the config's own on this machine."""
    reasons = {}
    for name in backends():
        options = config.options if name == config.backend else load(name).Options()
        if options.reads_files and not config.options.reads_files:
            reasons[name] = "the recipe's data set has no files"
        elif config.options.reads_files and not options.reads_files:
            reasons[name] = "its images are not those of the data set"
        elif options.gives_boxes != config.options.gives_boxes:
            reasons[name] = "gives boxes" if options.gives_boxes else "gives no boxes"
        else:
            reasons[name] = (options.refuses(Path(config.train)) if config.train else "") or options.missing()
    return reasons


class Place(NamedTuple):
    """Where a loader works: one of the ranks of a run."""

    rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    """Ranks on this machine, which share its cores."""
    device: torch.device = torch.device("cpu")


ALONE = Place()


class Batch(NamedTuple):
    """One micro-batch, ready for the network."""

    views: list[Tensor]  # V x [B, 3, size, size], normalized, channels_last, on the device; neighboring views of one
    # size are adjacent in memory
    label: Tensor | None  # int64 [B], or boxes as in `HostBatch`, on the device; None where the data set has no labels
    rows: Tensor  # int64 [B], rows of the index, on the host
    features: Tensor | None = None  # float32 [V, B, D] of `data.teacher_cache`, on the device; None without one


class Loader:
    """Batches of one rank; endless for training, one pass for evaluation.

    On a GPU all that happens to a batch happens in a stream of its own, beside the step before: copies, what the back
    end does there, and the augmentation.

    Args:
        dtype: of the views, those of `run.amp`: half the bytes to write, and to read again.
        cache: what the batches' `features` are read from.

    Attributes:
        bad: path -> reason of every image that was replaced or left out so far.
    """

    def __init__(
        self,
        batches: Iterator[HostBatch],
        config: DataConfig,
        stream: Stream,
        device: torch.device,
        *,
        stops: bool,
        dtype: torch.dtype = torch.float32,
        cache: FeatureCache | None = None,
    ) -> None:
        self.cache = cache
        self._batches, self._stream, self._device, self._stops = batches, stream, device, stops
        self._mean = torch.tensor(config.mean, device=device, dtype=torch.float32)
        self._std = torch.tensor(config.std, device=device, dtype=torch.float32)
        self._augment, self._dtype = augmenter(device), dtype
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.bad: dict[str, str] = {}

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._side is None:
            return self._next()
        current = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._side):
            batch = self._next()
        current.wait_stream(self._side)
        for tensor in (*batch.views, batch.label, batch.features):
            if tensor is not None:
                tensor.record_stream(current)  # its memory is the other stream's, and in use until this one is through
        return batch

    def _next(self) -> Batch:
        batch = next(self._batches)
        if batch.bad:
            if self._stops:
                path, reason = batch.bad[0]
                raise DataError(
                    f"{path}: {reason}; remove or repair it, or set data.on_bad_image=replace to continue without it"
                )
            self.bad.update(batch.bad)
        color = on_device(batch.color, self._device)
        label = None if batch.label is None else on_device(batch.label, self._device)
        views: list[Tensor] = []
        for group, crops in zip(self._stream.groups, batch.crops, strict=True):
            # The views of one size are one batch of k·B images, with one call of every operator.
            images = on_device(crops, self._device).flatten(0, 1)
            # A slice: a list of numbers as index of a CUDA tensor would wait for the device.
            drawn = color[:, group[0] : group[-1] + 1].transpose(0, 1).flatten(0, 1)
            of_group = [self._stream.views[number] for number in group]
            augmented = self._augment(images, drawn, of_group, self._mean, self._std, dtype=self._dtype)
            views += augmented.chunk(len(group))
        features = None
        if self.cache is not None and batch.features is not None:
            features = self.cache.features(on_device(batch.features, self._device))
        return Batch(views, label, batch.rows, features)

    def close(self) -> None:
        """Free the back end's threads, processes and memory."""
        if hasattr(self._batches, "close"):
            self._batches.close()
        self._batches = iter(())  # torch's DataLoader ends its workers when its iterator goes


class _WithFeatures:
    """The batches of a back end with what a cache has of their images and draws."""

    def __init__(
        self, batches: Iterator[HostBatch], positions: Iterable[list[int]], stream: Stream, cache: FeatureCache
    ) -> None:
        self._batches, self._positions, self._stream, self._cache = batches, iter(positions), stream, cache

    def __iter__(self) -> Iterator[HostBatch]:
        return self

    def __next__(self) -> HostBatch:
        batch = next(self._batches)
        draws = self._stream.draws_of(next(self._positions), batch.rows.numpy())
        return batch._replace(features=self._cache.read(batch.rows, draws))

    def close(self) -> None:
        if hasattr(self._batches, "close"):
            self._batches.close()
        self._batches = iter(())
        self._cache.close()


def open_data(config: DataConfig, split: Literal["train", "held_out", "val"], *, for_labels: str = "") -> Index:
    """Index a split of the data set. Of scenes, those without objects are left out of training: they show no class.

    Args:
        split: with `hold_out` the training images are two: those that train, and those that are held out.
        for_labels: what will use the labels, for the message where there are none; "" if nothing does.

    Raises:
        DataError: it is not named, missing, not laid out as expected, smaller than one training batch, or without
            labels though they are asked for.
    """
    key: Literal["train", "val"] = "val" if split == "val" else "train"
    if not config.options.reads_files:
        return _part(config, split, config.options.open_index(key))
    root = getattr(config, key)
    if not root:
        raise DataError(f"data.{key}: not set; expected a folder of images, or what else data.{key} takes")
    index = _part(config, split, open_root(config, root, labels=config.labels, for_labels=for_labels))
    if split == "train" and config.options.gives_boxes and index.objects is not None:
        shown = np.unique(index.objects.image)
        index = index if len(shown) == len(index) else index.take(shown)
    if split == "train" and len(index) < config.batch_size:
        raise DataError(
            f"{root}: {len(index)} images are fewer than data.batch_size {config.batch_size}; "
            "expected at least one batch"
        )
    return index


def _part(config: DataConfig, split: str, index: Index) -> Index:
    """What of an index belongs to a split."""
    if split == "val" or config.hold_out is None:
        return index
    part = index.take(np.flatnonzero(subsets.held_out(index, config.hold_out) == (split == "held_out")))
    return part if index.file is None else index_file.stored(part, None)  # mapped by all ranks of the machine


def open_root(
    config: DataConfig, root: str, *, labels: Literal["auto", "none"] | None = None, for_labels: str = ""
) -> Index:
    """Index any data set.

    Args:
        config: what is left out, and what is too large.
        labels: as `data.labels`.
        for_labels: what will use the labels, for the message where there are none; "" if nothing does.

    Raises:
        DataError: it is missing or not laid out as expected, or has no labels though they are asked for.
    """
    quarantine = Path(config.quarantine) if config.quarantine else None
    has_boxes = config.options.gives_boxes
    request = Request(config.max_pixels, labels, asks_labels=bool(for_labels) or has_boxes)
    index = sources.open_index(Path(root), request, quarantine=quarantine)
    if has_boxes and index.objects is None:
        raise DataError(f"{root}: has no boxes, which data.backend={config.backend} gives; expected {DEVKIT}")
    if for_labels and not has_boxes and not index.is_labeled:
        one = f"is all of one class, {index.classes[0]!r}" if len(index.classes) == 1 else "has no labels"
        if index.objects is not None:
            one = "has several classes in an image"
        if labels == "none":
            one = "has no labels, as data.labels says"
        raise DataError(
            f"{root}: {one}, and {for_labels} needs labels; expected one folder of images per class, or a list or "
            "shards with labels"
        )
    return index


class IndexPlace(NamedTuple):
    """What another process of this machine needs to map an index."""

    file: Path
    root: Path
    files: list[bytes] | None


def place_of(index: Index) -> IndexPlace | None:
    """Where an index can be mapped from; None if it lies in this process alone."""
    if index.file is None:
        return None
    return IndexPlace(index.file.absolute(), index.root, index.pieces.files if index.pieces else None)


def map_index(config: DataConfig, place: IndexPlace) -> Index:
    """The index that another process of this machine has opened."""
    index = index_file.open_file(place.file, max_pixels=config.max_pixels, trusted=True)
    return index.at(place.root, place.files)


def workers_per_rank(config: DataConfig, local_world_size: int) -> int:
    """Threads or processes that one rank may use for decoding."""
    if config.workers is not None:
        return config.workers
    return max(1, cores() // local_world_size)


def warnings(config: DataConfig, local_world_size: int) -> list[str]:
    """What may go wrong on this machine though nothing is missing, each with what to do."""
    workers = workers_per_rank(config, local_world_size) * local_world_size
    return config.options.warnings(config.views, config.micro_batch, workers)


def notes(config: DataConfig, device: torch.device) -> list[str]:
    """What a run should say once of how its images are read on this device."""
    return config.options.notes(device)


def open_train(
    config: DataConfig,
    index: Index,
    *,
    seed: int,
    step: int = 0,
    place: Place = ALONE,
    dtype: torch.dtype | None = None,
    version: int = VERSION,
) -> Loader:
    """Endless training batches of one rank from optimizer step `step` on, `batch_size / (micro_batch ·
    world_size)` of them per step; views in `dtype`, float32 by default.

    Args:
        version: of the stream, `order.VERSION` or that of an older run.

    Raises:
        DataError: the back end is not installed.
    """
    window = config.window if config.order == "blocks" else None
    stream = Stream(index, config.views, seed, version=version, window=window, fixed_views=config.fixed_views)
    positions = TrainPositions(
        batch_size=config.batch_size,
        micro_batch=config.micro_batch,
        rank=place.rank,
        world_size=place.world_size,
        step=step,
        arrange=partial(config.options.arrange, stream),
    )
    cache = FeatureCache.open(Path(config.teacher_cache)) if config.teacher_cache else None
    return _open(config, stream, positions, place, training=True, dtype=dtype, cache=cache)


def open_fixed(
    config: DataConfig,
    index: Index,
    parts: Sequence[tuple[int, Sequence[int]]],
    *,
    seed: int,
    place: Place = ALONE,
    dtype: torch.dtype | None = None,
) -> Loader:
    """The very views that training with `fixed_views` draws, in another order: a batch for each part.

    Args:
        parts: number of the draw, rows of the index. What cannot be decoded is left out where the config replaces it.

    Raises:
        DataError: as `open_train`.
    """
    stream = Stream(index, config.views, seed, shuffled=False, fixed_views=config.fixed_views)
    positions = [[draw * len(index) + row for row in rows] for draw, rows in parts]
    return _open(config, stream, positions, place, training=True, replaces=False, dtype=dtype)


def open_resident(
    config: DataConfig, index: Index, *, count: int, seed: int, place: Place = ALONE, dtype: torch.dtype | None = None
) -> Loader:
    """`open_train` over the crops of its first `count` micro-batches, which stay on the device and take turns: only the
    augmentation is done anew each time. For benchmarks."""
    loader = open_train(config, index, seed=seed, place=place, dtype=dtype)
    batches = [next(loader._batches) for _ in range(count)]
    loader.close()
    kept = [
        batch._replace(
            crops=[on_device(crop, place.device) for crop in batch.crops],
            color=on_device(batch.color, place.device),
            label=None if batch.label is None else on_device(batch.label, place.device),
            features=None if batch.features is None else on_device(batch.features, place.device),
        )
        for batch in batches
    ]
    if place.device.type == "cuda":
        torch.cuda.synchronize(place.device)  # copied in this stream, used in the loader's
    loader._batches = itertools.cycle(kept)
    return loader


def open_eval(config: DataConfig, index: Index, *, rows: Sequence[int] | None = None, place: Place = ALONE) -> Loader:
    """One pass over the data set (or `rows` of it) in its own order, with the evaluation view: every image
    exactly once over all ranks, without what cannot be decoded."""
    stream = Stream(index, (config.eval_view,), seed=0, shuffled=False)
    positions = EvalPositions(
        range(len(index)) if rows is None else rows,
        batch_size=config.eval_batch,
        rank=place.rank,
        world_size=place.world_size,
    )
    return _open(config, stream, positions, place, training=False)


def _open(
    config: DataConfig,
    stream: Stream,
    positions: Iterable[list[int]],
    place: Place,
    *,
    training: bool,
    replaces: bool = True,
    dtype: torch.dtype | None = None,
    cache: FeatureCache | None = None,
) -> Loader:
    order = Order(
        stream,
        read_ahead(stream, positions),
        replace=training and replaces and config.on_bad_image == "replace",
        workers=workers_per_rank(config, place.local_world_size),
        device=place.device,
        fill=tuple(round(255 * share) for share in config.mean),  # type: ignore[arg-type]
    )
    batches = config.options.batches(order)
    if cache is not None:
        batches = _WithFeatures(batches, positions, stream, cache)
    stops = training and config.on_bad_image == "stop"
    return Loader(batches, config, stream, place.device, stops=stops, dtype=dtype or torch.float32, cache=cache)
