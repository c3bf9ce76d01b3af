"""Colour augmentation of a batch: the one implementation, for every back end and device.

Operators are torchvision's on float images (`torchvision.transforms.functional`), batched, each image with its
own parameters and its own order of the jitter. On a GPU every operator runs on the whole batch without a branch,
identities included; on a CPU only on the images that drew it, which is cheaper there.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from loaders.sampler import (
    BRIGHTNESS,
    CONTRAST,
    FLIP,
    GRAY,
    HUE,
    ORDER,
    SATURATION,
    SIGMA,
    SOLARIZE,
)
from loaders.views import View

_GRAY_WEIGHTS = (0.2989, 0.587, 0.114)  # ITU-R 601-2 luma, as torchvision rounds it
_HUE_OPERATION = 3
ORDERS = list(itertools.permutations(range(4)))  # of 0 brightness, 1 contrast, 2 saturation, 3 hue


@functools.cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """For each of the 24 orders: the operations but hue [24, 3], and how many of them come before hue [24]."""
    others = [[operation for operation in order if operation != _HUE_OPERATION] for order in ORDERS]
    before = [order.index(_HUE_OPERATION) for order in ORDERS]
    return torch.tensor(others, device=device), torch.tensor(before, device=device)


def augment_batch(images: Tensor, color: Tensor, view: View, mean: Tensor, std: Tensor, *, select: bool) -> Tensor:
    """Flip, jitter, grayscale, blur, solarise and normalise a batch.

    Args:
        images: uint8 [B, H, W, 3].
        color: float32 [B, NUM_COLOR] from the sampler, on the same device.
        view: bounds the blur's kernel and gives the solarisation threshold.
        mean, std: [3], on the same device, for images in [0, 1].
        select: run each operator on the images that drew it only, which waits for the device: for CPUs.

    Returns:
        float32 [B, 3, H, W], channels_last.
    """
    x = images.permute(0, 3, 1, 2).float().div_(255)  # channels_last by its strides

    def apply(operator: Callable[..., Tensor], chosen: Tensor, *parameters: Tensor) -> None:
        nonlocal x
        if not select:
            x = operator(x, *parameters)
        elif chosen.any():
            rows = chosen.nonzero().flatten()
            x[rows] = operator(x[rows], *(parameter[rows] for parameter in parameters))

    flips = color[:, FLIP] > 0
    apply(_flip, flips, flips)
    if view.jitter:
        slots, hue = jitter_slots(color)
        jittered = (slots[:, :, 0] != 1).any(dim=1) | (hue != 0)
        apply(_jitter, jittered, slots, hue)
    if view.gray:
        apply(_to_gray, color[:, GRAY] > 0, color[:, GRAY])
    if view.blur:
        radius = math.ceil(3 * view.blur_sigma[1])
        apply(lambda y, sigma: _blur(y, sigma, radius), color[:, SIGMA] > 0, color[:, SIGMA])
    if view.solarize:
        apply(
            lambda y, on: torch.where((on[:, None, None, None] > 0) & (y >= view.solarize_threshold), 1 - y, y),
            color[:, SOLARIZE] > 0,
            color[:, SOLARIZE],
        )
    return x.sub_(mean[:, None, None]).div_(std[:, None, None])


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


def _flip(x: Tensor, on: Tensor) -> Tensor:
    return torch.where(on[:, None, None, None], x.flip(3), x)


def _gray(x: Tensor) -> Tensor:
    red, green, blue = _GRAY_WEIGHTS
    return red * x[:, 0:1] + green * x[:, 1:2] + blue * x[:, 2:3]


def _jitter(x: Tensor, slots: Tensor, hue: Tensor) -> Tensor:
    for place in range(3):
        x = _blend(x, slots[:, place])
    x = _shift_hue(x, hue)
    for place in range(3, 6):
        x = _blend(x, slots[:, place])
    return x


def _blend(x: Tensor, slot: Tensor) -> Tensor:
    factor, of_mean, of_gray = (slot[:, i, None, None, None] for i in range(3))
    gray = _gray(x)
    other = of_mean * gray.mean(dim=(2, 3), keepdim=True) + of_gray * gray
    return (factor * x + (1 - factor) * other).clamp(0, 1)


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


def _to_gray(x: Tensor, on: Tensor) -> Tensor:
    return torch.where(on[:, None, None, None] > 0, _gray(x), x)


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
