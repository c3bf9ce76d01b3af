"""What a run reports: means of the step's scalars, speed and time left, for people and for machines.

People read lines (a progress bar on a terminal); machines read `metrics.jsonl` and TensorBoard.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import resource
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import torch
from torch import Tensor
from tqdm import tqdm

from engine import dist
from engine.schedules import Horizon

logger = logging.getLogger("burn")

TIMING = ("images_per_second", "data_wait", "memory_gib", "eta_seconds", "seconds")
"""Keys of a metrics row that differ between two equal runs."""
SHOWN = ("features/rank", "outputs/information", "binary/sign_flips")
"""Monitors that people see on the terminal; all of them are in `metrics.jsonl` and TensorBoard."""
CONSTANT = ("measured", "online")
"""What makes no curve."""


def to_console(is_main: bool, *, progress: TextIO | None = None) -> None:
    """Show warnings of all ranks on standard error and log lines of rank 0 on `progress`, which by default is standard
    output, so that a log file has them. Streams that break or are full cost what is said, not the run."""
    lines, warnings = _Lines(progress or sys.stdout), _Lines(sys.stderr)
    lines.addFilter(lambda record: record.levelno < logging.WARNING)
    warnings.setLevel(logging.WARNING)
    logging.basicConfig(format="%(message)s", handlers=[lines, warnings], force=True)
    logger.setLevel(logging.INFO if is_main else logging.WARNING)
    threading.excepthook = _say_of_a_thread


def _say_of_a_thread(arguments: threading.ExceptHookArgs) -> None:
    is_boards = type(arguments.thread).__module__.startswith("tensorboard.")
    if not (is_boards and isinstance(arguments.exc_value, OSError)):  # `RunLog` meets and says that one
        threading.__excepthook__(arguments)


class _Lines(logging.StreamHandler):
    """Lines on a stream, dropped where it takes none."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Called where a line cannot be written."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif isinstance(error, BrokenPipeError):  # for good: what is still in the buffer would fail at the exit
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


class Meter:
    """Sums scalars on the device; the host reads them once per log interval, all at once."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, scalars: dict[str, Tensor]) -> None:
        """Add 0-d tensors of one micro-step; nothing is read."""
        for name, scalar in scalars.items():
            scalar = scalar.detach().float()
            self._sums[name] = self._sums[name] + scalar if name in self._sums else scalar
            self._counts[name] = self._counts.get(name, 0) + 1

    def read(self) -> dict[str, float]:
        """Means over the interval and all ranks; starts the next interval."""
        names = list(self._sums)
        means = torch.stack([self._sums[name] / self._counts[name] for name in names])
        values = dist.mean(means).tolist()
        self._sums, self._counts = {}, {}
        return dict(zip(names, values, strict=True))

    def state_dict(self, *, together: bool = True) -> dict[str, Any]:
        """The sums, so that an interval cut by a checkpoint continues after a resume: of all ranks if they call this
        together, else of this one."""
        if not self._sums:
            return {}
        sums = torch.stack(list(self._sums.values()))[None]
        return {"sums": dist.gather_rows(sums) if together else sums, "counts": self._counts}  # [ranks, names]

    def load_state_dict(self, state: dict[str, Any], rank: int) -> None:
        """Restore this rank's sums."""
        self._counts = dict(state.get("counts", {}))
        mine = state["sums"][min(rank, len(state["sums"]) - 1)] if state else []
        self._sums = dict(zip(self._counts, mine, strict=True))


class Clock:
    """Training time, without pauses for evaluations and checkpoints; survives restarts."""

    def __init__(self) -> None:
        self.seconds = 0.0  # of training in the whole run
        self._interval = 0.0
        self._waited = 0.0
        self._images = 0
        self._since: float | None = None
        self._rates: list[float] = []

    def run(self) -> None:
        """Training continues."""
        self._since = time.perf_counter()

    def pause(self) -> None:
        """Training stops for something else."""
        if self._since is not None:
            elapsed = time.perf_counter() - self._since
            self.seconds += elapsed
            self._interval += elapsed
            self._since = None

    def waited(self, seconds: float) -> None:
        """Time spent waiting for data."""
        self._waited += seconds

    def trained(self, images: int) -> None:
        """Images of one step over all ranks."""
        self._images += images

    def read(self, images_left: int) -> dict[str, float]:
        """Speed since the last reading and time left; starts the next interval."""
        self.pause()
        speed = self._images / max(self._interval, 1e-9)
        self._rates = [*self._rates, speed][-10:]
        # The first interval holds compilation and warm-up: it counts only while there is no other.
        steady = self._rates[1:] or self._rates
        mean_rate = sum(steady) / len(steady)
        row = {
            "images_per_second": float(f"{speed:.3g}") if speed < 1 else round(speed, 2),
            "data_wait": round(self._waited / max(self._interval, 1e-9), 4),
            "memory_gib": round(_memory_bytes() / 2**30, 3),
            "seconds": round(self.seconds, 2),
            "eta_seconds": round(images_left / max(mean_rate, 1e-9), 1),
        }
        self._interval = self._waited = 0.0
        self._images = 0
        self.run()
        return row


def _memory_bytes() -> int:
    """Peak memory: of the GPU if there is one, else of this process."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def row_of(line: str) -> dict[str, Any] | None:
    """A row of `metrics.jsonl`; None of a line that is none: it is being written, was cut, or was changed by hand."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_row = isinstance(row, dict) and all(isinstance(row.get(key), int | float) for key in ("step", "epoch", "images"))
    return row if is_row else None


class RunLog:
    """Writes rows of metrics; only rank 0 has one.

    Args:
        folder: the run folder.
        rows: where its rows go, one line of JSON each; without a buffer.
        step: the run continues after this one.
        recipe: the text that TensorBoard shows.
        schedules: names of the scheduled scalars, a group of their own there.
    """

    def __init__(
        self,
        folder: Path,
        rows: BinaryIO,
        horizon: Horizon,
        step: int,
        *,
        recipe: str = "",
        schedules: Iterable[str] = (),
    ) -> None:
        self.horizon, self._rows, self._schedules = horizon, rows, frozenset(schedules)
        self._folder, self._recipe = folder / "tensorboard", "".join(f"    {line}\n" for line in recipe.splitlines())
        self._board = self._open_board(step)
        self._bar = tqdm(
            total=horizon.total_steps, initial=step, unit="step", dynamic_ncols=True, disable=not sys.stderr.isatty()
        )

    def _open_board(self, step: int = 0) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(str(self._folder), purge_step=step + 1 if step else None)
        board.add_text("recipe", self._recipe, step)
        return board

    def tick(self) -> None:
        """One step is done."""
        with contextlib.suppress(OSError):
            self._bar.update()

    def row(self, step: int, scalars: dict[str, Any], *, evaluation: str | None = None) -> None:
        """Write one row: a line for people, one for machines, a point on each TensorBoard curve."""
        fixed = {
            "step": step,
            "epoch": round(step * self.horizon.batch_size / self.horizon.num_images, 4),
            "images": step * self.horizon.batch_size,
        }
        kind = {"evaluation": evaluation} if evaluation else {}
        points = {
            f"{self._group(name, evaluation)}{name}": scalar
            for name, scalar in scalars.items()
            if isinstance(scalar, int | float) and name not in CONSTANT
        }
        for write, content in ((self._write, {**fixed, **kind, **scalars}), (self._draw, points)):
            try:
                write(step, content)
            except OSError as error:  # a full disk must not cost the run
                logger.warning(f"metrics of step {step} cannot be written: {error.strerror}; training continues")
        line = _line(step, self.horizon, scalars, evaluation)
        if self._bar.disable or not sys.stdout.isatty():
            logger.info(line)
            return
        with contextlib.suppress(OSError):
            if evaluation:
                self._bar.write(line)
            else:
                self._bar.set_postfix_str(line.split("  ", 2)[-1])

    def _write(self, step: int, content: dict[str, Any]) -> None:
        """A whole line or none."""
        line, end = json.dumps(content).encode() + b"\n", os.fstat(self._rows.fileno()).st_size
        try:
            while line:
                line = line[self._rows.write(line) :]
        except OSError:
            with contextlib.suppress(OSError):
                self._rows.truncate(end)
            raise

    def _draw(self, step: int, points: dict[str, float]) -> None:
        if self._board is None:
            self._board = self._open_board()
        try:
            for name, scalar in points.items():
                self._board.add_scalar(name, scalar, step)
        except OSError:  # its thread has ended at the first error: another one can try again
            self._close_board()
            raise

    def _close_board(self) -> None:
        with contextlib.suppress(OSError):
            if self._board is not None:
                self._board.close()
        self._board = None

    def _group(self, name: str, evaluation: str | None) -> str:
        """Where TensorBoard shows a scalar; monitors name their group themselves."""
        if evaluation:
            return f"{evaluation}/"
        if "/" in name:
            return ""
        return "speed/" if name in TIMING else "schedule/" if name in self._schedules else "train/"

    def close(self) -> None:
        """Flush everything."""
        with contextlib.suppress(OSError):
            self._bar.close()
        self._close_board()
        self._rows.close()


def _line(step: int, horizon: Horizon, scalars: dict[str, Any], evaluation: str | None) -> str:
    words = [f"step {step}/{horizon.total_steps}", f"epoch {step * horizon.batch_size / horizon.num_images:.2f}"]
    if evaluation:
        words.append(evaluation)
    for name, scalar in scalars.items():
        if name == "eta_seconds":
            words.append(f"eta {duration(scalar)}")
        elif name == "data_wait":
            words.append(f"data wait {100 * scalar:.0f}%")
        elif name == "images_per_second":
            words.append(f"{rate(scalar)} img/s")
        elif name == "memory_gib":
            words.append(f"{scalar:.2f} GiB")
        elif name in SHOWN or (name != "seconds" and name not in CONSTANT and "/" not in name):
            words.append(f"{name} {scalar:.4g}" if isinstance(scalar, int | float) else f"{name} {scalar}")
    return "  ".join(words)


class Progress:
    """Lines about work on many items: how many are done, how fast, and how long the rest will take.

    Args:
        what: is done.
        total: items.
        unit: what they are.
        every: seconds between two lines; what takes less gets none.
    """

    def __init__(self, what: str, total: int, unit: str, every: float = 15.0) -> None:
        self.what, self.total, self.unit, self.every = what, total, unit, every
        self._started = self._said = time.monotonic()

    def update(self, done: int) -> None:
        """So many are done by now."""
        now = time.monotonic()
        if now - self._said >= self.every and 0 < done < self.total:
            self._said, speed = now, done / (now - self._started)
            left = duration((self.total - done) / speed)
            logger.info(f"{self.what}: {done:,} of {self.total:,} {self.unit}, {rate(speed)}/s, {left} left")


def rate(images_per_second: float) -> str:
    """Images per second, with digits enough to compare them."""
    return f"{images_per_second:,.0f}" if images_per_second >= 100 else f"{images_per_second:.3g}"


def duration(seconds: float) -> str:
    """Seconds as `1h02m`, `3m20s` or `12s`."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"
