"""SwAV, BYOL, MoCo, S2-BNN, soft targets, LARS and the monitors, each against its definition in float64."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from engine import dist, optim, strict_yaml
from engine.errors import RecipeError
from engine.monitors import Monitors, effective_rank
from engine.recipe import OptimConfig
from models import collectives, methods
from models.binary import BinaryConv2d
from models.losses import sinkhorn, soft_cross_entropy
from models.momentum import update_average
from tests.processes import run_ranks
from tests.runs import prepare, run, trainer_of
from tests.tiny import full_depth, tiny

F64 = torch.float64
SMALL = {"arch": "reactnet", "width": 2, "pooled_mlp": False}


def build(name, **keys):
    module = methods.load(name)
    return module.Config.model_validate({"name": name, "backbone": SMALL, **keys}).build().train()


@pytest.fixture
def float64():
    torch.set_default_dtype(F64)
    yield
    torch.set_default_dtype(torch.float32)


def views(count, size=32, batch=6):
    return [torch.randn(batch, 3, size, size) for _ in range(count)]


LABEL = torch.zeros(6, dtype=torch.int64)

# ------------------------------------------------------------------------------------------------ Sinkhorn

# Derived by hand for two images and two prototypes with scores [[1, 0], [0, 0]], ε = 1: one iteration divides the
# columns [e, 1] and [1, 1] by e + 1 and 2, then each row by its sum.
E = math.e
ROW0 = (E / (E + 1)) / (E / (E + 1) + 0.5)
ROW1 = (1 / (E + 1)) / (1 / (E + 1) + 0.5)


def test_sinkhorn_by_hand():
    scores = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]], dtype=F64)
    got = sinkhorn(scores, torch.ones(1, 2, dtype=F64), 1.0, 1)
    assert torch.allclose(got, torch.tensor([[[ROW0, 1 - ROW0], [ROW1, 1 - ROW1]]], dtype=F64), atol=1e-14)


def published_sinkhorn(scores, epsilon, iterations):
    """Caron et al. 2020, appendix A.1, with all of its constants: [B, K] numpy to [B, K]."""
    q = np.exp(scores / epsilon).T
    q /= q.sum()
    prototypes, images = q.shape
    for _ in range(iterations):
        q /= q.sum(axis=1, keepdims=True) * prototypes
        q /= q.sum(axis=0, keepdims=True) * images
    return (q * images).T


@pytest.mark.parametrize("iterations", [1, 3])
def test_sinkhorn_against_the_published_algorithm(iterations):
    cosines = torch.rand(2, 12, 5, dtype=F64) * 2 - 1
    got = sinkhorn(cosines, torch.ones(2, 12, dtype=F64), 0.05, iterations)
    for one, scores in zip(got, cosines, strict=True):
        assert np.allclose(one, published_sinkhorn(scores.numpy(), 0.05, iterations), atol=1e-12)
    assert torch.allclose(got.sum(2), torch.ones(2, 12, dtype=F64))
    if iterations == 3:  # prototypes are nearly equally used, which is what it is for
        free = sinkhorn(cosines, torch.ones(2, 12, dtype=F64), 0.05, 200)
        assert torch.allclose(free.sum(1), torch.full((2, 5), 12 / 5, dtype=F64), atol=1e-3)


def test_sinkhorn_leaves_out_masked_rows():
    cosines = torch.rand(1, 9, 4, dtype=F64) * 2 - 1
    rows = torch.ones(1, 9, dtype=F64)
    rows[0, :3] = 0
    got = sinkhorn(cosines, rows, 0.05, 3)
    assert torch.allclose(got[:, 3:], sinkhorn(cosines[:, 3:], rows[:, 3:], 0.05, 3), atol=1e-14)
    assert got.isfinite().all()


def test_sinkhorn_is_at_least_float32():
    extreme = torch.tensor([[[1.0, -1.0], [-1.0, 1.0]]])
    for dtype in (torch.float16, torch.bfloat16):
        got = sinkhorn(extreme.to(dtype), torch.ones(1, 2), 0.05, 3)
        assert got.dtype == torch.float32 and torch.allclose(got[0], torch.eye(2), atol=1e-6)


def swav_on_ranks(folder):
    """One step of SwAV's assignment on this rank's share of 12 images and of the queue; rank 0 keeps all."""
    world = dist.start("cpu", 60)
    torch.set_default_dtype(F64)
    torch.manual_seed(0)
    method = build("swav", hidden_dim=4, out_dim=5, num_prototypes=7, queue_size=8)
    method.queue.copy_(F.normalize(torch.randn(2, 8, 5), dim=2))
    embedding = F.normalize(torch.randn(2, 12, 5), dim=2)
    share = 12 // world.world_size
    mine = embedding[:, share * world.rank : share * (world.rank + 1)]
    weight = method.prototypes.weight.detach()
    found = {}
    for queue_on in (0.0, 1.0):
        got = method.assign(mine, mine @ weight.T, weight, torch.tensor(queue_on))
        found[queue_on] = dist.gather_rows(got.transpose(0, 1).contiguous())  # [12, 2, K]
    method._new = [mine.transpose(0, 1)]
    method.after_step({"queue": 1.0, "prototypes": 1.0})
    found["queue"] = method.queue
    if world.is_main:
        torch.save(found, folder / f"{world.world_size}.pt")
    dist.stop()


def test_swav_on_two_ranks_equals_one_process(tmp_path):
    try:
        swav_on_ranks(tmp_path)
    finally:
        torch.set_default_dtype(torch.float32)
    assert run_ranks(2, swav_on_ranks, tmp_path) == [0, 0]
    one, two = torch.load(tmp_path / "1.pt"), torch.load(tmp_path / "2.pt")
    for key in one:
        assert torch.allclose(one[key], two[key], atol=1e-13), key
    assert not torch.allclose(one[0.0], one[1.0], atol=1e-3)  # a full queue changes the assignment


# ------------------------------------------------------------------------------------------------ SwAV


def swav_values(prototypes=1.0, queue=0.0):
    return {"prototypes": torch.tensor(prototypes), "queue": torch.tensor(queue)}


def test_swav_loss_and_gradient(float64):
    method = build("swav", hidden_dim=4, out_dim=5, num_prototypes=7)
    images = [*views(2), *views(1, size=64), *views(1, size=64)]
    torch.manual_seed(1)
    got = method(images, LABEL, swav_values())["loss"]
    # The definition, with one backbone call for each resolution.
    features = [*method.backbone(torch.cat(images[:2])).chunk(2), *method.backbone(torch.cat(images[2:])).chunk(2)]
    z = F.normalize(method.head(torch.cat(features)), dim=1)
    scores = (z @ method.prototypes.weight.T).chunk(4)
    expected = 0
    for i in (0, 1):
        q = torch.from_numpy(published_sinkhorn(scores[i].detach().numpy(), 0.05, 3))
        for v in range(4):
            if v != i:
                expected = expected - (q * F.log_softmax(scores[v] / 0.1, dim=1)).sum(1).mean() / 3 / 2
    assert abs(got - expected) < 1e-12
    parameters = [method.prototypes.weight, *method.head.parameters(), *method.backbone.parameters()]
    wanted = torch.autograd.grad(expected, parameters)
    for one, other in zip(torch.autograd.grad(got, parameters), wanted, strict=True):
        assert torch.allclose(one, other, atol=1e-11)


def test_swav_queue_fills_and_joins_when_it_is_full(float64):
    method = build("swav", hidden_dim=4, out_dim=5, num_prototypes=7, queue_size=12)
    kept = []
    for step in range(3):
        torch.manual_seed(step)
        method(views(2), LABEL, swav_values(queue=1.0))
        kept.insert(0, method._new[0].transpose(0, 1).clone())  # [2, 6, D]
        method.after_step({"prototypes": 1.0, "queue": 1.0})
        assert torch.equal(method.queue[:, : 6 * min(step + 1, 2)], torch.cat(kept, dim=1)[:, :12])  # newest first
    z = F.normalize(torch.randn(2, 6, 5), dim=2)
    weight = method.prototypes.weight.detach()
    joined = torch.cat((method.queue, z), dim=1)
    for i, one in enumerate(method.assign(z, z @ weight.T, weight, torch.tensor(1.0))):
        everything = published_sinkhorn((joined[i] @ weight.T).numpy(), 0.05, 3)
        assert np.allclose(one, everything[-6:], atol=1e-12)
    method.queue[:, -1] = 0  # not full yet
    alone = sinkhorn(z @ weight.T, torch.ones(2, 6), 0.05, 3)
    assert torch.allclose(method.assign(z, z @ weight.T, weight, torch.tensor(1.0)), alone, atol=1e-13)
    before = method.queue.clone()
    method(views(2), LABEL, swav_values())
    method.after_step({"prototypes": 1.0, "queue": 0.0})
    assert torch.equal(method.queue, before)


def test_swav_prototypes_are_frozen_first_and_always_unit(tmp_path):
    trainer, batches = prepare(
        tiny("swav.yaml", tmp_path, "schedules.prototypes.milestones=[2it]", "schedules.lr.start=0.5")
    )
    weight = trainer.method.prototypes.weight
    for step in range(4):
        before = weight.clone()
        trainer.step(batches)
        assert torch.allclose(weight.norm(dim=1), torch.ones(len(weight)), atol=1e-6)
        assert torch.allclose(before, weight, atol=1e-7) == (step < 2)


def test_views_are_counted(tmp_path):
    with pytest.raises(RecipeError, match="data.views: expected at least 2 for method swav, got 1"):
        tiny("swav.yaml", tmp_path, "data.views=[{preset: swav_large, size: 32}]")
    with pytest.raises(RecipeError, match="data.views: expected 1 for method s2bnn, got 2"):
        tiny("s2bnn_step1.yaml", tmp_path, "data.views=[{preset: s2bnn, size: 32, repeat: 2}]")
    with pytest.raises(RecipeError, match=r"schedules\.momentum: unknown key"):
        tiny("s2bnn_step1.yaml", tmp_path, "schedules.momentum=0.9")
    with pytest.raises(RecipeError, match=r"schedules\.queue: missing, method swav needs it"):
        from engine import recipe as recipes
        from tests.tiny import ROOT

        content = strict_yaml.read(ROOT / "recipes/swav.yaml")
        del content["schedules"]["queue"]
        recipes.resolve({**content, "name": "x"}, tmp_path)


# ------------------------------------------------------------------------------------------------ BYOL


def test_byol_loss_and_gradient(float64):
    method = build("byol", hidden_dim=6, out_dim=5)
    one, two = views(2)
    got = method([one, two], LABEL, {})["loss"]
    online = [method.predictor(method.head(method.backbone(x))) for x in (one, two)]
    target = [method.target_head(method.target_backbone(x)).detach() for x in (one, two)]
    cosines = [F.cosine_similarity(online[v], target[1 - v]) for v in (0, 1)]
    expected = sum((2 - 2 * c).mean() for c in cosines)
    assert abs(got - expected) < 1e-12
    parameters = [p for p in method.parameters() if p.requires_grad]
    wanted = torch.autograd.grad(expected, parameters)
    for mine, other in zip(torch.autograd.grad(got, parameters), wanted, strict=True):
        assert torch.allclose(mine, other, atol=1e-11)


def test_byol_target_follows_and_keeps_its_own_statistics():
    method = build("byol", hidden_dim=6, out_dim=5)
    with torch.no_grad():
        for parameter in method.backbone.parameters():
            parameter.add_(torch.randn_like(parameter))
    before = {k: v.clone() for k, v in method.target_backbone.state_dict().items()}
    method.after_step({"momentum": 0.9})
    online = method.backbone.state_dict()
    parameters = dict(method.backbone.named_parameters())
    for name, value in method.target_backbone.state_dict().items():
        wanted = 0.9 * before[name] + 0.1 * online[name] if name in parameters else before[name]
        assert torch.allclose(value, wanted, atol=1e-6), name
    method(views(2), LABEL, {})
    buffers = dict(method.target_backbone.named_buffers())
    assert not torch.equal(buffers["stem.1.running_mean"], before["stem.1.running_mean"])
    update_average(method.target_backbone, method.backbone, 1.0)  # the end of the schedule: it stands still
    assert {id(p) for p in method.target_backbone.parameters()}.isdisjoint(map(id, method.backbone.parameters()))


# ------------------------------------------------------------------------------------------------ S2-BNN, soft targets


def test_soft_cross_entropy_by_hand():
    # softmax of log [1, 3] at T = 1 is [1/4, 3/4]; of log [1, 1] [1/2, 1/2]: -ln 1/2; the other way round
    # -(ln 1/4 + ln 3/4) / 2.
    a, b = torch.tensor([[1.0, 3.0]], dtype=F64).log(), torch.zeros(1, 2, dtype=F64)
    assert abs(soft_cross_entropy(b, a, 1.0).item() - math.log(2)) < 1e-15
    assert abs(soft_cross_entropy(a, b, 1.0).item() + (math.log(0.25) + math.log(0.75)) / 2) < 1e-15
    s = torch.randn(4, 5, dtype=F64, requires_grad=True)
    t = torch.randn(4, 5, dtype=F64)
    (gradient,) = torch.autograd.grad(soft_cross_entropy(s, t, 0.2).sum(), s)
    assert torch.allclose(gradient, (F.softmax(s / 0.2, 1) - F.softmax(t / 0.2, 1)) / 0.2, atol=1e-13)


def test_s2bnn_losses(float64):
    keys = {"teacher": {**SMALL, "weights": "real", "activations": "real"}, "out_dim": 5, "queue_size": 12}
    method = build("s2bnn", **keys, contrast=True)
    assert not method.teacher.training and not method.teacher_head.training
    one, two = views(2)
    queue = method.contrast.queue.clone()
    got = method([one, two], LABEL, {})
    q = F.normalize(method.head(method.backbone(one)), dim=1)
    t = F.normalize(method.teacher_head(method.teacher(one)), dim=1)
    k = F.normalize(method.contrast.key_head(method.contrast.key_backbone(two)), dim=1)
    distillation = -(F.softmax(t / 0.2, 1) * F.log_softmax(q / 0.2, 1)).sum(1).mean()
    logits = torch.cat(((q * k).sum(1, keepdim=True), q @ queue), dim=1) / 0.2
    contrast = F.cross_entropy(logits, LABEL)
    assert abs(got["distillation"] - distillation) < 1e-12 and abs(got["contrast"] - contrast) < 1e-12
    assert abs(got["loss"] - distillation - contrast) < 1e-12
    method.after_step({"momentum": 0.9})
    assert torch.allclose(method.contrast.queue[:, :6], k.T, atol=1e-12)
    alone = build("s2bnn", **keys)
    assert not hasattr(alone, "contrast") and alone.config.num_views == 1 and alone.config.schedules == ()
    alone([one], LABEL, {})["loss"].backward()
    assert all(p.grad is None for p in (*alone.teacher.parameters(), *alone.teacher_head.parameters()))


def test_the_teachers_head_has_its_own_width():
    teacher = {**SMALL, "weights": "real", "activations": "real"}
    usual, narrow = (build("s2bnn", teacher=teacher, teacher_hidden_dim=width) for width in (None, 5))
    assert usual.teacher_head.fc0.out_features == usual.teacher.out_channels == 64
    assert narrow.teacher_head.fc0.out_features == 5 and narrow.head.fc0.out_features == 64


def test_soft_targets_replace_the_labels(float64):
    method = build("classify", teacher={**SMALL, "weights": "real"}, num_classes=4)
    (image,) = views(1)
    got = method([image], LABEL, {})["loss"]
    target = F.softmax(method.teacher_classifier(method.teacher(image)), dim=1)
    assert abs(got + (target * F.log_softmax(method.logits(image), dim=1)).sum(1).mean()) < 1e-12
    assert torch.equal(got, method([image], LABEL + 1, {})["loss"]) and not method.teacher.training


# ------------------------------------------------------------------------------------------------ LARS


class Weights(torch.nn.Module):
    """A matrix of norm 5, a bias of norm 13, a shift at zero and a matrix at zero."""

    def __init__(self):
        super().__init__()
        self.matrix = torch.nn.Parameter(torch.tensor([[3.0, 0.0], [0.0, 4.0]], dtype=F64))
        self.bias = torch.nn.Parameter(torch.tensor([5.0, 12.0], dtype=F64))
        self.shift = torch.nn.Parameter(torch.zeros(1, 2, 1, 1, dtype=F64))
        self.zero = torch.nn.Parameter(torch.zeros(2, 2, dtype=F64))


def steps(config, gradients, lr, weight_decay):
    """Weights after steps with these gradients (one number for all entries of all tensors) and learning rates."""
    module = Weights()
    optimizer = optim.build(OptimConfig.model_validate(config), module)
    for gradient, rate in zip(gradients, lr, strict=True):
        for parameter in module.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        optim.apply(optimizer, rate, weight_decay)
        optimizer.step()
    return module


def test_lars_by_hand():
    # ‖w‖ = 5, ‖g‖ = 2 (four ones), λ = 0.1, trust 0.01: r = 0.01 · 5 / (2 + 0.5) = 0.02; d = [1.3, 1; 1, 1.4];
    # v = 2 · 0.02 · d = [0.052, 0.04; 0.04, 0.056]. Exempt tensors: v = 2 · 1.
    config = {"name": "lars", "momentum": 0.9, "trust": 0.01, "decay": "weights"}
    got = steps(config, [1.0], [2.0], 0.1)
    wanted = torch.tensor([[2.948, -0.04], [-0.04, 3.944]], dtype=F64)
    assert torch.allclose(got.matrix, wanted, atol=1e-15)
    assert torch.allclose(got.bias, torch.tensor([3.0, 10.0], dtype=F64), atol=1e-15)
    assert torch.allclose(got.shift, torch.full_like(got.shift, -2.0), atol=1e-15)  # r = 1, or it would never move
    assert torch.allclose(got.zero, torch.full_like(got.zero, -2.0), atol=1e-15)


def test_lars_keeps_the_rate_in_its_buffer_and_larc_does_not():
    for name in ("lars", "larc"):
        config = {"name": name, "momentum": 0.5, "trust": 0.01, "decay": "weights"}
        got = steps(config, [1.0, 0.0], [2.0, 1.0], 0.0)
        # First step: 2 · 1 off. Second, without gradient: lars 0.5 · (2 · 1) off, larc 1 · (0.5 · 1).
        assert torch.allclose(got.bias, torch.tensor([5.0, 12.0], dtype=F64) - (3.0 if name == "lars" else 2.5))


def test_larc_by_hand():
    # As SwAV: every tensor. bias: ‖w‖ = 13, ‖g‖ = √2, λ = 0: r = 0.01 · 13 / √2, step 2 · r.
    got = steps({"name": "larc", "momentum": 0.9, "trust": 0.01}, [1.0], [2.0], 0.0)
    step = 2 * 0.01 * 13 / math.sqrt(2)
    assert torch.allclose(got.bias, torch.tensor([5.0 - step, 12.0 - step], dtype=F64), atol=1e-14)
    still = steps({"name": "larc", "momentum": 0.9, "trust": 0.01}, [0.0], [2.0], 0.1)
    assert torch.equal(still.matrix, Weights().matrix)  # no gradient: weight decay alone moves nothing


@pytest.mark.parametrize("name", ["lars", "larc"])
def test_lars_skips_a_step_that_overflowed(name):
    # As torch.amp.GradScaler tells optimizers that take its verdict as a tensor.
    module = Weights()
    config = {"name": name, "momentum": 0.9, "trust": 0.01, "decay": "weights"}
    optimizer = optim.build(OptimConfig.model_validate(config), module)
    optim.apply(optimizer, 1.0, 0.1)

    def step(gradient, found_inf):
        for parameter in module.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        optimizer.found_inf = torch.tensor(found_inf)
        optimizer.step()
        del optimizer.found_inf
        return [
            p.detach().clone()
            for p in (*module.parameters(), *(s["momentum_buffer"] for s in optimizer.state.values()))
        ]

    moved = step(1.0, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(moved, step(float("inf"), 1.0), strict=True))
    assert not torch.equal(moved[0], step(1.0, 0.0)[0])
    plain = steps(config, [1.0, 1.0], [1.0, 1.0], 0.1)
    assert torch.allclose(module.matrix, plain.matrix) and optimizer._step_supports_amp_scaling


def test_lars_leaves_alone_what_is_not_a_matrix(tmp_path):
    # The regular expression of the release misses the PReLU slopes and the affines of the doubling blocks.
    trainer = trainer_of(tiny("byol.yaml", tmp_path, *full_depth("byol.yaml")))
    scaled = {id(p) for group in trainer.optimizer.param_groups if group["decayed"] for p in group["params"]}
    names = {n for n, p in trainer.method.named_parameters() if id(p) in scaled}
    wanted = {
        f"{name}.weight"
        for name, module in trainer.method.named_modules()
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear) and module.weight.requires_grad
    }
    assert names == wanted and len(names) == 1 + 31 + 4  # stem, binary; head and predictor
    assert not any("prelu" in n or "norm" in n or "shift" in n or "bias" in n for n in names)


# ------------------------------------------------------------------------------------------------ monitors


def test_monitors_count_signs_and_latent_weights():
    method = build("byol", hidden_dim=6, out_dim=5)
    monitors = Monitors(method)
    layers = [m for m in method.backbone.modules() if isinstance(m, BinaryConv2d)]
    total = sum(layer.weight.numel() for layer in layers)
    with torch.no_grad():
        for layer in layers:
            layer.weight.clamp_(-0.9, 0.9)
        layers[0].weight.neg_()  # the momentum network's copies do not count
        before = layers[3].weight[0, 0].clone()
        layers[3].weight[0, 0] = 1.5
    flipped = layers[0].weight.numel() + int((before < 0).sum())
    kept = monitors._read_signs()
    got = monitors.read(torch.randn(4, 3, 32, 32))
    assert abs(got["binary/sign_flips"] - flipped / total) < 1e-7
    assert got["binary/latent_beyond_one"] == layers[3].weight[0, 0].numel() / total
    again = monitors.read(torch.randn(4, 3, 32, 32))
    assert again["binary/sign_flips"] == 0 and torch.equal(kept, monitors._signs)


def test_monitors_find_dead_and_saturated_channels_and_change_nothing():
    method = build("byol", hidden_dim=6, out_dim=5)
    monitors = Monitors(method)
    images = torch.randn(8, 3, 32, 32)
    base = monitors.read(images)
    block = method.backbone.blocks[3]
    channels = sum(m.in_channels for m in method.backbone.modules() if isinstance(m, BinaryConv2d))
    with torch.no_grad():
        block.shift1.bias[:, 0] = 1e6  # always +1 and far outside
    state = {k: v.clone() for k, v in method.state_dict().items()}
    got = monitors.read(images)
    for name in ("binary/dead_channels", "binary/saturated_channels"):
        assert got[name] >= base[name]
        assert got[name] > 0
    more = (got["binary/saturated_channels"] - base["binary/saturated_channels"]) * channels
    assert more > 0.5  # this channel at least; later ones may follow
    assert method.training and all(torch.equal(v, state[k]) for k, v in method.state_dict().items())
    assert not any(m._forward_pre_hooks for m in method.modules())


def test_effective_rank():
    assert abs(effective_rank(torch.eye(6)) - 6) < 1e-4
    assert abs(effective_rank(torch.ones(6, 4)) - 1) < 1e-4
    # Singular values 3 and 1: shares 3/4 and 1/4.
    wanted = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert abs(effective_rank(torch.diag(torch.tensor([3.0, 1.0]))) - wanted) < 1e-5
    assert effective_rank(torch.full((2, 2), float("nan"))) == 0 and effective_rank(torch.zeros(3, 3)) == 0


@pytest.mark.parametrize("path", ["byol.yaml", "swav.yaml", "moco_tuned_step2.yaml", "burn_stage2.yaml"])
def test_monitors_are_in_the_log(path, tmp_path):
    recipe = tiny(path, tmp_path, *full_depth(path))
    run(recipe)
    lines = [json.loads(line) for line in (recipe.folder / "metrics.jsonl").read_text().splitlines()]
    steps_logged = [row for row in lines if "evaluation" not in row]
    for row in steps_logged:
        assert 0 <= row["binary/sign_flips"] <= 1 and row["outputs/entropy"] <= row["outputs/entropy_of_mean"] + 1e-5
        assert 1 <= row["features/rank"] <= 64
    assert any(row["binary/sign_flips"] > 0 for row in steps_logged)


def test_a_frozen_network_is_not_monitored(tmp_path):
    recipe = tiny("linear.yaml", tmp_path)
    run(recipe)
    assert "features/rank" not in (recipe.folder / "metrics.jsonl").read_text()


def test_world_size_is_one_without_a_group():
    assert collectives.world_size() == 1 and collectives.rank() == 0
