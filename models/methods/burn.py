"""BURN: a binary student learns from a frozen extractor whose classifier is trained with it (CVPR 2022).

The released code computes its loss without a graph and trains nothing; this follows the paper's figure where
the release cannot be followed. Each choice is a key of `Config`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from models import backbones
from models.heads import MLP, batch_normalized
from models.losses import collapse_meters, feature_similarity, kl_divergence
from models.methods import Method, MethodConfig
from models.reactnet import Config as ReActNetConfig


class Config(MethodConfig):
    """BURN in a recipe."""

    num_views = 2
    schedules = ("balance",)
    name: Literal["burn"]
    student: ReActNetConfig
    teacher: backbones.Config
    hidden_dim: int = Field(default=2000, ge=1)
    out_dim: int = Field(default=2000, ge=1)
    temperature: float = Field(default=0.2, gt=0)
    target_gradient: Literal["none", "kl", "both"] = "kl"
    """Which loss terms train the teacher's classifier. `kl`: the KL term only, the feature term pushes the
    student alone (the figure's open lock on the classifier). `none`: a frozen random classifier, what the
    smallest repair of the release gives. `both`: both terms."""
    teacher_bn: Literal["train", "eval"] = "train"
    """Statistics of the frozen extractor: of each batch, as everything visible of the authors' setup does,
    or its own running ones (targets independent of the batch)."""
    target_center: bool = False
    """Targets go through a BatchNorm without scale and shift before the loss. Ours, not the paper's: their cosine is
    mostly that of their common mean otherwise."""

    @property
    def cacheable(self) -> str:
        """The teacher, where no other image of a batch changes its features."""
        if self.teacher_bn != "eval":
            raise ValueError("the teacher's features depend on the batch; set method.teacher_bn=eval")
        return "teacher"

    def build(self) -> Burn:
        """See `Burn`."""
        return Burn(self)

    def variants(self) -> dict[str, tuple[str, MethodConfig]]:
        """A teacher that normalizes by its own statistics can fold them into its convolutions."""
        if self.teacher_bn == "eval":
            return {}
        what = "and the teacher's own running statistics (other targets than the reference's)"
        return {"teacher_bn eval": (what, self.model_copy(update={"teacher_bn": "eval"}))}


class Burn(Method):
    """L = ℓ(s1, t2) + ℓ(s2, t1) with ℓ = mean of (1 - λ)·FS + λ·KL; λ is the scheduled scalar `balance`."""

    views_per_backbone = 2
    collapse = {  # noqa: RUF012
        **Method.collapse,
        "target_information": (
            0.05,
            "slow the teacher's classifier with optim.lr_scale={teacher_head: 1e-3} or freeze it with "
            "method.target_gradient=none",
        ),
    }

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.student = config.student.build()
        self.student_head = MLP(self.student.out_channels, config.hidden_dim, config.out_dim, norm=True)
        self.teacher = backbones.frozen(config.teacher, folds=config.teacher_bn == "eval")
        self.teacher_head = MLP(self.teacher.out_channels, config.hidden_dim, config.out_dim, norm=True)
        self.teacher_head.requires_grad_(config.target_gradient != "none")

    def train(self, mode: bool = True) -> Burn:
        """Keep the extractor in evaluation mode where the recipe says so."""
        super().train(mode)
        if self.config.teacher_bn == "eval":
            self.teacher.eval()
        return self

    def forward(
        self, views: list[Tensor], label: Tensor | None, values: dict[str, Tensor], features: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Two views [B, 3, H, W]; see the class for the loss. Each view is a forward of its own, so that
        BatchNorm statistics are per view as in the reference; the heads see which rows are of which view."""
        if features is None:
            with torch.no_grad():
                features = torch.stack([self.teacher(view) for view in views])
        targets = self.teacher_head(features)  # [V, B, out_dim]
        if self.config.target_center:
            targets = batch_normalized(targets)
        outputs = self.student_head(torch.stack([self.student(view) for view in views]))
        return burn_loss(outputs.unbind(), targets.unbind(), values["balance"], self.config)

    def outputs(self, features: Tensor) -> Tensor:
        """The student's classifier outputs over the temperature."""
        return self.student_head(features) / self.config.temperature

    @property
    def evaluated(self) -> nn.Module:
        """The student's backbone."""
        return self.student


def burn_loss(
    outputs: Sequence[Tensor], targets: Sequence[Tensor], balance: Tensor, config: Config
) -> dict[str, Tensor]:
    """BURN's loss on classifier outputs.

    Args:
        outputs: s1, s2 [B, C], the student's classifier outputs for the two views.
        targets: t1, t2 [B, C], the teacher's (normalized with `target_center`), with a graph to its classifier.
        balance: λ, 0-d; multiplies the KL term, the feature term gets 1 - λ.

    Returns:
        `loss` and, detached, its two terms and the collapse meters of the targets.
    """
    kl_targets = [t.detach() if config.target_gradient == "none" else t for t in targets]
    feature_targets = [t if config.target_gradient == "both" else t.detach() for t in targets]
    pairs = ((0, 1), (1, 0))  # cross-view, summed over both directions
    kl = torch.stack([kl_divergence(outputs[s], kl_targets[t], config.temperature).mean() for s, t in pairs])
    feature = torch.stack([feature_similarity(outputs[s], feature_targets[t]).mean() for s, t in pairs])
    loss = ((1 - balance) * feature + balance * kl).sum()
    meters = collapse_meters(targets[0].detach(), config.temperature)
    return {
        "loss": loss,
        "kl": kl.detach().sum(),
        "feature": feature.detach().sum(),
        **{f"target_{name}": value for name, value in meters.items()},
    }
