"""Back end `turbo`: our own compiled core over libjpeg-turbo, for machines that decode on the CPU.

It decodes the union of all windows once and cuts every view from it; see `turbo.c`. Images that are not JPEG, and
those that the core gives up on, are done on the host as in the `folder` back end.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pydantic import Field

from loaders import contract, core, turbo
from loaders.contract import HostBatch, Order
from loaders.errors import DataError


class Options(contract.Options):
    """`data.options` of this back end."""

    prefetch: int = Field(default=2, ge=1)
    """Micro-batches that are worked on ahead of the one in use."""

    @classmethod
    def missing(cls) -> str:
        """The compiled core is optional."""
        reason = core.why_missing()
        return f"turbo: {reason}, or set data.backend=folder" if reason else ""

    @classmethod
    def preference(cls, on_gpu: bool, root: Path | None) -> int:
        """The fastest on a CPU."""
        return 2

    @classmethod
    def about(cls) -> str:
        """Which decoder and which code path."""
        path = "AVX2" if core.use_vectors(True) else "plain (no AVX2)"
        return f"works: libjpeg-turbo {core.libjpeg_version()}, {path}"

    @classmethod
    def versions(cls) -> dict[str, str]:
        """Of the decoder."""
        return {} if core.why_missing() else {"libjpeg-turbo": core.libjpeg_version()}

    def batches(self, order: Order) -> Iterator[HostBatch]:
        """See `contract.Options`."""
        if problem := self.missing():
            raise DataError(f"data.backend: {problem}")
        return turbo.Batches(order, prefetch=self.prefetch)
