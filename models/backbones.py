"""The backbones that a recipe can name, by `arch`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from models.reactnet import Config as ReActNetConfig
from models.reactnet import ReActNet
from models.resnet import Config as ResNetConfig
from models.resnet import ResNet

Config = Annotated[ReActNetConfig | ResNetConfig, Field(discriminator="arch")]


Backbone = ReActNet | ResNet


def build(config: ReActNetConfig | ResNetConfig) -> Backbone:
    """Build a backbone: images [B, 3, H, W] to features [B, `out_channels`]."""
    return ReActNet(config) if isinstance(config, ReActNetConfig) else ResNet(config)


def frozen(config: ReActNetConfig | ResNetConfig, *, folds: bool) -> Backbone:
    """Build a teacher: nothing of it trains; with `folds` a ResNet drops its BatchNorm in evaluation mode."""
    network = build(config).requires_grad_(False)
    if isinstance(network, ResNet):
        network.folds = folds
    return network
