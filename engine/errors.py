"""What can end a run or a tool, each with its exit code and one line of text."""

from __future__ import annotations

from typing import ClassVar

from loaders import DataError
from models.weights import WeightsError


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


KNOWN = (EngineError, DataError, WeightsError)
"""All that a tool turns into one line and `exit_code`; anything else is a defect and shows its traceback."""
