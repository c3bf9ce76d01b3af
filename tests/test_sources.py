"""Where images come from: folders, lists, tar shards, `.beton` files; quarantine; and the tools around them."""

import dataclasses
import importlib.util
import io
import json
import os
import queue
import re
import subprocess
import sys
import tarfile
import threading
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import loaders
from loaders import DataError, beton, core, dali_loader, readahead, turbo
from loaders.config import Request
from loaders.errors import BadImage
from loaders.sampler import Stream
from loaders.sources import open_index
from tests.images import odd_files, picture, write_tree
from tests.loading import FILES, VIEWS, as_beton, config, convert, equal, needs, open_eval, open_train, take
from tests.processes import PATIENCE, start_process, tool
from tests.runs import last_state, run
from tests.tiny import ROOT, tiny

BACKENDS = [name for name in FILES if not loaders.load(name).Options.missing()]


def open_at(root, **options):
    quarantine = options.pop("quarantine", None)
    return open_index(root, Request(options.pop("max_pixels", 10**8), **options), quarantine=quarantine)


def files_of(tree):
    return sorted(path.relative_to(tree) for path in tree.rglob("*.jpg"))


# ------------------------------------------------------------------------------------------------ lists


def write_list(tree, name="train.txt", separator=" ", line=lambda path: path.parent.name):
    path = tree / name
    path.write_text("".join(f"{file}{separator}{line(file)}\n" for file in files_of(tree)))
    return path


@pytest.mark.parametrize("separator", [" ", "\t"])
def test_a_list_is_the_same_data_set(separator, tmp_path):
    root = write_tree(tmp_path / "data")
    as_folder = open_at(root)
    as_list = open_at(write_list(root, separator=separator))
    assert as_list.fingerprint == as_folder.fingerprint and as_list.classes == as_folder.classes
    assert torch.equal(as_list.read(5), as_folder.read(5))


def test_integers_in_a_list_are_labels(tmp_path):
    root = write_tree(tmp_path / "data")
    index = open_at(write_list(root, line=lambda path: 7 + int(path.parent.name[-1])))
    assert index.classes == [str(number) for number in range(10)] and set(index.label.tolist()) == {7, 8, 9}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "class0/0000.jpg\nclass0/0003.jpg 1",
            r"line 2: has a class, the first line has none.*expected `<image> <class>`",
        ),
        ("class0/0000.jpg 0\nclass0/0003.jpg", r"line 2: has no class, the first line has one"),
        ("\t0", r"line 1: expected the path of an image"),
        ("class0/0000.jpg 0\n\n../x.jpg 0", r"line 3: .*x\.jpg: no such file; expected a path relative to the list"),
        ("class0/none.jpg", r"line 1: .*none\.jpg: no such file"),
        ("", r"no images; expected `<image>` or `<image> <class>` on each line"),
    ],
)
def test_errors_of_a_list_name_its_line(line, message, tmp_path):
    root = write_tree(tmp_path / "data")
    path = root / "list.txt"
    path.write_text(line + "\n")
    with pytest.raises(DataError, match=message):
        open_at(path)


# ------------------------------------------------------------------------------------------------ tar shards


def write_shards(tree, folder, count=3, *, labels):
    folder.mkdir()
    files = files_of(tree)
    for number in range(count):
        with tarfile.open(folder / f"part-{number}.tar", "w") as tar:
            for file in files[number::count]:
                name = file.stem if labels else str(file)
                tar.add(tree / file, f"{name}.jpg" if labels else name)
                if labels:
                    text = file.parent.name[-1].encode()
                    entry = tarfile.TarInfo(f"{name}.cls")
                    entry.size = len(text)
                    tar.addfile(entry, io.BytesIO(text))
    return folder


@pytest.mark.parametrize("labels", [True, False], ids=["cls", "folders"])
def test_shards_hold_the_same_images(labels, tree, tmp_path):
    shards = write_shards(tree, tmp_path / "shards", labels=labels)
    index, files = open_at(shards), open_at(tree)
    assert len(index) == len(files) and not index.problems
    by_content = {files.content(row): int(files.label[row]) for row in range(len(files))}
    assert {index.content(row): int(index.label[row]) for row in range(len(index))} == by_content
    again = open_at(tmp_path / "shards" / "*.tar")  # from the cache
    assert again.fingerprint == index.fingerprint and again.pieces.files == index.pieces.files


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_back_end_reads_shards(backend, tree, tmp_path):
    shards = write_shards(tree, tmp_path / "shards", labels=True)
    one, other = (take(open_train(config(name, shards)), 12) for name in ("folder", backend))
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a.rows, b.rows) and torch.equal(a.label, b.label)
        assert ((a.views[0] - b.views[0]).abs() * 255 * 0.225).mean() <= 1
    loader = open_eval(config(backend, shards))
    assert sorted(int(row) for batch in loader for row in batch.rows) == list(range(24))


@pytest.mark.parametrize("backend", FILES)
def test_blocks_of_shards_on_any_number_of_ranks_and_after_a_resume(backend, tree, tmp_path):
    needs(backend)
    shards = write_shards(tree, tmp_path / "shards", count=6, labels=True)  # of four images
    data = config(backend, shards, order="blocks", window=2, fixed_views=2)
    whole = take(open_train(data), 24)  # four epochs of three windows, each a batch of two micro-batches
    seen = torch.stack([batch.rows for batch in whole]).view(4, 3, 8)
    assert all(sorted(epoch.flatten().tolist()) == list(range(24)) for epoch in seen)
    assert all(len(set((window // 4).tolist())) == 2 for epoch in seen for window in epoch)
    assert not torch.equal(seen[0], seen[2])
    for step in (1, 5):
        assert all(equal(*pair) for pair in zip(take(open_train(data, step=step), 2), whole[2 * step :], strict=False))
    ranks = [take(open_train(data, rank=rank, world_size=2), 12) for rank in (0, 1)]
    assert all(equal(ranks[number % 2][number // 2], batch) for number, batch in enumerate(whole))
    # Epochs 0 and 2 show the same views of an image.
    shown = [dict(zip(b.rows.tolist(), b.views[0], strict=True)) for b in whole]
    first, second, third = ({r: v for part in shown[n : n + 6] for r, v in part.items()} for n in (0, 6, 12))
    assert all(torch.equal(first[row], third[row]) for row in range(24))
    assert not all(torch.equal(first[row], second[row]) for row in range(24))


def test_the_next_windows_shards_are_asked_for_ahead(tree, tmp_path, monkeypatch):
    shards = write_shards(tree, tmp_path / "shards", count=6, labels=True)
    index = open_at(shards)
    stream = Stream(index, (VIEWS[0],), 7, window=2)
    asked = queue.SimpleQueue()

    def advise(file, offset, length, advice):
        assert advice == os.POSIX_FADV_WILLNEED
        asked.put((os.readlink(f"/proc/self/fd/{file}"), offset, length))

    monkeypatch.setattr(os, "posix_fadvise", advise)
    monkeypatch.setattr(readahead, "_PART", 1000)
    files = [os.fsdecode(file) for file in index.pieces.files]

    def asks_for(windows):
        for epoch, window in windows:
            for rows in stream.order.rows(epoch, window):
                offset, length = index.pieces.offset[rows], index.pieces.length[rows]
                place, end = int(offset[0]), int(offset[-1] + length[-1])
                while place < end:
                    path, start, count = asked.get(timeout=PATIENCE)
                    assert path == files[index.pieces.file[rows[0]]]
                    assert start == place and count == min(1000, end - place)
                    place += count

    given = [list(range(start, start + 4)) for start in range(0, 48, 4)]
    positions = readahead.read_ahead(stream, given)
    assert next(positions) == given[0]
    asks_for([(0, 0), (0, 1)])
    assert next(positions) == given[1]  # of the same window
    assert next(positions) == given[2]
    asks_for([(0, 2)])
    assert [next(positions) for _ in given[3:]] == given[3:]
    asks_for([(1, 0), (1, 1), (1, 2), (2, 0)])
    assert asked.empty() and list(positions) == []
    for thread in threading.enumerate():
        if thread.name == "read ahead":
            thread.join(PATIENCE)  # the end of the positions is the end of it
            assert not thread.is_alive()
    # Where there is nothing to ask for, the positions themselves.
    assert readahead.read_ahead(Stream(index, (VIEWS[0],), 7), given) is given
    assert readahead.read_ahead(Stream(open_at(tree), (VIEWS[0],), 7, window=2), given) is given


def test_advice_that_nobody_takes_changes_nothing(tree, tmp_path, monkeypatch):
    shards = write_shards(tree, tmp_path / "shards", count=6, labels=True)
    data = config("folder", shards, order="blocks", window=2, workers=0)
    want = take(open_train(data), 6)
    called = threading.Event()

    def refuse(*_):
        called.set()
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "posix_fadvise", refuse)
    assert all(equal(*pair) for pair in zip(take(open_train(data), 6), want, strict=True))
    assert called.wait(PATIENCE)
    monkeypatch.delattr(os, "posix_fadvise")
    assert all(equal(*pair) for pair in zip(take(open_train(data), 6), want, strict=True))


@pytest.mark.parametrize("name", ["images.tar", "images.txt", "images.tgz"])
def test_a_folder_is_read_by_what_it_holds(name, tree, tmp_path):
    (tmp_path / "classes").mkdir()
    (tmp_path / "classes" / name).symlink_to(tree)
    assert open_at(tmp_path / "classes" / name).fingerprint == open_at(tree).fingerprint
    shards = write_shards(tree, tmp_path / name, labels=True)
    assert open_at(shards).pieces is not None


def test_broken_shards_are_named(tree, tmp_path):
    shards = write_shards(tree, tmp_path / "shards", labels=True)
    whole = (shards / "part-1.tar").read_bytes()
    (shards / "part-1.tar").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"part-1\.tar: is not a whole tar file"):
        open_at(shards)
    with pytest.raises(DataError, match="compressed shards"):
        open_at(tmp_path / "x.tar.gz")
    with pytest.raises(DataError, match=r"no such shard"):
        open_at(tmp_path / "none-*.tar")


# ------------------------------------------------------------------------------------------------ beton


@pytest.mark.parametrize("mode", ["jpg", "raw", "mixed", "smart"])
def test_a_beton_holds_the_same_pixels(mode, tree):
    # JPEG files that fit keep their bytes; raw pixels are the decoded ones.
    options = {"smart_kib": 8} if mode == "smart" else {}
    path = as_beton(tree, mode=mode, **options)
    index, files = open_at(path), open_at(tree)
    assert index.classes == files.classes and index.label.tolist() == files.label.tolist()
    assert all(torch.equal(index.read(row), files.read(row)) for row in range(len(files)))
    formats = set(index.format.tolist())
    assert formats == {"jpg": {b"JPEG"}, "raw": {b"RAW"}}.get(mode, {b"JPEG", b"RAW"})


@pytest.mark.parametrize("mode", ["jpg", "raw"])
@pytest.mark.parametrize("strategy", ["page_cache", "ram", "direct"])
def test_strategies_give_the_same_stream(mode, strategy, tree):
    path = as_beton(tree, mode=mode)
    options = loaders.load("ffcv").Options(strategy=strategy)
    try:
        got = take(open_train(config("ffcv", path, options=options)), 14)
    except DataError as error:
        pytest.skip(str(error))  # a file system without direct reads
    assert all(equal(a, b) for a, b in zip(got, take(open_train(config("ffcv", path)), 14), strict=True))


def test_without_the_core_a_beton_is_cut_on_the_host(tree, monkeypatch):
    path = as_beton(tree, mode="mixed")
    fast = take(open_train(config("ffcv", path)), 6)
    monkeypatch.setattr(core, "why_missing", lambda: "not built")
    for a, b in zip(fast, take(open_train(config("ffcv", path)), 6), strict=True):
        assert torch.equal(a.rows, b.rows) and ((a.views[1] - b.views[1]).abs() * 255 * 0.225).max() <= 2.5


def test_conversion_is_the_same_however_many_threads(tree, tmp_path):
    contents = []
    for workers in (1, 3):
        convert(tree, tmp_path / "a.beton", workers=workers, max_side=50, mode="mixed")
        contents.append((tmp_path / "a.beton").read_bytes())
    assert contents[0] == contents[1]
    index = open_at(tmp_path / "a.beton")
    assert max(index.width.max(), index.height.max()) == 50
    assert index.path(3).endswith("a.beton/3")


has_ffcv = pytest.mark.skipif(importlib.util.find_spec("ffcv") is None, reason="the FFCV package is not installed")


def in_a_process(function, *arguments):
    """FFCV starts threads that can keep a process from ending: each test of it has one of its own."""
    process = start_process(function, *arguments)
    process.join(PATIENCE)
    assert process.exitcode == 0


def ffcv_reads(paths):
    from ffcv.reader import Reader

    for path in paths:
        theirs, ours = Reader(str(path)), beton.read(path)
        assert theirs.num_samples == len(ours.label) and theirs.field_names == ["image", "label"]
        assert theirs.metadata["f0"]["width"].tolist() == ours.width.tolist()
        assert theirs.metadata["f0"]["data_ptr"].tolist() == ours.offset.tolist()
        assert theirs.metadata["f1"].tolist() == ours.label.tolist()
        assert theirs.alloc_table["size"].tolist() == ours.length.tolist()
    os._exit(0)


@has_ffcv
@pytest.mark.slow
def test_ffcv_reads_what_we_write(tree):
    in_a_process(ffcv_reads, [as_beton(tree, mode=mode) for mode in ("jpg", "raw")])


def ffcv_writes(tree, path):
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    index = open_at(tree)
    pixels = [index.read(row).permute(1, 2, 0).numpy() for row in range(len(index))]
    samples = [(image, int(label)) for image, label in zip(pixels, index.label, strict=True)]
    fields = {"image": RGBImageField(write_mode="raw"), "label": IntField()}
    DatasetWriter(str(path), fields, num_workers=1).from_indexed_dataset(samples)
    os._exit(0)


@has_ffcv
@pytest.mark.slow
def test_we_read_what_ffcv_writes(tree, tmp_path):
    path = tmp_path / "theirs.beton"
    in_a_process(ffcv_writes, tree, path)
    theirs, index = open_at(path), open_at(tree)
    assert theirs.label.tolist() == index.label.tolist()
    assert all(torch.equal(theirs.read(row), index.read(row)) for row in range(len(index)))
    assert len(take(open_train(config("ffcv", path)), 6)) == 6


def damaged(path, to):
    """A copy of a `.beton` and its manifest."""
    to.write_bytes(path.read_bytes())
    beton.manifest_path(to).write_bytes(beton.manifest_path(path).read_bytes())
    return to


def test_verify_finds_one_changed_byte(tree, tmp_path):
    path = damaged(as_beton(tree, mode="raw"), tmp_path / "x.beton")
    tool_ = tool("convert_imagenet_to_ffcv")
    assert tool_.verify(path, 2) == []
    content = bytearray(path.read_bytes())
    content[beton.read(path).offset[7] + 3] ^= 1
    path.write_bytes(content)
    assert tool_.verify(path, 2) == ["page 0 differs from what was written"]


@pytest.mark.parametrize(
    "changes", [{"bytes": "x"}, {"pages_crc32": 5}, {"first_page": -5}, {"first_page": "a"}, {"classes": 3}, None]
)
def test_a_manifest_of_something_else_is_one_line(changes, tree, tmp_path):
    path = damaged(as_beton(tree), tmp_path / "x.beton")
    manifest = beton.manifest_path(path)
    content = "[" * 100_000 if changes is None else json.dumps(json.loads(manifest.read_text()) | changes)
    manifest.write_text(content)
    with pytest.raises(DataError, match=r"x\.beton\.json: is not the manifest of a \.beton file"):
        beton.read(path)


@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.9, 0.9999])
def test_a_beton_that_is_cut_short_is_refused(share, tree, tmp_path):
    path = damaged(as_beton(tree), tmp_path / "x.beton")
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(DataError, match=r"x\.beton: is not"):
        beton.read(path)
    beton.manifest_path(path).unlink()  # one that FFCV wrote, and did not finish
    with pytest.raises(DataError, match=r"x\.beton: is not a whole"):
        beton.read(path)


def test_a_hostile_beton_is_refused_or_read_as_bad_images(tree, tmp_path):
    # Random changes in header, records and table: an error or a bad image, never a crash.
    path = tmp_path / "x.beton"
    content = as_beton(tree, mode="mixed").read_bytes()
    header = 24 + 2 * 1041 + 24 * 32
    tail = len(content) - 24 * 24
    rng = np.random.default_rng(3)
    refused = read = 0
    for _ in range(150):
        changed = bytearray(content)
        for at in rng.choice([*range(40), *range(24 + 2 * 1041, header), *range(tail, len(content))], 3):
            changed[at] = int(rng.integers(256))
        path.write_bytes(changed)
        try:
            index = open_at(path, max_pixels=10**6)
        except DataError:
            refused += 1
            continue
        job = turbo.Job(index, np.arange(len(index)))
        job.run_alone()
        read += 1
    assert refused > 10 and read > 10


def test_nothing_half_written_has_the_name(tree, tmp_path):
    out = tmp_path / "x.beton"
    (tmp_path / "bad" / "class0").mkdir(parents=True)
    for number in range(20):
        Image.fromarray(picture(number, 40, 40)).save(tmp_path / "bad" / "class0" / f"{number:02d}.jpg")
    cut = tmp_path / "bad" / "class0" / "15.jpg"
    cut.write_bytes(cut.read_bytes()[:-200])
    with pytest.raises(DataError, match=r"15\.jpg: cannot be decoded.*--on-bad-image skip"):
        convert(tmp_path / "bad", out)
    assert list(tmp_path.glob("*x.beton*")) == []
    assert convert(tmp_path / "bad", out, on_bad_image="skip") == 19
    manifest = json.loads(beton.manifest_path(out).read_text())
    assert [entry["path"].endswith("15.jpg") for entry in manifest["left_out"]] == [True]
    assert manifest["count"] == 19 and manifest["source_fingerprint"] == open_at(tmp_path / "bad").fingerprint
    assert tool("convert_imagenet_to_ffcv").verify(out, 1) == []
    with pytest.raises(DataError, match=r"takes .* bytes, a page has 2,097,152"):
        convert(write_big(tmp_path / "big"), out, mode="raw", max_side=0)
    assert len(beton.read(out).label) == 19  # the one before is untouched


def write_big(root):
    (root / "class0").mkdir(parents=True)
    Image.fromarray(np.zeros((900, 900, 3), dtype=np.uint8)).save(root / "class0" / "a.jpg")
    return root


def test_pages_have_checksums(tree):
    path = as_beton(tree)
    content = beton.read(path)
    first = path.read_bytes()[content.manifest["first_page"] :][: content.page_size]
    assert zlib.crc32(first) == content.manifest["pages_crc32"][0]


def test_ffcv_wants_a_beton(tree):
    data = loaders.with_backend(config("folder", tree), "ffcv")
    with pytest.raises(DataError, match=r"data.backend=ffcv needs a .beton file"):
        open_train(data)


@pytest.mark.parametrize("world_size", [1, 2])
def test_training_from_a_beton_resumes_bit_identically(world_size, tree, tmp_path):
    from tests.processes import run_ranks, train_main
    from tests.runs import assert_same_run

    path = as_beton(tree, mode="mixed")
    more = ["data.backend=ffcv", "data.options={}", f"data.train={path}", f"data.val={path}", "data.views.0.size=32"]
    whole = tiny("quick/burn_stage1.yaml", tmp_path / "whole", *more)
    if world_size == 1:
        run(whole)
        part = tiny("quick/burn_stage1.yaml", tmp_path / "part", *more)
        run(part)
        newest = sorted((part.folder / "checkpoints").iterdir())
        for file in newest[1:]:  # as if it had been stopped after the first save
            file.unlink()
        run(part, resume=True)
        assert_same_run(whole, part)
    else:
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(whole.dump())
        assert run_ranks(2, train_main, str(recipe)) == [0, 0]
        assert last_state(whole)["step"] == 6


# ------------------------------------------------------------------------------------------------ quarantine, scan


def test_scan_finds_what_is_wrong_and_every_back_end_leaves_it_out(tmp_path, capsys, monkeypatch):
    root = write_tree(tmp_path / "data", count=40, classes=2)
    decodes = odd_files(root)
    (root / "class1" / "copy.jpg").write_bytes((root / "class0" / "0000.jpg").read_bytes())
    monkeypatch.setattr(sys, "argv", ["scan_images.py", str(root), "--report", str(tmp_path / "scan")])
    assert tool("scan_images").main() == 1
    report = json.loads((tmp_path / "scan" / "report.json").read_text())
    bad = {entry["path"] for entry in report["unusable"]}
    assert bad == {name for name, good in decodes.items() if not good}
    odd = {entry["path"]: entry["what"] for entry in report["odd"]}
    assert odd["class0/cmyk.jpg"] == ["CMYK"] and "named .jpeg and is PNG" in odd["class0/png_named.JPEG"]
    assert ["class0/0000.jpg", "class1/copy.jpg"] in report["duplicates"]
    assert "\n\n" not in capsys.readouterr().out
    for backend in BACKENDS:
        data = config(backend, root, quarantine=str(tmp_path / "scan" / "quarantine.jsonl"), on_bad_image="stop")
        index = loaders.open_data(data, "train")
        assert not index.problems and index.quarantined == len(bad)
        loader = open_train(data)
        take(loader, len(index) // 4 + 1)
        assert loader.bad == {}


@pytest.mark.parametrize("option", ["--workers", "--max-pixels"])
def test_a_scan_by_nobody_is_refused(option, tree, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scan_images.py", str(tree), option, "0"])
    with pytest.raises(SystemExit) as left:
        tool("scan_images").main()
    assert left.value.code == 2 and f"{option}: expected at least 1, got 0" in capsys.readouterr().err


def test_a_file_that_is_not_a_quarantine_list_is_refused(tree, tmp_path):
    path = tmp_path / "list"
    with pytest.raises(DataError, match="cannot be read as a quarantine list"):
        open_at(tree, quarantine=path)
    for line in ('{"path": "a"}', "[" * 100_000):
        path.write_text(line + "\n")
        with pytest.raises(DataError, match=r"line 1: expected \{\"path\""):
            open_at(tree, quarantine=path)
    path.write_text(json.dumps({"path": os.fsdecode(b"class0/0000.jpg"), "reason": "ugly"}) + "\n")
    assert len(open_at(tree, quarantine=path)) == 23


def test_the_limit_of_pixels_is_kept_though_a_file_changed(tmp_path):
    # reliability.md 27: the index knew a small image; nothing of the new one's size may be made.
    from tests.images import bomb

    root = write_tree(tmp_path / "data")
    index = dataclasses.replace(open_at(root), size=None)  # a file that has the bytes it had
    (root / "class0" / "0000.jpg").write_bytes(bomb(30_000, 30_000))
    with pytest.raises(BadImage, match=r"is 30000x30000 pixels, the index says|cannot be decoded"):
        index.read(0)


# ------------------------------------------------------------------------------------------------ tools


def called(*arguments, **options):
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, **options
    )


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Overrides that make a quick recipe train on a tree of JPEG files."""
    root = write_tree(tmp_path_factory.mktemp("small") / "data", count=48)
    return root, ["data.expect_images=null", f"data.train={root}", f"data.val={root}", "data.batch_size=16",
                  "data.micro_batch=16", "init=[]", "evals=[]", "data.backend=folder", "data.options={}"]  # fmt: skip


@pytest.mark.slow
def test_benchmark_of_loaders(small, tmp_path):
    _, overrides = small
    path = tmp_path / "bench.json"
    done = called(
        "tools/train.py", "recipes/quick/burn_stage1.yaml", *overrides, "--benchmark", "loader", "--json", path
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(path.read_text())
    assert set(result["backends"]) == set(BACKENDS) and result["best"] in BACKENDS
    assert "ffcv" in result["not_measured"]
    floor = np.median(result["floor"]["cpu_ms"])
    floors = np.array(result["floor"]["cpu_ms"])
    for measured in result["backends"].values():
        crops, whole, phases = measured["crops"], measured["whole"], measured["phases_cpu_ms"]
        assert len(whole["images_per_second"]) == len(crops["cpu_ms"]) == result["rounds"]
        assert measured["per_core"] == np.median(whole["images_per_second"]) / result["threads"]
        assert measured["of_floor"] == pytest.approx(np.median(floors / crops["cpu_ms"]))
        # Phases are differences, so they add up to the whole loader, unless reading alone took longer than the floor.
        assert sum(phases.values()) == pytest.approx(np.median(whole["cpu_ms"]) + max(0, phases["read"] - floor))
    assert f"best here for this recipe: {result['best']}" in done.stdout


def test_benchmark_times_what_it_says(monkeypatch):
    from engine.bench import clock

    now, order = [0.0], []
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(clock, "cpu_seconds", lambda: now[0] / 4)

    def batches(name, first, others):
        order.append(name)
        now[0] += first
        while True:
            yield None
            now[0] += others

    candidates = [
        clock.Candidate("slow", lambda: batches("slow", 3.0, 0.5)),
        clock.Candidate("fast", lambda: batches("fast", 1.0, 0.25)),
    ]
    said = []
    speeds = clock.interleave(candidates, batch=10, batches=4, rounds=2, begin=said.append)
    assert order == ["slow", "fast"] * 2  # in turn
    assert said == [f"{name}, round {number} of 2" for number in (1, 2) for name in ("slow", "fast")]
    for name, first, others in (("slow", 3.0, 0.5), ("fast", 1.0, 0.25)):
        assert speeds[name].first_batch == [first] * 2
        assert speeds[name].images_per_second == [10 / others] * 2
        assert speeds[name].cpu_ms == [1000 * others / 4 / 10] * 2


def test_cpu_time_counts_children_and_is_never_zero():
    from engine.bench.clock import cpu_seconds

    before = cpu_seconds()
    sum(range(1000))
    assert cpu_seconds() > before  # however short: shares are taken of it
    before = cpu_seconds()
    subprocess.run([sys.executable, "-c", "sum(range(20_000_000))"], check=True)
    assert cpu_seconds() - before > 0.05


@pytest.mark.slow
def test_doctor(small):
    _, overrides = small
    done = called("tools/doctor.py", "recipes/quick/burn_stage1.yaml", *overrides)
    assert done.returncode == 0, done.stdout + done.stderr
    for word in (*(f"back end {name}" for name in loaders.backends()), "/dev/shm", "disk, cold", "verdict"):
        assert word in done.stdout


def test_doctor_says_what_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(loaders.load("ffcv").Options, "about", classmethod(lambda cls: "works"))  # takes its time
    monkeypatch.setattr(sys, "argv", ["doctor.py", str(ROOT / "recipes/burn_stage1.yaml")])
    assert tool("doctor").main() == 1 and "set data.train=" in capsys.readouterr().out


@pytest.mark.slow
def test_doctor_names_the_loader_to_take_where_only_the_back_end_is_missing(small, monkeypatch, capsys):
    _, overrides = small
    monkeypatch.setattr(loaders.load("dali").Options, "missing", classmethod(lambda cls: "dali needs NVIDIA DALI"))
    monkeypatch.setattr(loaders.load("ffcv").Options, "about", classmethod(lambda cls: "works"))  # takes its time
    arguments = ["doctor.py", str(ROOT / "recipes/quick/burn_stage1.yaml"), *overrides, "data.backend=dali"]
    monkeypatch.setattr(sys, "argv", arguments)
    assert tool("doctor").main() == 1
    said = capsys.readouterr().out
    assert "missing            data.backend: dali needs NVIDIA DALI" in said
    best = re.search(r"the best loader here is (\w+)", said)[1]
    assert best != "dali" and f"set data.backend={best}" in said


@pytest.mark.slow
def test_show_views(small, tmp_path):
    _, overrides = small
    path = tmp_path / "views.png"
    done = called("tools/show_views.py", "recipes/quick/burn_stage1.yaml", *overrides, "--out", path, "--count", "3")
    assert done.returncode == 0, done.stderr
    assert np.array(Image.open(path)).std() > 10
    for line in done.stdout.splitlines()[:-1]:  # "turbo against folder: mean 0.004 levels of 255, ..."
        assert float(line.split("mean ")[1].split()[0]) < 1
    wrong = called("tools/show_views.py", "recipes/quick/burn_stage1.yaml", *overrides, "--backends", "dalli")
    assert wrong.returncode == 2 and "no such back end; expected one of" in wrong.stderr


def test_bad_options_of_the_converter_are_one_line(tmp_path, monkeypatch, capsys):
    converter = tool("convert_imagenet_to_ffcv")
    monkeypatch.setattr(sys, "argv", ["convert", str(tmp_path / "none"), str(tmp_path / "x.beton")])
    assert converter.main() == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    monkeypatch.setattr(sys, "argv", ["convert", str(tmp_path), str(tmp_path / "x.bin")])
    with pytest.raises(SystemExit) as left:
        converter.main()
    assert left.value.code == 2 and "--out: expected .beton" in capsys.readouterr().err


def test_a_small_dev_shm_is_told_before_the_start(tree, monkeypatch):
    import shutil

    data = config("folder", tree)
    assert loaders.warnings(data, 1) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**20, 2**20, 1000))
    (text,) = loaders.warnings(data, 1)
    assert "/dev/shm" in text and "--shm-size" in text


def test_dali_says_whether_it_runs_here():
    needs("dali")
    assert dali_loader.Options.about().startswith("on the CPU JPEGs are decoded by the host")
