"""Color augmentation of a batch: the one implementation, for every back end and device.

Operators are torchvision's on float images (`torchvision.transforms.functional`), batched, each image with its
own parameters and its own order of the jitter. On a GPU the whole batch goes through a frame without a branch,
identities included, which torch.compile fuses into a few passes; on a CPU each image goes alone, so that it stays in
the cache, and only through what it drew.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from loaders.machine import compiles, missing_compiler
from loaders.sampler import BRIGHTNESS, CONTRAST, GRAY, HUE, ORDER, SATURATION, SIGMA, SOLARIZE
from loaders.views import View

_GRAY_WEIGHTS = (0.2989, 0.587, 0.114)  # ITU-R 601-2 luma, as torchvision rounds it
_HUE_OPERATION = 3
_NO_WEIGHT = 6.5  # beyond so many standard deviations a Gaussian's weight is below float32's rounding
logger = logging.getLogger("burn.loaders")
ORDERS = list(itertools.permutations(range(4)))  # of 0 brightness, 1 contrast, 2 saturation, 3 hue


def augmenter(device: torch.device) -> Callable[..., Tensor]:
    """The form of `augment_batch` for a device: compiled on a GPU, image by image on a CPU."""
    if device.type == "cpu":
        return functools.partial(augment_batch, alone=True)
    if not compiles(device):
        return augment_batch
    if problem := missing_compiler(on_gpu=True):
        logger.warning(f"colors are not compiled, which takes several times as long: {problem}")
        return augment_batch
    return functools.partial(augment_batch, together=torch.compile(_together, dynamic=False))


@functools.cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """For each of the 24 orders: the operations but hue [24, 3], and how many of them come before hue [24]."""
    others = [[operation for operation in order if operation != _HUE_OPERATION] for order in ORDERS]
    before = [order.index(_HUE_OPERATION) for order in ORDERS]
    return torch.tensor(others, device=device), torch.tensor(before, device=device)


def augment_batch(
    images: Tensor,
    color: Tensor,
    views: Sequence[View],
    mean: Tensor,
    std: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    alone: bool = False,
    together: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Jitter, grayscale, blur, solarize and normalize a batch.

    Args:
        images: uint8 [B, H, W, 3].
        color: float32 [B, NUM_COLOR] from the sampler, on the same device.
        views: those that the images belong to: what none of them does is left out, and they bound the blur's kernel.
        mean, std: [3], on the same device, for images in [0, 1].
        dtype: of the result; everything is computed in float32 and rounded once.
        alone: image by image, through what it drew only; it reads `color` on the host: for CPUs.
        together: compiled form of what runs on the whole batch.

    Returns:
        [B, 3, H, W], channels_last.
    """
    radius = math.ceil(3 * max(view.blur_sigma[1] for view in views)) if any(view.blur for view in views) else 0
    if not alone:
        jitter = jitter_slots(color) if any(view.jitter for view in views) else None
        gray, solarize = any(view.gray for view in views), any(view.solarize for view in views)
        # Evaluations, whose last batch has a size of its own, have nothing to fuse: they are not worth a compilation.
        form = together if together and (jitter or gray or radius or solarize) else _together
        return form(images, color, jitter, gray, radius, solarize, mean, std, dtype)
    x = _to_float(images)
    for image, drawn in zip(x, color.tolist(), strict=True):
        _augment_one(image, drawn, radius)
    return _normalize(x, mean, std).to(dtype)


def _to_float(images: Tensor) -> Tensor:
    return images.permute(0, 3, 1, 2).float().div_(255)  # channels_last by its strides


def _normalize(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return x.sub_(mean[:, None, None]).div_(std[:, None, None])


def normalized(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Pixels as a network takes them where nothing is drawn: uint8 [B, H, W, 3] to float32 [B, 3, H, W]."""
    return _normalize(_to_float(images), torch.tensor(mean), torch.tensor(std))


def _together(
    images: Tensor,
    color: Tensor,
    jitter: tuple[Tensor, Tensor] | None,
    gray: bool,
    radius: int,
    solarize: bool,
    mean: Tensor,
    std: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    x = _to_float(images)
    if jitter:
        x = _jitter(x, *jitter)
    if gray:
        x = torch.where(color[:, GRAY, None, None, None] > 0, _gray(x), x)
    if radius:
        x = _blur(x, color[:, SIGMA], radius)
    if solarize:
        x = torch.where(x >= color[:, SOLARIZE, None, None, None], 1 - x, x)
    return _normalize(x, mean, std).to(dtype)


def _augment_one(image: Tensor, drawn: list[float], radius: int) -> None:
    """Change one float image [3, H, W] in place."""
    brightness, contrast, saturation = drawn[BRIGHTNESS : SATURATION + 1]
    hue, sigma = drawn[HUE], drawn[SIGMA]
    jitters = (brightness, contrast, saturation, hue) != (1, 1, 1, 0)
    if not (jitters or drawn[GRAY] or sigma or drawn[SOLARIZE] <= 1):
        return
    x = image.contiguous()  # channel by channel
    for operation in ORDERS[int(drawn[ORDER])] if jitters else ():
        if operation == 0 and brightness != 1:
            x.mul_(brightness).clamp_(0, 1)
        elif operation == 1 and contrast != 1:
            x.lerp_(_gray(x[None]).mean(), 1 - contrast).clamp_(0, 1)
        elif operation == 2 and saturation != 1:
            gray = _gray(x[None])[0]
            x.mul_(saturation).add_(gray, alpha=1 - saturation).clamp_(0, 1)
        elif operation == _HUE_OPERATION and hue:
            x = _shift_hue(x[None], torch.tensor([hue]))[0]
    if drawn[GRAY]:
        x = _gray(x[None])[0].expand_as(x)
    if sigma:
        reach = min(radius, math.ceil(_NO_WEIGHT * sigma))
        x = _blur(x[None], torch.tensor([sigma]), reach)[0]
    if drawn[SOLARIZE] <= 1:
        x = torch.where(x >= drawn[SOLARIZE], 1 - x, x)
    image.copy_(x)


def to_pixels(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalized images [B, 3, H, W] as pixels again, uint8 [B, H, W, 3]: to be looked at."""
    scale, shift = (torch.tensor(tuple(values), device=x.device)[:, None, None] for values in (std, mean))
    return ((x * scale + shift) * 255).clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1)


def jitter_slots(color: Tensor) -> tuple[Tensor, Tensor]:
    """Lay out each image's jitter as three blends, hue, three blends, with identities where nothing is due.

    Brightness, contrast and saturation are all f·x + (1 - f)·(m·mean(gray) + s·gray), so any order of the four
    operations fits this frame and the batch needs no branch.

    Returns:
        [B, 6, 3] with (f, m, s) in the last axis, and the hue shift [B].
    """
    others, num_before = _tables(color.device)
    order = color[:, ORDER].long()  # [B]
    operation = others[order]  # [B, 3]
    factor = color[:, BRIGHTNESS : SATURATION + 1].gather(1, operation)
    blends = torch.stack((factor, operation == CONTRAST - BRIGHTNESS, operation == SATURATION - BRIGHTNESS), dim=2)
    identity = torch.zeros_like(blends)  # [B, 3, 3]
    identity[:, :, 0] = 1
    before = (torch.arange(3, device=color.device) < num_before[order, None])[:, :, None]
    slots = torch.cat((torch.where(before, blends, identity), torch.where(before, identity, blends)), dim=1)
    return slots, color[:, HUE]


def _gray(x: Tensor) -> Tensor:
    red, green, blue = _GRAY_WEIGHTS
    return red * x[:, 0:1] + green * x[:, 1:2] + blue * x[:, 2:3]


def _jitter(x: Tensor, slots: Tensor, hue: Tensor) -> Tensor:
    # The mean that contrast pivots on is that of the image as it is when contrast comes: all that stands before it is
    # done once for the mean and again for the result, two fused passes where a mean at each place would be six.
    place = slots[:, :, 1].argmax(dim=1)  # [B], of contrast; 0 where it was not drawn, and its mean goes nowhere
    comes_before = torch.arange(6, device=x.device) < place[:, None]  # [B, 6]
    identity = torch.zeros_like(slots)
    identity[:, :, 0] = 1
    before = torch.where(comes_before[:, :, None], slots, identity)
    nothing = torch.zeros_like(hue)
    mean = _gray(_frame(x, before, torch.where(place >= 3, hue, nothing), nothing)).mean(dim=(1, 2, 3))  # [B]
    return _frame(x, slots, hue, mean)


def _frame(x: Tensor, slots: Tensor, hue: Tensor, mean: Tensor) -> Tensor:
    for place in range(6):
        if place == 3:
            x = _shift_hue(x, hue)
        factor, of_mean, of_gray = (slots[:, place, i, None, None, None] for i in range(3))
        other = of_mean * mean[:, None, None, None] + of_gray * _gray(x)
        x = (factor * x + (1 - factor) * other).clamp(0, 1)
    return x


def _shift_hue(x: Tensor, shift: Tensor) -> Tensor:
    # To HSV, add, and back; the inverse uses f(n) = v - v·s·max(0, min(k, 4 - k, 1)), k = (n + h) mod 6.
    red, green, blue = x.unbind(1)
    value, lowest = x.amax(1), x.amin(1)
    chroma = value - lowest
    flat = chroma == 0
    divisor = torch.where(flat, 1.0, chroma)
    saturation = chroma / torch.where(flat, 1.0, value)
    r, g, b = ((value - channel) / divisor for channel in (red, green, blue))
    sector = torch.where(value == red, b - g, torch.where(value == green, 2 + r - b, 4 + g - r))
    sector = torch.remainder(torch.remainder(sector / 6 + 1, 1.0) + shift[:, None, None], 1.0) * 6

    def channel(n: float) -> Tensor:
        k = torch.remainder(sector + n, 6.0)
        return value - value * saturation * torch.minimum(k, 4 - k).clamp(0, 1)

    return torch.where((shift == 0)[:, None, None, None], x, torch.stack([channel(n) for n in (5.0, 3.0, 1.0)], 1))


def _blur(x: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Separable Gaussian of 2·radius + 1 taps with reflected borders; the identity where sigma is 0."""
    radius = min(radius, x.shape[2] - 1, x.shape[3] - 1)  # reflection needs a smaller border than the image
    offsets = torch.arange(-radius, radius + 1, device=x.device, dtype=x.dtype)
    kernel = torch.exp(-0.5 * (offsets / sigma[:, None].clamp(min=1e-3)).square())
    kernel = kernel / kernel.sum(dim=1, keepdim=True)  # [B, taps]
    for axis in (3, 2):
        border = (radius, radius, 0, 0) if axis == 3 else (0, 0, radius, radius)
        padded = F.pad(x, border, mode="reflect")
        size = x.shape[axis]
        x = sum(
            (kernel[:, k, None, None, None] * padded.narrow(axis, k, size) for k in range(2 * radius + 1)),
            start=torch.zeros_like(x),
        )
    return x
