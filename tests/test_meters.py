"""What is logged is explained, what collapses is said."""

import re

import pytest
import torch

from engine.monitors import Monitors
from models.binary import BinaryConv2d
from tests.runs import rows, run
from tests.tiny import ROOT, of_each_method, tiny

PAGE = (ROOT / "docs/meters.md").read_text()


def documented():
    cells = re.findall(r"^\| (`[^|]+`) \|[^|]+\|[^|]*\|[^|]*\|$", PAGE, re.M)
    return {name for cell in cells for name in re.findall(r"`([\w/]+)`", cell)}


def test_every_scalar_that_is_logged_is_explained(tmp_path):
    logged = set()
    for number, path in enumerate(of_each_method()):
        recipe = tiny(
            path, tmp_path / str(number), "run.duration=1it", "evals.0.every=1it", "schedules.weight_decay=0.1"
        )
        run(recipe)
        logged |= {name for row in rows(recipe) for name in row} - {"evaluation"}
    evals = "evals=[{kind: baselines, every: 1it}]"
    recipe = tiny("quick/linear.yaml", tmp_path / "baselines", "run.duration=1it", evals)
    run(recipe)
    logged |= {name for row in rows(recipe) for name in row} - {"evaluation"}
    rates = ["method.rates=[1, 2]", "data.hold_out=0.2", "evals=[{kind: accuracy, every: 1it}]"]
    first = tiny("quick/supervised.yaml", tmp_path, "run.duration=1it", "evals=[]")
    init = [f"init=[{{from: {first.folder}, load: [backbone]}}]", "evals=[{kind: signs, every: 1it}]", "name=second"]
    for recipe in (
        tiny("quick/linear.yaml", tmp_path / "rates", "run.duration=1it", *rates),
        first,
        tiny("quick/supervised.yaml", tmp_path, "run.duration=1it", *init),
    ):
        run(recipe)
        logged |= {name for row in rows(recipe) for name in row if "/lr" not in name} - {"evaluation"}
    from engine.log import TIMING

    logged |= set(TIMING)
    logged = {re.sub(r"^ap50/.*", "ap50/", name) for name in logged}  # and the name of a class
    assert logged - documented() == set() and documented() - logged == set()


@pytest.mark.parametrize(
    ("weights", "activations", "groups"),
    [("real", "real", 0), ("real", "binary", 1), ("binary", "binary", 2)],
)
def test_monitors_of_binary_layers_are_there_where_there_are_some(weights, activations, groups, tmp_path):
    kind = f"method.backbone={{arch: reactnet, width: 2, weights: {weights}, activations: {activations}}}"
    recipe = tiny("moco_tuned_step2.yaml", tmp_path, kind, "run.duration=1it", "evals=[]")
    run(recipe)
    found = {name for name in rows(recipe)[0] if name.startswith("binary/")}
    of_weights = {"binary/sign_flips", "binary/latent_beyond_one"}
    of_activations = {"binary/dead_channels", "binary/saturated_channels"}
    assert found == [set(), of_activations, of_weights | of_activations][groups]


def said(caplog):
    return [record.getMessage() for record in caplog.records if "collapsed:" in record.getMessage()]


def test_targets_that_collapse_are_said_once_with_the_key_that_helps(tmp_path, monkeypatch, caplog):
    from models.methods import burn

    honest = burn.burn_loss
    constant = torch.tensor([2.0] + 47 * [0.0])
    monkeypatch.setattr(
        burn,
        "burn_loss",
        lambda outputs, targets, *rest: honest(outputs, [t * 1e-3 + constant for t in targets], *rest),
    )
    run(tiny("burn_stage1.yaml", tmp_path, "evals=[]"))
    (line,) = [text for text in said(caplog) if "target_information" in text]
    assert line.startswith("step 2: ") and "below 0.05" in line
    assert "optim.lr_scale={teacher_head: 1e-3}" in line and "method.target_gradient=none" in line


@pytest.mark.parametrize("path", of_each_method(), ids=lambda path: path.stem)
def test_alarms_name_what_is_logged_and_keys_that_exist(path, tmp_path):
    recipe = tiny(path, tmp_path, "run.duration=1it", "evals=[]")
    method = recipe.method.build()
    run(recipe)
    (row,) = rows(recipe)
    for meter, (least, remedy) in method.collapse.items():
        assert meter in row and least > 0
        for key in re.findall(r"(?:optim|method|schedules)\.[\w.]+", remedy):
            section, *rest = key.split(".")
            place = getattr(recipe, section)
            for name in rest:
                if isinstance(place, dict):
                    assert name in place
                    place = place[name]
                else:
                    assert name in type(place).model_fields, key
                    place = getattr(place, name)


def test_an_answer_for_all_is_an_alarm_and_flat_ones_that_differ_are_none(tmp_path):
    from models.losses import collapse_meters

    unit = torch.nn.functional.normalize(torch.randn(64, 128), dim=1)
    healthy, collapsed = collapse_meters(unit, 0.2), collapse_meters(unit[:1].expand(64, 128), 0.2)
    # The rule of two equal entropies calls both collapsed.
    for meters in (healthy, collapsed):
        assert meters["entropy"] > 4.7 and meters["entropy_of_mean"] - meters["entropy"] < 0.1
    method = tiny("moco_v2.yaml", tmp_path).method.build()
    monitors = Monitors(method)
    for meters, expected in (
        (healthy, 0),
        (collapsed, 0),
        (healthy, 0),
        (collapsed, 0),
        (collapsed, 1),
        (collapsed, 0),
    ):
        assert len(monitors.alarms({"outputs/information": float(meters["information"])})) == expected


def test_signs_of_a_checkpoint_that_watched_others_are_left(tmp_path):
    method = tiny("burn_stage1.yaml", tmp_path).method.build()  # real weights
    monitors = Monitors(method)
    assert not monitors.layers and any(isinstance(m, BinaryConv2d) for m in method.student.modules())
    monitors.load_state_dict({"signs": torch.ones(7, dtype=torch.bool)})  # of an older engine
    assert len(monitors.state_dict()["signs"]) == 0
