"""The contract of a training method, and how a recipe's `method.name` finds its file."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType
from typing import ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn


class MethodConfig(BaseModel):
    """Base of every method's `Config`: immutable, unknown keys refused, no silent type conversion."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    num_views: ClassVar[int] = 1
    """Views of each image that the method wants; a property where that depends on keys."""
    takes_more_views: ClassVar[bool] = False
    """Whether further views are welcome, as in multi-crop."""
    schedules: ClassVar[tuple[str, ...]] = ()
    """Scalars from 0 to 1 beside `lr` and `weight_decay` that the recipe must schedule; `forward` and the hooks
    get them. Like `num_views` a property where they depend on keys."""
    name: str


class Method(nn.Module):
    """What the training loop needs to know of a method.

    A file `models/methods/<name>.py` with a `Config(MethodConfig)` and a `Method(Method)` is all that a
    new method is; recipes find it by its file name.
    """

    views_per_backbone: int | None = 1
    """How many views each backbone runs, None for all: for the cost that `--dry-run` prints."""
    classifies: bool = False
    """Whether the method has `logits`, which the `accuracy` evaluation needs."""
    moved_after_step: tuple[str, ...] = ()
    """Prefixes of the parameters and buffers that `after_step`, not the optimizer, changes."""

    def forward(self, views: list[Tensor], label: Tensor, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute the loss of one micro-batch.

        Args:
            views: tensors [B, 3, H, W], normalised, channels_last, in the precision of `run.amp`.
            label: [B] int64; ignored by the methods that learn without labels.
            values: the scheduled scalars of this step as 0-d tensors on the device.

        Returns:
            `loss` (0-d, with a graph) and further detached 0-d tensors to log.
        """
        raise NotImplementedError

    def before_update(self, values: dict[str, float]) -> None:
        """Change or drop gradients before the optimizer takes them. Once per optimizer step."""

    def after_step(self, values: dict[str, float]) -> None:
        """Move what the optimizer does not: momentum networks and queues. Once per optimizer step."""

    def outputs(self, features: Tensor) -> Tensor:
        """Features [B, D] of `evaluated` to the logits [B, C] that the loss compares as a distribution, over their
        temperature: what the monitors measure the collapse of."""
        raise NotImplementedError

    def logits(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] to class scores [B, classes]; only where `classifies`."""
        raise NotImplementedError

    @property
    def evaluated(self) -> nn.Module:
        """The network that is evaluated and exported: images [B, 3, H, W] to features [B, D]."""
        raise NotImplementedError


def available() -> list[str]:
    """Names that a recipe's `method.name` can take."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> ModuleType:
    """Return the module of method `name`, with its `Config` and `Method`.

    Raises:
        KeyError: no file of that name.
    """
    if name not in available():
        raise KeyError(name)
    return importlib.import_module(f"models.methods.{name}")


def build(config: MethodConfig) -> Method:
    """The method that a recipe's `method` section describes."""
    return load(config.name).Method(config)


def on_meta(config: MethodConfig) -> Method:
    """The same on the meta device: parts, shapes and costs without memory."""
    with torch.device("meta"):
        return build(config)
