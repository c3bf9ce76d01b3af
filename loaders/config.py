"""Sections of a recipe that belong to the data, strictly validated."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    """A section: unknown keys refused, no silent type conversion, never changed. `models.contract` has the same for
    models, which share nothing with loaders."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
