"""Back end `turbo`: our own compiled core over libjpeg-turbo, for machines that decode on the CPU.

It decodes the union of all windows once and cuts every view from it; see `turbo.c`. Images that are not JPEG, and
those that the core gives up, are done on the host like in the `folder` back end.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from pydantic import Field

from loaders import turbo
from loaders.contract import HostBatch
from loaders.contract import Options as BaseOptions
from loaders.index import DataError
from loaders.sampler import Stream


class Options(BaseOptions):
    """`data.options` of this back end."""

    prefetch: int = Field(default=2, ge=1)
    """Micro-batches that are worked on ahead of the one in use."""


def open(
    stream: Stream,
    positions: Iterable[list[int]],
    *,
    replace: bool,
    workers: int,
    device: torch.device,
    options: Options,
) -> Iterator[HostBatch]:
    """See `loaders.contract`.

    Raises:
        DataError: the core was not built.
    """
    if problem := missing():
        raise DataError(problem)
    return turbo.Batches(stream, positions, replace=replace, workers=workers, device=device, prefetch=options.prefetch)


def missing() -> str:
    """What this machine lacks for the back end and what to do, or ""."""
    reason = turbo.why_missing()
    return f"data.backend: turbo: {reason}, or set data.backend=folder" if reason else ""
