"""Sections of a recipe that belong to the data, strictly validated; and what of them an index depends on."""

from __future__ import annotations

import os
from typing import Annotated, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict

PathText = Annotated[str, AfterValidator(os.path.expanduser)]
"""A path in a recipe; `~` is the home folder, as in a shell, which does not see it behind a `=`."""


class Strict(BaseModel):
    """A section: unknown keys refused, no silent type conversion, never changed. `models.contract` has the same for
    models, which share nothing with loaders."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Request(NamedTuple):
    """What an index is asked for."""

    max_pixels: int
    """An image with more is a problem."""
    labels: Literal["auto", "none"] | None = None
    """`data.labels` of a recipe."""
    asks_labels: bool = True
    """Whether anything will use the labels: what has none, or not for all, is then refused and not passed over."""
