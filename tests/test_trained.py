"""Opening what was trained: run folders, checkpoints, published weight files."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import loaders
from engine import checkpoint
from engine.errors import CheckpointError
from engine.trained import open_trained
from loaders import DataError
from models import methods, weights
from models.reactnet import Config, ReActNet
from tests.images import odd_files, picture, write_tree
from tests.runs import run
from tests.tiny import of_each_method, tiny

SHORT = ("run.duration=2it", "run.save_every=1it", "evals=[]")


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    recipe = tiny("quick/burn_stage2.yaml", tmp_path_factory.mktemp("runs"), *SHORT)
    run(recipe)
    return recipe


def method_of(recipe, state):
    method = recipe.method.build()
    method.load_state_dict(state["method"])
    return method.eval()


@pytest.mark.parametrize(
    "keys",
    [
        ["method.trains=all"],
        ["method.trains=linear", "method.standardize=true"],
        ["method.trains=burn-release"],
        ["method.trains=pre-fc", "method.standardize=true"],
        ["method.trains=linear", "method.backbone.pooled_mlp=false"],
    ],
    ids=lambda keys: ",".join(keys),
)
def test_what_is_deployed_gives_the_scores_of_the_method(keys):
    method = tiny("quick/supervised.yaml", Path("nowhere"), *keys).method.build().eval()
    images = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(torch.nn.Sequential(*method.deployed())(images), method.logits(images))


def test_a_run_folder_gives_the_scores_of_its_method(tmp_path):
    recipe = tiny("quick/linear.yaml", tmp_path, *SHORT, "method.trains=pre-fc")
    state = run(recipe)
    trained = open_trained(recipe.folder)
    images = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        expected = method_of(recipe, state).logits(images)
    scores = trained.network(images)
    assert torch.equal(scores, expected) and not scores.requires_grad and not trained.network.training
    assert trained.recipe.dump() == recipe.dump() and (trained.name, trained.part) == (recipe.name, "backbone")
    assert trained.view == recipe.data.eval_view and trained.mean == recipe.data.mean
    assert trained.step == 2 and trained.is_finished
    assert len(trained.classes) == 4  # of the synthetic images


def test_pre_training_gives_features_of_any_network(pretrained):
    trained = open_trained(str(pretrained.folder))
    images = torch.randn(2, 3, 32, 32)
    method = method_of(pretrained, checkpoint.load(trained.source))
    with torch.no_grad():
        assert torch.equal(trained.network(images), method.student(images))
        assert torch.equal(open_trained(pretrained.folder, part="teacher").network(images), method.teacher(images))
    assert trained.part == "student" and trained.classifier is None and trained.classes == ()
    with pytest.raises(CheckpointError, match="no network 'student_head', expected one of student, teacher"):
        open_trained(pretrained.folder, part="student_head")


def test_steps_and_files(pretrained, tmp_path, caplog):
    newest = open_trained(pretrained.folder)
    first = open_trained(pretrained.folder, step=1)
    assert (newest.step, first.step) == (2, 1) and not first.is_finished
    assert "unfinished run, step 1 of 2" in caplog.text
    copy = tmp_path / "renamed.pt"
    copy.write_bytes(newest.source.read_bytes())
    image = torch.randn(1, 3, 32, 32)
    for path in (newest.source, copy):
        assert torch.equal(open_trained(path).network(image), newest.network(image))
    assert not torch.equal(first.network(image), newest.network(image))


def test_opening_draws_nothing(pretrained):
    before = torch.random.get_rng_state()
    open_trained(pretrained.folder)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_what_cannot_be_opened_is_one_line(pretrained, tmp_path):
    (tmp_path / "empty").mkdir()
    newest = open_trained(pretrained.folder).source
    damaged = tmp_path / newest.name
    damaged.write_bytes(newest.read_bytes()[:-1])
    wrong = checkpoint.load(newest)
    del wrong["method"]["student.fc.weight"]
    torch.save(wrong, tmp_path / "wrong.pt")
    for path, step, text in (
        (tmp_path / "empty", None, "expected a complete checkpoint in it, found none yet"),
        (pretrained.folder, 7, r"no complete checkpoint of step \d, found 1, 2"),
        (newest, 1, "a step can be chosen in a run folder only"),
        (damaged, None, "damaged, its content does not match"),
        (tmp_path / "wrong.pt", None, "is of another network than its recipe: Missing key"),
    ):
        with pytest.raises(CheckpointError, match=text) as caught:
            open_trained(path, step=step)
        assert "\n" not in str(caught.value)
    with pytest.raises(weights.WeightsError, match="no such file"):
        open_trained(tmp_path / "nothing.pth")


# ------------------------------------------------------------------------------------------------ published files


@pytest.mark.parametrize("pooled_mlp", [True, False])
def test_published_names_are_opened(pooled_mlp, tmp_path):
    network = ReActNet(Config(width=2, multiples=(1, 2, 4, 4), pooled_mlp=pooled_mlp)).eval()
    linear = torch.nn.Linear(8, 5)
    torch.save(weights.published(network.state_dict(), linear.state_dict()), tmp_path / "net.pth")
    trained = open_trained(tmp_path / "net.pth")
    assert trained.backbone.config == network.config and trained.recipe is None and trained.view.size == 224
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(trained.network(images), linear(network(images)))
        assert torch.equal(open_trained(tmp_path / "net.pth", part="student").network(images), network(images))


@pytest.mark.parametrize("keys", [{"arch": "resnet18"}, {"arch": "resnet18", "stem": "small"}, {"arch": "resnet50"}])
def test_published_resnets_are_recognized(keys):
    from models import backbones
    from models.resnet import Config

    config = Config(**keys)
    with torch.device("meta"):
        assert backbones.recognized(config.build().state_dict()) == config
    with pytest.raises(ValueError, match=r"ResNet of \(3, 4, 23, 3\) blocks"):
        backbones.recognized(
            {f"layer{n}.{i}.conv1.weight": 0 for n, c in enumerate((3, 4, 23, 3), 1) for i in range(c)}
        )


# ------------------------------------------------------------------------------------------------ pictures


def test_a_picture_is_seen_as_evaluations_see_it(pretrained, tmp_path):
    root = write_tree(tmp_path / "images")
    odd = odd_files(root)
    data = pretrained.data.model_copy(update={"val": str(root)})
    data = loaders.with_backend(data, "folder", workers=0)
    trained = open_trained(pretrained.folder)
    index = loaders.open_data(data, "val")
    loader = loaders.open_eval(data, index)
    seen = 0
    for batch in loader:
        for image, row in zip(batch.views[0], batch.rows.tolist(), strict=True):
            path = root / index.path(row)
            if path.exists():  # the index escapes what is no text
                assert torch.equal(trained.image(path)[0], image), path
                seen += 1
    assert seen == 24 + sum(odd.values())
    for name in ("truncated.jpg", "text.jpg", "bomb.png"):
        with pytest.raises(DataError, match=name):
            trained.image(root / "class0" / name)


def test_classes_are_those_of_the_images(tmp_path):
    root = write_tree(tmp_path / "images")
    names = [f"data.{split}={root}" for split in ("train", "val")]
    recipe = tiny("quick/supervised.yaml", tmp_path, *SHORT, "data.backend=folder", "data.options={}", *names,
                  "data.workers=0", "method.num_classes=3")  # fmt: skip
    run(recipe)
    assert open_trained(recipe.folder).classes == ("class0", "class1", "class2")
    root.rename(tmp_path / "elsewhere")
    assert open_trained(recipe.folder).classes == ()


def test_every_method_says_what_is_deployed():
    for recipe in (tiny(path, Path("nowhere")) for path in of_each_method()):
        backbone, classifier = methods.on_meta(recipe.method).deployed()
        classifies = recipe.method.classes is not None and not recipe.method.takes_boxes
        assert (classifier is not None) == classifies
        assert isinstance(backbone, torch.nn.Module)


def test_pixels_are_whole(pretrained, tmp_path):
    Image.fromarray(picture(1, 40, 50)).save(tmp_path / "a.png")
    pixels = open_trained(pretrained.folder).pixels(tmp_path / "a.png")
    assert pixels.dtype == torch.uint8 and pixels.shape == (32, 32, 3) and np.ptp(pixels.numpy()) > 50


@pytest.mark.parametrize("pooled_mlp", [True, False])
def test_safetensors_are_read_back_exactly(pooled_mlp, tmp_path):
    pytest.importorskip("safetensors")
    network = ReActNet(Config(width=2, pooled_mlp=pooled_mlp))
    linear = torch.nn.Linear(network.out_channels, 5)
    names = weights.published(network.state_dict(), linear.state_dict())
    (tmp_path / "net.safetensors").write_bytes(content := weights.as_safetensors(names))
    trained = open_trained(tmp_path / "net.safetensors")
    for ours, theirs in ((trained.backbone, network), (trained.classifier, linear)):
        assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in ours.state_dict().items())
    (tmp_path / "net.safetensors").write_bytes(content[:-1])
    with pytest.raises(weights.WeightsError, match="is a safetensors file, cut short or damaged"):
        open_trained(tmp_path / "net.safetensors")


def test_without_its_package_a_safetensors_file_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (tmp_path / "net.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    with pytest.raises(weights.WeightsError, match="is a safetensors file; the package safetensors is not installed"):
        open_trained(tmp_path / "net.safetensors")
