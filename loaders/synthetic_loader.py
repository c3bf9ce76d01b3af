"""Back end `synthetic`: images drawn from their number, in the training process. For tests and dry benchmarks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from pydantic import Field

from loaders.contract import HostBatch
from loaders.contract import Options as BaseOptions
from loaders.folder_loader import load_batch
from loaders.sampler import Stream


class Options(BaseOptions):
    """`data.options` of this back end."""

    num_images: int = Field(default=1024, ge=1)
    num_val_images: int = Field(default=256, ge=1)
    num_classes: int = Field(default=10, ge=2)
    side: int = Field(default=256, ge=1)


def missing() -> str:
    """Nothing: this back end runs everywhere."""
    return ""


def open(
    stream: Stream,
    positions: Iterable[list[int]],
    *,
    replace: bool,
    workers: int,
    device: torch.device,
    options: Options,
) -> Iterator[HostBatch]:
    """See `loaders.contract`."""
    return (load_batch(stream, chunk, replace=replace) for chunk in positions)
