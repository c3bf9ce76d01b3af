"""What goes wrong around the steps: evaluations, disks, streams, signals, launchers. A run loses nothing by it."""

import json

import numpy as np
import pytest
import torch

from engine import dist, evals
from engine.errors import MachineError
from engine.results.chain import Run
from engine.train import Trainer
from loaders import DataError, LoaderError
from tests.images import write_tree
from tests.processes import run_ranks
from tests.runs import assert_same_run, last_state, rows, run, trainer_of
from tests.tiny import ROOT, tiny, tiny_overrides

SUPERVISED = "quick/supervised.yaml"
BOTH = "evals=[{kind: accuracy, every: 3it}, {kind: knn, every: 3it}]"
UNSAVED = ["run.duration=6it", "run.save_every=100it", BOTH]


# ------------------------------------------------------------------------------------------------ evaluations


def dies_in(monkeypatch, kind, number):
    """The process ends in evaluation `number` of a kind, from 1."""
    honest, calls = evals.run, []

    def dies(config, *arguments):
        calls.append(config.kind)
        if config.kind == kind and calls.count(kind) == number:
            raise KeyboardInterrupt
        return honest(config, *arguments)

    monkeypatch.setattr(evals, "run", dies)
    return calls


@pytest.mark.parametrize(("kind", "number"), [("accuracy", 1), ("knn", 1), ("knn", 2)])
def test_what_ends_in_an_evaluation_has_lost_no_step_and_no_row_comes_twice(kind, number, tmp_path, monkeypatch):
    whole = tiny(SUPERVISED, tmp_path / "whole", *UNSAVED)
    run(whole)
    recipe = tiny(SUPERVISED, tmp_path / "runs", *UNSAVED)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        dies_in(patch, kind, number)
        run(recipe)
    state = last_state(recipe)
    assert state["step"] == 3 * number and state["due_evals"] == [0, 1]
    chained = Run(
        ROOT / "recipes" / SUPERVISED, [*tiny_overrides(ROOT / "recipes" / SUPERVISED, tmp_path / "runs"), *UNSAVED]
    )
    assert not chained.is_done()
    calls = dies_in(monkeypatch, kind, 0)
    run(recipe, resume=True)
    assert calls == ["accuracy", "knn", "accuracy", "knn"][2 * number - (2 if kind == "accuracy" else 1) :]
    if number == 1:
        assert_same_run(whole, recipe)
    assert chained.is_done()
    calls.clear()
    run(recipe, resume=True)
    assert not calls and rows(recipe) == rows(whole)


def test_a_run_that_is_killed_after_its_last_row_is_done_by_its_resume(tmp_path, monkeypatch):
    recipe = tiny(SUPERVISED, tmp_path, *UNSAVED)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        save = Trainer._save

        def dies(self, step, *, must):
            if must:  # the last one
                raise KeyboardInterrupt
            save(self, step, must=must)

        patch.setattr(Trainer, "_save", dies)
        run(recipe)
    written = rows(recipe)
    monkeypatch.setattr(evals, "run", lambda *_: pytest.fail("it has its row"))
    assert last_state(recipe)["due_evals"] == [0, 1]
    assert run(recipe, resume=True)["due_evals"] == [] and rows(recipe) == written


TROUBLE = {
    "loader": (LoaderError("data.backend=dali: DALI fails"), "data.backend=dali: DALI fails"),
    "data": (DataError("a.jpg: gone"), "a.jpg: gone"),
    "zero": (ZeroDivisionError("float division by zero"), "ZeroDivisionError: float division by zero"),
    "shapes": (RuntimeError("shapes do not match\nat"), "RuntimeError: shapes do not match"),
    "files": (OSError(24, "Too many open files"), r"OSError: \[Errno 24\] Too many open files"),
    "bug": (KeyError("x"), "KeyError: 'x'"),
}


def fails(error):
    """Batches of an evaluation that meet an error."""

    def batches(*_):
        raise error
        yield

    return batches


@pytest.mark.parametrize("what", TROUBLE)
@pytest.mark.parametrize("kind", ["accuracy", "knn", "baselines"])
def test_an_evaluation_that_fails_has_no_number_and_one_line(what, kind, tmp_path, monkeypatch):
    error, said = TROUBLE[what]
    recipe = tiny(SUPERVISED, tmp_path, f"evals=[{{kind: {kind}}}]")
    trainer = trainer_of(recipe)
    monkeypatch.setattr(evals, "_batches", fails(error))
    with pytest.raises(evals.NotMeasured, match=f"^{said}$"):
        evals.run(recipe.evals[0], trainer.method, recipe, trainer.indices, trainer.world)
    assert trainer.method.training


def test_training_goes_on_without_an_evaluation_that_fails(tmp_path, monkeypatch, caplog):
    recipe = tiny(SUPERVISED, tmp_path, *UNSAVED)
    honest, asked = evals._accuracy, []

    def fails_once(*arguments):
        asked.append(1)
        if len(asked) == 1:
            raise evals.NotMeasured("no validation image can be decoded")
        return honest(*arguments)

    monkeypatch.setattr(evals, "_accuracy", fails_once)
    state = run(recipe)
    assert state["step"] == 6 and state["due_evals"] == []
    measured = [(row["step"], row["evaluation"]) for row in rows(recipe) if "evaluation" in row]
    assert measured == [(3, "knn"), (6, "accuracy"), (6, "knn")]
    lines = [record.getMessage() for record in caplog.records if "training continues" in record.getMessage()]
    assert lines == ["step 3: no accuracy: no validation image can be decoded; training continues"]


@pytest.mark.parametrize("which", ["train", "val"])
def test_images_none_of_which_can_be_decoded(which, tmp_path):
    broken = write_tree(tmp_path / "broken")
    intact = write_tree(tmp_path / "intact")
    places = {"train": intact, "val": intact, which: broken}
    files = ["data.backend=folder", "data.options={}", "data.workers=0", "method.num_classes=3", f"data.train={intact}"]
    own = f"train: {places['train']}, val: {places['val']}"
    recipe = tiny(
        SUPERVISED,
        tmp_path,
        *files,
        f"data.val={intact}",
        f"evals=[{{kind: knn, {own}}}, {{kind: accuracy, val: {broken}}}]",
    )
    trainer = trainer_of(recipe)
    for path in broken.rglob("*.*"):
        path.write_bytes(path.read_bytes()[:400])
    from engine.data import sets_of

    for number in (0, 1) if which == "val" else (0,):
        with pytest.raises(evals.NotMeasured, match="can be decoded"):
            sets = sets_of(recipe, number, trainer.indices)
            evals.run(recipe.evals[number], trainer.method, recipe, sets, trainer.world)


def test_a_bank_that_is_smaller_than_its_neighbors():
    bank, label = torch.eye(3), torch.tensor([0, 1, 2])
    assert evals.knn(bank, label, bank, 3, 20, 0.07).tolist() == [0, 1, 2]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError()])
def test_memory_that_runs_out_in_an_evaluation_ends_the_run(error, tmp_path, monkeypatch):
    recipe = tiny(SUPERVISED, tmp_path, *UNSAVED)
    monkeypatch.setattr(evals, "_batches", fails(error))
    with pytest.raises(MachineError, match="out of memory"):
        run(recipe)
    assert last_state(recipe)["step"] == 3


def fails_on_one_of_two(folder):
    recipe = tiny(SUPERVISED, folder, "data.micro_batch=4", "evals=[{kind: accuracy}, {kind: knn}, {kind: baselines}]")
    world = dist.start("cpu", 60)
    trainer = Trainer(recipe, world)
    honest, heard = evals._batches, []
    for rank, (error, _) in enumerate(TROUBLE.values()):
        for config in recipe.evals:
            evals._batches = fails(error) if world.rank == rank % 2 else honest
            try:
                evals.run(config, trainer.method, recipe, trainer.indices, world)
            except evals.NotMeasured as caught:
                heard.append(str(caught))
    (folder / f"heard{world.rank}").write_text(json.dumps(heard))
    dist.stop()


def test_all_ranks_learn_that_an_evaluation_fails_on_one(tmp_path):
    assert run_ranks(2, fails_on_one_of_two, tmp_path) == [0, 0]
    one, two = (json.loads((tmp_path / f"heard{rank}").read_text()) for rank in (0, 1))
    assert one == two and len(one) == 3 * len(TROUBLE)
    assert all(text.startswith(f"rank {number // 3 % 2}: ") for number, text in enumerate(one))


@pytest.mark.parametrize("temperature", [0.001, 0.003, 0.01, 0.0113, 0.03, 0.07])
def test_knn_votes_as_in_float64(temperature):
    rng = np.random.default_rng(0)
    center = rng.normal(size=(4, 16))
    label, truth = rng.integers(0, 4, 300), rng.integers(0, 4, 200)
    bank, query = center[label] + 2 * rng.normal(size=(300, 16)), center[truth] + 2 * rng.normal(size=(200, 16))
    got = evals.knn(*(torch.tensor(a) for a in (bank, label, query)), 4, 20, temperature)
    unit = [a / np.linalg.norm(a, axis=1, keepdims=True) for a in (bank, query)]
    cosine = unit[1] @ unit[0].T
    for i, row in enumerate(cosine):
        nearest = np.argsort(-row)[:20]
        votes = np.bincount(label[nearest], np.exp(row[nearest] / temperature - row.max() / temperature), 4)
        assert got[i] == votes.argmax()
