"""Linear probes on standardized features, and the baselines beside them: raw pixels and random networks."""

import json

import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from engine import dist, evals
from engine.train import Trainer
from models import methods
from tests.processes import run_ranks
from tests.runs import trainer_of
from tests.tiny import tiny

F64 = torch.float64
COLORS = {"blue": (30, 40, 200), "green": (20, 180, 60), "red": (210, 30, 40)}


def build(**keys):
    content = {"name": "classify", "backbone": {"arch": "reactnet", "width": 2}, "num_classes": 3, "trains": "linear"}
    return methods.load("classify").Config.model_validate({**content, **keys}).build().train()


# ------------------------------------------------------------------------------------------------ the probe


@pytest.mark.parametrize("protocol", ["linear", "pre-fc"])
def test_standardize_is_batch_norm_without_scale_and_shift(protocol):
    method = build(trains=protocol, standardize=True).double()
    images = torch.randn(16, 3, 32, 32, dtype=F64)
    features = method.features(images)
    norm, linear = method.classifier
    expected = linear((features - features.mean(0)) / (features.var(0, correction=0) + norm.eps).sqrt())
    assert torch.allclose(method.logits(images), expected, atol=1e-10)
    # The running averages that an evaluation uses, after this one batch.
    mean, var = 0.1 * features.mean(0), 0.9 + 0.1 * features.var(0)
    assert torch.allclose(norm.running_mean, mean, atol=1e-12) and torch.allclose(norm.running_var, var, atol=1e-12)
    method.eval()
    assert torch.allclose(method.logits(images), linear((features - mean) / (var + norm.eps).sqrt()), atol=1e-10)
    assert torch.equal(method.outputs(features), method.logits(images))


def test_standardize_adds_statistics_alone_and_older_checkpoints_load():
    plain, standardized = build(), build(standardize=True)
    old = [name for name in plain.state_dict() if name.startswith("classifier")]
    new = [name for name in standardized.state_dict() if name.startswith("classifier")]
    assert old == ["classifier.weight", "classifier.bias"]
    assert [name for name in new if "0." in name] == [
        f"classifier.0.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")
    ]
    trained = [name for name, parameter in standardized.named_parameters() if parameter.requires_grad]
    assert trained == ["classifier.1.weight", "classifier.1.bias"]
    assert not standardized.backbone.training and standardized.classifier.training


@pytest.mark.parametrize("protocol", ["all", "burn-release"])
def test_standardize_is_for_frozen_features(protocol):
    with pytest.raises(ValidationError, match=f"expected with trains: linear or pre-fc only, got trains: {protocol}"):
        build(trains=protocol, standardize=True)


def test_a_probe_of_one_layer_can_be_turned_to_another():
    config = build(trains="pre-fc", standardize=True).config
    with_fc = config.backbone
    without = with_fc.model_copy(update={"pooled_mlp": False})
    assert config.probing(without, "pooled").trains == "linear" == config.probing(with_fc, "features").trains
    again = config.probing(without, "pooled").probing(with_fc, "pooled")
    assert again.trains == "pre-fc" and again.standardize
    released = config.model_copy(update={"trains": "burn-release", "standardize": False})
    assert released.probing(with_fc, "features").trains == "burn-release"


def badly_scaled(count, seed):
    """Features [count, 24] of three classes as those of small binary networks: one huge, most small, a third dead; and
    their labels."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(0, 3, (count,), generator=generator)
    centers = torch.randn(3, 24, generator=torch.Generator().manual_seed(7))
    features = centers[label] + torch.randn(count, 24, generator=generator)
    features *= 0.02
    features[:, 0] = 1000 + 1000 * torch.randn(count, generator=generator)
    features[:, 16:] = 0
    return features, label


def probe_accuracy(standardize):
    """Top-1 on other features after 150 steps of the recipes' optimizer at the recipes' rate."""
    torch.manual_seed(0)
    method = build(standardize=standardize)
    method.backbone = torch.nn.Identity()
    linear = torch.nn.Linear(24, 3)
    method.classifier = torch.nn.Sequential(torch.nn.BatchNorm1d(24, affine=False), linear) if standardize else linear
    optimizer = torch.optim.Adam(linear.parameters(), lr=0.01)
    features, label = badly_scaled(600, 1)
    for step in range(150):
        rows = torch.arange(step * 60, step * 60 + 60) % 600
        optimizer.zero_grad()
        method([features[rows]], label[rows], {})["loss"].backward()
        optimizer.step()
    method.eval()
    query, expected = badly_scaled(600, 2)
    return (method.logits(query).argmax(1) == expected).float().mean().item()


def test_a_standardized_probe_reaches_logistic_regression_on_badly_scaled_features():
    train, query = badly_scaled(600, 1), badly_scaled(600, 2)
    best = (evals.logistic(*train, query[0], 3) == query[1]).float().mean().item()
    assert best > 0.95
    assert probe_accuracy(standardize=True) > best - 0.01
    assert probe_accuracy(standardize=False) < best - 0.1, "what standardizing is for"


# ------------------------------------------------------------------------------------------------ logistic regression


def test_logistic_regression_is_at_its_optimum():
    features, label = badly_scaled(200, 3)
    features = 50 * features[:, 1:16]
    penalty = 1e-2
    weight = evals._fit(features, label, torch.zeros(3, 16), penalty).double().requires_grad_()
    scores = features.double() @ weight[:, :-1].T + weight[:, -1]
    loss = torch.nn.functional.cross_entropy(scores, label) + penalty / 2 * weight[:, :-1].square().sum()
    (gradient,) = torch.autograd.grad(loss, weight)
    assert gradient.abs().max() < 1e-4 and loss < 0.5


def test_logistic_regression_of_separable_classes_and_of_features_that_say_nothing():
    label = torch.arange(90) % 3
    assert torch.equal(evals.logistic(torch.eye(3)[label] * 1e4, label, torch.eye(3)[label] * 1e4, 3), label)
    constant = torch.full((90, 5), 3e5) + torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0])
    assert len(evals.logistic(constant, label, constant, 3).unique()) == 1  # one answer for all


def test_logistic_regression_takes_the_penalty_that_serves_other_images(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    label = torch.arange(300) % 3
    features = torch.eye(3)[label] * 1.5 + torch.randn(300, 3, generator=generator)
    features = torch.cat((features, torch.randn(300, 400, generator=generator)), dim=1)  # more noise than images
    asked = []
    honest = evals._fit

    def fit(train, label, start, penalty):
        asked.append((len(train), penalty))
        return honest(train, label, start, penalty)

    monkeypatch.setattr(evals, "_fit", fit)
    evals.logistic(features, label, features, 3)
    *tried, (count, chosen) = asked
    assert tried == [(270, penalty) for penalty in evals.PENALTIES]
    assert count == 300 and chosen == 0.1, "a weak penalty learns the noise by heart"


# ------------------------------------------------------------------------------------------------ baselines


@pytest.fixture
def colored(tmp_path):
    """Images whose color is their class; for a network that looks at nothing, too."""
    for split, count in (("train", 30), ("val", 7)):
        for number in range(count):
            name = list(COLORS)[number % 3]
            folder = tmp_path / split / name
            folder.mkdir(parents=True, exist_ok=True)
            shade = tuple(channel + number % 5 for channel in COLORS[name])
            Image.new("RGB", (40, 36), shade).save(folder / f"{number:03d}.png")
    return tmp_path


def baselines_of(folder, *more):
    files = [
        "data.backend=folder",
        "data.options={}",
        "data.workers=0",
        "method.num_classes=3",
        "evals.0={kind: baselines}",
    ]
    files += [f"data.train={folder / 'train'}", f"data.val={folder / 'val'}", "data.eval_batch=4"]
    return tiny("quick/supervised.yaml", folder / "runs", *files, *more)


def measure(recipe, world, blind=False):
    trainer = Trainer(recipe, world)
    if blind:
        trainer.method.backbone = torch.nn.Sequential(torch.nn.Flatten(), Blind())
    scores = evals.run(recipe.evals[0], trainer.method, recipe, trainer.indices, world)
    assert trainer.method.training
    return scores


class Blind(torch.nn.Module):
    """Answers the same to everything."""

    def forward(self, images):
        return torch.ones(len(images), 8)


def test_baselines_of_what_raw_pixels_tell(colored):
    recipe = baselines_of(colored)
    trainer = trainer_of(recipe)
    scores = measure(recipe, trainer.world, blind=True)
    assert list(scores) == ["logistic_top1", "pixels_knn", "pixels_top1", "random_top1", "measured"]
    assert scores["pixels_top1"] == scores["pixels_knn"] == 100 and scores["measured"] == 7
    assert scores["logistic_top1"] in (200 / 7, 300 / 7), "one class for all seven"
    assert scores["random_top1"] > 60, "colors go through a random network"


def on_ranks(folder):
    recipe = baselines_of(folder, "data.micro_batch=4")
    world = dist.start("cpu", 60)
    scores = measure(recipe, world)
    if world.is_main:
        (folder / f"{world.world_size}.json").write_text(json.dumps(scores))
    dist.stop()


def test_baselines_are_the_same_on_two_ranks(colored):
    on_ranks(colored)
    assert run_ranks(2, on_ranks, colored) == [0, 0]
    one, two = (json.loads((colored / f"{ranks}.json").read_text()) for ranks in (1, 2))
    # The random network's statistics are rank 0's, of half the images.
    assert {**one, "random_top1": 0} == {**two, "random_top1": 0} and one["measured"] == 7


def test_baselines_leave_the_method_alone_and_repeat(colored):
    recipe = baselines_of(colored)
    trainer = trainer_of(recipe)
    before = {name: value.clone() for name, value in trainer.method.state_dict().items()}
    one, two = (evals.run(recipe.evals[0], trainer.method, recipe, trainer.indices, trainer.world) for _ in range(2))
    assert one == two
    assert all(torch.equal(before[name], value) for name, value in trainer.method.state_dict().items())


def test_baselines_end_at_a_signal(colored):
    recipe = baselines_of(colored)
    trainer = trainer_of(recipe)
    consensus = dist.consensus(trainer.world)
    consensus.asked_to_stop = True
    assert evals.run(recipe.evals[0], trainer.method, recipe, trainer.indices, trainer.world) is None


def test_pixels_are_averaged_down():
    images = torch.arange(64.0).repeat(64, 1).expand(2, 3, 64, 64)
    small = evals.pixels(images).view(2, 3, 32, 32)
    assert torch.equal(small[0, 0, 0], torch.arange(0.5, 64, 2)) and evals.pixels(images[:, :, :20, :20]).shape == (
        2,
        1200,
    )
