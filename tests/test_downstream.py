"""Classifiers at many rates in one pass, and fine-tuning: what the recipes of `recipes/downstream/` stand on."""

import json
import logging

import pytest
import torch

from engine import checkpoint, dist, export
from engine.errors import CheckpointError
from engine.results.runs import metrics
from engine.train import Trainer
from engine.trained import open_trained
from models import weight_signs
from tests.processes import run_ranks
from tests.runs import in_float64, last_state, prepare, rows, run, trainer_of
from tests.tiny import tiny

RATES, DECAYS = (0.3, 2.0), (0.0, 3.0)
HOLD_OUT = ("data.hold_out=0.2", "init=[]", "schedules.weight_decay=0.05")
GRID = (f"method.rates={list(RATES)}", f"method.decays={list(DECAYS)}", *HOLD_OUT)
NAMES = ["lr0.3_wd0", "lr0.3_wd3", "lr2_wd0", "lr2_wd3"]


def trained_in_float64(recipe, steps=4):
    """The method after some steps in float64, and what was logged."""
    torch.set_default_dtype(torch.float64)
    try:
        trainer, batches = prepare(recipe)
        for _ in range(steps):
            trainer.step(in_float64(batches))
        return trainer.method, trainer.meter.read()
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("more", [(), ("method.standardize=true", "optim={name: adam}")], ids=["sgd", "adam"])
def test_each_classifier_is_the_one_that_trains_alone(more, tmp_path):
    recipe = tiny("linear_pre_fc.yaml", tmp_path, *GRID, *more)
    assert list(recipe.method.choices) == NAMES
    together, logged = trained_in_float64(recipe)
    lr = recipe.schedules["lr"].start
    alone_losses = []
    for number, (rate, decay) in enumerate((rate, decay) for rate in RATES for decay in DECAYS):
        keys = [f"schedules.lr.start={lr * rate}", f"schedules.weight_decay={0.05 * decay}"]
        alone, of_one = trained_in_float64(tiny("linear_pre_fc.yaml", tmp_path, *HOLD_OUT, *more, *keys))
        together.choose(number)
        _, chosen = together.deployed()
        ours, theirs = chosen.state_dict(), alone.classifier.state_dict()
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert torch.allclose(ours[key].double(), value.double(), rtol=0, atol=1e-12), key
        assert logged[f"loss/{NAMES[number]}"] == pytest.approx(of_one["loss"], abs=1e-12)
        alone_losses.append(of_one["loss"])
    assert logged["loss"] == pytest.approx(sum(alone_losses), rel=1e-6)  # meters are in float32
    weights = [linear.weight for linear in together.classifier.each]
    assert all(not torch.allclose(a, b, atol=1e-9) for n, a in enumerate(weights) for b in weights[:n])


@pytest.fixture(scope="module")
def chosen_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rates")
    recipe = tiny(
        "quick/linear.yaml", folder, "method.rates=[1e-4, 1.0, 30.0]", "data.hold_out=0.4", "run.duration=8it",
        "run.save_every=4it", "method.trains=pre-fc", "evals=[{kind: accuracy, every: 100%}]",
    )  # fmt: skip
    run(recipe)
    return recipe


def test_the_best_on_held_out_images_is_chosen_and_named(chosen_run):
    (row,) = (row for row in metrics(chosen_run.folder) if row.get("evaluation") == "accuracy")
    names = ["lr0.0001", "lr1", "lr30"]
    held = [row[f"held_out/{name}"] for name in names]
    best = held.index(max(held))  # the first of equals
    assert row["chosen"] == names[best] and row["held_out"] == held[best]
    assert row["top1"] == row[f"top1/{names[best]}"] and row["measured"] == 16
    assert {name for name in row if name.startswith("top1/")} == {f"top1/{name}" for name in names}
    assert int(last_state(chosen_run)["method"]["classifier.chosen"]) == best
    assert held[best] > held[0]  # a rate of 1e-6 has learned nothing


def test_what_was_chosen_is_opened_and_packed(chosen_run, tmp_path, monkeypatch):
    state = last_state(chosen_run)
    method = chosen_run.method.build()
    method.load_state_dict(state["method"])
    method.eval()
    trained = open_trained(chosen_run.folder)
    images = torch.randn(6, 3, 32, 32)
    with torch.no_grad():
        expected = method.candidates(images)[int(state["method"]["classifier.chosen"])]
        assert torch.equal(trained.network(images), expected) and torch.equal(method.logits(images), expected)
    monkeypatch.setattr(export, "SECONDS", 0)
    report = export.export(trained, tmp_path / "net.bnn", linear="float32", force=True)
    assert report.layer_difference < 1e-5
    with pytest.raises(CheckpointError, match="none of its classifiers has been chosen yet"):
        open_trained(chosen_run.folder, step=4)
    assert open_trained(chosen_run.folder, step=4, part="backbone").classifier is None


def rates_of(folder):
    evals = "evals=[{kind: accuracy, every: 100%}]"
    return tiny("linear.yaml", folder, "method.rates=[0.1, 10]", "data.hold_out=0.4", evals, "run.duration=4it")


def rank_that_chooses(folder):
    with dist.group("cpu", 300) as world:
        trainer = Trainer(rates_of(folder), world)
        trainer.fit()
        (folder / f"rank{world.rank}").write_text(str(int(trainer.method.classifier.chosen)))


def test_two_ranks_choose_the_same(tmp_path):
    assert run_ranks(2, rank_that_chooses, tmp_path) == [0, 0]
    recipe = rates_of(tmp_path)
    row = rows(recipe)[-1]
    number = ["lr0.1", "lr10"].index(row["chosen"])
    assert row["measured"] == 16 and row["held_out"] == row[f"held_out/{row['chosen']}"]
    assert row["held_out"] * 16 % 100 == 0  # percent of 16 images, those of both ranks
    assert [(tmp_path / f"rank{rank}").read_text() for rank in (0, 1)] == [str(number)] * 2
    assert int(last_state(recipe)["method"]["classifier.chosen"]) == number


def test_a_grid_says_what_it_cannot_do(tmp_path):
    def said(*more):
        with pytest.raises(ValueError) as caught:
            tiny("linear_pre_fc.yaml", tmp_path, *more)
        return str(caught.value)

    assert "data.hold_out: expected a share such as 0.1, to choose one of 2 classifiers by" in said(
        "method.rates=[1, 2]"
    )
    assert "rates: expected different factors, got [1.0, 1.0]" in said("method.rates=[1, 1.0]", "data.hold_out=0.1")
    assert "method.rates.0: expected greater than 0" in said("method.rates=[0]", "data.hold_out=0.1")
    burn = ("method.trains=burn-release", "method.decays=[0, 1]", "data.hold_out=0.1")
    assert "decays: expected with trains: linear or pre-fc only, got trains: burn-release" in said(*burn)


# ------------------------------------------------------------------------------------------------ changed signs


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    recipe = tiny("quick/burn_stage2.yaml", tmp_path_factory.mktemp("pretrained"), "run.duration=2it", "evals=[]")
    run(recipe)
    return recipe


def finetune(pretrained, folder, *more):
    init = [{"from": str(pretrained.folder), "load": {"backbone": "student"}, "drop": ["fc"]}]
    evals = "evals=[{kind: accuracy, every: 100%}, {kind: signs, every: 100%}]"
    return tiny("quick/semi.yaml", folder, "run.duration=3it", f"init={json.dumps(init)}", evals, *more)


def signs_row(recipe):
    return next(row for row in rows(recipe) if row.get("evaluation") == "signs")


@pytest.mark.parametrize("rate", [0.0, 0.05])
def test_changed_signs_are_those_of_the_weights(rate, pretrained, tmp_path):
    recipe = finetune(pretrained, tmp_path, f"schedules.lr.start={rate}")
    end, start = run(recipe)["method"], last_state(pretrained)["method"]
    keys = [k for k in end if k.startswith("backbone.blocks") and ("conv3x3" in k or "conv1x1" in k)]
    differ = [(end[k].sign() != start[k.replace("backbone", "student", 1)].sign()) for k in keys]
    row = signs_row(recipe)
    assert row["binary_weights"] == sum(d.numel() for d in differ) > 0
    assert row["changed_signs"] == pytest.approx(100 * sum(int(d.sum()) for d in differ) / row["binary_weights"])
    assert (row["changed_signs"] == 0) == (rate == 0)


def test_signs_of_what_is_frozen_real_or_gone_are_no_number(pretrained, tmp_path, caplog):
    backbone = trainer_of(finetune(pretrained, tmp_path)).method.backbone
    before = {key: -value for key, value in backbone.state_dict().items()}
    count = sum(p.numel() for name, p in backbone.named_parameters() if ".conv" in name)
    assert weight_signs.changed(backbone, before) == (count, count)
    assert weight_signs.changed(backbone.requires_grad_(False), before) == (0, 0)
    real = finetune(pretrained, tmp_path / "real", "method.backbone.weights=real").method.backbone.build()
    assert weight_signs.changed(real, before) == (0, 0)
    with caplog.at_level(logging.WARNING):
        run(finetune(pretrained, tmp_path / "scratch", "init=[]"))
    assert "no signs: no entry of init has loaded a network with binary weights that trains" in caplog.text


def test_a_source_that_has_gone_is_a_warning(pretrained, tmp_path, caplog):
    copied = tmp_path / "copied.pt"
    copied.write_bytes(checkpoint.complete(pretrained.folder).read_bytes())
    init = f"init=[{{from: {copied}, load: {{backbone: student}}, drop: [fc]}}]"
    run(finetune(pretrained, tmp_path, init, "run.duration=1it", "run.save_every=1it"))
    copied.unlink()
    with caplog.at_level(logging.WARNING):
        run(finetune(pretrained, tmp_path, init, "run.duration=2it"), resume=True, allow_changes=True)
    assert f"no signs: init.from: {copied}: no such file" in caplog.text
