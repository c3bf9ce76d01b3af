"""Networks: counts and shapes of methods.md 7.1, heads, import of foreign files, cost."""

import copy
import hashlib

import pytest
import torch
from torch import nn

from models import backbones, cost, weights
from models.heads import MLP
from models.reactnet import Config, ReActNet
from models.resnet import Config as ResNetConfig
from models.resnet import ResNet
from models.statistics import reestimate


def meta(config):
    with torch.device("meta"):
        return config.build()


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("stage", ["real", "binary"])
def test_reactnet_counts(stage):
    net = meta(Config(weights=stage))
    assert count(net) == 29_368_192
    assert len(net.state_dict()) == 298
    assert len(list(net.parameters())) == 202
    binary = [m for m in net.modules() if type(m).__name__ == "BinaryConv2d"]
    assert len(binary) == 31
    assert sum(m.weight.numel() for m in binary) == 28_253_184
    without = meta(Config(weights=stage, pooled_mlp=False))
    assert count(without) == 28_318_592
    assert len(without.state_dict()) == 296


def test_stages_have_equal_keys_and_shapes():
    shapes = [{k: v.shape for k, v in meta(Config(weights=w)).state_dict().items()} for w in ("real", "binary")]
    assert shapes[0] == shapes[1]


def test_teacher_and_heads():
    teacher = meta(ResNetConfig(arch="resnet50"))
    assert count(teacher) == 23_508_032
    assert len(teacher.state_dict()) == 318
    with torch.device("meta"):
        student_head, teacher_head = MLP(1024, 2000, 2000, norm=True), MLP(2048, 2000, 2000, norm=True)
    assert (count(student_head), count(teacher_head)) == (6_056_000, 8_104_000)
    assert len(student_head.state_dict()) == 9
    assert count(meta(Config())) + count(teacher) + 6_056_000 + 8_104_000 == 67_036_224


def test_teacher_is_torchvisions_resnet():
    import torchvision

    theirs = torchvision.models.resnet18(weights=None).eval()
    ours = ResNet(ResNetConfig(arch="resnet18")).eval()
    state = theirs.state_dict()
    weights.load_part(ours, {k: v for k, v in state.items() if not k.startswith("fc.")}, part="x", path="x")
    theirs.fc = torch.nn.Identity()
    images = torch.randn(2, 3, 64, 64)
    assert torch.allclose(ours(images), theirs(images), atol=1e-5)


def test_output_shapes():
    net = meta(Config())
    images = torch.empty(1, 3, 224, 224, device="meta")
    assert net.map(images).shape == (1, 1024, 7, 7)
    assert net(images).shape == (1, 1024)
    assert meta(Config(width=8, stem_stride=1))(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 256)


def test_image_sides():
    for side in (32, 63, 64, 96, 128, 160, 192, 224, 256):
        Config().check_side(side)
    for side in (112, 200, 33, 16):
        with pytest.raises(ValueError, match=r"image side .* nearest"):
            Config().check_side(side)
    with pytest.raises(ValueError, match="nearest 192 or 223"):
        Config().check_side(200)
    Config(stem_stride=1).check_side(48)
    Config(multiples=(1, 2, 4)).check_side(200)  # halved once


def test_cost_at_224():
    net = meta(Config())
    counted = cost.count(net, 224)
    assert counted.binary_macs == 4_816_896_000
    assert counted.float_macs == 10_838_016 + 1_048_576
    # The published 0.87e8 OPs are those of stem, binary part and a 1000-way classifier.
    assert 10_838_016 + 1_024_000 + counted.binary_macs / 64 == 87_126_016
    assert cost.count(meta(ResNetConfig(arch="resnet50")), 224).float_macs == 4_087_136_256
    assert cost.count(meta(Config(weights="real")), 224).binary_macs == 0


def test_initialization():
    net = ReActNet(Config(width=16))
    conv = net.blocks[6].conv3x3.weight
    assert abs(conv.std().item() / (2 / (256 * 9)) ** 0.5 - 1) < 0.02
    assert (net.blocks[0].act1.prelu.weight == 0.25).all()
    assert (net.blocks[0].shift1.bias == 0).all()
    assert abs(net.fc.weight.std().item() * (3 * 512) ** 0.5 - 1) < 0.05  # PyTorch's uniform default
    head = MLP(1024, 64, 64, norm=True)
    assert abs(head.fc0.weight.std().item() / 0.044194 - 1) < 0.02


def test_block_follows_the_equations():
    # methods.md 1.2, written out once more in numpy-like torch for a stride-2 doubling block in float64.
    net = ReActNet(Config(width=4)).double().train()
    block = net.blocks[1]
    for parameter in block.parameters():
        parameter.data.normal_()
    x = torch.randn(3, 8, 8, 8, dtype=torch.float64)
    got = block(x)

    def norm(y, bn):
        mean, var = y.mean((0, 2, 3), keepdim=True), y.var((0, 2, 3), keepdim=True, correction=0)
        return (y - mean) / (var + 1e-5).sqrt() * bn.weight[:, None, None] + bn.bias[:, None, None]

    def conv(y, module):
        w = module.weight
        w = w.sign() * w.abs().mean((1, 2, 3), keepdim=True)
        return torch.nn.functional.conv2d(y.sign(), w, stride=module.stride, padding=module.padding)

    def rprelu(y, act):
        y = y + act.shift_in.bias
        return torch.where(y > 0, y, y * act.prelu.weight[:, None, None]) + act.shift_out.bias

    shortcut = (x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]) / 4
    r = rprelu(norm(conv(x + block.shift1.bias, block.conv3x3), block.norm1) + shortcut, block.act1)
    a = r + block.shift2.bias
    v = torch.cat([norm(conv(a, block.conv1x1[i]), block.norm2[i]) + r for i in (0, 1)], 1)
    assert torch.allclose(got, rprelu(v, block.act2), atol=1e-10)


# ------------------------------------------------------------------------------------------------ foreign files


def published_reactnet_keys():
    """The 298 keys and shapes of methods.md 2.1, from its table."""
    widths = [32, 64, 128, 128, 256, 256, *[512] * 6, 1024, 1024]
    shapes = {}

    def bn(prefix, channels):
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{prefix}.{leaf}"] = (channels,)
        shapes[f"{prefix}.num_batches_tracked"] = ()

    shapes["feature.0.conv1.weight"] = (32, 3, 3, 3)
    bn("feature.0.bn1", 32)
    for i in range(1, 14):
        c, d, p = widths[i - 1], widths[i], f"feature.{i}."
        for name in ("move11", "move12", "move13", "move21"):
            shapes[f"{p}{name}.bias"] = (1, c, 1, 1)
        shapes[f"{p}binary_3x3.weight"] = (c, c, 3, 3)
        bn(f"{p}bn1", c)
        shapes[f"{p}prelu1.weight"] = (c,)
        if c == d:
            shapes[f"{p}binary_pw.weight"] = (c, c, 1, 1)
            bn(f"{p}bn2", c)
        else:
            for half in (1, 2):
                shapes[f"{p}binary_pw_down{half}.weight"] = (c, c, 1, 1)
                bn(f"{p}bn2_{half}", c)
        for name in ("move22", "move23"):
            shapes[f"{p}{name}.bias"] = (1, d, 1, 1)
        shapes[f"{p}prelu2.weight"] = (d,)
    shapes["fc.0.weight"], shapes["fc.0.bias"] = (1024, 1024), (1024,)
    return shapes


def random_state(shapes):
    return {k: torch.zeros((), dtype=torch.int64) if s == () else torch.randn(s) for k, s in shapes.items()}


def scaled(shapes, factor=16):
    """The same keys for a narrower network, so that tests stay light."""
    return {k: tuple(max(side // factor, 1) if side > 9 else side for side in s) for k, s in shapes.items()}


NARROW = Config(width=2)


def test_published_key_list_hash():
    lines = sorted(f"{key} {shape}" for key, shape in published_reactnet_keys().items())
    assert len(lines) == 298
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] == "0c0cb7364eb74693"


def test_published_backbone_fits_full_size(tmp_path):
    state = {k: torch.empty(s, device="meta") for k, s in published_reactnet_keys().items()}
    ours = weights.split({"state_dict": state}, tmp_path)["student"]
    expected = meta(Config()).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in expected.items()}


def heads():
    return {
        name: torch.randn(4) for name in ("fc0.weight", "fc0.bias", "bn0.weight", "bn0.bias", "fc1.weight", "fc1.bias")
    }


def test_burn_layouts_give_the_same_student(tmp_path):
    state = random_state(scaled(published_reactnet_keys()))
    full = {f"module.online_net.0.{k}": v for k, v in state.items()}
    full |= {f"module.backbone.{k}": v for k, v in state.items()}
    full |= {f"module.online_net.1.{k}": v for k, v in heads().items()}
    full |= {f"module.diff_branch_net.1.{k}": v for k, v in heads().items()}
    layouts = {
        "backbone": {"state_dict": state, "author": "x"},
        "multi": {"backbone": {"state_dict": state}, "classifier": {"state_dict": heads()}, "author": "x"},
        "full": {"meta": {}, "state_dict": full, "optimizer": {}},
        "bare": state,
    }
    images = torch.randn(2, 3, 32, 32)
    outputs = []
    for name, content in layouts.items():
        torch.save(content, tmp_path / f"{name}.pth")
        parts = weights.read(tmp_path / f"{name}.pth")
        net = ReActNet(NARROW)
        before = {k: v.clone() for k, v in net.state_dict().items()}
        weights.load_part(net, parts["student"], part="student", path=tmp_path)
        after = net.state_dict()
        unchanged = [k for k in before if torch.equal(before[k], after[k]) and "num_batches" not in k]
        assert unchanged == []  # methods.md 7.8.3: an import changes every tensor or raises
        outputs.append(net.train()(images))
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])
    assert set(weights.read(tmp_path / "full.pth")) == {"student", "student_head", "teacher", "teacher_head"}
    assert set(weights.read(tmp_path / "multi.pth")) == {"student", "student_head"}


def test_reactnet_and_s2bnn_layouts(tmp_path):
    state = random_state(scaled(published_reactnet_keys()))
    expected = weights.split(state, tmp_path)["student"]
    flat = {}
    for key, value in state.items():
        is_binary = "binary_" in key
        flat["module." + key.replace(".weight", ".weights") if is_binary else "module." + key] = (
            value.reshape(-1, 1) if is_binary else value
        )
    flat = {k: v for k, v in flat.items() if ".fc." not in k}
    flat |= {"module.fc.weight": torch.randn(5, 4), "module.fc.bias": torch.randn(5)}
    s2 = {f"module.encoder_q.{k}": v for k, v in state.items() if not k.startswith("fc.")}
    for i in range(1, 14):  # S2-BNN writes both 1x1 variants into every block
        p = f"module.encoder_q.feature.{i}."
        for extra in ("binary_pw.weight", "bn2.weight", "binary_pw_down1.weight", "bn2_1.bias"):
            s2.setdefault(p + extra, torch.randn(3))
    projection = {f"fc.{i}.{leaf}": torch.randn(3) for i in (0, 2) for leaf in ("weight", "bias")}
    s2 |= {f"module.encoder_q.{key}": value for key, value in projection.items()}
    head = weights.split({"state_dict": s2}, tmp_path)["head"]
    assert {k: v.tolist() for k, v in head.items()} == {
        k.replace("fc.0", "fc0").replace("fc.2", "fc1"): v.tolist() for k, v in projection.items()
    }
    for content in (flat, s2):
        got = weights.split({"state_dict": content}, tmp_path)["backbone"]
        assert got.keys() == {k for k in expected if not k.startswith("fc.")}
        assert all(torch.equal(got[k], expected[k]) for k in got)


@pytest.mark.parametrize("hole", ["feature.3.move11.bias", "feature.3.move22.bias"])
def test_partial_foreign_files_are_refused_in_one_line(tmp_path, hole):
    state = random_state(scaled(published_reactnet_keys()))
    del state[hole]
    with pytest.raises(weights.WeightsError) as caught:
        weights.load_part(ReActNet(NARROW), weights.split(state, tmp_path)["student"], part="student", path=tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(weights.WeightsError, match="incomplete"):
        weights.split({"backbone": {}, "author": "x"}, tmp_path)
    extra = random_state(scaled(published_reactnet_keys())) | {"feature.3.extra.deep.weight": torch.zeros(1)}
    with pytest.raises(weights.WeightsError, match=r"unknown key feature\.3\.extra"):
        weights.split(extra, tmp_path)


def test_a_full_checkpoint_whose_two_students_differ_is_refused(tmp_path):
    state = random_state(scaled(published_reactnet_keys()))
    full = {f"online_net.0.{k}": v for k, v in state.items()} | {f"backbone.{k}": v + 1 for k, v in state.items()}
    with pytest.raises(weights.WeightsError, match="two copies of the student differ"):
        weights.split({"state_dict": full}, tmp_path)


def test_moco_file(tmp_path):
    import torchvision

    net = torchvision.models.resnet18(weights=None)
    state = {f"module.encoder_q.{k}": v for k, v in net.state_dict().items() if not k.startswith("fc.")}
    head = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 128))
    state |= {f"module.encoder_q.fc.{k}": v for k, v in head.state_dict().items()}
    parts = weights.split({"state_dict": state}, tmp_path)
    weights.load_part(ResNet(ResNetConfig(arch="resnet18")), parts["backbone"], part="backbone", path=tmp_path)
    ours = MLP(512, 512, 128, norm=False)
    weights.load_part(ours, parts["head"], part="head", path=tmp_path)
    x = torch.randn(3, 512)
    assert torch.equal(ours(x), head(x))


def test_torchvision_file_brings_its_classifier(tmp_path):
    import torchvision

    net = torchvision.models.resnet18(weights=None, num_classes=7)
    torch.save(net.state_dict(), tmp_path / "resnet18.pth")
    parts = weights.read(tmp_path / "resnet18.pth")
    backbone, classifier = ResNet(ResNetConfig(arch="resnet18")), nn.Linear(512, 7)
    weights.load_part(backbone, parts["backbone"], part="backbone", path=tmp_path)
    weights.load_part(classifier, parts["classifier"], part="classifier", path=tmp_path)
    x = torch.randn(2, 3, 64, 64)
    assert torch.allclose(classifier(backbone.eval()(x)), net.eval()(x), atol=1e-5)


def test_wrong_keys_are_all_listed(tmp_path):
    net = ReActNet(NARROW)
    state = dict(net.state_dict())
    del state["fc.bias"], state["stem.0.weight"]
    state["more.weight"] = torch.zeros(1)
    state["fc.weight"] = torch.zeros(2, 2)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(weights.WeightsError) as caught:
        weights.load_part(net, state, part="student", path=tmp_path / "f.pt")
    for text in ("missing fc.bias", "missing stem.0.weight", "unexpected more.weight", "fc.weight has shape (2, 2)"):
        assert text in str(caught.value)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


@pytest.mark.parametrize("content", [[1, 2], {"a": torch.zeros(1)}, {"state_dict": {"x": torch.zeros(1)}}])
def test_unknown_layout_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(weights.WeightsError, match="unknown layout"):
        weights.read(tmp_path / "x.pt")


def test_what_is_no_weight_file_is_called_what_it_is(tmp_path):
    # Links that lead to a login page, clones without LFS, downloads that were packed or cut short.
    import gzip
    import lzma

    torch.save({"a": torch.zeros(1000)}, tmp_path / "new.pt")
    torch.save({"a": torch.zeros(1000)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    new, old = (tmp_path / "new.pt").read_bytes(), (tmp_path / "old.pt").read_bytes()
    assert weights.read_file(tmp_path / "new.pt").keys() == weights.read_file(tmp_path / "old.pt").keys() == {"a"}
    damaged = "cut short, damaged, or not written by torch.save"
    for content, message in (
        (b"", "is empty"),
        (b"\n<!DOCTYPE html><html><body>Sign in", "is an HTML page"),
        (b"\xef\xbb\xbf<HTML>", "is an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer.*git lfs pull"),
        (gzip.compress(new), "is packed with gzip; unpack it with gunzip"),
        (lzma.compress(new), "is packed with xz"),
        ((40).to_bytes(8, "little") + b'{"a":{"dtype":"F32"}}', "is a safetensors file"),
        (b"hello world", r"was not written by torch\.save, it begins with b'hello wo'"),
        (b"\x89HDF\r\n\x1a\n", "was not written by torch.save"),
        *((file[: int(len(file) * share)], damaged) for file in (new, old) for share in (0.3, 0.7, 0.99)),
        (old[:20] + b"zzzz" + old[24:], damaged),
    ):
        (tmp_path / "x.pt").write_bytes(content)
        with pytest.raises(weights.WeightsError, match=rf"x\.pt: {message}") as caught:
            weights.read(tmp_path / "x.pt")
        assert "\n" not in str(caught.value) and "could run code" not in str(caught.value)
    with pytest.raises(weights.WeightsError, match="cannot be read: Is a directory"):
        weights.read(tmp_path)


@pytest.mark.parametrize(
    "wrap",
    [
        "module.{}".format,
        "_orig_mod.{}".format,
        "module._orig_mod.{}".format,
        "_orig_mod.module.{}".format,
        lambda key: key.replace("layer1.", "layer1._orig_mod."),
    ],
)
def test_names_of_compiled_and_distributed_networks(wrap, tmp_path):
    import torchvision

    state = torchvision.models.resnet18(weights=None, num_classes=7).state_dict()
    torch.save({"state_dict": {wrap(key): value for key, value in state.items()}}, tmp_path / "x.pt")
    torch.save(state, tmp_path / "plain.pt")
    parts, plain = weights.read(tmp_path / "x.pt"), weights.read(tmp_path / "plain.pt")
    assert {name: list(part) for name, part in parts.items()} == {name: list(part) for name, part in plain.items()}


def test_file_with_code_is_refused(tmp_path):
    # reliability.md 23: a pickle that would run a command when loaded.
    import os
    import pickle

    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'canary'}",)

    torch.save({"state_dict": Payload()}, tmp_path / "evil.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Payload()))
    for name in ("evil.pt", "raw.pt"):
        with pytest.raises(weights.WeightsError, match=name):
            weights.read(tmp_path / name)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_folded_teacher_equals_the_plain_one(arch):
    torch.set_default_dtype(torch.float64)
    try:
        net = backbones.frozen(ResNetConfig(arch=arch), folds=True)
        x = torch.randn(4, 3, 64, 64)
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5), module.bias.normal_()
                module.running_mean.normal_(), module.running_var.uniform_(0.5, 2)
        plain = ResNet(net.config)
        plain.load_state_dict(net.state_dict())  # the same keys
        wanted = plain.eval()(x).detach()
        net.eval()
        got, first = net(x), net._folded[0]
        assert torch.allclose(got, wanted, rtol=1e-12, atol=1e-12 * wanted.abs().max().item())
        assert not any(isinstance(m, nn.BatchNorm2d) for m in first.modules())
        assert torch.allclose(net.train()(x), plain.train()(x))  # training mode knows nothing of it
        net.train(False)
        assert net._folded[0] is not first  # running statistics moved
        assert net.eval()._folded[0] is net.eval()._folded[0]  # and nothing since
        net.load_state_dict(ResNet(net.config).state_dict())
        assert not torch.allclose(net.eval()(x), wanted, rtol=1e-3)
    finally:
        torch.set_default_dtype(torch.float32)


def test_batch_norm_is_estimated_anew_from_batches_alone():
    torch.manual_seed(0)
    network = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout()).double().eval()
    network[0].momentum = 0.3
    before = copy.deepcopy(network)
    with pytest.raises(ValueError, match="no batches"):
        reestimate(network, [])
    assert all(torch.equal(a, b) for a, b in zip(network.buffers(), before.buffers(), strict=True))
    batches = [torch.randn(size, 3).double() * 2 + 5 for size in (4, 8)]
    reestimate(network, iter(batches))
    first, hidden = network[0], [before[1](nn.functional.batch_norm(x, None, None, training=True)) for x in batches]
    for norm, seen in ((first, batches), (network[2], hidden)):
        assert torch.allclose(norm.running_mean, torch.stack([x.mean(0) for x in seen]).mean(0), rtol=1e-12)
        assert torch.allclose(norm.running_var, torch.stack([x.var(0) for x in seen]).mean(0), rtol=1e-12)
    assert first.momentum == 0.3 and not any(module.training for module in network)
    assert torch.equal(network[1].weight, before[1].weight)
