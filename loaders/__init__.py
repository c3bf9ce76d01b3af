"""The data: from files to augmented batches on the device. Imports torch and itself only.

`open_train` and `open_eval` are what the engine calls; a back end is one file (see `loaders.contract`).
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import Tensor

from loaders.augment import augmenter
from loaders.contract import HostBatch, Options
from loaders.index import DataError, Index, SyntheticIndex, open_index
from loaders.sampler import EvalPositions, Stream, TrainPositions
from loaders.views import View, groups

SUFFIX = "_loader"


def backends() -> list[str]:
    """Names that `data.backend` can take."""
    found = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(name.removesuffix(SUFFIX) for name in found if name.endswith(SUFFIX))


def load(backend: str) -> ModuleType:
    """Return the module of a back end, with its `Options` and `open`.

    Raises:
        KeyError: no file of that name.
    """
    if backend not in backends():
        raise KeyError(backend)
    return importlib.import_module(f"loaders.{backend}{SUFFIX}")


Positive = Annotated[float, Field(gt=0)]


class DataConfig(BaseModel):
    """The `data` section of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    backend: str
    train: str | None = None
    """Training images: a folder with one folder per class, a list file (`<image> <class>` on each line), tar shards
    (a folder of them, or a pattern such as `shards/*.tar`), or a `.beton` file."""
    val: str | None = None
    """The same for validation."""
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
    on_bad_image: Literal["stop", "replace"] = "stop"
    """A training image that cannot be decoded ends the run, or gives way to its successor in the order.
    Evaluations leave such images out and say how many they measured."""
    quarantine: str | None = None
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
        if self.eval_view.crop != "center":
            raise ValueError("eval_view: expected crop: center, evaluations draw nothing")
        return self


class Batch(NamedTuple):
    """One micro-batch, ready for the network."""

    views: list[Tensor]  # V x float32 [B, 3, size, size], normalised, channels_last, on the device; neighbouring
    # views of one size lie behind each other in memory
    label: Tensor  # int64 [B], on the device
    rows: Tensor  # int64 [B], rows of the index, on the host


class Loader:
    """Batches of one rank; endless for training, one pass for evaluation.

    Attributes:
        bad: path -> reason of every image that was replaced or left out so far.
    """

    def __init__(
        self,
        batches: Iterator[HostBatch],
        config: DataConfig,
        views: Sequence[View],
        device: torch.device,
        *,
        stops: bool,
    ) -> None:
        self._batches, self.views, self.device, self._stops = batches, views, device, stops
        self._mean = torch.tensor(config.mean, device=device, dtype=torch.float32)
        self._std = torch.tensor(config.std, device=device, dtype=torch.float32)
        self._groups = groups(views)
        self._augment = augmenter(device)
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.bad: dict[str, str] = {}

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = next(self._batches)
        if batch.bad:
            if self._stops:
                path, reason = batch.bad[0]
                raise DataError(
                    f"{path}: {reason}; remove or repair it, or set data.on_bad_image=replace to go on without it"
                )
            self.bad.update(batch.bad)
        batch = self._on_device(batch)
        views: list[Tensor] = []
        for group, crops in zip(self._groups, batch.crops, strict=True):
            # The views of one size are one batch of k·B images, with one call of every operator.
            images = crops.flatten(0, 1)
            drawn = batch.color[:, group].transpose(0, 1).flatten(0, 1)
            of_group = [self.views[number] for number in group]
            views += self._augment(images, drawn, of_group, self._mean, self._std).chunk(len(group))
        return Batch(views, batch.label, batch.rows)

    def _on_device(self, batch: HostBatch) -> HostBatch:
        """The batch on the device; on a GPU its copy runs in a stream of its own, beside the step before."""
        if self._copies is None:
            return batch
        with torch.cuda.stream(self._copies):
            crops = [self._to_device(crop) for crop in batch.crops]
            color, label = self._to_device(batch.color), self._to_device(batch.label)
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._copies)
        for tensor in (*crops, color, label):
            tensor.record_stream(current)  # its memory is the other stream's, and in use until this one is through
        return batch._replace(crops=crops, color=color, label=label)

    def _to_device(self, tensor: Tensor) -> Tensor:
        # Only a copy from pinned memory leaves the host free to go on.
        if self.device.type == "cuda" and not tensor.is_cuda and not tensor.is_pinned():
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def close(self) -> None:
        """Free the back end's threads, processes and memory."""
        if hasattr(self._batches, "close"):
            self._batches.close()
        self._batches = iter(())  # torch's DataLoader ends its workers when its iterator goes


def open_data(config: DataConfig, split: Literal["train", "val"]) -> Index:
    """Index a split of the data set.

    Raises:
        DataError: it is not named, missing, not laid out as expected, or smaller than one training batch.
    """
    if config.backend == "synthetic":
        options: Any = config.options
        count = options.num_images if split == "train" else options.num_val_images
        return SyntheticIndex(count, options.num_classes, options.side)
    root = getattr(config, split)
    if root is None:
        raise DataError(f"data.{split}: not set; expected a folder with one folder of images per class")
    quarantine = Path(config.quarantine) if config.quarantine else None
    index = open_index(Path(root), max_pixels=config.max_pixels, quarantine=quarantine)
    if split == "train" and len(index) < config.batch_size:
        raise DataError(
            f"{root}: {len(index)} images are fewer than data.batch_size {config.batch_size}; "
            "expected at least one batch"
        )
    return index


def workers_per_rank(config: DataConfig, local_world_size: int) -> int:
    """Threads or processes that one rank may use for decoding."""
    if config.workers is not None:
        return config.workers
    return max(1, len(os.sched_getaffinity(0)) // local_world_size)


def warnings(config: DataConfig, local_world_size: int) -> list[str]:
    """What may go wrong on this machine though nothing is missing, each with what to do."""
    if config.backend != "folder":
        return []
    workers = workers_per_rank(config, local_world_size) * local_world_size
    image = sum(3 * view.size**2 for view in config.views)
    needed = workers * (config.options.prefetch + 1) * config.micro_batch * image  # type: ignore[attr-defined]
    room = shutil.disk_usage("/dev/shm").free
    if needed <= room:
        return []
    return [
        f"/dev/shm has {room / 2**20:.0f} MiB free, the {workers} workers may need {needed / 2**20:.0f} and would end "
        "with a bus error; start docker with --shm-size 16g, lower data.workers, or set data.backend=turbo"
    ]


def open_train(
    config: DataConfig,
    index: Index,
    *,
    seed: int,
    step: int,
    rank: int,
    world_size: int,
    local_world_size: int,
    device: torch.device,
) -> Loader:
    """Endless training batches of one rank from optimizer step `step` on, `batch_size / (micro_batch ·
    world_size)` of them per step.

    Raises:
        DataError: the back end is not installed.
    """
    stream = Stream(index, config.views, seed)
    positions = TrainPositions(
        batch_size=config.batch_size,
        micro_batch=config.micro_batch,
        rank=rank,
        world_size=world_size,
        step=step,
    )
    return _open(config, stream, positions, local_world_size, device, training=True)


def open_eval(
    config: DataConfig,
    index: Index,
    *,
    rows: Sequence[int] | None = None,
    rank: int,
    world_size: int,
    local_world_size: int,
    device: torch.device,
) -> Loader:
    """One pass over the data set (or `rows` of it) in its own order, with the evaluation view: every image
    exactly once over all ranks, without what cannot be decoded."""
    stream = Stream(index, (config.eval_view,), seed=0, shuffled=False)
    positions = EvalPositions(
        range(len(index)) if rows is None else rows,
        batch_size=config.eval_batch,
        rank=rank,
        world_size=world_size,
    )
    return _open(config, stream, positions, local_world_size, device, training=False)


def _open(
    config: DataConfig,
    stream: Stream,
    positions: Iterable[list[int]],
    local_world_size: int,
    device: torch.device,
    *,
    training: bool,
) -> Loader:
    batches = load(config.backend).open(
        stream,
        positions,
        replace=training and config.on_bad_image == "replace",
        workers=workers_per_rank(config, local_world_size),
        device=device,
        options=config.options,
    )
    return Loader(batches, config, stream.views, device, stops=training and config.on_bad_image == "stop")
