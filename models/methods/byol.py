"""BYOL: predict a momentum network's projection of the other view (Grill et al. 2020)."""

from __future__ import annotations

import copy
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from models import backbones
from models.heads import MLP
from models.losses import feature_similarity
from models.methods import Method, MethodConfig
from models.momentum import update_average
from models.precision import at_least_float32


class Config(MethodConfig):
    """BYOL in a recipe. The target's momentum is the scheduled scalar `momentum` (cosine from 0.99 to 1)."""

    num_views = 2
    schedules = ("momentum",)
    name: Literal["byol"]
    backbone: backbones.Config
    hidden_dim: int = Field(default=4096, ge=1)
    out_dim: int = Field(default=256, ge=1)

    def build(self) -> Byol:
        """See `Byol`."""
        return Byol(self)


class Byol(Method):
    """L = sum over both directions of the mean of 2 - 2 cos(prediction of one view, target of the other).

    The target's BatchNorm uses batch statistics and keeps running ones of its own: buffers do not follow, only
    parameters do.
    """

    views_per_backbone = 2
    moved_after_step = ("target_backbone.", "target_head.")

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.backbone = config.backbone.build()
        self.head = MLP(self.backbone.out_channels, config.hidden_dim, config.out_dim, norm=True)
        self.predictor = MLP(config.out_dim, config.hidden_dim, config.out_dim, norm=True)
        for layer in (self.predictor.fc0, self.predictor.fc1):
            nn.init.normal_(layer.weight, std=0.01)  # as OpenSelfSup's predictor
        self.target_backbone = copy.deepcopy(self.backbone).requires_grad_(False)
        self.target_head = copy.deepcopy(self.head).requires_grad_(False)
        # Unit vectors in all directions have a standard deviation of 1/√D in each coordinate.
        remedy = "move the target more slowly with schedules.momentum.start nearer to 1, or lower schedules.lr.start"
        self.collapse = {**self.collapse, "target_std": (0.1 / config.out_dim**0.5, remedy)}

    def forward(
        self, views: list[Tensor], label: Tensor | None, values: dict[str, Tensor], features: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Two views [B, 3, H, W] to the symmetric loss; each view has BatchNorm statistics of its own."""
        features = torch.stack([self.backbone(view) for view in views])  # [V, B, D]
        predictions = self.predictor(self.head(features))  # [V, B, out_dim]
        with torch.no_grad():
            targets = self.target_head(torch.stack([self.target_backbone(view) for view in views]))
        one, two = (feature_similarity(predictions[v], targets[1 - v]).mean() for v in range(2))
        unit = F.normalize(at_least_float32(targets[0]), dim=1)
        return {"loss": one + two, "target_std": unit.std(dim=0, correction=0).mean()}

    def after_step(self, values: dict[str, float]) -> None:
        """Move the target toward the online network."""
        update_average(self.target_backbone, self.backbone, values["momentum"])
        update_average(self.target_head, self.head, values["momentum"])

    def outputs(self, features: Tensor) -> Tensor:
        """The unit projection over 0.2, read as logits as S2-BNN does: BYOL has no distribution of its own."""
        return F.normalize(self.head(features), dim=1) / 0.2

    @property
    def evaluated(self) -> nn.Module:
        """The online backbone."""
        return self.backbone
