"""What every back end promises (loaders/contract.py), parity between them, and bad files."""

import itertools
import os
import shutil
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

import loaders
from loaders import DataError, Place, headers
from loaders.views import View
from tests.images import odd_files, picture, write_tree
from tests.loading import BACKENDS, FILES, config, equal, open_eval, open_train, take


@pytest.fixture(autouse=True)
def _is_usable(request):
    backend = getattr(request.node, "callspec", None)
    name = backend.params.get("backend") if backend is not None else None
    if name and (reason := loaders.load(name).Options.missing()):
        pytest.skip(reason)


@pytest.mark.parametrize("backend", BACKENDS)
def test_batches(backend, tree):
    data = config(backend, tree)
    index = loaders.open_data(data, "train")
    batch = take(open_train(data), 1)[0]
    assert [tuple(view.shape) for view in batch.views] == [(4, 3, 24, 24), (4, 3, 16, 16)]
    assert all(view.is_contiguous(memory_format=torch.channels_last) for view in batch.views)
    assert all(view.dtype == torch.float32 for view in batch.views)
    assert batch.label.tolist() == index.label[batch.rows.numpy()].tolist()


@pytest.mark.parametrize("backend", BACKENDS)
def test_never_ends_and_shows_every_image_once_per_epoch(backend, tree):
    batches = take(open_train(config(backend, tree)), 18)  # three epochs of 24 images
    seen = torch.cat([batch.rows for batch in batches])
    for epoch in seen.split(24):
        assert sorted(epoch.tolist()) == list(range(24))


@pytest.mark.parametrize("backend", BACKENDS)
def test_starts_at_any_step_with_the_same_pixels(backend, tree):
    # reliability.md 4
    data = config(backend, tree)
    whole = take(open_train(data), 10)  # five steps of two micro-batches
    for step in (1, 3, 4):
        again = take(open_train(data, step=step), 2)
        assert all(equal(a, b) for a, b in zip(again, whole[2 * step : 2 * step + 2], strict=True))
    assert not equal(whole[0], take(open_train(data, seed=8), 1)[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_ranks_see_the_stream_of_one(backend, tree):
    data = config(backend, tree)
    one = take(open_train(data), 6)
    two = [take(open_train(data, rank=rank, world_size=2), 3) for rank in (0, 1)]
    for number in range(3):
        assert equal(one[2 * number], two[0][number]) and equal(one[2 * number + 1], two[1][number])


@pytest.mark.parametrize("backend", [*FILES, "ffcv"])
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_workers_do_not_change_the_stream(backend, workers, tree):
    reference = take(open_train(config(backend, tree)), 4)
    assert all(
        equal(a, b) for a, b in zip(take(open_train(config(backend, tree, workers=workers)), 4), reference, strict=True)
    )


@pytest.mark.parametrize("backend", ["dali", "folder", "turbo", "ffcv"])
def test_prefetch_does_not_change_the_stream(backend, tree):
    reference = take(open_train(config(backend, tree)), 4)
    for prefetch in (1, 5):
        options = loaders.load(backend).Options(prefetch=prefetch)
        got = take(open_train(config(backend, tree, options=options)), 4)
        assert all(equal(a, b) for a, b in zip(got, reference, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("world_size", [1, 3])
def test_evaluation_is_complete_in_order(backend, world_size, tree):
    data = config(backend, tree)
    seen = [[int(i) for batch in open_eval(data, rank, world_size) for i in batch.rows] for rank in range(world_size)]
    for rank, rows in enumerate(seen):
        assert rows == list(range(len(loaders.open_data(data, "val"))))[rank::world_size]


@pytest.mark.parametrize("backend", [*FILES, "ffcv"])
def test_close_ends_threads_and_processes(backend, tree):
    import multiprocessing

    def open_and_close():
        loader = open_train(config(backend, tree))
        next(loader)
        loader.close()
        assert multiprocessing.active_children() == []
        assert list(loader) == []

    open_and_close()  # what a library keeps for good (pools of its own) is there after the first
    before = len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        open_and_close()
    until = time.monotonic() + 2  # the system may list a thread for a moment after it was joined
    while (after := (len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd")))) > before:
        assert time.monotonic() < until, f"threads and files: {before} before, {after} after"
        time.sleep(0.01)
    assert after[1] <= before[1]


@pytest.mark.parametrize(("backend", "mean", "most"), [("dali", 1.0, 12), ("turbo", 0.05, 4), ("ffcv", 0.05, 4)])
def test_back_ends_cut_the_same_pixels_as_folder(backend, mean, most, tree):
    # Same windows and filter. The flip of a window is a mirrored filter, which rounds elsewhere.
    scale = 255 * 0.225  # from normalized values back to levels
    for one, two in zip(
        [*take(open_train(config("folder", tree)), 12), *open_eval(config("folder", tree))],
        [*take(open_train(config(backend, tree)), 12), *open_eval(config(backend, tree))],
        strict=True,
    ):
        assert torch.equal(one.rows, two.rows)
        for a, b in zip(one.views, two.views, strict=True):
            difference = (a - b).abs() * scale
            assert difference.mean() <= mean
            assert difference.amax() <= most


@pytest.mark.parametrize(("backend", "most"), [("dali", 8), ("turbo", 1), ("ffcv", 1)])
def test_pixels_agree_for_every_jpeg_variant_and_filter(backend, most, tmp_path):
    # Crops as they are handed over, colors out of the way: mean at most 2 of 255, 99.9 % within `most` levels.
    root = tmp_path / "data"
    (root / "class0").mkdir(parents=True)
    variants = [{"subsampling": s, "progressive": p} for s in (0, 1, 2) for p in (False, True)] * 2
    for number, options in enumerate([*variants, {}, {}, {}, {}]):
        image = Image.fromarray(picture(number, 120 + 7 * number, 150))
        image = image.convert("L") if number > 13 else image
        image.save(root / "class0" / f"{number:02d}.jpg", quality=90, **options)
    views = tuple(
        View(size=size, crop="random", scale=(0.2, 1.0), flip=0.5, interpolation=filter)
        for size, filter in ((64, "bilinear"), (64, "bicubic"), (96, "bicubic"))
    )
    one, other = (take(open_train(config(name, root, views=views)), 8) for name in ("folder", backend))
    apart = torch.cat(
        [
            ((x - y).abs() * 255 * torch.tensor(config("folder", root).std)[:, None, None]).flatten()
            for a, b in zip(one, other, strict=True)
            for x, y in zip(a.views, b.views, strict=True)
        ]
    )
    assert apart.mean() <= 2
    assert apart.kthvalue(int(0.999 * len(apart))).values <= most + 0.01


def test_folder_is_torchvision(tree):
    """The torch back end against torchvision's own transforms on PIL images: at most 2 levels apart."""
    from torchvision.transforms import functional as F

    data = config("folder", tree, views=(View.model_validate({"preset": "crop_flip", "size": 24, "flip": 0}),))
    index = loaders.open_data(data, "train")
    from loaders.sampler import Stream

    plan = Stream(index, data.views, 7).plan(range(24))
    batches = take(open_train(data), 6)
    mean, std = torch.tensor(data.mean)[:, None, None], torch.tensor(data.std)[:, None, None]
    crops = torch.cat([batch.views[0] for batch in batches])
    for row, crop in enumerate(crops):
        picture_ = Image.open(index.path(int(plan.image[row]))).convert("RGB")
        top, left, height, width = (int(v) for v in plan.windows[row, 0])
        expected = np.array(F.resized_crop(picture_, top, left, height, width, [24, 24]))
        got = ((crop * std + mean) * 255).round().permute(1, 2, 0).numpy()
        assert np.abs(got - expected).max() <= 2
    for batch in open_eval(data):
        for row, crop in zip(batch.rows.tolist(), batch.views[0], strict=True):
            picture_ = Image.open(index.path(row)).convert("RGB")
            expected = np.array(F.center_crop(F.resize(picture_, 28), [24, 24]))
            got = ((crop * std + mean) * 255).round().permute(1, 2, 0).numpy()
            assert np.abs(got - expected).max() <= 2


@pytest.mark.parametrize("backend", [*FILES, "ffcv"])
def test_the_whole_image_is_a_window_like_any_other(backend, tree):
    whole = View.model_validate({"preset": "whole", "size": 24})
    mirrored = whole.model_copy(update={"flip": 1.0, "interpolation": "bicubic"})
    data = config(backend, tree, views=(mirrored,), eval_view=whole)
    index = loaders.open_data(config("folder", tree), "val")
    mean, std = torch.tensor(data.mean)[:, None, None], torch.tensor(data.std)[:, None, None]
    usual, most = (1.0, 12) if backend == "dali" else (0.25, 4)
    for batch, flips in [*((b, True) for b in take(open_train(data), 6)), *((b, False) for b in open_eval(data))]:
        for row, crop in zip(batch.rows.tolist(), batch.views[0], strict=True):
            filter = Image.Resampling.BICUBIC if flips else Image.Resampling.BILINEAR
            expected = np.array(Image.open(index.path(row)).convert("RGB").resize((24, 24), filter)).astype(int)
            got = ((crop * std + mean) * 255).round().permute(1, 2, 0).numpy()
            apart = np.abs(got - (expected[:, ::-1] if flips else expected))
            assert apart.mean() <= usual and apart.max() <= most, (row, flips)


# ------------------------------------------------------------------------------------------------ bad files


@pytest.fixture(scope="module")
def odd_tree(tmp_path_factory):
    root = write_tree(tmp_path_factory.mktemp("odd"), count=990, classes=3)
    return root, odd_files(root)


@pytest.mark.parametrize("backend", FILES)
def test_a_run_over_a_thousand_images_with_odd_files_finishes(backend, odd_tree):
    root, decodes = odd_tree
    data = config(backend, root, batch_size=64, micro_batch=32)
    index = loaders.open_data(data, "train")
    assert len(index) >= 1000
    loader = open_train(data)
    batches = take(loader, 2 * -(-len(index) // 32))  # two epochs
    assert {f"class0/{path.rsplit('/', 1)[1]}" for path in loader.bad} == {n for n, ok in decodes.items() if not ok}
    assert all(reason for reason in loader.bad.values())
    assert all(len(batch.label) == 32 for batch in batches)
    seen = set(torch.cat([batch.rows for batch in batches]).tolist())
    bad_rows = {row for row in range(len(index)) if index.path(row) in loader.bad}
    assert seen == set(range(len(index))) - bad_rows
    evaluated = torch.cat([batch.rows for batch in open_eval(data)]).tolist()
    assert evaluated == [row for row in range(len(index)) if row not in bad_rows]


@pytest.mark.parametrize("backend", ["dali", "turbo"])
def test_back_ends_replace_the_same_images_by_the_same_successors(backend, odd_tree):
    root, _ = odd_tree
    runs = [take(open_train(config(b, root, batch_size=64, micro_batch=32)), 34) for b in ("folder", backend)]
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a.rows, b.rows) and torch.equal(a.label, b.label)
        assert ((a.views[0] - b.views[0]).abs() * 255 * 0.225).mean() <= 2.0


@pytest.mark.parametrize("backend", FILES)
def test_bad_file_stops_a_run_that_asks_for_it(backend, tmp_path):
    root = write_tree(tmp_path / "data")
    bad = root / "class1" / "0004.jpg"
    bad.write_bytes(bad.read_bytes()[:700])
    loader = open_train(config(backend, root, on_bad_image="stop"))
    with pytest.raises(DataError, match=r"class1/0004\.jpg.*on_bad_image=replace"):
        take(loader, 6)


@pytest.mark.parametrize("backend", FILES)
def test_file_that_vanishes_or_changes_is_replaced(backend, tmp_path):
    root = write_tree(tmp_path / "data")
    data = config(backend, root)
    index = loaders.open_data(data, "train")
    (root / "class0" / "0003.jpg").unlink()
    Image.fromarray(picture(1, 33, 90)).save(root / "class1" / "0004.jpg")
    loader = loaders.open_train(data, index, seed=0)
    take(loader, 6)
    reasons = {path.rsplit("/", 1)[1]: reason for path, reason in loader.bad.items()}
    assert reasons.keys() == {"0003.jpg", "0004.jpg"}
    assert "cannot be read" in reasons["0003.jpg"]
    assert reasons["0004.jpg"].startswith("has changed: ")


@pytest.mark.parametrize("backend", FILES)
def test_nothing_decodable_is_an_error_and_not_an_endless_loop(backend, tmp_path):
    root = write_tree(tmp_path / "data", count=8, classes=2)
    for path in root.glob("*/*.jpg"):
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match="images in a row cannot be decoded") as caught:
        take(open_train(config(backend, root)), 1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("backend", FILES)
@pytest.mark.parametrize("policy", ["stop", "replace"])
def test_evaluation_leaves_bad_images_out_even_a_whole_batch_of_them(backend, policy, tmp_path):
    root = write_tree(tmp_path / "data", count=11, classes=1)
    (root / "class0" / "0010.jpg").write_bytes(b"no image")
    data = config(backend, root, on_bad_image=policy)
    batches = list(open_eval(data))
    assert [len(batch.label) for batch in batches] == [5, 5, 0]


# ------------------------------------------------------------------------------------------------ index


def test_index_is_cached_and_notices_changes(tmp_path, monkeypatch):
    root = write_tree(tmp_path / "data")
    data = config("folder", root)
    first = loaders.open_data(data, "train")
    monkeypatch.setattr(headers, "_read", lambda *a: pytest.fail("not cached"))
    again = loaders.open_data(data, "train")
    assert again.fingerprint == first.fingerprint
    assert np.array_equal(again.width, first.width) and set(again.format) == {b"JPEG"}
    monkeypatch.undo()
    shutil.copy(root / "class0" / "0000.jpg", root / "class1" / "new.jpg")
    changed = loaders.open_data(data, "train")
    assert len(changed) == len(first) + 1 and changed.fingerprint != first.fingerprint


def test_damaged_or_unwritable_cache_is_no_error(tmp_path, monkeypatch):
    root = write_tree(tmp_path / "data")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first = loaders.open_data(config("folder", root), "train")
    for file in (tmp_path / "cache" / "burn-engine").iterdir():
        file.write_bytes(b"damaged")
    assert loaders.open_data(config("folder", root), "train").fingerprint == first.fingerprint
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert loaders.open_data(config("folder", root), "train").fingerprint == first.fingerprint


def test_layout_errors_name_the_folder(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        loaders.open_data(config("folder", tmp_path / "nowhere"), "train")
    (tmp_path / "flat").mkdir()
    with pytest.raises(DataError, match="no images; expected files ending in"):
        loaders.open_data(config("folder", tmp_path / "flat"), "train")
    write_tree(tmp_path / "data")
    (tmp_path / "data" / "hollow").mkdir()
    with pytest.raises(DataError, match=r"hollow: class without images"):
        loaders.open_data(config("folder", tmp_path / "data"), "train", for_labels="k-NN")
    assert len(loaders.open_data(config("folder", tmp_path / "data"), "train")) == 24  # nobody asks


def test_fewer_images_than_a_batch(tree):
    with pytest.raises(DataError, match="24 images are fewer than data.batch_size 32"):
        open_train(config("folder", tree, batch_size=32))


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_image_once_and_equal_steps_for_every_remainder(backend, tree):
    # reliability.md 20: n mod world from 0 to 17 and 1 to 4 ranks; the sampler is tested for all of it.
    index = loaders.open_data(config(backend, tree), "val")
    for world_size, count in ((1, 7), (2, 13), (3, 17), (4, 18)):
        data = config(backend, tree, batch_size=world_size, micro_batch=1)
        rows = list(range(count))
        seen = []
        for rank in range(world_size):
            loader = loaders.open_eval(data, index, rows=rows, place=Place(rank, world_size))
            seen += [int(row) for batch in loader for row in batch.rows]
            loader.close()
        assert sorted(seen) == rows
        steps = [
            take(open_train(data, rank=rank, world_size=world_size), 24 // world_size) for rank in range(world_size)
        ]
        shown = [int(batch.rows) for batches in steps for batch in batches]
        assert len(set(shown)) == len(shown) == 24 // world_size * world_size


@pytest.mark.parametrize("backend", BACKENDS)
def test_multi_crop_of_mixed_sizes(backend, tree):
    # SwAV's 2x224 + 6x96, small: one decode, views of one size behind each other in memory.
    views = [{"preset": "swav_large", "size": 32, "repeat": 2}, {"preset": "swav_small", "size": 14, "repeat": 6}]
    data = config(backend, tree, views=views)
    batches = take(open_train(data), 3)
    assert [view.shape[-1] for view in batches[0].views] == [32] * 2 + [14] * 6
    for batch in batches:
        for a, b in itertools.pairwise(batch.views):
            if a.shape == b.shape:
                assert b.data_ptr() == a.data_ptr() + a.numel() * a.element_size()
                assert not torch.equal(a, b)
    if backend != "synthetic":
        for one, other in zip(take(open_train(config("folder", tree, views=views)), 3), batches, strict=True):
            assert torch.equal(one.rows, other.rows)
            for a, b in zip(one.views, other.views, strict=True):
                assert ((a - b).abs() * 255 * 0.225).mean() <= 1.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_that_is_kept_is_never_overwritten(backend, tree):
    loader = open_train(config(backend, tree))
    kept = next(loader)
    copies = [view.clone() for view in kept.views]
    take(loader, 12)
    assert all(torch.equal(a, b) for a, b in zip(kept.views, copies, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("backend", [*FILES, "ffcv"])
def test_memory_is_flat_over_epochs(backend, tree):
    # reliability.md 35: less than 1 MB in 100 steps once everything has been seen.
    loader = open_train(config(backend, tree, workers=1))

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    for _ in range(300):
        next(loader)
    files, threads, before = len(os.listdir("/proc/self/fd")), threading.active_count(), resident()
    for _ in range(1700):
        next(loader)
    growth = (resident() - before) / 17
    assert len(os.listdir("/proc/self/fd")) <= files + 2 and threading.active_count() <= threads
    loader.close()
    assert growth < 1e6, f"{growth / 1e6:.2f} MB in 100 steps"


@pytest.mark.parametrize("backend", [*FILES, "ffcv"])
def test_statistics_of_an_epoch_are_those_of_folder(backend, tree):
    # Over one epoch of real crops: channel means and deviations of the normalized views.
    one, other = (torch.cat([b.views[0] for b in take(open_train(config(n, tree)), 6)]) for n in ("folder", backend))
    assert (one.mean(dim=(0, 2, 3)) - other.mean(dim=(0, 2, 3))).abs().max() < 5e-3
    assert (one.std(dim=(0, 2, 3)) / other.std(dim=(0, 2, 3)) - 1).abs().max() < 5e-3


def test_missing_dali_names_the_package(tree, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(DataError, match=r"pip install nvidia-dali-cuda120"):
        open_train(config("dali", tree))
