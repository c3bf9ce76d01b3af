"""Views as data: what a crop of an image goes through, and the named presets of the recipes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from loaders.config import Strict

Probability = Field(default=0.0, ge=0, le=1)

# Sources: BURN's stage configurations (methods of the release, both views alike); He et al. 2020 / Chen et al.
# 2020 for MoCo v2; Shen et al. 2021 for S2-BNN; Caron et al. 2020 for SwAV; Grill et al. 2020 for BYOL; the usual
# linear-evaluation and validation transforms (ResNet, torchvision's reference).
_SWAV: dict[str, Any] = {
    "crop": "random",
    "flip": 0.5,
    "jitter": 0.8,
    "brightness": 0.8,
    "contrast": 0.8,
    "saturation": 0.8,
    "hue": 0.2,
    "gray": 0.2,
    "blur": 0.5,
}
_MOCO: dict[str, Any] = {
    "crop": "random",
    "size": 224,
    "scale": (0.2, 1.0),
    "flip": 0.5,
    "jitter": 0.8,
    "brightness": 0.4,
    "contrast": 0.4,
    "saturation": 0.4,
    "hue": 0.1,
    "gray": 0.2,
    "blur": 0.5,
}
_BYOL: dict[str, Any] = {
    "crop": "random",
    "size": 224,
    "scale": (0.08, 1.0),
    "interpolation": "bicubic",
    "flip": 0.5,
    "jitter": 0.8,
    "brightness": 0.4,
    "contrast": 0.4,
    "saturation": 0.2,
    "hue": 0.1,
    "gray": 0.2,
}
_SMALL: dict[str, Any] = {
    "crop": "random",
    "size": 32,
    "scale": (0.4, 1.0),
    "jitter": 0.8,
    "brightness": 0.4,
    "contrast": 0.4,
    "blur": 0.2,
    "blur_sigma": (0.1, 1.0),
}
PRESETS: dict[str, dict[str, Any]] = {
    "burn": {
        "crop": "random",
        "size": 224,
        "scale": (0.08, 1.0),
        "interpolation": "bicubic",
        "flip": 0.5,
        "jitter": 0.6,
        "brightness": 0.4,
        "contrast": 0.4,
        "saturation": 0.4,
        "hue": 0.1,
        "gray": 0.2,
        "blur": 0.2,
    },
    "moco_v2": _MOCO,
    # Caron et al. 2020, section 4 and appendix: 2 x 224 from 14 to 100 % of the area, 6 x 96 from 5 to 14 %.
    "swav_large": {**_SWAV, "size": 224, "scale": (0.14, 1.0)},
    "swav_small": {**_SWAV, "size": 96, "scale": (0.05, 0.14)},
    # S2-BNN, lighter for a binary network: jitter 0.6 instead of 0.8, blur 0.2 instead of 0.5.
    "s2bnn": {**_MOCO, "jitter": 0.6, "blur": 0.2},
    # Grill et al. 2020, appendix B, with OpenSelfSup's bicubic crops: always blurred, or rarely and solarized.
    "byol_first": {**_BYOL, "blur": 1.0},
    "byol_second": {**_BYOL, "blur": 0.1, "solarize": 0.2},
    # Ours, for the small data sets of the quick and Fashion-MNIST recipes: crops, brightness, contrast and a little
    # blur. Digits must not be mirrored, clothes may be.
    "digits": _SMALL,
    "clothes": {**_SMALL, "scale": (0.3, 1.0), "flip": 0.5},
    "crop_flip": {"crop": "random", "size": 224, "scale": (0.08, 1.0), "flip": 0.5},
    "validation": {"crop": "center", "size": 224, "resize": 256},
    # All of the picture, its shape not kept: what VOC07's SVMs are shown (Goyal et al. 2019).
    "whole": {"crop": "whole", "size": 224},
}


class View(Strict):
    """One view of an image. In a recipe a `preset` may stand first; keys beside it change it.

    Geometry comes first (crop, resize to `size`), then flip, color jitter in a random order for each image,
    grayscale, blur and solarization, each with its probability; then normalization.
    """

    size: int = Field(ge=1, le=4096)
    """Side of the square output in pixels."""
    crop: Literal["random", "center", "whole"]
    """`random`: torchvision's RandomResizedCrop. `center`: the middle, after the shorter side was resized. `whole`: all
    of the image, resized to a square whatever its shape."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Random crop: bounds of its share of the image's area."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Random crop: bounds of width / height."""
    resize: int | None = Field(default=None, ge=1, le=8192)
    """Center crop: length of the shorter side before cropping."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    flip: float = Probability
    jitter: float = Probability
    brightness: float = Field(default=0.0, ge=0)
    contrast: float = Field(default=0.0, ge=0)
    saturation: float = Field(default=0.0, ge=0)
    hue: float = Field(default=0.0, ge=0, le=0.5)
    gray: float = Probability
    blur: float = Probability
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Bounds of the Gaussian's standard deviation, in output pixels."""
    solarize: float = Probability
    solarize_threshold: float = Field(default=0.5, ge=0, le=1)

    @model_validator(mode="before")
    @classmethod
    def _expand_preset(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        own = dict(value)
        name = own.pop("preset", None)
        if name is not None and name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}, expected one of {', '.join(PRESETS)}")
        merged = {**PRESETS.get(name, {}), **own}
        # YAML has no tuples, and strict validation of a changed value takes no lists for them.
        return {key: tuple(item) if isinstance(item, list) else item for key, item in merged.items()}

    @model_validator(mode="after")
    def _consistent(self) -> View:
        if self.crop == "center" and (self.resize is None or self.resize < self.size):
            raise ValueError(f"crop: center needs resize >= size ({self.size}), got resize: {self.resize}")
        for name in ("scale", "ratio", "blur_sigma"):
            low, high = getattr(self, name)
            is_share = name == "scale"
            if not 0 < low <= high or (is_share and high > 1):
                raise ValueError(f"{name}: expected 0 < low <= high{' <= 1' * is_share}, got [{low}, {high}]")
        return self


def groups(views: Sequence[View]) -> list[list[int]]:
    """Numbers of neighboring views of one size: they lie together in memory, from the back end to the network, which
    takes them in one call, as SwAV's multi-crop does."""
    numbers = range(len(views))
    return [list(group) for _, group in itertools.groupby(numbers, key=lambda number: views[number].size)]
