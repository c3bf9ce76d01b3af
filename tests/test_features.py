"""Features in hand (engine/features.py, tools/embed.py) and networks measured again (tools/evaluate.py)."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import loaders
from engine import dist, evals, features
from engine.errors import CheckpointError, RecipeError
from engine.export import export
from engine.features import Features, data_of, extract
from engine.recipe import EvalConfig
from engine.trained import hash_of, open_trained
from models import weights
from models.contract import LAYERS, windows
from models.reactnet import Config, ReActNet
from models.resnet import Config as ResNetConfig
from tests.images import jpeg, picture, write_tree
from tests.processes import run_ranks, tool
from tests.runs import rows, run
from tests.tiny import tiny

SMALL = ["data.eval_view={crop: center, size: 32, resize: 36}", "data.eval_batch=5", "data.workers=0"]
SHORT = ("run.duration=1it", "evals=[]")
TINY = {"width": 2, "multiples": (1, 2, 4, 4)}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A published file of a binary network with a classifier for three classes."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("published") / "net.pth"
    torch.save(weights.published(ReActNet(Config(**TINY)).state_dict(), torch.nn.Linear(8, 3).state_dict()), path)
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Pictures in three class folders, one of them cut short."""
    root = write_tree(tmp_path_factory.mktemp("photos"), count=14)
    (root / "class1" / "0004.jpg").write_bytes((root / "class1" / "0004.jpg").read_bytes()[:700])
    return root


@pytest.fixture(scope="module")
def floating(tmp_path_factory):
    """A run of a floating-point network: its features do not depend on how images share batches."""
    recipe = tiny("quick/moco.yaml", tmp_path_factory.mktemp("runs"), *SHORT)
    run(recipe)
    return recipe.folder


def opened(path, photos, *changes):
    trained = open_trained(path)
    data = data_of(trained, [*SMALL, *changes], val=photos)
    return trained, data, loaders.open_root(data, str(photos))


# ------------------------------------------------------------------------------------------------ layers


def test_the_map_in_four_windows():
    ramp = torch.arange(49.0, dtype=torch.float64).view(1, 1, 7, 7)
    assert windows(ramp).tolist() == [[20, 21, 27, 28]]
    two = torch.cat((ramp, -ramp), dim=1)
    assert windows(two).tolist() == [[20, 21, 27, 28, -20, -21, -27, -28]]  # a channel side by side
    assert windows(torch.tensor([[[[3.0]], [[4.0]]]])).tolist() == [[3, 4]]
    assert windows(torch.arange(4.0).view(1, 1, 2, 2)).tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("config", [Config(**TINY), ResNetConfig(arch="resnet18", stem="small")], ids=lambda c: c.arch)
def test_layers_of_a_network(config):
    network, images = config.build().double().eval(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        last = network.map(images)
        found = {layer: network.layer(layer, images) for layer in LAYERS}
        assert torch.equal(found["features"], network(images)) and torch.equal(found["map"], windows(last))
        assert torch.allclose(found["pooled"], last.mean(dim=(2, 3)), atol=1e-12)
    assert found["map"].shape == (2, 4 * network.out_channels)
    assert torch.equal(found["features"], found["pooled"]) != config.has_fc


# ------------------------------------------------------------------------------------------------ extraction


def test_features_are_those_of_the_network_in_the_order_of_the_index(floating, photos, caplog):
    trained, data, index = opened(floating, photos)
    for layer in ("features", "map"):
        found = extract(trained, data, index, layer=layer)
        assert found.rows.tolist() == [row for row in range(14) if not index.path(row).endswith("0004.jpg")]
        assert found.images == 14 and found.left_out == 1 and found.classes == ("class0", "class1", "class2")
        assert found.array.dtype == np.float32 and found.label.tolist() == index.label[found.rows].tolist()
        assert found.names[0] == "class0/0000.jpg" and list(found.names) == sorted(found.names)
    said = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert said and "1 of 14 images are left out, the first is " in said[0] and "class1/0004.jpg: " in said[0]
    loader = loaders.open_eval(data, index, rows=[3, 9])
    images = next(loader).views[0]
    loader.close()
    expected = trained.backbone.layer("map", images).numpy()
    places = [found.rows.tolist().index(row) for row in (3, 9)]
    assert np.allclose(found.array[places], expected, atol=1e-5) and not np.allclose(expected[0], expected[1])
    part = extract(trained, data, index, layer="map", rows=[3, 4, 9])
    assert part.rows.tolist() == [3, 4, 9] and np.allclose(part.array[[0, 2]], expected, atol=1e-5)
    assert part.hash != found.hash


def test_none_that_can_be_decoded_is_one_line(published, tmp_path):
    root = write_tree(tmp_path / "broken", count=3)
    trained, data, index = opened(published, root)
    for path in root.rglob("*.jpg"):
        path.write_bytes(b"no image")
    with pytest.raises(loaders.DataError, match="none of its 3 images can be decoded"):
        extract(trained, data, index)


def test_the_cache_is_of_these_weights_images_view_and_layer(published, photos, tmp_path, monkeypatch, caplog):
    trained, data, index = opened(published, photos)
    cache = tmp_path / "new" / "cache"
    first = extract(trained, data, index, cache=cache)
    (path,) = cache.iterdir()
    assert path.name == f"features-{first.hash}.npz"
    extracted = []
    honest = features.batches
    monkeypatch.setattr(features, "batches", lambda *a, **k: extracted.append(1) or honest(*a, **k))
    again = extract(trained, data, index, cache=cache)
    assert not extracted and np.array_equal(again.array, first.array) and again.of == first.of
    assert (list(again.names), again.classes, again.images) == (list(first.names), first.classes, first.images)
    assert again.label.tolist() == first.label.tolist() and again.rows.tolist() == first.rows.tolist()

    other = open_trained(published)
    other.backbone.stem[1].running_mean += 1
    view = data_of(trained, [*SMALL, "data.eval_view.resize=32"], val=photos)
    std = data_of(trained, [*SMALL, "data.std=[1, 1, 1]"], val=photos)
    changed = [(other, data, index, {}), (trained, view, index, {}), (trained, std, index, {})]
    changed += [(trained, data, index, {"layer": "pooled"}), (trained, data, index.take(np.arange(5)), {})]
    found = [extract(*three, **keys, cache=cache) for *three, keys in changed]
    hashes = {one.hash for one in found}
    assert len(hashes | {first.hash}) == 6 == len(list(cache.iterdir())) and len(extracted) == 5

    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[whole.index(first.array.tobytes()) + 5] ^= 1
    wrong = (cache / f"features-{found[3].hash}.npz").read_bytes()
    np.savez(cache / "pickled.npz", features=np.array([{}], dtype=object))
    for number, content in enumerate(
        (whole[:-9], damaged, b"", b"text", wrong, (cache / "pickled.npz").read_bytes()), 6
    ):
        path.write_bytes(content)
        assert np.array_equal(extract(trained, data, index, cache=cache).array, first.array)
        assert len(extracted) == number and Features.load(path).of == first.of, content[:9]
        assert any("made anew" in record.getMessage() for record in caplog.records)
        caplog.clear()


def test_the_hash_of_a_network_is_of_what_it_computes():
    network = ReActNet(Config(**TINY))
    as_it_was = hash_of(network)
    network.blocks[0].norm1.num_batches_tracked += 1
    assert hash_of(network) == as_it_was == hash_of(network.to(memory_format=torch.channels_last))
    for keys, same in (({"estimator": "reactnet"}, True), ({"weights": "real"}, False), ({"stem_stride": 1}, False)):
        other = ReActNet(Config(**TINY, **keys))
        other.load_state_dict(network.state_dict())
        assert (hash_of(other) == as_it_was) == same, keys
    network.blocks[0].norm1.bias.data[0] += 1e-6
    assert hash_of(network) != as_it_was


def test_what_cannot_be_extracted_is_one_line(published, photos):
    trained = open_trained(published)
    for changes, text in (
        (["data.eval_view.sise=3"], r"data\.eval_view\.sise: unknown key, did you mean 'size'"),
        (["data.eval_view={crop: random, size: 32}"], "expected crop: center or whole"),
        (["run.amp=off"], r"override 'run\.amp=off': expected data\.key=value"),
        (["data.backend=turob"], "data.backend: unknown value 'turob'"),
    ):
        with pytest.raises(RecipeError, match=text) as caught:
            data_of(trained, changes, val=photos)
        assert "\n" not in str(caught.value)
    with pytest.raises(RecipeError, match=r"data\.eval_view\.size: image side 33 does not fit ReActNet"):
        features.check(trained, "features", 33)


def test_the_nearest_of_all_others_by_cosine():
    array = np.array([[1, 0], [2, 0.1], [0, 3], [-1, 0], [5, 5]], dtype=np.float32)
    found, distance = features.nearest(array, [0, 2], 8)
    assert found.tolist() == [[1, 4, 2, 3], [4, 1, 0, 3]] or found.tolist() == [[1, 4, 2, 3], [4, 1, 3, 0]]
    assert np.allclose(distance[0], [1 - 2 / np.hypot(2, 0.1), 1 - 2**-0.5, 1, 2], atol=1e-6)


# ------------------------------------------------------------------------------------------------ packed networks


@pytest.mark.parametrize("view", ["{crop: center, size: 32, resize: 36}", "{preset: whole, size: 32}"])
def test_a_packed_network_is_opened_as_any_other(view, tmp_path, photos):
    recipe = tiny("quick/supervised.yaml", tmp_path, *SHORT, f"data.eval_view={view}")
    run(recipe)
    trained = open_trained(recipe.folder)
    export(trained, tmp_path / "net.bnn", force=True)
    packed = open_trained(tmp_path / "net.bnn")
    assert packed.view == trained.view and packed.mean == trained.mean and packed.classes == trained.classes != ()
    index = loaders.open_root(data_of(packed, val=photos), str(photos))
    one, other = (extract(net, data_of(net, val=photos), index) for net in (trained, packed))
    likeness = (
        (one.array * other.array).sum(1) / np.linalg.norm(one.array, axis=1) / np.linalg.norm(other.array, axis=1)
    )
    assert np.median(likeness) > 0.99 and one.hash != other.hash
    images = torch.randn(4, 3, 32, 32)
    expected = packed.backbone.runtime.run(images.numpy())
    assert np.allclose(packed.network(images).numpy(), expected, atol=1e-4)
    with pytest.raises(RecipeError, match=r"net\.bnn: has no layer 'map', expected one of features"):
        features.check(packed, "map", 32)
    with pytest.raises(RecipeError, match="image side 64 does not fit, the network is packed for 32"):
        features.check(packed, "features", 64)
    with pytest.raises(CheckpointError, match="has no network 'teacher', a packed one has no parts"):
        open_trained(tmp_path / "net.bnn", part="teacher")
    content = (tmp_path / "net.bnn").read_bytes()
    (tmp_path / "cut.bnn").write_bytes(content[:-100])
    with pytest.raises(CheckpointError, match=r"cut\.bnn: ") as caught:
        open_trained(tmp_path / "cut.bnn")
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------ tools/embed.py


def call(monkeypatch, name, *arguments):
    """Exit code of a tool in this process."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        dist.leave(tool(name).main)
    return left.value.code


def embed_each(source, roots, out):
    options = {"changes": ["data.eval_batch=3", "data.workers=0"], "layer": "map", "device": "cpu"}
    for root in roots:
        tool("embed").embed(open_trained(source), root, out / f"{root.name}.npz", **options)


def test_two_ranks_write_what_one_writes(floating, photos, tmp_path):
    roots = [photos, write_tree(tmp_path / "few", count=1, classes=1)]  # fewer than ranks
    embed_each(floating, roots, tmp_path / "1")
    assert run_ranks(2, embed_each, floating, roots, tmp_path / "2") == [0, 0]
    for root, count in zip(roots, (13, 1), strict=True):
        one, two = (Features.load(tmp_path / ranks / f"{root.name}.npz") for ranks in "12")
        assert np.array_equal(one.rows, two.rows) and list(one.names) == list(two.names) and one.of == two.of
        assert len(one.rows) == count and np.allclose(one.array, two.array, atol=1e-5)
        assert np.array_equal(one.label, two.label)


def test_features_and_a_sheet_from_the_command_line(published, photos, tmp_path, monkeypatch, capsys):
    flat = tmp_path / "flat"
    flat.mkdir()
    for number in range(5):
        (flat / f"{number}.jpg").write_bytes(jpeg(Image.fromarray(picture(number, 50, 70))))
    (flat / "caf\xe9 \u4e16.jpg").write_bytes(jpeg(Image.fromarray(picture(1, 50, 70))))  # a copy of 1
    out, sheet = tmp_path / "new" / "f.npz", tmp_path / "new" / "similar"
    assert call(monkeypatch, "embed", published, flat, out, *SMALL, "--neighbors", sheet, "--queries", 3) == 0
    said = capsys.readouterr().out
    assert f"{out}: features of 6 images, 8 numbers each\n" in said and f"{sheet}: images with" in said
    assert Image.open(sheet).size[0] > 500 and np.array(Image.open(sheet)).std() > 10
    with np.load(out, allow_pickle=False) as file:
        assert file["features"].shape == (6, 8) and file["features"].dtype == np.float32
        assert file["names"].tolist() == ["0.jpg", "1.jpg", "2.jpg", "3.jpg", "4.jpg", "caf\xe9 \u4e16.jpg"]
        assert (file["label"] == -1).all() and len(file["classes"]) == 0
        of = json.loads(str(file["of"]))
        assert of["layer"] == "features" and of["view"]["size"] == 32
        assert of["weights"] == hash_of(open_trained(published).backbone)
        found, distance = features.nearest(file["features"], [5], 1)
    assert found.tolist() == [[1]] and abs(distance[0, 0]) < 1e-6

    listed = tmp_path / "some.txt"
    listed.write_text(f"{photos}/class2/0002.jpg b\n{photos}/class0/0000.jpg a\n")
    whole = ["data.eval_view={preset: whole, size: 32}", "--layer", "pooled"]
    assert call(monkeypatch, "embed", published, listed, out, *whole) == 0
    got = Features.load(out)
    assert got.label.tolist() == [1, 0] and got.classes == ("a", "b") and got.of["view"]["crop"] == "whole"


@pytest.mark.parametrize("what", ["part", "photos", "one", "side"])
def test_embeddings_that_cannot_be_made_are_one_line(what, published, photos, tmp_path, monkeypatch, capsys):
    out, one = tmp_path / "f.npz", write_tree(tmp_path / "one", count=1)
    arguments, text = {
        "part": ([published, photos, out, "--part", "teacher"], "has no network 'teacher', expected one of student"),
        "photos": ([published, tmp_path / "nowhere", out], "nowhere: no such folder"),
        "one": ([published, one, out, *SMALL, "--neighbors", tmp_path / "s.png"], "is the only image"),
        "side": ([published, photos, out, "data.eval_view.size=42"], "data.eval_view.size: image side 42"),
    }[what]
    assert call(monkeypatch, "embed", *arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and text in said and said.count("\n") == 1


# ------------------------------------------------------------------------------------------------ evaluations


def four(root, names="aaab"):
    """Four pictures, three of them of one class."""
    for number, name in enumerate(names):
        (root / name).mkdir(parents=True, exist_ok=True)
        (root / name / f"{number}.jpg").write_bytes(jpeg(Image.fromarray(picture(number, 40, 40))))
    return root


def test_the_mean_recall_of_classes(published, tmp_path):
    trained, data, index = opened(published, four(tmp_path / "four"), "data.eval_batch=3")
    answers = iter([[0, 0, 1], [1]])  # of labels 0, 0, 0 and 1

    def scores(images):
        return torch.nn.functional.one_hot(torch.tensor(next(answers)), 2).double()

    config, world = EvalConfig(kind="accuracy"), features.ALONE
    found = evals.measure(config, scores, trained.backbone, data, {"val": index}, world)
    assert list(found) == ["top1", "top5", "per_class", "measured"]
    assert found["top1"] == 75 and found["top5"] == 100 and found["measured"] == 4
    assert found["per_class"] == pytest.approx(83.333333333333, abs=1e-11)
    # A class without images counts for nothing.
    assert evals.recall(torch.tensor([2.0, 0.0, 1.0]), torch.tensor([3.0, 0.0, 1.0])) == found["per_class"]


def test_a_run_measured_again_has_the_numbers_of_its_last_step(tmp_path, monkeypatch, capsys):
    kinds = "evals=[{kind: accuracy, every: 100%}, {kind: knn, every: 100%, neighbors: 5, bank: 30}, "
    kinds += "{kind: ridge, every: 100%, bank: 30}]"
    recipe = tiny("quick/supervised.yaml", tmp_path, "run.duration=2it", kinds)
    run(recipe)
    expected = {row["evaluation"]: row for row in rows(recipe) if "evaluation" in row}
    for kind, options in (("accuracy", []), ("knn", ["--kind", "knn", "--neighbors", 5, "--bank", 30]),
                          ("ridge", ["--kind", "ridge", "--bank", 30])):  # fmt: skip
        assert call(monkeypatch, "evaluate", recipe.folder, *options) == 0
        said = capsys.readouterr().out
        found = json.loads(said)
        assert said.count("\n") == 1 and found["kind"] == kind and found["images"] == 16
        for name in ("top1", "per_class", "measured", *(["top5"] if kind == "accuracy" else [])):
            assert found[name] == expected[kind][name], name
        assert found["view"]["size"] == 32 and found["step"] == 2 and len(found["weights"]) == 16


def test_other_images_are_measured_where_their_classes_are_those_of_the_network(tmp_path, monkeypatch, capsys):
    train = write_tree(tmp_path / "train", count=20)
    files = ["data.backend=folder", "data.options={}", "data.workers=0", "method.num_classes=3"]
    recipe = tiny("quick/supervised.yaml", tmp_path, *files, f"data.train={train}", f"data.val={train}", *SHORT)
    run(recipe)
    other = write_tree(tmp_path / "other", count=7)
    assert call(monkeypatch, "evaluate", recipe.folder, f"data.val={other}", "data.workers=0") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["measured"] == 7 and found["data"] == {"val": str(other)}
    listed, reordered = tmp_path / "two.txt", tmp_path / "named"
    listed.write_text(f"{other}/class0/0000.jpg class0\n{other}/class1/0001.jpg class1\n")
    for number, name in enumerate(("class0", "class1", "klass2")):
        (reordered / name).mkdir(parents=True)
        (reordered / name / "x.jpg").write_bytes(jpeg(Image.fromarray(picture(number, 40, 40))))
    for root, options, text in (
        (listed, [], "its 2 classes differ from the 3 of"),
        (reordered, [], "only the first has klass2; only the second has class2"),
        (listed, ["--kind", "knn"], f"its 2 classes differ from the 3 of {train}: only the second has class2"),
        (tmp_path / "nowhere", [], "nowhere: no such folder"),
    ):
        assert call(monkeypatch, "evaluate", recipe.folder, f"data.val={root}", *options) == 2
        said = capsys.readouterr()
        assert not said.out and text in said.err and said.err.count("\n") == 1, said.err


def test_a_published_classifier_is_measured(published, photos, tmp_path, monkeypatch, capsys):
    assert call(monkeypatch, "evaluate", published, f"data.val={photos}", *SMALL) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert found["measured"] == 13 and found["images"] == 14 and found["kind"] == "accuracy"
    assert "does not say what its 3 classes are" in said.err
    trained, data, index = opened(published, photos)
    hits = 0
    for batch in features.batches(data, index, None, features.ALONE):
        hits += int((trained.network(batch.views[0]).argmax(1) == batch.label).sum())
    assert found["top1"] == pytest.approx(100 * hits / 13) and found["weights"] == hash_of(trained.network)
    assert call(monkeypatch, "evaluate", published, f"data.val={four(tmp_path / 'four')}") == 2
    assert "four: 2 classes, the classifier of" in capsys.readouterr().err
    assert (
        call(monkeypatch, "evaluate", published, "--part", "student", "--kind", "accuracy", f"data.val={photos}") == 2
    )
    assert "has no classifier to measure, expected --kind knn or ridge" in capsys.readouterr().err
    assert call(monkeypatch, "evaluate", published) == 2
    assert "data.val: not set" in capsys.readouterr().err


def test_long_work_says_how_far_it_is_and_what_is_left(monkeypatch, caplog):
    from engine import log

    now = [0.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: now[0])
    progress = log.Progress("photos", 1000, "images", every=10.0)
    for second, done in ((9, 100), (10, 250), (19, 400), (50, 999), (70, 1000)):
        now[0] = second
        with caplog.at_level("INFO", logger="burn"):
            progress.update(done)
    assert [record.getMessage() for record in caplog.records] == [
        "photos: 250 of 1,000 images, 25/s, 30s left",
        "photos: 999 of 1,000 images, 20/s, 0s left",
    ]
