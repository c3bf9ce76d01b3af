"""Images without labels, and what a path is taken for: every source, every tool, training, and what is refused."""

import io
import json
import logging
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import loaders
from engine import data as run_data
from engine import dist, preflight
from engine import recipe as recipes
from loaders import DataError
from loaders.config import Request
from loaders.machine import kernel
from loaders.sources import is_there, open_index, shards
from tests.images import jpeg, odd_files, picture, write_tree
from tests.loading import FILES, as_beton, config, convert, needs, open_eval, open_train, take
from tests.processes import tool
from tests.runs import assert_same_run, rows, run
from tests.tiny import ROOT, tiny


def open_at(root, labels=None, asks=False):
    return open_index(root, Request(10**8, labels, asks))


def put(root, *names):
    """Images of those names below a folder."""
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(Image.fromarray(picture(number, 40 + number, 50))))
    return root


def found(index):
    return [os.fsdecode(name) for name in index.names]


@pytest.fixture
def flat(tmp_path):
    return put(tmp_path / "photos", *(f"{number:02d}.jpg" for number in range(24)))


# ------------------------------------------------------------------------------------------------ folders


def test_a_flat_folder(flat):
    index = open_at(flat)
    assert found(index) == [f"{number:02d}.jpg" for number in range(24)]
    assert index.label is None and index.classes == [] and not index.is_labeled
    assert index.reading == "images without labels"


def test_a_tree_of_any_depth(tmp_path):
    root = put(tmp_path / "photos", "2019/trip/a.jpg", "2019/b.jpg", "2020/x/y/z/c.JPEG", "2020/d.png")
    index = open_at(root, "none")
    assert found(index) == ["2019/b.jpg", "2019/trip/a.jpg", "2020/d.png", "2020/x/y/z/c.JPEG"] and index.label is None
    labeled = open_at(root)  # its folders could be classes; nobody has to use them
    assert found(labeled) == found(index) and labeled.label.tolist() == [0, 0, 1, 1]
    assert labeled.reading == "2 folders as classes (data.labels=none: the same images without labels)"


def test_images_and_folders_of_images_are_two_readings(tmp_path):
    root = put(tmp_path / "photos", "a.jpg", "one/b.jpg", "two/c.jpg")
    with pytest.raises(
        DataError, match=r"holds both images \(a\.jpg\) and folders of images.*data\.labels=none"
    ) as caught:
        open_at(root)
    assert "\n" not in str(caught.value) and "data.labels=auto" in str(caught.value)
    everything = open_at(root, "none")
    assert found(everything) == ["a.jpg", "one/b.jpg", "two/c.jpg"] and everything.label is None
    classes = open_at(root, "auto")
    assert found(classes) == ["one/b.jpg", "two/c.jpg"] and classes.classes == ["one", "two"]
    assert "without the 1 images beside them" in classes.reading


def test_empty_folders_and_those_of_the_system(tmp_path):
    root = put(tmp_path / "photos", "one/a.jpg", "two/b.jpg", "@eaDir/thumbnail.jpg", ".hidden/c.jpg", "one/.d.jpg",
               "one/@eaDir/e.jpg", ".ipynb_checkpoints/f.jpg", "#snapshot/g.jpg", "two/.ipynb_checkpoints/h.jpg",
               "@Recycle/i.jpg")  # fmt: skip
    (root / "Thumbs.db").write_bytes(b"of another system")
    (root / "lost+found").mkdir()
    (root / "empty").mkdir()
    assert open_at(root).classes == ["one", "two"]
    with pytest.raises(DataError, match=r"photos/empty: class without images"):
        open_at(root, asks=True)
    (root / "empty").rmdir()
    assert found(open_at(root, asks=True)) == ["one/a.jpg", "two/b.jpg"]


def test_links_are_followed_but_not_in_circles(tmp_path):
    root = put(tmp_path / "photos", "one/a.jpg", "two/b.jpg")
    put(tmp_path / "elsewhere", "deep/c.jpg")
    (root / "one" / "more").symlink_to(tmp_path / "elsewhere")
    (root / "one" / "back").symlink_to(root)
    (root / "two" / "d.jpg").symlink_to(tmp_path / "elsewhere" / "deep" / "c.jpg")
    assert found(open_at(root)) == ["one/a.jpg", "one/back/two/b.jpg", "one/back/two/d.jpg", "one/more/deep/c.jpg",
                                    "two/b.jpg", "two/d.jpg"]  # fmt: skip


def test_a_folder_that_looks_like_an_image(tmp_path):
    root = put(tmp_path / "photos", "one.jpg/a.jpg", "two.jpg/b.jpg")
    assert open_at(root).classes == ["one.jpg", "two.jpg"]


def test_a_folder_that_cannot_be_listed_is_no_empty_one(tmp_path, monkeypatch):
    root = put(tmp_path / "photos", "one/a.jpg", "two/deep/b.jpg")
    real = os.scandir

    def scandir(path):
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match=r"two/deep: cannot be listed: Permission denied"):
        open_at(root)


def test_all_usual_endings_of_what_is_decoded(tmp_path):
    names = ["a.JPG", "b.jfif", "c.jpe", "d.pgm", "e.pbm", "f.pnm", "g.webp", "h.TIF"]
    assert found(open_at(put(tmp_path / "photos", *names, "i.txt"))) == names


def test_an_empty_folder(tmp_path):
    (tmp_path / "photos" / "one").mkdir(parents=True)
    with pytest.raises(DataError, match=r"photos: no images; expected files ending in \.jpg"):
        open_at(tmp_path / "photos")


# ------------------------------------------------------------------------------------------------ two readings


def write_tar(path, members):
    """`members`: name -> bytes, or the name of another member that it links to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
            else:
                entry.type, entry.linkname = content
                tar.addfile(entry)
    return path


PIXELS = jpeg(Image.fromarray(picture(0, 40, 50)))


def test_one_path_is_one_data_set(tmp_path):
    root = write_tree(tmp_path / "data")
    put(root, "class0/._0000.jpg")
    (root / "._x.tar").write_bytes(b"of another system")
    assert len(open_at(root)) == 24
    write_tar(root / "n01440764.tar", {"a.jpg": PIXELS})
    with pytest.raises(DataError, match=r"data: holds images and tar shards, which are two data sets"):
        open_at(root)
    assert len(open_at(root / "*.tar")) == 1
    (root / "n01440764.tar").unlink()
    (root / "train.parquet").write_bytes(b"")
    with pytest.raises(DataError, match=r"data: holds images and Parquet files"):
        open_at(root)


# ------------------------------------------------------------------------------------------------ shards


def test_shards_without_labels(tmp_path):
    write_tar(tmp_path / "s" / "a.tar", {"x.jpg": PIXELS, "y.png": PIXELS, "x.json": b"{}"})
    index = open_at(tmp_path / "s")
    assert found(index) == ["a.tar/x.jpg", "a.tar/y.png"] and index.label is None
    assert index.reading == "shards without labels"


def test_a_shard_of_a_folder_itself_has_no_labels(flat, tmp_path):
    subprocess.run(["tar", "-cf", tmp_path / "a.tar", "-C", flat, "."], check=True)  # its names are ./00.jpg
    index = open_at(tmp_path / "a.tar")
    assert len(index) == 24 and index.label is None


@pytest.mark.parametrize("other", [{"d.jpg": PIXELS}, {"d.jpg": PIXELS, "e.cls": b"1"}])
def test_labeled_and_unlabeled_shards_are_not_mixed(other, tmp_path):
    write_tar(tmp_path / "s" / "a.tar", {"c.jpg": PIXELS, "c.cls": b"0"})
    write_tar(tmp_path / "s" / "b.tar", other)
    with pytest.raises(DataError, match=r"b\.tar: d\.jpg: has no label, c\.jpg of a\.tar has one.*data\.labels=none"):
        open_at(tmp_path / "s")
    index = open_at(tmp_path / "s", "none")
    assert len(index) == 2 and index.label is None


def test_every_image_of_a_shard_is_indexed_or_named(tmp_path, caplog):
    names = [f"cats/img.{number:04d}.jpg" for number in range(10)]
    members = dict.fromkeys(names, PIXELS) | {
        "dogs/a.jpg": PIXELS,
        "dogs/a.seg.png": PIXELS,  # a mask of the sample before
        "dogs/b.jpg": PIXELS,
        "dogs/b.png": PIXELS,  # both plain: two images
        "dogs/c.jpg": (tarfile.LNKTYPE, "dogs/a.jpg"),
        "dogs/d.jpg": (tarfile.SYMTYPE, "../cats/img.0003.jpg"),
        "dogs/e.jpg": (tarfile.SYMTYPE, "/nowhere.jpg"),
        "dogs/._f.jpg": b"of another system",
        "dogs/readme.txt": b"text",
    }
    write_tar(tmp_path / "s" / "a.tar", members)
    with caplog.at_level(logging.WARNING):
        index = open_at(tmp_path / "s")
    kept = [name.removeprefix("a.tar/") for name in found(index)]
    assert kept == [*names, "dogs/a.jpg", "dogs/b.jpg", "dogs/b.png", "dogs/c.jpg", "dogs/d.jpg"]
    assert index.classes == ["cats", "dogs"] and index.label.tolist() == [0] * 10 + [1] * 5
    assert not index.problems and index.content(13) == PIXELS
    (said,) = caplog.messages
    assert (
        "2 members are left out" in said and "dogs/a.seg.png (belongs to dogs/a.jpg)" in said and "dogs/e.jpg" in said
    )


@pytest.mark.parametrize("cut", [False, True])
def test_no_image_behind_a_damaged_header_is_lost_in_silence(cut, tmp_path):
    shard = write_tar(tmp_path / "s" / "a.tar", {f"{number}.jpg": PIXELS for number in range(4)})
    content = bytearray(shard.read_bytes())
    at = content.index(b"2.jpg\0")
    content[at] = ord("3")
    shard.write_bytes(content[: at + 200] if cut else content)
    with pytest.raises(DataError, match=rf"a\.tar: is not a whole tar file: .* is damaged at byte {at:,}$"):
        open_at(tmp_path / "s")


def test_a_shard_without_its_end_is_said(tmp_path, caplog):
    shard = write_tar(tmp_path / "s" / "a.tar", {f"{number}.jpg": PIXELS for number in range(4)})
    content = shard.read_bytes()
    shard.write_bytes(content[: content.index(b"2.jpg\0")])
    assert len(open_at(tmp_path / "s")) == 2
    assert [message.split("a.tar")[1] for message in caplog.messages] == [
        ": has no mark at its end; it may be cut short"
    ]


def test_shards_of_one_name_in_two_folders(tmp_path):
    for number, folder in enumerate(("one", "two/deep")):
        write_tar(tmp_path / "s" / folder / "0.tar", {"a.jpg": PIXELS if number else b"no image"})
    index = open_at(tmp_path / "s" / "{one,two/deep}" / "0.tar")
    assert found(index) == ["one/0.tar/a.jpg", "two/deep/0.tar/a.jpg"]
    assert index.path(0) == f"{tmp_path}/s/one/0.tar/a.jpg" and list(index.problems) == [0]
    assert len(index.without([b"one/0.tar/a.jpg"])) == 1 and index.content(1) == PIXELS


@pytest.mark.parametrize("label", ["-1", "1000000", "9" * 5000])
def test_a_number_that_is_no_label_is_refused(label, tmp_path):
    root = put(tmp_path / "photos", "a.jpg", "b.jpg")
    (root / "list.txt").write_text(f"a.jpg 0\nb.jpg {label}\n")
    write_tar(tmp_path / "s" / "a.tar", {"a.jpg": PIXELS, "a.cls": label[:900].encode()})
    for place in (root / "list.txt", tmp_path / "s"):
        with pytest.raises(
            DataError, match=rf"{place}: label {label[:20]}; expected 0 to 999999, or data\.labels=none"
        ):
            open_at(place)
        assert open_at(place, "none").label is None
    (root / "list.txt").write_text("a.jpg\t0\nb.jpg\t\n")
    with pytest.raises(DataError, match=r"list\.txt: line 2: expected a class behind the tab"):
        open_at(root / "list.txt")


def test_labels_of_names_with_dots(tmp_path):
    members = {"img.0001.jpg": PIXELS, "img.0001.cls": b"1", "img.0002.jpg": PIXELS, "img.0002.cls": b"0"}
    write_tar(tmp_path / "s" / "a.tar", members | {"k.jpg": PIXELS, "k.cls": b"2"})
    assert open_at(tmp_path / "s").label.tolist() == [1, 0, 2]


def test_braces(tmp_path):
    for number in range(8, 12):
        write_tar(tmp_path / f"part-{number:03d}.tar", {f"{number}.jpg": PIXELS})
    index = open_at(tmp_path / "part-{008..011}.tar")
    assert found(index) == [f"part-{number:03d}.tar/{number}.jpg" for number in range(8, 12)]
    assert len(open_at(tmp_path / "part-{009,011}.tar")) == 2 and len(open_at(tmp_path / "part-0{1..1}*.tar")) == 2
    with pytest.raises(DataError, match=r"part-012\.tar: no such shard"):
        open_at(tmp_path / "part-{008..012}.tar")
    assert shards.expand("a{1..3}b{x,y}") == ["a1bx", "a1by", "a2bx", "a2by", "a3bx", "a3by"]
    assert shards.expand("a{b}c") == ["a{b}c"] and len(shards.expand("{0.." + "9" * 5000 + "}")) == 1
    (tmp_path / "odd{1..2}").mkdir()
    put(tmp_path / "odd{1..2}", "a.jpg")
    assert found(open_at(tmp_path / "odd{1..2}")) == ["a.jpg"]


@pytest.mark.parametrize("name", ["a b", "[ab]", "x{1,2}", "{0..3}", "*", "q?", "'\"", "h#h", "e=e", "-d", "a\nb"])
def test_a_path_that_is_there_is_no_pattern(name, tmp_path):
    put(tmp_path / "photos" / name, "a.jpg", "b.jpg")
    assert found(open_at(tmp_path / "photos" / name)) == ["a.jpg", "b.jpg"]
    (tmp_path / "photos" / name / "list.txt").write_text("b.jpg\n")
    assert found(open_at(tmp_path / "photos" / name / "list.txt")) == ["b.jpg"]
    for number in (1, 2):
        write_tar(tmp_path / "shards" / name / f"{number}.tar", {"a.jpg": PIXELS})
    for pattern, count in (("", 2), ("1.tar", 1), ("*.tar", 2), ("[12].tar", 2), ("{1..2}.tar", 2), ("{1,2}.tar", 2)):
        assert is_there(tmp_path / "shards" / name / pattern)
        assert len(open_at(tmp_path / "shards" / name / pattern)) == count


def test_braces_are_those_of_a_shell(monkeypatch):
    for pattern in ("a{1..3}", "{3..1}", "{08..11}", "{1..010}", "{0..10..4}", "{10..0..5}", "x{a,b{1,2}}y{c,d}",
                    "{a,}b", "{a}", "a{b", "a}b", "{}", "{a,b", "{{a,b}}", "{a}{1..2}", "{1..2}{x,y}"):  # fmt: skip
        shell = subprocess.run(["bash", "-c", f"printf '%s\\n' {pattern}"], capture_output=True, text=True, check=True)
        assert shards.expand(pattern) == shell.stdout.splitlines(), pattern
    monkeypatch.setattr(shards, "_MOST", 1000)
    assert len(shards.expand("{1..1000}")) == 1000
    for pattern in ("{0..999999999}", "{0..999999}{0..999999}", "{a,b}" * 64):
        with pytest.raises(DataError, match=r"stands for more than 1,000 files") as caught:
            shards.expand(pattern)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ending", [".TAR", ".Tar"])
def test_endings_in_capitals(ending, tmp_path):
    write_tar(tmp_path / "s" / f"a{ending}", {"cats/A.JPG": PIXELS, "cats/B.JPEG": PIXELS, "dogs/B.jpg": PIXELS})
    for root in (tmp_path / "s", tmp_path / "s" / f"a{ending}"):
        index = open_at(root)
        assert len(index) == 3 and index.label.tolist() == [0, 0, 1]
    write_tar(tmp_path / "t.tar", {"a.JPG": PIXELS, "a.CLS": b"1", "b.jpg": PIXELS, "b.cls": b"0"})
    assert open_at(tmp_path / "t.tar").label.tolist() == [1, 0]
    put(tmp_path, "x.jpg")
    (tmp_path / "LIST.TXT").write_text("x.jpg\n")
    assert found(open_at(tmp_path / "LIST.TXT")) == ["x.jpg"]


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names_in_shards(format, tmp_path):
    names = [f"{'d' * 90}/{'e' * 90}/{'f' * 150}.jpg", f"{'d' * 90}/{'e' * 90}/ü ñ.jpg"]
    with tarfile.open(tmp_path / "a.tar", "w", format=format) as tar:
        for name in names:
            entry = tarfile.TarInfo(name)
            entry.size = len(PIXELS)
            tar.addfile(entry, io.BytesIO(PIXELS))
    index = open_at(tmp_path / "a.tar")
    assert found(index) == [f"a.tar/{name}" for name in names] and index.content(1) == PIXELS


def test_a_member_that_is_there_twice_is_named(tmp_path, caplog):
    write_tar(tmp_path / "a.tar", {"a.jpg": b"old", "b.jpg": PIXELS})
    with tarfile.open(tmp_path / "a.tar", "a") as tar:  # as `tar -r` updates a file
        entry = tarfile.TarInfo("a.jpg")
        entry.size = len(PIXELS)
        tar.addfile(entry, io.BytesIO(PIXELS))
    index = open_at(tmp_path / "a.tar")
    assert len(index) == 2 and index.content(0) == PIXELS
    assert "1 members are left out: a.jpg (more than once in the shard, the last one is used)" in caplog.text


@pytest.mark.parametrize(
    ("root", "message"),
    [
        ("z" * 300, "cannot be listed: File name too long"),
        ("a\0b", "no path has a NUL in it"),
        ("loop", "cannot be listed: Too many levels of symbolic links"),
        ("nothing", "no such folder"),
        ("photo.jpg", "is no folder, and its name says of no list or shards that it is one"),
        ("packed", r"no images; expected files ending in .*; found 2 others, such as a\.tar\.gz"),
        ("closed.tar", "cannot be read: Permission denied|is not a whole tar file"),
    ],
)
def test_a_path_that_cannot_be_read_is_one_line(root, message, tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "nothing").symlink_to("elsewhere")
    put(tmp_path, "photo.jpg")
    (tmp_path / "packed").mkdir()
    for name in ("a.tar.gz", "b.tar.gz", ".hidden"):
        (tmp_path / "packed" / name).write_bytes(b"")
    (tmp_path / "closed.tar").write_bytes(b"x" * 1000)
    is_there(tmp_path / root)
    with pytest.raises(DataError, match=message) as caught:
        open_at(tmp_path / root)
    assert "\n" not in str(caught.value) and is_there(tmp_path / root) == (root != "nothing")


def test_what_may_not_be_seen_is_said_to_be_so(tmp_path, monkeypatch):
    put(tmp_path / "photos", "a.jpg")
    for call in ("stat", "scandir"):
        honest = getattr(os, call)

        def refuse(path, *arguments, honest=honest, **options):
            if str(path).startswith(str(tmp_path / "photos")):
                raise PermissionError(13, "Permission denied")
            return honest(path, *arguments, **options)

        monkeypatch.setattr(os, call, refuse)
    assert is_there(tmp_path / "photos")
    with pytest.raises(DataError, match=r"photos: cannot be listed: Permission denied"):
        open_at(tmp_path / "photos")


# ------------------------------------------------------------------------------------------------ lists


def test_lists_without_labels_with_blanks_and_absolute_paths(tmp_path):
    root = put(tmp_path / "photos", "a b.jpg", "c.jpg")
    other = put(tmp_path / "other", "d e.png")
    (root / "list.txt").write_text(f"a b.jpg\n\nc.jpg\n{other / 'd e.png'}\n../other/d e.png\n")
    index = open_at(root / "list.txt")
    assert index.label is None and len(index) == 4 and not index.problems
    assert index.path(2) == str(other / "d e.png") and index.read(2).shape == index.read(3).shape == (3, 40, 50)
    (root / "tabs.txt").write_text(f"a b.jpg\tcat\n{other / 'd e.png'}\tdog\n")
    assert open_at(root / "tabs.txt").classes == ["cat", "dog"]
    assert open_at(root / "tabs.txt", "none").label is None


def test_encodings_of_a_list(tmp_path):
    root = put(tmp_path, "ä.jpg", "b.jpg")
    (root / "bom.txt").write_bytes(b"\xef\xbb\xbf" + "ä.jpg\r\nb.jpg\r\n".encode())
    assert found(open_at(root / "bom.txt")) == ["ä.jpg", "b.jpg"]
    (root / "wide.txt").write_text("ä.jpg\n", encoding="utf-16")
    with pytest.raises(DataError, match=r"wide\.txt: is UTF-16; expected UTF-8"):
        open_at(root / "wide.txt")


# ------------------------------------------------------------------------------------------------ beton, Parquet


def test_a_beton_without_labels(flat, tmp_path):
    assert convert(flat, tmp_path / "x.beton") == 24
    index, files = open_at(tmp_path / "x.beton"), open_at(flat)
    assert index.label is None and index.classes == [] and len(index) == 24
    assert all(torch.equal(index.read(row), files.read(row)) for row in range(24))
    assert tool("convert_imagenet_to_ffcv").verify(tmp_path / "x.beton", 2) == []
    assert open_at(as_beton(write_tree(tmp_path / "data")), "none").label is None


def write_parquet(path, contents, labels=None, names=None, column="image", **options):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {column: [{"bytes": content, "path": f"{n}.jpg"} for n, content in enumerate(contents)]}
    table = pa.table(columns | ({"label": labels} if labels is not None else {}))
    if names:
        features = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    pq.write_table(table, path, row_group_size=5, **options)
    return path


def test_parquet(flat, tmp_path):
    contents = [path.read_bytes() for path in sorted(flat.iterdir())]
    labels = [number % 3 for number in range(24)]
    write_parquet(tmp_path / "p" / "train-00000-of-00002.parquet", contents[:10], labels[:10], ["x", "y", "z"])
    write_parquet(tmp_path / "p" / "train-00001-of-00002.parquet", contents[10:], labels[10:], ["x", "y", "z"])
    index = open_at(tmp_path / "p")
    assert index.classes == ["x", "y", "z"] and index.label.tolist() == labels
    assert [index.content(row) for row in range(24)] == contents
    assert open_at(tmp_path / "p" / "train-*.parquet").fingerprint == index.fingerprint
    assert open_at(tmp_path / "p", "none").label is None
    (copy,) = {os.fsdecode(file) for file in index.pieces.files}
    os.unlink(copy)
    assert open_at(tmp_path / "p").content(23) == contents[23]  # it is made again
    write_parquet(tmp_path / "plain.parquet", contents)
    assert open_at(tmp_path / "plain.parquet").label is None
    write_parquet(tmp_path / "secret.parquet", contents, [-1] * 24)
    assert open_at(tmp_path / "secret.parquet").label is None


def test_a_copy_of_parquet_that_is_cut_is_made_again(tmp_path):
    pytest.importorskip("pyarrow")
    root = write_parquet(tmp_path / "a.parquet", [PIXELS] * 3)
    copy = Path(os.fsdecode(open_at(root).pieces.files[0]))
    os.truncate(copy, 2 * len(PIXELS))
    index = open_at(root)
    assert [index.content(row) for row in range(3)] == [PIXELS] * 3


def test_parquet_of_one_name_in_two_folders(tmp_path):
    pytest.importorskip("pyarrow")
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write_parquet(tmp_path / folder / "0.parquet", [PIXELS])
    index = open_at(tmp_path / "{one,two}" / "0.parquet")
    assert found(index) == ["one/0.parquet/0", "two/0.parquet/0"]


@pytest.mark.parametrize("backend", FILES)
def test_every_back_end_reads_parquet(backend, flat, tmp_path):
    needs(backend)
    write_parquet(tmp_path / "a.parquet", [path.read_bytes() for path in sorted(flat.iterdir())])
    one, other = (take(open_train(config(backend, root)), 6) for root in (flat, tmp_path / "a.parquet"))
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a.rows, b.rows) and torch.equal(a.views[0], b.views[0]) and a.label is b.label is None


def test_what_is_wrong_with_parquet_is_one_line(flat, tmp_path, monkeypatch):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["a"], "url": ["b"]}), tmp_path / "none.parquet")
    with pytest.raises(DataError, match=r"none\.parquet: has columns text, url; expected one `image`"):
        open_at(tmp_path / "none.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match=r"bad\.parquet: cannot be read as Parquet") as caught:
        open_at(tmp_path / "bad.parquet")
    assert "\n" not in str(caught.value)
    write_parquet(tmp_path / "m" / "a.parquet", [PIXELS], [1])
    write_parquet(tmp_path / "m" / "b.parquet", [PIXELS])
    with pytest.raises(DataError, match=r"b\.parquet: has no column `label`, unlike .*a\.parquet"):
        open_at(tmp_path / "m")
    write_parquet(tmp_path / "some.parquet", [PIXELS, PIXELS], [1, None])
    with pytest.raises(DataError, match=r"row 1 has no label, others have"):
        open_at(tmp_path / "some.parquet")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 10))
    with pytest.raises(DataError, match=r"its images are copied once into .*set XDG_CACHE_HOME to a larger place"):
        open_at(write_parquet(tmp_path / "new.parquet", [PIXELS]))
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(DataError, match="Parquet needs pyarrow: pip install pyarrow"):
        open_at(tmp_path / "none.parquet")


# ------------------------------------------------------------------------------------------------ loading, tools


@pytest.mark.parametrize("backend", FILES)
def test_every_back_end_loads_without_labels(backend, tmp_path):
    needs(backend)
    root = write_tree(tmp_path / "data")
    odd_files(root)
    shutil.copytree(root / "class0", tmp_path / "photos")
    loader = open_train(config(backend, tmp_path / "photos"))
    batches = take(loader, 12)
    assert all(batch.label is None and len(batch.views[0]) == 4 for batch in batches)
    assert {os.path.basename(path) for path in loader.bad} == {
        "truncated.jpg",
        "empty.jpg",
        "text.jpg",
        "garbage.jpg",
        "bomb.png",
    }
    seen = [int(row) for batch in open_eval(config(backend, tmp_path / "photos")) for row in batch.rows]
    assert len(seen) == len(set(seen)) == len(os.listdir(tmp_path / "photos")) - 5


def test_scan_and_quarantine_without_labels(tmp_path, monkeypatch, capsys):
    import sys

    root = write_tree(tmp_path / "data")
    odd_files(root)
    shutil.copytree(root / "class0", tmp_path / "photos")
    monkeypatch.setattr(sys, "argv", ["scan_images.py", str(tmp_path / "photos"), "--report", str(tmp_path / "scan")])
    assert tool("scan_images").main() == 1
    capsys.readouterr()
    data = config("folder", tmp_path / "photos", quarantine=str(tmp_path / "scan" / "quarantine.jsonl"))
    index = loaders.open_data(data, "train")
    assert index.quarantined == 5 and index.label is None and not index.problems
    assert loaders.open_data(data, "train").file is not None  # from the cache


# ------------------------------------------------------------------------------------------------ training


def overrides(root, *more):
    return [f"data.train={root}", "data.backend=folder", "data.options={}", "data.workers=0", "data.expect_images=null",
            "data.on_bad_image=replace", "run.duration=4it", *more]  # fmt: skip


def test_pretraining_needs_no_label_and_resumes_exactly(flat, tmp_path):
    (flat / "bad.jpg").write_bytes(b"no image")
    more = overrides(flat, "evals=[]")
    whole = tiny("quick/burn_stage1.yaml", tmp_path / "whole", *more)
    run(whole)
    part = tiny("quick/burn_stage1.yaml", tmp_path / "part", *more)
    run(part)
    for file in sorted((part.folder / "checkpoints").iterdir())[1:]:
        file.unlink()
    run(part, resume=True)
    assert_same_run(whole, part)
    assert "outputs/entropy_of_mean" in rows(whole)[-1]  # what can be seen without labels is seen
    assert not any("evaluation" in row for row in rows(whole))


@pytest.mark.parametrize("labels", ["null", "none"])
def test_evaluations_have_labeled_images_of_their_own(labels, flat, tmp_path):
    labeled = write_tree(tmp_path / "labeled")
    evals = json.dumps([{"kind": "knn", "every": "2it", "train": str(labeled), "val": str(labeled), "neighbors": 1}])
    recipe = tiny(
        "quick/burn_stage1.yaml", tmp_path / "runs", *overrides(flat, f"evals={evals}", f"data.labels={labels}")
    )
    run(recipe)
    scores = [row for row in rows(recipe) if row.get("evaluation") == "knn"]
    assert scores and scores[-1]["measured"] == 24 and scores[-1]["top1"] > 99  # each is its own neighbor


def refused(recipe):
    with pytest.raises(DataError) as caught:
        run_data.open_indices(recipe, dist.start("cpu", 60))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_needs_labels_says_so(flat, tmp_path):
    labeled = write_tree(tmp_path / "labeled")
    for path, more, message in (
        ("quick/supervised.yaml", ["evals=[]"], f"{flat}: has no labels"),
        ("quick/linear.yaml", ["evals=[]"], f"{flat}: has no labels"),
        ("quick/burn_stage1.yaml", [f"data.val={labeled}"], f"{flat}: has no labels"),
        ("quick/burn_stage1.yaml", [f"data.val={flat}", f"evals.0.train={labeled}"], f"{flat}: has no labels"),
        ("quick/supervised.yaml", ["evals=[]", f"data.train={put(tmp_path / 'p', 'x/a.jpg')}", "data.batch_size=1",
                                   "data.micro_batch=1"], "is all of one class, 'x'"),
    ):  # fmt: skip
        said = refused(tiny(path, tmp_path, *overrides(flat), *more))
        assert message in said and "expected one folder of images per class, or a list or shards with labels" in said


def test_a_teacher_takes_the_place_of_labels(flat, tmp_path):
    recipe = tiny("supervised_kd_step1.yaml", tmp_path / "runs", *overrides(flat, "evals=[]"))
    run(recipe)
    assert "train_top1" not in rows(recipe)[-1] and np.isfinite(rows(recipe)[-1]["loss"])


def test_labels_of_both_sides_of_an_evaluation_are_the_same(tmp_path):
    one, other = write_tree(tmp_path / "one"), write_tree(tmp_path / "other", classes=4)
    said = refused(tiny("quick/burn_stage1.yaml", tmp_path, *overrides(one), f"data.val={other}"))
    assert said == f"{other}: its 4 classes differ from the 3 of {one}: only the first has class3"


def test_a_run_says_how_it_read_its_images(flat, tmp_path, caplog):
    sizes = ["data.batch_size=8", "data.micro_batch=8"]
    recipe = recipes.load(ROOT / "recipes/quick/burn_stage1.yaml", [*overrides(flat), "evals=[]", *sizes])
    with caplog.at_level(logging.INFO, logger="burn"):
        run_data.open_indices(recipe, dist.start("cpu", 60))
    assert f"data.train: {flat}: 24 images, images without labels" in caplog.messages


@pytest.mark.parametrize(
    ("val", "difference"),
    [
        ("cat dog", "only the second has bird"),
        ("bird cat cow dog", "only the first has cow"),
        ("bird cat cow", "only the first has cow; only the second has dog"),
        (
            "c0 c1 c2 c3 c4 c5 c6",
            "only the first has c0, c1, c2, c3, c4 and 2 more; only the second has bird, cat, dog",
        ),
    ],
)
def test_lists_that_differ_in_their_classes_are_named_with_them(val, difference, tmp_path):
    put(tmp_path, *(f"{number}.jpg" for number in range(16)))
    for name, words in (("train", ["bird", "cat", "dog"]), ("val", val.split())):
        lines = (f"{number}.jpg {words[number % len(words)]}\n" for number in range(16))
        (tmp_path / f"{name}.txt").write_text("".join(lines))
    said = refused(tiny("quick/burn_stage1.yaml", tmp_path, *overrides(tmp_path / "train.txt"),
                        f"data.val={tmp_path / 'val.txt'}"))  # fmt: skip
    count = len(val.split())
    assert said == f"{tmp_path}/val.txt: its {count} classes differ from the 3 of {tmp_path}/train.txt: {difference}"
    said = refused(tiny("quick/burn_stage1.yaml", tmp_path, *overrides(tmp_path / "train.txt"),
                        f"data.val={tmp_path / 'train.txt'}", "data.expect_images=3"))  # fmt: skip
    assert said.startswith(f"{tmp_path}/train.txt: 16 images, the recipe expects 3")


# ------------------------------------------------------------------------------------------------ quarantine


def quarantine(path, *names, encoding="utf-8", newline="\n"):
    text = "".join(json.dumps({"path": name, "reason": "ugly"}) + newline for name in names)
    path.write_bytes(text.encode(encoding))
    return path


def quarantined(tmp_path, root, path, *more):
    both = [f"data.val={root}", f"data.quarantine={path}"]
    recipe = tiny("quick/burn_stage1.yaml", tmp_path, *overrides(root), *both, *more)
    return recipe, run_data.open_indices(recipe, dist.start("cpu", 60))


def test_a_quarantine_list_of_another_data_set_is_refused(tree, tmp_path):
    path = quarantine(tmp_path / "q.jsonl", "train/class0/0000.jpg", "train/class1/0001.jpg")
    with pytest.raises(DataError) as caught:
        quarantined(tmp_path, tree, path)
    assert str(caught.value) == (
        f"{path}: matches none of the 24 images; its first line names train/class0/0000.jpg, expected paths relative "
        f"to {tree}"
    )
    recipe = tiny("quick/burn_stage1.yaml", tmp_path, *overrides(tree), f"data.val={tree}", f"data.quarantine={path}")
    assert preflight.look(recipe).refused == [str(caught.value)]


def test_lines_of_a_quarantine_list_that_match_nothing_are_counted(tree, tmp_path, caplog):
    names = ["class0/0000.jpg", "class0/gone.jpg", "class1/0001.jpg"]
    _, indices = quarantined(tmp_path, tree, quarantine(tmp_path / "q.jsonl", *names))
    assert indices["train"].quarantined == 2 and len(indices["val"]) == 22
    (said,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert said == f"{tmp_path}/q.jsonl: 1 of its 3 lines match no image of {tree}"
    caplog.clear()
    quarantined(tmp_path, tree, quarantine(tmp_path / "q.jsonl", *names[::2]))
    assert not [record for record in caplog.records if record.levelno == logging.WARNING]
    (tmp_path / "q.jsonl").write_text("")  # a scan that has found nothing
    assert len(quarantined(tmp_path, tree, tmp_path / "q.jsonl")[1]["train"]) == 24


def test_a_quarantine_list_may_be_of_one_of_two_data_sets(tmp_path):
    tree = write_tree(tmp_path / "data")  # both lists of images lie in one folder
    for name, numbers in (("train", range(0, 24)), ("val", range(3, 24))):
        lines = (f"class{number % 3}/{number:04d}.jpg {number % 3}\n" for number in numbers)
        (tree / f"{name}-list.txt").write_text("".join(lines))
    path = quarantine(tmp_path / "q.jsonl", "class0/0000.jpg")
    more = [f"data.train={tree}/train-list.txt", f"data.val={tree}/val-list.txt"]
    _, indices = quarantined(tmp_path, tree, path, *more)
    assert (indices["train"].quarantined, indices["val"].quarantined) == (1, 0)


@pytest.mark.parametrize(("encoding", "newline"), [("utf-8-sig", "\n"), ("utf-8", "\r\n"), ("utf-8-sig", "\n\r\n\n")])
def test_encodings_of_a_quarantine_list(encoding, newline, tree, tmp_path):
    path = quarantine(tmp_path / "q.jsonl", "class0/0000.jpg", "class1/0001.jpg", encoding=encoding, newline=newline)
    assert len(open_index(tree, Request(10**8), quarantine=path)) == 22
    for wide in ("utf-16", "utf-16-le"):
        text = path.read_text(encoding="utf-8-sig")
        path.write_bytes((b"\xff\xfe" if wide.endswith("le") else b"") + text.encode(wide))
        with pytest.raises(DataError, match=r"q\.jsonl: is UTF-16; expected a quarantine list in UTF-8"):
            open_index(tree, Request(10**8), quarantine=path)
        path.write_text(text)


def test_a_killed_copy_of_parquet_goes_with_the_next(flat, tmp_path):
    write_parquet(tmp_path / "a.parquet", [PIXELS])
    (copy,) = open_at(tmp_path / "a.parquet").pieces.files
    names = {os.path.basename(os.fsdecode(copy))}
    cache = Path(os.fsdecode(copy)).parent
    left = [cache / f".{copy_name(copy)}.{kernel()}-00000000.{ending}" for ending in ("part", "lock")]
    for path in left:
        path.write_bytes(b"half")
    write_parquet(tmp_path / "a.parquet", [PIXELS, PIXELS])  # the next has another stamp
    assert len(open_at(tmp_path / "a.parquet")) == 2
    assert not any(path.exists() for path in left) and not names & {path.name for path in cache.iterdir()}


def copy_name(copy):
    return os.path.basename(os.fsdecode(copy)).split("-")[0]
