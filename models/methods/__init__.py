"""The contract of a training method, and how a recipe's `method.name` finds its file.

A file `models/methods/<name>.py` with a `Config(MethodConfig)`, whose `build` gives its `Method`, is all that a new
method needs; recipes find it by its file name.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from types import ModuleType
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from models.contract import BackboneConfig, Strict


class MethodConfig(Strict):
    """Base of every method's `Config`: its keys in a recipe, and what the engine asks a method before it is built."""

    num_views: ClassVar[int] = 1
    """Views of each image that the method wants; a property where that depends on keys."""
    takes_more_views: ClassVar[bool] = False
    """Whether further views are welcome, as in multi-crop."""
    schedules: ClassVar[tuple[str, ...]] = ()
    """Scalars from 0 to 1 besides `lr` and `weight_decay` that the recipe must schedule; `forward` and the hooks
    get them. Like `num_views` a property where they depend on keys."""
    needs_labels: ClassVar[bool] = False
    """Whether `forward` uses the labels. Like `num_views` a property where it depends on keys."""
    takes_boxes: ClassVar[bool] = False
    """Whether `label` has the boxes of what is in each image instead of one class for each: float32 [B, 1 + M, 6] with
    rows (class, x1, y1, x2, y2, difficult) in pixels of the padded image, row 0 the image itself with class -1 and its
    true width and height as x2 and y2, missing rows with class -2. Only back ends with `gives_boxes` have them."""
    refuses: ClassVar[Mapping[str, tuple[bool | str, str]]] = {}
    """Key of the recipe's section `run` -> a value that the method cannot run with, and why. Like `num_views` a
    property where it depends on keys."""
    name: str

    def build(self) -> Method:
        """The method that these keys describe."""
        raise NotImplementedError

    @property
    def networks(self) -> dict[str, BackboneConfig]:
        """The keys that are backbones."""
        return {name: value for name, value in self if isinstance(value, BackboneConfig)}

    @property
    def cacheable(self) -> str:
        """The key of the frozen network whose features of a view depend on the view alone, so that a cache of them can
        stand for it (`data.teacher_cache`).

        Raises:
            ValueError: there is none, and why.
        """
        raise ValueError(f"method {self.name} learns from no frozen network")

    @property
    def classes(self) -> int | None:
        """Classes of the method's classifier, which the `accuracy` evaluation measures, or of its boxes; None without
        either."""
        return None

    @property
    def choices(self) -> tuple[str, ...]:
        """Names of the classifiers that train beside each other and one of which is chosen on held-out images; empty
        where there is one classifier or none."""
        return ()

    def check_classes(self, count: int) -> None:
        """Refuse a data set of `count` classes.

        Raises:
            ValueError: names the key that has another number.
        """

    def variants(self) -> dict[str, tuple[str, MethodConfig]]:
        """Faster settings with other targets, which the step benchmark times too: name -> (what differs, keys)."""
        return {}

    def probing(self, network: BackboneConfig, layer: Literal["features", "pooled"]) -> MethodConfig:
        """The same evaluation that trains (linear, fine-tuning, detection) of another network.

        Args:
            network: what is evaluated.
            layer: its features, or the pooled map below them.

        Raises:
            ValueError: this method evaluates nothing.
        """
        raise ValueError(f"method {self.name} is no evaluation of a trained network")


class Method(nn.Module):
    """What the training loop needs to know of a method."""

    views_per_backbone: int | None = 1
    """How many views each backbone runs, None for all: for the cost that `--dry-run` prints."""
    moved_after_step: tuple[str, ...] = ()
    """Prefixes of the parameters and buffers that `after_step`, not the optimizer, changes."""
    factors: Mapping[str, tuple[float, float]] = {}
    """Module -> factors on the learning rate and on the weight decay of its parameters, 1 where none is named."""
    collapse: Mapping[str, tuple[float, str]] = {
        "outputs/information": (1e-4, "start gently: a lower schedules.lr.start or a longer schedules.lr.warmup")
    }
    """Logged scalar -> the value below which it says that all images get one answer, and the recipe key that ends it:
    said once in a run. Empty where labels leave no room for it."""

    def forward(
        self, views: list[Tensor], label: Tensor | None, values: dict[str, Tensor], features: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Compute the loss of one micro-batch.

        Args:
            views: tensors [B, 3, H, W], normalized, channels_last, in the precision of `run.amp`.
            label: [B] int64, or None where the data set has no labels; ignored by the methods that learn without. For a
                config that `takes_boxes` they are those.
            values: the scheduled scalars of this step as 0-d tensors on the device.
            features: what the network that the config calls `cacheable` would give for the views, [V, B, D], where a
                cache stands for it; None: run it.

        Returns:
            `loss` (0-d, with a graph) and further detached 0-d tensors to log.
        """
        raise NotImplementedError

    def before_update(self, values: dict[str, float]) -> None:
        """Change or drop gradients before the optimizer takes them. Once per optimizer step."""

    def after_step(self, values: dict[str, float]) -> None:
        """Move what the optimizer does not: momentum networks and queues. Once per optimizer step."""

    def outputs(self, features: Tensor) -> Tensor | None:
        """Features [B, D] of `evaluated` to the logits [B, C] that the loss compares as a distribution, over their
        temperature: what the monitors measure the collapse of. None where the loss compares nothing of whole images."""
        raise NotImplementedError

    def logits(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] to class scores [B, classes]; only where the config has `classes` of images. Of several
        `choices` those of the chosen one, or of the first before that."""
        raise NotImplementedError

    def candidates(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] to the class scores of each of the config's `choices` [K, B, classes]."""
        raise NotImplementedError

    def choose(self, number: int) -> None:
        """Which of the config's `choices` answers from now on, in `logits` and once deployed."""
        raise NotImplementedError

    def detections(self, images: Tensor, label: Tensor) -> list[Tensor]:
        """What is found in each image; only where the config `takes_boxes`.

        Args:
            images: [B, 3, H, W], padded.
            label: [B, 1 + M, 6], of which the true sizes are used and nothing else.

        Returns:
            For each image [n, 6] with rows (class, score, x1, y1, x2, y2) in pixels of the image, by falling score;
            it depends on that image alone, not on those beside it.
        """
        raise NotImplementedError

    def features(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] to the features [B, D] that a classifier of this method, or put on it, sees."""
        features: Tensor = self.evaluated(images)
        return features

    @property
    def evaluated(self) -> nn.Module:
        """The network that is evaluated and exported: images [B, 3, H, W] to features [B, D]."""
        raise NotImplementedError

    def deployed(self) -> tuple[nn.Module, nn.Module | None]:
        """What is used after training: the network up to what a classifier sees, and the classifier, if it has one.

        Raises:
            ValueError: none of the `choices` has been chosen yet.
        """
        return self.evaluated, None


def available() -> list[str]:
    """Names that a recipe's `method.name` can take."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> ModuleType:
    """Return the module of method `name`, with its `Config`.

    Raises:
        KeyError: no file of that name.
    """
    if name not in available():
        raise KeyError(name)
    return importlib.import_module(f"models.methods.{name}")


def on_meta(config: MethodConfig) -> Method:
    """The method on the meta device: parts, shapes and costs without memory."""
    with torch.device("meta"):
        return config.build()
