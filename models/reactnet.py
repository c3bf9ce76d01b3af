"""ReActNet-A, the binary student: MobileNet-shaped, every 3x3 and 1x1 convolution after the stem binary."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from models.binary import BinaryConv2d, Estimator, Precision, RPReLU, Shift, binarize_activation
from models.contract import Backbone, BackboneConfig
from models.halfblock import ChannelParameters, HalfBlock, Residual, half_block
from models.weight_signs import on_signs

# Of ReActNet-A (ReActNet, table of section 4).
CHANNEL_MULTIPLES = (1, 2, 4, 4, 8, 8, 16, 16, 16, 16, 16, 16, 32, 32)


class Config(BackboneConfig):
    """A ReActNet-A in a recipe. Stage 1 is `weights: real`, stage 2 and single stage `weights: binary`."""

    only_in_training = ("estimator",)
    on_top = {"pooled_mlp": "fc"}  # noqa: RUF012
    arch: Literal["reactnet"] = "reactnet"
    width: int = Field(default=32, ge=1)
    multiples: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=CHANNEL_MULTIPLES, min_length=2)
    """Output channels of the stem and of each block, as multiples of `width`: each the one before or twice that."""
    stem_stride: Literal[1, 2] = 2
    weights: Precision = "binary"
    activations: Precision = "binary"
    estimator: Estimator = "burn"
    pooled_mlp: bool = True
    """The pooled 1024 -> 1024 layer with ReLU that BURN puts on top (`use_mlp` there)."""

    @property
    def fusable(self) -> bool:
        """Half-blocks are fused where convolutions read signs."""
        return self.activations == "binary"

    @property
    def has_fc(self) -> bool:
        """As the recipe says."""
        return self.pooled_mlp

    def check_side(self, side: int) -> None:
        """Refuse an image side whose map after the stem cannot be halved that often (four times in ReActNet-A).

        Raises:
            ValueError: names the nearest legal sides.
        """

        def legal(s: int) -> bool:
            return s > 0 and -(-s // self.stem_stride) % 2**self.halvings == 0

        if not legal(side):
            below = next((s for s in range(side, 0, -1) if legal(s)), None)
            above = next(s for s in range(side + 1, side + 4 * 2**self.halvings) if legal(s))
            nearest = f"{above}" if below is None else f"{below} or {above}"
            raise ValueError(
                f"image side {side} does not fit ReActNet with stem_stride {self.stem_stride}: "
                f"expected ceil(side / {self.stem_stride}) to be a multiple of {2**self.halvings}, nearest {nearest}"
            )

    @property
    def halvings(self) -> int:
        """Blocks that halve the map: all that double the channels but the first."""
        return sum(b != a for a, b in pairwise(self.multiples[1:]))

    @property
    def strides(self) -> tuple[int, ...]:
        """One for each halving, and that of the stem."""
        return tuple(self.stem_stride * 2**halved for halved in range(self.halvings + 1))

    @model_validator(mode="after")
    def _doubles(self) -> Config:
        if self.multiples[0] != 1 or any(b not in (a, 2 * a) for a, b in pairwise(self.multiples)):
            raise ValueError(
                f"multiples: expected 1, then each the one before or twice that, got {list(self.multiples)}"
            )
        return self

    def build(self) -> ReActNet:
        """See `ReActNet`."""
        return ReActNet(self)


class Block(nn.Module):
    """Binary 3x3 then binary 1x1, each with BatchNorm, a shortcut and RPReLU (ReActNet, figure 3).

    A doubling block runs two 1x1 convolutions on the same input and concatenates their outputs, each added
    to the same shortcut.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, config: Config) -> None:
        """`out_channels` is `in_channels` or twice that."""
        super().__init__()
        assert out_channels in (in_channels, 2 * in_channels)

        def conv(kernel_size: int, stride: int = 1) -> BinaryConv2d:
            return BinaryConv2d(
                in_channels,
                in_channels,
                kernel_size,
                stride=stride,
                weights=config.weights,
                activations=config.activations,
                estimator=config.estimator,
            )

        self.stride = stride
        self.shift1 = Shift(in_channels)
        self.conv3x3 = conv(3, stride)
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.act1 = RPReLU(in_channels)
        self.shift2 = Shift(in_channels)
        copies = out_channels // in_channels
        self.conv1x1 = nn.ModuleList(conv(1) for _ in range(copies))
        self.norm2 = nn.ModuleList(nn.BatchNorm2d(in_channels) for _ in range(copies))
        self.act2 = RPReLU(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C or 2C, H/stride, W/stride]."""
        shortcut = F.avg_pool2d(x, 2) if self.stride == 2 else x
        h = self.act1(self.norm1(self.conv3x3(self.shift1(x))) + shortcut)
        z = self.shift2(h)
        halves = [norm(conv(z)) + h for conv, norm in zip(self.conv1x1, self.norm2, strict=True)]
        return self.act2(halves[0] if len(halves) == 1 else torch.cat(halves, dim=1))

    def fused(
        self, stream: Tensor, sign: Tensor, weights: Sequence[tuple[Tensor, Tensor]], threshold: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The same in two passes over memory for each half (`models/halfblock.py`), in training mode.

        Args:
            stream: the block's input [B, C, H, W], channels_last.
            sign: its signs beyond `shift1`.
            weights: of both halves, as `weight_signs.on_signs` gives them.
            threshold: the next block's `shift1` [C'], None after the last block.

        Returns:
            The block's output and its signs for the next block.
        """
        residual: Residual = "pooled" if self.stride == 2 else "same"
        threshold2 = self.shift2.bias.flatten()
        half = _half(self.conv3x3, weights[0], [self.norm1], self.act1, sign, stream, threshold2, residual)
        assert half.sign is not None
        residual = "same" if len(self.conv1x1) == 1 else "doubled"
        # Two convolutions of one input are one of twice the channels.
        half = _half(self.conv1x1[0], weights[1], self.norm2, self.act2, half.sign, half.stream, threshold, residual)
        return half.stream, half.sign


def _half(
    conv: Any,
    weights: tuple[Tensor, Tensor],
    norms: Any,
    act: RPReLU,
    sign: Tensor,
    stream: Tensor,
    threshold: Tensor | None,
    residual: Residual,
) -> HalfBlock:
    weight, scale = weights
    c = F.conv2d(sign, weight, stride=conv.stride, padding=conv.padding)
    parameters = ChannelParameters(
        gamma=torch.cat([norm.weight for norm in norms]),
        beta=torch.cat([norm.bias for norm in norms]),
        eps=norms[0].eps / scale.square(),
        shift_in=act.shift_in.bias.flatten(),
        slope=act.prelu.weight,
        shift_out=act.shift_out.bias.flatten(),
        threshold=threshold,
    )
    half = half_block(c, stream, parameters, residual, conv.estimator)
    with torch.no_grad():
        # Checkpoints hold the statistics of the scaled convolution.
        count = c.numel() // c.shape[1]
        means = (half.mean * scale).chunk(len(norms))
        variances = (half.var * scale.square() * (count / max(count - 1, 1))).chunk(len(norms))
        for norm, mean, variance in zip(norms, means, variances, strict=True):
            norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), norm.momentum)
            norm.running_var.lerp_(variance.to(norm.running_var.dtype), norm.momentum)
    return half


class ReActNet(Backbone):
    """ReActNet-A without a classifier.

    Args:
        config: see `Config`. The default is the network of BURN: 29,368,192 parameters, features [B, 1024].
    """

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        channels = [config.width * multiple for multiple in config.multiples]
        self.stem = nn.Sequential(
            nn.Conv2d(3, channels[0], 3, stride=config.stem_stride, padding=1, bias=False),
            nn.BatchNorm2d(channels[0]),
        )
        # The first block widens without pooling; every later change of width halves the map.
        self.blocks = nn.ModuleList(
            Block(c_in, c_out, 2 if c_out != c_in and i > 0 else 1, config)
            for i, (c_in, c_out) in enumerate(pairwise(channels))
        )
        self.out_channels = channels[-1]
        self.fc = nn.Linear(channels[-1], channels[-1]) if config.pooled_mlp else None
        self._initialize()

    def _initialize(self) -> None:
        # He-normal, fan_in, ReLU gain for every convolution, the binary ones included; `fc` keeps PyTorch's
        # default, as in BURN's stage 1 (its single-stage run initializes nothing, which we do not repeat).
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")

    def map(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] to the last feature map, in ReActNet-A [B, C, H/32, W/32] (H/16 with `stem_stride: 1`).

        Raises:
            ValueError: an image side that does not divide down to the last map.
        """
        return self._through(list(self.blocks), self._stem(x))

    def maps(self, x: Tensor, until: int | None = None) -> dict[int, Tensor]:
        """See `Backbone.maps`: in ReActNet-A 64, 128, 256, 512 and 1024 channels at strides 2 to 32.

        Raises:
            ValueError: an image side that does not divide down to the last map.
        """
        x, found = self._stem(x), {}
        for stride, blocks in zip(self.config.strides, self._stages(), strict=True):
            if until is None or stride <= until:
                found[stride] = x = self._through(blocks, x)
        return found

    def last_stage(self, x: Tensor) -> Tensor:
        """See `Backbone.last_stage`: from the last block that halves the map on."""
        return self._through(self._stages()[-1], x)

    def _stem(self, x: Tensor) -> Tensor:
        for side in x.shape[-2:]:
            self.config.check_side(side)
        return self.stem(x)

    def _stages(self) -> list[list[Any]]:
        """The blocks of each stride."""
        blocks: list[Any] = list(self.blocks)
        starts = [0, *(number for number, block in enumerate(blocks) if block.stride == 2), len(blocks)]
        return [blocks[first:last] for first, last in pairwise(starts)]

    def _through(self, blocks: list[Any], x: Tensor) -> Tensor:
        if self.fused and self.config.fusable and self.training:
            return self._fused(blocks, x)
        for block in blocks:
            x = block(x)
        return x

    def _fused(self, blocks: list[Any], x: Tensor) -> Tensor:
        sign: Any = binarize_activation(blocks[0].shift1(x), self.config.estimator)
        weights = on_signs([group for block in blocks for group in ([block.conv3x3], [*block.conv1x1])], sign.dtype)
        for number, (block, after) in enumerate(zip(blocks, [*blocks[1:], None], strict=True)):
            threshold = after.shift1.bias.flatten() if after is not None else None
            x, sign = block.fused(x, sign, weights[2 * number : 2 * number + 2], threshold)
        counters = [
            buffer for block in blocks for name, buffer in block.named_buffers() if name.endswith("num_batches_tracked")
        ]
        torch._foreach_add_(counters, 1)
        return x

    def pooled(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] to the pooled map [B, C], before the pooled MLP."""
        return self.map(x).mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] to features [B, C]."""
        x = self.pooled(x)
        return F.relu(self.fc(x)) if self.fc is not None else x
