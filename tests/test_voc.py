"""PASCAL VOC's files (loaders/voc.py), the scenes that are made in their layout, and kits as a source of images."""

import re
from collections import Counter

import numpy as np
import pytest
from PIL import Image

import loaders
from loaders import DataError, Objects, voc
from loaders.config import Request
from loaders.sources import is_there, open_index, source_of
from tests.images import write_kit
from tests.loading import config, take
from tests.processes import tool

LABELED = Request(10**8)
SCENES = {  # wider, upright, two classes of which one is difficult, and nothing at all
    "000007": (60, 40, [("dog", (1, 1, 60, 40), False), ("cat", (10.5, 2, 20, 30.25), True)]),
    "000002": (40, 60, [("cat", (5, 6, 25, 36), False), ("cat", (1, 1, 9, 9), True)]),
    "000011": (50, 50, []),
}


def files_of(kit, pattern):
    return sorted(kit.glob(f"VOC2007/{pattern}"))


# ------------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize("classes", [None, ("cat", "dog")], ids=["annotations alone", "files of classes"])
def test_targets_and_boxes(classes, tmp_path):
    data = f"{write_kit(tmp_path / 'kit', SCENES, classes=classes)}#2007_trainval"
    scenes = voc.read(data)
    assert scenes.ids == ["000002", "000007", "000011"] and scenes.classes == ["cat", "dog"]
    assert scenes.names[1] == "VOC2007/JPEGImages/000007.jpg"
    assert scenes.targets.tolist() == [[1, 0], [-1, 1], [0, 0]] and scenes.targets.dtype == np.int8
    index = loaders.open_root(config("scenes", data), data, for_labels="this test")
    objects = index.objects
    assert objects.image.tolist() == [0, 0, 1, 1] and objects.label.tolist() == [0, 0, 1, 0]
    assert objects.box.tolist() == [[4, 5, 25, 36], [0, 0, 9, 9], [0, 0, 60, 40], [9.5, 1, 20, 30.25]]
    assert objects.difficult.tolist() == [False, True, False, True]
    assert index.label is None and index.classes == ["cat", "dog"] and "4 objects of 2 classes" in index.reading
    assert (index.width.tolist(), index.height.tolist()) == ([40, 60, 50], [60, 40, 50])


def test_splits_of_two_years_follow_each_other(tmp_path):
    write_kit(tmp_path, SCENES, classes=("cat", "dog"))
    write_kit(tmp_path, {"2008_1": (30, 30, [("dog", (1, 1, 9, 9), False)])}, split="2012_val", classes=("cat", "dog"))
    one, other = (voc.read(f"{tmp_path}#{splits}") for splits in ("2007_trainval+2012_val", "2012_val"))
    assert one.ids == ["000002", "000007", "000011", "2008_1"] and one.names[3] == "VOC2012/JPEGImages/2008_1.jpg"
    assert one.targets[3:].tolist() == other.targets.tolist() == [[0, 1]]
    index = open_index(tmp_path.parent / f"{tmp_path.name}#2007_trainval+2012_val", LABELED)
    assert len(index) == 4 and index.objects.image.tolist() == [0, 0, 1, 1, 3]


def test_objects_of_some_rows():
    objects = Objects(
        np.array([0, 0, 2, 3, 3]), np.arange(5), np.arange(20.0).reshape(5, 4), np.array([0, 1, 0, 1, 0], dtype=bool)
    )
    taken = objects.take(np.array([3, 1, 0, 3]))
    assert taken.image.tolist() == [0, 0, 2, 2, 3, 3] and taken.label.tolist() == [3, 4, 0, 1, 3, 4]
    assert taken.box[:, 0].tolist() == [12, 16, 0, 4, 12, 16] and taken.difficult.tolist() == [1, 0, 0, 1, 1, 0]
    assert objects.of(2).label.tolist() == [2] and len(objects.of(1).box) == 0


def edit(pattern, old, new):
    """A change of one file of a kit; the first that has it."""

    def change(kit):
        path = next(path for path in files_of(kit, pattern) if old in path.read_text())
        path.write_text(path.read_text().replace(old, new, 1))
        return path

    return change


def remove(pattern):
    def change(kit):
        path = files_of(kit, pattern)[0]
        path.unlink()
        return path

    return change


BAD = {
    "no list": (remove("ImageSets/Main/trainval.txt"), "no such file; there are no lists at all; expected splits of a"),
    "empty list": (edit("ImageSets/Main/trainval.txt", "000007\n000002\n000011", ""), "names no image"),
    "listed twice": (edit("ImageSets/Main/trainval.txt", "000011", "000002"), "'000002': twice"),
    "a path in a list": (
        edit("ImageSets/Main/trainval.txt", "000011", "../x"),
        "'../x': expected the name of an image",
    ),
    "an image more": (edit("ImageSets/Main/trainval.txt", "000011", "000012"), "has no line for 000012"),
    "an odd line": (
        edit("ImageSets/Main/cat_trainval.txt", "000002  1", "000002  2"),
        "line 2: expected `<image> <1, 0",
    ),
    "no annotation": (remove("Annotations/000002.xml"), "cannot be read: No such file"),
    "not XML": (edit("Annotations/000002.xml", "</object>", ""), r"is not XML \(mismatched tag"),
    "an entity": (edit("Annotations/*.xml", "<annotation>", '<!DOCTYPE a [<!ENTITY b "c">]><annotation>'), "entities"),
    "not a number": (
        edit("Annotations/000007.xml", "10.5", "ten"),
        r"object 2 \(cat\): expected numbers in bndbox/xmin",
    ),
    "not finite": (edit("Annotations/000007.xml", "10.5", "nan"), r"object 2 \(cat\): the box .* has no area"),
    "no area": (
        edit("Annotations/000002.xml", "<xmax>25", "<xmax>4"),
        r"object 1 \(cat\): .* \(5, 6\) to \(4, 36\) has no",
    ),
    "too wide": (
        edit("Annotations/000007.xml", "<xmax>60", "<xmax>61"),
        r"1 \(dog\): .* leaves the image of 60x40 pix",
    ),
    "from 0 on": (
        edit("Annotations/000007.xml", "<xmin>1<", "<xmin>0<"),
        r"object 1 \(dog\): the box from \(0, 1\) to",
    ),
    "unknown class": (
        edit("Annotations/000007.xml", "dog", "wolf"),
        "object 1: unknown class 'wolf'; expected one of cat",
    ),
    "no class": (edit("Annotations/000007.xml", "dog", ""), r"object 1 \(\): has no name"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_one_line_that_names_the_file(name, tmp_path):
    change, message = BAD[name]
    kit = write_kit(tmp_path / "kit", SCENES, classes=("cat", "dog"))
    path = change(kit)
    with pytest.raises(DataError, match=message) as caught:
        open_index(tmp_path / "kit#2007_trainval", LABELED)
    assert "\n" not in str(caught.value)
    # Of a list that names another image the file of the first class is what does not fit.
    assert str(path) in str(caught.value) or name == "an image more"


def test_a_path_that_stands_for_nothing(tmp_path):
    write_kit(tmp_path / "kit", SCENES)
    for splits, message in (
        ("", "'': expected <year>_<split>; splits of a PASCAL VOC"),
        ("2007trainval", "expected <year>_<split>"),
        ("2007_trainval+2007_trainval", "2007_trainval is named twice"),
        ("2007_test", r"test\.txt: no such file; there are trainval;"),
        ("2012_trainval", "VOC2012.*there are no lists at all"),
    ):
        with pytest.raises(DataError, match=message):
            open_index(tmp_path / f"kit#{splits}", LABELED)
    assert is_there(tmp_path / "kit#2007_trainval") and not is_there(tmp_path / "nowhere#2007_trainval")
    (tmp_path / "a#b").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "a#b/1.png")
    assert source_of(tmp_path / "a#b").WHAT == "images" and len(open_index(tmp_path / "a#b", LABELED)) == 1


def real_lists(root, split, changed=()):
    """The lists of VOC 2007 with the real counts: classes one after the other over the images, some of them changed."""
    counts = voc.COUNTS[2007, split]
    main = root / "VOC2007/ImageSets/Main"
    main.mkdir(parents=True, exist_ok=True)
    ids = [f"{number:06d}" for number in range(counts.images)]
    (main / f"{split}.txt").write_text("\n".join(ids))
    difficult = counts.difficult or (0,) * 20
    for place, name in enumerate(voc.CLASSES):
        symbols = ["1"] * counts.positives[place] + ["0"] * difficult[place]
        if name in changed:
            symbols = symbols[1:]
        symbols += ["-1"] * (len(ids) - len(symbols))
        (main / f"{name}_{split}.txt").write_text("\n".join(f"{i} {s:>2}" for i, s in zip(ids, symbols, strict=True)))


@pytest.mark.parametrize("split", ["trainval", "test"])
def test_the_real_set_has_to_be_whole(split, tmp_path):
    real_lists(tmp_path, split)
    scenes = voc.read(f"{tmp_path}#2007_{split}")
    assert (scenes.targets == 1).sum(axis=0).tolist() == list(voc.COUNTS[2007, split].positives)
    assert scenes.classes == sorted(voc.CLASSES) == list(voc.CLASSES)
    real_lists(tmp_path, split, changed=("sheep",))
    count = dict(zip(voc.CLASSES, voc.COUNTS[2007, split].positives, strict=True))["sheep"]
    message = f"{split} of VOC 2007 is not whole: sheep in {count - 1} instead of {count}"
    with pytest.raises(DataError, match=message):
        voc.read(f"{tmp_path}#2007_{split}")
    assert (voc.read(f"{tmp_path}#2007_{split}", any_counts=True).targets[:, 16] == 1).sum() == count - 1


# ------------------------------------------------------------------------------------------------ as a source


def test_any_back_end_cuts_crops_of_a_kit_and_no_image_has_a_label(tmp_path):
    data = f"{write_kit(tmp_path / 'kit', SCENES)}#2007_trainval"
    folder = config("folder", data, batch_size=2, micro_batch=2, workers=0)
    with pytest.raises(DataError, match="has several classes in an image, and k-NN needs labels"):
        loaders.open_data(folder, "train", for_labels="k-NN")
    for path in files_of(tmp_path / "kit", "Annotations/*"):
        path.unlink()  # nobody asks for them
    index = loaders.open_data(folder, "train")
    assert index.objects is None and index.classes == []
    assert take(loaders.open_train(folder, index, seed=0), 1)[0].label is None


def test_quarantine_keeps_the_objects_of_the_others(tmp_path):
    write_kit(tmp_path / "kit", SCENES)
    data, quarantine = f"{tmp_path / 'kit'}#2007_trainval", tmp_path / "quarantine.jsonl"
    quarantine.write_text('{"path": "VOC2007/JPEGImages/000002.jpg", "reason": "a test"}\n')
    whole, less = (
        loaders.open_root(config("scenes", data, quarantine=path), data, for_labels="this test")
        for path in (None, str(quarantine))
    )
    assert (len(whole), len(less), less.quarantined) == (3, 2, 1) and less.classes == whole.classes
    assert less.objects.image.tolist() == [0, 0] and np.array_equal(less.objects.box, whole.objects.box[2:])
    assert len({whole.fingerprint, less.fingerprint}) == 2


def test_boxes_are_part_of_the_fingerprint(tmp_path):
    data = write_kit(tmp_path / "kit", SCENES).with_name("kit#2007_trainval")
    before = open_index(data, LABELED).fingerprint
    edit("Annotations/000007.xml", "<xmax>60", "<xmax>59")(tmp_path / "kit")
    assert open_index(data, LABELED).fingerprint != before


# ------------------------------------------------------------------------------------------------ scenes of digits


def test_scenes_of_digits(kit):
    scenes = {split: voc.read(f"{kit}#2007_{split}") for split in ("trainval", "test")}
    assert {split: len(found.ids) for split, found in scenes.items()} == {"trainval": 24, "test": 10}
    upright, difficult, counts = Counter(), 0, Counter()
    for split, found in scenes.items():
        index = open_index(kit.with_name(f"{kit.name}#2007_{split}"), LABELED)
        assert found.classes == index.classes == [f"digit{number}" for number in range(10)]
        # The files of the classes say what the annotations say, and nothing is without an object that counts.
        assert np.array_equal(found.targets, voc.targets_of(index.objects, len(index), 10))
        assert (found.targets == 1).any(axis=1).all()
        upright.update((index.height > index.width).tolist())
        difficult += index.objects.difficult.sum()
        counts.update(np.bincount(index.objects.image).tolist())
        assert index.width.min() >= 128 and index.width.max() <= 224 and not index.problems
        for row in range(len(index)):
            ink = ink_of(index.read(row).float().mean(dim=0).numpy())
            inside = np.zeros_like(ink)
            for x1, y1, x2, y2 in index.objects.of(row).box.astype(int):
                inside[max(0, y1 - 2) : y2 + 2, max(0, x1 - 2) : x2 + 2] = True
                assert ink[y1:y2, x1:x2].any()
            assert not (ink & ~inside).any()
    assert min(upright.values()) > 5 and difficult > 0 and sorted(counts) == [1, 2, 3, 4]


def ink_of(gray):
    """Where digits are drawn: clouds are between 64 and 192, digits beyond, and JPEG rings a little."""
    return (gray < 48) | (gray > 208)


def test_scenes_are_drawn_by_their_number():
    make_images = tool("make_images")
    pool = [(number, np.eye(8)) for number in range(3)]
    one, again, other = (make_images.scene(number, pool) for number in (5, 5, 6))
    assert one[1] == again[1] and np.array_equal(np.array(one[0]), np.array(again[0]))
    assert one[1] != other[1] and make_images.scene(5, pool, seed=1)[1] != one[1]
    assert re.match(r"digit[012]$", one[1][0].label)
