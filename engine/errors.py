"""What can end a run or a tool, each with its exit code and one line of text."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from io import UnsupportedOperation
from types import FrameType
from typing import ClassVar, TextIO, TypeVar

from loaders import DataError, LoaderError
from models.contract import NetworkError
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


class ExportError(EngineError, ValueError):
    """A network that cannot be packed, or that answers otherwise once it is; names the file that it came from."""

    exit_code = 2


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
    said = line(error)
    with contextlib.suppress(OSError, ValueError):  # nobody may be listening
        if said is None:
            traceback.print_exception(error)
        else:
            print(said, file=sys.stderr, flush=True)


def line(error: BaseException) -> str | None:
    """What ended a run or a tool, where a user or a machine is at fault; None of a defect."""
    if isinstance(error, KNOWN):
        return str(error) if isinstance(error, Stopped) else f"error: {error}"
    if isinstance(error, KeyboardInterrupt):
        return "stopped"
    if isinstance(error, MemoryError):
        return f"error: out of memory: {first_line(error)}"
    if isinstance(error, OSError) and error.errno is not None:  # what libraries derive from it has no number
        where = _raised_at(error) if error.filename is None else error.filename
        return f"error: {os.fsdecode(where) if isinstance(where, bytes) else where}: {error.strerror}"
    return None


def exit_code(error: BaseException) -> int:
    """The code that a tool leaves with after an error; 1 after a defect."""
    if isinstance(error, KNOWN):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return 128 + int(*error.args or (signal.SIGINT,))
    if line(error) is None:
        return 1
    return 2 if isinstance(error, OSError) and error.errno in _MISNAMED else MachineError.exit_code


_MISNAMED = {
    getattr(errno, name)
    for name in "ENOENT ENOTDIR EISDIR EEXIST ENOTEMPTY EACCES EPERM EROFS ENAMETOOLONG ELOOP".split()
}
"""What another name or permission would mend; the rest is the machine's: a full disk, too many open files."""


def _raised_at(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].filename}, line {frames[-1].lineno}" if frames else type(error).__name__


def guarded(
    main: Callable[[], int],
    *,
    says: Callable[[BaseException], bool] = lambda error: True,
    takes_signals: bool = True,
) -> Callable[[], int]:
    """The `main` of a tool with an answer to whatever can end it: one line on standard error and an exit code where a
    user or a machine is at fault, a traceback where the program is.

    Args:
        main: returns an exit code.
        says: whether this process says what is no defect; several of one run need not all do.
        takes_signals: SIGTERM and SIGHUP end it as Ctrl-C does, so that what is half written is removed.

    Returns:
        A function that returns the exit code: that of `main` or of its error; 128 and its number after a signal; 141,
        without a word, where the reader of standard output is gone. It raises nothing but the SystemExit of argparse.
    """

    @functools.wraps(main)
    def call() -> int:
        ended: BaseException | None = None
        try:
            with _signals_interrupt() if takes_signals else contextlib.nullcontext():
                _must_be_somewhere()
                code = main()
        except BaseException as error:
            ended, code = error, exit_code(error)
        lost = _lost_output(ended)
        if lost and (ended is None or isinstance(ended, SystemExit | OSError)):
            if lost.errno == errno.EPIPE:
                return 128 + signal.SIGPIPE
            ended, code = lost, exit_code(lost)
        if isinstance(ended, SystemExit):
            raise ended
        if ended is not None and (line(ended) is None or says(ended)):
            report(ended)
        return code

    return call


def _must_be_somewhere() -> None:
    try:
        os.getcwd()
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}; cd to a folder that is there", "the working folder") from None


@contextlib.contextmanager
def _signals_interrupt() -> Iterator[None]:
    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) == signal.SIG_DFL:  # nohup's choice stays
                before[number] = signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _lost_output(ended: BaseException | None) -> OSError | None:
    """Why what was printed cannot be written, if so; it then goes nowhere, or the end of Python would fail on it."""
    lost = None
    for name in ("stderr", "stdout"):
        stream = getattr(sys, name)
        if stream is None or stream.closed:
            continue
        try:
            stream.flush()
            if isinstance(ended, BrokenPipeError) and _has_no_reader(stream):
                raise ended
        except OSError as error:
            lost = OSError(error.errno, error.strerror, f"standard {'error' if name == 'stderr' else 'output'}")
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return lost


def _has_no_reader(stream: TextIO) -> bool:
    poll = select.poll()
    with contextlib.suppress(UnsupportedOperation):  # a stream of Python alone
        poll.register(stream.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def reports(error: BaseException, rank: int, local_rank: int) -> bool:
    """Whether this rank reports an error: one that only it has met; what all raise, on rank 0; what the ranks of a
    machine find in its files before they have met, on one of them."""
    if isinstance(error, Ended):
        return False
    return is_own(error) or (rank if is_shared(error) else local_rank) == 0


def first_line(error: BaseException) -> str:
    """What an error says, on one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


KNOWN = (EngineError, DataError, LoaderError, NetworkError, WeightsError)
"""All that a tool turns into one line and `exit_code`; anything else is a defect and shows its traceback."""
