"""What a backbone offers. A method's contract is in `models/methods/__init__.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, get_args

import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

Layer = Literal["features", "pooled", "map"]
"""What is taken from a backbone: behind `fc` and its ReLU, the pooled last map, or that map in four windows."""
LAYERS: tuple[Layer, ...] = get_args(Layer)


class Strict(BaseModel):
    """A section of a recipe: unknown keys refused, no silent type conversion, never changed. `loaders.config` has the
    same for loaders, which share nothing with models."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class NetworkError(ValueError):
    """A network that cannot be had on this machine; one line that names it and what to do."""

    exit_code = 2


class BackboneConfig(Strict):
    """Base of the backbones' `Config`s; their field `arch` tells them apart."""

    arch: Any
    only_in_training: ClassVar[tuple[str, ...]] = ()
    """Keys that say how the network learns, not what it computes."""
    on_top: ClassVar[Mapping[str, str]] = {}
    """Keys that put a module on top of the network -> that module: without it the rest computes the same."""

    @property
    def fusable(self) -> bool:
        """Whether the network has a fused form of its training step (`run.kernels: fused`)."""
        return False

    @property
    def has_fc(self) -> bool:
        """Whether the features come after one more layer `fc` with its ReLU on the pooled map."""
        return False

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels of the image between neighbors of each map that `Backbone.maps` gives, finest first, each twice the
        one before; empty where a network gives none."""
        return ()

    def check_side(self, side: int) -> None:
        """Refuse an image side in pixels that the network cannot take.

        Raises:
            ValueError: names the nearest legal sides.
        """

    def check_normalization(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        """Refuse images that `data` normalizes with other numbers than the network needs.

        Raises:
            ValueError: names both.
        """

    def missing(self) -> str:
        """What this machine lacks for the network and what to do, or ""."""
        return ""

    def build(self) -> Backbone:
        """The network, randomly initialized."""
        raise NotImplementedError


class Backbone(nn.Module):
    """Base of the backbones: images [B, 3, H, W] to features [B, `out_channels`]."""

    config: Any
    """The `BackboneConfig` that it was built from."""
    out_channels: int
    fused: bool = False
    """Run training steps in the fused form, where the config is `fusable`; state and keys stay the same."""
    folds: bool = False
    """In evaluation mode, run with BatchNorm folded into the convolutions, where the network can."""

    layers: tuple[Layer, ...] = LAYERS
    """What `layer` can give."""

    def check_side(self, side: int) -> None:
        """As `BackboneConfig.check_side`."""
        self.config.check_side(side)

    def map(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] to the last map [B, C, h, w]."""
        raise NotImplementedError

    def pooled(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] to the pooled last map [B, C]; the features, where nothing follows it."""
        return self(x)

    def layer(self, name: Layer, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] to what one of `layers` makes of them [B, D]."""
        return self(x) if name == "features" else self.pooled(x) if name == "pooled" else windows(self.map(x))

    @property
    def map_channels(self) -> dict[int, int]:
        """Stride -> channels of its map: they double as often as the map is halved, in both of our families."""
        strides = self.config.strides
        return {stride: self.out_channels * stride // strides[-1] for stride in strides}

    def maps(self, x: Tensor, until: int | None = None) -> dict[int, Tensor]:
        """Images [B, 3, H, W] to the last map of each resolution.

        Args:
            until: the coarsest stride that is wanted; nothing behind it is computed.

        Returns:
            Stride -> [B, `map_channels`, H/stride, W/stride].
        """
        raise NotImplementedError

    def last_stage(self, x: Tensor) -> Tensor:
        """What lies between the last but one of `maps` and the last, on any map: [B, C, H, W] to [B, 2C, H/2, W/2]."""
        raise NotImplementedError


def windows(last: Tensor) -> Tensor:
    """A map [B, C, H, W], averaged over windows of side H - 1 and stride 1 and flattened: [B, C · 4], windows of a
    channel side by side, row by row; [B, C] of a map with one place. Of ReActNet-A and ResNet-50 at 224 pixels
    windows of 6 of 7, as VOC07's SVMs are trained on (Goyal et al. 2019; BURN's pooling table)."""
    kernel = [max(side - 1, 1) for side in last.shape[2:]]
    return F.avg_pool2d(last, kernel, stride=1).flatten(1)
