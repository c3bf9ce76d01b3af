"""Object detection by fine-tuning a backbone: Faster R-CNN on its maps, as MoCo does on PASCAL VOC (He et al. 2020,
appendix A.8). See `models/detector.py` for the parts and for what differs from detectron2.

A binary backbone stays one: its latent weights train, its signs compute. Proposals, pyramid and predictor are floating
point. Selecting boxes makes the host wait for the device in each step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from models import backbones, detector
from models.contract import BackboneConfig
from models.methods import Method, MethodConfig
from models.precision import at_least_float32

LOSSES = {
    "loss_objectness": "objectness",
    "loss_rpn_box_reg": "proposal_boxes",
    "loss_classifier": "classes",
    "loss_box_reg": "boxes",
}
"""torchvision's names -> those that are logged."""


class Config(MethodConfig):
    """Detection in a recipe."""

    needs_labels = True
    takes_boxes = True
    name: Literal["detect"]
    backbone: backbones.Config
    num_classes: int = Field(ge=1)
    neck: Literal["c4", "fpn"] = "c4"
    """`c4`: proposals on the map before the backbone's last stage, which then runs on each of them, with a BatchNorm
    behind it. `fpn`: on a feature pyramid of the four coarsest maps; much cheaper, and all new but the backbone."""
    norm: Literal["batch", "frozen"] = "batch"
    """The backbone's BatchNorm. `batch`: it trains, with the statistics of each batch. `frozen`: statistics, scales and
    shifts stay as they were loaded; the scale of a binary convolution then moves with its latent weights."""
    rois: int = Field(default=512, ge=1)
    """Proposals of each image that train."""
    pyramid_dim: int = Field(default=256, ge=1)
    """Channels of the pyramid's maps."""
    hidden_dim: int = Field(default=1024, ge=1)
    """Width of the two layers that look at the pyramid's boxes."""

    @model_validator(mode="after")
    def _has_maps(self) -> Config:
        if self.backbone.has_fc:
            raise ValueError(
                "backbone.pooled_mlp: expected false: a detector looks at maps, below it (a source that has one is "
                "loaded with drop: [fc])"
            )
        if len(self.backbone.strides) < 2:
            raise ValueError("backbone: expected a network with maps of at least two strides")
        return self

    @property
    def refuses(self) -> Mapping[str, tuple[bool | str, str]]:  # type: ignore[override]
        """The shapes change with every step; the fused half-block has no frozen statistics."""
        said: dict[str, tuple[bool | str, str]] = {
            "compile": (True, "the shapes of images and the number of boxes change in every step")
        }
        if self.norm == "frozen":
            said["kernels"] = ("fused", "they take the statistics of the batch, and method.norm is frozen")
        return said

    @property
    def classes(self) -> int:
        """As the recipe says."""
        return self.num_classes

    def check_classes(self, count: int) -> None:
        """Every class of the boxes needs an output, and every output a class."""
        if count != self.num_classes:
            raise ValueError(f"the recipe expects method.num_classes={self.num_classes}")

    def probing(self, network: BackboneConfig, layer: Literal["features", "pooled"]) -> MethodConfig:
        """A detector on the network, of which it takes all but the MLP; `layer` says nothing, maps lie below both."""
        top = {key: False for key, module in network.on_top.items() if module == "fc"}
        return self.model_copy(update={"backbone": network.model_copy(update=top)})

    def build(self) -> Detect:
        """See `Detect`."""
        return Detect(self)


class Detect(Method):
    """Losses of proposals and of boxes, summed."""

    collapse = {}  # noqa: RUF012

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.backbone = config.backbone.build()
        if config.norm == "frozen":
            for norm in self._norms():
                norm.requires_grad_(False)
        channels = self.backbone.map_channels
        strides = list(channels)
        if config.neck == "c4":
            trunk, last = strides[-2:]
            self.rpn = detector.region_proposals(channels[trunk], [detector.ANCHORS], kept=(12000, 6000))
            self.roi_norm = nn.BatchNorm2d(channels[last])
            self.predictor: nn.Module = detector.predictor(channels[last], config.num_classes)
            self.strides, self.bins = [trunk], 14
        else:
            self.strides, self.bins = strides[-4:], 7
            inputs = [channels[stride] for stride in self.strides]
            width, hidden = config.pyramid_dim, config.hidden_dim
            self.fpn = FeaturePyramidNetwork(inputs, width, LastLevelMaxPool())
            sides = [[side] for side in detector.ANCHORS[: len(inputs) + 1]]
            self.rpn = detector.region_proposals(width, sides, kept=(2000, 1000))
            self.predictor = nn.Sequential(
                TwoMLPHead(width * self.bins**2, hidden), detector.predictor(hidden, config.num_classes)
            )

    def _norms(self) -> list[nn.Module]:
        return [part for part in self.backbone.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]

    def train(self, mode: bool = True) -> Detect:
        """Switch all but what is frozen."""
        super().train(mode)
        if self.config.norm == "frozen":
            for norm in self._norms():
                norm.eval()
        return self

    def _maps(self, images: Tensor) -> dict[str, Tensor]:
        maps = self.backbone.maps(images, until=self.strides[-1])
        named = {str(stride): maps[stride] for stride in self.strides}
        return self.fpn(named) if self.config.neck == "fpn" else named

    def _stage(self, boxes: Tensor) -> Tensor:
        if self.config.neck == "fpn":
            return boxes
        # The backbone's own last stage, so that it is one network before and after.
        return self.roi_norm(self.backbone.last_stage(boxes)).mean(dim=(2, 3))

    def _run(self, images: Tensor, label: Tensor) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """torchvision's detections (in evaluation mode) and losses (in training mode)."""
        whole, boxes = detector.targets(images, label)
        maps = self._maps(images)
        # Anchors take the precision of the maps, and 16 bits do not hold a place in an image.
        wide = {name: at_least_float32(x) for name, x in maps.items()}
        proposals, losses = self.rpn(whole, wide, boxes if self.training else None)
        # Made here, because it would register the backbone's blocks a second time; it has no state.
        pool = detector.Pool(self.strides, self.bins)
        heads = detector.heads(pool, self._stage, self.predictor, self.config.rois).train(self.training)
        found, more = heads(maps, proposals, whole.image_sizes, boxes if self.training else None)
        return found, {**losses, **more}

    def forward(
        self, views: list[Tensor], label: Tensor | None, values: dict[str, Tensor], features: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Padded images [B, 3, H, W] and their boxes [B, 1 + M, 6] to the sum of four losses, and each of them."""
        assert label is not None
        losses = self._run(views[0], label)[1]
        return {
            "loss": torch.stack(list(losses.values())).sum(),
            **{LOSSES[name]: loss.detach() for name, loss in losses.items()},
        }

    def detections(self, images: Tensor, label: Tensor) -> list[Tensor]:
        """See `Method.detections`: at most 100 for an image, with a score above 0.05."""
        stride, rows = self.config.backbone.strides[-1], []
        for image, of_image in zip(images, label, strict=True):
            # Alone and at its own size: what surrounds an image in its batch must not show in what is found.
            width, height = (detector.padded(side, stride) for side in of_image[0, 3:5].tolist())
            image = image[None, :, :height, :width].contiguous(memory_format=torch.channels_last)
            (found,), _ = self._run(image, of_image[None, :1])
            kept = (found["labels"] - 1, found["scores"], *found["boxes"].unbind(dim=1))
            rows.append(torch.stack([column.to(found["scores"].dtype) for column in kept], dim=1))
        return rows

    def outputs(self, features: Tensor) -> None:
        """The loss compares nothing of a whole image."""

    @property
    def evaluated(self) -> nn.Module:
        """The backbone."""
        return self.backbone
