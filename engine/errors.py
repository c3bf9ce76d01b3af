"""What can end a run or a tool, each with its exit code and one line of text."""

from __future__ import annotations

import sys
import traceback
from typing import ClassVar, TypeVar

from loaders import DataError, LoaderError
from models.weights import WeightsError

E = TypeVar("E", bound=BaseException)


class EngineError(Exception):
    """Base of the errors below: a tool prints the text and leaves with the code."""

    exit_code: ClassVar[int] = 1


class RecipeError(EngineError, ValueError):
    """A recipe, table or option that cannot be run; names the file, the key and what was expected."""

    exit_code = 2


class CheckpointError(EngineError, ValueError):
    """A checkpoint that cannot be written or used; names the file."""

    exit_code = 2


class NotFiniteState(CheckpointError):
    """The state to be saved holds a number that is not finite."""


class DeviceError(EngineError):
    """The device that a recipe asks for is not there."""

    exit_code = 2


class FolderError(EngineError):
    """A run folder that cannot be used: not writable, in use, or already with a run in it."""

    exit_code = 2


class RankError(EngineError):
    """What another rank could not do, so that this one stops too."""

    exit_code = 2

    def __init__(self, rank: int, text: str) -> None:
        super().__init__(f"rank {rank}: {text}")


class Ended(EngineError):
    """Another rank has ended the run, and says why; this one leaves with the same code."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.exit_code = code  # type: ignore[misc]


class MachineError(EngineError):
    """Something of the machine failed: memory ran out, a device or another process is lost."""

    exit_code = 6


class LostRank(MachineError):
    """Another rank is gone without a word, and with it a part of what a checkpoint holds; nothing is saved after it."""


class NotFinite(EngineError):
    """A loss, a gradient or the network is not finite; nothing was saved after it."""

    exit_code = 3


class Untrained(EngineError):
    """A parameter that should move has no gradient, or one that should not has one."""

    exit_code = 4


class NotSaved(EngineError):
    """The last checkpoint of a run, or the one saved on a signal, could not be written."""

    exit_code = 5


class Stopped(EngineError):
    """A signal asked the run to stop; the run is saved."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: start again with --resume


class NotEqual(EngineError):
    """Two variants of the step that should compute the same do not; nothing was timed."""


def shared(error: E) -> E:
    """Mark an error that every rank raises at the same place, so that nobody waits for anybody."""
    error.is_shared = True  # type: ignore[attr-defined]
    return error


def is_shared(error: BaseException) -> bool:
    """Whether every rank raises this."""
    return getattr(error, "is_shared", False)


def own(error: E) -> E:
    """Mark an error that this rank has to report, because no other does."""
    error.is_own = True  # type: ignore[attr-defined]
    return error


def is_own(error: BaseException) -> bool:
    """Whether only this rank reports this."""
    return getattr(error, "is_own", False)


def report(error: BaseException) -> None:
    """Say on standard error what ended the run, once: one line, or the traceback of a defect."""
    if getattr(error, "is_reported", False):
        return
    error.is_reported = True  # type: ignore[attr-defined]
    if isinstance(error, KNOWN):
        print(error if isinstance(error, Stopped) else f"error: {error}", file=sys.stderr, flush=True)
    else:
        traceback.print_exception(error)


def reports(error: BaseException, rank: int, local_rank: int) -> bool:
    """Whether this rank reports an error: one that only it has met; what all raise, on rank 0; what the ranks of a
    machine find in its files before they have met, on one of them."""
    if isinstance(error, Ended):
        return False
    return is_own(error) or (rank if is_shared(error) else local_rank) == 0


def first_line(error: BaseException) -> str:
    """What an error says, on one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


KNOWN = (EngineError, DataError, LoaderError, WeightsError)
"""All that a tool turns into one line and `exit_code`; anything else is a defect and shows its traceback."""
