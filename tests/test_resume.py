"""What may change when a run is resumed, what is said of it, and what is kept."""

import json

import pytest
import torch

from engine import checkpoint, optim
from engine.errors import CheckpointError, RecipeError
from engine.recipe import OptimConfig
from tests.runs import last_state, prepare, rows, run, trainer_of
from tests.tiny import tiny

QUICK = "quick/supervised.yaml"


def steps_of(recipe):
    return sorted(int(path.name.split("-")[1]) for path in (recipe.folder / "checkpoints").iterdir())


def test_another_batch_size_continues_after_the_same_images(tmp_path, caplog):
    caplog.set_level("INFO", "burn")
    before = tiny(QUICK, tmp_path, "run.duration=5it", "run.save_every=1it", "evals=[]")
    run(before)  # 5 steps of 16 images
    old = (before.folder / "metrics.jsonl").read_text()
    after = tiny(QUICK, tmp_path, "data.batch_size=24", "data.micro_batch=8", "run.duration=5it", "evals=[]")
    trainer = trainer_of(after, resume=True, allow_changes=True)
    assert trainer.steps_done == 3  # 72 of 80 images
    trainer.fit()
    assert "step 5 is step 3 now, of 80 images, the last 8 are seen again" in caplog.text
    assert "resumed differently: data.batch_size was 16, is 24" in caplog.text
    # Nothing that counts in old steps is left where a resume looks, and nothing of it is lost.
    assert set(steps_of(after)) == {3, 4, 5} and last_state(after)["step"] == 5
    aside = before.folder / "before_step_3"
    assert len(list((aside / "checkpoints").iterdir())) == 5 and all(
        checkpoint.is_intact(path) for path in (aside / "checkpoints").iterdir()
    )
    assert (aside / "metrics.jsonl").read_text() == old and (aside / "tensorboard").is_dir()
    assert (aside / "recipe.yaml").read_text() == before.dump()
    assert (after.folder / "recipe.yaml").read_text() == after.dump()
    images = [row["images"] for row in rows(after)]
    assert images == [16, 32, 48, 64, 96, 120]
    # And once more, from the new steps, in the middle: rows are cut by images.
    (path,) = (after.folder / "checkpoints").glob("step-000000005-*")
    path.unlink()
    assert trainer_of(after, resume=True).steps_done == 4
    run(after, resume=True)
    assert [row["images"] for row in rows(after)] == images


def test_a_renumbered_run_that_is_killed_at_once_has_lost_nothing(tmp_path, monkeypatch):
    before = tiny(QUICK, tmp_path, "run.duration=4it", "run.save_every=1it", "run.keep=1", "evals=[]")
    state = run(before)
    after = tiny(QUICK, tmp_path, "data.batch_size=8", "run.duration=10it", "run.keep=1", "evals=[]")
    with monkeypatch.context() as patch:  # after its first save, before the old checkpoints go
        patch.setattr("engine.folder.RunFolder.drop_old", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(after, resume=True, allow_changes=True)
    (kept,) = (before.folder / "before_step_8" / "checkpoints").iterdir()
    assert checkpoint.load(kept)["step"] == state["step"] == 4
    assert run(after, resume=True)["step"] == 10


def test_a_longer_run_says_where_the_rate_jumps_and_keeps_its_recipe(tmp_path, caplog):
    cosine = "schedules.lr={shape: cosine, start: 0.01}"
    before = tiny(QUICK, tmp_path, cosine, "run.duration=4it", "evals=[]")
    run(before)
    after = tiny(QUICK, tmp_path, cosine, "run.duration=8it", "evals=[]")
    run(after, resume=True, allow_changes=True)
    assert "run.duration was 4it, is 8it" in caplog.text and "lr jumps from 0 to 0.005" in caplog.text
    assert (before.folder / "before_step_4" / "recipe.yaml").read_text() == before.dump()
    assert (after.folder / "before_step_4" / "environment.json").exists()
    assert [row["step"] for row in rows(after)] == list(range(1, 9))
    # Resumed as it is, it says nothing and keeps nothing more.
    caplog.clear()
    trainer_of(after, resume=True)
    assert "jumps" not in caplog.text and not (after.folder / "before_step_8").exists()


def test_a_run_that_has_gone_further_than_its_recipe_is_refused(tmp_path):
    run(tiny(QUICK, tmp_path, "run.duration=4it", "evals=[]"))
    for duration, refused in (("3it", True), ("1ep", True), ("4it", False)):  # an epoch is 2.5 steps
        recipe = tiny(QUICK, tmp_path, f"run.duration={duration}", "evals=[]")
        if refused:
            with pytest.raises(
                RecipeError, match=rf"^run\.duration={duration} is \d steps, and .*-000000004-.* has gone 4; "
            ):
                run(recipe, resume=True, allow_changes=True)
        else:
            assert run(recipe, resume=True)["step"] == 4


def test_evaluations_and_the_back_end_are_free(tmp_path, tree, caplog):
    caplog.set_level("INFO", "burn")
    files = ["data.backend=folder", "data.options={}", f"data.train={tree}", "data.workers=0", "method.num_classes=3"]
    before = tiny(QUICK, tmp_path, *files, "run.duration=2it", "evals=[]")
    state = run(before)
    assert "fingerprint of data.val" not in state["identity"]
    moved = tmp_path / "moved"
    tree.rename(moved)
    try:
        more = [f"data.train={moved}", f"data.val={moved}", "evals=[{kind: accuracy, every: 1it}]"]
        after = tiny(QUICK, tmp_path, *files, "run.duration=2it", *more)
        assert trainer_of(after, resume=True).steps_done == 2
        assert f"data.train was {tree}, is {moved}, the same images by their fingerprint" in caplog.text
        assert "evals.0.kind was None, is accuracy" in caplog.text
        assert "resumed differently" not in caplog.text
        other = tiny(QUICK, tmp_path, *files, "run.duration=2it", *more, "data.backend=dali")
        trainer = trainer_of(after, resume=True)
        from engine.resume import check_identity, free_changes, identity

        now = identity(other, 1, "cpu", trainer.indices, trainer.stream_version)
        assert check_identity(state, tmp_path, now, allow_changes=False) == []
        assert any("pixels may differ by a level" in text for text in free_changes(before, other))
    finally:
        moved.rename(tree)


def test_owed_evaluations_are_the_same_when_others_are_added(tmp_path):
    knn, accuracy = "{kind: knn, every: 3it, bank: 7}", "{kind: accuracy, every: 3it}"
    before = tiny(QUICK, tmp_path, f"evals=[{knn}]", "run.duration=3it")
    trainer = trainer_of(before)
    trainer._due_evals = [0]
    trainer.steps_done = 1
    checkpoint.save(before.folder / "checkpoints", 1, trainer.state_dict(), 1)
    again = trainer_of(tiny(QUICK, tmp_path, f"evals=[{accuracy}, {knn}]", "run.duration=3it"), resume=True)
    assert again._due_evals == [1]


# ------------------------------------------------------------------------------------------------ the optimizer


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("adam", "betas", [0.5, 0.6]),
        ("adam", "eps", 1e-3),
        ("adam", "name", "adamw"),
        ("sgd", "momentum", 0.3),
        ("sgd", "nesterov", True),
        ("sgd", "lr_scale", {"classifier": 0.5}),
        ("sgd", "decay", "weights"),
        ("lars", "trust", 0.5),
        ("lars", "momentum", 0.2),
        ("larc", "decay", "weights"),
    ],
)
def test_what_the_recipe_says_of_the_optimizer_is_in_use(name, key, value, tmp_path):
    optimizer = ["schedules.weight_decay=0.1", f"optim={{name: {name}}}", "evals=[]", "run.duration=3it"]
    before = tiny(QUICK, tmp_path, *optimizer)
    state = run(before)
    changed = tiny(QUICK, tmp_path, *optimizer, f"optim.{key}={json.dumps(value)}", "run.duration=4it")
    got = trainer_of(changed, resume=True, allow_changes=True)
    fresh = optim.build(changed.optim, got.method)
    assert type(got.optimizer) is type(fresh)
    for ours, wanted in zip(got.optimizer.param_groups, fresh.param_groups, strict=True):
        differs = {k for k in wanted if k not in ("params", "lr", "weight_decay") and ours[k] != wanted[k]}
        assert not differs and all(a is b for a, b in zip(ours["params"], wanted["params"], strict=True))
    # Each parameter goes on with its own moments, whatever group it is in now.
    groups = state["optimizer"]["param_groups"]
    then = {n: i for group in groups for n, i in zip(group["names"], group["params"], strict=True)}
    for parameter_name, parameter in got.method.named_parameters():
        for moment, kept in state["optimizer"]["state"][then[parameter_name]].items():
            assert torch.equal(got.optimizer.state[parameter][moment], kept), (parameter_name, moment)


def test_every_key_of_the_optimizer_is_tried():
    (mark,) = test_what_the_recipe_says_of_the_optimizer_is_in_use.pytestmark
    assert {key for _, key, _ in mark.args[1]} == set(OptimConfig.model_fields)


def test_another_optimizer_starts_anew_and_says_so(tmp_path, caplog):
    run(tiny(QUICK, tmp_path, "optim={name: adam}", "evals=[]", "run.duration=2it"))
    for name, said in (("sgd", "of another kind"), ("larc", "of another kind")):
        caplog.clear()
        changed = tiny(QUICK, tmp_path, f"optim={{name: {name}}}", "evals=[]", "run.duration=3it")
        trainer = trainer_of(changed, resume=True, allow_changes=True)
        assert said in caplog.text and not any(
            bool(moment.any()) for state in trainer.optimizer.state.values() for moment in state.values()
        )


def test_a_part_that_begins_to_train_has_new_moments(tmp_path, caplog):
    run(tiny("burn_stage1.yaml", tmp_path, "method.target_gradient=none", "optim.lr_scale={}", "run.duration=2it"))
    more = tiny("burn_stage1.yaml", tmp_path, "method.target_gradient=kl", "optim.lr_scale={}", "run.duration=3it")
    assert run(more, resume=True, allow_changes=True)["step"] == 3
    assert "6 parameters, teacher_head.fc0.weight first, did not train before" in caplog.text


def test_an_older_checkpoint_has_no_names_and_loads(tmp_path):
    recipe = tiny(QUICK, tmp_path, "evals=[]", "run.duration=2it", "optim={name: adam}")
    trainer, batches = prepare(recipe)
    trainer.step(batches)
    state = trainer.optimizer.state_dict()
    for group in state["param_groups"]:
        del group["names"]
    assert optim.load_state_dict(trainer.optimizer, state) == ""
    weights = optim.build(OptimConfig(name="adam", decay="weights"), trainer.method)
    assert "other groups than this older checkpoint" in optim.load_state_dict(weights, state)


@pytest.mark.parametrize("change", ["method.backbone.width=4", "method.num_classes=5"])
def test_another_network_is_refused_in_one_line(change, tmp_path):
    run(tiny(QUICK, tmp_path, "evals=[]", "run.duration=1it"))
    classes = "data.options.num_classes=5" if "classes" in change else "seed=0"
    other = tiny(QUICK, tmp_path, "evals=[]", "run.duration=2it", change, classes)
    with pytest.raises(CheckpointError, match="of another network than the recipe: .*size mismatch") as caught:
        trainer_of(other, resume=True, allow_changes=True)
    assert "\n" not in str(caught.value)


def test_another_method_is_refused_in_one_line(tmp_path):
    before = tiny(QUICK, tmp_path, "evals=[]", "run.duration=1it")
    run(before)
    other = tiny("quick/moco.yaml", tmp_path, f"name={before.name}", "evals=[]", "run.duration=2it")
    with pytest.raises(CheckpointError, match="of another network than the recipe: Missing key") as caught:
        trainer_of(other, resume=True, allow_changes=True)
    assert "\n" not in str(caught.value)


def test_a_loss_scaler_can_come_and_go(tmp_path, caplog):
    run(tiny(QUICK, tmp_path, "evals=[]", "run.duration=1it"))
    fp16 = tiny(QUICK, tmp_path, "evals=[]", "run.duration=2it", "run.amp=fp16")
    assert run(fp16, resume=True, allow_changes=True)["step"] == 2 and "the loss scaler starts anew" in caplog.text
    off = tiny(QUICK, tmp_path, "evals=[]", "run.duration=3it")
    assert run(off, resume=True, allow_changes=True)["step"] == 3
    with pytest.raises(RecipeError, match=r"run\.amp was off, is fp16"):
        run(fp16, resume=True)
