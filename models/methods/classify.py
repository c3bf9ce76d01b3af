"""One linear classifier on one backbone: supervised training, and linear evaluation by freezing.

With a `teacher` the labels give way to its soft targets, as in ReActNet's own training (Liu et al. 2020, section 4.3).
"""

from __future__ import annotations

import copy
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from models import backbones
from models.contract import BackboneConfig
from models.losses import soft_cross_entropy
from models.methods import Method, MethodConfig
from models.precision import at_least_float32


class Config(MethodConfig):
    """Supervised training or a linear evaluation protocol in a recipe."""

    name: Literal["classify"]
    backbone: backbones.Config
    num_classes: int = Field(ge=2)
    trains: Literal["all", "linear", "burn-release", "pre-fc"] = "all"
    """`all`: supervised. `linear`: the classifier alone, on the backbone's final features. `burn-release`:
    classifier and the pooled MLP `fc`, which is what the released "linear" configuration trains. `pre-fc`:
    the classifier alone, on the pooled map below `fc`, comparable with S2-BNN's probe. A number measured
    with one protocol must not be compared with another's."""

    standardize: bool = False
    """`linear`, `pre-fc`: features go through a BatchNorm without scale and shift before the classifier, as in MAE's
    linear probing (He et al. 2022, appendix A.1). One learning rate then serves networks whose features differ in scale
    by powers of ten, as those of small binary networks do."""

    teacher: backbones.Config | None = None
    """A frozen, trained network with classifier whose answers at temperature 1 replace the labels."""

    @model_validator(mode="after")
    def _teaches_all(self) -> Config:
        if self.teacher is not None and self.trains != "all":
            raise ValueError(f"teacher: expected with trains: all only, got trains: {self.trains}")
        return self

    @model_validator(mode="after")
    def _standardizes_what_is_frozen(self) -> Config:
        if self.standardize and self.trains not in ("linear", "pre-fc"):
            raise ValueError(f"standardize: expected with trains: linear or pre-fc only, got trains: {self.trains}")
        return self

    def build(self) -> Classify:
        """See `Classify`."""
        return Classify(self)

    @property
    def needs_labels(self) -> bool:  # type: ignore[override]
        """A teacher's answers can take their place."""
        return self.teacher is None

    @property
    def classes(self) -> int:
        """As the recipe says."""
        return self.num_classes

    def check_classes(self, count: int) -> None:
        """Every label needs an output, and every output a label."""
        if count != self.num_classes:
            raise ValueError(f"the recipe expects method.num_classes={self.num_classes}")

    def probing(self, network: BackboneConfig, layer: Literal["features", "pooled"]) -> MethodConfig:
        """The classifier alone trains, on the chosen layer."""
        trains: str = "linear" if self.trains == "pre-fc" else self.trains
        if layer == "pooled" and network.has_fc:
            trains = "pre-fc"
        return self.model_copy(update={"backbone": network, "trains": trains})

    @model_validator(mode="after")
    def _needs_fc(self) -> Config:
        fc_protocols = ("burn-release", "pre-fc")
        if self.trains in fc_protocols and not self.backbone.has_fc:
            raise ValueError(f"trains: {self.trains} needs a reactnet backbone with pooled_mlp: true")
        return self


class Classify(Method):
    """Cross-entropy of a linear layer on the features; what is frozen stays in evaluation mode."""

    collapse = {}  # noqa: RUF012

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.backbone = config.backbone.build()
        linear = nn.Linear(self.backbone.out_channels, config.num_classes)
        nn.init.normal_(linear.weight, std=0.01)  # as BURN's linear head
        nn.init.zeros_(linear.bias)
        self.classifier: nn.Module = linear
        if config.standardize:
            self.classifier = nn.Sequential(nn.BatchNorm1d(linear.in_features, affine=False), linear)
        if config.teacher is not None:
            self.teacher = backbones.frozen(config.teacher, folds=True)
            self.teacher_classifier = nn.Linear(self.teacher.out_channels, config.num_classes).requires_grad_(False)
        if config.trains != "all":
            self.backbone.requires_grad_(False)
            if config.trains == "burn-release":
                self.backbone.get_submodule("fc").requires_grad_(True)

    def train(self, mode: bool = True) -> Classify:
        """Switch the classifier; a frozen backbone never leaves evaluation mode."""
        super().train(mode)
        if self.config.trains != "all":
            self.backbone.eval()
        if self.config.teacher is not None:
            self.teacher.eval()
        return self

    def features(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] to what the classifier sees [B, D], with a graph only where something trains."""
        if self.config.trains == "all":
            return self.backbone(images)
        if self.config.trains == "linear":
            with torch.no_grad():
                return self.backbone(images)
        with torch.no_grad():
            pooled = self.backbone.pooled(images)
        if self.config.trains == "burn-release":
            return F.relu(self.backbone.get_submodule("fc")(pooled))
        return pooled

    def logits(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] to class scores [B, num_classes]."""
        return self.classifier(self.features(images))

    def forward(self, views: list[Tensor], label: Tensor | None, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """One view [B, 3, H, W] and labels [B] to the cross-entropy; with a teacher there need not be any."""
        logits = at_least_float32(self.logits(views[0]))
        known = {} if label is None else {"train_top1": (logits.detach().argmax(dim=1) == label).float().mean()}
        if self.config.teacher is None:
            assert label is not None
            return {"loss": F.cross_entropy(logits, label), **known}
        with torch.no_grad():
            target = self.teacher_classifier(self.teacher(views[0]))
        return {"loss": soft_cross_entropy(logits, target, temperature=1.0).mean(), **known}

    def outputs(self, features: Tensor) -> Tensor:
        """The class scores."""
        return self.classifier(features)

    @property
    def evaluated(self) -> nn.Module:
        """The backbone."""
        return self.backbone

    def deployed(self) -> tuple[nn.Module, nn.Module]:
        """The backbone, without `fc` where that is not looked at, and the classifier."""
        if self.config.trains != "pre-fc":
            return self.backbone, self.classifier
        backbone = copy.deepcopy(self.backbone)
        backbone.fc = None
        return backbone, self.classifier
