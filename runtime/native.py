"""The compiled core (`core.c`) as a library: the same numbers as `reference.py`, fast.

It is built when the package is installed, if there is a C compiler; `why_missing` says what to do where it is not.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.bnn import DEFAULT, BnnError, Limits, check_images

_ABI = 1
_MESSAGE = 200  # bytes of a message
_REFUSED, _NO_MEMORY = 1, 2
_BYTES, _FLOATS = 0, 1  # kinds of images
MAX_THREADS = 64
HOW_TO_BUILD = "run `apt-get install gcc` and then `pip install` again"


class _Limits(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint32) for name in ("side", "channels", "records")),
        *((name, ctypes.c_uint64) for name in ("macs", "memory")),
    )


@functools.cache
def _load() -> tuple[Any, str]:
    """The library, or None and why there is none."""
    files = sorted(Path(__file__).parent.glob("_core*.so"))
    if not files:
        return None, f"the compiled core was not built; {HOW_TO_BUILD}"
    try:
        library = ctypes.CDLL(str(files[0]))
    except OSError as error:
        return None, f"the compiled core cannot be loaded ({error}); {HOW_TO_BUILD}"
    if library.bnn_abi() != _ABI:
        return None, "the compiled core is from another version; run `pip install` again"
    pointer, number = ctypes.c_void_p, ctypes.c_int32
    library.bnn_usable.restype = ctypes.c_char_p
    library.bnn_kernels.argtypes = [ctypes.c_char_p]
    library.bnn_open.argtypes = [ctypes.c_char_p, ctypes.c_size_t, pointer, pointer, ctypes.c_char_p]
    library.bnn_workspace_new.restype = pointer
    for name, arguments in {
        "bnn_close": [pointer],
        "bnn_side": [pointer],
        "bnn_layers": [pointer],
        "bnn_feature_layers": [pointer],
        "bnn_shape": [pointer, number, pointer],
        "bnn_workspace_new": [pointer, number],
        "bnn_workspace_free": [pointer],
        "bnn_prepare": [pointer, pointer, pointer, number, number, number, pointer],
        "bnn_join": [pointer],
    }.items():
        getattr(library, name).argtypes = arguments
    return library, ""


def why_missing() -> str:
    """Why the core cannot be used here, and what to do; "" if it can."""
    return _load()[1]


def kernels() -> list[str]:
    """Names of the kernels that this CPU can run, the fastest first."""
    names: list[str] = []
    while _load()[0] and (name := _load()[0].bnn_usable(len(names))):
        names.append(name.decode())
    return names


_names = kernels  # an argument below has that name
_choice = threading.Lock()  # of kernels, which the core keeps for the next network


class Net:
    """A network in the core. Threads may share it."""

    def __init__(self, content: bytes, kernels: str | None = None, *, limits: Limits = DEFAULT) -> None:
        """Unpack a file's content, which is not kept, for the kernels of that name or the fastest.

        Raises:
            BnnError: the content is refused, or the CPU cannot run the kernels.
            MemoryError: there is not enough.
        """
        self._library, missing = _load()
        if missing:
            raise BnnError(missing)
        self._handle = ctypes.c_void_p()
        message = ctypes.create_string_buffer(_MESSAGE)
        with _choice:
            names = _names()
            self.kernels = kernels or names[0]
            if not self._library.bnn_kernels(self.kernels.encode()):
                raise BnnError(f"kernels {self.kernels!r}: expected one that this CPU can run, {', '.join(names)}")
            status = self._library.bnn_open(
                content, len(content), ctypes.byref(_Limits(*limits)), ctypes.byref(self._handle), message
            )
        if status == _NO_MEMORY:
            raise MemoryError("a network's arrays")
        if status == _REFUSED:
            raise BnnError(message.value.decode())
        self.side: int = self._library.bnn_side(self._handle)
        self.layers: int = self._library.bnn_layers(self._handle)
        self.feature_layers: int = self._library.bnn_feature_layers(self._handle)
        self._lock = threading.Lock()
        self._calls, self._closed = 0, False
        self._spare: dict[int, list[int]] = {}  # workspaces by their number of threads
        self._pool = ThreadPoolExecutor(MAX_THREADS, "bnn")  # starts none before it is needed

    def run(self, images: NDArray[Any], threads: int = 1, features: bool = False) -> NDArray[np.float32]:
        """Images, uint8 [B, S, S, 3] or normalized float32 [B, 3, S, S], to outputs or features [B, n].

        Raises:
            BnnError: images of another shape or type, a number of threads that is not from 1 to 64, a closed network.
            MemoryError: there is not enough.
        """
        return self.stream(images, self.feature_layers if features else self.layers, threads)

    def stream(self, images: NDArray[Any], upto: int, threads: int = 1) -> NDArray[np.float32]:
        """What the first `upto` layers make of images, a map [B, H, W, C] or [B, C] after the mean; raises as `run`."""
        assert 0 < upto <= self.layers
        check_images(images, self.side)
        kind = _BYTES if images.dtype == np.uint8 else _FLOATS
        if not 1 <= threads <= MAX_THREADS:
            raise BnnError(f"threads: expected 1 to {MAX_THREADS}, got {threads}")
        images = np.ascontiguousarray(images)
        with self._workspace(threads) as workspace:
            sides = (ctypes.c_int32 * 3)()
            dimensions = self._library.bnn_shape(self._handle, upto, sides)
            out = np.empty((len(images), *sides[:dimensions]), np.float32)
            places = images.ctypes.data, kind, len(images), upto, out.ctypes.data
            self._library.bnn_prepare(self._handle, workspace, *places)
            company = [self._pool.submit(self._library.bnn_join, workspace) for _ in range(threads - 1)]
            try:
                self._library.bnn_join(workspace)
            finally:  # who has not started never will; who has uses the workspace
                wait([one for one in company if not one.cancel()])
        return out

    def close(self) -> None:
        """Give the memory back, once no call uses it any more; calls after that are refused."""
        with self._lock:
            self._closed = True
            if not self._calls:
                self._free()

    def __del__(self) -> None:
        """As `close`."""
        if hasattr(self, "_pool"):
            self.close()

    @contextmanager
    def _workspace(self, threads: int) -> Iterator[int]:
        with self._lock:
            if self._closed:
                raise BnnError("the network was closed")
            self._calls += 1
            spare = self._spare.get(threads)
            workspace = spare.pop() if spare else None
        try:
            workspace = workspace or self._library.bnn_workspace_new(self._handle, threads)
            if not workspace:
                raise MemoryError("a network's maps")
            yield workspace
        finally:
            with self._lock:
                if workspace:
                    self._spare.setdefault(threads, []).append(workspace)
                self._calls -= 1
                if self._closed and not self._calls:
                    self._free()

    def _free(self) -> None:
        self._pool.shutdown(wait=False)
        for workspaces in self._spare.values():
            for workspace in workspaces:
                self._library.bnn_workspace_free(workspace)
        self._spare.clear()
        self._library.bnn_close(self._handle)
        self._handle = ctypes.c_void_p()
