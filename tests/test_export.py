"""From a run folder to one packed file: equal to PyTorch, or refused in one line. And `python -m runtime`."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import loaders
from engine import checkpoint, export, openvino
from engine import recipe as recipes
from engine.errors import ExportError
from engine.trained import open_trained, reestimated
from loaders import DataError
from loaders.host import read_picture
from loaders.views import View
from models import fold, weights
from models.reactnet import Config, ReActNet
from models.resnet import Config as ResNetConfig
from runtime import Runtime, bnn, reference
from runtime import __main__ as command
from tests.images import gray_tiffs, odd_files, picture, write_tree
from tests.packed import random_images, random_network
from tests.processes import PATIENCE, tool
from tests.runs import run
from tests.tiny import ROOT, tiny

SHORT = ("run.duration=2it", "run.save_every=1it", "evals=[]")


@pytest.fixture(scope="module", autouse=True)
def hurried():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "SECONDS", 0)
        patch.setattr(command, "SECONDS", 0.1)
        yield


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A run with a classifier on images of files."""
    folder = tmp_path_factory.mktemp("classifier")
    root = write_tree(folder / "images", count=32, classes=4)
    names = [f"data.{split}={root}" for split in ("train", "val")]
    recipe = tiny("quick/supervised.yaml", folder, *SHORT, "run.duration=12it", "run.save_every=6it", *names,
                  "data.backend=folder", "data.options={}", "data.workers=0", "schedules.lr=0.01")  # fmt: skip
    run(recipe)
    return recipe


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    recipe = tiny("quick/burn_stage2.yaml", tmp_path_factory.mktemp("pretrained"), *SHORT)
    run(recipe)
    return recipe


def validation(trained):
    """All validation images: as pixels, and as the loader hands them to the network."""
    data = trained.recipe.data
    batches = list(loaders.open_eval(data, loaders.open_data(data, "val")))
    return export.images_of(trained, 1000)[0], torch.cat([batch.views[0] for batch in batches])


def spread(scores):
    return scores.max(1, keepdims=True) - scores.min(1, keepdims=True)


@pytest.mark.parametrize(("linear", "near"), [("float32", 1e-4), ("float16", 5e-3), ("int8", 5e-2)])
def test_the_file_gives_the_scores_of_the_network(linear, near, classifier, tmp_path):
    trained = open_trained(classifier.folder)
    report = export.export(trained, tmp_path / "net.bnn", linear=linear)
    assert (report.images, report.agreed, report.agreement) == (32, 32, 1.0) and report.undecided == 0
    assert report.layer_difference < 1e-5 and report.output_difference < near
    content = (tmp_path / "net.bnn").read_bytes()
    assert report.bytes == len(content) == sum(report.bytes_of.values())
    pixels, images = validation(trained)
    network, expected = bnn.read(content), trained.network(images).numpy()
    for given in (pixels, images.numpy()):
        got = reference.run(network, given)
        assert (np.abs(got - expected) / spread(expected)).max() < near
        assert (got.argmax(1) == expected.argmax(1)).all()
    assert network.metadata["classes"] == [f"class{number}" for number in range(4)]
    assert network.metadata["step"] == 12 and network.side == 32 and network.outputs == 4


def test_bytes_become_the_floats_of_the_loader(classifier, tmp_path):
    trained = open_trained(classifier.folder)
    export.export(trained, tmp_path / "net.bnn")
    pixels, images = validation(trained)
    stem = bnn.read(tmp_path / "net.bnn").layers[0]
    assert np.array_equal(reference.pixels(stem, pixels), images.numpy())


@pytest.mark.parametrize(
    "keys",
    [
        ["method.trains=pre-fc", "method.standardize=true"],
        ["method.backbone.pooled_mlp=false", "method.backbone.stem_stride=1"],
    ],
    ids=lambda keys: ",".join(keys),
)
def test_every_kind_of_classifier_is_packed(keys, tmp_path):
    recipe = tiny("quick/supervised.yaml", tmp_path, *SHORT, *keys)
    run(recipe)
    trained = open_trained(recipe.folder)
    report = export.export(trained, tmp_path / "net.bnn", linear="float32")
    assert report.agreement == 1 and report.output_difference < 1e-3
    assert bnn.read(tmp_path / "net.bnn").metadata["classes"] == list(trained.classes)


def test_pre_training_gives_features(pretrained, tmp_path):
    trained = open_trained(pretrained.folder)
    report = export.export(trained, tmp_path / "net.bnn")
    assert report.agreement == 1 and report.part == "student" and report.images_from.startswith("data.val")
    network = bnn.read(tmp_path / "net.bnn")
    pixels, images = validation(trained)
    assert network.outputs == trained.backbone.out_channels and network.metadata["classes"] == []
    assert network.feature_layers == len(network.layers)
    assert np.allclose(reference.run(network, pixels), trained.network(images).numpy(), rtol=0, atol=1e-2)


# ------------------------------------------------------------------------------------------------ refusals


def refused(trained, path, match, **options):
    before = path.read_bytes() if path.exists() else None
    with pytest.raises(ExportError, match=match) as caught:
        export.export(trained, path, **options)
    assert "\n" not in str(caught.value) and str(trained.source) in str(caught.value)
    assert (path.read_bytes() if path.exists() else None) == before
    assert [found.name for found in path.parent.iterdir() if found.name.startswith(".")] == []


@pytest.mark.parametrize("name", ["a", "b", "slope", "shift", "threshold"])
def test_a_layer_that_is_folded_wrongly_is_refused(name, classifier, tmp_path, monkeypatch):
    right = export.fold

    def wrong(*arguments, **options):
        folded = right(*arguments, **options)
        folded.layers[2].arrays[name] *= np.float32(1.5)
        folded.layers[2].arrays[name] += np.float32(0.1)
        return folded

    monkeypatch.setattr(export, "fold", wrong)
    number = 3 if name == "threshold" else 2  # which only the next layer reads
    refused(open_trained(classifier.folder), tmp_path / "net.bnn", f"layer {number} differs from PyTorch's")


def test_other_answers_are_refused_and_forced(classifier, tmp_path, monkeypatch):
    trained, path = open_trained(classifier.folder), tmp_path / "net.bnn"
    path.write_bytes(b"an older one")
    right = export.Runtime.run
    monkeypatch.setattr(export.Runtime, "run", lambda self, images: -right(self, images))
    refused(trained, path, "32 of 32 images get another answer than in PyTorch .margins .*--force")
    report = export.export(trained, path, force=True)
    assert report.agreement == 0 and len(report.disagreements) == 32 and path.read_bytes() != b"an older one"
    first = report.disagreements[0]
    assert first.image == 0 and first.pytorch != first.packed and 0 <= first.margin <= 1


def test_kernels_that_are_not_there_are_one_line(classifier, tmp_path, monkeypatch):
    monkeypatch.setenv("BNN_KERNELS", "foo")
    refused(
        open_trained(classifier.folder), tmp_path / "net.bnn", "cannot be run here: (kernels 'foo'|the compiled core)"
    )


def test_images_on_which_pytorch_disagrees_with_itself_do_not_count(classifier, tmp_path, monkeypatch):
    right = export.Runtime.run
    monkeypatch.setattr(export.Runtime, "run", lambda self, images: -right(self, images))
    monkeypatch.setattr(export, "_same_classes", lambda a, b: torch.zeros(len(a), dtype=torch.bool))
    report = export.export(open_trained(classifier.folder), tmp_path / "net.bnn")
    assert report.undecided == report.images == 32 and report.agreement is None


def published(path, network, classifier=None):
    torch.save(weights.published(network.state_dict(), classifier), path)
    return open_trained(path)


def test_what_cannot_be_packed_is_one_line(pretrained, tmp_path):
    path = tmp_path / "net.bnn"
    refused(open_trained(pretrained.folder, part="teacher"), path, "weights: real: .*export a stage 2 run")
    torch.save(ResNetConfig(arch="resnet18").build().state_dict(), tmp_path / "resnet.pth")
    refused(open_trained(tmp_path / "resnet.pth"), path, "ResNet: only a ReActNet can be packed")
    refused(published(tmp_path / "deep.pth", ReActNet(Config(width=2, multiples=(1, 2, 4, 8, 16, 32, 64)))), path,
            "image side 224 does not fit ReActNet")  # fmt: skip
    network = ReActNet(Config(width=2))
    network.blocks[3].norm1.running_mean[0] = float("nan")
    refused(published(tmp_path / "nan.pth", network), path, "not finite")


def test_weights_of_exactly_zero(tmp_path, monkeypatch):
    network = ReActNet(Config(width=2))
    with torch.no_grad():
        network.blocks[5].conv3x3.weight[0, :2] = 0
    trained, path = published(tmp_path / "net.pth", network), tmp_path / "net.bnn"
    refused(trained, path, "18 of .* binary weights are exactly 0")
    monkeypatch.setattr(fold, "ONE_ZERO_IN", 1)
    report = export.export(trained, path)
    assert report.zero_weights == 18 and report.images_from == "noise" and report.agreement is None
    assert report.images == 0 and bnn.read(path).metadata["zero_weights"] == 18


def test_a_sign_on_its_threshold_is_no_difference(tmp_path):
    network = ReActNet(Config(width=2))
    with torch.no_grad():
        network.stem[0].weight[0] = 0
        network.stem[1].bias[0] = 0.5
        network.blocks[0].shift1.bias[0, 0] = -0.5
    report = export.export(published(tmp_path / "net.pth", network), tmp_path / "net.bnn")
    assert report.layer_difference < 1e-5


# ------------------------------------------------------------------------------------------------ tools/export.py


def exported(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["export.py", *map(str, arguments)])
    return tool("export").main()


def test_the_command_writes_and_reports(classifier, tmp_path, monkeypatch, capsys):
    out, report = tmp_path / "new/net.bnn", tmp_path / "new/report.json"
    code = exported(monkeypatch, classifier.folder, out, "--checkpoint", 6, "--check", 8, "--json", report)
    said = capsys.readouterr().out
    assert code == 0 and "8 of 8 images alike" in said and "15.0 times" not in said
    found = json.loads(report.read_text())
    assert found["sha256"] in said and found["agreement"] == 1 and found["images"] == 8 and found["linear"] == "float16"
    assert bnn.read(out).metadata["step"] == 6


def test_the_command_refuses_in_one_line(pretrained, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    net = tmp_path / "net.bnn"
    for arguments, text in (
        ((pretrained.folder, net, "--part", "teacher"), "cannot be packed"),
        ((pretrained.folder, net, "--part", "head"), "no network 'head', expected one of student, teacher"),
        ((pretrained.folder, net, "--checkpoint", "3"), "found 1, 2"),
        ((tmp_path / "empty", net), "found none yet"),
        ((tmp_path / "nothing", net), "no such file"),
        ((pretrained.folder, tmp_path / "empty"), "is a folder"),
    ):
        assert exported(monkeypatch, *arguments) == 2
        said = capsys.readouterr()
        assert said.err.splitlines()[-1].startswith("error: ") and text in said.err and "Traceback" not in said.err
        assert not net.exists() and said.out == ""
    with pytest.raises(SystemExit) as left:
        exported(monkeypatch, pretrained.folder, net, "--check", "0")
    assert left.value.code == 2


def test_batch_norm_may_be_estimated_anew_before(classifier, tmp_path, monkeypatch, capsys):
    plain, again = tmp_path / "plain.bnn", tmp_path / "again.bnn"
    assert exported(monkeypatch, classifier.folder, plain) == 0
    assert exported(monkeypatch, classifier.folder, again, "--precise-bn", "8") == 0
    trained = open_trained(classifier.folder)
    anew = reestimated(trained, 8)
    export.export(anew, tmp_path / "same.bnn")
    assert plain.read_bytes() != again.read_bytes() == (tmp_path / "same.bnn").read_bytes()
    for (name, ours), theirs in zip(trained.network.named_parameters(), anew.network.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    stem = anew.backbone.stem
    loader = loaders.open_train(trained.recipe.data, loaders.open_data(trained.recipe.data, "train"), seed=0)
    seen = [stem[0](batch.views[0]) for _, batch in zip(range(8), loader, strict=False)]
    assert torch.allclose(stem[1].running_mean, torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0), atol=1e-5)
    with pytest.raises(checkpoint.CheckpointError, match="names no training images"):
        reestimated(dataclasses.replace(trained, recipe=None), 8)


def test_safetensors_are_the_same_network(classifier, tmp_path, monkeypatch, capsys):
    pytest.importorskip("safetensors")
    out = tmp_path / "a.safetensors"
    assert exported(monkeypatch, classifier.folder, tmp_path / "a.bnn", "--safetensors", out) == 0
    assert "under their published names" in capsys.readouterr().out
    ours, theirs = open_trained(classifier.folder).network.state_dict(), open_trained(out).network.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_what_standardizes_features_is_part_of_the_classifier_of_safetensors(tmp_path):
    pytest.importorskip("safetensors")
    recipe = tiny("quick/linear.yaml", tmp_path, *SHORT, "method.trains=pre-fc")
    run(recipe)
    trained = open_trained(recipe.folder)
    export.write_safetensors(trained, tmp_path / "a.safetensors")
    images = torch.randn(4, 3, 32, 32)
    assert torch.allclose(open_trained(tmp_path / "a.safetensors").network(images), trained.network(images), atol=1e-5)


def test_without_its_package_safetensors_are_refused(classifier, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(weights, "missing_safetensors", lambda: "the package safetensors is not installed")
    out = tmp_path / "net.bnn"
    assert exported(monkeypatch, classifier.folder, out, "--safetensors", tmp_path / "a.safetensors") == 2
    assert "--safetensors: the package safetensors is not installed" in capsys.readouterr().err and not out.exists()


def test_openvino_gives_the_scores_of_the_file(tmp_path, monkeypatch, capsys):
    """A second opinion about what the format means, from code that is not ours."""
    pytest.importorskip("openvino")
    for width, multiples, side, stride in ((8, (1, 2, 4, 8), 16, 1), (24, (1, 2, 2, 4), 64, 2), (32, (1, 2), 33, 2)):
        for number_type in (bnn.FLOAT32, bnn.FLOAT16, bnn.INT8):
            network = random_network(
                width=width, multiples=multiples, side=side, stem_stride=stride, number_type=number_type
            )
            openvino.write(network, tmp_path / "net.xml")
            given = reference.pixels(network.layers[0], random_images(4, side))
            got = openvino.opened(tmp_path / "net.xml", batch=4)(given)
            expected = reference.run(network, given)
            agree = (np.abs(got - expected).max(1) < 1e-4 * np.abs(expected).max()).sum()
            assert agree >= 3, (width, side)  # it adds and multiplies at once, which may turn a sign on its threshold
    network = random_network(width=4)
    with pytest.raises(ExportError, match=r"layer 1 has 4 channels, expected a multiple of 8"):
        openvino.write(network, tmp_path / "narrow.xml")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.bin", "net.xml"]


def test_export_writes_a_graph_for_openvino(tmp_path, monkeypatch, capsys):
    pytest.importorskip("openvino")
    recipe = tiny("quick/supervised.yaml", tmp_path, *SHORT, "method.backbone.width=8")
    run(recipe)
    net = tmp_path / "net.bnn"
    assert exported(monkeypatch, recipe.folder, net, "--linear", "float32", "--openvino", tmp_path / "net.xml") == 0
    assert "a graph for OpenVINO" in capsys.readouterr().out
    trained = open_trained(recipe.folder)
    pixels, _ = validation(trained)
    given = reference.pixels(bnn.read(net).layers[0], pixels[:8])
    expected = Runtime(net).run(pixels[:8])
    got = openvino.opened(tmp_path / "net.xml", batch=8)(given)
    assert ((np.abs(got - expected) / spread(expected)).max(1) < 1e-3).sum() >= 7
    assert exported(monkeypatch, recipe.folder, net, "--openvino", tmp_path / "net.graph") == 2
    assert "expected a name that ends in .xml" in capsys.readouterr().err
    monkeypatch.setattr(openvino, "missing", lambda: "openvino is missing: pip install openvino")
    assert exported(monkeypatch, recipe.folder, tmp_path / "b.bnn", "--openvino", tmp_path / "b.xml") == 2
    assert "pip install openvino" in capsys.readouterr().err and not (tmp_path / "b.bnn").exists()


# ------------------------------------------------------------------------------------------------ python -m runtime


@pytest.fixture(scope="module")
def packed(classifier, tmp_path_factory):
    path = tmp_path_factory.mktemp("packed") / "net.bnn"
    export.export(open_trained(classifier.folder), path)
    return path


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("side", "resize"), [(32, 32), (32, 37), (48, 75), (48, None)])
def test_pictures_are_cut_as_evaluations_see_them(side, resize, interpolation, tmp_path, packed):
    view = View(crop="center" if resize else "whole", size=side, resize=resize, interpolation=interpolation)
    network = bnn.read(packed)._replace(
        side=side,
        metadata={"resize": resize, "whole": resize is None, "crop": side, "interpolation": interpolation},
    )
    root = write_tree(tmp_path, count=12)
    odd_files(root)
    for height, width in ((200, 333), (41, 32), (36, 211)):
        Image.fromarray(picture(height, height, width)).save(root / f"{width}.png")
    compared = 0
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        try:
            expected = read_picture(path, view).numpy().astype(int)
        except DataError:
            with pytest.raises(bnn.BnnError, match="cannot be decoded"):
                command.read_image(path, network)
            continue
        got = command.read_image(path, network)
        assert got.dtype == np.uint8 and np.abs(got - expected).max() <= 1, path
        compared += 1
    assert compared > 20


def test_gray_pictures_of_more_bits_are_light_where_they_are_light(tmp_path, packed):
    gray = picture(1, 32, 32)[:, :, 0]
    for number, (content, expected) in enumerate(gray_tiffs(gray)):
        (tmp_path / f"{number}.tiff").write_bytes(content)
        got = command.read_image(tmp_path / f"{number}.tiff", bnn.read(packed))
        assert np.array_equal(got, np.repeat(expected[:, :, None], 3, axis=2))
    for mode in "FI":
        Image.fromarray(picture(2, 32, 32)).convert(mode).save(tmp_path / "numbers.tiff")
        with pytest.raises(bnn.BnnError, match=r"numbers.tiff: cannot be decoded: holds floats or signed integers"):
            command.read_image(tmp_path / "numbers.tiff", bnn.read(packed))


def test_the_command_names_the_five_likeliest(packed, classifier, tmp_path, capsys):
    path = next((classifier.folder.parent / "images").rglob("*.jpg"))
    trained = open_trained(classifier.folder)
    np.save(tmp_path / "cut.npy", trained.pixels(path).numpy())
    save = tmp_path / "out.array"
    assert command.main([str(packed), str(path), str(tmp_path / "cut.npy"), "--save", str(save)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 10 and said[0].startswith(f"{path}: ") and said[0].endswith(" ms")
    shares = trained.network(trained.image(path)).softmax(1)[0]
    order = shares.argsort(descending=True).tolist()
    assert [line.split()[1] for line in said[6:]] == [f"class{number}" for number in order]
    assert abs(float(said[6].split()[0].rstrip("%")) / 100 - float(shares.max())) < 0.01
    assert np.load(save).shape == (2, 4)


def test_the_command_says_what_is_in_the_file(packed, capsys):
    assert command.main([str(packed), "--info", "--benchmark", "--batch", "2"]) == 0
    said = capsys.readouterr().out
    assert "4 classes" in said and "half-block  binary" in said and "batch 2, 1 thread" in said and "resize: 32" in said


def test_features_have_no_names(pretrained, tmp_path, capsys):
    export.export(open_trained(pretrained.folder), tmp_path / "net.bnn")
    np.save(tmp_path / "a.npy", np.zeros((32, 32, 3), np.uint8))
    assert command.main([str(tmp_path / "net.bnn"), str(tmp_path / "a.npy")]) == 0
    assert "8 features of norm" in capsys.readouterr().out


def test_names_of_a_foreign_file_cannot_steer_the_terminal(packed):
    network = bnn.read(packed)
    network.metadata["classes"] = ["a", "\x1b[2J", 7, "d"]
    assert [command.class_name(network, n) for n in range(4)] == ["a", "'\\x1b[2J'", "class 2", "d"]


def test_the_runtime_refuses_in_one_line(packed, tmp_path, capsys, monkeypatch):
    np.save(tmp_path / "wide.npy", np.zeros((32, 33, 3), np.uint8))
    np.save(tmp_path / "object.npy", np.array([{}]), allow_pickle=True)
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "cut.bnn").write_bytes(packed.read_bytes()[:-1])
    bare = bnn.read(packed)
    bare.metadata.clear()
    bnn.write(bare, tmp_path / "bare.bnn")
    for arguments, text in (
        ((packed, tmp_path / "wide.npy"), "expected uint8 [32, 32, 3], got uint8 [32, 33, 3]"),
        ((packed, tmp_path / "object.npy"), "cannot be read as an array"),
        ((packed, tmp_path / "text.jpg"), "text.jpg: cannot be decoded"),
        ((packed, tmp_path / "none.jpg"), "none.jpg: No such file"),
        ((tmp_path / "cut.bnn", "--info"), "cut.bnn: "),
        ((tmp_path / "none.bnn", "--info"), "none.bnn: No such file"),
        ((tmp_path / "bare.bnn", tmp_path / "text.jpg"), "does not say how pictures are resized"),
    ):
        assert command.main([*map(str, arguments)]) == 2
        said = capsys.readouterr()
        assert said.err.startswith("error: ") and text in said.err and said.err.count("\n") == 1
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert command.main([str(packed), str(tmp_path / "text.jpg")]) == 2
    assert "takes Pillow, which is not installed" in capsys.readouterr().err
    for wrong in ([], ["--info", "--threads", "0"]):
        with pytest.raises(SystemExit) as left:
            command.main([str(packed), *wrong])
        assert left.value.code == 2


def test_the_runtime_needs_no_torch(packed, tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((32, 32, 3), np.uint8))
    text = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'PIL', 'engine', 'models', 'loaders'))); "
        "import runpy; runpy.run_module('runtime', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", text, packed, tmp_path / "a.npy", "--info"], cwd=ROOT,
                          capture_output=True, text=True, timeout=PATIENCE)  # fmt: skip
    assert done.returncode == 0 and "class" in done.stdout, done.stderr


def test_a_checkpoint_of_a_newer_kind_is_not_opened(classifier, tmp_path):
    state = checkpoint.load(open_trained(classifier.folder).source)
    torch.save({**state, "format": 99}, tmp_path / "new.pt")
    with pytest.raises(checkpoint.CheckpointError, match="not a checkpoint of format 2, found 99"):
        open_trained(tmp_path / "new.pt")


@pytest.mark.slow
def test_all_validation_images_of_a_run_on_digits_get_the_class_of_pytorch(tmp_path):
    tool("make_images").make("digits", tmp_path / "digits")
    recipe = recipes.load(ROOT / "recipes/quick/supervised.yaml", [
        f"run.folder={tmp_path}", f"data.train={tmp_path}/digits/train", f"data.val={tmp_path}/digits/val",
        "run.duration=1ep", "run.device=cpu", "method.backbone.width=4", "schedules.lr=0.01", "evals=[]",
    ])  # fmt: skip
    run(recipe)
    report = export.export(open_trained(recipe.folder), tmp_path / "net.bnn", linear="float32", check=1000)
    assert (report.images, report.agreed, report.disagreements) == (355, 355, [])
    assert report.output_difference < 1e-3
