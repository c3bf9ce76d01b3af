"""Every scalar that changes over time, as a pure function of the optimizer step; and durations in a recipe."""

from __future__ import annotations

import math
import re
from typing import Annotated, Literal, NamedTuple

from pydantic import AfterValidator, Field, model_validator

from models.contract import Strict

_DURATION = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,18})?)(ep|it|%)")


def _check_duration(text: str) -> str:
    if not _DURATION.fullmatch(text):
        raise ValueError(f"expected a duration such as 200ep, 5% or 1000it, got {text!r}")
    return text


def _check_positive(text: str) -> str:
    if not re.search(r"[1-9]", text):
        raise ValueError(f"must be greater than zero, got {text!r}")
    return text


Duration = Annotated[str, AfterValidator(_check_duration)]
"""A length of training: `200ep` epochs, `5%` of the run, `1000it` optimizer steps."""
PositiveDuration = Annotated[Duration, AfterValidator(_check_positive)]


class Horizon(NamedTuple):
    """What relates steps, images and epochs of one run."""

    total_steps: int
    num_images: int
    batch_size: int

    def epoch(self, step: int) -> int:
        """Whole passes over the data set before `step`."""
        return step * self.batch_size // self.num_images

    @property
    def epochs(self) -> float:
        """Length of the run."""
        return self.total_steps * self.batch_size / self.num_images

    @classmethod
    def of(cls, duration: str, num_images: int, batch_size: int) -> Horizon:
        """The horizon of a run of `duration`, which must be in epochs or steps."""
        return cls(to_steps(duration, cls(0, num_images, batch_size)), num_images, batch_size)


def to_steps(duration: str, horizon: Horizon) -> int:
    """A duration in optimizer steps, rounded to the nearest, at least 1 unless it is zero."""
    match = _DURATION.fullmatch(duration)
    assert match, duration
    number, unit = float(match[1]), match[2]
    if unit == "ep":
        steps = number * horizon.num_images / horizon.batch_size
    elif unit == "%":
        steps = number / 100 * horizon.total_steps
    else:
        steps = number
    return max(round(steps), 1) if steps > 0 else 0


def due(step: int, every: str, horizon: Horizon) -> bool:
    """Whether something done `every` duration is due after `step` steps; always at the end of the run."""
    return step == horizon.total_steps or step % max(to_steps(every, horizon), 1) == 0


class Schedule(Strict):
    """A scalar over time. In a recipe a plain number stands for `{shape: constant, start: number}`."""

    shape: Literal["constant", "cosine", "linear", "step", "switch"] = "constant"
    start: float = Field(ge=0)
    end: float = Field(default=0.0, ge=0)
    """Value at the end of the run (cosine, linear), or from the milestone on (switch)."""
    per: Literal["step", "epoch"] = "step"
    """Whether the value moves at every step or stays constant for an epoch (cosine, linear)."""
    milestones: tuple[Duration, ...] = ()
    """When `step` multiplies by `gamma`; the one moment of `switch`."""
    gamma: float = Field(default=0.1, gt=0)
    warmup: Duration = "0it"
    """The first part of the run, where the value is also multiplied by a line from `warmup_ratio` to 1."""
    warmup_ratio: float = Field(default=0.0, ge=0, le=1)

    @model_validator(mode="before")
    @classmethod
    def _number(cls, value: object) -> object:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return {"start": float(value)}
        if isinstance(value, dict) and isinstance(value.get("milestones"), list):
            return {**value, "milestones": tuple(value["milestones"])}
        return value

    @model_validator(mode="after")
    def _has_milestones(self) -> Schedule:
        if (self.shape in ("step", "switch")) != bool(self.milestones):
            raise ValueError("milestones: expected with shape: step or switch, and only there")
        if self.shape == "switch" and len(self.milestones) != 1:
            raise ValueError(f"milestones: expected one with shape: switch, got {len(self.milestones)}")
        return self


def value(schedule: Schedule, step: int, horizon: Horizon) -> float:
    """The scalar at optimizer step `step` (0-based).

    With `shape: cosine, per: epoch` and a warm-up this is the schedule of the BURN release: a cosine by epoch,
    under a warm-up by iteration that follows the already decaying value (mmcv's `CosineAnnealing` hook).
    """
    if schedule.per == "epoch":
        progress = horizon.epoch(step) / horizon.epochs
    else:
        progress = step / horizon.total_steps
    start, end = schedule.start, schedule.end
    if schedule.shape == "cosine":
        now = end + (start - end) * (1 + math.cos(math.pi * progress)) / 2
    elif schedule.shape == "linear":
        now = start + (end - start) * progress
    elif schedule.shape in ("step", "switch"):
        passed = sum(step >= to_steps(milestone, horizon) for milestone in schedule.milestones)
        now = start * schedule.gamma**passed if schedule.shape == "step" else end if passed else start
    else:
        now = start
    warmup = to_steps(schedule.warmup, horizon)
    if step < warmup:
        now *= 1 - (1 - step / warmup) * (1 - schedule.warmup_ratio)
    return now
