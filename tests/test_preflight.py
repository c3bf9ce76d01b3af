"""What a start refuses, a dry run lists in the same words; a network handed over is the one that was trained."""

import logging
import os
import re

import pytest
import torch

import loaders
from engine import checkpoint, preflight
from engine.describe import describe
from engine.errors import KNOWN, CheckpointError, RecipeError, guarded
from engine.results import chain
from loaders import augment, machine
from tests.loading import as_beton
from tests.processes import tool
from tests.runs import last_state, run, trainer_of
from tests.tiny import ROOT, tiny, tiny_overrides

FILES = ["data.backend=folder", "data.options={}", "data.workers=0"]


def refusals(recipe, **options):
    """(what a start raises, what a dry run lists)."""
    with pytest.raises(KNOWN) as caught:
        trainer_of(recipe, **options)
    listed = describe(recipe, resumes=options.get("resume", False)).split("would be refused:\n")[1]
    return str(caught.value), [line.strip() for line in listed.splitlines()]


@pytest.fixture(scope="module")
def stage1(tmp_path_factory):
    recipe = tiny("burn_stage1.yaml", tmp_path_factory.mktemp("stage1"), "run.duration=2it", "evals=[]")
    run(recipe)
    return recipe


def test_a_recipe_without_fault_is_not_refused(stage1, tmp_path):
    init = f"init=[{{from: {stage1.folder}, load: [student, student_head, teacher_head]}}]"
    text = describe(tiny("burn_stage2.yaml", tmp_path, init))
    assert "missing: nothing" in text and "would be refused" not in text


@pytest.mark.parametrize("change", ["method.num_classes=7", "data.expect_images=30"])
def test_data_that_does_not_fit(change, tree, tmp_path):
    recipe = tiny("linear.yaml", tmp_path, *FILES, f"data.train={tree}", f"data.val={tree}", change)
    said, listed = refusals(recipe)
    assert listed == [said]


@pytest.mark.parametrize(
    ("init", "more"),
    [
        ("{{from: {0}, load: [teacher_head]}}", ["method.hidden_dim=16"]),
        ("{{from: {0}, load: {{student_head: student}}}}", []),
        ("{{from: {0}, load: {{student: nothing}}}}", []),
        ("{{from: {0}, load: {{studnt: student}}}}", []),
        ("{{from: {0}, load: [teacher]}}", ["method.teacher.stem_stride=1"]),
    ],
)
def test_a_hand_over_that_does_not_fit(init, more, stage1, tmp_path):
    said, listed = refusals(tiny("burn_stage2.yaml", tmp_path, f"init=[{init.format(stage1.folder)}]", *more))
    assert listed == [said] and "\n" not in said
    assert not list(tmp_path.iterdir())


def test_what_a_resume_refuses(tmp_path):
    recipe = tiny("quick/supervised.yaml", tmp_path, "run.duration=1it", "evals=[]")
    run(recipe)
    said, listed = refusals(recipe)
    assert listed == [said] and "pass --resume" in said
    changed = tiny("quick/supervised.yaml", tmp_path, "run.duration=1it", "evals=[]", "schedules.lr.start=0.5")
    said, listed = refusals(changed, resume=True)
    assert listed == [said] and "schedules.lr.start was" in said
    assert "would be refused" not in describe(changed, resumes=True, allow_changes=True)
    assert "would be refused" not in describe(recipe, resumes=True)


def test_a_part_without_optimizer(tmp_path):
    said, listed = refusals(tiny("burn_stage1.yaml", tmp_path, "optim.lr_scale={teacher: 0.5}"))
    assert listed == [said] and "optim.lr_scale.teacher: not a part that trains" in said


# ------------------------------------------------------------------------------------------------ hand-over


@pytest.mark.parametrize("trains", ["linear", "pre-fc", "burn-release"])
def test_a_frozen_network_is_the_one_that_was_trained(trains, stage1, tmp_path):
    init = f"init=[{{from: {stage1.folder}, load: {{backbone: student}}}}]"
    probe = ["linear.yaml", tmp_path, init, f"method.trains={trains}"]
    with pytest.raises(CheckpointError) as caught:
        trainer_of(tiny(*probe))
    assert 'its student was trained with weights: "real"' in str(caught.value)
    assert 'backbone is frozen here with weights: "binary"; set method.backbone.weights="real"' in str(caught.value)
    trainer_of(tiny(*probe, "method.backbone.weights=real"))
    # The gradient of a sign is nothing that a frozen network computes.
    trainer_of(tiny(*probe, "method.backbone.weights=real", "method.backbone.estimator=reactnet"))


def test_a_network_that_trains_on_may_differ(stage1, tmp_path):
    init = f"init=[{{from: {stage1.folder}, load: [student]}}]"
    assert stage1.method.student.weights == "real"
    recipe = tiny("burn_stage2.yaml", tmp_path, init)
    assert recipe.method.student.weights == "binary"
    trainer_of(recipe)
    trainer_of(tiny("linear.yaml", tmp_path, init.replace("[student]", "{backbone: student}"), "method.trains=all"))


@pytest.mark.parametrize("trains", ["all", "linear"])
def test_drop_leaves_out_what_the_network_here_does_not_have(trains, stage1, tmp_path):
    def probe(drop, *more):
        init = f"init=[{{from: {stage1.folder}, load: {{backbone: student}}, drop: {drop}}}]"
        more = (f"method.trains={trains}", "method.backbone.weights=real", *more)
        return tiny("linear.yaml", tmp_path, init, *more)

    below = "method.backbone.pooled_mlp=false"
    network = trainer_of(probe("[fc]", below)).method.backbone
    kept = network.state_dict()
    assert kept and not any(key.startswith("fc") for key in kept)
    source = last_state(stage1)["method"]
    assert all(torch.equal(value, source[f"student.{key}"]) for key, value in kept.items())
    for drop, more, expected in (
        ("[]", [below], r"unexpected fc\.weight; unexpected fc\.bias"),
        ("[fc, neck]", [below], "init.drop: no module 'neck' in student"),
        ("[f]", [below], "unexpected fc"),
        ("[fc]", [], "init.drop: backbone has 'fc' here"),
        ("[fc, blocks]", [below], "init.drop: backbone has 'blocks' here"),
    ):
        said, listed = refusals(probe(drop, *more))
        assert listed == [said] and re.search(expected, said)


def test_several_differences_are_named_at_once(stage1, tmp_path):
    init = f"init=[{{from: {stage1.folder}, load: {{backbone: student}}}}]"
    with pytest.raises(CheckpointError) as caught:
        trainer_of(tiny("linear.yaml", tmp_path, init, "method.backbone.stem_stride=1"))
    assert 'set method.backbone.stem_stride=2 method.backbone.weights="real"' in str(caught.value)


# ------------------------------------------------------------------------------------------------ what will be needed


def lacks(recipe, key):
    """What a start says of a key, the same in a dry run; nothing else is missing, and nothing was written."""
    (problem,) = preflight.missing(recipe)
    assert problem.key == key and f"missing:\n  {problem}" in describe(recipe)
    assert "\n" not in problem.text and not recipe.folder.exists()
    return problem.text


@pytest.mark.parametrize("key", ["data.train", "data.val", "evals.0.train", "evals.0.val"])
def test_every_data_set_is_one_that_the_back_end_reads(key, tree, tmp_path):
    beton = as_beton(tree)
    roots = {"data.train": beton, "data.val": beton, "evals.0.train": beton, "evals.0.val": beton, key: tree}
    if key == "data.val":  # by an evaluation that has none of its own
        del roots["evals.0.val"]
    if key == "data.train":
        del roots["evals.0.train"]
    changes = [f"{name}={root}" for name, root in roots.items()]
    recipe = tiny("quick/burn_stage1.yaml", tmp_path, *changes, "data.backend=ffcv", "data.options={}")
    assert f"{tree}: data.backend=ffcv needs a .beton file" in lacks(recipe, key)
    with pytest.raises(RecipeError, match=rf"{key}: .*needs a \.beton file"):  # of a table
        chain.check([chain.Chain("row", 0, lambda: iter([planned(recipe, tmp_path)]))])
    tiny_run = tiny("quick/burn_stage1.yaml", tmp_path, *changes, "data.backend=folder", "data.options={}")
    assert preflight.look(tiny_run)[:2] == ([], [])  # which reads both


def planned(recipe, folder):
    path = folder / "recipe.yaml"
    path.write_text(recipe.dump())
    return chain.Run(path, [])


def test_the_train_tool_asks_the_same(tree, tmp_path, monkeypatch, capsys):
    beton = as_beton(tree)
    path = ROOT / "recipes/quick/burn_stage1.yaml"
    more = [f"data.train={beton}", f"data.val={tree}", "data.backend=ffcv", "data.options={}"]
    monkeypatch.setattr("sys.argv", ["train.py", str(path), *tiny_overrides(path, tmp_path), *more])
    train = tool("train")
    monkeypatch.setattr(train, "to_console", lambda **options: None)
    assert guarded(train.main)() == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"data.val: {tree}: data.backend=ffcv needs" in said
    assert not list(tmp_path.iterdir())


def test_a_run_folder_that_cannot_be_used(tmp_path):
    recipe = tiny("quick/linear.yaml", tmp_path)
    recipe.folder.parent.mkdir(exist_ok=True)
    recipe.folder.symlink_to("/purged/run")
    assert "is a link to /purged/run, which is not there" in lacks(recipe, "run.folder")
    recipe.folder.unlink()
    recipe = tiny("quick/linear.yaml", tmp_path / "file")
    (tmp_path / "file").write_text("")
    assert "file is not a folder" in lacks(recipe, "run.folder")


def test_a_place_that_may_not_be_written(tmp_path, monkeypatch):
    recipe = tiny("quick/linear.yaml", tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    assert f"{tmp_path} cannot be written by this user" in lacks(recipe, "run.folder")


@pytest.mark.parametrize(
    ("on_gpu", "change", "key", "wanted"),
    [
        (False, "run.compile=true", "run.compile", "g++: not found, expected a C++ compiler; apt-get install g++"),
        (True, "run.compile=true", "run.compile", "gcc and clang: not found, expected a C compiler"),
        (True, "run.kernels=fused", "run.kernels", "or run.kernels=torch"),
    ],
)
def test_what_compiles_needs_a_compiler(on_gpu, change, key, wanted, tmp_path, monkeypatch):
    recipe = tiny("quick/burn_stage2.yaml", tmp_path, change)
    plain = tiny("quick/burn_stage2.yaml", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    said = lacks(recipe, key)
    assert wanted in said and f"or {key}=" in said
    assert not preflight.missing(plain)
    for name in ("CC", "CXX"):
        monkeypatch.setenv(name, "/bin/true")
    assert not preflight.missing(recipe)
    for name in ("CC", "CXX"):
        monkeypatch.setenv(name, "nowhere")
    (problem,) = preflight.missing(recipe)
    assert str(problem).startswith(f"{key}: nowhere: not found")


def test_colors_go_without_a_compiler(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(augment, "compiles", lambda device: True)
    monkeypatch.delenv("CC", raising=False)
    assert augment.augmenter(torch.device("cuda")) is not augment.augment_batch or not machine.missing_compiler(True)
    monkeypatch.setenv("PATH", str(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert augment.augmenter(torch.device("cuda")) is augment.augment_batch
    assert "colors are not compiled" in caplog.text and "apt-get install gcc" in caplog.text


@pytest.mark.parametrize(
    ("path", "more", "is_refused"),
    [
        ("quick/burn_stage1.yaml", [], ".bn0"),
        ("byol.yaml", [], ".bn0"),
        ("quick/linear.yaml", [], "normalizes over a batch"),
        ("quick/supervised.yaml", [], ""),  # maps of more than one pixel
        ("quick/supervised.yaml", ["method.backbone={arch: resnet18}"], "backbone."),  # of one
        ("moco_v2.yaml", [], ""),
        ("swav.yaml", [], ""),  # all views of an image in one batch
        ("quick/burn_stage1.yaml", ["data.micro_batch=2"], ""),
    ],
)
def test_batch_norm_needs_two_images(path, more, is_refused, tmp_path):
    recipe = tiny(path, tmp_path, "data.micro_batch=1", "evals=[]", *more)
    if not is_refused:
        assert preflight.look(recipe)[:2] == ([], [])
        return
    said, listed = refusals(recipe)
    assert listed == [said] and is_refused in said
    assert said.startswith("data.micro_batch: 1 image per forward on one rank") and "set data.micro_batch=2" in said


def test_a_dry_run_opens_and_reads_each_thing_once(tree, tmp_path, monkeypatch):
    files = [*FILES, f"data.train={tree}", f"data.val={tree}", "run.duration=1it", "evals.0.every=1it"]
    recipe = tiny("quick/supervised.yaml", tmp_path, *files, "method.num_classes=3")
    run(recipe)
    opened, read = [], []
    open_index = loaders.sources.open_index
    monkeypatch.setattr(loaders.sources, "open_index", lambda *a, **k: opened.append(a) or open_index(*a, **k))
    monkeypatch.setattr(checkpoint, "open", lambda *a: read.append(a) or open(*a), raising=False)
    checkpoint._digest.cache_clear()
    before = {path: path.stat().st_mtime_ns for path in recipe.folder.rglob("*")}
    text = describe(recipe, resumes=True)
    assert "missing: nothing" in text and "would be refused" not in text
    assert len(opened) == 2 and len(read) == 1  # of train and val, and of the newest checkpoint
    assert {path: path.stat().st_mtime_ns for path in recipe.folder.rglob("*")} == before


def test_the_doctor_measures_nothing_that_cannot_be_compiled(tree, tmp_path, monkeypatch, capsys):
    path = ROOT / "recipes/quick/supervised.yaml"
    more = [*FILES, f"data.train={tree}", f"data.val={tree}", "method.num_classes=3", "run.compile=true"]
    doctor = tool("doctor")
    monkeypatch.setattr(doctor, "back_ends", lambda: [])  # which take their time
    monkeypatch.setattr(doctor, "_keeps_up", lambda recipe: pytest.fail("measures"))
    monkeypatch.setattr("sys.argv", ["doctor.py", str(path), *tiny_overrides(path, tmp_path), *more])
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.main() == 1
    said = capsys.readouterr().out
    assert "missing            run.compile: g++: not found, expected a C++ compiler; apt-get install g++" in said
