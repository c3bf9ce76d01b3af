"""MoCo v2: contrast with a momentum encoder and a queue (He et al. 2020; Chen et al. 2020).

Makes a floating-point teacher where no file can be had; with S2-BNN's tuning it is BURN's row "Tuned MoCov2".
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from models import backbones
from models.methods import MethodConfig
from models.momentum import Contrast, QueryEncoder


class Config(MethodConfig):
    """MoCo v2 in a recipe. Its momentum is the scheduled scalar `momentum` (0.999 constant in the paper)."""

    num_views = 2
    schedules = ("momentum",)
    name: Literal["moco"]
    backbone: backbones.Config
    out_dim: int = Field(default=128, ge=1)
    queue_size: int = Field(default=65536, ge=1)
    temperature: float = Field(default=0.2, gt=0)

    def build(self) -> MoCo:
        """See `MoCo`."""
        return MoCo(self)


class MoCo(QueryEncoder):
    """Query of view 1 against the key of view 2 and the queue; only the query is trained by the optimizer."""

    moved_after_step = ("contrast.",)

    def __init__(self, config: Config) -> None:
        super().__init__(config.backbone, config.out_dim, config.temperature)
        self.contrast = Contrast(self.backbone, self.head, config.out_dim, config.queue_size, config.temperature)

    def forward(
        self, views: list[Tensor], label: Tensor | None, values: dict[str, Tensor], features: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Two views [B, 3, H, W] to the InfoNCE loss."""
        loss, accuracy = self.contrast(self.query(views[0]), views[1])
        return {"loss": loss, "contrast_top1": accuracy}

    def after_step(self, values: dict[str, float]) -> None:
        """Move the momentum encoder and the queue."""
        self.contrast.after_step(self.backbone, self.head, values["momentum"])
