"""Floating-point teachers: torchvision's ResNets without their classifier."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from models.contract import Backbone, BackboneConfig


class Config(BackboneConfig):
    """A torchvision ResNet in a recipe: `resnet50` for ImageNet, `resnet18` for small data."""

    arch: Literal["resnet18", "resnet34", "resnet50"]
    stem: Literal["imagenet", "small"] = "imagenet"
    """`small`: a 3x3 stem of stride 1 without max-pooling, for images of 32 to 64 pixels (SimCLR, appendix B.9)."""

    @property
    def strides(self) -> tuple[int, ...]:
        """Of the four layers."""
        return (4, 8, 16, 32) if self.stem == "imagenet" else (1, 2, 4, 8)

    def build(self) -> ResNet:
        """See `ResNet`."""
        return ResNet(self)


class ResNet(Backbone):
    """A torchvision ResNet up to its global average pool.

    Keys of `state_dict()` are torchvision's without `fc.*` (318 for ResNet-50), so that its files load as they are.
    """

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        net = getattr(torchvision.models, config.arch)(weights=None)
        self.out_channels: int = net.fc.in_features
        if config.stem == "small":
            net.conv1 = nn.Conv2d(3, 64, 3, stride=1, padding=1, bias=False)
            nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
            net.maxpool = nn.Identity()
        for name in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"):
            self.add_module(name, getattr(net, name))
        self._folded: list[ResNet] = []  # in a list, so that it is not a child and not in the state
        self._folded_from: Any = None

    def train(self, mode: bool = True) -> ResNet:
        """Switch the mode; folding happens here, so load weights before."""
        super().train(mode)
        if self.folds and not mode and not next(self.parameters()).is_meta:
            now = [(t.data_ptr(), t._version, t.dtype, t.device) for t in (*self.parameters(), *self.buffers())]
            if now != self._folded_from:
                self._folded, self._folded_from = [folded(self)], now
        return self

    def map(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] to the last map [B, 512 or 2048, H/32, W/32] (H/8 with `stem: small`)."""
        if self._folded and not self.training:
            return self._folded[0].map(x)
        for module in self.children():
            x = module(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] to features [B, 512 or 2048]."""
        return torch.flatten(self.map(x).mean(dim=(2, 3)), 1)

    def maps(self, x: Tensor, until: int | None = None) -> dict[int, Tensor]:
        """See `Backbone.maps`: what the four layers give."""
        found = {}
        for name in ("conv1", "bn1", "relu", "maxpool"):
            x = self.get_submodule(name)(x)
        for stride, name in zip(self.config.strides, ("layer1", "layer2", "layer3", "layer4"), strict=True):
            if until is None or stride <= until:
                found[stride] = x = self.get_submodule(name)(x)
        return found

    def last_stage(self, x: Tensor) -> Tensor:
        """See `Backbone.last_stage`: `layer4`."""
        return self.get_submodule("layer4")(x)


@torch.no_grad()
def folded(network: ResNet) -> ResNet:
    """A copy in evaluation mode without BatchNorm: W' = W·γ/√(σ² + ε), b' = β - μ·γ/√(σ² + ε), made in float64."""
    parameter = next(network.parameters())
    twin = ResNet(network.config).to(parameter.device, torch.float64)
    twin.load_state_dict(network.state_dict())
    twin.eval().requires_grad_(False)
    for module in list(twin.modules()):
        names = list(module._modules)
        for conv, norm in pairwise(names):  # torchvision registers every BatchNorm behind its convolution
            one, other = module._modules[conv], module._modules[norm]
            if isinstance(one, nn.Conv2d) and isinstance(other, nn.BatchNorm2d):
                module._modules[conv] = fuse_conv_bn_eval(one, other)
                module._modules[norm] = nn.Identity()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in twin.modules())
    layout = torch.channels_last if parameter.is_contiguous(memory_format=torch.channels_last) else None
    twin.to(parameter.dtype)
    return twin.to(memory_format=layout) if layout else twin
