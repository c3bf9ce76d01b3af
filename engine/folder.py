"""The folder of a run: who may write to it, and all that it holds besides checkpoints and curves."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from engine.errors import FolderError
from engine.log import logger, row_of
from engine.provenance import environment
from engine.recipe import Recipe
from loaders.files import aside, lock

LATER = ("checkpoints", "tensorboard")
"""Folders in it that are written to only when there is something to lose."""


class RunFolder:
    """The run folder of a recipe, held against other processes until it is closed; only rank 0 has one.

    Raises:
        FolderError: it cannot be written, or another process holds it.
    """

    def __init__(self, recipe: Recipe, step: int = 0) -> None:
        """`step`: the run continues after this one."""
        self.path = recipe.folder
        names = (f"before_step_{step}" + (f"_{number}" if number else "") for number in itertools.count())
        self.before = next(place for name in names if not os.path.lexists(place := self.path / name))
        if problem := unwritable(recipe):
            raise FolderError(f"run.folder: {problem}")
        with _written(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / ".lock", "w")
        try:
            self._hold()
            for name in LATER:
                with _written(self.path / name):
                    _try(self.path / name)
            with _written(self.path):
                kept, text = self.path / "recipe.yaml", recipe.dump()
                if kept.exists() and kept.read_text(encoding="utf-8", errors="replace") != text:
                    self._keep("recipe.yaml", "environment.json")
                _write(kept, text)
                _write(self.path / "environment.json", json.dumps(environment(), indent=2) + "\n")
        except FolderError:
            self.close()
            raise

    def _hold(self) -> None:
        try:
            is_ours = lock(self._lock.fileno(), fcntl.lockf)  # which workers do not inherit
        except OSError as error:
            logger.warning(
                f"{self.path}: locks do not work here ({error.strerror}); two runs in one folder would not notice each "
                "other"
            )
            return
        if not is_ours:
            raise FolderError(
                f"{self.path}: another process is running here; wait for it or give this run another name"
            )

    def _keep(self, *names: str) -> None:
        """Copy files into `before`."""
        self.before.mkdir(exist_ok=True)
        for name in names:
            if (self.path / name).exists():
                _copy(self.path / name, self.before / name)

    def set_aside(self) -> None:
        """Keep all that counts in steps in `before`, because the run goes on in steps of another size; checkpoints stay
        until `drop_old` too.

        Raises:
            FolderError: it cannot be written.
        """
        with _written(self.before):
            self._keep("metrics.jsonl")
            self._old = sorted((self.path / "checkpoints").glob("step-*.pt"))
            (self.before / "checkpoints").mkdir()
            for path in self._old:
                try:
                    os.link(path, self.before / "checkpoints" / path.name)
                except OSError:  # not on every file system
                    _copy(path, self.before / "checkpoints" / path.name)
            if (self.path / "tensorboard").exists():
                (self.path / "tensorboard").rename(self.before / "tensorboard")

    def drop_old(self) -> None:
        """Remove the checkpoints that were set aside from the run's own, once it has one of its new steps."""
        for path in self._old:
            path.unlink(missing_ok=True)

    def open_rows(self, images: int | None) -> tuple[BinaryIO, list[str]]:
        """`metrics.jsonl`, to be appended to without a buffer, and the kinds of the evaluations after exactly `images`
        that it has, in order. Rows beyond `images`, of a run that was killed, are dropped (steps may have changed their
        size); None drops all, and the curves of TensorBoard too.

        Raises:
            FolderError: it cannot be read or written.
        """
        path = self.path / "metrics.jsonl"
        kept, evaluated = [], []
        with _written(self.path):
            if images is None:
                for old in (self.path / "tensorboard").glob("events.out.tfevents.*"):
                    old.unlink()
            elif path.exists():
                lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
                for number, line in enumerate(lines, 1):
                    row = row_of(line)
                    if row is None:
                        if number < len(lines):  # the last one was cut where a run was killed
                            logger.warning(f"{path}: line {number} is no row of metrics; left out")
                        continue
                    if row["images"] <= images:
                        kept.append(line)
                    if row["images"] == images and "evaluation" in row:
                        evaluated.append(row["evaluation"])
            _write(path, "".join(line + "\n" for line in kept))
            return open(path, "ab", buffering=0), evaluated

    def list_bad_images(self, bad: dict[str, str]) -> None:
        """Write `bad_images.tsv`: path and reason of every image that was replaced so far."""
        if not bad:
            return
        path = self.path / "bad_images.tsv"
        logger.warning(f"{len(bad)} images could not be decoded and were replaced, listed in {path}")
        with contextlib.suppress(OSError):
            _write(path, "".join(f"{name}\t{reason}\n" for name, reason in sorted(bad.items())))

    def close(self) -> None:
        """Let others write to it."""
        self._lock.close()


def unwritable(recipe: Recipe) -> str:
    """Why the run folder of a recipe cannot be written, as far as that is seen without writing, or ""."""
    for path in (recipe.folder, *(recipe.folder / name for name in LATER)):
        there = next(place for place in (path, *path.absolute().parents) if os.path.lexists(place))
        if not there.exists():
            return f"{there} is a link to {os.readlink(there)}, which is not there; make that folder or remove the link"
        if not there.is_dir():
            return f"{there} is not a folder; remove it or set another run.folder"
        if not os.access(there, os.W_OK | os.X_OK):
            return f"{there} cannot be written by this user, or lies on a disk that is read-only"
    return ""


def _try(folder: Path) -> None:
    """Write to a folder that will be needed."""
    is_new = not folder.exists()
    folder.mkdir(exist_ok=True)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(1 << 16))
    finally:
        if is_new:
            folder.rmdir()


def _write(path: Path, text: str) -> None:
    with aside(path) as out:
        out.part.write_text(text, encoding="utf-8")


def _copy(source: Path, to: Path) -> None:
    with aside(to) as out:
        shutil.copyfile(source, out.part)


@contextlib.contextmanager
def _written(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        # A part that was being written is gone by now.
        where = error.filename if error.filename and os.path.lexists(error.filename) else path
        raise FolderError(f"run.folder: {where} cannot be created or written: {error.strerror}") from None


def is_held(folder: Path) -> bool:
    """Whether another process is running in a run folder."""
    try:
        with open(folder / ".lock", "r+") as file:
            return not lock(file.fileno(), fcntl.lockf)
    except OSError:  # nobody was there, or there are no locks
        return False
