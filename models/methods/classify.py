"""One linear classifier on one backbone: supervised training, and linear evaluation by freezing.

With a `teacher` the labels give way to its soft targets, as in ReActNet's own training (Liu et al. 2020, section 4.3).
"""

from __future__ import annotations

import copy
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from models import backbones
from models.contract import BackboneConfig
from models.losses import soft_cross_entropy
from models.methods import Method, MethodConfig
from models.precision import at_least_float32

Factor = Annotated[float, Field(gt=0)]
Decay = Annotated[float, Field(ge=0)]


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

    rates: tuple[Factor, ...] = ()
    """`linear`, `pre-fc`: train a classifier for each of these factors on `schedules.lr` in one pass, every one as if
    it trained alone; `accuracy` evaluations choose the one that does best on the images of `data.hold_out`."""
    decays: tuple[Decay, ...] = ()
    """The same for factors on `schedules.weight_decay`: a classifier for each pair of a rate and a decay."""

    teacher: backbones.Config | None = None
    """A frozen, trained network with classifier whose answers at temperature 1 replace the labels."""

    @model_validator(mode="after")
    def _teaches_all(self) -> Config:
        if self.teacher is not None and self.trains != "all":
            raise ValueError(f"teacher: expected with trains: all only, got trains: {self.trains}")
        return self

    @model_validator(mode="after")
    def _of_what_is_frozen(self) -> Config:
        for key in ("standardize", "rates", "decays"):
            value = getattr(self, key)
            if value and self.trains not in ("linear", "pre-fc"):
                raise ValueError(f"{key}: expected with trains: linear or pre-fc only, got trains: {self.trains}")
            if isinstance(value, tuple) and len(set(value)) < len(value):
                raise ValueError(f"{key}: expected different factors, got {list(value)}")
        return self

    def build(self) -> Classify:
        """See `Classify`."""
        return Classify(self)

    @property
    def needs_labels(self) -> bool:  # type: ignore[override]
        """A teacher's answers can take their place."""
        return self.teacher is None

    @property
    def cacheable(self) -> str:
        """The teacher, where there is one: it is always in evaluation mode."""
        return super().cacheable if self.teacher is None else "teacher"

    @property
    def classes(self) -> int:
        """As the recipe says."""
        return self.num_classes

    @property
    def grid(self) -> dict[str, tuple[float, float]]:
        """Name of each classifier -> its factors on learning rate and weight decay; empty for a single one."""
        if not self.rates and not self.decays:
            return {}
        return {
            f"lr{rate:g}" + (f"_wd{decay:g}" if self.decays else ""): (rate, decay)
            for rate in self.rates or (1.0,)
            for decay in self.decays or (1.0,)
        }

    @property
    def choices(self) -> tuple[str, ...]:
        """One for each rate and decay."""
        return tuple(self.grid)

    def check_classes(self, count: int) -> None:
        """Every label needs an output, and every output a label."""
        if count != self.num_classes:
            raise ValueError(f"the recipe expects method.num_classes={self.num_classes}")

    def probing(self, network: BackboneConfig, layer: Literal["features", "pooled"]) -> MethodConfig:
        """The classifier alone trains, on the chosen layer; with `trains: all` all of the network up to there does."""
        if self.trains == "all":
            top = {key: False for key, module in network.on_top.items() if module == "fc"} if layer == "pooled" else {}
            return self.model_copy(update={"backbone": network.model_copy(update=top)})
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


class Choices(nn.Module):
    """Equal linear classifiers of the same features that train beside each other, and the one of them that answers.

    Args:
        norm: what the features go through first, the same for all.
        linear: each begins as a copy of it.
        count: K.
    """

    chosen: Tensor
    """0-d int64, -1 before any has been chosen: the first then answers."""

    def __init__(self, norm: nn.Module, linear: nn.Linear, count: int) -> None:
        super().__init__()
        self.norm = norm
        self.each = nn.ModuleList(copy.deepcopy(linear) for _ in range(count))
        self.register_buffer("chosen", torch.tensor(-1))

    def all(self, features: Tensor) -> Tensor:
        """Features [B, D] to the class scores of each [K, B, C]."""
        features = self.norm(features)
        return torch.stack([linear(features) for linear in self.each])

    def forward(self, features: Tensor) -> Tensor:
        """Features [B, D] to the class scores of the chosen one [B, C]."""
        return self.all(features).index_select(0, self.chosen.clamp(min=0).view(1)).squeeze(0)  # waits for no device

    def alone(self) -> nn.Module:
        """The chosen one as what it would be by itself."""
        number = int(self.chosen)
        if number < 0:
            raise ValueError("none of its classifiers has been chosen yet: that is done by an evaluation of accuracy")
        linear = self.each[number]
        return linear if isinstance(self.norm, nn.Identity) else nn.Sequential(self.norm, linear)


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
        norm = nn.BatchNorm1d(linear.in_features, affine=False) if config.standardize else nn.Identity()
        self.classifier: nn.Module = nn.Sequential(norm, linear) if config.standardize else linear
        if config.grid:
            self.classifier = Choices(norm, linear, len(config.grid))
            self.factors = {f"classifier.each.{n}": factors for n, factors in enumerate(config.grid.values())}
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

    def candidates(self, images: Tensor) -> Tensor:
        """See `Method.candidates`."""
        assert isinstance(self.classifier, Choices)
        return self.classifier.all(self.features(images))

    def choose(self, number: int) -> None:
        """See `Method.choose`."""
        assert isinstance(self.classifier, Choices)
        self.classifier.chosen.fill_(number)

    def forward(
        self, views: list[Tensor], label: Tensor | None, values: dict[str, Tensor], features: Tensor | None = None
    ) -> dict[str, Tensor]:
        """One view [B, 3, H, W] and labels [B] to the cross-entropy; with a teacher there need not be any. Of several
        classifiers to the sum of theirs, of which each moves by its own alone, and to the best training accuracy."""
        if isinstance(self.classifier, Choices):
            assert label is not None
            scores = at_least_float32(self.candidates(views[0]))  # [K, B, C]
            losses = torch.stack([F.cross_entropy(logits, label) for logits in scores])
            hits = (scores.detach().argmax(dim=2) == label).float().mean(dim=1)
            each = {f"loss/{name}": loss for name, loss in zip(self.config.choices, losses.detach(), strict=True)}
            return {"loss": losses.sum(), "train_top1": hits.max(), **each}
        logits = at_least_float32(self.logits(views[0]))
        known = {} if label is None else {"train_top1": (logits.detach().argmax(dim=1) == label).float().mean()}
        if self.config.teacher is None:
            assert label is not None
            return {"loss": F.cross_entropy(logits, label), **known}
        with torch.no_grad():
            target = self.teacher_classifier(self.teacher(views[0]) if features is None else features[0])
        return {"loss": soft_cross_entropy(logits, target, temperature=1.0).mean(), **known}

    def outputs(self, features: Tensor) -> Tensor:
        """The class scores."""
        return self.classifier(features)

    @property
    def evaluated(self) -> nn.Module:
        """The backbone."""
        return self.backbone

    def deployed(self) -> tuple[nn.Module, nn.Module]:
        """The backbone, without `fc` where that is not looked at, and the classifier, of several the chosen one.

        Raises:
            ValueError: none has been chosen yet.
        """
        classifier = self.classifier.alone() if isinstance(self.classifier, Choices) else self.classifier
        if self.config.trains != "pre-fc":
            return self.backbone, classifier
        backbone = copy.deepcopy(self.backbone)
        backbone.fc = None
        return backbone, classifier
