"""What the bytes of an image may be: odd, damaged, hostile. The verdict is theirs alone, whoever decodes."""

import gc
import io
import json
import multiprocessing
import os
import resource
import struct
import subprocess
import sys
import threading
import time
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from tqdm import tqdm

import loaders
from loaders import DataError, LoaderError, core, folder_loader, host, turbo
from loaders.contract import CropMemory
from loaders.decode import decode
from loaders.errors import BadImage
from loaders.views import View
from tests.images import bomb, damaged, gray_tiffs, jpeg, picture, variants, write_tree
from tests.loading import FILES, as_beton, config, needs, open_train, take
from tests.processes import PATIENCE, start_process, tool
from tests.tiny import ROOT, tiny_overrides

BACKENDS = [name for name in FILES if name != "folder"]


def write_damaged(root, seed, of_each):
    """At least `of_each` damaged files of each format, among a few sound ones."""
    rng = np.random.default_rng(seed)
    write_tree(root, 12, classes=2)
    forms = variants()
    suffixes = [name.rsplit(".", 1)[1] for name in forms]
    for (name, content), suffix in zip(forms.items(), suffixes, strict=True):
        (root / "class1" / name).write_bytes(content)
        for number in range(-(-of_each // suffixes.count(suffix))):
            stem = f"{name.split('.', 1)[0]}_{number:03d}"
            (root / "class0" / f"{stem}.{suffix}").write_bytes(damaged(content, rng))
    return root


@pytest.fixture(scope="module")
def damage(tmp_path_factory):
    return write_damaged(tmp_path_factory.mktemp("damage") / "data", 0, 200)


def verdicts(index):
    """Row -> why its image is bad, or ""."""
    found = {}
    for row in range(len(index)):
        try:
            index.read(row)
            found[row] = ""
        except BadImage as error:
            found[row] = str(error)
    return found


# ------------------------------------------------------------------------------------------------ every tool


def every_tool(root, out):
    """All that decodes, over the same damaged files; each tool's exit code goes into a file."""
    codes = []
    recipe = ROOT / "recipes" / "quick" / "burn_stage1.yaml"
    data = [*tiny_overrides(recipe, out / "runs"), f"data.train={root}", "data.options={}"]
    data += ["data.on_bad_image=replace", "evals=[]", "data.workers=2", "data.backend=turbo"]
    calls = [
        ("scan_images", [root, "--report", out / "report"]),
        ("convert_imagenet_to_ffcv", [root, out / "all.beton", "--on-bad-image", "skip", "--workers", "2"]),
        ("make_index", [root, out / "all.index"]),
        ("show_views", [recipe, *data, "--out", out / "views.png", "--count", "4"]),
        *(("train", [recipe, *data, f"data.backend={b}", f"name={b}"]) for b in FILES if usable(b)),
    ]
    for name, arguments in calls:
        sys.argv = [name, *map(str, arguments)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            codes.append(f"{name} {tool(name).main()}\n")
        (out / "codes").write_text("".join(codes))


def usable(backend):
    return not loaders.load(backend).Options.missing()


def test_no_byte_of_an_image_ends_a_process(damage, tmp_path):
    # 200 damaged files of each format: no signal and no traceback in any tool.
    process = start_process(every_tool, damage, tmp_path, OMP_NUM_THREADS="1")
    process.join(PATIENCE)
    codes = (tmp_path / "codes").read_text().splitlines() if (tmp_path / "codes").exists() else []
    assert process.exitcode == 0, codes
    assert codes[:4] == ["scan_images 1", "convert_imagenet_to_ffcv 0", "make_index 0", "show_views 0"]
    assert set(codes[4:]) == {"train 0"}
    listed = (tmp_path / "report" / "quarantine.jsonl").read_text().splitlines()
    index = loaders.open_data(config("folder", damage), "train")
    assert len(listed) == sum(map(bool, verdicts(index).values())) > 400


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_verdict_is_a_function_of_the_bytes(backend, damage):
    needs(backend)
    index = loaders.open_data(config("folder", damage), "train")
    good = [row for row, reason in verdicts(index).items() if not reason]
    assert 400 < len(good) < len(index) - 400

    def whole(name):
        loader = loaders.open_eval(config(name, damage, eval_batch=64), index)
        try:
            batches = list(loader)
        finally:
            loader.close()
        return [row for b in batches for row in b.rows.tolist()], torch.cat([batch.views[0] for batch in batches])

    rows, views = whole(backend)
    assert rows == good
    apart = (views - whole("folder")[1]).abs().mean(dim=(1, 2, 3)) * 255 * 0.225
    assert float(apart.max()) < 2, [index.path(rows[place]) for place in apart.topk(5).indices.tolist()]


@pytest.mark.parametrize("backend", FILES)
def test_what_a_window_sees_does_not_change_the_verdict(backend, tmp_path):
    # Windows far above the cut of a file: the image is left out from the start, and a resumed run sees the same.
    needs(backend)
    root = write_tree(tmp_path / "data", 16, classes=2)
    big = jpeg(Image.fromarray(picture(3, 300, 300)), quality=95)
    (root / "class0" / "cut.jpg").write_bytes(big[: len(big) * 85 // 100])
    (root / "class1" / "camera.jpg").write_bytes(big + b"more, as cameras write it" * 20)
    small = View(size=24, crop="random", scale=(0.02, 0.1))
    data = config(backend, root, views=(small,), batch_size=4, micro_batch=4)
    index = loaders.open_data(data, "train")
    cut, camera = (
        next(r for r in range(len(index)) if index.name(r).endswith(name)) for name in (b"/cut.jpg", b"a.jpg")
    )
    whole = take(open_train(data), 12)
    rows = [row for batch in whole for row in batch.rows.tolist()]
    assert cut not in rows and camera in rows
    again = take(open_train(data, step=5), 7)
    for a, b in zip(whole[5:], again, strict=True):
        assert torch.equal(a.rows, b.rows) and torch.equal(a.views[0], b.views[0])


def cut_short(content):
    return [content[: len(content) * tenth // 10] for tenth in range(1, 10)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_odd_forms_have_the_same_pixels_everywhere(backend, tmp_path):
    needs(backend)
    folder = tmp_path / "data" / "class"
    folder.mkdir(parents=True)
    rgb = Image.fromarray(picture(5, 60, 80))
    plain, progressive = jpeg(rgb), jpeg(rgb, progressive=True)
    cmyk = jpeg(rgb.convert("CMYK"))
    adobe = cmyk.index(b"\xff\xee")
    forms = {
        "no_end.jpg": plain[:-2],
        "more.jpg": plain + b"\0" * 40,
        "cmyk.jpg": cmyk,
        "cmyk_without_adobe.jpg": cmyk[:adobe] + cmyk[adobe + 16 :],
        "half.jpg": plain[: len(plain) // 2] + b"\xff\xd9",
        **{f"cut{n}.jpg": content for n, content in enumerate(cut_short(plain))},
        **{f"slow{n}.jpg": content for n, content in enumerate(cut_short(progressive))},
        **{name: content for name, content in variants().items() if not name.endswith("jpg")},
    }
    for name, content in forms.items():
        (folder / name).write_bytes(content)
    index = loaders.open_data(config("folder", tmp_path / "data", batch_size=1, micro_batch=1), "train")
    bad = {index.name(row).decode().removeprefix("class/") for row, reason in verdicts(index).items() if reason}
    assert bad == {name for name in forms if name.startswith(("no_end", "cut", "slow"))}
    seen = {}
    for name in ("folder", backend):
        loader = loaders.open_eval(config(name, tmp_path / "data"), index)
        seen[name] = [(batch.rows.tolist(), batch.views[0]) for batch in loader]
        loader.close()
    for (rows, a), (others, b) in zip(seen["folder"], seen[backend], strict=True):
        assert rows == others
        assert not rows or float((a - b).abs().mean(dim=(1, 2, 3)).max()) * 255 * 0.225 < 2


def test_the_scan_lists_damage_that_libjpeg_fills_in(tmp_path, monkeypatch):
    if core.why_missing():
        pytest.skip("the compiled core was not built")
    folder = tmp_path / "data" / "class"
    folder.mkdir(parents=True)
    content = bytearray(jpeg(Image.fromarray(picture(5, 60, 80))))
    (folder / "sound.jpg").write_bytes(content)
    content[len(content) // 2 : -2] = b""  # half of it, and its end
    (folder / "half.jpg").write_bytes(content)
    monkeypatch.setattr(sys, "argv", ["scan_images.py", str(tmp_path / "data"), "--report", str(tmp_path / "scan")])
    assert tool("scan_images").main() == 0
    report = json.loads((tmp_path / "scan" / "report.json").read_text())
    (odd,) = report["odd"]
    assert odd["path"] == "class/half.jpg" and "damaged data: a part of it may be gray" in str(odd)


# ------------------------------------------------------------------------------------------------ single formats


def saved(image, format, **options):
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def test_sixteen_bits_keep_their_upper_eight():
    deep = picture(1, 20, 30)[:, :, 0].astype(np.uint16) * 256 + 77
    image = Image.fromarray(deep)
    pgm = b"P5 30 20 65535\n" + deep.astype(">u2").tobytes()
    big_endian = saved(Image.frombytes("I;16B", (30, 20), deep.astype(">u2").tobytes()), "TIFF")
    for content in (saved(image, "TIFF"), saved(image, "PNG"), big_endian, pgm):
        got = decode(content, 30, 20)
        assert got.dtype == torch.uint8 and got.shape == (3, 20, 30)
        assert (got[0].int() - torch.from_numpy((deep >> 8).astype(np.int32))).abs().max() <= 1  # Pillow rescales PGM
        assert torch.equal(got[0], got[1]) and torch.equal(got[0], got[2])


def test_gray_tiff_is_light_where_it_is_light():
    gray = picture(1, 20, 30)[:, :, 0]
    for content, expected in gray_tiffs(gray):
        assert np.array_equal(decode(content, 30, 20)[0].numpy(), expected)


def test_numbers_that_do_not_say_what_is_white_are_refused(tmp_path):
    rgb = Image.fromarray(picture(2, 40, 50))
    folder = tmp_path / "data" / "class"
    folder.mkdir(parents=True)
    contents = {
        "float.tiff": saved(rgb.convert("F"), "TIFF"),
        "integer.tiff": saved(rgb.convert("I"), "TIFF"),
        "float.ppm": b"Pf\n50 40\n-1.0\n" + b"\0\0\0?" * 2000,
        "deep.tiff": saved(Image.fromarray(np.zeros((40, 50), np.uint16)), "TIFF"),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    index = loaders.open_data(config("folder", tmp_path / "data", batch_size=1, micro_batch=1), "train")
    found = {index.name(row).decode().removeprefix("class/"): reason for row, reason in index.problems.items()}
    assert sorted(found) == ["float.ppm", "float.tiff", "integer.tiff"]
    assert all("do not say what is white; expected unsigned integers of 8 or 16 bits" in r for r in found.values())
    with pytest.raises(BadImage, match="holds floats"):  # it has become one since it was indexed
        decode(contents["float.tiff"], 50, 40)


def test_four_channels_are_what_pillow_reads():
    rgb = Image.fromarray(picture(2, 40, 50))
    content = jpeg(rgb.convert("CMYK"))
    marker = content.index(b"\xff\xee")
    for form in (content, content[:marker] + content[marker + 16 :]):
        wanted = np.array(Image.open(io.BytesIO(form)).convert("RGB"))
        assert np.array_equal(decode(form, 50, 40).permute(1, 2, 0).numpy(), wanted)


def test_a_large_profile_or_text_beside_the_pixels_is_no_fault(tmp_path):
    from PIL import PngImagePlugin

    rgb = Image.fromarray(picture(2, 40, 50))
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * (3 << 20), zip=True)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes() + b"\0" * (3 << 20)
    folder = tmp_path / "data" / "class"
    folder.mkdir(parents=True)
    for name, options in (("text", {"pnginfo": text}), ("profile", {"icc_profile": profile})):
        (folder / f"{name}.png").write_bytes(saved(rgb, "PNG", **options))
    index = loaders.open_data(config("folder", tmp_path / "data", batch_size=1, micro_batch=1), "train")
    assert not index.problems and not any(verdicts(index).values())


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tiff"])
def test_a_format_that_is_not_on_the_list_starts_no_program(name, tmp_path, monkeypatch):
    folder = tmp_path / "data" / "class"
    folder.mkdir(parents=True)
    (folder / name).write_bytes(saved(Image.fromarray(picture(1, 20, 20)), "EPS"))
    (folder / f"b{name}").write_bytes(saved(Image.fromarray(picture(1, 20, 20)), "ICO"))

    def starts(*_, **__):
        raise AssertionError("a program is started")

    monkeypatch.setattr(subprocess, "Popen", starts)
    index = loaders.open_data(config("folder", tmp_path / "data", batch_size=1, micro_batch=1), "train")
    assert len(index.problems) == 2
    assert all(
        text == "is not an image; expected JPEG, PNG, BMP, GIF, PPM, TIFF, WEBP" for text in index.problems.values()
    )
    with pytest.raises(BadImage, match="cannot be decoded"):
        decode((folder / name).read_bytes(), 20, 20)


def bombs():
    """Small files of each format that promise gigapixels: name -> bytes."""
    side = struct.pack("<H", 65_535)
    header = struct.pack("<IiiHHIIiiII", 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0)
    tags = [(256, 4, 60_000), (257, 4, 60_000), (258, 3, 8), (259, 3, 1), (262, 3, 1), (273, 4, 8), (279, 4, 99)]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    frame = jpeg(Image.fromarray(picture(1, 40, 40)))
    at = frame.index(b"\xff\xc0") + 5
    return {
        "bomb.png": bomb(50_000, 50_000),
        "bomb.bmp": b"BM" + struct.pack("<IHHI", 154, 0, 0, 54) + header + b"\0" * 100,
        "bomb.gif": b"GIF89a" + side + side + b"\0\0\0,\0\0\0\0" + side + side + b"\0\x02\x02D\x01\0;",
        "bomb.ppm": b"P6 60000 60000 255\n" + b"\0" * 100,
        "bomb.tiff": b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + b"\0" * 104,
        "bomb.jpg": frame[:at] + struct.pack(">HH", 65_000, 65_000) + frame[at + 4 :],
        "scans.jpg": jpeg(Image.new("L", (2400, 2400)), progressive=True),
    }


def defused(root):
    """Index, scan and load bombs; the process's peak of memory, in bytes, may not grow by an image of theirs."""
    backend = "turbo" if usable("turbo") else "folder"
    take(open_train(config(backend, write_tree(root.with_name("sound"), 12, classes=2))), 8)
    for content in variants().values():  # what decoders take for themselves
        decode(content, 60, 44)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    data = config(backend, root, max_pixels=5_000_000, workers=1)
    index = loaders.open_data(data, "train")
    bad = {index.name(row).decode().removeprefix("class0/") for row in index.problems}
    assert bad >= {"bomb.png", "bomb.bmp", "bomb.gif", "bomb.ppm", "bomb.tiff", "bomb.jpg", "scans.jpg"}, bad
    take(loaders.open_train(data, index, seed=0), 8)
    # And where the file has become one since it was indexed.
    for content in bombs().values():
        with pytest.raises(BadImage):
            decode(content, 40, 40)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < 200e6, f"{grown / 1e6:.0f} MB"


def test_a_bomb_takes_no_memory(tmp_path):
    # reliability 27
    root = write_tree(tmp_path / "data", 12, classes=2)
    for name, content in bombs().items():
        (root / "class0" / name).write_bytes(content)
    process = start_process(defused, root)
    process.join(PATIENCE)
    assert process.exitcode == 0


def test_a_file_that_has_become_a_pipe_is_not_waited_for(tmp_path):
    root = write_tree(tmp_path / "data", 8, classes=1)
    index = loaders.open_data(config("folder", root), "train")
    path = root / "class0" / "0000.jpg"
    path.unlink()
    os.mkfifo(path)
    threading.Thread(target=lambda: path.write_bytes(b""), daemon=True).start()  # or an old version waits forever
    with pytest.raises(BadImage, match="^is not a file$"):
        index.read(0)


@pytest.mark.parametrize("backend", FILES)
def test_odd_names_of_images(backend, tmp_path):
    # reliability 28
    needs(backend)
    names = [
        "a" * 251 + ".jpg",
        "ä" * 125 + ".jpg",
        "q'uo\"te $HOME {a,b} [c] #1 =%s.jpg",
        "new\nline.jpg",
        " .jpg",
        "-o.jpg",
    ]
    folder = tmp_path / "data" / "class"
    folder.mkdir(parents=True)
    for number, name in enumerate([*map(os.fsencode, names), b"caf\xe9.jpg"]):
        with open(os.path.join(os.fsencode(folder), name), "wb") as file:
            file.write(jpeg(Image.fromarray(picture(number, 40, 40))))
    with open(folder / ("bad" + "b" * 248 + ".png"), "wb") as file:
        file.write(b"no image")
    data = config(backend, tmp_path / "data", batch_size=4)
    loader = open_train(data)
    rows = {row for batch in take(loader, 6) for row in batch.rows.tolist()}
    assert len(rows) == 7 and [path.rsplit("/", 1)[1][:4] for path in loader.bad] == ["badb"]
    assert json.loads(json.dumps(loader.bad)) == loader.bad


@pytest.mark.parametrize(("height", "width"), [(1, 4000), (4000, 1), (2, 60_000)])
def test_a_thin_image_takes_the_memory_of_what_is_seen(height, width):
    center = View(size=224, crop="center", resize=256)
    pixels = torch.from_numpy(picture(1, height, width)).permute(2, 0, 1)
    most = []
    real = host.F.resize

    def resize(image, size, **options):
        most.append(size[0] * size[1])
        return real(image, size, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host.F, "resize", resize)
        crop = host.cut(pixels, np.zeros(4), center)
    assert crop.shape == (224, 224, 3) and max(most) < 1 << 22


@pytest.mark.parametrize(("height", "width"), [(3, 900), (900, 3), (40, 5000), (5000, 40)])
@pytest.mark.parametrize(("size", "resize"), [(24, 28), (224, 256)])
def test_the_middle_of_a_thin_image_is_that_of_the_whole(height, width, size, resize, monkeypatch):
    center = View(size=size, crop="center", resize=resize)
    pixels = torch.from_numpy(picture(1, height, width)).permute(2, 0, 1)
    wanted = host.cut(pixels, np.zeros(4), center).float()
    monkeypatch.setattr(host, "_MOST_RESIZED", 0)
    assert float((host.cut(pixels, np.zeros(4), center).float() - wanted).abs().mean()) < 2


# ------------------------------------------------------------------------------------------------ mapped files


@pytest.fixture
def mapped(tree, tmp_path):
    if core.why_missing():
        pytest.skip("the compiled core was not built")
    path = tmp_path / "raw.beton"
    path.write_bytes(as_beton(tree, mode="raw").read_bytes())
    return path


@pytest.mark.parametrize("what", ["cut", "written over"])
@pytest.mark.parametrize("strategy", ["page_cache", "direct"])
def test_a_beton_that_changes_while_it_is_read_ends_in_one_line(what, strategy, mapped):
    options = {"options": loaders.load("ffcv").Options(strategy=strategy)}
    try:
        loader = open_train(config("ffcv", mapped, **options))
    except DataError as error:
        assert "past the page cache" in str(error)
        pytest.skip("no direct reads here")
    next(loader)
    if what == "cut":
        os.truncate(mapped, 4096)
    else:
        content = mapped.read_bytes()
        time.sleep(0.02)
        mapped.write_bytes(content)
    try:
        with pytest.raises(DataError, match=r"raw\.beton: (was written while|cannot be read)"):
            for _ in range(8):
                next(loader)
    finally:
        loader.close()


def loses_its_pages(path):
    """A job over a file that is cut short between the look at it and the use."""
    data = config("ffcv", path)
    index = loaders.open_data(data, "train")
    source = loaders.load("ffcv")._Mapped(index, hold=False)
    stream = loaders.loader.Stream(index, data.views, 0)
    plan = stream.plan(range(8))
    cut = turbo.Cut.of(plan, data.views, CropMemory(stream).crops(8))
    job = turbo.Job(index, plan.image, cut, source)
    os.truncate(path, 4096)
    job.run_alone()
    assert (job.status != turbo.DONE).all()


def test_pages_that_go_while_they_are_read_end_no_process(mapped):
    process = start_process(loses_its_pages, mapped)
    process.join(PATIENCE)
    assert process.exitcode == 0


# ------------------------------------------------------------------------------------------------ helpers


def test_workers_that_cannot_be_started_are_one_line_and_leave_nothing(tree, monkeypatch):
    before, started, fork = set(multiprocessing.active_children()), [], os.fork

    def limited():
        if len(started) == 2:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        started.append(1)
        return fork()

    monkeypatch.setattr(os, "fork", limited)
    with pytest.raises(LoaderError, match=r"4 worker processes cannot be started: Resource temporarily.*data\.workers"):
        open_train(config("folder", tree, workers=4))
    assert set(multiprocessing.active_children()) == before


@pytest.mark.parametrize("backend", FILES)
def test_threads_that_cannot_be_started_are_one_line(backend, tmp_path, monkeypatch):
    needs(backend)
    root = write_tree(tmp_path / "data", 8, classes=2)
    (root / "class0" / "a.png").write_bytes(variants()["color.png"])
    data = config(backend, root, workers=2)

    here, start = os.getpid(), threading.Thread.start

    def refuses(self):
        if os.getpid() == here:
            raise RuntimeError("can't start new thread")
        start(self)  # those of a worker are its own

    monkeypatch.setattr(threading.Thread, "start", refuses)
    monkeypatch.setattr(tqdm, "monitor_interval", 0)  # its own thread, which it can do without
    try:
        index = loaders.open_data(data, "train")  # headers are then read by this thread
        assert len(index) == 9 and not index.problems
        loader = loaders.open_train(data, index, seed=0)
        take(loader, 3)
    except LoaderError as error:
        assert "cannot be started: can't start new thread" in str(error) and "\n" not in str(error)
    else:
        assert backend == "folder"  # its workers are processes


class OfThisProcess:
    """What must not be deleted in another process, such as a pipeline with its threads."""

    def __init__(self):
        self.me, self.process = self, os.getpid()  # a circle: only the collector deletes it

    def __del__(self):
        if os.getpid() != self.process:
            os._exit(9)


def test_a_worker_does_not_delete_what_belongs_to_its_parent(tree, monkeypatch):
    honest = folder_loader.load_batch

    def collects(*arguments, **options):
        gc.collect()
        return honest(*arguments, **options)

    monkeypatch.setattr(folder_loader, "load_batch", collects)
    kept = OfThisProcess()
    for _ in range(3):
        OfThisProcess()
    batches = take(open_train(config("folder", tree)), 4)
    assert len(batches) == 4 and kept.process == os.getpid() and gc.get_freeze_count() == 0
