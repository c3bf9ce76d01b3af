"""tools/demo.py on somebody's pictures: what it chooses, what it writes, and what it keeps."""

import json
import sys

import numpy as np
import pytest
import yaml
from PIL import Image

from engine import recipe as recipes
from engine.features import Features
from engine.results.chain import Run
from tests.images import jpeg, picture
from tests.processes import tool
from tests.runs import run
from tests.tiny import tiny

demo = tool("demo")


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["demo.py", *map(str, arguments)])
    return demo.main()


def test_the_demo_ends_with_a_packed_network(tmp_path):
    recipe = tiny("quick/linear.yaml", tmp_path, "run.duration=2it", "evals=[]")
    run(recipe)
    said = demo.pack(recipe, tmp_path / "net.bnn")
    size = (tmp_path / "net.bnn").stat().st_size
    assert f"{size:,} bytes" in said and "16 of 16 images get PyTorch's answer" in said and "\n" not in said


def write_photos(root, count=40):
    for number in range(count):
        path = root / f"{number % 3}" / "deep" / f"{number:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(Image.fromarray(picture(number, 70, 90))))
    (root / "loose.jpg").write_bytes(jpeg(Image.fromarray(picture(99, 70, 90))))
    (root / "bad.jpg").write_bytes(b"no image")
    return root


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("images", [None, 1, 500, 10**9])
def test_every_choice_is_a_recipe(on_gpu, images, tmp_path):
    for count, side in ((16, 20), (17, 40), (151, 64), (1500, 100), (60_000, 500), (14_000_000, 300)):
        choice = demo.choose(count, side, on_gpu=on_gpu, images=images)
        assert choice.batch <= count // 2 and choice.queue % choice.batch == 0
        assert choice.side <= max(side, 32) and choice.side <= (224 if on_gpu else 64)
        for name, content in demo.recipes_of(tmp_path, tmp_path / "out", choice).items():
            path = tmp_path / f"{name}.yaml"
            path.write_text(yaml.safe_dump(content))
            recipe = recipes.load(path)
            assert recipe.data.labels == "none" and recipe.evals == ()
            assert {view.size for view in recipe.data.views} == {choice.side}
            if images is None:
                steps = int(recipe.run.duration.removesuffix("it"))
                assert steps * choice.batch <= min(100 * count, 2_000_000 if on_gpu else 20_000)


def test_what_cannot_be_used_is_one_line_and_nothing_is_written(tmp_path, monkeypatch, capsys):
    few = write_photos(tmp_path / "few", 3)
    (tmp_path / "none").mkdir()
    for root, message in (
        (few, "4 images that can be used; expected at least 16"),
        (tmp_path / "none", "no images; expected files ending in .jpg"),
        (tmp_path / "nowhere", "no such folder"),
    ):
        assert call(monkeypatch, root, "--out", tmp_path / "out") == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert said.startswith("error: ") and message in said
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_from_pictures_to_a_network(tmp_path, monkeypatch, capsys):
    photos, out = write_photos(tmp_path / "photos"), tmp_path / "out"
    arguments = (photos, "--out", out, "--images", 48)
    assert call(monkeypatch, *arguments, "--plan") == 0
    said = capsys.readouterr().out
    assert "42 images, 1 unusable" in said and "views of 64 pixels" in said and not (out / "teacher").exists()
    edited = out / "recipes" / "teacher.yaml"  # a user's change, which is kept
    content = yaml.safe_load(edited.read_text())
    small = {"width": 2, "multiples": [1, 2, 4, 4]}
    content["method"]["backbone"] |= small
    edited.write_text(yaml.safe_dump(content))
    stage1 = yaml.safe_load((out / "recipes" / "stage1.yaml").read_text())
    stage1["method"]["teacher"] |= small
    stage1["method"]["student"] |= small
    (out / "recipes" / "stage1.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(stage1))))
    assert call(monkeypatch, *arguments) == 0
    assert "kept as it is" in capsys.readouterr().out and yaml.safe_load(edited.read_text()) == content
    assert np.array(Image.open(out / "report.png")).std() > 10
    report = (out / "report.md").read_text()
    features = Features.load(out / "features.npz")
    assert features.array.shape == (41, 8) and features.left_out == 1 and features.label is None
    assert np.array(Image.open(out / "neighbors.png")).std() > 10 and "](neighbors.png)" in report
    assert "`features/rank`" in report and "`outputs/information`" in report and "BURN on 42 pictures" in report
    assert all(Run(out / "recipes" / f"{name}.yaml", []).is_done() for name in ("teacher", "stage1", "stage2"))
    metrics = [json.loads(line) for line in (out / "stage2" / "metrics.jsonl").read_text().splitlines()]
    assert not any("evaluation" in row for row in metrics)
    monkeypatch.setattr(demo.train, "run", lambda *a, **k: pytest.fail("trained again"))
    assert call(monkeypatch, *arguments) == 0
