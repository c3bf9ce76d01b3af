"""The compiled core (`turbo.c`) as a library: crops for the back ends, headers for the index.

It is built when the package is installed, if a C compiler and libjpeg-turbo's headers are there; `why_missing` says
what to do where it is not.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

_ABI = 3
HOW_TO_BUILD = (
    "run `apt-get install gcc libjpeg62-turbo-dev` (libjpeg-turbo8-dev on Ubuntu, libjpeg-turbo-devel on Fedora) and "
    "then `pip install --editable .` again"
)


@functools.cache
def load() -> tuple[Any, str]:
    """The library, or None and why there is none."""
    files = sorted(Path(__file__).parent.glob("_turbo*.so"))
    if not files:
        return None, f"the compiled core was not built; {HOW_TO_BUILD}"
    try:
        library = ctypes.CDLL(str(files[0]))
    except OSError as error:
        return None, f"the compiled core cannot be loaded ({error}); {HOW_TO_BUILD}"
    if library.turbo_abi() != _ABI:
        return None, "the compiled core is from another version; run `pip install --editable .` again"
    library.turbo_workspace.restype = ctypes.c_void_p
    library.turbo_free.argtypes = [ctypes.c_void_p]
    library.turbo_run.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    library.turbo_headers.argtypes = [ctypes.c_void_p]
    library.turbo_vectors(1)
    return library, ""


def why_missing() -> str:
    """Why the core cannot be used here, and what to do; "" if it can."""
    return load()[1]


def use_vectors(wanted: bool) -> bool:
    """Choose the vector path of the core or its plain one, which give the same pixels; whether it is the vector one."""
    return bool(load()[0].turbo_vectors(int(wanted)))


def libjpeg_version() -> str:
    """Of libjpeg-turbo, as `2.1.5`."""
    number = load()[0].turbo_libjpeg()
    return f"{number // 1_000_000}.{number // 1000 % 1000}.{number % 1000}"
