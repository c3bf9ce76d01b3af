"""The index: its file, what it costs, and headers read by the core."""

import json
import os
import pickle
import random
import resource
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import loaders
from loaders import DataError, core, headers, index_file
from loaders.config import Request
from loaders.decode import read_header
from loaders.errors import BadImage
from loaders.index import Index, Names
from loaders.sampler import Stream
from loaders.sources import open_index
from loaders.views import View
from tests.images import jpeg, odd_files, picture, write_tree
from tests.loading import FILES, config, equal, needs, open_train, take
from tests.processes import PATIENCE, run_ranks, start_process, tool
from tests.tiny import tiny

REQUEST = Request(10**8)


def same(a, b):
    assert a.fingerprint == b.fingerprint and list(a.names) == list(b.names) and a.classes == b.classes
    for name in ("label", "width", "height", "format", "size", "modified"):
        one, other = getattr(a, name), getattr(b, name)
        assert (one is None) == (other is None) and (one is None or np.array_equal(one, other)), name
    assert a.problems == b.problems and a.unread == b.unread and a.quarantined == b.quarantined


@pytest.fixture
def data(tmp_path):
    root = write_tree(tmp_path / "data")
    odd_files(root)
    return root


# ------------------------------------------------------------------------------------------------ names


def test_names_are_what_they_were():
    rng = random.Random(0)
    names = [bytes(rng.randrange(1, 256) for _ in range(rng.choice([1, 3, 300]))) for _ in range(500)]
    packed = Names.of(names)
    assert list(packed) == names and packed[7] == names[7] and packed[-1] == names[-1] and packed.is_sound()
    rows = np.array([3, 499, 0, 3])
    assert list(packed.take(rows)) == [names[row] for row in rows]
    assert list(Names.of([])) == [] and Names.of([]).is_sound()


def test_a_name_costs_its_own_length_only():
    short, long = [b"a%03d.jpg" % n for n in range(1000)], [b"x" * 4000]
    assert len(Names.of(short + long).blob) == 9 * 1000 + 4001


def test_quarantine_and_rows_keep_their_order(data):
    index = open_index(data, REQUEST)
    left = index.without([index.name(2), index.name(5), b"not there"])
    assert left.quarantined == 2 and len(left) == len(index) - 2
    assert list(left.names) == [name for row, name in enumerate(index.names) if row not in (2, 5)]
    assert {left.name(row) for row in left.problems} == {index.name(row) for row in index.problems}


# ------------------------------------------------------------------------------------------------ the file


def test_what_is_written_is_read_again(data, tmp_path):
    index = open_index(data, REQUEST)
    index_file.write(index, tmp_path / "x.index")
    again = index_file.open_file(tmp_path / "x.index", max_pixels=10**8)
    same(again, index)
    assert again.root == index.root and again.reading == index.reading
    assert not again.width.flags.writeable  # mapped, and shared with others


def test_a_limit_of_pixels_is_the_recipes_not_the_files(data):
    assert not any("more than data.max_pixels" in text for text in open_index(data, REQUEST).problems.values())
    index = open_index(data, Request(2000))  # from the cache
    large = (index.width.astype(int) * index.height > 2000).sum()
    assert large and sum("more than data.max_pixels 2000" in text for text in index.problems.values()) == large
    same(open_index(data, REQUEST), open_index(data, REQUEST))


def test_an_image_takes_64_bytes_and_its_name(tmp_path):
    index = open_index(write_tree(tmp_path / "data", count=600), REQUEST)
    index_file.write(index, tmp_path / "x.index")
    assert os.path.getsize(tmp_path / "x.index") - len(index.names.blob) <= 64 * 600 + 4096


@pytest.mark.parametrize("shards", [False, True])
def test_a_damaged_file_is_one_line_or_the_same_index(shards, tmp_path):
    root = write_tree(tmp_path / "data", count=12)
    if shards:
        subprocess.run(["tar", "-cf", tmp_path / "x.tar", "-C", root, "."], check=True)
        root = tmp_path / "x.tar"
    path = tmp_path / "x.index"
    index_file.write(open_index(root, REQUEST), path)
    whole, want = path.read_bytes(), index_file.open_file(path, max_pixels=10**8)
    rng = random.Random(1)
    refused = 0
    for at in [*range(40), *(rng.randrange(len(whole)) for _ in range(300))]:
        changed = bytearray(whole)
        changed[at] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        try:
            same(index_file.open_file(path, max_pixels=10**8), want)  # a byte between two columns
        except DataError as error:
            refused += 1
            assert "x.index" in str(error) and "\n" not in str(error) and "tools/make_index.py" in str(error)
    assert refused > 250
    for count in [*range(0, 200, 7), *range(200, len(whole), 101), len(whole) - 1]:
        path.write_bytes(whole[:count])
        with pytest.raises(DataError, match=r"x\.index: "):
            index_file.open_file(path, max_pixels=10**8)


def test_a_file_whose_checksums_fit_is_still_looked_through(tmp_path):
    # Whoever writes a file can write its checksums: what it says must not lead out of its arrays.
    index = open_index(write_tree(tmp_path / "data", count=12), REQUEST)
    path = tmp_path / "x.index"

    def refused(**columns):
        index_file.write(Index(**{**vars(index), **columns}), path)
        with pytest.raises(DataError, match=r"x\.index: is not a whole index file"):
            index_file.open_file(path, max_pixels=10**8)

    fields = {name: value for name, value in vars(index).items() if name != "fingerprint"}
    vars(index).clear()
    vars(index).update(fields)
    refused(label=index.label + 99)
    refused(label=index.label - 1)
    refused(width=index.width[:5])
    for ends in (index.names.ends + 1, index.names.ends[::-1].copy(), index.names.ends * 0, index.names.ends - 1):
        refused(names=Names(index.names.blob, ends))
    refused(pieces=loaders.index.Pieces([b"a"], *(np.full(12, 7) for _ in range(3))))


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("evil",))


@pytest.mark.parametrize(
    "content", [b"", b"text", b"BURNIDX\x01", pickle.dumps(Evil()), b"\x93NUMPY\x01\x00" + bytes(99)]
)
def test_foreign_files_are_one_line(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.index"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"x\.index: is not an? .*index file"):
        open_index(path, REQUEST)
    assert os.listdir(tmp_path) == ["x.index"]
    with pytest.raises(DataError, match=r"none\.index: cannot be read: No such file"):
        open_index(tmp_path / "none.index", REQUEST)


def test_an_index_file_is_opened_without_looking_at_the_images(data, tmp_path, monkeypatch):
    index = open_index(data, REQUEST)
    index_file.write(index, tmp_path / "x.index")
    for name in ("scandir", "listdir", "walk"):
        monkeypatch.setattr(os, name, lambda *a: pytest.fail("a folder was listed"))
    monkeypatch.setattr(headers, "_read", lambda *a: pytest.fail("a header was read"))
    monkeypatch.setattr(headers, "_stat", lambda *a: pytest.fail("files were looked at"))
    same(open_index(tmp_path / "x.index", REQUEST), index)


def test_an_index_holds_though_its_first_image_is_gone(tmp_path, capsys):
    root = write_tree(tmp_path / "data", count=8)
    tool("make_index").make(root, tmp_path / "x.index", REQUEST)
    (root / "class0" / "0000.jpg").unlink()
    index = open_index(tmp_path / "x.index", REQUEST)
    assert index.content(1)
    with pytest.raises(BadImage, match="cannot be read: No such file"):
        index.read(0)
    assert tool("make_index").check(tmp_path / "x.index", REQUEST.max_pixels) == 1
    assert "0000.jpg: is gone" in capsys.readouterr().out


def test_an_index_file_travels_with_its_images(data, tmp_path):
    make = tool("make_index").make
    make(data, tmp_path / "x.index", REQUEST)
    index = open_index(tmp_path / "x.index", REQUEST)
    (tmp_path / "there").mkdir()
    os.rename(data, tmp_path / "there" / "data")
    with pytest.raises(DataError, match=r"x\.index: is the index of another place: .*class0/.* is not here"):
        open_index(tmp_path / "x.index", REQUEST)
    os.rename(tmp_path / "x.index", tmp_path / "there" / "x.index")
    moved = open_index(tmp_path / "there" / "x.index", REQUEST)
    assert moved.root == tmp_path / "there" / "data" and moved.fingerprint == index.fingerprint
    assert len(moved.content(0)) == moved.size[0]


def test_an_index_file_of_shards_travels(tmp_path):
    root = write_tree(tmp_path / "data")
    (tmp_path / "shards").mkdir()
    subprocess.run(["tar", "-cf", tmp_path / "shards" / "a.tar", "-C", root, "."], check=True)
    tool("make_index").make(tmp_path / "shards", tmp_path / "shards" / "x.index", REQUEST)
    os.rename(tmp_path / "shards", tmp_path / "moved")
    index = open_index(tmp_path / "moved" / "x.index", REQUEST)
    assert len(index) == 24 and index.read(3) is not None and index.label is not None
    assert tool("make_index").check(tmp_path / "moved" / "x.index", 10**8) == 0
    whole = (tmp_path / "moved" / "a.tar").read_bytes()
    (tmp_path / "moved" / "a.tar").write_bytes(whole[: len(whole) // 2])
    assert tool("make_index").check(tmp_path / "moved" / "x.index", 10**8) == 1


@pytest.mark.parametrize("backend", ["folder", "turbo"])
def test_a_file_that_has_changed_is_named_when_it_is_met(backend, tmp_path):
    needs(backend)
    root = write_tree(tmp_path / "data", count=8)
    tool("make_index").make(root, tmp_path / "x.index", REQUEST)
    path = root / "class1" / "0001.jpg"
    with Image.open(path) as image:
        path.write_bytes(jpeg(image, quality=30))  # the same size in pixels
    index = open_index(tmp_path / "x.index", REQUEST)
    row = list(index.names).index(b"class1/0001.jpg")
    with pytest.raises(BadImage, match=r"has changed: .* bytes, .* when it was indexed.*tools/make_index\.py"):
        index.read(row)
    loader = open_train(config(backend, tmp_path / "x.index", on_bad_image="stop"))
    with pytest.raises(DataError, match=r"0001\.jpg: has changed"):
        take(loader, 3)


def test_make_index_from_the_command_line(data, tmp_path, monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["make_index.py", *map(str, arguments)])
        code = tool("make_index").main()
        return code, *capsys.readouterr()

    code, said, _ = call(data, tmp_path / "x.index")
    assert code == 0 and "41 images, 3 folders as classes" in said and "bytes an image" in said
    assert call("--check", tmp_path / "x.index")[0] == 0
    (data / "class0" / "0000.jpg").write_bytes(b"changed")
    (data / "class1" / "0001.jpg").unlink()
    code, said, _ = call("--check", tmp_path / "x.index")
    assert code == 1 and "0000.jpg: 7 bytes, was" in said and "0001.jpg: is gone" in said and "2 changed" in said
    damaged = bytearray((tmp_path / "x.index").read_bytes())
    damaged[-1] ^= 255
    (tmp_path / "x.index").write_bytes(damaged)
    assert call("--check", tmp_path / "x.index")[0] == 2
    for arguments, message in (
        ((data, tmp_path / "x.idx"), "expected the name of a file that ends in .index"),
        ((tmp_path / "none", tmp_path / "y.index"), "no such folder"),
        ((tmp_path / "x.beton", tmp_path / "y.index"), "a .beton is its own index"),
    ):
        code, _, said = call(*arguments)
        assert code == 2 and message in said and said.count("\n") == 1 and not (tmp_path / "y.index").exists()


def test_labels_none_of_an_index_file_are_said_when_it_is_made(data, tmp_path):
    tool("make_index").make(data, tmp_path / "x.index", REQUEST)
    with pytest.raises(DataError, match="has labels, and data.labels is none; make it again with --labels none"):
        open_index(tmp_path / "x.index", Request(10**8, "none"))
    tool("make_index").make(data, tmp_path / "y.index", Request(10**8, "none"))
    assert open_index(tmp_path / "y.index", Request(10**8, "none")).label is None


# ------------------------------------------------------------------------------------------------ headers


def test_the_core_says_what_pillow_says(data, monkeypatch):
    rgb = Image.fromarray(picture(1, 60, 80))
    exif = Image.Exif()
    exif[0x010E] = "x" * 60_000  # the frame lies beyond what is read at first
    (data / "class0" / "exif.jpg").write_bytes(jpeg(rgb, exif=exif, icc_profile=bytes(200_000)))
    rgb.save(data / "class0" / "many.jpg", "MPO", save_all=True, append_images=[rgb])
    os.mkfifo(data / "class0" / "pipe.jpg")
    by_core = open_index(data, REQUEST)
    monkeypatch.setenv("XDG_CACHE_HOME", str(data / "other"))
    monkeypatch.setattr(core, "why_missing", lambda: "not built")
    by_pillow = open_index(data, REQUEST)
    same(by_core, by_pillow)
    assert by_core.format[list(by_core.names).index(b"class0/many.jpg")] == b"MPO"
    assert by_core.problems[list(by_core.names).index(b"class0/pipe.jpg")] == "is not a file"


def test_a_damaged_header_is_read_as_pillow_reads_it(tmp_path):
    needs("turbo")
    root = tmp_path / "data"
    root.mkdir()
    rng = random.Random(5)
    for number in range(400):
        content = bytearray(jpeg(Image.fromarray(picture(number % 7, 40, 50)), progressive=number % 2 == 0))
        for _ in range(rng.randrange(4)):
            content[rng.randrange(700)] = rng.randrange(256)
        (root / f"{number:03d}.jpg").write_bytes(content[: rng.choice([len(content), rng.randrange(1, 700)])])
    index = open_index(root, Request(10**18))
    sound = 0
    for row in range(len(index)):
        with open(root / os.fsdecode(index.name(row)), "rb") as file:
            theirs = read_header(file)
        if index.format[row] == b"JPEG" and not theirs.problem:
            assert (index.width[row], index.height[row]) == (theirs.width, theirs.height)
            sound += 1
        elif row not in index.problems:  # the size is there; what follows is not as it should be
            with pytest.raises(BadImage):
                index.read(row)
    assert sound > 100


@pytest.mark.parametrize("is_built", [True, False], ids=["core", "without"])
def test_what_a_machine_did_is_not_remembered(is_built, tmp_path, monkeypatch):
    root = write_tree(tmp_path / "data")
    if not is_built:
        monkeypatch.setattr(core, "why_missing", lambda: "not built")
    path = root / "class0" / "0000.jpg"
    os.rename(path, tmp_path / "kept.jpg")
    path.symlink_to(tmp_path / "elsewhere.jpg")  # as DVC and git-annex leave it
    (root / "class1" / "round.jpg").symlink_to("round.jpg")
    before = open_index(root, REQUEST)
    assert {before.name(row): text for row, text in before.problems.items()} == {
        b"class0/0000.jpg": "cannot be read: No such file or directory (a link to nothing?)",
        b"class1/round.jpg": "cannot be read: Too many levels of symbolic links",
    }
    os.rename(tmp_path / "kept.jpg", tmp_path / "elsewhere.jpg")
    after = open_index(root, REQUEST)
    assert list(after.problems.values()) == ["cannot be read: Too many levels of symbolic links"]
    assert after.read(0).shape == (3, 40, 36)
    monkeypatch.setattr(headers, "_read", lambda title, places, facts, rows: _only(rows, after.unread))
    open_index(root, REQUEST)


def _only(rows, expected):
    assert set(rows.tolist()) == set(expected)  # nothing else is looked at again


def test_only_changed_files_are_read_again(tmp_path, monkeypatch):
    root = write_tree(tmp_path / "data")
    first = open_index(root, REQUEST)
    Image.fromarray(picture(1, 33, 44)).save(root / "class1" / "0004.jpg")
    looked, read = [], headers._read
    monkeypatch.setattr(headers, "_read", lambda *a: looked.append(a[3].tolist()) or read(*a))
    again = open_index(root, REQUEST)
    row = list(first.names).index(b"class1/0004.jpg")
    assert looked == [[row]] and (again.width[row], again.height[row]) == (44, 33)
    assert again.fingerprint != first.fingerprint
    same(open_index(root, REQUEST), again)
    assert looked == [[row]]


def few_files(root):
    resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
    assert open_index(Path(root), REQUEST).problems == {}


def test_few_open_files_are_enough(tmp_path):
    needs("turbo")
    in_a_process(few_files, _many(tmp_path / "data", 8000))


def _many(root, count):
    """Names of one file."""
    (root / "class0").mkdir(parents=True)
    Image.fromarray(picture(0, 40, 50)).save(root / "one.jpg")
    for number in range(count):
        os.link(root / "one.jpg", root / "class0" / f"{number}.jpg")
    os.unlink(root / "one.jpg")
    return root


# ------------------------------------------------------------------------------------------------ places


def test_without_a_place_for_the_cache_it_costs_time_only(tmp_path, monkeypatch):
    root = write_tree(tmp_path / "data")
    want = open_index(root, REQUEST)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)

    def nobody():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nobody)
    index = open_index(root, REQUEST)
    same(index, want)
    file = index.file
    assert file.exists()  # where the other ranks can map it
    del index
    assert not file.exists()
    monkeypatch.setattr(index_file.tempfile, "mkstemp", lambda *a: (_ for _ in ()).throw(OSError(30, "Read-only")))
    index = open_index(root, REQUEST)
    same(index, want)
    assert index.file is None


def test_a_root_that_is_not_utf8(tmp_path):
    root = write_tree(Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")))
    index = open_index(root, REQUEST)
    same(open_index(root, REQUEST), index)
    assert index.read(0) is not None and "caf\\xe9" in index.path(0)
    index_file.write(index, tmp_path / "x.index")
    assert open_index(tmp_path / "x.index", REQUEST).read(0) is not None


# ------------------------------------------------------------------------------------------------ ranks and memory


def rank_one_must_not_read(recipe):
    from engine import data, train
    from engine import recipe as recipes

    if os.environ["RANK"] == "1":
        data.open_here = lambda recipe: os._exit(9)
    train.run(recipes.load(recipe))


def test_one_process_of_a_machine_reads_for_all(tree, tmp_path):
    more = [f"data.train={tree}", f"data.val={tree}", "data.backend=folder", "data.options={}", "data.workers=0"]
    path = tmp_path / "recipe.yaml"
    path.write_text(tiny("quick/burn_stage1.yaml", tmp_path / "runs", *more).dump())
    assert run_ranks(2, rank_one_must_not_read, path) == [0, 0]


def write_large(path, count):
    """An index file of images that are nowhere."""
    names = Names(np.frombuffer(b"".join(b"%07d\0" % n for n in range(count)), dtype=np.uint8),
                  np.arange(1, count + 1, dtype=np.int64) * 8)  # fmt: skip
    sides = np.full(count, 300, dtype=np.int32)
    format = np.full(count, b"JPEG", dtype="S8")
    size = np.full(count, 1000, dtype=np.int64)
    index = Index(Path("nowhere"), [], names, None, sides, sides, format, {}, 10**8, size, size)
    index_file.write(index, path)


def anonymous():
    """KiB that this process holds for itself."""
    return sum(int(line.split()[1]) for line in open("/proc/self/smaps_rollup") if line.startswith("Anonymous"))


def hold_little(small, large):
    view = View(size=32, crop="random")
    index = index_file.open_file(Path(small), max_pixels=10**8, trusted=True)
    Stream(index, [view], 0).plan(range(256))
    before = anonymous()
    index = index_file.open_file(Path(large), max_pixels=10**8, trusted=True)
    stream = Stream(index, [view], 0)
    for epoch in range(3):
        stream.plan(range(epoch * len(index) - 100 * bool(epoch), epoch * len(index) + 156))
    assert len(index) == 1_000_000 and anonymous() - before < 1500, anonymous() - before  # its columns have 60 MB


def in_a_process(target, *arguments):
    process = start_process(target, *map(str, arguments))
    process.join(PATIENCE)
    assert process.exitcode == 0


def test_what_a_rank_holds_for_itself_does_not_grow_with_the_images(tmp_path):
    write_large(tmp_path / "small.index", 1000)
    write_large(tmp_path / "large.index", 1_000_000)
    in_a_process(hold_little, tmp_path / "small.index", tmp_path / "large.index")


def index_in_little(root, cache):
    os.environ["XDG_CACHE_HOME"] = cache
    tracemalloc.start()
    index = open_index(Path(root), REQUEST)
    assert len(index) == 30_000 and tracemalloc.get_traced_memory()[1] < 300 * len(index)


def test_memory_while_indexing(tmp_path):
    needs("turbo")
    in_a_process(index_in_little, _many(tmp_path / "data", 30_000), tmp_path / "cache")


def fit_through_a_temporary_index(root):
    os.environ["XDG_CACHE_HOME"] = "/dev/null"  # no folder
    index = open_index(Path(root), REQUEST)
    there = loaders.place_of(index)
    mapped = loaders.map_index(config("folder", Path(root)), there)  # as another rank does
    assert mapped.fingerprint == index.fingerprint and mapped.content(0) == index.content(0)
    del index
    assert not there.file.exists() and mapped.content(1)


def test_ranks_map_a_temporary_index(tmp_path):
    root = write_tree(tmp_path / "data")
    (tmp_path / "shards").mkdir()
    subprocess.run(["tar", "-cf", tmp_path / "shards" / "a.tar", "-C", root, "."], check=True)
    for place in (root, tmp_path / "shards"):
        in_a_process(fit_through_a_temporary_index, place)


@pytest.mark.parametrize("backend", FILES)
def test_an_index_file_gives_the_same_stream(backend, tree, tmp_path):
    needs(backend)
    tool("make_index").make(tree, tmp_path / "x.index", REQUEST)
    one, other = (take(open_train(config(backend, root)), 8) for root in (tree, tmp_path / "x.index"))
    assert all(equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_header_is_json(data, tmp_path):
    index_file.write(open_index(data, REQUEST), tmp_path / "x.index")
    content = (tmp_path / "x.index").read_bytes()
    length = int.from_bytes(content[8:16], "little")
    assert json.loads(content[20 : 20 + length])["count"] == 41
