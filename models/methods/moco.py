"""MoCo v2: contrast with a momentum encoder and a queue (He et al. 2020; Chen et al. 2020).

Makes a floating-point teacher where no file can be had.
"""

from __future__ import annotations

import copy
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from models import backbones, collectives
from models.heads import MLP
from models.losses import info_nce
from models.methods import Method as Base
from models.methods import MethodConfig


class Config(MethodConfig):
    """MoCo v2 in a recipe. Its momentum is the scheduled scalar `momentum` (0.999 constant in the paper)."""

    name: Literal["moco"]
    backbone: backbones.Config
    out_dim: int = Field(default=128, ge=1)
    queue_size: int = Field(default=65536, ge=1)
    temperature: float = Field(default=0.2, gt=0)


class Method(Base):
    """Query of view 1 against the key of view 2 and the queue; only the query is trained by the optimizer."""

    num_views = 2
    schedules = ("momentum",)
    moved_after_step = ("key_backbone.", "key_head.", "queue")

    queue: Tensor
    queue_pointer: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbones.build(config.backbone)
        width = self.backbone.out_channels
        self.head = MLP(width, width, config.out_dim, norm=False)
        self.key_backbone = copy.deepcopy(self.backbone).requires_grad_(False)
        self.key_head = copy.deepcopy(self.head).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(config.out_dim, config.queue_size), dim=0))
        self.register_buffer("queue_pointer", torch.zeros((), dtype=torch.int64))
        self._new_keys: list[Tensor] = []

    def forward(self, views: list[Tensor], label: Tensor, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Two views [B, 3, H, W] to the InfoNCE loss; the keys wait for `after_step`, so that accumulation
        sees one queue for the whole optimizer step."""
        query = F.normalize(self.head(self.backbone(views[0])), dim=1)  # [B, D]
        with torch.no_grad():
            key = self._keys(views[1])  # [B, D]
        loss, accuracy = info_nce(query, key, self.queue, self.config.temperature)
        self._new_keys.append(collectives.all_gather(key))
        return {"loss": loss, "contrast_top1": accuracy}

    def _keys(self, images: Tensor) -> Tensor:
        # Shuffled BatchNorm: each rank's key statistics come from images of all ranks, so that query and key
        # cannot recognise each other by them. Every rank draws the same permutation from the step's seed.
        world, rank, size = collectives.world_size(), collectives.rank(), len(images)
        order = torch.randperm(world * size) if world > 1 else None
        if order is not None:
            mine = order[rank * size : (rank + 1) * size].to(images.device)
            images = collectives.all_gather(images)[mine].contiguous(memory_format=torch.channels_last)
        key = F.normalize(self.key_head(self.key_backbone(images)), dim=1)
        if order is not None:
            back = order.argsort()[rank * size : (rank + 1) * size].to(images.device)
            key = collectives.all_gather(key)[back]
        return key

    @torch.no_grad()
    def after_step(self, values: dict[str, float]) -> None:
        """Move the key encoder's parameters towards the query's, then put this step's keys into the queue."""
        for mine, theirs in ((self.key_backbone, self.backbone), (self.key_head, self.head)):
            torch._foreach_lerp_(list(mine.parameters()), list(theirs.parameters()), 1 - values["momentum"])
        keys = torch.cat(self._new_keys)[-self.config.queue_size :]  # [N, D]
        self._new_keys.clear()
        places = (self.queue_pointer + torch.arange(len(keys), device=keys.device)) % self.config.queue_size
        self.queue.index_copy_(1, places, keys.T.to(self.queue.dtype))
        self.queue_pointer.copy_((self.queue_pointer + len(keys)) % self.config.queue_size)

    @property
    def evaluated(self) -> nn.Module:
        """The query backbone."""
        return self.backbone
