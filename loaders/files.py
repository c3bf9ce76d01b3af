"""Writing a file or folder so that its name never stands for half of it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from loaders.machine import kernel

_LONG = 100  # bytes: with all that is put around it a name stays below 255, and below the 143 of encrypted folders
_DAY = 86_400
_HELD = (errno.EACCES, errno.EAGAIN)
_NO_SYNC = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
_NO_FOLDER_SYNC = (*_NO_SYNC, errno.EACCES, errno.EPERM, errno.EBADF, errno.EISDIR)


@dataclass
class Aside:
    """A file or folder in the making."""

    part: Path
    """Where to write it."""
    path: Path
    """The name that it takes at the end; may be set until then."""


@contextlib.contextmanager
def aside(path: Path, *, durable: bool = False) -> Iterator[Aside]:
    """Write beside `path` and rename at the end; if anything is raised, nothing is left and an older file stays. What
    writers of this name left that were killed is removed first. A device or a pipe is written as it is.

    Args:
        durable: flush the content and the new name to the disk, so that a power cut leaves the old file or the new one.

    Raises:
        OSError: the disk refuses.
    """
    if path.parent.resolve() == Path("/dev") or (path.exists() and not path.is_file() and not path.is_dir()):
        yield Aside(path, path)  # `/dev/stdout` must not be replaced by a file
        return
    _sweep(path)
    with _locked(path) as lock:
        out = Aside(lock.with_suffix(".part"), path)
        try:
            yield out
            if out.path.is_dir() and not out.part.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(out.path))
            if durable:
                sync(out.part)
            os.replace(out.part, out.path)
            if durable:
                sync(out.path.parent)
        except OSError as error:
            if error.filename is None:  # a full disk is met by a number of a file, not by its name
                error.filename = str(path)
            raise
        finally:
            _remove(out.part)


def check_writable(path: Path) -> None:
    """See that a file can have this name, before the work that fills it. Nothing is left behind.

    Raises:
        OSError: it cannot; names the path.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder, expected the name of a file", str(path))
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(error.errno, f"cannot be written below {folder}: {error.strerror}", str(path)) from None


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk; where a file system cannot do that, it does it by itself.

    Raises:
        OSError: what was written may be lost.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in (_NO_FOLDER_SYNC if path.is_dir() else _NO_SYNC):
            raise


def lock(descriptor: int, by: Callable[[int, int], None]) -> bool:
    """Lock an open file until it is closed.

    Args:
        by: `fcntl.flock`, whose locks are an open file's and go to forked processes, or `fcntl.lockf`, whose locks are
            a process's own.

    Returns:
        Whether nobody else holds it.

    Raises:
        OSError: there are no locks here.
    """
    try:
        by(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _HELD:
            raise
        return False
    return True


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[Path]:
    """A lock file beside `path`, held: it stands for a writer that lives."""
    while True:
        place = path.with_name(f"{_start(path.name)}{kernel()}-{secrets.token_hex(4)}.lock")
        descriptor = os.open(place, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        with contextlib.suppress(OSError):  # without locks here nobody removes it, either
            if not lock(descriptor, fcntl.flock):
                os.close(descriptor)
                continue
        if place.exists():
            break
        os.close(descriptor)  # taken for a dead one's before it was locked
    try:
        yield place
    finally:
        place.unlink(missing_ok=True)
        os.close(descriptor)


def _sweep(path: Path) -> None:
    """Remove the parts of writers of this name that are gone. Locks are sure among the processes of one kernel; those
    of another machine may not be seen here, so that its parts have to be a day old, too."""
    start = _start(path.name)
    with contextlib.suppress(OSError):
        for name in os.listdir(path.parent):
            if name.startswith(start) and name.endswith(".lock"):
                with contextlib.suppress(OSError), open(path.with_name(name), "r+b") as file:
                    part = Path(file.name).with_suffix(".part")
                    newest = max(place.stat().st_mtime for place in (Path(file.name), part) if place.exists())
                    is_here = name.startswith(f"{start}{kernel()}-")
                    if (is_here or time.time() - newest > _DAY) and lock(file.fileno(), fcntl.flock):
                        _remove(part)
                        os.unlink(file.name)


def _start(name: str) -> str:
    content = os.fsencode(name)
    return f".{name if len(content) <= _LONG else hashlib.sha256(content).hexdigest()[:32]}."


def _remove(part: Path) -> None:
    if part.is_dir() and not part.is_symlink():
        shutil.rmtree(part, ignore_errors=True)
    else:
        part.unlink(missing_ok=True)
