"""SwAV: predict one view's cluster from another, clusters by optimal transport (Caron et al. 2020)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from models import backbones, collectives
from models.heads import MLP
from models.losses import cross_entropy_with, sinkhorn
from models.methods import Method, MethodConfig
from models.precision import at_least_float32


class Config(MethodConfig):
    """SwAV in a recipe.

    Two scheduled scalars switch (`shape: switch`): `prototypes` from 0 to 1 when the prototypes begin to train,
    `queue` from 0 to 1 when earlier embeddings begin to fill the queues.
    """

    num_views = 2
    schedules = ("prototypes", "queue")
    takes_more_views = True
    name: Literal["swav"]
    backbone: backbones.Config
    hidden_dim: int = Field(default=2048, ge=1)
    out_dim: int = Field(default=128, ge=1)
    num_prototypes: int = Field(default=3000, ge=2)
    temperature: float = Field(default=0.1, gt=0)
    epsilon: float = Field(default=0.05, gt=0)
    """Sinkhorn's entropy regularization."""
    sinkhorn_iterations: int = Field(default=3, ge=1)
    queue_size: int = Field(default=0, ge=0)
    """Embeddings of earlier steps that join the assignment of each of the two assigning views; over all ranks."""

    def build(self) -> SwAV:
        """See `SwAV`."""
        return SwAV(self)


class SwAV(Method):
    """The first two views assign, all others are predicted: ℓ_i = mean over v ≠ i of H(q_i, softmax(s_v / T)).

    Queue and prototypes are the same on all ranks; each rank takes its share of the queue into the assignment, so
    that the result is that of one process on all images.
    """

    views_per_backbone = None
    moved_after_step = ("queue",)

    queue: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.backbone = config.backbone.build()
        self.head = MLP(self.backbone.out_channels, config.hidden_dim, config.out_dim, norm=True)
        self.prototypes = nn.Linear(config.out_dim, config.num_prototypes, bias=False)
        # Newest first, zeros until filled.
        self.register_buffer("queue", torch.zeros(2, config.queue_size, config.out_dim))
        self._new: list[Tensor] = []
        self._normalize_prototypes()

    def forward(
        self, views: list[Tensor], label: Tensor | None, values: dict[str, Tensor], features: Tensor | None = None
    ) -> dict[str, Tensor]:
        """V >= 2 views [B, 3, H, W] to the swapped prediction loss; neighbors of one size go through the backbone
        in one call, so that BatchNorm's statistics are per resolution."""
        size = len(views[0])
        features = torch.cat([self.backbone(images) for images in by_size(views)])  # [V·B, D]
        embedding = F.normalize(at_least_float32(self.head(features)), dim=1)
        # Float32 whatever autocast says: exp(s / 0.05) makes a 16-bit rounding of s a percent of the assignment.
        with torch.autocast(embedding.device.type, enabled=False):
            weight = self.prototypes.weight.to(embedding.dtype)
            scores = (embedding @ weight.T).unflatten(0, (len(views), size))  # [V, B, K]
            with torch.no_grad():
                kept = embedding[: 2 * size].unflatten(0, (2, size))  # [2, B, D]
                assignment = self.assign(kept, scores[:2], weight, values["queue"])
        losses = [
            torch.stack(
                [
                    cross_entropy_with(assignment[i], scores[v], self.config.temperature).mean()
                    for v in range(len(views))
                    if v != i
                ]
            ).mean()
            for i in range(2)
        ]
        mean = assignment[0].mean(dim=0)
        return {
            "loss": (losses[0] + losses[1]) / 2,
            "target_entropy": -torch.special.xlogy(assignment[0], assignment[0]).sum(dim=1).mean(),
            "target_entropy_of_mean": -torch.special.xlogy(mean, mean).sum(),
        }

    def assign(self, embedding: Tensor, scores: Tensor, weight: Tensor, queue_on: Tensor) -> Tensor:
        """[2, B, D] and their scores [2, B, K] to assignments [2, B, K] whose rows sum to 1."""
        rows = torch.ones(scores.shape[:2], dtype=scores.dtype, device=scores.device)
        if self.config.queue_size:
            self._new.append(embedding.transpose(0, 1))  # [B, 2, D]
            mine = self.queue.tensor_split(collectives.world_size(), dim=1)[collectives.rank()].to(scores.dtype)
            # Until its oldest row is filled the queue weighs nothing; on the device, so that no step waits for it.
            is_full = self.queue[:, -1].ne(0).any(dim=1) & (queue_on > 0)  # [2]
            rows = torch.cat((is_full[:, None].to(rows.dtype).expand(-1, mine.shape[1]), rows), dim=1)
            scores = torch.cat((mine @ weight.T, scores), dim=1)
        size = embedding.shape[1]
        return sinkhorn(scores, rows, self.config.epsilon, self.config.sinkhorn_iterations)[:, -size:]

    def before_update(self, values: dict[str, float]) -> None:
        """Drop the prototypes' gradient while they are frozen."""
        if values["prototypes"] < 1:
            self.prototypes.weight.grad = None

    @torch.no_grad()
    def after_step(self, values: dict[str, float]) -> None:
        """Bring the prototypes back to unit length; put this step's embeddings into the queues."""
        self._normalize_prototypes()
        if self._new and values["queue"] > 0:
            new = collectives.all_gather(torch.cat(self._new)).transpose(0, 1).to(self.queue.dtype)  # [2, N, D]
            self.queue.copy_(torch.cat((new, self.queue), dim=1)[:, : self.config.queue_size])
        self._new.clear()

    @torch.no_grad()
    def _normalize_prototypes(self) -> None:
        weight = self.prototypes.weight
        weight.copy_(F.normalize(weight, dim=1))

    def outputs(self, features: Tensor) -> Tensor:
        """Scores of the prototypes over the temperature."""
        return self.prototypes(F.normalize(self.head(features), dim=1)) / self.config.temperature

    @property
    def evaluated(self) -> nn.Module:
        """The backbone."""
        return self.backbone


def by_size(views: list[Tensor]) -> list[Tensor]:
    """Neighboring views of one size as one batch, view after view."""
    groups: list[list[Tensor]] = []
    for view in views:
        if groups and groups[-1][0].shape == view.shape:
            groups[-1].append(view)
        else:
            groups.append([view])
    return [group[0] if len(group) == 1 else torch.cat(group) for group in groups]
