"""S2-BNN: a binary student imitates a contrastively trained network (Shen et al., CVPR 2021).

Distillation alone is the paper's best and BURN's row "S2-BNN"; adding contrast is its first variant.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from models import backbones
from models.heads import MLP
from models.losses import collapse_meters, soft_cross_entropy
from models.methods import MethodConfig
from models.momentum import Contrast, QueryEncoder


class Config(MethodConfig):
    """S2-BNN in a recipe. With `contrast` the momentum is the scheduled scalar `momentum`."""

    name: Literal["s2bnn"]
    backbone: backbones.Config
    teacher: backbones.Config
    teacher_hidden_dim: int | None = Field(default=None, ge=1)
    """Width of the teacher's head, by default that of its features (as in MoCo v2)."""
    out_dim: int = Field(default=128, ge=1)
    temperature: float = Field(default=0.2, gt=0)
    contrast: bool = False
    """Add InfoNCE against a momentum encoder's key of a second view and a queue, with weight 1."""
    queue_size: int = Field(default=65536, ge=1)
    """K of the queue (with `contrast`)."""

    @property
    def num_views(self) -> int:  # type: ignore[override]
        """One; the release makes a second one for distillation alone too and throws it away."""
        return 2 if self.contrast else 1

    @property
    def schedules(self) -> tuple[str, ...]:  # type: ignore[override]
        """The momentum of the key encoder, where there is one."""
        return ("momentum",) if self.contrast else ()

    @property
    def cacheable(self) -> str:
        """The teacher: it is always in evaluation mode."""
        return "teacher"

    def build(self) -> S2BNN:
        """See `S2BNN`."""
        return S2BNN(self)


class S2BNN(QueryEncoder):
    """Soft cross-entropy of the student's embedding under the frozen teacher's, coordinates read as classes."""

    def __init__(self, config: Config) -> None:
        super().__init__(config.backbone, config.out_dim, config.temperature)
        self.config = config
        self.teacher = backbones.frozen(config.teacher, folds=True)
        width = self.teacher.out_channels
        self.teacher_head = MLP(width, config.teacher_hidden_dim or width, config.out_dim, norm=False)
        self.teacher_head.requires_grad_(False)
        if config.contrast:
            self.contrast = Contrast(self.backbone, self.head, config.out_dim, config.queue_size, config.temperature)
            self.moved_after_step = ("contrast.",)

    def train(self, mode: bool = True) -> S2BNN:
        """Keep the teacher in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        self.teacher_head.eval()
        return self

    def forward(
        self, views: list[Tensor], label: Tensor | None, values: dict[str, Tensor], features: Tensor | None = None
    ) -> dict[str, Tensor]:
        """One view [B, 3, H, W], or two with `contrast`, to the loss."""
        temperature = self.config.temperature
        with torch.no_grad():
            seen = self.teacher(views[0]) if features is None else features[0]
            target = F.normalize(self.teacher_head(seen), dim=1)  # [B, D]
        query = self.query(views[0])  # [B, D]
        loss = soft_cross_entropy(query, target, temperature).mean()
        logged = {"distillation": loss.detach()}
        if self.config.contrast:
            contrast_loss, accuracy = self.contrast(query, views[1])
            loss = loss + contrast_loss
            logged |= {"contrast": contrast_loss.detach(), "contrast_top1": accuracy}
        meters = collapse_meters(target, temperature)
        return {"loss": loss, **logged, **{f"target_{name}": value for name, value in meters.items()}}

    def after_step(self, values: dict[str, float]) -> None:
        """Move the momentum encoder and the queue, where there are any."""
        if self.config.contrast:
            self.contrast.after_step(self.backbone, self.head, values["momentum"])
