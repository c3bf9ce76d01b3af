"""The backbones that a recipe can name, by `arch`, and how they are made ready to train."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn

from models.contract import Backbone, BackboneConfig
from models.reactnet import Config as ReActNetConfig
from models.resnet import Config as ResNetConfig

Config = Annotated[ReActNetConfig | ResNetConfig, Field(discriminator="arch")]


def frozen(config: BackboneConfig, *, folds: bool) -> Backbone:
    """Build a teacher: nothing of it trains; with `folds` it drops its BatchNorm in evaluation mode, if it can."""
    network = config.build().requires_grad_(False)
    network.folds = folds
    return network


def backbones_of(module: nn.Module) -> dict[str, Backbone]:
    """Name -> backbone of all that are in `module`."""
    return {name: part for name, part in module.named_modules() if isinstance(part, Backbone)}


def prepare(
    method: nn.Module, *, channels_last: bool, fused: bool, compiled: bool, compile_options: dict[str, Any]
) -> None:
    """Make a method ready to train, in place: keys of its checkpoint never know of it.

    Args:
        channels_last: lay the weights of convolutions out as [out, k, k, in] in memory.
        fused: run the fused form of the backbones that have one.
        compiled: compile each backbone as one graph that all of its views share; heads and losses are 0.2 % of the
            arithmetic.
        compile_options: settings of `torch._inductor.config`.
    """
    if channels_last:
        for parameter in method.parameters():
            # Only where there is a spatial extent: on [C, 1, 1] the two layouts are one and PyTorch's answer to which
            # it is differs between a parameter and its gradient.
            if parameter.ndim == 4 and parameter.shape[2] * parameter.shape[3] > 1:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    for part in backbones_of(method).values():
        part.fused = fused
        if compiled:
            part.compile(fullgraph=True, dynamic=False, options=compile_options)
