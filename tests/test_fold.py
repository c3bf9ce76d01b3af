"""Folded networks in the runtime's reference against PyTorch, whose own numbers they are up to rounding."""

import copy
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.binary import BinaryConv2d
from models.fold import FoldError, fold, replace_zeros
from models.reactnet import Config, ReActNet
from models.resnet import Config as ResNetConfig
from runtime import bnn, reference
from runtime.bnn import FLOAT32, HALF_BLOCK, NO_RESIDUAL, Layer, Record
from tests.packed import packed, random_network
from tests.tiny import SHALLOW


def trained(width=8, stem_stride=2, seed=0, **config):
    """A network whose shifts, slopes and statistics are not at their start, and its classifier; float32."""
    torch.manual_seed(seed)
    network = ReActNet(Config(width=width, multiples=tuple(SHALLOW), stem_stride=stem_stride, **config))
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "shift" in name:
                parameter.normal_(0, 0.2)
            if "prelu" in name:
                parameter.uniform_(-0.5, 1.5)
            if "norm" in name and name.endswith("weight"):
                parameter.uniform_(-1.5, 1.5)
            if "norm" in name and name.endswith("bias"):
                parameter.normal_(0, 0.2)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
        network.train()(torch.randn(32, 3, 32, 32))
    return network.eval(), nn.Linear(4 * width, 5)


def numpy_map(x):
    return np.ascontiguousarray(x.detach().float().permute(0, 2, 3, 1).numpy())


# ------------------------------------------------------------------------------------------------ convolutions


@pytest.mark.parametrize("stride", (1, 2))
@pytest.mark.parametrize("kernel", (1, 3))
@pytest.mark.parametrize("side", (1, 2, 3, 5, 7, 14))
def test_counts_are_the_convolution_of_signs(side, kernel, stride):
    random = np.random.default_rng(side)
    for channels in (2, 8, 32, 34, 96, 256):
        for kind in ("random", "ones", "zeros"):
            # True where the sign is +1.
            weight = random.random((6, channels, kernel, kernel)) < {"random": 0.5, "ones": 1, "zeros": 0}[kind]
            signs = random.random((2, channels, side, side)) < 0.5
            c = F.conv2d(*(torch.from_numpy(x * 2.0 - 1).float() for x in (signs, weight)), None, stride, kernel // 2)
            taps = weight.transpose(0, 2, 3, 1).reshape(6, kernel**2, channels)
            bits = np.packbits(np.pad(taps, ((0, 0), (0, 0), (0, -channels % 32))), 2, "little").view("<u4")
            record = Record(HALF_BLOCK, kernel, stride, NO_RESIDUAL, channels, 6, FLOAT32, 0)
            p = reference.counts(Layer(record, {"bits": bits}), signs.transpose(0, 2, 3, 1))
            assert p.dtype == np.float32 and np.array_equal(-2 * p, numpy_map(c)), (channels, kind)
            assert np.array_equal(p, p.round()) and not np.signbit(p[p == 0]).any()


def test_folded_bits_are_the_signs_of_the_weights():
    network, _ = trained(width=34)
    layers = [layer for layer in fold(network).layers if layer.operation == "half-block"]
    groups = [group for block in network.blocks for group in ([block.conv3x3], [*block.conv1x1])]
    for layer, group in zip(layers, groups, strict=True):
        weight = torch.cat([conv.weight for conv in group]).detach().sign()
        bits = np.unpackbits(layer.arrays["bits"].view(np.uint8), axis=2, bitorder="little")
        assert not bits[..., layer.channels_in :].any()
        found = bits[..., : layer.channels_in] * 2.0 - 1
        assert np.array_equal(found, weight.flatten(2).transpose(1, 2).numpy())


# ------------------------------------------------------------------------------------------------ layer by layer


@pytest.mark.parametrize(
    ("width", "side", "stem_stride", "dtype"),
    (
        (2, 32, 1, torch.float64),
        (2, 64, 2, torch.float32),
        (8, 32, 2, torch.float64),
        (8, 32, 2, torch.float32),
        (8, 64, 1, torch.float64),
        (8, 64, 2, torch.float64),
        (34, 32, 2, torch.float32),
    ),
)
def test_each_layer_gives_what_pytorch_gives_for_the_same_input(width, side, stem_stride, dtype):
    """Chaos begins anew at every layer: this finds what is folded wrongly, and nothing else."""
    network, classifier = trained(width, stem_stride)
    layers = packed(fold(network, classifier, linear="float32"), side).layers
    network, classifier = network.to(dtype), classifier.to(dtype)
    images = torch.randn(3, 3, side, side)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-6
    compared = []

    def compare(found, expected, before, name):
        expected = numpy_map(expected) if expected.ndim == 4 else expected.detach().float().numpy()
        assert found.shape == expected.shape and found.dtype == np.float32
        worst = np.abs(found - expected).max()
        assert worst <= tolerance * np.abs(expected).max(), (name, worst)
        if "threshold" in before.blobs:
            threshold = before.blobs["threshold"]
            clear = np.abs(expected - threshold) > 1e-4
            assert np.array_equal(reference.signs(before, found)[clear], (expected > threshold)[clear])
            assert clear.mean() > 0.99
        compared.append(name)

    # Both sides see the same float32 numbers: PyTorch's, rounded.
    with torch.no_grad():
        stem = network.stem(images.to(dtype)).float()
        compare(reference.stem(layers[0], images.numpy()), stem, layers[0], "stem")
        x = stem
        for number, block in enumerate(network.blocks):
            caught = []

            def rounded(_module, _inputs, out, caught=caught):
                caught.append(out.float())
                return caught[-1].to(dtype)

            with block.act1.register_forward_hook(rounded):
                after = block(x.to(dtype)).float()
            for half, inner, outer in ((1, x, caught[0]), (2, caught[0], after)):
                before, layer = layers[2 * number + half - 1 : 2 * number + half + 1]
                signs = reference.signs(before, numpy_map(inner))
                found = reference.half_block(layer, signs, numpy_map(inner))
                compare(found, outer, layer, f"block {number}, half {half}")
            x = after
        pooled = x.to(dtype).mean(dim=(2, 3)).float()
        compare(reference.mean(numpy_map(x)), pooled, layers[-3], "mean")
        features = F.relu(network.fc(pooled.to(dtype))).float()
        compare(reference.linear(layers[-2], pooled.numpy()), features, layers[-2], "fc")
        logits = classifier(features.to(dtype))
        compare(reference.linear(layers[-1], features.numpy()), logits, layers[-1], "classifier")
    assert len(compared) == len(layers) == 10


def test_slopes_of_every_kind_and_both_sides_of_zero():
    layer = random_network(width=8).layers[2]  # 8 -> 16, doubled
    slopes = np.array([-2, -0.5, 0, 0.25, 1, 1.5, 3, -1] * 2, np.float32)
    layer = Layer(layer.record, layer.blobs | {"slope": slopes, "b": np.zeros(16, np.float32)})
    random = np.random.default_rng(0)
    s, x = random.random((2, 5, 5, 8)) < 0.5, random.normal(size=(2, 5, 5, 8)).astype(np.float32)
    u = layer.blobs["a"] * reference.counts(layer, s) + np.concatenate((x, x), axis=3)
    expected = F.prelu(torch.from_numpy(u).permute(0, 3, 1, 2), torch.from_numpy(slopes))
    expected = numpy_map(expected) + layer.blobs["shift"]
    assert np.array_equal(reference.half_block(layer, s, x), expected) and (u > 0).any() and (u < 0).any()


@pytest.mark.parametrize("shift", (0.0, 0.3, -0.3, 1e-38, -3e-39, 1e30))
def test_a_sign_is_positive_only_beyond_the_threshold(shift):
    """h > -shift is sign(h + shift) > 0 for every float32, denormal ones included; equality is -1."""
    shift = np.float32(shift)
    layer = Layer(random_network().layers[1].record, {"threshold": np.array([-shift])})
    h = np.array([-shift, np.nextafter(-shift, np.float32(np.inf)), np.nextafter(-shift, np.float32(-np.inf))])
    assert reference.signs(layer, h[:, None]).flatten().tolist() == [False, True, False]
    near = (-shift * (1 + np.random.default_rng(0).normal(size=1000) * 1e-6)).astype(np.float32)
    expected = (torch.from_numpy(near) + torch.tensor(shift)).sign() > 0
    assert np.array_equal(reference.signs(layer, near[:, None])[:, 0], expected.numpy())
    nothing = Layer(layer.record, {"threshold": np.array([np.inf], np.float32)})
    assert not reference.signs(nothing, np.array([[np.inf], [np.nan], [0]], np.float32)).any()


# ------------------------------------------------------------------------------------------------ whole networks


@pytest.mark.parametrize("classifies", (True, False))
@pytest.mark.parametrize("pooled_mlp", (True, False))
def test_a_network_is_pytorchs_in_float64_where_the_signs_agree(pooled_mlp, classifies):
    network, classifier = trained(width=8, pooled_mlp=pooled_mlp)
    classifier = classifier if classifies else None
    content = bnn.to_bytes(packed(fold(network, classifier, linear="float32"), 32))
    read = bnn.read(content)
    assert read.feature_layers == len(read.layers) - classifies
    images = torch.randn(32, 3, 32, 32)
    signs = []
    wide = copy.deepcopy(network).double()
    for module in wide.modules():
        if isinstance(module, BinaryConv2d):
            module.register_forward_pre_hook(lambda _, inputs: signs.append(numpy_map(inputs[0] > 0) > 0))
    with torch.no_grad():
        expected = wide(images.double())
        expected = (copy.deepcopy(classifier).double()(expected) if classifies else expected).numpy()
    found = reference.run(read, images.numpy())
    assert found.shape == expected.shape == (32, 5 if classifies else 32)

    agree = np.ones(32, bool)
    # A doubling block's two convolutions see the same signs.
    convolutions = [m for m in wide.modules() if isinstance(m, BinaryConv2d)]
    seen = iter(signs)
    for number in range(1, 1 + 2 * len(wide.blocks)):
        before = read.layers[number - 1]
        ours = reference.signs(before, reference.stream(read, images.numpy(), number))
        for _ in range(1 + (read.layers[number].record.residual == bnn.DOUBLED)):
            agree &= (next(seen) == ours).all(axis=(1, 2, 3))
    assert next(seen, None) is None and len(convolutions) == len(signs)
    assert agree.mean() > 0.9
    assert np.abs(found - expected)[agree].max() < 1e-5 * np.abs(expected).max()
    assert np.array_equal(found.argmax(1)[agree], expected.argmax(1)[agree])


@pytest.mark.parametrize(("linear", "worst"), (("float16", 5e-4), ("int8", 4e-3)))
def test_linear_layers_take_fewer_bits(linear, worst):
    network, classifier = trained(pooled_mlp=False)
    (layer,) = fold(network, classifier, linear=linear).layers[-1:]
    weight = classifier.weight.detach().numpy()
    assert layer.arrays["weight"].dtype == linear and ("scale" in layer.arrays) == (linear == "int8")
    found = layer.arrays["weight"].astype(np.float32)
    if linear == "float16":
        assert np.array_equal(found, weight.astype(np.float16))
    else:
        assert (np.abs(found).max(axis=1) == 127).all()
        found = found * layer.arrays["scale"][:, None]
    assert 0 < np.abs(found - weight).max() <= worst * np.abs(weight).max()
    nothing = nn.Linear(32, 5)
    nn.init.zeros_(nothing.weight)
    assert not fold(network, nothing, linear=linear).layers[-1].arrays["weight"].any()


def test_standardized_features_are_folded_into_the_classifier():
    network, classifier = trained()
    norm = nn.BatchNorm1d(32, affine=False)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.1, 3)
    both = nn.Sequential(norm, classifier).eval()
    (layer,) = packed(fold(network, both, linear="float32"), 32).layers[-1:]
    x = torch.randn(4, 32)
    found = reference.linear(layer, x.numpy())
    assert np.allclose(found, both.double()(x.double()).detach().numpy(), rtol=0, atol=1e-5)


def test_threads_share_a_network():
    network, classifier = trained()
    read = packed(fold(network, classifier), 32)
    images = torch.randn(4, 3, 32, 32).numpy()
    expected = reference.stream(read, images, 7).tobytes()
    with ThreadPoolExecutor(8) as pool:
        assert {one.tobytes() for one in pool.map(lambda _: reference.stream(read, images, 7), range(8))} == {expected}


# ------------------------------------------------------------------------------------------------ refusals


def test_few_weights_of_zero_are_plus_one():
    network, classifier = trained(width=32)
    weights = sum(m.weight.numel() for m in network.modules() if isinstance(m, BinaryConv2d))
    assert 200_000 <= weights < 300_000
    with torch.no_grad():
        network.blocks[0].conv3x3.weight[3, 5, 1, 1] = 0
        network.blocks[2].conv1x1[0].weight[7, 9] = -0.0
    folded = fold(network, classifier)
    assert (folded.weights, folded.zeros) == (weights, 2)
    filled = copy.deepcopy(network)
    replace_zeros(filled)
    assert fold(filled, classifier).zeros == 0
    for one, other in zip(folded.layers, fold(filled, classifier).layers, strict=True):
        assert all(np.array_equal(one.arrays[name], other.arrays[name]) for name in one.arrays)
    x = torch.ones(1, 32, 1, 1)
    assert (filled.blocks[0].conv3x3(x) != network.blocks[0].conv3x3(x)).sum() == 1
    with torch.no_grad():
        network.blocks[2].conv3x3.weight[0, 0, 0, 0] = 0
    with pytest.raises(FoldError, match=rf"3 of {weights} binary weights are exactly 0"):
        fold(network, classifier)


@pytest.mark.parametrize(
    ("config", "said"),
    (
        ({"weights": "real"}, "binary activations with real weights cannot be packed; export a stage 2 run"),
        ({"weights": "real", "activations": "real"}, "weights: real"),
        ({"activations": "real"}, "activations: real"),
        ({"width": 3}, "width: 3: only an even one"),
    ),
)
def test_other_networks_are_refused(config, said):
    network = ReActNet(Config(**{"width": 2, "multiples": (1, 2), **config}))
    with pytest.raises(FoldError, match=said):
        fold(network)


def test_a_resnet_and_another_classifier_are_refused():
    with pytest.raises(FoldError, match="ResNet: only a ReActNet can be packed"):
        fold(ResNetConfig(arch="resnet18").build())
    with pytest.raises(FoldError, match="expected a linear layer, or BatchNorm and one"):
        fold(trained(width=2)[0], nn.Sequential(nn.Linear(8, 8), nn.ReLU()))


def test_numbers_that_are_not_finite_are_refused():
    network, classifier = trained(width=2)
    for name in ("stem.0.weight", "blocks.1.norm1.running_var", "blocks.2.act2.prelu.weight", "fc.bias"):
        broken = copy.deepcopy(network)
        broken.state_dict()[name].flatten()[0] = float("nan")
        with pytest.raises(FoldError, match=f"^{name}: holds numbers that are not finite"):
            fold(broken, classifier)
    broken = copy.deepcopy(network)
    broken.blocks[1].norm1.running_var[0] = -1
    with pytest.raises(FoldError, match=r"layer 3 \(half-block\), a: not finite as float32 once folded"):
        fold(broken)
    with torch.no_grad():
        classifier.weight[0, 0] = 1e6
    with pytest.raises(FoldError, match=r"layer 9 \(linear\), weight: not finite as float16 .*linear float32"):
        fold(network, classifier)
    fold(network, classifier, linear="float32")
