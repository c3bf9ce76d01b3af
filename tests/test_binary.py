"""Binary layers against the golden values of methods.md 7.2 (derived independently of any release)."""

import pytest
import torch

from models.binary import BinaryConv2d, binarize_activation, binarize_weight

F64 = torch.float64


def gradient(estimator, x, upstream):
    x = torch.tensor(x, dtype=F64, requires_grad=True)
    y = binarize_activation(x, estimator)
    y.backward(torch.tensor(upstream, dtype=F64))
    return y.tolist(), x.grad.tolist()


def test_clip_estimator_passes_gradient_up_to_one_inclusive():
    x = [-2, -1, -0.5, -0.0, 0, 0.25, 1, 1.5]
    y, grad = gradient("burn", x, [1, 2, 3, 4, 5, 6, 7, 8])
    assert y == [-1, -1, -1, 0, 0, 1, 1, 1]
    assert grad == [0, 2, 3, 4, 5, 6, 7, 0]


def test_quadratic_estimator():
    _, grad = gradient("reactnet", [-2, -1, -0.5, 0, 0.25, 1, 1.5], [1] * 7)
    assert grad == [0, 0, 1, 2, 1.5, 0, 0]


@pytest.mark.parametrize(
    ("estimator", "x", "weight_grad"),
    [("burn", (0.3, -0.7), [[1, -1], [10, -10]]), ("reactnet", (1.0, -1.0), [[1, 0], [10, 0]])],
)
def test_1x1_convolution(estimator, x, weight_grad):
    conv = BinaryConv2d(2, 2, 1, estimator=estimator).double()
    conv.weight.data = torch.tensor([[0.5, -1.5], [0, 2]], dtype=F64).view(2, 2, 1, 1)
    image = torch.tensor(x, dtype=F64).view(1, 2, 1, 1).requires_grad_()
    out = conv(image)
    out.backward(torch.tensor([1.0, 10.0], dtype=F64).view(1, 2, 1, 1))
    assert out.flatten().tolist() == [2, -1]  # both scales are 1
    assert conv.weight.grad.view(2, 2).tolist() == weight_grad
    if estimator == "burn":
        assert image.grad.flatten().tolist() == [1, 9]


def test_3x3_convolution_pads_with_zeros():
    conv = BinaryConv2d(1, 1, 3).double()
    conv.weight.data = torch.arange(-4, 5, dtype=F64).view(1, 1, 3, 3)
    out = conv(torch.tensor([[1.0, -2.0], [0.0, 3.0]], dtype=F64).view(1, 1, 2, 2))
    scale = 20 / 9
    assert torch.allclose(out.flatten(), torch.tensor([0, 0, scale, 0], dtype=F64))


def test_burn_weight_gradient_keeps_the_scale_and_reactnet_drops_it():
    weight = torch.full((1, 1, 1, 1), 0.25, dtype=F64, requires_grad=True)
    for estimator, expected in (("burn", 0.25), ("reactnet", 1.0)):
        weight.grad = None
        binarize_weight(weight, estimator).sum().backward()
        assert weight.grad.item() == expected


def test_real_precision_is_a_plain_convolution():
    conv = BinaryConv2d(3, 4, 3, stride=2, weights="real", activations="real")
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(conv(x), torch.nn.functional.conv2d(x, conv.weight, stride=2, padding=1))


def test_scale_has_no_effect_behind_batch_norm():
    # methods.md 7.8.8: every binary convolution is followed by BatchNorm, so the scale only moves its eps.
    conv, norm = BinaryConv2d(8, 8, 3).double(), torch.nn.BatchNorm2d(8, eps=1e-12).double()
    x = torch.randn(4, 8, 8, 8, dtype=F64)
    before = norm(conv(x))
    conv.weight.data *= 10
    assert (norm(conv(x)) - before).abs().max() < 1e-9


def test_xnor_popcount_gives_the_same_interior():
    # methods.md 7.8.7: with bits for -1/+1, agreements - disagreements times the scale is the convolution, away from
    # the borders.
    conv = BinaryConv2d(16, 4, 3).double()
    x = torch.randn(2, 16, 7, 7, dtype=F64)
    out = conv(x)
    patches = torch.nn.functional.unfold(x, 3) > 0  # [2, 144, 25]
    bits = conv.weight.flatten(1) > 0  # [4, 144]
    disagree = (patches[:, None] ^ bits[None, :, :, None]).sum(2)  # [2, 4, 25]
    scale = conv.weight.abs().mean((1, 2, 3))[None, :, None]
    packed = (144 - 2 * disagree) * scale
    assert torch.allclose(out[:, :, 1:-1, 1:-1].flatten(2), packed, atol=1e-12)
