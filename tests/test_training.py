"""The loop, on tiny versions of every recipe: who moves, exact resume, ranks, precision, numbers that go wrong."""

import itertools
import json
import shutil
import time

import numpy as np
import pytest
import torch

import loaders
from engine import checkpoint, dist, train
from engine import recipe as recipes
from engine.errors import CheckpointError, FolderError, NotFinite, RecipeError, Untrained
from engine.folder import RunFolder
from engine.results.runs import metrics
from engine.resume import check_identity
from engine.train import Trainer
from loaders import DataError
from models import methods
from models.weights import WeightsError
from tests.processes import PATIENCE, rank_environment, run_ranks, start_process
from tests.runs import assert_same_run, differences, in_float64, last_state, open_loader, prepare, rows, run, trainer_of
from tests.tiny import RECIPE_IDS, RECIPES, ROOT, distinct, full_depth, of_each_method, tiny

ALL = pytest.mark.parametrize("path", RECIPES, ids=RECIPE_IDS)
METHODS = pytest.mark.parametrize("path", of_each_method(), ids=lambda path: str(path.relative_to(ROOT / "recipes")))
KINDS = pytest.mark.parametrize("path", distinct(), ids=lambda path: str(path.relative_to(ROOT / "recipes")))


@ALL
def test_what_should_move_moves_and_nothing_else_does(path, tmp_path):
    # methods.md 7.8.1: the test that would have caught the released code.
    trainer, batches = prepare(tiny(path, tmp_path))
    method = trainer.method
    before = {name: value.clone() for name, value in method.state_dict().items()}
    trainer.step(batches)
    trainer.step(
        batches
    )  # a warm-up may start at a learning rate of zero, a momentum network moves after the first step
    trained = {name for name, parameter in method.named_parameters() if parameter.requires_grad}
    statistics = {name for name, _ in method.named_buffers() if "running_" in name or "num_batches" in name}
    training_statistics = {
        f"{name}.{leaf}"
        for name, module in method.named_modules()
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and module.training
        for leaf in ("running_mean", "running_var", "num_batches_tracked")
    }
    assert statistics >= training_statistics
    for name, value in method.state_dict().items():
        moved = not torch.equal(before[name], value)
        after_step = any(name.startswith(prefix) for prefix in method.moved_after_step)
        may_move = name in trained or name in training_statistics or after_step
        assert moved <= may_move, f"{name} moved"
        assert moved >= (name in trained), f"{name} did not move"
    assert trained


@pytest.mark.parametrize(("option", "counts"), [("none", (6, 0)), ("kl", (6, 6)), ("both", (6, 6))])
def test_gradient_pattern_of_burns_options(option, counts, tmp_path):
    # methods.md 7.5, with the tensor counts of the full-size networks
    depth = full_depth("burn_stage1.yaml")
    recipe = tiny("burn_stage1.yaml", tmp_path, f"method.target_gradient={option}", "data.batch_size=8", *depth)
    trainer, batches = prepare(recipe)
    method = trainer.method
    batch = next(batches)
    loss = method(batch.views, batch.label, {"balance": torch.tensor(0.1)})["loss"]
    assert loss.requires_grad  # methods.md 7.8.2
    loss.backward()

    def with_gradient(part):
        return sum(p.grad is not None and bool(p.grad.any()) for p in getattr(method, part).parameters())

    assert with_gradient("student") == 202
    assert (with_gradient("student_head"), with_gradient("teacher_head")) == counts
    assert all(p.grad is None for p in method.teacher.parameters())


def test_trained_parameters_of_the_linear_protocols():
    def trained(**changes):
        config = methods.load("classify").Config.model_validate(
            {"name": "classify", "backbone": {"arch": "reactnet", "width": 2}, "num_classes": 5, **changes}
        )
        method = config.build()
        return method, {name for name, p in method.named_parameters() if p.requires_grad}

    head = {"classifier.weight", "classifier.bias"}
    for protocol in ("linear", "pre-fc"):
        assert trained(trains=protocol)[1] == head
    method, names = trained(trains="burn-release")
    assert names == head | {"backbone.fc.weight", "backbone.fc.bias"}
    method.train()
    assert not any(module.training for module in method.backbone.modules())
    images = torch.randn(4, 3, 32, 32)
    pooled = method.backbone.pooled(images)
    before_fc = trained(trains="pre-fc")[0]
    assert torch.equal(before_fc.features(images), before_fc.backbone.pooled(images))
    assert torch.equal(method.features(images), torch.relu(method.backbone.fc(pooled)))
    with pytest.raises(ValueError, match="pooled_mlp"):
        trained(trains="pre-fc", backbone={"arch": "resnet18"})


@pytest.mark.parametrize("teacher_bn", ["train", "eval"])
def test_teacher_features_depend_on_the_batch_only_with_batch_statistics(teacher_bn, tmp_path):
    # methods.md 7.8.6
    recipe = tiny("burn_stage1.yaml", tmp_path, f"method.teacher_bn={teacher_bn}")
    method = recipe.method.build().train()
    images = torch.randn(6, 3, 32, 32)
    with torch.no_grad():
        together, alone = method.teacher(images)[:3], method.teacher(images[:3])
    assert torch.allclose(together, alone, atol=1e-5) == (teacher_bn == "eval")


# ------------------------------------------------------------------------------------------------ exactness


def cut(recipe, folder, step):
    """The run folder as a kill right after the checkpoint of `step` leaves it; a recipe that resumes it."""
    again = recipe.model_copy(update={"run": recipe.run.model_copy(update={"folder": str(folder)})})
    shutil.copytree(recipe.folder, again.folder)
    for path in (again.folder / "checkpoints").iterdir():
        if int(path.name.split("-")[1]) > step:
            path.unlink()
    return again


@KINDS
def test_resume_is_exact(path, tmp_path):
    recipe = tiny(path, tmp_path / "whole", "data.options.num_images=20", "run.log_every=2it", "run.save_every=1it")
    run(recipe)
    for step in (1, 3):  # 20 images: an epoch ends inside step 2; step 3 cuts a log interval
        again = cut(recipe, tmp_path / f"cut{step}", step)
        run(again, resume=True)
        assert_same_run(recipe, again)


@pytest.mark.slow
def test_resume_from_every_step(tmp_path):
    # reliability.md 3
    recipe = tiny(
        "quick/burn_stage2.yaml", tmp_path / "whole", "run.duration=24it", "run.save_every=1it", "run.log_every=5it",
        "evals.0.every=5it", "data.options.num_images=36", "data.batch_size=8", "data.micro_batch=4",
    )  # fmt: skip
    run(recipe)
    for step in range(1, 24):
        again = cut(recipe, tmp_path / f"cut{step}", step)
        run(again, resume=True)
        assert_same_run(recipe, again)
        shutil.rmtree(tmp_path / f"cut{step}")


@METHODS
def test_two_runs_are_equal(path, tmp_path):
    # reliability.md 5
    a, b = (tiny(path, tmp_path / name) for name in "ab")
    run(a), run(b)
    assert_same_run(a, b)
    c = tiny(path, tmp_path / "c", "seed=1")
    run(c)
    assert differences(last_state(a)["method"], last_state(c)["method"])


def ranks_run(recipe_path, folder, overrides, resume):
    from tests.tiny import tiny

    train.run(tiny(recipe_path, folder, *overrides), resume=resume)


@METHODS
@pytest.mark.slow
def test_resume_is_exact_on_two_ranks(path, tmp_path):
    overrides = ["data.micro_batch=4", "run.save_every=1it", "run.log_every=2it"]
    whole = tiny(path, tmp_path / "whole", *overrides)
    assert run_ranks(2, ranks_run, path, tmp_path / "whole", overrides, False) == [0, 0]
    again = cut(whole, tmp_path / "cut", 3)
    assert run_ranks(2, ranks_run, path, tmp_path / "cut", overrides, True) == [0, 0]
    assert_same_run(whole, again)


def test_sampled_stream_is_the_same_after_resume(tmp_path, monkeypatch):
    # reliability.md 4: a ledger of what was drawn, before and after.
    recipe = tiny("quick/burn_stage1.yaml", tmp_path / "whole", "run.save_every=1it")
    ledger = []
    from loaders.sampler import Stream

    plan = Stream.plan

    def spy(self, positions):
        made = plan(self, positions)
        if self.shuffled:
            ledger.append((list(positions), *(part.tolist() for part in made)))
        return made

    monkeypatch.setattr(Stream, "plan", spy)
    run(recipe)
    whole, ledger = ledger, []
    run(cut(recipe, tmp_path / "cut", 2), resume=True)
    assert ledger == whole[-len(ledger) :] and len(ledger) == 8
    positions = [p for chunk, *_ in whole for p in chunk]
    assert positions == list(range(96))


def test_resume_is_exact_in_blocks_and_with_fixed_views(tmp_path):
    overrides = ["data.options.num_images=20", "run.save_every=1it", "data.fixed_views=2"]
    recipe = tiny("quick/burn_stage1.yaml", tmp_path / "whole", *overrides, "data.order=blocks", "data.window=2")
    run(recipe)
    again = cut(recipe, tmp_path / "cut", 3)
    run(again, resume=True)
    assert_same_run(recipe, again)
    changed = tiny("quick/burn_stage1.yaml", tmp_path / "whole", *overrides, "data.window=2")
    with pytest.raises(RecipeError, match=r"data\.order was blocks, is full"):
        trainer_of(changed, resume=True)


def with_stream(recipe, folder, version):
    """The run folder of a resumable recipe as an engine with this version of the stream leaves it; None names none."""
    again = cut(recipe, folder, 3)
    path, _ = checkpoint.latest(again.folder / "checkpoints")
    state = checkpoint.load(path)
    del state["format"], state["identity"]["version of the stream"]
    if version is not None:
        state["identity"]["version of the stream"] = version
    checkpoint.save(path.parent, state.pop("step"), state, keep=1)
    return again


def test_an_older_run_continues_in_the_order_that_it_began_with(tmp_path, caplog):
    # An epoch ends inside step 2.
    overrides = ["data.options.num_images=20", "run.save_every=3it"]
    new, old = (tiny("quick/burn_stage1.yaml", tmp_path / name, *overrides) for name in ("new", "old"))
    run(new)
    trainer = trainer_of(old)
    trainer.stream_version = 1
    trainer.fit()
    assert last_state(old)["identity"]["version of the stream"] == 1
    assert differences(last_state(new)["method"], last_state(old)["method"])
    for name, version in (("says", 1), ("does-not", None)):  # checkpoints from before version 2 name none
        again = with_stream(old, tmp_path / name, version)
        caplog.clear()
        with caplog.at_level("INFO", "burn"):
            run(again, resume=True)
        assert "the run keeps the order of images that it began with, version 1 of the stream" in caplog.text
        assert_same_run(old, again)
        assert last_state(again)["identity"]["version of the stream"] == 1
    again = with_stream(new, tmp_path / "newest", 2)
    run(again, resume=True)
    assert_same_run(new, again)
    with pytest.raises(CheckpointError, match=r"images come in order 3 .* knows 1 to 2; continue with the engine"):
        trainer_of(with_stream(new, tmp_path / "later", 3), resume=True)


# ------------------------------------------------------------------------------------------------ ranks


def gradients(overrides, folder):
    """Gradients of one optimizer step of a float64 network, in rank 0's file."""
    recipe = tiny("quick/supervised.yaml", folder, *overrides)
    world = dist.start("cpu", 60)
    torch.set_default_dtype(torch.float64)
    try:
        trainer = Trainer(recipe, world)
        trainer.method.backbone.eval()  # BatchNorm with running statistics
        kept = {}
        trainer.optimizer.step = lambda: kept.update(
            {name: p.grad.clone() for name, p in trainer.method.named_parameters()}
        )
        trainer.step(in_float64(open_loader(trainer)))
    finally:
        torch.set_default_dtype(torch.float32)
        dist.stop()
    if world.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(kept, folder / "gradients.pt")


@pytest.mark.slow
def test_two_ranks_equal_accumulation_equal_one_batch(tmp_path):
    # reliability.md 6 and 7, methods.md 7.8.5
    gradients(["data.micro_batch=16"], tmp_path / "one")
    gradients(["data.micro_batch=4"], tmp_path / "accumulated")
    assert run_ranks(2, gradients, ["data.micro_batch=8"], tmp_path / "two") == [0, 0]
    assert run_ranks(2, gradients, ["data.micro_batch=4"], tmp_path / "both") == [0, 0]
    one = torch.load(tmp_path / "one" / "gradients.pt")
    for name in ("accumulated", "two", "both"):
        other = torch.load(tmp_path / name / "gradients.pt")
        for key, gradient in one.items():
            scale = gradient.abs().max().clamp(min=1e-12)
            assert (gradient - other[key]).abs().max() / scale < 1e-6, (name, key)


def synced(folder):
    from models import collectives
    from models.heads import MLP, SyncBatchNorm1d

    world = dist.start("cpu", 60)
    torch.manual_seed(0)
    head = MLP(6, 5, 4, norm=True).double()
    x = torch.randn(2, 12, 6, dtype=torch.float64)  # two views
    target = torch.randn(2, 12, 4, dtype=torch.float64)
    mine = slice(12 // world.world_size * world.rank, 12 // world.world_size * (world.rank + 1))
    x = x[:, mine].contiguous().requires_grad_()
    assert isinstance(head.bn0, SyncBatchNorm1d)
    count, all_reduce = [], collectives.dist.all_reduce
    collectives.dist.all_reduce = lambda *a, **k: count.append(1) or all_reduce(*a, **k)
    # One process runs its views one after another: what several ranks do with both in one collective.
    outputs = head(x) if world.world_size > 1 else torch.stack([head(view) for view in x])
    ((outputs - target[:, mine]) ** 2).sum().backward()
    collectives.dist.all_reduce = all_reduce
    assert len(count) == (0 if world.world_size == 1 else 2)  # one forward, one backward
    assert torch.equal(head.eval()(x)[1], head(x[1]))
    for parameter in head.parameters():
        parameter.grad = dist.total(parameter.grad)
    state = {
        "x": dist.gather_rows(x.grad.transpose(0, 1).contiguous()),
        **{f"grad {n}": p.grad for n, p in head.named_parameters()},
        **{f"buffer {n}": b for n, b in head.named_buffers()},
    }
    if world.is_main:
        torch.save(state, folder / f"{world.world_size}.pt")
    dist.stop()


def test_synced_batch_norm_equals_one_process(tmp_path):
    synced(tmp_path)
    assert run_ranks(2, synced, tmp_path) == [0, 0]
    one, two = torch.load(tmp_path / "1.pt"), torch.load(tmp_path / "2.pt")
    for key in one:
        assert torch.allclose(one[key].double(), two[key].double(), atol=1e-12), key


def shuffled(folder):
    from models.methods.moco import Config

    world = dist.start("cpu", 60)
    torch.manual_seed(0)
    reactnet = {"arch": "reactnet", "width": 2, "weights": "real", "activations": "real"}
    config = Config.model_validate({"name": "moco", "backbone": reactnet, "out_dim": 4, "queue_size": 12})
    method = config.build().train()
    method.contrast.key_backbone.eval()  # running statistics: shuffling must then change nothing but the order
    images = torch.randn(8, 3, 32, 32)
    size = 8 // world.world_size
    mine = images[size * world.rank : size * (world.rank + 1)]
    torch.manual_seed(5)
    method([mine, mine], torch.zeros(size), {})
    method.after_step({"momentum": 0.5})
    if world.is_main:
        torch.save(
            {"queue": method.contrast.queue, "pointer": method.contrast.queue_pointer},
            folder / f"moco{world.world_size}.pt",
        )
    dist.stop()


def test_mocos_queue_and_shuffle_over_ranks(tmp_path):
    shuffled(tmp_path)
    assert run_ranks(2, shuffled, tmp_path) == [0, 0]
    one, two = (torch.load(tmp_path / f"moco{n}.pt") for n in (1, 2))
    assert torch.allclose(one["queue"], two["queue"], atol=1e-6)
    assert one["pointer"] == two["pointer"] == 8


def test_mocos_queue_is_first_in_first_out(tmp_path):
    recipe = tiny("quick/moco.yaml", tmp_path, "schedules.lr=0.05")
    trainer, batches = prepare(recipe)
    method = trainer.method
    key_before = next(method.contrast.key_backbone.parameters()).clone()
    query_before = next(method.backbone.parameters()).clone()
    for step in range(5):  # 16 keys each into 48 places
        kept = method.contrast.queue.clone()
        trainer.step(batches)
        places = torch.arange(16 * step, 16 * step + 16) % 48
        others = [i for i in range(48) if i not in places.tolist()]
        assert torch.equal(method.contrast.queue[:, others], kept[:, others])
        assert not torch.equal(method.contrast.queue[:, places], kept[:, places])
        assert torch.allclose(method.contrast.queue.norm(dim=0), torch.ones(48), atol=1e-5)
        if step == 0:
            query = next(method.backbone.parameters())
            momentum = recipe.schedules["momentum"].start
            expected = momentum * key_before + (1 - momentum) * query
            assert torch.allclose(next(method.contrast.key_backbone.parameters()), expected, atol=1e-7)
            assert not torch.equal(query, query_before)
    assert method.contrast.queue_pointer == 80 % 48


def evaluated(folder):
    recipe = tiny("quick/burn_stage2.yaml", folder, "data.options.num_val_images=13", "data.micro_batch=4")
    world = dist.start("cpu", 60)
    trainer = Trainer(recipe, world)
    from engine import evals

    if world.rank == 1:
        for buffer in trainer.method.buffers():
            if buffer.is_floating_point():
                buffer += 1  # statistics of ranks differ; rank 0's count
    scores = evals.run(recipe.evals[0], trainer.method, recipe, trainer.indices, world)
    if world.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{world.world_size}.json").write_text(json.dumps(scores))
    assert trainer.method.training
    dist.stop()


def test_evaluation_is_the_same_on_two_ranks(tmp_path):
    evaluated(tmp_path)
    assert run_ranks(2, evaluated, tmp_path) == [0, 0]
    one, two = (json.loads((tmp_path / f"{n}.json").read_text()) for n in (1, 2))
    assert one == two and one["measured"] == 13


def test_knn_takes_the_recipes_neighbors_temperature_and_bank(tmp_path, monkeypatch):
    from engine import evals

    recipe = tiny("quick/burn_stage2.yaml", tmp_path, "evals.0={kind: knn, neighbors: 3, temperature: 0.5, bank: 7}")
    asked = []

    def spy(bank, bank_label, query, num_classes, neighbors, temperature):
        asked.append((len(bank), num_classes, neighbors, temperature))
        return torch.zeros(len(query), dtype=torch.int64)

    monkeypatch.setattr(evals, "knn", spy)
    trainer = trainer_of(recipe)
    evals.run(recipe.evals[0], trainer.method, recipe, trainer.indices, trainer.world)
    assert asked == [(7, 4, 3, 0.5)]


def test_ranks_wait_as_long_as_the_recipe_says(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(dist.dist, "init_process_group", lambda *a, **k: asked.append(k["timeout"].total_seconds()))
    for name, value in rank_environment(2)[0].items():
        monkeypatch.setenv(name, value)
    recipe = tiny("quick/supervised.yaml", tmp_path, "run.timeout_seconds=77")
    dist.start(recipe.run.device, recipe.run.timeout_seconds)
    assert asked == [77]


def test_batch_norm_of_an_evaluation_is_measured_anew_and_put_back(tmp_path):
    states, answers = {}, {}
    for count in (0, 2):
        change = f"evals=[{{kind: knn, every: 2it, precise_bn: {count}}}]"
        recipe = tiny("quick/moco.yaml", tmp_path / str(count), "data.labels=none", change)
        state = run(recipe)
        states[count], answers[count] = state["method"], [row for row in rows(recipe) if "top1" in row]
    assert differences(states[0], states[2]) == []  # queue, statistics and weights of training are untouched
    assert len(answers[0]) == len(answers[2]) == 3 and answers[0][0]["measured"] == answers[2][0]["measured"]


def test_knn_against_its_definition():
    from engine.evals import knn

    rng = np.random.default_rng(0)
    bank, query, label = rng.normal(size=(30, 5)), rng.normal(size=(9, 5)), rng.integers(0, 4, 30)
    got = knn(torch.tensor(bank), torch.tensor(label), torch.tensor(query), 4, 7, 0.07)
    unit = bank / np.linalg.norm(bank, axis=1, keepdims=True)
    for i, q in enumerate(query):
        cosine = unit @ (q / np.linalg.norm(q))
        nearest = np.argsort(-cosine)[:7]
        votes = [np.exp(cosine[nearest] / 0.07)[label[nearest] == c].sum() for c in range(4)]
        assert got[i] == int(np.argmax(votes))


# ------------------------------------------------------------------------------------------------ going wrong


def test_the_guard_catches_a_loss_without_graph(tmp_path, monkeypatch):
    # reliability.md 17: what the released BURN does, with the line that hid it.
    from models.methods import burn

    honest = burn.burn_loss

    def released(*arguments):
        out = honest(*arguments)
        return {**out, "loss": out["loss"].detach().requires_grad_()}

    monkeypatch.setattr(burn, "burn_loss", released)
    recipe = tiny("burn_stage1.yaml", tmp_path)
    with pytest.raises(Untrained) as caught:
        run(recipe)
    assert "has no gradient" in str(caught.value)
    assert not (recipe.folder / "checkpoints").exists()


def test_the_guard_names_a_part_that_is_not_used(tmp_path, monkeypatch):
    from models.methods import burn

    honest = burn.burn_loss
    monkeypatch.setattr(
        burn, "burn_loss", lambda outputs, targets, *rest: honest(outputs, [t.detach() for t in targets], *rest)
    )
    with pytest.raises(Untrained, match=r"teacher_head\.fc0\.weight has no gradient"):
        run(tiny("burn_stage1.yaml", tmp_path))


def poison(monkeypatch, step, rank=0, where="loss"):
    from models.methods import burn

    honest = burn.Burn.forward
    calls = {"n": 0}

    def forward(self, *arguments):
        out = honest(self, *arguments)
        calls["n"] += 1
        if calls["n"] == step and dist.environment_rank() == rank:
            if where == "loss":
                out["loss"] = out["loss"] * float("nan")
            else:
                next(self.student.parameters()).register_hook(lambda g: g * float("nan"))
        return out

    monkeypatch.setattr(burn.Burn, "forward", forward)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_not_finite_stops_before_anything_is_saved(tmp_path, monkeypatch, where):
    recipe = tiny("burn_stage1.yaml", tmp_path, "data.micro_batch=16", "run.save_every=1it")
    poison(monkeypatch, 4, where=where)
    with pytest.raises(NotFinite, match="step 4"):
        run(recipe)
    assert last_state(recipe)["step"] == 3


def poisoned_rank(folder, where):
    with pytest.MonkeyPatch.context() as patch:
        poison(patch, 4, rank=1, where=where)
        recipe = tiny("burn_stage1.yaml", folder, "data.micro_batch=8", "run.save_every=1it")
        try:
            train.run(recipe)
        except NotFinite as error:
            (folder / f"rank{dist.environment_rank()}").write_text(str(error))
            raise SystemExit(NotFinite.exit_code) from None


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_not_finite_on_one_rank_stops_all_at_the_same_step(tmp_path, where):
    # reliability.md 15
    assert run_ranks(2, poisoned_rank, tmp_path, where) == [NotFinite.exit_code] * 2
    assert all("step 4" in (tmp_path / f"rank{rank}").read_text() for rank in (0, 1))
    assert last_state(tiny("burn_stage1.yaml", tmp_path))["step"] == 3


def test_a_network_that_went_bad_is_not_saved(tmp_path, monkeypatch):
    # a buffer, which no gradient check sees: the last good checkpoint must stay
    recipe = tiny("burn_stage1.yaml", tmp_path, "run.save_every=1it", "run.keep=1", "evals=[]")
    from models.methods import burn

    honest = burn.Burn.after_step

    def spoil(self, values):
        honest(self, values)
        self.spoiled = getattr(self, "spoiled", 0) + 1
        if self.spoiled == 4:
            self.teacher.blocks[0].norm1.running_mean[0] = float("nan")

    monkeypatch.setattr(burn.Burn, "after_step", spoil)
    with pytest.raises(NotFinite, match="step 4 is not saved, not finite: teacher"):
        run(recipe)
    assert last_state(recipe)["step"] == 3


# ------------------------------------------------------------------------------------------------ precision


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_trains_on_a_cpu(amp, tmp_path):
    recipe = tiny("burn_stage2.yaml", tmp_path, f"run.amp={amp}", "run.log_every=1it")
    state = run(recipe)
    assert all(np.isfinite(row["loss"]) for row in rows(recipe) if "loss" in row)
    assert all(v.dtype != torch.float16 for v in state["method"].values())
    assert bool(state["scaler"]) == (amp == "fp16")


def test_endless_overflow_stops_after_the_allowed_steps(tmp_path, monkeypatch):
    # reliability.md 16
    from models.methods import burn

    honest = burn.Burn.forward

    def forward(self, *arguments):
        out = honest(self, *arguments)
        if self.training:
            next(self.student.parameters()).register_hook(lambda g: g * float("inf"))
        return out

    monkeypatch.setattr(burn.Burn, "forward", forward)
    recipe = tiny(
        "burn_stage1.yaml", tmp_path, "run.amp=fp16", "run.max_skipped_steps=3", "run.duration=9it", "evals=[]",
        "run.save_every=100it",
    )  # fmt: skip
    with pytest.raises(NotFinite, match="step 4"):
        run(recipe)


@pytest.mark.slow
def test_compiled_and_eager_runs_continue_each_other(tmp_path):
    # reliability.md 44: in float32 their numbers part where a sign flips; what must hold is that a checkpoint does not
    # know how it was made, and that a compiled run repeats itself. Equality in float64: test_bench_step.py.
    more = ["data.batch_size=8", "evals=[]", "run.save_every=1it"]
    compiled = tiny("quick/supervised.yaml", tmp_path / "a", *more, "run.compile=true", "run.duration=4it")
    state = run(compiled)
    again = cut(compiled, tmp_path / "b", 2)
    run(again, resume=True)
    assert_same_run(compiled, again)
    for step, compiles in ((5, "false"), (6, "true")):
        longer = tiny(
            "quick/supervised.yaml", tmp_path / "a", *more, f"run.compile={compiles}", f"run.duration={step}it"
        )
        other = run(longer, resume=True, allow_changes=True)
        assert other["step"] == step and other["method"].keys() == state["method"].keys()


def test_student_has_no_graph_break(tmp_path):
    recipe = tiny("burn_stage2.yaml", tmp_path)
    method = recipe.method.build().train()
    explained = torch._dynamo.explain(method.student)(torch.randn(2, 3, 32, 32))
    assert explained.graph_break_count == 0 and explained.graph_count == 1
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------------------ hand-over


def test_stage_1_hands_over_to_stage_2_and_to_linear_evaluation(tmp_path):
    # methods.md 7.8.4, reliability.md 39
    stage1 = tiny("burn_stage1.yaml", tmp_path)
    first = run(stage1)["method"]
    init = f"init=[{{from: {stage1.folder}, load: [student, student_head, teacher_head]}}]"
    stage2 = trainer_of(tiny("burn_stage2.yaml", tmp_path, init))
    second = stage2.method.state_dict()
    for name, value in first.items():
        if not name.startswith("teacher."):
            assert torch.equal(second[name], value), name
    assert any(not torch.equal(second[name], value) for name, value in first.items() if name.startswith("teacher."))
    init = f"init=[{{from: {stage1.folder}, load: {{backbone: student}}}}]"
    linear = trainer_of(tiny("linear.yaml", tmp_path, init, "method.backbone.weights=real"))
    for name, value in linear.method.backbone.state_dict().items():
        assert torch.equal(first[f"student.{name}"], value)


def test_wrong_hand_overs_list_what_does_not_fit(tmp_path):
    # reliability.md 39
    stage1 = tiny("burn_stage1.yaml", tmp_path)
    run(stage1)

    def start(init, *more):
        trainer_of(tiny("burn_stage2.yaml", tmp_path, f"init=[{init}]", *more))

    with pytest.raises(WeightsError, match=r"part 'teacher_head' does not fit.*fc0\.weight has shape"):
        start(f"{{from: {stage1.folder}, load: [teacher_head]}}", "method.hidden_dim=16")
    with pytest.raises(WeightsError, match=r"missing fc0\.weight.*unexpected stem\.0\.weight"):
        start(f"{{from: {stage1.folder}, load: {{student_head: student}}}}")
    with pytest.raises(CheckpointError, match="no part 'key_backbone', expected one of student"):
        start(f"{{from: {stage1.folder}, load: {{student: key_backbone}}}}")
    with pytest.raises(CheckpointError, match="init.load.studnt: the method has no such part"):
        start(f"{{from: {stage1.folder}, load: {{studnt: student}}}}")
    with pytest.raises(CheckpointError, match="no such file or run folder"):
        start("{from: nowhere.pt, load: [student]}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="expected a complete checkpoint"):
        start(f"{{from: {tmp_path / 'empty'}, load: [student]}}")
    half = tmp_path / "half.pt"
    whole = next((stage1.folder / "checkpoints").iterdir()).read_bytes()
    half.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightsError, match=r"half\.pt: cut short, damaged"):
        start(f"{{from: {half}, load: [student]}}")


def test_resume_refuses_what_would_change_the_numbers(tmp_path):
    recipe = tiny("quick/burn_stage1.yaml", tmp_path)
    run(recipe)
    with pytest.raises(FolderError, match="already contains a run; pass --resume"):
        trainer_of(recipe)
    changed = tiny("quick/burn_stage1.yaml", tmp_path, "schedules.lr.start=0.5", "data.options.num_images=41")
    with pytest.raises(RecipeError) as caught:
        trainer_of(changed, resume=True)
    assert "schedules.lr.start was" in str(caught.value) and "fingerprint of data.train" in str(caught.value)
    assert trainer_of(changed, resume=True, allow_changes=True).steps_done == 6
    free = tiny("quick/burn_stage1.yaml", tmp_path, "run.log_every=3it", "data.workers=2")
    assert trainer_of(free, resume=True).steps_done == 6
    # reliability 32: more ranks, without starting them
    state, path = last_state(recipe), recipe.folder
    with pytest.raises(RecipeError, match="world_size was 1, is 2"):
        check_identity(state, path, {**state["identity"], "world_size": 2}, allow_changes=False)


def test_odd_clocks_and_environments_change_nothing(tmp_path, monkeypatch):
    # reliability 37: the wall clock jumps by years at each look, nothing can be written at home, no terminal
    recipe = tiny("quick/burn_stage1.yaml", tmp_path / "plain")
    run(recipe)
    wall = itertools.cycle([4e9, 0.0, 1.7e9])
    monkeypatch.setattr(time, "time", lambda: next(wall))
    (tmp_path / "home").mkdir(mode=0o500)
    for name, value in (("HOME", str(tmp_path / "home")), ("TERM", "dumb"), ("LANG", "C"), ("COLUMNS", "0")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    odd = tiny("quick/burn_stage1.yaml", tmp_path / "odd")
    run(odd)
    assert_same_run(recipe, odd)
    assert all(row["eta_seconds"] >= 0 and row["seconds"] >= 0 for row in metrics(odd.folder) if "seconds" in row)


def test_a_run_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FolderError, match="run.folder: .*file is not a folder; remove it or set another run.folder"):
        run(tiny("quick/burn_stage1.yaml", tmp_path / "file"))


@pytest.mark.parametrize("name", ["recipe.yaml", "environment.json", "metrics.jsonl"])
def test_a_file_of_the_run_folder_that_cannot_be_written(name, tmp_path):
    recipe = tiny("quick/burn_stage1.yaml", tmp_path)
    (recipe.folder / name).mkdir(parents=True)
    trainer = trainer_of(recipe)
    with pytest.raises(FolderError, match="run.folder: .* cannot be created or written: Is a directory"):
        trainer.fit()
    (recipe.folder / name).rmdir()
    trainer.fit()  # nothing still holds the folder
    assert trainer.steps_done == 6


def test_every_machine_says_what_is_wrong_with_it(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(loaders, "warnings", lambda *_: ["/dev/shm is small"])
    trainer = trainer_of(tiny("quick/burn_stage1.yaml", tmp_path))
    for rank, local, says in ((0, 0, True), (1, 1, False), (8, 0, True)):
        trainer.world = trainer.world._replace(rank=rank, local_rank=local)
        caplog.clear()
        trainer._warn()
        assert ("/dev/shm is small" in caplog.text) == says


def opens_the_folder(folder):
    with pytest.raises(FolderError, match="another process is running here"):
        RunFolder(tiny("quick/burn_stage1.yaml", folder))


def test_a_second_run_in_the_same_folder_is_refused(tmp_path):
    first = RunFolder(tiny("quick/burn_stage1.yaml", tmp_path))
    process = start_process(opens_the_folder, tmp_path)
    process.join(PATIENCE)
    assert process.exitcode == 0
    first.close()


def test_the_guard_is_for_the_first_step_of_a_run(tmp_path, monkeypatch):
    # A run whose targets have become constant trains on; stopped and resumed it must do the same.
    recipe = tiny("burn_stage1.yaml", tmp_path, "run.duration=4it")
    run(recipe)
    from models.methods import burn

    honest = burn.burn_loss
    monkeypatch.setattr(
        burn, "burn_loss", lambda outputs, targets, *rest: honest(outputs, [t * 0 for t in targets], *rest)
    )
    longer = tiny("burn_stage1.yaml", tmp_path, "run.duration=6it")
    assert run(longer, resume=True, allow_changes=True)["step"] == 6


def test_a_frozen_part_that_nothing_loads_is_named(tmp_path, caplog):
    trainer_of(tiny("burn_stage1.yaml", tmp_path))
    assert "teacher is frozen and random: no entry of init loads it" in caplog.text


def test_init_from_a_damaged_or_unfinished_run(tmp_path, caplog):
    caplog.set_level("INFO", "burn")
    stage1 = tiny("burn_stage1.yaml", tmp_path)
    run(stage1)
    paths = sorted((stage1.folder / "checkpoints").iterdir())
    init = "init=[{from: %s, load: [student, student_head, teacher_head]}]"
    trainer_of(tiny("burn_stage2.yaml", tmp_path, init % paths[0]))
    assert "of an unfinished run, step 2 of 6" in caplog.text
    assert f"student starts from student of {paths[0]}" in caplog.text
    content = bytearray(paths[-1].read_bytes())
    content[len(content) // 2] ^= 1
    paths[-1].write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged, its content does not match"):
        trainer_of(tiny("burn_stage2.yaml", tmp_path, init % paths[-1]))


def test_resume_does_not_need_the_source_of_init_any_more(tmp_path):
    from engine.preflight import missing

    stage1 = tiny("burn_stage1.yaml", tmp_path)
    run(stage1)
    stage2 = tiny("burn_stage2.yaml", tmp_path, f"init=[{{from: {stage1.folder}, load: [student]}}]")
    run(stage2)
    shutil.rmtree(stage1.folder)
    assert missing(stage2) and not missing(stage2, resumes=True)


def test_data_that_does_not_fit_the_recipe(tmp_path, tree):
    files = ["data.backend=folder", "data.options={}", f"data.train={tree}", f"data.val={tree}", "data.workers=0"]
    with pytest.raises(DataError, match="24 images, the recipe expects 30; .*data.expect_images=24"):
        trainer_of(tiny("linear.yaml", tmp_path, *files, "data.expect_images=30"))
    with pytest.raises(DataError, match="3 classes, the recipe expects method.num_classes=4"):
        trainer_of(tiny("linear.yaml", tmp_path, *files))
    shutil.copytree(tree, tmp_path / "val")
    (tmp_path / "val" / "class0").rename(tmp_path / "val" / "other")
    with pytest.raises(DataError, match="classes differ"):
        trainer_of(tiny("linear.yaml", tmp_path, *files, f"data.val={tmp_path / 'val'}"))
    assert not (tmp_path / "linear").exists()


def test_metrics_rows_are_complete(tmp_path):
    recipe = tiny("quick/burn_stage2.yaml", tmp_path)
    run(recipe)
    lines = [json.loads(line) for line in (recipe.folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "evaluation" not in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    for name in (
        "loss", "kl", "feature", "lr", "balance", "grad_norm", "target_entropy", "target_entropy_of_mean", "target_std",
        "images_per_second", "data_wait", "memory_gib", "eta_seconds", "epoch", "images",
    ):  # fmt: skip
        assert all(np.isfinite(line[name]) for line in steps), name
    knn = [line for line in lines if line.get("evaluation") == "knn"]
    assert [line["step"] for line in knn] == [3, 6] and all(line["online"] for line in knn)
    assert recipes.load(recipe.folder / "recipe.yaml").hash == recipe.hash
    environment = json.loads((recipe.folder / "environment.json").read_text())
    assert environment["versions"]["torch"] == str(torch.__version__)
    assert list((recipe.folder / "tensorboard").iterdir())
