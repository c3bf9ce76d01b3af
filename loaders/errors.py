"""What can be wrong with data, the whole set or one image of it, and with the machine that loads it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class DataError(ValueError):
    """Data that cannot be used; one line that names the path, what was expected and what to do."""

    exit_code = 2


class LoaderError(RuntimeError):
    """Something of the machine that a loader needs failed: a decoder, its memory, one of its processes. Not a fault of
    any image."""

    exit_code = 6


class BadImage(Exception):
    """One image that cannot be decoded; the message is the reason, without the path."""


@contextmanager
def starting(what: str) -> Iterator[None]:
    """Around the start of threads or processes, of which a system allows only so many.

    Raises:
        LoaderError: it refuses another one.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise LoaderError(
            f"{what} cannot be started: {reason}; lower data.workers, or raise the limits of processes and open files "
            "(ulimit -u, ulimit -n, a container's pids limit)"
        ) from None
