"""What a start refuses, a dry run lists in the same words; a network handed over is the one that was trained."""

import pytest

from engine.describe import describe
from engine.errors import KNOWN, CheckpointError
from tests.runs import run, trainer_of
from tests.tiny import tiny

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


def test_several_differences_are_named_at_once(stage1, tmp_path):
    init = f"init=[{{from: {stage1.folder}, load: {{backbone: student}}}}]"
    with pytest.raises(CheckpointError) as caught:
        trainer_of(tiny("linear.yaml", tmp_path, init, "method.backbone.stem_stride=1"))
    assert 'set method.backbone.stem_stride=2 method.backbone.weights="real"' in str(caught.value)
