"""Networks that follow another one by a moving average, and contrast with what they have seen: the parts of MoCo that
other methods use too (He et al. 2020)."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import collectives
from models.contract import BackboneConfig
from models.heads import MLP
from models.losses import info_nce
from models.methods import Method


@torch.no_grad()
def update_average(network: nn.Module, leader: nn.Module, momentum: float) -> None:
    """Move a momentum network's parameters: p <- m·p + (1 - m)·leader's. Buffers stay its own."""
    torch._foreach_lerp_(list(network.parameters()), list(leader.parameters()), 1 - momentum)


class Contrast(nn.Module):
    """What a query is contrasted with: the momentum encoder's keys of this batch, and those of the last ones.

    Args:
        backbone, head: the query encoder, copied.
        out_dim, queue_size, temperature: D and K of the queue [D, K], T of InfoNCE.
    """

    queue: Tensor
    queue_pointer: Tensor

    def __init__(self, backbone: nn.Module, head: nn.Module, out_dim: int, queue_size: int, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.key_backbone = copy.deepcopy(backbone).requires_grad_(False)
        self.key_head = copy.deepcopy(head).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(out_dim, queue_size), dim=0))
        self.register_buffer("queue_pointer", torch.zeros((), dtype=torch.int64))
        self._new_keys: list[Tensor] = []

    def forward(self, query: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """Unit queries [B, D] and the other view of their images [B, 3, H, W] to InfoNCE and its accuracy, 0-d.

        The keys wait for `after_step`, so that accumulation sees one queue for the whole optimizer step.
        """
        with torch.no_grad():
            key = self._keys(images)  # [B, D]
        loss, accuracy = info_nce(query, key, self.queue, self.temperature)
        self._new_keys.append(collectives.all_gather(key))
        return loss, accuracy

    def _keys(self, images: Tensor) -> Tensor:
        # Shuffled BatchNorm: each rank's key statistics come from images of all ranks, so that query and key
        # cannot recognize each other by them. Every rank draws the same permutation from the step's seed.
        world, rank, size = collectives.world_size(), collectives.rank(), len(images)
        order = torch.randperm(world * size) if world > 1 else None
        if order is not None:
            taken = _without_wait(order[rank * size : (rank + 1) * size], images.device)
            images = collectives.all_gather(images)[taken].contiguous(memory_format=torch.channels_last)
        key = F.normalize(self.key_head(self.key_backbone(images)), dim=1)
        if order is not None:
            back = _without_wait(order.argsort()[rank * size : (rank + 1) * size], images.device)
            key = collectives.all_gather(key)[back]
        return key

    @torch.no_grad()
    def after_step(self, backbone: nn.Module, head: nn.Module, momentum: float) -> None:
        """Move the key encoder's parameters toward the query's, then put this step's keys into the queue."""
        update_average(self.key_backbone, backbone, momentum)
        update_average(self.key_head, head, momentum)
        size = self.queue.shape[1]
        keys = torch.cat(self._new_keys)[-size:]  # [N, D]
        self._new_keys.clear()
        columns = (self.queue_pointer + torch.arange(len(keys), device=keys.device)) % size
        self.queue.index_copy_(1, columns, keys.T.to(self.queue.dtype))
        self.queue_pointer.copy_((self.queue_pointer + len(keys)) % size)


def _without_wait(indices: Tensor, device: torch.device) -> Tensor:
    # A copy from pageable memory would wait for the device.
    return indices.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else indices


class QueryEncoder(Method):
    """A backbone with MoCo's projection head, which is what S2-BNN trains too.

    Args:
        backbone: of the network that is trained.
        out_dim: D of the embedding.
        temperature: T of the loss.
    """

    def __init__(self, backbone: BackboneConfig, out_dim: int, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.backbone = backbone.build()
        width = self.backbone.out_channels
        self.head = MLP(width, width, out_dim, norm=False)

    def query(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] to unit embeddings [B, D]."""
        return F.normalize(self.head(self.backbone(images)), dim=1)

    def outputs(self, features: Tensor) -> Tensor:
        """The unit embedding over the temperature, read as logits as S2-BNN does."""
        return F.normalize(self.head(features), dim=1) / self.temperature

    @property
    def evaluated(self) -> nn.Module:
        """The query backbone."""
        return self.backbone
