"""Losses and their gradients in float64 against methods.md 7.3."""

import pytest
import torch

from models import backbones
from models.losses import collapse_meters, feature_similarity, info_nce, kl_divergence
from models.methods.burn import Config, burn_loss

F64 = torch.float64
S1 = [[1, 0, -1], [0.5, 0.5, 2]]
T2 = [[0.8, -0.2, 0.1], [-1, 0, 1]]
S2 = [[0, 1, 0], [1, 1, -1]]
T1 = [[0.2, 0.3, -0.4], [2, 0, 0]]
LOSS = {
    0: 1.769684144748095,
    0.1: 1.696681764303782,
    0.2: 1.623679383859470,
    0.3: 1.550677003415158,
    1: 1.039660340304972,
}


def tensor(values, grad=False):
    return torch.tensor(values, dtype=F64, requires_grad=grad)


def config(target_gradient="kl"):
    reactnet = {"arch": "reactnet", "width": 2}
    return Config.model_validate(
        {"name": "burn", "student": reactnet, "teacher": reactnet, "target_gradient": target_gradient}
    )


def test_terms():
    assert torch.allclose(feature_similarity(tensor(S1), tensor(T2)), tensor([0.8082408569377522, 1.0]), atol=1e-14)
    expected = tensor([0.15978232841595164, 0.010963751527714526])
    assert torch.allclose(kl_divergence(tensor(S1), tensor(T2), 0.2), expected, atol=1e-14)


@pytest.mark.parametrize(("balance", "loss"), LOSS.items())
def test_loss(balance, loss):
    out = burn_loss([tensor(S1), tensor(S2)], [tensor(T1), tensor(T2)], tensor(balance), config())
    assert abs(out["loss"].item() - loss) < 1e-13


GRADIENTS = {
    "s1": [[-0.337538379533, 0.153274826987, -0.352028061831], [0.350126844800, 0.048464981031, -0.098591825831]],
    "s2": [[-0.425233295321, 0.093932059954, 0.665552844086], [-0.471390301041, 0.298190894374, -0.173210754846]],
    "kl t1": [[0.259841449586, -0.258940807689, -0.000900641897], [0.000113479216, -0.000113484368, 5.152e-09]],
    "kl t2": [[-0.045637236103, -0.000307501278, 0.045944737381], [-2.8371126e-05, 0.004155037936, -0.004126666809]],
    "both t1": [[0.605618975847, -1.411532561891, -0.692455694419], [0.000113479216, -0.259921105503, 0.259807626287]],
    "both t2": [
        [-0.189980734797, -0.155754346025, 0.889799037438],
        [-0.375028371126, -0.145844962064, -0.379126666809],
    ],
}


@pytest.mark.parametrize("option", ["none", "kl", "both"])
def test_gradients_by_option(option):
    s1, s2, t1, t2 = (tensor(x, grad=True) for x in (S1, S2, T1, T2))
    burn_loss([s1, s2], [t1, t2], tensor(0.1), config(option))["loss"].backward()
    assert torch.allclose(s1.grad, tensor(GRADIENTS["s1"]), atol=1e-11)
    assert torch.allclose(s2.grad, tensor(GRADIENTS["s2"]), atol=1e-11)
    if option == "none":
        assert t1.grad is None and t2.grad is None
        return
    assert torch.allclose(t1.grad, tensor(GRADIENTS[f"{option} t1"]), atol=1e-11)
    assert torch.allclose(t2.grad, tensor(GRADIENTS[f"{option} t2"]), atol=1e-11)
    if option == "kl":  # softmax does not see a shift, so its gradients sum to zero
        assert torch.allclose(t1.grad.sum(1), tensor([0, 0]), atol=1e-15)


def test_loss_of_equal_outputs_is_zero_and_feature_term_ignores_scale():
    x = [tensor(S1), tensor(S2)]
    for balance in (0, 0.3, 1):
        assert burn_loss(x, x[::-1], tensor(balance), config())["loss"].abs() < 1e-14
    assert torch.allclose(
        feature_similarity(7 * tensor(S1), tensor(T2)), feature_similarity(tensor(S1), 3 * tensor(T2)), atol=1e-14
    )


def test_16_bit_inputs_are_computed_in_float32():
    for dtype in (torch.float16, torch.bfloat16):
        s, t = tensor(S1).to(dtype), tensor(T2).to(dtype)
        assert kl_divergence(s, t, 0.2).dtype == torch.float32
        assert feature_similarity(s, t).dtype == torch.float32


def test_info_nce_against_its_definition():
    generator = torch.Generator().manual_seed(0)
    q, k, queue = (
        torch.nn.functional.normalize(torch.randn(n, 8, generator=generator, dtype=F64), dim=1) for n in (5, 5, 11)
    )
    loss, accuracy = info_nce(q, k, queue.T, 0.2)
    expected, hits = 0.0, 0
    for i in range(5):
        positive = (q[i] @ k[i] / 0.2).exp()
        negatives = (queue @ q[i] / 0.2).exp()
        expected -= (positive / (positive + negatives.sum())).log() / 5
        hits += bool(positive > negatives.max())
    assert abs(loss - expected) < 1e-13
    assert accuracy == hits / 5


def test_collapse_meters():
    flat = collapse_meters(torch.zeros(6, 4), 0.2)
    assert abs(flat["entropy"] - torch.log(torch.tensor(4.0))) < 1e-6
    assert flat["std"] == 0
    one_answer = collapse_meters(torch.tensor([[50.0, 0, 0, 0]]).expand(6, 4), 0.2)
    assert one_answer["entropy_of_mean"] < 1e-6
    spread = collapse_meters(50 * torch.eye(4), 0.2)
    assert spread["entropy"] < 1e-6 and abs(spread["entropy_of_mean"] - torch.log(torch.tensor(4.0))) < 1e-6
    assert spread["std"] > 10


def test_every_backbone_builds():
    for content in ({"arch": "resnet18", "stem": "small"}, {"arch": "reactnet", "width": 2, "estimator": "reactnet"}):
        kind = backbones.ReActNetConfig if content["arch"] == "reactnet" else backbones.ResNetConfig
        net = kind.model_validate(content).build()
        assert net(torch.randn(2, 3, 32, 32)).shape == (2, net.out_channels)
