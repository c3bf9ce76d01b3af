"""The stream: known answers of Philox, torchvision's crop distribution, epochs, ranks and resumption."""

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop

from loaders.philox import philox
from loaders.sampler import (
    BRIGHTNESS,
    GRAY,
    HUE,
    ORDER,
    SIGMA,
    SOLARIZE,
    EvalPositions,
    Stream,
    TrainPositions,
)
from loaders.synthetic_loader import noise
from loaders.views import View

BURN = View.model_validate({"preset": "burn"})


def test_philox_known_answers():
    # Random123's kat_vectors for philox4x32-10.
    def words(counter, key):
        return [hex(word) for word in philox(np.array(counter, dtype=np.uint32), key)]

    ones = 0xFFFFFFFF
    assert words([0] * 4, (0, 0)) == ["0x6627e8d5", "0xe169c58d", "0xbc57ac4c", "0x9b00dbd8"]
    assert words([ones] * 4, (ones, ones)) == ["0x408f276d", "0x41c83b0e", "0xa20bc7c6", "0x6d5451fd"]
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    assert words(pi, (0xA4093822, 0x299F31D0)) == ["0xd16cfe09", "0x94fdcceb", "0x5001e420", "0x24126ea1"]


def stream(count=40, views=(BURN, BURN), seed=3, side=64):
    return Stream(noise(count, 4, side), views, seed)


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_every_image_once_per_epoch_and_another_order_in_the_next():
    s = stream()
    epochs = [s.images(range(40 * e, 40 * e + 40))[1] for e in range(3)]
    assert all(sorted(epoch) == list(range(40)) for epoch in epochs)
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(epochs[0], stream(seed=4).images(range(40))[1])


def test_plan_is_a_function_of_seed_and_position_alone():
    together = stream().plan(range(30, 50))  # over the end of an epoch
    for place, position in enumerate(range(30, 50)):
        alone = stream().plan([position])
        assert same([part[place : place + 1] for part in together], alone)
    assert not np.array_equal(together.windows, stream(seed=4).plan(range(30, 50)).windows)


def test_views_and_epochs_draw_differently():
    s = stream()
    plan = s.plan(range(80))
    assert not np.array_equal(plan.windows[:, 0], plan.windows[:, 1])
    order = np.argsort(plan.image[:40]), np.argsort(plan.image[40:])
    assert not np.array_equal(plan.windows[:40][order[0]], plan.windows[40:][order[1]])


def test_fixed_views_come_again_and_again():
    free, fixed = stream(), Stream(noise(40, 4, 64), (BURN, BURN), 3, fixed_views=3)
    by_epoch = []
    for epoch in range(7):
        plan, drawn = (s.plan(range(40 * epoch, 40 * epoch + 40)) for s in (fixed, free))
        assert np.array_equal(plan.image, drawn.image)  # the order changes all the same
        if epoch < 3:
            assert same(plan, drawn)
        by_image = np.argsort(plan.image)
        by_epoch.append([part[by_image] for part in plan])
        assert same(by_epoch[epoch], by_epoch[epoch % 3])
    assert not np.array_equal(by_epoch[0][1], by_epoch[1][1])
    for number in range(3):  # and can be asked for by image
        assert same(fixed.plan_of(np.arange(40), number), by_epoch[number])
        assert same(fixed.plan_of(np.array([7, 2]), number), [part[[7, 2]] for part in by_epoch[number]])
    mixed = fixed.plan_of(np.array([4, 4]), np.array([2, 0]))
    assert same(mixed, [np.stack((by_epoch[2][n][4], by_epoch[0][n][4])) for n in range(len(mixed))])


def test_crops_have_torchvisions_distribution():
    index = noise(4000, 4, 1)
    index.width[:], index.height[:] = 500, 375
    windows = Stream(index, (BURN,), 0).plan(range(4000)).windows[:, 0]
    top, left, height, width = windows.T
    assert (top >= 0).all() and (left >= 0).all() and (top + height <= 375).all() and (left + width <= 500).all()
    assert (windows == np.floor(windows)).all()
    torch.manual_seed(0)
    picture = torch.empty(3, 375, 500)
    theirs = np.array([RandomResizedCrop.get_params(picture, (0.08, 1), (3 / 4, 4 / 3)) for _ in range(4000)]).T
    for ours, reference in zip(
        (top, left, height, width, height * width), (*theirs, theirs[2] * theirs[3]), strict=True
    ):
        grid = np.sort(np.concatenate((ours, reference)))
        distance = (
            np.abs(
                np.searchsorted(np.sort(ours), grid, "right") - np.searchsorted(np.sort(reference), grid, "right")
            ).max()
            / 4000
        )
        assert distance < 1.95 * np.sqrt(2 / 4000)  # Kolmogorov-Smirnov at p = 0.001


def test_impossible_crops_fall_back_to_the_largest_center_crop():
    index = noise(2, 2, 1)
    index.width[:], index.height[:] = [1000, 1], [10, 1000]
    windows = Stream(index, (BURN,), 0, shuffled=False).plan([0, 1]).windows[:, 0]
    assert windows.tolist() == [[0, 493, 10, 13], [499, 0, 1, 1]]


def test_center_crop_window_is_torchvisions():
    view = View.model_validate({"preset": "validation"})
    index = noise(1, 2, 1)
    index.width[:], index.height[:] = 500, 375
    top, left, height, width = Stream(index, (view,), 0, shuffled=False).plan([0]).windows[0, 0]
    # Resize(256) makes 341 x 256; CenterCrop(224) takes left round(58.5) = 58 and top 16.
    assert np.allclose([top * 256 / 375, left * 341 / 500, height * 256 / 375, width * 341 / 500], [16, 58, 224, 224])


def test_color_probabilities_and_ranges():
    plan = stream(3000).plan(range(3000))
    color = plan.color[:, 0]
    jittered = color[:, BRIGHTNESS] != 1
    for share, wanted in (
        (plan.flip[:, 0].mean(), 0.5),
        (jittered.mean(), 0.6),
        (color[:, GRAY].mean(), 0.2),
        ((color[:, SIGMA] > 0).mean(), 0.2),
    ):
        assert abs(share - wanted) < 4 * np.sqrt(0.25 / 3000)
    assert color[jittered, BRIGHTNESS].min() >= 0.6 and color[jittered, BRIGHTNESS].max() <= 1.4
    assert np.abs(color[:, HUE]).max() <= 0.1 and (color[~jittered][:, HUE] == 0).all()
    assert set(color[:, ORDER]) == set(range(24))
    blurred = color[:, SIGMA][color[:, SIGMA] > 0]
    assert blurred.min() >= 0.1 and blurred.max() <= 2.0


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_the_images_of_a_step(world_size):
    def step(number, rank):
        positions = TrainPositions(batch_size=16, micro_batch=4, rank=rank, world_size=world_size, step=number)
        micro_steps = 16 // (4 * world_size)
        chunks = iter(positions)
        return [next(chunks) for _ in range(micro_steps)]

    for number in (0, 5):
        taken = sorted(p for rank in range(world_size) for chunk in step(number, rank) for p in chunk)
        assert taken == list(range(16 * number, 16 * number + 16))


def test_start_at_any_step_continues_the_stream():
    def first(step, count):
        chunks = iter(TrainPositions(batch_size=8, micro_batch=4, rank=1, world_size=2, step=step))
        return [next(chunks) for _ in range(count)]

    whole = first(0, 20)
    assert all(first(step, 3) == whole[step : step + 3] for step in range(17))


@pytest.mark.parametrize("count", range(1, 18))
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_evaluation_is_complete_without_repeats(count, world_size):
    # reliability.md 20
    seen = [
        position
        for rank in range(world_size)
        for chunk in EvalPositions(range(count), batch_size=3, rank=rank, world_size=world_size)
        for position in chunk
    ]
    assert sorted(seen) == list(range(count))


@pytest.mark.parametrize("count", range(8, 26))
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_training_has_equal_steps_on_every_rank_whatever_the_count(count, world_size):
    # reliability.md 20: the stream never ends, so ranks cannot disagree; three epochs give every image three times.
    s = stream(count)
    steps = 3 * count  # of 8 images: eight times three epochs
    chunks = [
        iter(TrainPositions(batch_size=8, micro_batch=8 // world_size, rank=rank, world_size=world_size, step=0))
        for rank in range(world_size)
    ]
    seen = np.concatenate([s.images(next(chunk))[1] for _ in range(steps) for chunk in chunks])
    assert np.bincount(seen, minlength=count).tolist() == [24] * count


def test_ratio_and_solarize_threshold_are_those_of_the_view():
    view = View(size=8, crop="random", ratio=(1.0, 1.0), solarize=1.0, solarize_threshold=0.3)
    plan = stream(200, views=(view,)).plan(range(200))
    assert (plan.windows[..., 2] == plan.windows[..., 3]).all()
    assert np.allclose(plan.color[..., SOLARIZE], 0.3)
    wide = stream(200, views=(view.model_copy(update={"ratio": (2.0, 2.0)}),)).plan(range(200)).windows
    assert (np.abs(wide[..., 3] - 2 * wide[..., 2]) <= 1.5).all()


def test_what_a_window_sees():
    # A random crop is a picture of its own; a center crop sees two output pixels around it, and two source pixels more.
    index = noise(1, 2, 1)
    index.width[:], index.height[:] = 400, 200
    center = View(size=64, crop="center", resize=80)
    plan = Stream(index, (BURN, center), 0, shuffled=False).plan([0])
    top, left, height, width = plan.windows[0, 0]
    assert plan.sees[0, 0].tolist() == [top, left, top + height, left + width]
    # Resized to 160 x 80, scale 2.5: rows 20 to 180 and columns 120 to 280, and 2 · 2.5 + 2 = 7 pixels around them.
    assert plan.windows[0, 1].tolist() == [20, 120, 160, 160] and plan.sees[0, 1].tolist() == [13, 113, 187, 287]
