"""Floating-point teachers: torchvision's ResNets without their classifier."""

from __future__ import annotations

from typing import Literal

import torch
import torchvision
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn


class Config(BaseModel):
    """A torchvision ResNet in a recipe: `resnet50` for ImageNet, `resnet18` for small data."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    arch: Literal["resnet18", "resnet34", "resnet50"]
    stem: Literal["imagenet", "small"] = "imagenet"
    """`small`: a 3x3 stem of stride 1 without max-pooling, for images of 32 to 64 pixels (SimCLR, appendix B.9)."""


class ResNet(nn.Module):
    """A torchvision ResNet up to its global average pool.

    Keys of `state_dict()` are torchvision's without `fc.*` (318 for ResNet-50), so that its files load as they are.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        net = getattr(torchvision.models, config.arch)(weights=None)
        self.out_channels: int = net.fc.in_features
        if config.stem == "small":
            net.conv1 = nn.Conv2d(3, 64, 3, stride=1, padding=1, bias=False)
            nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
            net.maxpool = nn.Identity()
        for name in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"):
            self.add_module(name, getattr(net, name))

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] to features [B, 512 or 2048]."""
        for module in self.children():
            x = module(x)
        return torch.flatten(x.mean(dim=(2, 3)), 1)
