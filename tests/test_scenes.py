"""The back end of whole images with boxes, and noise with boxes: canvases, boxes, order."""

import numpy as np
import pytest
import torch

import loaders
from loaders import DataError, Place
from loaders.augment import to_pixels
from loaders.scenes_loader import MISSING, flipped, resized
from loaders.views import View
from tests.images import write_kit
from tests.loading import config, equal, open_eval, open_train, take
from tests.processes import tool

FLIPS = View(size=96, crop="random", flip=0.5)
WHOLE = View(size=96, crop="center", resize=96)


def scenes(kit, split="2007_trainval", **changes):
    options = loaders.load("scenes").Options(short_sides=(64, 80, 96), max_side=128)
    data = f"{kit}#{split}"
    given = {"views": (FLIPS,), "eval_view": WHOLE, "workers": 0, "micro_batch": 2, "options": options, **changes}
    return config("scenes", data, **given)


def noise(**changes):
    options = loaders.load("synthetic").Options(num_images=24, num_val_images=7, side=50, with_boxes=True)
    return config("synthetic", None, **{"views": (FLIPS,), "eval_view": WHOLE, "options": options, **changes})


@pytest.fixture
def data(request, kit):
    return scenes(kit) if request.param == "scenes" else noise()


both = pytest.mark.parametrize("data", ["scenes", "synthetic"], indirect=True)


def index_of(data, split="train"):
    return loaders.open_data(data, split)


def train(data, count, **changes):
    place = Place(changes.pop("rank", 0), changes.pop("world_size", 1))
    return take(loaders.open_train(data, index_of(data), seed=7, place=place, **changes), count)


@both
def test_canvases_and_labels(data):
    index = index_of(data)
    for batch in train(data, 4):
        view, label = batch.views[0], batch.label
        count, _, height, width = view.shape
        assert count == data.micro_batch == len(label) and label.dtype == torch.float32 and label.shape[2] == 6
        assert height % 32 == width % 32 == 0 and view.is_contiguous(memory_format=torch.channels_last)
        true = label[:, 0].tolist()
        assert height - max(row[4] for row in true) < 32 and width - max(row[3] for row in true) < 32
        most = 0
        for image, said, row in zip(view, label, batch.rows.tolist(), strict=True):
            objects = index.objects.of(row)
            most = max(most, len(objects.label))
            w, h = (int(side) for side in said[0, 3:5])
            assert said[0].tolist() == [-1, 0, 0, w, h, 0]
            padding = torch.cat((image[:, h:].flatten(1), image[:, :, w:].flatten(1)), dim=1)
            assert padding.abs().max() < 0.01 if padding.numel() else True
            here = said[1 : 1 + len(objects.label)]
            assert here[:, 0].tolist() == objects.label.tolist() and here[:, 5].tolist() == objects.difficult.tolist()
            assert (here[:, 1:3] >= 0).all() and (here[:, 3] <= w).all() and (here[:, 4] <= h).all()
            scale = torch.tensor([w / index.width[row], h / index.height[row]]).repeat(2)
            areas = ((here[:, 3:5] - here[:, 1:3]) / scale[2:]).prod(dim=1)
            own = (objects.box[:, 2:] - objects.box[:, :2]).prod(axis=1)
            np.testing.assert_allclose(areas, own, rtol=1e-4)
            assert (said[1 + len(objects.label) :] == MISSING).all()
        assert label.shape[1] == 1 + most


def test_scale_and_flip_are_drawn_and_the_ink_stays_in_its_box(kit):
    options = loaders.load("scenes").Options(short_sides=(128, 144, 160), max_side=224)  # as large as they were drawn
    data = scenes(kit, options=options)
    sides, mirrored = set(), 0
    for batch in train(data, 12):
        index = index_of(data)
        for image, said, row in zip(to_pixels(batch.views[0], data.mean, data.std), batch.label, batch.rows.tolist(),
                                    strict=True):  # fmt: skip
            w, h = (int(side) for side in said[0, 3:5])
            sides.add(min(w, h))
            here = said[1:][said[1:, 0] >= 0]
            objects = index.objects.of(row)
            mirrored += abs(here[0, 1] / w - objects.box[0, 0] / index.width[row]) > 0.01
            gray = image[:h, :w].float().mean(dim=2)
            ink, inside = (gray < 48) | (gray > 208), torch.zeros(h, w, dtype=torch.bool)
            for _, x1, y1, x2, y2, difficult in here.tolist():
                inside[max(0, int(y1) - 2) : int(y2) + 3, max(0, int(x1) - 2) : int(x2) + 3] = True
                assert difficult or ink[int(y1) : int(y2) + 1, int(x1) : int(x2) + 1].any()
            assert not (ink & ~inside).any()
    assert len(sides) >= 3 and max(sides) <= 160 and 4 < mirrored < 20


def test_a_flip_mirrors_pixels_and_boxes_within_the_image(kit):
    plain, mirror = (train(scenes(kit, views=(FLIPS.model_copy(update={"flip": share}),)), 3) for share in (0.0, 1.0))
    for one, other in zip(plain, mirror, strict=True):
        assert torch.equal(one.rows, other.rows) and torch.equal(one.label[:, 0], other.label[:, 0])
        for image, turned, said, now in zip(one.views[0], other.views[0], one.label, other.label, strict=True):
            w, h = (int(side) for side in said[0, 3:5])
            assert torch.equal(image[:, :h, :w].flip(2), turned[:, :h, :w])
            chosen = said[:, 0] >= 0
            torch.testing.assert_close(now[chosen, 1], w - said[chosen, 3])
            torch.testing.assert_close(now[chosen, 3], w - said[chosen, 1])
            assert torch.equal(now[:, [0, 2, 4, 5]], said[:, [0, 2, 4, 5]])
    box = np.array([[1.5, 2, 30, 40]])
    assert flipped(box, 50).tolist() == [[20, 2, 48.5, 40]] and np.array_equal(flipped(flipped(box, 50), 50), box)


@pytest.mark.parametrize(
    ("height", "width", "side", "expected"),
    [
        (375, 500, 800, (800, 1067)),
        (500, 375, 480, (640, 480)),
        (300, 1000, 800, (400, 1333)),
        (1, 3000, 480, (1, 1333)),
    ],
)
def test_sizes(height, width, side, expected):
    assert resized(height, width, side, 1333) == expected


@both
def test_an_order_of_the_step_alone_dealt_to_any_number_of_ranks(data):
    index, micro = index_of(data), data.micro_batch
    one = train(data, 2 * 8 // micro)  # two steps
    for step in (one[: 8 // micro], one[8 // micro :]):
        rows = torch.cat([batch.rows for batch in step]).numpy()
        upright = (index.height > index.width)[rows]
        assert sorted(upright.tolist()) == upright.tolist()  # the wider ones first
    dealt = [train(data, 8 // micro, rank=rank, world_size=2) for rank in (0, 1)]
    for number, batch in enumerate(one):
        assert equal(batch, dealt[number % 2][number // 2])
    seen = torch.cat([batch.rows for batch in train(data, 24 // micro)])
    assert sorted(seen.tolist()) == list(range(24))  # an epoch


@both
def test_starts_at_any_step_with_the_same_pixels(data):
    per_step = 8 // data.micro_batch
    whole = train(data, 3 * per_step)
    assert all(equal(a, b) for a, b in zip(train(data, per_step, step=2), whole[2 * per_step :], strict=True))


def test_workers_do_not_change_the_stream(kit):
    one, other = (train(scenes(kit, workers=workers), 3) for workers in (0, 2))
    assert all(equal(a, b) for a, b in zip(one, other, strict=True))


@both
def test_evaluation_has_one_scale_no_flip_and_every_image_once(data):
    index = index_of(data, "val")
    for world_size in (1, 3):
        seen = []
        for rank in range(world_size):
            for batch in loaders.open_eval(data, index, place=Place(rank, world_size)):
                seen += batch.rows.tolist()
                for said, row in zip(batch.label, batch.rows.tolist(), strict=True):
                    w, h = said[0, 3:5].tolist()
                    assert min(w, h) == 96 or max(w, h) == 128
                    back = said[said[:, 0] >= 0, 1:5] * torch.tensor([index.width[row] / w, index.height[row] / h] * 2)
                    np.testing.assert_allclose(back, index.objects.of(row).box, atol=1e-4)
        assert sorted(seen) == list(range(len(index)))


def test_images_without_objects_train_nothing_and_are_evaluated(tmp_path):
    said = {f"{n:06d}": (40, 30, [("cat", (2, 2, 20, 20), False)] * (n % 3)) for n in range(12)}
    data = scenes(write_kit(tmp_path / "kit", said, classes=("cat",)))
    assert (len(index_of(data)), len(index_of(data, "val"))) == (8, 12)
    assert all((batch.label[:, 1, 0] >= 0).all() for batch in train(data, 8))
    empty = loaders.open_eval(data, index_of(data, "val"), rows=[0, 3])
    assert [tuple(batch.label.shape) for batch in empty] == [(2, 1, 6)]


def test_a_bad_image_gives_way_to_its_successor_with_its_boxes(tmp_path):
    said = {f"{n:06d}": (40, 30, [("cat", (2, 2, 3 + n, 20), False)]) for n in range(8)}
    kit = write_kit(tmp_path / "kit", said, classes=("cat",))
    data = scenes(kit)
    index = index_of(data)
    path = kit / "VOC2007/JPEGImages/000003.jpg"
    path.write_bytes(path.read_bytes()[:-400])
    loader = loaders.open_train(data, index, seed=7)
    batches = take(loader, 4)
    assert [name.rsplit("/", 1)[1] for name in loader.bad] == ["000003.jpg"]
    rows = torch.cat([batch.rows for batch in batches]).tolist()
    assert 3 not in rows and len(rows) == 8
    for batch in batches:
        for label, row in zip(batch.label, batch.rows.tolist(), strict=True):
            width = (label[1, 3] - label[1, 1]) * 40 / label[0, 3]
            assert width == pytest.approx(2 + row, abs=1e-4)
    left = list(loaders.open_eval(data, index))
    assert sorted(row for batch in left for row in batch.rows.tolist()) == [0, 1, 2, 4, 5, 6, 7]


def test_noise_has_its_pattern_where_its_box_is():
    for batch in train(noise(), 3):
        for image, said in zip(batch.views[0], batch.label, strict=True):
            x1, y1, x2, y2 = (round(float(place)) for place in said[1, 1:5])
            inside = torch.zeros(96, 96, dtype=torch.bool)
            inside[y1:y2, x1:x2] = True
            gray = image.mean(dim=0)
            assert gray[inside].mean() > gray[~inside].mean() + 0.5


def test_who_stands_in_for_whom(kit, tree):
    of_scenes, of_crops = loaders.why_unusable(scenes(kit)), loaders.why_unusable(config("folder", tree))
    assert of_scenes["scenes"] == "" and of_scenes["folder"] == "gives no boxes" and of_scenes["synthetic"]
    assert of_crops["folder"] == "" and of_crops["scenes"] == "gives boxes"
    assert not loaders.load("scenes").Options.refuses(kit.with_name(f"{kit.name}#2007_test"))
    assert "expected splits of a PASCAL VOC" in loaders.load("scenes").Options.refuses(tree)
    with pytest.raises(
        DataError, match="has no boxes, which data.backend=scenes gives; expected splits of a PASCAL VOC"
    ):
        index_of(config("scenes", tree))
    on_noise = loaders.on_noise(scenes(kit), num_images=16, num_classes=3, side=40)
    assert on_noise.options.gives_boxes and take(open_train(on_noise), 1)[0].label.shape == (2, 2, 6)
    assert len(list(open_eval(on_noise))) > 0


def test_views_of_scenes_are_shown_with_their_boxes():
    pixels = torch.full((1, 64, 64, 3), 90, dtype=torch.uint8)
    label = torch.tensor([[[-1, 0, 0, 60, 60, 0], [1, 8, 8, 40, 50, 0], [0, 20, 44, 56, 60, 1], [-2.0] * 6]])
    drawn = tool("show_views").boxed(pixels.clone(), label, ["one", "two"])[0]
    lime = (drawn == torch.tensor([0, 255, 0], dtype=torch.uint8)).all(dim=2)
    assert lime[8:50, 8].all() and lime[8:50, 40].all() and lime[44:60, 56].all()
    assert torch.equal(drawn[62:], pixels[0, 62:]) and not lime[:6].any()


def test_sides_have_to_fit():
    options = loaders.load("scenes").Options
    assert options().short_sides == (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    for wrong in ({"max_side": 700}, {"short_sides": ()}, {"short_sides": (0,)}):
        with pytest.raises(ValueError, match="max_side: expected at least|short_sides"):
            options(**wrong)
