"""The backbones that a recipe can name, by `arch`, and how they are made ready to train."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from models.contract import Backbone, BackboneConfig
from models.imported import Config as ImportedConfig
from models.reactnet import Config as ReActNetConfig
from models.resnet import Config as ResNetConfig

Config = Annotated[ReActNetConfig | ResNetConfig | ImportedConfig, Field(discriminator="arch")]


def frozen(config: BackboneConfig, *, folds: bool) -> Backbone:
    """Build a teacher: nothing of it trains; with `folds` it drops its BatchNorm in evaluation mode, if it can."""
    network = config.build().requires_grad_(False)
    network.folds = folds
    return network


def is_backbone(state: Mapping[str, Tensor]) -> bool:
    """Whether a part of a weight file, under our names, is one of these networks and not a head."""
    return "stem.0.weight" in state or "layer1.0.conv1.weight" in state


def recognized(state: Mapping[str, Tensor]) -> BackboneConfig:
    """The network that tensors under our names belong to. They do not say whether weights are binary, nor the stride of
    a ReActNet's stem: those are the published ones'.

    Raises:
        ValueError: none of ours.
    """
    if "stem.0.weight" in state:
        width = len(state["stem.0.weight"])
        outputs = [len(state[key]) for key in _numbered(state, "blocks.{}.act2.prelu.weight")]
        return ReActNetConfig(
            width=width,
            multiples=(1, *(channels // width for channels in outputs)),
            pooled_mlp="fc.weight" in state,
        )
    depths = tuple(len(_numbered(state, f"layer{layer}.{{}}.conv1.weight")) for layer in range(1, 5))
    kind = (depths, "layer1.0.conv3.weight" in state)
    if kind not in _RESNETS:
        raise ValueError(f"a ResNet of {depths} blocks, expected one of {', '.join(_RESNETS.values())}")
    return ResNetConfig(arch=_RESNETS[kind], stem="small" if state["conv1.weight"].shape[-1] == 3 else "imagenet")


_RESNETS: dict[Any, Any] = {
    ((2, 2, 2, 2), False): "resnet18",
    ((3, 4, 6, 3), False): "resnet34",
    ((3, 4, 6, 3), True): "resnet50",
}


def _numbered(state: Mapping[str, Tensor], key: str) -> list[str]:
    """The keys of this form that are there, counted from 0 on."""
    return list(itertools.takewhile(state.__contains__, map(key.format, itertools.count())))


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
