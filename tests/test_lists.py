"""Subsets and held-out images of labeled sets, and the lists that tools/make_lists.py writes."""

import hashlib
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import loaders
from engine.describe import describe
from engine.errors import RecipeError
from loaders import DataError, subsets
from loaders.config import Request
from loaders.sources import open_index
from loaders.synthetic_loader import noise
from tests.images import jpeg, picture, write_tree
from tests.loading import config, take
from tests.processes import tool
from tests.runs import rows, run
from tests.tiny import tiny

make_lists = tool("make_lists")
REQUEST = Request(10**8)

# ------------------------------------------------------------------------------------------------ the draw


def test_draws_are_these():
    index = noise(12, 3, 8)
    assert np.flatnonzero(subsets.held_out(index, 0.25)).tolist() == [2, 6, 10]
    assert np.flatnonzero(subsets.held_out(index, 0.25, seed=1)).tolist() == [4, 8, 9]
    assert subsets.subset(index, count=2).tolist() == [0, 1, 2, 3, 4, 8]


def test_a_draw_takes_its_share_of_each_class():
    index = noise(1000, 7, 8)  # classes of 142 and 143
    label = index.label
    taken = subsets.held_out(index, 0.1)
    assert set(np.bincount(label[taken]).tolist()) == {14} and not np.array_equal(
        taken, subsets.held_out(index, 0.1, 1)
    )
    few, more = subsets.subset(index, share=0.01), subsets.subset(index, share=0.1)
    assert np.bincount(label[few]).tolist() == [1] * 7 and set(few.tolist()) < set(more.tolist())
    assert np.array_equal(few, np.sort(few)) and np.array_equal(subsets.subset(index, share=1.0), np.arange(1000))
    assert np.bincount(label[subsets.subset(index, count=5)]).tolist() == [5] * 7
    assert set(np.flatnonzero(taken).tolist()) != set(more.tolist())  # the two draws know nothing of each other
    # At least one, and never all.
    pairs = noise(14, 7, 8)
    for share in (0.01, 0.99):
        assert np.bincount(pairs.label[subsets.held_out(pairs, share)]).tolist() == [1] * 7
    assert len(np.flatnonzero(subsets.held_out(noise(30, 2, 8).take(np.arange(0, 30, 2)), 0.2))) == 3


def test_what_is_drawn_of_a_class_depends_on_its_own_rows():
    index = noise(300, 3, 8)
    merged = replace(index, label=np.minimum(index.label, 1), classes=["a", "b"])
    both = [subsets.held_out(of, 0.1)[index.label == 0] for of in (index, merged)]
    assert np.array_equal(*both) and both[0].sum() == 10
    assert subsets.held_out(replace(index, label=None, classes=[]), 0.1).sum() == 30


def test_what_cannot_be_drawn():
    with pytest.raises(DataError, match="class 'class2' has 1 image, of which none can be held out"):
        subsets.held_out(noise(3, 3, 8).take(np.array([0, 0, 1, 1, 2])), 0.1)
    with pytest.raises(DataError, match="class 'class0' has 4 images, expected at least 5"):
        subsets.subset(noise(12, 3, 8), count=5)


# ------------------------------------------------------------------------------------------------ data.hold_out


@pytest.mark.parametrize("backend", ["folder", "synthetic", "ffcv"])
def test_held_out_images_are_in_no_training_batch(backend, tree):
    data = config(backend, tree, hold_out=0.25)
    whole, train, held = (
        loaders.open_data(config(backend, tree) if split == "all" else data, "train" if split == "all" else split)
        for split in ("all", "train", "held_out")
    )
    assert sorted([*train.names, *held.names]) == sorted(whole.names)
    assert np.bincount(held.label).tolist() == ([1] * 10 if backend == "synthetic" else [2, 2, 2])
    assert train.classes == held.classes == whole.classes and train.fingerprint != whole.fingerprint
    batches = take(loaders.open_train(data, train, seed=0), len(train))  # of 4 images: four epochs
    of_whole = {name: row for row, name in enumerate(whole.names)}
    for batch in batches[:2]:
        for row, label in zip(batch.rows.tolist(), batch.label.tolist(), strict=True):
            assert whole.label[of_whole[train.name(row)]] == label
    assert {row for batch in batches for row in batch.rows.tolist()} == set(range(len(train)))


def test_a_run_measures_on_what_it_does_not_train_on(tmp_path):
    recipe = tiny(
        "quick/supervised.yaml", tmp_path, "data.hold_out=0.2", "run.duration=2it",
        "evals=[{kind: accuracy, every: 100%, split: held_out}, {kind: knn, every: 100%, split: held_out}, "
        "{kind: accuracy, every: 100%}]",
    )  # fmt: skip
    assert "32 x" in describe(recipe)
    run(recipe)
    assert [row["measured"] for row in rows(recipe) if "measured" in row] == [8, 8, 16]
    files = ["data.backend=folder", "data.options={}", "data.workers=0", "evals=[]"]
    root = write_tree(tmp_path / "images", count=40, classes=4)
    data = [f"data.train={root}", f"data.val={root}", "data.hold_out=0.2", *files]
    run(tiny("quick/supervised.yaml", tmp_path, *data, "name=all", "data.expect_images=40", "run.duration=1it"))
    with pytest.raises(DataError, match="40 images, the recipe expects 32"):
        run(tiny("quick/supervised.yaml", tmp_path, *data, "name=rest", "data.expect_images=32"))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("evals=[{kind: knn, split: held_out}]", "evals.0.split: no images are held out, expected data.hold_out"),
        ("evals=[{kind: knn, split: held_out, val: x}]", "expected neither val nor kind: signs with it"),
        ("data.hold_out=1", "data.hold_out: expected less than 1"),
        ("data.hold_out=0", "data.hold_out: expected greater than 0"),
        ("method.rates=[1, 2]", "rates: expected with trains: linear or pre-fc only, got trains: all"),
    ],
)
def test_recipes_that_hold_out_wrongly(change, expected, tmp_path):
    with pytest.raises(RecipeError) as caught:
        tiny("quick/supervised.yaml", tmp_path, change)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------ the tool


def call(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["make_lists.py", *map(str, words)])
    return make_lists.main()


def put(folder, *names):
    """Files of a picture's bytes."""
    content = jpeg(Image.fromarray(picture(1, 40, 50)))
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def images_of(path):
    """Image, from the list's folder, -> class of a list, as a run reads it."""
    index = open_index(path, REQUEST)
    return {index.name(row).decode(): index.classes[index.label[row]] for row in range(len(index))}


@pytest.fixture
def imagenet(tmp_path, monkeypatch):
    """A small ImageNet and a list of SimCLR's kind."""
    names = ["n00000002_7.JPEG", "n00000001_1.JPEG", "n00000002_9.JPEG"]
    put(tmp_path, *(f"imagenet/train/{name[:9]}/{name}" for name in [*names, "n00000001_2.JPEG"]))
    source = tmp_path / "1percent.txt"
    source.write_text("".join(f"{name}\n" for name in names))
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    monkeypatch.setattr(make_lists, "SIMCLR", {digest: ("1percent.txt", 3)})
    return tmp_path / "imagenet"


def test_simclrs_lists(imagenet, monkeypatch, capsys):
    out = imagenet / "simclr_1percent.txt"
    assert call(monkeypatch, "simclr", imagenet.parent / "1percent.txt", imagenet, out) == 0
    assert capsys.readouterr().out == f"{out}: 3 images of 2 classes, 1 to 2 of each\n"
    assert out.read_text().splitlines()[0] == "train/n00000002/n00000002_7.JPEG\tn00000002"
    assert images_of(out) == {
        f"train/{n[:9]}/{n}": n[:9] for n in ("n00000002_7.JPEG", "n00000001_1.JPEG", "n00000002_9.JPEG")
    }


def test_simclrs_lists_of_numbered_folders(imagenet, monkeypatch):
    for number, wnid in enumerate(("n00000001", "n00000002")):
        (imagenet / "train" / wnid).rename(imagenet / "train" / f"{number:04d}")
        put(imagenet, f"val/{number:04d}/{number}.JPEG")
    classes = imagenet / "wnids.txt"
    classes.write_text("n00000001\nn00000002\n")
    train, val, source = imagenet / "one.txt", imagenet / "val.txt", imagenet.parent / "1percent.txt"
    assert call(monkeypatch, "simclr", source, imagenet, train, "--classes", classes, "--val", val) == 0
    assert set(images_of(train).items()) >= {("train/0001/n00000002_7.JPEG", "n00000002")}
    assert images_of(val) == {"val/0000/0.JPEG": "n00000001", "val/0001/1.JPEG": "n00000002"}
    assert open_index(train, REQUEST).classes == open_index(val, REQUEST).classes


def test_what_is_wrong_with_simclrs_lists(imagenet, monkeypatch, capsys):
    source, out = imagenet.parent / "1percent.txt", imagenet / "out.txt"
    classes = imagenet / "wnids.txt"

    def said(*more):
        assert call(monkeypatch, "simclr", source, imagenet, out, *more) == 2 and not out.exists()
        line = capsys.readouterr().err
        assert line.count("\n") == 1
        return line

    classes.write_text("n00000001\n")
    assert "n00000001: expected folders named by different numbers" in said("--classes", classes)
    missing = imagenet / "train/n00000001/n00000001_1.JPEG"
    missing.unlink()
    assert f"1percent.txt: line 2: {missing}: no such file; 1 of 3 images are missing" in said()
    source.write_text("n00000002_7.JPEG\r\n")
    assert re.search(
        r"1percent\.txt: 1 lines with the SHA-256 .*expected 1percent.txt \(3 lines, .*get it from https", said()
    )
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    monkeypatch.setattr(make_lists, "SIMCLR", {digest: ("1percent.txt", 1)})
    assert call(monkeypatch, "simclr", source, imagenet, out) == 0  # known, so its line ends are no matter
    out.unlink()
    source.write_text("train/n00000002_7.JPEG\n")
    monkeypatch.setattr(make_lists, "SIMCLR", {hashlib.sha256(source.read_bytes()).hexdigest(): ("1percent.txt", 1)})
    assert "1percent.txt: line 1: expected a name such as n04235860_14959.JPEG, got 'train/n0" in said()


CUB = {
    "images.txt": "1 001.Auk/a.jpg\n2 001.Auk/b.jpg\n3 002.Wren/c.jpg\n4 002.Wren/d.jpg\n",
    "classes.txt": "1 001.Auk\n2 002.Wren\n",
    "image_class_labels.txt": "1 1\n2 1\n3 2\n4 2\n",
    "train_test_split.txt": "1 1\n2 0\n3 0\n4 1\n",
}


def cub(folder, **changes):
    put(folder, *(f"images/{line.split()[1]}" for line in CUB["images.txt"].splitlines()))
    for name, text in {**CUB, **changes}.items():
        (folder / name).write_text(text)
    return folder


def test_cub(tmp_path, monkeypatch, capsys):
    folder = cub(tmp_path / "CUB")
    assert call(monkeypatch, "cub", folder, tmp_path / "data") == 0
    assert "published with 5,994 images for training and 5,794 for testing" in capsys.readouterr().out
    assert images_of(tmp_path / "data/train.txt") == {f"{folder}/images/001.Auk/a.jpg": "001.Auk",
                                                      f"{folder}/images/002.Wren/d.jpg": "002.Wren"}  # fmt: skip
    assert call(monkeypatch, "cub", folder, folder) == 0
    assert images_of(folder / "val.txt") == {"images/001.Auk/b.jpg": "001.Auk", "images/002.Wren/c.jpg": "002.Wren"}


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("images.txt", "1 001.Auk/a.jpg\n2\n", "images.txt: line 2: expected `<id> <path>`, got '2'"),
        (
            "images.txt",
            "1 001.Auk/a.jpg\n1 b\n",
            "images.txt: line 2: expected `<id> <path>`, got 1 comes twice, first in",
        ),
        ("images.txt", CUB["images.txt"] + "5 x.jpg\n", "images.txt: line 5: image 5 is not in image_class_labels.txt"),
        ("image_class_labels.txt", "1 1\n2 3\n3 2\n4 2\n", "image_class_labels.txt: line 2: no class 3 in classes.txt"),
        ("image_class_labels.txt", "9 1\n", "image_class_labels.txt: line 1: image 9 is not in images.txt"),
        (
            "train_test_split.txt",
            "1 1\n2 0\n3 2\n4 1\n",
            "train_test_split.txt: line 3: expected 1 for training or 0, got '2'",
        ),
        ("train_test_split.txt", "1 1\n", "images.txt: line 2: image 2 is not in train_test_split.txt"),
    ],
)
def test_what_is_wrong_with_cub(file, text, expected, tmp_path, monkeypatch, capsys):
    assert call(monkeypatch, "cub", cub(tmp_path / "CUB", **{file: text}), tmp_path / "data") == 2
    said = capsys.readouterr().err
    assert expected in said and said.count("\n") == 1 and not (tmp_path / "data").exists()


def test_birdsnap_takes_what_is_there(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "birdsnap"
    put(folder, "images/Auk/1.jpg", "images/Auk/2.jpg", "images/Wren/3.jpg", "images/Wren/4.jpg")
    rows_of = ["url\tmd5\tpath\tspecies_id", *(f"u\tm\t{p}\t{s}" for p, s in (
        ("Auk/1.jpg", 1), ("Auk/2.jpg", 1), ("Wren/3.jpg", 2), ("Wren/4.jpg", 2), ("Wren/gone.jpg", 2)))]  # fmt: skip
    (folder / "images.txt").write_text("\n".join(rows_of))
    (folder / "test_images.txt").write_text("path\nAuk/2.jpg\nWren/4.jpg\n")
    assert call(monkeypatch, "birdsnap", folder, folder) == 0
    assert "4 of the 5 images of images.txt are here" in capsys.readouterr().out
    assert images_of(folder / "train.txt") == {"images/Auk/1.jpg": "Auk", "images/Wren/3.jpg": "Wren"}
    assert images_of(folder / "val.txt") == {"images/Auk/2.jpg": "Auk", "images/Wren/4.jpg": "Wren"}
    for text, expected in (
        ("path\tmd5\n", "images.txt: line 1: expected columns path and species_id"),
        ("path\tspecies_id\nAuk/1.jpg\tx\n", "images.txt: line 2: expected `<species>/<image>` as path and a number"),
        (
            "path\tspecies_id\nAuk/1.jpg\t1\nWren/3.jpg\t1\n",
            "images.txt: line 3: species 1 is in Wren, and before in Auk",
        ),
        ("path\tspecies_id\nAuk/1.jpg\t1\n", "test_images.txt: line 2: Auk/2.jpg is not in images.txt"),
    ):
        (folder / "images.txt").write_text(text)
        assert call(monkeypatch, "birdsnap", folder, tmp_path) == 2 and expected in capsys.readouterr().err


@pytest.mark.parametrize("separator", [" ", ",", "\t"])
def test_places205(separator, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "places"
    put(folder, "im/a/x.jpg", "im/b/y.jpg", "im/a/v.jpg", "im/b/w.jpg")
    (folder / "train_places205.csv").write_text(f"a/x.jpg{separator}0\nb/y.jpg{separator}1\n")
    (folder / "val_places205.csv").write_text(f"a/v.jpg{separator}0\nb/w.jpg{separator}1\n")
    assert call(monkeypatch, "places205", folder, folder, "--images", folder / "im") == 0
    assert images_of(folder / "train.txt") == {"im/a/x.jpg": "0", "im/b/y.jpg": "1"}
    (folder / "val_places205.csv").write_text("a/v.jpg\n")
    assert call(monkeypatch, "places205", folder, folder) == 2
    assert "val_places205.csv: line 1: expected `<image> <label>`, got 'a/v.jpg'" in capsys.readouterr().err


def test_holdout_and_subset_write_what_is_drawn(tree, tmp_path, monkeypatch):
    rest, held, few = tmp_path / "rest.txt", tmp_path / "held.txt", tmp_path / "few.txt"
    assert call(monkeypatch, "holdout", tree, rest, held, "--share", 0.25) == 0
    whole = open_index(tree, REQUEST)
    taken = subsets.held_out(whole, 0.25)
    assert [*images_of(held)] == [whole.path(row) for row in np.flatnonzero(taken)]
    assert images_of(rest).keys() == {whole.path(row) for row in np.flatnonzero(~taken)}
    assert open_index(rest, REQUEST).classes == whole.classes
    # A list of the same images is the same set to draw from.
    assert call(monkeypatch, "subset", tree, few, "--count", 2, "--seed", 3) == 0
    assert [*images_of(few)] == [whole.path(row) for row in subsets.subset(whole, count=2, seed=3)]


def test_what_no_list_can_name(tree, tmp_path, monkeypatch, capsys):
    def said(*words):
        assert call(monkeypatch, *words) == 2
        return capsys.readouterr().err

    put(tmp_path / "numbers", "3/a.jpg", "10/b.jpg")
    out = tmp_path / "out.txt"
    assert "are numbers, which a list takes for labels" in said("subset", tmp_path / "numbers", out, "--count", 1)
    put(tmp_path / "tabs", "a\tb/a.jpg", "c/b.jpg")
    assert "a list cannot hold such a name" in said("subset", tmp_path / "tabs", out, "--count", 1)
    put(tmp_path / "flat", "a.jpg")
    assert "has no labels of two classes or more" in said("subset", tmp_path / "flat", out, "--count", 1)
    assert "out.png: expected the name of a list, ending in .txt" in said(
        "subset", tree, tmp_path / "out.png", "--count", 1
    )
    assert "class 'class0' has 8 images, expected at least 9" in said("subset", tree, out, "--count", 9)
    few = ["subset", tree, out]
    for words in (few, [*few, "--count", "0"], [*few, "--count", "1", "--seed", "-1"],
                  ["holdout", tree, out, out, "--share", "1"], ["simclr", "a", "b", out, "--val", out]):  # fmt: skip
        with pytest.raises(SystemExit) as left:
            call(monkeypatch, *words)
        assert left.value.code == 2 and "error: " in capsys.readouterr().err
    assert not out.exists()
