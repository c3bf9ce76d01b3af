"""The compiled core: its pixels against Pillow's, its two paths against each other, and what it has to refuse."""

import dataclasses
import io

import numpy as np
import pytest
import torch
from PIL import Image

from loaders import core, turbo
from loaders.config import Request
from loaders.contract import CropMemory, Order
from loaders.errors import BadImage
from loaders.sampler import Plan, Stream
from loaders.sources import open_index
from loaders.synthetic_loader import noise
from loaders.views import View
from tests.images import picture

pytestmark = pytest.mark.skipif(bool(core.why_missing()), reason=core.why_missing() or "built")

VARIANTS = [
    *({"subsampling": s, "progressive": p} for s in ("4:4:4", "4:2:2", "4:2:0", "4:1:1") for p in (False, True)),
    {"gray": True},
    {"restart_marker_blocks": 3},
]


@pytest.fixture(autouse=True)
def _vectors_again():
    choose = core.load()[0].turbo_vectors
    yield
    choose(1)


def save(path, pixels, *, gray=False, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    (image.convert("L") if gray else image).save(path, "JPEG", quality=93, **options)


def index_of(tmp_path, variants=VARIANTS, height=157, width=203):
    for number, options in enumerate(variants):
        save(tmp_path / "data" / "class" / f"{number:02d}.jpg", picture(number, height, width), **options)
    return open_index(tmp_path / "data", Request(10**8))


def crop_memory(view, count):
    return CropMemory(Stream(noise(1, 1, 1), (view,), 0)).crops(count)


def cut(index, rows, view, windows, flip=False):
    """Crops of one view: windows (top, left, height, width) [b, 4] to uint8 [b, size, size, 3]."""
    windows = np.array(windows, dtype=float)[:, None]
    sees = np.concatenate((windows[..., :2], windows[..., :2] + windows[..., 2:]), axis=-1)
    plan = Plan(np.array(rows), windows, sees, np.full((len(rows), 1), flip), None, None)
    return run_plan(index, plan, view)


def run_plan(index, plan, view):
    crops = crop_memory(view, len(plan.image))
    job = turbo.Job(index, plan.image, turbo.Cut.of(plan, (view,), crops))
    job.run_alone()
    assert (job.status == turbo.DONE).all()
    return crops[0][0].clone()


def view(size, interpolation="bilinear", crop="random", resize=None):
    return View(size=size, crop=crop, interpolation=interpolation, resize=resize)


def test_what_is_decoded_for_a_window_is_what_a_full_decode_gives(tmp_path):
    # A window of the output's size is copied, so the decoded pixels are seen as they are.
    index = index_of(tmp_path)
    rng = np.random.default_rng(0)
    for row in range(len(index)):
        whole = index.read(row).permute(1, 2, 0)
        for size in (1, 8, 31, 64, 150):
            for _ in range(8):
                top, left = int(rng.integers(157 - size + 1)), int(rng.integers(203 - size + 1))
                got = cut(index, [row], view(size), [(top, left, size, size)])[0]
                assert torch.equal(got, whole[top : top + size, left : left + size]), (row, size, top, left)


def pillow(pixels, box, size, filter):
    """Pillow's filter on a crop, horizontal pass first (it takes either order, by the shape)."""
    top, left, height, width = box
    crop = Image.fromarray(pixels[top : top + height, left : left + width])
    return np.array(crop.resize((size, height), filter).resize((size, size), filter))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_resampling_is_pillows_within_one_level(interpolation, tmp_path):
    index = index_of(tmp_path, [{"subsampling": "4:4:4"}])
    pixels = index.read(0).permute(1, 2, 0).numpy()
    filter = getattr(Image.Resampling, interpolation.upper())
    rng = np.random.default_rng(1)
    for size in (1, 2, 5, 16, 17, 96, 224):
        for _ in range(12):
            height, width = int(rng.integers(1, 158)), int(rng.integers(1, 204))
            box = int(rng.integers(157 - height + 1)), int(rng.integers(203 - width + 1)), height, width
            got = cut(index, [0], view(size, interpolation), [box])[0].numpy().astype(int)
            assert np.abs(got - pillow(pixels, box, size, filter)).max() <= 1, (size, box)


def test_center_windows_see_what_is_around_them(tmp_path):
    # Resize of the whole picture and then of the center, as torchvision does it.
    index = index_of(tmp_path, [{"subsampling": "4:4:4"}])
    center = view(64, crop="center", resize=72)
    plan = Stream(index, (center,), 0, shuffled=False).plan([0])
    got = run_plan(index, plan, center)[0].numpy().astype(int)
    pixels = index.read(0).permute(1, 2, 0).numpy()
    size = int(72 * 203 / 157), 72
    whole = (
        Image.fromarray(pixels)
        .resize((size[0], 157), Image.Resampling.BILINEAR)
        .resize(size, Image.Resampling.BILINEAR)
    )
    left, top = round((size[0] - 64) / 2), 4
    assert np.abs(got - np.array(whole)[top : top + 64, left : left + 64]).max() <= 1


def test_both_paths_give_the_same_pixels_and_flips_are_mirrors(tmp_path):
    index = index_of(tmp_path)
    rows = list(range(len(index)))
    windows = [(3 + row, 5, 100 + row, 61 + 9 * row) for row in rows]
    if not core.use_vectors(True):
        pytest.skip("no AVX2 on this machine")
    for size in (1, 3, 10, 11, 96, 224):
        for interpolation in ("bilinear", "bicubic"):
            core.use_vectors(True)
            fast = cut(index, rows, view(size, interpolation), windows)
            flipped = cut(index, rows, view(size, interpolation), windows, flip=True)
            core.use_vectors(False)
            assert torch.equal(cut(index, rows, view(size, interpolation), windows), fast)
            assert torch.equal(flipped, fast.flip(2))


def raw_job(index, rows, axes, size=8):
    """Run windows that no plan would give, straight into the core."""
    crops = crop_memory(view(size), len(rows))
    axes = np.broadcast_to(np.array(axes, dtype=float), (len(rows), 1, 2, 4))  # of x and y: low, high, start, scale
    flip = np.zeros((len(rows), 1), dtype=bool)
    job = turbo.Job(index, np.array(rows), turbo.Cut((view(size),), axes, flip, crops))
    job.run_alone()
    return job.status


@pytest.mark.parametrize(
    "axis",
    [
        (-1, 8, 0, 1),
        (0, 1e9, 0, 1),
        (0, 500, 0, 1),
        (5, 5, 5, 1),
        (8, 2, 8, 1),
        (0, 8, -3, 1),
        (0, 8, 0, 0),
        (0, 8, 0, -1),
        (0, 8, 0, 1e12),
        (0, 8, 7, 5),
        (np.nan, 8, 0, 1),
        (0, np.nan, 0, 1),
        (0, 8, np.nan, 1),
        (0, 8, 0, np.nan),
        (0, np.inf, 0, 1),
        (0, 8, 0, np.inf),
    ],
)
def test_impossible_windows_are_refused(axis, tmp_path):
    index = index_of(tmp_path, [{}])
    good = (0, 8, 0, 1)
    assert raw_job(index, [0], [[good, good]]).tolist() == [turbo.DONE]
    for axes in ([axis, good], [good, axis]):
        assert raw_job(index, [0], [axes]).tolist() != [turbo.DONE]


def test_whatever_it_takes_the_host_would_take_too(tmp_path):
    # Every cut and many flipped bytes of small files: what the core gives back as done must decode to the same on the
    # host, so that all back ends replace the same images.
    rng = np.random.default_rng(2)
    folder = tmp_path / "data" / "class"
    folder.mkdir(parents=True)
    out = io.BytesIO()
    Image.fromarray(picture(0, 40, 56)).save(out, "JPEG", subsampling="4:2:0")
    content = out.getvalue()
    index_of(tmp_path, [{}], 40, 56)
    header = content.index(b"\xff\xda") + 14  # the scan's data: its pixels and nothing else
    broken = [content[:cut] for cut in range(header, len(content), 37)]
    for _ in range(60):
        flipped = bytearray(content)
        flipped[int(rng.integers(header, len(content)))] ^= 1 << int(rng.integers(8))
        broken.append(bytes(flipped))
    for number, body in enumerate(broken):
        (folder / f"b{number:03d}.jpg").write_bytes(body)
    index = open_index(tmp_path / "data", Request(10**8))
    crops = crop_memory(view(8), len(index))
    axes = np.broadcast_to(np.array([[8.0, 16, 8, 1], [16, 24, 16, 1]]), (len(index), 1, 2, 4))
    flip = np.zeros((len(index), 1), dtype=bool)
    job = turbo.Job(index, np.arange(len(index)), turbo.Cut((view(8),), axes, flip, crops))
    job.run_alone()
    taken = 0
    for row, status in enumerate(job.status.tolist()):
        if status != turbo.DONE:
            continue
        try:
            whole = index.read(row)
        except BadImage as error:
            pytest.fail(f"{index.path(row)} is taken by the core and refused by the host: {error}")
        assert torch.equal(crops[0][0, row], whole[:, 16:24, 8:16].permute(1, 2, 0)), index.path(row)
        taken += 1
    assert taken > 20


def test_files_that_changed_vanished_or_are_no_files(tmp_path):
    index = index_of(tmp_path, [{}] * 4)
    folder = tmp_path / "data" / "class"
    save(folder / "00.jpg", picture(0, 30, 30))
    (folder / "01.jpg").unlink()
    (folder / "02.jpg").unlink()
    (folder / "02.jpg").mkdir()
    status = raw_job(index, [0, 1, 2, 3], [[(0, 8, 0, 1)] * 2])
    assert [s == turbo.DONE for s in status.tolist()] == [False, False, False, True]


def test_a_limit_of_pixels_is_kept(tmp_path):
    index = index_of(tmp_path, [{}])
    small = dataclasses.replace(index, max_pixels=157 * 203 - 1)
    assert raw_job(small, [0], [[(0, 8, 0, 1)] * 2]).tolist() != [turbo.DONE]


def test_a_machine_without_the_core_is_told_what_to_do(tmp_path, monkeypatch):
    from loaders import DataError, turbo_loader

    monkeypatch.setattr(core, "load", lambda: (None, f"the compiled core was not built; {core.HOW_TO_BUILD}"))
    stream = Stream(index_of(tmp_path, [{}]), (view(8),), 0)
    with pytest.raises(DataError, match=r"apt-get install gcc libjpeg62-turbo-dev.*set data.backend=folder"):
        turbo_loader.Options().batches(Order(stream, [[0]], True, 1, torch.device("cpu")))
