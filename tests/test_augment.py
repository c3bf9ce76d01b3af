"""The batched color operators against torchvision's, with the same parameters and the same order."""

import pytest
import torch
from torchvision.transforms import functional as F

from loaders.augment import ORDERS, _together, augment_batch
from loaders.sampler import (
    BRIGHTNESS,
    CONTRAST,
    GRAY,
    HUE,
    NO_SOLARIZE,
    NUM_COLOR,
    ORDER,
    SATURATION,
    SIGMA,
    SOLARIZE,
)
from loaders.views import View
from tests.images import picture

TOLERANCE = 2e-6  # of images in [0, 1]: float32 rounding of the same formulas
VIEW = View(
    size=48,
    crop="random",
    flip=0.5,
    jitter=1,
    brightness=0.8,
    contrast=0.8,
    saturation=0.8,
    hue=0.2,
    gray=0.5,
    blur=0.5,
    solarize=0.5,
)
ZERO, ONE = torch.zeros(3), torch.ones(3)


def images(count=24):
    return torch.stack([torch.from_numpy(picture(seed, 48, 48)) for seed in range(count)])


def identity(count):
    color = torch.zeros(count, NUM_COLOR)
    color[:, [BRIGHTNESS, CONTRAST, SATURATION]] = 1
    color[:, SOLARIZE] = NO_SOLARIZE
    return color


def reference(image, color):
    x = image.permute(2, 0, 1).float() / 255
    operations = (
        lambda x: F.adjust_brightness(x, color[BRIGHTNESS].item()),
        lambda x: F.adjust_contrast(x, color[CONTRAST].item()),
        lambda x: F.adjust_saturation(x, color[SATURATION].item()),
        lambda x: F.adjust_hue(x, color[HUE].item()),
    )
    for number in ORDERS[int(color[ORDER])]:
        x = operations[number](x)
    if color[GRAY]:
        x = F.rgb_to_grayscale(x, 3)
    if color[SIGMA] > 0:
        x = F.gaussian_blur(x, 13, [color[SIGMA].item()] * 2)
    if color[SOLARIZE] <= 1:
        x = F.solarize(x, color[SOLARIZE].item())
    return x


def parameters(which, count):
    generator = torch.Generator().manual_seed(5)

    def u(low, high):
        return low + (high - low) * torch.rand(count, generator=generator)

    color = identity(count)
    columns = {
        "brightness": (BRIGHTNESS, u(0.2, 1.8)),
        "contrast": (CONTRAST, u(0.2, 1.8)),
        "saturation": (SATURATION, u(0.2, 1.8)),
        "hue": (HUE, u(-0.2, 0.2)),
        "order": (ORDER, (torch.arange(count) % 24).float()),
        "gray": (GRAY, (u(0, 1) < 0.5).float()),
        "blur": (SIGMA, u(0.1, 2.0)),
        "solarize": (SOLARIZE, torch.where(u(0, 1) < 0.5, 0.5, NO_SOLARIZE)),
    }
    for name in columns if which == "all" else (which, "order"):
        column, values = columns[name]
        color[:, column] = values
    return color


@pytest.mark.parametrize(
    "which",
    ["brightness", "contrast", "saturation", "hue", "gray", "blur", "solarize"],
)
def test_operator_equals_torchvision(which):
    pixels, color = images(), parameters(which, 24)
    got = augment_batch(pixels, color, [VIEW], ZERO, ONE, alone=True)
    expected = torch.stack([reference(image, row) for image, row in zip(pixels, color, strict=True)])
    assert (got - expected).abs().max() < TOLERANCE


def test_all_together_in_every_order():
    pixels, color = images(48), parameters("all", 48)
    color[:, SOLARIZE] = NO_SOLARIZE  # a threshold turns a rounding error into a jump; it is tested alone
    got = augment_batch(pixels, color, [VIEW], ZERO, ONE, alone=True)
    expected = torch.stack([reference(image, row) for image, row in zip(pixels, color, strict=True)])
    assert (got - expected).abs().max() < 10 * TOLERANCE


def test_branch_free_path_of_gpus_equals_the_selecting_one():
    # It runs every operator on every image: identities must be exact enough to leave the others alone.
    pixels, color = images(16), parameters("all", 16)
    color[::2] = identity(8)
    color[:, SOLARIZE] = NO_SOLARIZE
    selecting, branch_free = (augment_batch(pixels, color, [VIEW], ZERO, ONE, alone=s) for s in (True, False))
    assert (selecting - branch_free).abs().max() < TOLERANCE
    assert branch_free.is_contiguous(memory_format=torch.channels_last)


def test_normalization_and_layout():
    pixels = images(4)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    got = augment_batch(pixels, identity(4), [VIEW], mean, std, alone=True)
    assert got.is_contiguous(memory_format=torch.channels_last) and got.dtype == torch.float32
    expected = F.normalize(pixels.permute(0, 3, 1, 2).float() / 255, mean, std)
    assert (got - expected).abs().max() < TOLERANCE


def test_blur_of_an_image_smaller_than_its_kernel():
    tiny = images(2)[:, :4, :4].contiguous()
    color = identity(2)
    color[:, SIGMA] = 2.0
    assert augment_batch(tiny, color, [VIEW], ZERO, ONE, alone=True).isfinite().all()


@pytest.mark.slow
def test_compiles_without_graph_breaks():
    # What a GPU runs, through the same compiler on the CPU.
    pixels, color = images(8), parameters("all", 8)
    color[:, SOLARIZE] = NO_SOLARIZE
    arguments = pixels, color, [VIEW], ZERO, ONE
    compiled = augment_batch(*arguments, together=torch.compile(_together, fullgraph=True, dynamic=False))
    assert (compiled - augment_batch(*arguments)).abs().max() < TOLERANCE
