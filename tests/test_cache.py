"""Features of a frozen teacher, computed once for fixed views: the same views, the same features, and no others."""

import json
import shutil

import numpy as np
import pytest
import torch

import loaders
from engine import dist, teacher_cache
from engine import recipe as recipes
from engine.describe import describe
from engine.errors import RecipeError
from engine.preflight import missing
from engine.teacher_cache import Maker
from loaders import DataError, FeatureCache
from loaders.features import principal_components
from loaders.sampler import Stream
from loaders.synthetic_loader import noise
from tests.processes import run_ranks, tool
from tests.runs import assert_same_run, open_loader, run, trainer_of
from tests.tiny import ROOT, tiny

FIXED = ["data.fixed_views=2", "data.options.num_images=20", "data.eval_batch=8", "evals=[]", "run.save_every=1it"]


def recipe_of(folder, *more, path="quick/regress.yaml"):
    return tiny(path, folder, *FIXED, *more)


def make(recipe, out, components=None):
    maker = Maker(recipe, dist.start("cpu", 60))
    cache = maker.make(out, components)
    return maker, cache


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A cache of the tiny REG's teacher, 20 images in one view, two draws."""
    out = tmp_path_factory.mktemp("cache") / "features"
    maker, cache = make(recipe_of(out), out)
    assert maker.compare(out) < 1e-3  # through the loader of training
    return out, cache


def cached(folder, out, *more, **keys):
    return recipe_of(folder, f"data.teacher_cache={out}", *more, **keys)


# ------------------------------------------------------------------------------------------------ what is in it


def test_training_reads_the_features_of_its_very_views(made, tmp_path):
    out, cache = made
    assert cache.shape == (2, 20, 1, 8) and cache.is_complete
    trainer = trainer_of(cached(tmp_path, out))
    free = trainer_of(recipe_of(tmp_path / "free"))
    with_cache, without = open_loader(trainer), open_loader(free)
    teacher = trainer.method.teacher.eval()
    draws = set()
    for number in range(10):  # 80 images: four epochs, which straddle batches
        batch, plain = next(with_cache), next(without)
        assert torch.equal(batch.views[0], plain.views[0]) and plain.features is None
        with torch.no_grad():
            live = teacher(batch.views[0])
        assert batch.features.shape == (1, 8, 8) and batch.features.dtype == torch.float32
        assert torch.allclose(batch.features[0], live, atol=2e-3 * float(live.abs().max()))
        draws |= {(8 * number + place) // 20 % 2 for place in range(8)}
    assert draws == {0, 1}
    one, two = (torch.from_numpy(np.fromfile(out / "features", np.float16)).view(2, 20, 8).float()).unbind()
    assert not torch.allclose(one, two, atol=1e-3)  # two draws are two views
    with_cache.close(), without.close()


def test_fixed_views_in_another_order_are_those_of_training(tmp_path):
    trainer = trainer_of(recipe_of(tmp_path, path="quick/burn_stage1.yaml"))
    data, index = trainer.recipe.data, trainer.indices["train"]
    shown = {}
    loader = open_loader(trainer)
    for number in range(6):
        batch = next(loader)
        for place, row in enumerate(batch.rows.tolist()):
            shown[(8 * number + place) // 20 % 2, row] = [view[place] for view in batch.views]
    loader.close()
    fixed = loaders.open_fixed(data, index, [(1, range(20)), (0, [7, 3])], seed=trainer.recipe.seed)
    second, first = next(fixed), next(fixed)
    assert first.rows.tolist() == [7, 3] and len(list(fixed)) == 0
    compared = 0
    for draw, batch in ((1, second), (0, first)):
        for place, row in enumerate(batch.rows.tolist()):
            if (draw, row) in shown:
                compared += 1
                assert all(torch.equal(a, b[place]) for a, b in zip(shown[draw, row], batch.views, strict=True))
    assert compared == 22


def test_a_successor_brings_its_own_draw():
    stream = Stream(noise(6, 2, 8), recipes.load(ROOT / "recipes/quick/regress.yaml").data.views, 3, fixed_views=2)
    positions = [4, 5, 6, 13]
    epoch, image = stream.images(positions)
    assert stream.draws_of(positions, image).tolist() == (epoch % 2).tolist() == [0, 0, 1, 0]
    later, successor = stream.images([4, 7, 6, 13])  # the image at 5 and the one at 6 cannot be decoded
    if successor[1] not in (image[1], stream.images([6])[1][0]):
        assert stream.draws_of(positions, successor).tolist() == (later % 2).tolist() == [0, 1, 1, 0]
    else:
        pytest.fail("choose another seed: the successor is an image that cannot be decoded")


def test_components_keep_what_lies_in_them(tmp_path):
    torch.manual_seed(0)
    flat = torch.randn(50, 3) @ torch.randn(3, 9) + 5
    basis, kept = principal_components(flat, 3)
    assert kept == pytest.approx(1, abs=1e-9) and basis.shape == (4, 9)
    assert np.allclose(basis[1:] @ basis[1:].T, np.eye(3), atol=1e-5)
    assert principal_components(flat, 2)[1] < 0.999
    cache = FeatureCache.create(tmp_path / "c", {}, (1, 5, 10, 3), block=5, basis=basis)
    cache.write(0, torch.arange(5), flat.view(5, 10, 9))
    back = cache.features(cache.read(torch.arange(5), np.zeros(5, dtype=np.int64)))
    assert torch.allclose(back.transpose(0, 1).reshape(50, 9), flat, atol=0.01)
    with pytest.raises(DataError, match="do not fit 16 bits"):
        cache.write(0, torch.arange(1), torch.full((1, 10, 9), 1e6))
    cache.close()
    out = tmp_path / "few"
    maker, few = make(recipe_of(tmp_path), out, components=5)
    assert few.shape[3] == 5 and maker.compare(out) < 5e-3
    with pytest.raises(RecipeError, match=r"--components was 5, is 8"):
        make(recipe_of(tmp_path), out)
    with pytest.raises(RecipeError, match=r"--components: expected less than the 8"):
        make(recipe_of(tmp_path), tmp_path / "all", components=64)


# ------------------------------------------------------------------------------------------------ training with it


def test_the_teacher_is_not_run_and_resume_is_exact(made, tmp_path, monkeypatch):
    out, _ = made
    recipe = cached(tmp_path / "whole", out)
    assert "missing: nothing" in describe(recipe) and "would be refused" not in describe(recipe)
    assert "teacher " not in describe(recipe).split("forward of one view")[1]
    network = type(trainer_of(recipe).method.teacher)
    forward = network.forward

    def only_students(self, x):
        assert any(parameter.requires_grad for parameter in self.parameters()), "the teacher was run"
        return forward(self, x)

    monkeypatch.setattr(network, "forward", only_students)
    run(recipe)
    moved = tmp_path / "moved"
    shutil.copytree(out, moved)
    again = cached(tmp_path / "cut", moved)  # a copy is the same cache
    shutil.copytree(recipe.folder, again.folder)
    for later in sorted((again.folder / "checkpoints").iterdir())[2:]:
        later.unlink()
    run(again, resume=True)
    assert_same_run(recipe, again)
    with pytest.raises(RecipeError, match="fingerprint of data.teacher_cache was"):
        trainer_of(recipe_of(tmp_path / "cut"), resume=True)


@pytest.mark.parametrize(
    ("said", "more"),
    [
        ("seed was 0, is 1", ["seed=1"]),
        ("data.fixed_views was 2, is 3", ["data.fixed_views=3"]),
        ("data.views was", ["data.views.0.flip=0.5"]),
        ("data.mean was", ["data.mean=[0.5, 0.5, 0.5]"]),
        ("the fingerprint of data.train was", ["data.options.num_images=24"]),
        ("its network was", ["method.teacher.multiples=[1, 2, 4, 8]"]),
    ],
)
def test_a_wrong_cache_is_refused_by_name(made, tmp_path, said, more):
    out, _ = made
    with pytest.raises(RecipeError) as caught:
        trainer_of(cached(tmp_path, out, *more))
    assert f"data.teacher_cache: {out} is of others than this run: " in str(caught.value)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert said in describe(cached(tmp_path, out, *more)).split("would be refused:")[1]


def test_other_weights_are_refused(made, tmp_path, monkeypatch):
    out, _ = made
    recipe = cached(tmp_path, out)
    build = type(recipe.method).build

    def other(self):
        method = build(self)
        with torch.no_grad():
            next(method.teacher.parameters()).flatten()[0] += 1e-3
        return method

    monkeypatch.setattr(type(recipe.method), "build", other)
    with pytest.raises(RecipeError, match="the weights of its network was"):
        trainer_of(recipe)


def test_what_has_no_cacheable_teacher_is_refused(made, tmp_path):
    out, _ = made
    with pytest.raises(RecipeError, match=r"data\.teacher_cache: .* set method\.teacher_bn=eval"):
        cached(tmp_path, out, path="quick/burn_stage1.yaml")
    with pytest.raises(RecipeError, match=r"data\.teacher_cache: method byol learns from no frozen network"):
        cached(tmp_path, out, path="quick/byol.yaml")
    with pytest.raises(RecipeError, match=r"teacher_cache: expected fixed_views with it"):
        cached(tmp_path, out, "data.fixed_views=null")
    assert "data.teacher_cache: no folder" in str(missing(cached(tmp_path, tmp_path / "nothing"))[0])


def test_a_damaged_cache_is_refused(made, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(made[0], out)
    about = json.loads((out / "cache.json").read_text())
    about["done"][1][2] = 0
    (out / "cache.json").write_text(json.dumps(about))
    with pytest.raises(RecipeError, match=r"has 83 % of its features; finish it with"):
        trainer_of(cached(tmp_path, out))
    with open(out / "features", "r+b") as file:
        file.truncate(100)
    with pytest.raises(DataError, match=r"features: 100 bytes, expected 640"):
        trainer_of(cached(tmp_path, out))
    (out / "cache.json").write_text("{")
    with pytest.raises(DataError, match=r"cache\.json: cannot be read"):
        trainer_of(cached(tmp_path, out))
    with pytest.raises(DataError, match=r"no cache\.json there"):
        FeatureCache.open(tmp_path)


# ------------------------------------------------------------------------------------------------ making it


def on_ranks(folder, out):
    world = dist.start("cpu", 60)
    Maker(recipe_of(folder), world).make(out)
    dist.stop()


def test_ranks_share_the_work(made, tmp_path):
    assert run_ranks(2, on_ranks, tmp_path, tmp_path / "out") == [0, 0]
    one, two = (np.fromfile(path / "features", np.float16) for path in (made[0], tmp_path / "out"))
    assert np.array_equal(one, two)
    cache = FeatureCache.open(tmp_path / "out")
    assert cache.is_complete and cache.identity != made[1].identity
    cache.close()


def test_it_goes_on_where_it_was_stopped(made, tmp_path, monkeypatch):
    out, written, write = tmp_path / "out", [], FeatureCache.write
    monkeypatch.setattr(teacher_cache, "BLOCKS", 1)

    def stopped(self, draw, rows, features):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append((draw, rows.tolist()))
        write(self, draw, rows, features)

    monkeypatch.setattr(FeatureCache, "write", stopped)
    with pytest.raises(KeyboardInterrupt):
        make(recipe_of(tmp_path), out)
    half = FeatureCache.open(out)
    assert half.done.sum() == 2 and not half.is_complete
    half.close()
    with pytest.raises(RecipeError, match=r"holds other features: seed was 0, is 5; .*; give another folder"):
        make(recipe_of(tmp_path, "seed=5"), out)
    monkeypatch.setattr(FeatureCache, "write", lambda *given: (written.append(given[1:3]), write(*given)))
    make(recipe_of(tmp_path), out)
    assert len(written) == 6  # none of the six blocks twice
    assert (out / "features").read_bytes() == (made[0] / "features").read_bytes()


def test_the_tool(tmp_path, monkeypatch, capsys):
    recipe = ROOT / "recipes/quick/regress.yaml"
    (tmp_path / "r.yaml").write_text(recipe_of(tmp_path).dump())
    arguments = ["cache_teacher.py", str(tmp_path / "r.yaml"), str(tmp_path / "out"), "--views", "1"]
    monkeypatch.setattr("sys.argv", [*arguments, "data.options.num_images=16"])
    assert tool("cache_teacher").main() == 0
    said = capsys.readouterr().out
    assert "100.0 % of 1 x 16 images in 1 views" in said and "16 bytes an image" in said and "s left" in said
    monkeypatch.setattr("sys.argv", ["cache_teacher.py", str(recipe), str(tmp_path / "x"), "--views", "1"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=r"data\.train: no folder .*; init\.0\.from: .*quick_moco"):
        tool("cache_teacher").main()
    assert not (tmp_path / "x").exists()
