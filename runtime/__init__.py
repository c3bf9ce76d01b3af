"""Trained binary networks on a CPU, without PyTorch.

    network = Runtime("net.bnn")
    network.run(images)  # uint8 [B, S, S, 3] to float32 [B, classes]

`python -m runtime` does it for pictures.
"""

from __future__ import annotations

import functools
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime import bnn, native, reference
from runtime.bnn import BnnError

__all__ = ["BnnError", "Runtime"]

NUMPY = "numpy"
"""Instead of a name of kernels: `reference.py`, which needs no compiled core."""


class Runtime:
    """A network, opened once and then only read: any number of threads may call it.

    Args:
        path: a file that tools/export.py wrote.
        threads: how many work on a call.
        kernels: a name of `native.kernels()`, or "numpy"; None for what BNN_KERNELS says, else for the fastest here.
        limits: what a file may ask for; lower them for files that strangers bring.

    Raises:
        BnnError: what `bnn.read` refuses, kernels that this CPU cannot run, other than 1 to 64 threads.
        OSError: the file cannot be opened.
    """

    info: dict[str, Any]
    """The file's metadata, and `side` of the images, `outputs`, `features`, `bytes`, `kernels`, `threads`."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        threads: int = 1,
        kernels: str | None = None,
        limits: bnn.Limits = bnn.DEFAULT,
    ) -> None:
        if not 1 <= threads <= native.MAX_THREADS:
            raise BnnError(f"threads: expected 1 to {native.MAX_THREADS}, got {threads}")
        kernels = kernels or os.environ.get("BNN_KERNELS") or None
        if kernels is None and native.why_missing():
            _say_once(native.why_missing())
            kernels = NUMPY
        try:
            content = bnn.content_of(Path(path), limits=limits)
            network = bnn.read(content, limits=limits)
        except BnnError as error:
            raise BnnError(f"{path}: {error}") from None
        self._threads = threads
        # One of both, so that a file's arrays are in memory once.
        self._network = network if kernels == NUMPY else None
        self._net = None if kernels == NUMPY else native.Net(content, kernels, limits=limits)
        self.info = network.metadata | {
            "side": network.side,
            "outputs": network.outputs,
            "features": network.layers[network.feature_layers - 1].record.channels_out,
            "bytes": len(content),
            "kernels": NUMPY if self._net is None else self._net.kernels,
            "threads": threads,
        }

    def run(self, images: NDArray[Any]) -> NDArray[np.float32]:
        """Images, uint8 [B, S, S, 3] or normalized float32 [B, 3, S, S], to class scores [B, classes].

        Of a network without a classifier, its features.

        Raises:
            BnnError: images of another shape or type.
        """
        return self._answers(images, features=False)

    def features(self, images: NDArray[Any]) -> NDArray[np.float32]:
        """Images as `run` takes them to what the classifier sees [B, D]; raises as `run`."""
        return self._answers(images, features=True)

    def _answers(self, images: NDArray[Any], *, features: bool) -> NDArray[np.float32]:
        images = np.asarray(images)
        if self._net is not None:
            return self._net.run(images, self._threads, features)
        assert self._network is not None
        upto = self._network.feature_layers if features else len(self._network.layers)
        return reference.stream(self._network, images, upto)


@functools.cache
def _say_once(reason: str) -> None:
    logging.getLogger(__name__).warning("%s; until then numpy does the work, far slower", reason)
