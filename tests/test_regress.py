"""REG and centered targets, against their formulas by hand in float64."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from engine import dist
from models import methods
from models.heads import RunningMean, SyncBatchNorm1d, batch_normalized
from models.methods.burn import Burn
from models.methods.regress import Regress
from tests.processes import run_ranks

F64 = torch.float64
SMALL = {"arch": "reactnet", "width": 2, "multiples": [1, 2], "pooled_mlp": False}


@pytest.fixture
def float64():
    torch.set_default_dtype(F64)
    yield
    torch.set_default_dtype(torch.float32)


class Gives(nn.Module):
    """Stands for a network: the same features for any images."""

    def __init__(self, features):
        super().__init__()
        self.features = nn.Parameter(torch.tensor(features, dtype=F64))

    def forward(self, images):
        return self.features


def build(name, student, **keys):
    """A method on features given by hand, without heads."""
    made = {"name": name, "student": SMALL, "teacher": SMALL, **keys}
    method = methods.load(name).Config.model_validate_json(json.dumps(made)).build().train()
    method.student, method.student_head = Gives(student), nn.Identity()
    return method


VIEW = [torch.zeros(2, 3, 32, 32)]


def test_reg_by_hand(float64):
    method = build("regress", [[1.0, 0.0], [0.0, 2.0]])
    assert isinstance(method, Regress)
    method.center = RunningMean(2)
    seen = torch.tensor([[[1.0, 1.0], [1.0, -1.0]]])  # one view
    first = method(VIEW, None, {}, seen)
    # No mean yet: cosines 1/√2 and -1/√2, whose distances are 2 -+ √2.
    assert first["loss"].item() == pytest.approx(2, abs=1e-12) and abs(first["cosine"].item()) < 1e-12
    method.after_step({})
    second = method(VIEW, None, {}, seen)
    # Less their mean (1, 0) the targets are (0, 1) and (0, -1): cosines 0 and -1, distances 2 and 4.
    assert second["loss"].item() == pytest.approx(3, abs=1e-12)
    # Two views are summed: the other one's targets are (3, 0) and (-1, 2), cosines 1 and 2/√5.
    other = torch.tensor([[4.0, 0.0], [0.0, 2.0]])
    both = method(VIEW * 2, None, {}, torch.stack((seen[0], other)))
    cosines = (1.0, 2 / math.sqrt(5))
    assert both["loss"].item() == pytest.approx(3 + sum(2 - 2 * c for c in cosines) / 2, abs=1e-12)
    assert both["cosine"].item() == pytest.approx((-0.5 + sum(cosines) / 2) / 2, abs=1e-12)
    method.eval()
    before = method.center.mean.clone()
    method(VIEW, None, {}, seen)
    assert len(method.center._new) == 2 and torch.equal(method.center.mean, before)


def test_gradient_of_reg(float64):
    # methods.md 3.8
    method = build("regress", [[1.0, 3.0], [-2.0, 0.5]], target_center=False)
    target = torch.tensor([[[2.0, -1.0], [0.3, 0.4]]])
    method(VIEW, None, {}, target)["loss"].backward()
    u, g = method.student.features.detach(), F.normalize(target[0], dim=1)
    length = u.norm(dim=1, keepdim=True)
    cosine = (u / length * g).sum(1, keepdim=True)
    assert torch.allclose(method.student.features.grad, -2 * (g - cosine * u / length) / (length * 2), atol=1e-14)


def test_without_a_cache_the_teacher_is_run():
    network = {"arch": "reactnet", "width": 2}
    keys = {"name": "regress", "student": network, "teacher": network}
    method = methods.load("regress").Config.model_validate(keys).build().train()
    images = [torch.randn(4, 3, 32, 32) for _ in range(2)]
    live = torch.stack([method.teacher(image) for image in images])
    state = {name: value.clone() for name, value in method.state_dict().items()}
    one = method(images, None, {})["loss"]
    method.load_state_dict(state)
    assert torch.equal(one, method(images, None, {}, live)["loss"])
    assert not method.teacher.training and live.shape == (2, 4, 64)
    with torch.no_grad():  # the logits that monitors see: coordinates of 1 in the mean square
        outputs = method.eval().outputs(method.evaluated(images[0]))
    assert torch.allclose(outputs.square().mean(1), torch.ones(4), atol=1e-5)


def test_the_running_mean_is_the_plain_mean_first_and_forgets_later(float64):
    mean = RunningMean(1)
    numbers = [float(number * number % 17) for number in range(130)]
    for number in numbers:
        mean(torch.full((3, 1), number - 1))
        mean(torch.full((3, 1), number + 1))  # two micro-batches are one batch
        mean.update()
    expected = sum(numbers[:100]) / 100
    for number in numbers[100:]:
        expected = 0.99 * expected + 0.01 * number
    assert float(mean.mean) == pytest.approx(expected, abs=1e-12) and int(mean.batches) == 130


def burn(target_center, student):
    keys = {"hidden_dim": 2, "out_dim": 2, "target_gradient": "both", "target_center": target_center}
    method = build("burn", student, **keys)
    method.teacher_head = nn.Identity()
    return method


def test_burns_centered_targets_by_hand(float64):
    # Targets (1, 2) and (3, 6): the outputs have means 2 and 4, deviations 1 and 2; normalized: (-1, -1) and (1, 1).
    seen = torch.tensor([[[1.0, 2.0], [3.0, 6.0]]] * 2)
    balance = {"balance": torch.tensor(0.25)}
    student = [[-1.0, -1.0], [1.0, 1.0]]
    plain, centered = (burn(on, student)(VIEW * 2, None, balance, seen) for on in (False, True))
    assert isinstance(burn(True, student), Burn)
    # Cosines of the plain ones are -3/√10 and 3/√10: distances 2 ± 6/√10, on average 2 in each of two directions.
    assert plain["feature"].item() == pytest.approx(4, abs=1e-12)
    assert abs(centered["feature"].item()) < 1e-9 and abs(centered["kl"].item()) < 1e-8
    assert centered["target_std"].item() == pytest.approx(1, abs=1e-4)
    uneven = burn(True, [[1.0, -1.0], [1.0, 1.0]])(VIEW * 2, None, balance, seen)
    # ε = 1e-5 leaves ∓(a, b). T = 0.2: of the first image p = softmax(-5a, -5b), q = softmax(5, -5), FS = 2 - 2 cos; of
    # the second q = (1/2, 1/2).
    a, b = 1 / math.sqrt(1 + 1e-5), 2 / math.sqrt(4 + 1e-5)
    p = 1 / (1 + math.exp(5 * (a - b)))
    entropy = p * math.log(p) + (1 - p) * math.log(1 - p)
    kl = 2 * entropy + p * math.log(1 + math.exp(-10)) + (1 - p) * math.log(1 + math.exp(10)) + math.log(2)
    length = math.sqrt(2) * math.hypot(a, b)
    distance = 2 - 2 * (b - a) / length + 2 - 2 * (a + b) / length
    assert uneven["loss"].item() == pytest.approx(2 * (0.75 * distance + 0.25 * kl) / 2, rel=1e-9)


def test_centering_passes_gradients_to_the_classifier(float64):
    x = torch.randn(2, 5, 3, requires_grad=True)
    assert torch.autograd.gradcheck(batch_normalized, (x,))
    norm = SyncBatchNorm1d(3).double().train()
    assert torch.allclose(batch_normalized(x), norm(x), atol=1e-12)
    assert batch_normalized(x.half()).dtype == torch.float32


def on_ranks(folder):
    world = dist.start("cpu", 60)
    torch.manual_seed(0)
    x = torch.randn(2, 8, 3, dtype=F64)
    share = 8 // world.world_size
    mine = x[:, share * world.rank : share * (world.rank + 1)].clone().requires_grad_()
    mean = RunningMean(3).double()
    for _ in range(3):
        mean(mine)
        mean.update()
    normal = batch_normalized(mine)
    (normal.square() * torch.arange(3.0)).sum().backward()
    found = [dist.gather_rows(t.transpose(0, 1).contiguous()) for t in (normal.detach(), mine.grad)]
    if world.is_main:
        torch.save({"mean": mean.mean, "normal": found[0], "gradient": found[1]}, folder / f"{world.world_size}.pt")
    dist.stop()


def test_means_and_moments_are_those_of_all_ranks(tmp_path):
    on_ranks(tmp_path)
    assert run_ranks(2, on_ranks, tmp_path) == [0, 0]
    one, two = (torch.load(tmp_path / f"{ranks}.pt") for ranks in (1, 2))
    for name in one:
        assert torch.allclose(one[name], two[name], atol=1e-12), name
