"""Public data sets from their archives: what is written, and what is refused with nothing left behind."""

import errno
import io
import os
import pickle
import re
import resource
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

import loaders
from loaders import DataError
from tests.images import jpeg, picture
from tests.processes import tool
from tests.tiny import tiny

make_images = tool("make_images")
WNIDS = [f"n0{number}440764" for number in range(10)]


def pack(path, files, mode="w:gz"):
    """A tar archive of name -> content."""
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def photographs(root="imagenette2-160"):
    """As fast.ai packs them: two of each class for training and one for validation; other files, too."""
    files = {f"{root}/noisy_imagenette.csv": b"path,noisy_labels_0\n", f"{root}/train/.DS_Store": b"\0"}
    for number, wnid in enumerate(WNIDS):
        for split, count in (("train", 2), ("val", 1)):
            for place in range(count):
                image = Image.fromarray(picture(10 * number + place, 160, 213))
                image = image.convert("L") if number == 3 else image
                files[f"{root}/{split}/{wnid}/ILSVRC2012_val_{number}{place}.JPEG"] = jpeg(image, quality=95)
    return files


def pixels(count, seed):
    """Labels and pixels of `count` images in CIFAR-10's layout, [count, 3072] by channel."""
    images = np.stack([picture(seed + number, 32, 32) for number in range(count)])
    return [number % 10 for number in range(count)], images.transpose(0, 3, 1, 2).reshape(count, 3072)


def batches(count=20):
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    return {name: pixels(count, 100 * number) for number, name in enumerate(names)}


def binary():
    files = {"cifar-10-batches-bin/batches.meta.txt": b"airplane\n", "cifar-10-batches-bin/readme.html": b"<a>"}
    for name, (labels, images) in batches().items():
        records = np.concatenate((np.array(labels, dtype=np.uint8)[:, None], images), axis=1)
        files[f"cifar-10-batches-bin/{name}.bin"] = records.tobytes()
    return files


def pickled(protocol=2):
    files = {"cifar-10-batches-py/batches.meta": pickle.dumps({b"num_vis": 3072}, protocol)}
    for name, (labels, images) in batches().items():
        batch = {b"batch_label": name.encode(), b"labels": labels, b"data": images, b"filenames": [b"a.png"] * 20}
        files[f"cifar-10-batches-py/{name}"] = pickle.dumps(batch, protocol)
    return files


def hundred(**changes):
    """CIFAR-100 in its binary layout: a coarse and a fine label before the pixels."""
    files = {"test.bin": 5, "train.bin": 9, "fine_label_names.txt": 0}
    for name, count in files.items():
        labels = np.stack((np.full(count, 7), 99 - 11 * np.arange(count)), axis=1).astype(np.uint8)
        images = pixels(count, 900 + count)[1] if count else np.zeros((0, 3072), dtype=np.uint8)
        files[name] = np.concatenate((labels, images), axis=1).tobytes()
    files["fine_label_names.txt"] = "".join(f"thing_{number:02d}\n" for number in range(100)).encode()
    return {f"cifar-100-binary/{name}": content for name, content in {**files, **changes}.items() if content}


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_imagenette_is_made_smaller_and_read_by_the_loaders(tmp_path):
    out = tmp_path / "set"
    make_images.make("imagenette", out, source=pack(tmp_path / "imagenette2-160.tgz", photographs()))
    assert len(tree(out)) == 30 and sorted(path.name for path in (out / "train").iterdir()) == WNIDS
    for path in out.rglob("*.jpg"):
        image = Image.open(path)
        assert image.size == (170, 128) and image.mode == ("L" if path.parent.name == WNIDS[3] else "RGB")
    files = [f"data.train={out / 'train'}", f"data.val={out / 'val'}", "data.backend=folder", "data.options={}"]
    data = tiny("quick/supervised.yaml", tmp_path, *files).data
    train, val = (loaders.open_data(data, split) for split in ("train", "val"))
    assert (len(train), len(val)) == (20, 10) and train.classes == val.classes == WNIDS


def test_small_photographs_are_not_enlarged(tmp_path):
    files = {name: jpeg(Image.new("RGB", (90, 60))) if name.endswith("EG") else b"" for name in photographs()}
    make_images.make("imagenette", tmp_path / "set", source=pack(tmp_path / "a.tgz", files))
    assert {Image.open(path).size for path in (tmp_path / "set").rglob("*.jpg")} == {(90, 60)}


@pytest.mark.parametrize("files", [binary, pickled], ids=["binary", "python"])
def test_cifar10_keeps_its_pixels(files, tmp_path):
    archive = pack(tmp_path / "cifar.tar.gz", files())
    make_images.make("cifar10", tmp_path / "exact", source=archive, png=True)
    make_images.make("cifar10", tmp_path / "set", source=archive)
    expected = {"train": [], "val": []}
    for name, (labels, images) in batches().items():
        split = "val" if name == "test_batch" else "train"
        expected[split] += list(zip(labels, images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), strict=True))
    for split, images in expected.items():
        assert len(tree(tmp_path / "exact" / split)) == len(images) == (100 if split == "train" else 20)
        for number, (label, image) in enumerate(images):
            place = f"{split}/{make_images.CIFAR_CLASSES[label]}/{number:05d}"
            assert np.array_equal(np.array(Image.open(tmp_path / "exact" / f"{place}.png")), image)
            near = np.array(Image.open(tmp_path / "set" / f"{place}.jpg")).astype(int)
            assert np.abs(near - image).mean() < 4


def test_cifar100_has_its_fine_labels(tmp_path):
    make_images.make("cifar100", tmp_path / "set", source=pack(tmp_path / "a.tar.gz", hundred()), png=True)
    for split, count in (("train", 9), ("val", 5)):
        expected = pixels(count, 900 + count)[1].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        assert len(tree(tmp_path / "set" / split)) == count
        for number, image in enumerate(expected):
            place = tmp_path / "set" / split / f"thing_{99 - 11 * number:02d}" / f"{number:05d}.png"
            assert np.array_equal(np.array(Image.open(place)), image)


def test_a_limit_takes_as_many_of_each_class(tmp_path):
    archive = pack(tmp_path / "cifar.tar.gz", binary())
    make_images.make("cifar10", tmp_path / "set", source=archive, limit=25)
    assert len(tree(tmp_path / "set/train")) == len(tree(tmp_path / "set/val")) == 20
    assert len(list((tmp_path / "set/val").iterdir())) == 10


class Harmful:
    """What a pickle can do to who reads it."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def test_a_pickle_that_would_run_something_is_refused(tmp_path):
    marker = tmp_path / "ran"
    files = {**pickled(), "cifar-10-batches-py/data_batch_3": pickle.dumps({b"labels": Harmful(marker)}, 2)}
    with pytest.raises(DataError, match=r"data_batch_3: not a file of CIFAR-10 \(it names \w+\.open, which no array"):
        make_images.make("cifar10", tmp_path / "set", source=pack(tmp_path / "a.tar.gz", files))
    assert not marker.exists() and not (tmp_path / "set").exists()


def changed(files, name, content):
    full = next(key for key in files if key.endswith(name))
    return {**files, full: content}


BAD = {
    "missing": ("imagenette", None, r"no such file; get https://\S+/imagenette2-160\.tgz and give it with --source"),
    "not an archive": ("cifar10", b"hello", r"not a whole tar archive .*; get it again from https://\S+cifar-10"),
    "another kind": ("imagenette", binary, r"expected 10 folders such as imagenette2-160/train/.*found 0; get https"),
    "other archive": ("cifar10", photographs, r"no data_batch_1, .* in it, expected an archive of CIFAR-10; get https"),
    "a class lacks": (
        "imagenette",
        lambda: {name: item for name, item in photographs().items() if f"val/{WNIDS[4]}" not in name},
        "imagenette2-160/val/n01440764 with .JPEG files, found 9",
    ),
    "a batch lacks": (
        "cifar10",
        lambda: {name: item for name, item in binary().items() if "batch_4" not in name},
        "no data_batch_4 in it",
    ),
    "short records": ("cifar10", lambda: changed(binary(), "batch_2.bin", b"12345"), r"5 bytes, expected a multiple"),
    "a label of 77": ("cifar10", lambda: changed(binary(), "batch_2.bin", b"M" + bytes(3072)), "labels from 0 to 9"),
    "no array": (
        "cifar10",
        lambda: changed(pickled(), "batch_2", pickle.dumps({b"labels": [1], b"data": b"x"}, 2)),
        r"expected uint8 pixels \[N, 3072\]",
    ),
    "not a pickle": ("cifar10", lambda: changed(pickled(), "batch_2", b"(dp0"), "data_batch_2: not a file of CIFAR-10"),
    "not an image": ("imagenette", lambda: changed(photographs(), "30.JPEG", b"x"), "30.JPEG: not a readable image"),
    "pickles of 100": (
        "cifar100",
        {"cifar-100-python/train": b"\x80", "cifar-100-python/test": b"\x80"},
        "is CIFAR-100 as pickles, .*expected the binary version; get https",
    ),
    "ten for a hundred": ("cifar100", binary, r"no train\.bin, test\.bin, fine_label_names\.txt in it"),
    "two names": ("cifar100", lambda: hundred(**{"fine_label_names.txt": b"a b"}), "names of 100 classes, got 2"),
    "short of 100": ("cifar100", lambda: hundred(**{"train.bin": b"12345"}), "5 bytes, expected a multiple of 3074"),
    "leaves the folder": ("imagenette", lambda: {"../../etc/evil": b"", **photographs()}, r"'\.\./\.\./etc/evil' is a"),
    "absolute": ("cifar10", lambda: {"/etc/evil": b"", **binary()}, "'/etc/evil' is a link or leaves the folder"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_archives_are_one_line_and_leave_nothing(name, tmp_path, monkeypatch, capsys):
    dataset, files, message = BAD[name]
    archive = tmp_path / "archive.tgz"
    if callable(files):
        pack(archive, files())
    elif isinstance(files, dict):
        pack(archive, files)
    elif files is not None:
        archive.write_bytes(files)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(DataError, match=message) as caught:
        make_images.make(dataset, tmp_path / "set", source=archive)
    assert "\n" not in str(caught.value) and str(archive) in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before
    monkeypatch.setattr(sys, "argv", ["make_images.py", dataset, str(tmp_path / "set"), "--source", str(archive)])
    assert make_images.main() == 2 and capsys.readouterr().err.startswith(f"error: {archive}")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95, 0.999])
@pytest.mark.parametrize(("dataset", "files"), [("imagenette", photographs), ("cifar10", binary)])
def test_an_archive_that_is_cut_short_leaves_nothing(dataset, files, share, tmp_path):
    archive = pack(tmp_path / "a.tgz", files())
    content = archive.read_bytes()
    archive.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(DataError, match=r"a\.tgz: .*(not a whole tar archive|ends inside it)"):
        make_images.make(dataset, tmp_path / "set", source=archive)
    assert [path.name for path in tmp_path.iterdir()] == ["a.tgz"]


def test_a_link_in_an_archive_is_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tgz", "w:gz") as archive:
        member = tarfile.TarInfo("imagenette2-160/train/n01440764/1.JPEG")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(member)
    with pytest.raises(DataError, match="is a link or leaves the folder"):
        make_images.make("imagenette", tmp_path / "set", source=tmp_path / "a.tgz")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["digits", "{out}", "--limit", "0"], "--limit: expected at least 10"),
        (["photos", "{out}", "--limit", "-5"], "--limit: expected at least 10"),
        (["cifar100", "{out}", "--limit", "50"], "--limit: expected at least 100"),
        (["digits", "{out}", "--png"], "--png: expected with cifar10 or cifar100 only"),
        (["imagenette", "{out}"], "imagenette: expected its archive with --source; get https://"),
        (["fashion_mnist", "{out}", "--source", "{out}"], "train-images-idx3-ubyte.gz: no such file; run `apt-get"),
        (["digits", "{file}"], "is there and holds no images in train and val"),
        (["digits", "{link}"], "link: is there and holds no images in train and val"),
        (["digits", "/"], "/: is there and holds no images in train and val"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("/purged/scratch")
    named = [word.format(**{name: tmp_path / name for name in ("out", "file", "link")}) for word in arguments]
    monkeypatch.setattr(sys, "argv", ["make_images.py", *named])
    assert make_images.main() == 2
    said = capsys.readouterr()
    assert message in said.err and said.err.count("\n") == 1 and not said.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_disk_that_takes_half_an_image_has_no_set(kind, tmp_path):
    one = make_images.Picture("train", "a", Image.fromarray(picture(1, 40, 40)), {"format": kind})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))
    try:
        with pytest.raises(OSError, match=re.escape(f"{os.strerror(errno.EFBIG)}: '{tmp_path / 'set'}'")):
            make_images.write(iter([one]), tmp_path / "set")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_idx_file_is_named(tmp_path):
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(b"no gzip")
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz: not a whole idx file packed with gzip"):
        make_images.make("fashion_mnist", tmp_path / "set", source=tmp_path)


def test_digits_are_made_once(tmp_path, capsys):
    pytest.importorskip("sklearn")
    make_images.make("digits", tmp_path / "set", limit=20)
    assert len(tree(tmp_path / "set")) == 40
    make_images.make("digits", tmp_path / "set")
    assert "is there already" in capsys.readouterr().out and len(tree(tmp_path / "set")) == 40


def test_scenes_are_whole_or_not_there(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    out = tmp_path / "scenes"
    monkeypatch.setattr(sys, "argv", ["make_images.py", "digit_scenes", str(out), "--limit", "10"])
    assert make_images.main() == 0
    files = tree(out)
    assert len([name for name in files if name.endswith(".jpg")]) == 20 and len(files) == 2 * 20 + 2 * 11
    assert make_images.main() == 0 and "is there already" in capsys.readouterr().out and tree(out) == files
    monkeypatch.setattr(make_images, "annotation", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make_images.make("digit_scenes", tmp_path / "again", limit=10)
    (tmp_path / "other").mkdir()
    with pytest.raises(DataError, match="holds no images in VOC2007"):
        make_images.make("digit_scenes", tmp_path / "other", limit=10)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "scenes"]
