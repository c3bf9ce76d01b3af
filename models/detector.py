"""What turns the maps of a backbone into boxes: Faster R-CNN (Ren et al. 2015) of torchvision's parts, as a C4 detector
on the map before the last stage (He et al. 2016, appendix A; He et al. 2020, appendix A.8, for its extra BatchNorm) or
on a feature pyramid (Lin et al. 2017).

The numbers are detectron2's for PASCAL VOC. What torchvision does otherwise, and we with it:

- the box losses are smooth L1 with β = 1/9, where detectron2 takes L1;
- anchors have whole sides: 23 x 11 pixels where 22.6 x 11.3 are meant;
- the box loss of the proposals is divided by the anchors that were sampled, not by 256 for each image; the same, unless
  an image has fewer.

What is ours instead of torchvision's: RoIAlign is aligned (half a pixel is subtracted, as in detectron2 since 2019).
BatchNorm's statistics are those of each rank, not of all; binary layers are the backbone's alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import AnchorGenerator, RegionProposalNetwork, RPNHead
from torchvision.ops import box_area, roi_align

from models.precision import at_least_float32

ANCHORS = (32, 64, 128, 256, 512)
"""Sides in pixels of a square of an anchor's area."""
RATIOS = (0.5, 1.0, 2.0)
"""Height / width of the anchors."""
CELLS = 14
"""Side, in places of a map, from which on a box is looked at on it and no longer on the next finer one: 224 pixels at
stride 16 (Lin et al. 2017, equation 1)."""


class Pool(nn.Module):
    """RoIAlign (He et al. 2017), aligned, as many samples to a bin as it has places: boxes to [R, C, size, size].

    Args:
        strides: of the maps, finest first.
        size: bins in a row.
    """

    def __init__(self, strides: Sequence[int], size: int) -> None:
        super().__init__()
        self.strides, self.size = tuple(strides), size

    def forward(self, maps: dict[str, Tensor], boxes: list[Tensor], sizes: object = None) -> Tensor:
        """Pool boxes [R_b, 4] of each image of a batch from the maps [B, C, H, W] named by stride, others are not
        looked at; in the precision of the maps, computed in float32 or wider."""
        image = torch.cat([torch.full_like(b[:, :1], number) for number, b in enumerate(boxes)])
        rois = torch.cat((image, torch.cat(boxes)), dim=1)  # [R, 5]
        level = self.levels(rois[:, 1:])
        first = maps[str(self.strides[0])]
        pooled = first.new_zeros(len(rois), first.shape[1], self.size, self.size)
        for number, stride in enumerate(self.strides):
            of_level = (level == number).nonzero()[:, 0]
            x = at_least_float32(maps[str(stride)])
            bins = roi_align(x, rois[of_level].to(x.dtype), self.size, 1 / stride, sampling_ratio=0, aligned=True)
            pooled = pooled.index_put((of_level,), bins.to(pooled.dtype))
        return pooled

    def levels(self, boxes: Tensor) -> Tensor:
        """Boxes [R, 4] to the number [R] of the map that each is pooled from (Lin et al. 2017, equation 1)."""
        wanted = (box_area(boxes).sqrt() / (CELLS * self.strides[0])).clamp(min=1e-6).log2()
        return wanted.floor().long().clamp(0, len(self.strides) - 1)


class _Head(RPNHead):
    """The proposals' scores and corrections in float32, whatever the convolutions run in."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        scores, corrections = super().forward(x)
        return [at_least_float32(s) for s in scores], [at_least_float32(c) for c in corrections]


def region_proposals(channels: int, anchors: Sequence[Sequence[int]], kept: tuple[int, int]) -> RegionProposalNetwork:
    """The region proposal network.

    Args:
        channels: of its maps.
        anchors: sides of those of each map.
        kept: best places of each map before non-maximum suppression, in training and in evaluation.
    """
    generator = AnchorGenerator(tuple(map(tuple, anchors)), (RATIOS,) * len(anchors))
    training, testing = kept
    return RegionProposalNetwork(
        generator,
        _Head(channels, generator.num_anchors_per_location()[0]),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_top_n={"training": training, "testing": testing},
        post_nms_top_n={"training": 2000 if len(anchors) == 1 else 1000, "testing": 1000},
        nms_thresh=0.7,
    )


def predictor(channels: int, num_classes: int) -> FastRCNNPredictor:
    """Two linear layers: scores of the classes and of the background, which comes first, and a box for each."""
    module = FastRCNNPredictor(channels, num_classes + 1)
    for linear, std in ((module.cls_score, 0.01), (module.bbox_pred, 0.001)):
        nn.init.normal_(linear.weight, std=std)
        nn.init.zeros_(linear.bias)
    return module


def heads(
    pool: Pool, stage: Callable[[Tensor], Tensor], predict: Callable[[Tensor], tuple[Tensor, Tensor]], rois: int
) -> RoIHeads:
    """What looks at the proposals. It has no parameters, and owns neither `stage` nor `predict`.

    Args:
        pool: boxes to [R, C, size, size].
        stage: these to features.
        predict: features to class scores [R, classes + 1] and corrections [R, 4 (classes + 1)].
        rois: proposals of an image that train.
    """

    def predict_in_float32(x: Tensor) -> tuple[Tensor, Tensor]:
        scores, corrections = predict(x)
        return at_least_float32(scores), at_least_float32(corrections)

    return RoIHeads(
        pool,
        stage,
        predict_in_float32,
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        batch_size_per_image=rois,
        positive_fraction=0.25,
        bbox_reg_weights=(10.0, 10.0, 5.0, 5.0),
        score_thresh=0.05,
        nms_thresh=0.5,
        detections_per_img=100,
    )


def targets(images: Tensor, label: Tensor) -> tuple[ImageList, list[dict[str, Tensor]]]:
    """What torchvision's parts want, from images [B, 3, H, W] and their boxes [B, 1 + M, 6]
    (`MethodConfig.takes_boxes`): difficult ones train like others, and class c is label c + 1, 0 being the background.
    Waits for the device."""
    label = label.to(torch.promote_types(images.dtype, torch.float32))
    whole = ImageList(images, [(round(height), round(width)) for width, height in label[:, 0, 3:5].tolist()])
    boxes = []
    for of_image in label[:, 1:]:
        there = of_image[of_image[:, 0] >= 0]
        boxes.append({"boxes": there[:, 1:5], "labels": there[:, 0].long() + 1})
    return whole, boxes


def padded(side: float, stride: int) -> int:
    """The least multiple of `stride` that holds `side` pixels."""
    return stride * math.ceil(side / stride)
