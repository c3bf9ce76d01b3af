"""The linear classifier in closed form, and what else is measured of frozen features."""

import numpy as np
import pytest
import torch

from engine.evals import centered, knn
from engine.recipe import EvalConfig
from engine.results.runs import metrics
from engine.ridge import least_squares, ridge, scores
from tests.runs import run
from tests.tiny import tiny


def blobs(count, seed, dim=6, classes=3):
    """Points [count, dim] around one center for each class, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    centers = 3 * torch.randn(classes, dim, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    label = torch.arange(count) % classes
    return centers[label] + torch.randn(count, dim, generator=generator, dtype=torch.float64), label


def test_two_points_by_hand():
    # x centered is ∓1, its variance 1; for class 0 the mean of x (y - 1/2) is -1/2, so w = -1/2 / (1 + penalty).
    solve = least_squares(torch.tensor([[0.0], [2.0]], dtype=torch.float64), torch.tensor([0, 1]), 2)
    assert torch.allclose(solve(1.0), torch.tensor([[-0.25, 0.75], [0.25, 0.25]], dtype=torch.float64), atol=1e-15)
    assert torch.allclose(solve(0.0), torch.tensor([[-0.5, 1.0], [0.5, 0.0]], dtype=torch.float64), atol=1e-15)


@pytest.mark.parametrize("dim", [6, 70])
@pytest.mark.parametrize("penalty", [1e-3, 1.0, 10.0])
def test_it_is_the_minimum(penalty, dim):
    features, label = blobs(50, 0, dim)
    weight = least_squares(features, label, 3)(penalty)
    centered = features - features.mean(dim=0)
    target = torch.nn.functional.one_hot(label, 3).double()
    rows = torch.cat((centered, (50 * penalty) ** 0.5 * torch.eye(dim, dtype=torch.float64)))
    wanted = torch.cat((target - target.mean(dim=0), torch.zeros(dim, 3, dtype=torch.float64)))
    by_numpy, *_ = np.linalg.lstsq(rows.numpy(), wanted.numpy(), rcond=None)
    assert np.abs(weight[:, :-1].numpy().T - by_numpy).max() < 1e-12
    assert torch.allclose(scores(features, weight).mean(dim=0), target.mean(dim=0), atol=1e-12)


def test_it_sees_no_scale_and_nothing_that_never_changes():
    (train, label), (query, truth) = blobs(60, 1), blobs(30, 2)
    found = ridge(train, label, query, 3)
    assert (found == truth).double().mean() > 0.9
    scale = torch.tensor([1e-6, 1.0, 1e6, 3.0, 1e3, 0.1], dtype=torch.float64)
    assert torch.equal(found, ridge(scale * train + 5, label, scale * query + 5, 3))
    constant = torch.full((60, 1), 7.0, dtype=torch.float64)
    other = torch.randn(30, 1, dtype=torch.float64)
    assert torch.equal(found, ridge(torch.cat((train, constant), 1), label, torch.cat((query, other), 1), 3))


def test_more_features_than_images_is_no_trouble():
    (train, label), (query, truth) = blobs(45, 3, dim=200), blobs(30, 4, dim=200)
    assert (ridge(train.float(), label, query.float(), 3) == truth).double().mean() > 0.9


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"kind": "ridge", "center": True}, "center: expected with kind: knn only, got kind: ridge"),
        ({"kind": "accuracy", "pixels": True}, "pixels: expected with kind: knn or ridge only"),
    ],
)
def test_keys_of_other_kinds_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        EvalConfig(**keys)


def test_a_run_measures_them_in_order(tmp_path):
    kinds = "[{kind: ridge}, {kind: knn}, {kind: knn, center: true}, {kind: knn, pixels: true}, "
    kinds += "{kind: ridge, pixels: true}]"
    recipe = tiny("quick/supervised.yaml", tmp_path, "run.duration=1it", f"evals={kinds}")
    run(recipe)
    found = [row for row in metrics(recipe.folder) if "evaluation" in row]
    assert [row["evaluation"] for row in found] == ["ridge", "knn", "knn", "knn", "ridge"]
    assert all(0 <= row["top1"] <= 100 and row["measured"] == 16 for row in found)


def test_what_all_features_share_hides_their_differences_until_it_is_taken_off():
    (bank, label), (query, truth) = blobs(60, 5), blobs(30, 6)
    bank, query = bank + 1e7, query + 1e7
    plain = knn(bank, label, query, 3, 5, 0.07)
    known, asked = centered(bank, query)
    found = knn(known, label, asked, 3, 5, 0.07)
    assert (found == truth).double().mean() > 0.9 > (plain == truth).double().mean()
    assert known.mean(dim=0).abs().max() < 1e-7
