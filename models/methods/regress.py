"""REG: a binary student regresses a frozen network's features of the same view.

SimReg (Navaneet et al., BMVC 2021, arXiv 2201.05131) with a shallower head, a binary student and, which is ours,
targets without their mean. No classifier, no second view, no balance.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import backbones
from models.heads import MLP, RunningMean
from models.losses import feature_similarity
from models.methods import Method, MethodConfig
from models.precision import at_least_float32
from models.reactnet import Config as ReActNetConfig


class Config(MethodConfig):
    """REG in a recipe. Of several views each is regressed by itself."""

    takes_more_views = True
    name: Literal["regress"]
    student: ReActNetConfig
    teacher: backbones.Config
    target_center: bool = True
    """Take the running mean of the teacher's features from them: the cosine of features that share a large mean is
    mostly that mean's."""

    @property
    def cacheable(self) -> str:
        """The teacher: it is always in evaluation mode."""
        return "teacher"

    def build(self) -> Regress:
        """See `Regress`."""
        return Regress(self)


class Regress(Method):
    """L = Σ_v mean of 2 - 2 cos(h(s_v), f_v - μ): s the student's features, f the teacher's, h: D -> 2D -> dim f, μ the
    running mean of f over the steps before (0 in the first)."""

    views_per_backbone = None

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.student = config.student.build()
        self.teacher = backbones.frozen(config.teacher, folds=True)
        width, out_dim = self.student.out_channels, self.teacher.out_channels
        self.student_head = MLP(width, 2 * width, out_dim, norm=True)
        if config.target_center:
            self.center = RunningMean(out_dim)
            self.moved_after_step = ("center.",)

    def train(self, mode: bool = True) -> Regress:
        """Keep the teacher in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(
        self, views: list[Tensor], label: Tensor | None, values: dict[str, Tensor], features: Tensor | None = None
    ) -> dict[str, Tensor]:
        """V views [B, 3, H, W] to the loss; each is a forward of its own, with BatchNorm statistics of its own."""
        with torch.no_grad():
            if features is None:
                features = torch.stack([self.teacher(view) for view in views])  # [V, B, dim f]
            features = at_least_float32(features)
            targets = self.center(features) if self.config.target_center else features
        outputs = self.student_head(torch.stack([self.student(view) for view in views]))  # [V, B, dim f]
        distance = torch.stack([feature_similarity(*pair).mean() for pair in zip(outputs, targets, strict=True)])
        return {"loss": distance.sum(), "cosine": 1 - distance.detach().mean() / 2}

    def after_step(self, values: dict[str, float]) -> None:
        """Let the mean follow."""
        if self.config.target_center:
            self.center.update()

    def outputs(self, features: Tensor) -> Tensor:
        """The direction that the loss compares, with coordinates of 1 in the mean square, read as logits."""
        direction = F.normalize(at_least_float32(self.student_head(features)), dim=1)
        return direction * direction.shape[1] ** 0.5

    @property
    def evaluated(self) -> nn.Module:
        """The student's backbone."""
        return self.student
