"""The order of an epoch: a bijection for every size, without memory, and random enough by chi-square."""

import dataclasses
import tracemalloc

import numpy as np
import pytest

from loaders.errors import DataError
from loaders.index import Pieces
from loaders.order import ROUNDS, RUN, Blocks, Sorted, block_starts, permuted
from loaders.philox import uniform, words
from loaders.sampler import Stream
from loaders.synthetic_loader import noise
from loaders.views import View

LARGE = [2**20 + 1, 14_200_000, 400_000_000, 2**32 - 1, 2**32 + 1, 5_000_000_000, 2**40 - 87, 2**47 + 5]
VIEW = View(size=8, crop="random")


def at(places, size, epoch=0, seed=0):
    return permuted(np.asarray(places), np.asarray(size), np.asarray(epoch), seed)


# ------------------------------------------------------------------------------------------------ a bijection


def test_every_row_once_for_every_size_up_to_4096():
    for first in range(1, 4097, 64):
        sizes = np.arange(first, first + 64)
        starts = np.cumsum(sizes) - sizes
        size, start = np.repeat(sizes, sizes), np.repeat(starts, sizes)
        image = permuted(np.arange(sizes.sum()) - start, size, size % 5, first)  # 64 sizes in one call
        assert (image >= 0).all() and (image < size).all()
        assert (np.bincount(image + start) == 1).all()


def test_every_row_once_in_a_large_set():
    assert (np.bincount(at(np.arange(1_000_003), 1_000_003)) == 1).all()


def by_hand(place, size, epoch, seed):
    """The row at a place in Python's whole numbers, which do not overflow, and the place of that row, backwards."""
    full = 2**64 - 1
    columns = max(8, next(c for c in range(int(size**0.5) - 1, size + 2) if c * c >= size))
    rows = max(8, -(-size // columns))
    drawn = words(np.asarray(0), np.asarray(0xFFFFFFFE), np.asarray(epoch), 2 * ROUNDS, seed).tolist()
    keys = [high << 32 | low for high, low in zip(drawn[::2], drawn[1::2], strict=True)]

    def mixed(x):
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & full
        x = (x ^ x >> 27) * 0x94D049BB133111EB & full
        return (x ^ x >> 31) >> 1

    def forwards(number):
        x, y = divmod(number, columns)
        for turn in range(ROUNDS):
            if turn % 2 == 0:
                x = (x + mixed(y + keys[turn] & full)) % rows
            else:
                y = (y + mixed(x + keys[turn] & full)) % columns
        return x * columns + y

    def backwards(number):
        x, y = divmod(number, columns)
        for turn in reversed(range(ROUNDS)):
            if turn % 2 == 0:
                x = (x - mixed(y + keys[turn] & full)) % rows
            else:
                y = (y - mixed(x + keys[turn] & full)) % columns
        return x * columns + y

    image = forwards(place)
    while image >= size:
        image = forwards(image)
    back = backwards(image)
    while back >= size:
        back = backwards(back)
    return image, back


@pytest.mark.parametrize("size", [2, 3, 37, 4097, *LARGE])
def test_the_network_can_be_run_backwards_at_any_size(size):
    rng = np.random.default_rng(size)
    places = [0, size - 1, *rng.integers(0, size, 60).tolist()]
    images = at(places, size, epoch=3, seed=2**63 + 1).tolist()
    for place, image in zip(places, images, strict=True):
        assert by_hand(place, size, 3, 2**63 + 1) == (image, place)


@pytest.mark.parametrize("size", LARGE)
def test_neighboring_places_of_a_large_set_have_rows_all_over_it(size):
    image = at(np.arange(size // 3, size // 3 + 100_000), size)
    assert image.min() >= 0 and image.max() < size and len(np.unique(image)) == 100_000
    assert_uniform(np.bincount(image * 256 // size, minlength=256))


def test_known_answers():
    assert at(np.arange(12), 12, 0, 3).tolist() == [0, 5, 8, 9, 11, 4, 7, 3, 10, 2, 6, 1]
    assert at(np.arange(12), 12, 1, 3).tolist() == [11, 6, 1, 4, 0, 5, 8, 10, 9, 3, 7, 2]
    assert at([0, 1, 640583, 1281166], 1_281_167).tolist() == [604641, 703916, 1102591, 454665]
    assert at([0, 1, 2_500_000_000, 4_999_999_999], 5_000_000_000, 299, 2**64 - 1).tolist() == [
        3625285365, 960645924, 2532438261, 3264132763,
    ]  # fmt: skip


def test_version_1_is_the_order_that_it_was():
    # Computed with the engine before version 2.
    order = Sorted(12, 3)
    ones = np.ones(12, dtype=np.int64)
    assert order(ones, np.arange(12)).tolist() == [10, 2, 5, 8, 6, 7, 11, 1, 0, 9, 4, 3]
    assert sorted(order(5 * ones, np.arange(12)).tolist()) == list(range(12))


# ------------------------------------------------------------------------------------------------ random enough


def assert_uniform(counts, *, constraints=1):
    """Chi-square of equally likely cells at p = 0.001, by the approximation of Wilson and Hilferty."""
    counts = np.asarray(counts, dtype=np.float64)
    freedom, expected = counts.size - constraints, counts.sum() / counts.size
    assert expected >= 5
    critical = freedom * (1 - 2 / (9 * freedom) + 3.0902 * np.sqrt(2 / (9 * freedom))) ** 3
    assert ((counts - expected) ** 2 / expected).sum() < critical


def pairs(a, b, size):
    return np.bincount(a.ravel() * size + b.ravel(), minlength=size * size).reshape(size, size)


@pytest.mark.parametrize("size", [3, 5, 13, 16, 17, 24])
def test_small_sets_are_uniform_over_seeds_and_epochs(size):
    # 64 seeds times 512 epochs.
    places, epochs = np.tile(np.arange(size), 512), np.repeat(np.arange(512), size)
    image = np.stack([at(places, size, epochs, seed).reshape(512, size) for seed in range(64)])  # [seed, epoch, place]
    everywhere = np.broadcast_to(np.arange(size), image.shape)
    assert_uniform(pairs(everywhere, image, size), constraints=2 * size - 1)  # row against place
    apart = ~np.eye(size, dtype=bool)
    for distance in (1, 2):
        assert_uniform(pairs(image[..., 0], image[..., distance], size)[apart])  # neighbors in an epoch
        steps = (image[..., distance] - image[..., 0]) % size
        assert_uniform(np.bincount(steps.ravel(), minlength=size)[1:])
    assert_uniform(pairs(image[:, :-1:2, 0], image[:, 1::2, 0], size))  # a place in consecutive epochs
    assert_uniform(pairs(image[:-1:2, :, 1], image[1::2, :, 1], size))  # and of consecutive seeds


@pytest.mark.parametrize("size", [1_281_167, 2**32 + 1])
def test_large_sets_are_uniform(size):
    def cells(values):
        return values * 16 // size

    places = np.arange(40_000) * (size // 40_000)
    for seed in range(4):
        one, next_place, next_epoch = (
            at(places, size, 0, seed),
            at(places + 1, size, 0, seed),
            at(places, size, 1, seed),
        )
        for a, b in ((places, one), (one, next_place), (one, next_epoch), (one, at(places, size, 0, seed + 1))):
            assert_uniform(pairs(cells(a), cells(b), 16))
        assert_uniform(np.bincount((next_place - one) % size * 64 // size, minlength=64))
        assert_uniform(np.bincount(one % 64, minlength=64))


# ------------------------------------------------------------------------------------------------ blocks

LENGTHS = [7, 1, 12, 5, 9, 3, 20, 8, 2, 6, 11]  # of shards


def in_shards(lengths=LENGTHS):
    """A data set in shards of these lengths."""
    file = np.repeat(np.arange(len(lengths)), lengths).astype(np.int32)
    index = noise(len(file), 4, 8)
    offset = np.arange(len(file), dtype=np.int64)
    return dataclasses.replace(index, pieces=Pieces([b"%d.tar" % n for n in range(len(lengths))], file, offset, offset))


def test_blocks_are_shards_or_runs_of_rows():
    assert block_starts(in_shards([3, 1, 4])).tolist() == [0, 3, 4]
    mixed = in_shards([3, 1, 4])
    mixed.pieces.file[:] = [0, 0, 1, 1, 0, 2, 2, 0]  # a shard in three runs
    assert block_starts(mixed).tolist() == [0, 2, 4, 5, 7]
    assert block_starts(noise(2 * RUN + 1, 4, 8)).tolist() == [0, RUN, 2 * RUN]
    assert block_starts(in_shards([2 * RUN])).tolist() == [0, RUN]  # one file, such as a .beton
    large = (1 << 20) + 5
    assert block_starts(in_shards([large - 5, 3, 2])).tolist() == [0, large - 5, large - 2]  # read in parts


@pytest.mark.parametrize("window", [1, 3, 4, 11, 50])
def test_blocks_give_every_image_once_per_epoch_within_its_window(window):
    index, count = in_shards(), len(LENGTHS)
    size = len(index)
    stream = Stream(index, (VIEW,), 5, window=window)
    assert isinstance(stream.order, Blocks) and stream.order.windows == -(-count // window)
    orders = []
    for epoch in range(6):
        image = stream.images(np.arange(epoch * size, (epoch + 1) * size))[1]
        assert sorted(image.tolist()) == list(range(size))
        shard = index.pieces.file[image]
        start = 0
        for number in range(stream.order.windows):
            rows = stream.order.rows(epoch, number)
            of_window = [row for block in rows for row in block]
            end = start + len(of_window)
            assert len(rows) == min(window, count - number * window)
            assert sorted(image[start:end].tolist()) == sorted(of_window)
            assert len(set(shard[start:end].tolist())) == len(rows)
            assert {stream.order.window_of(epoch, place) for place in range(start, end)} == {number}
            start = end
        assert start == size
        orders.append(image.tolist())
    assert len({tuple(order) for order in orders}) == 6
    firsts = {tuple(stream.order.rows(epoch, 0)) for epoch in range(6)}
    assert len(firsts) > 1 or window >= count  # other shards together


def test_blocks_are_a_function_of_seed_and_position_alone():
    stream = Stream(in_shards(), (VIEW,), 5, window=3)
    _, image = stream.images(np.arange(1000))
    for chunk in np.split(np.random.default_rng(0).permutation(1000), [1, 7, 300]):
        assert np.array_equal(Stream(in_shards(), (VIEW,), 5, window=3).images(chunk)[1], image[chunk])
    assert not np.array_equal(Stream(in_shards(), (VIEW,), 6, window=3).images(np.arange(1000))[1], image)
    assert not np.array_equal(Stream(in_shards(), (VIEW,), 5, window=4).images(np.arange(1000))[1], image)


def test_a_batch_touches_the_shards_of_one_window_or_of_two():
    index = in_shards([16] * 32)
    stream = Stream(index, (VIEW,), 5, window=4)
    for start in range(0, 3 * len(index), 16):
        touched = len(set(index.pieces.file[stream.images(np.arange(start, start + 16))[1]].tolist()))
        assert touched <= 4
    straddles = stream.images(np.arange(56, 72))[1]  # 64 images in a window
    assert 4 < len(set(index.pieces.file[straddles].tolist())) <= 8


def test_blocks_and_their_images_are_uniform():
    # 16 shards of 8 images in windows of 8, over 8 seeds and 64 epochs.
    index = in_shards([8] * 16)
    streams = [Stream(index, (), seed, window=8) for seed in range(8)]
    image = np.stack([stream.images(np.arange(128 * 64))[1].reshape(64, 128) for stream in streams])
    shard, number = image // 8, image % 8
    for place in (0, 64, 127):
        assert_uniform(np.bincount(shard[..., place].ravel()))
        assert_uniform(np.bincount(number[..., place].ravel()))
        assert_uniform(pairs(shard[:, :-1:2, place] // 4, shard[:, 1::2, place] // 4, 4))  # of consecutive epochs
    # Of two neighbors in a window, 7 of 63 are of one shard.
    share = (shard[..., 0] == shard[..., 1]).mean()
    assert abs(share - 1 / 9) < 4 * np.sqrt(1 / 9 * 8 / 9 / (8 * 64))


# ------------------------------------------------------------------------------------------------ of any size


def test_any_batch_gives_the_same_row_at_a_position():
    stream = Stream(noise(100, 4, 8), (VIEW,), 5)
    positions = np.random.default_rng(0).permutation(1000)  # ten epochs, mixed
    epoch, image = stream.images(np.arange(1000))
    for chunk in np.split(positions, [1, 7, 300]):
        assert np.array_equal(stream.images(chunk), (epoch[chunk], image[chunk]))


def of_size(size):
    """A data set of that many images whose columns take no memory."""
    side = np.broadcast_to(np.int32(64), size)
    return dataclasses.replace(noise(1, 1, 64), label=np.broadcast_to(np.int64(0), size), width=side, height=side)


@pytest.mark.parametrize("size", [14_000_000, 400_000_000, 5_000_000_000])
def test_a_plan_takes_no_memory_that_grows_with_the_data_set(size):
    stream = Stream(of_size(size), (VIEW, VIEW), 1)
    stream.plan([0])  # what NumPy keeps
    tracemalloc.start()
    try:
        plan = stream.plan(range(7 * size - 128, 7 * size + 128))  # over the end of an epoch
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20  # a byte for each image would be more
    assert len(np.unique(plan.image)) == 256 and plan.image.max() > size // 2


def test_draws_beyond_32_bits():
    # Computed with the engine before, for images below 2^32.
    low = np.array([5, 2**32 - 1])
    assert uniform(low, np.array(1), np.array(7), 3, 9).tolist() == [
        [0.6227569855982438, 0.19755227712448686, 0.8024602505611256],
        [0.09325551602523774, 0.750237901112996, 0.5661602456821129],
    ]
    image = np.array([5, 5 + 2**32, 5 + 2**33, 5 + 2**47])
    drawn = uniform(image, np.array(1), np.array(7), 24, 9)
    assert len(np.unique(drawn)) == drawn.size
    for image, epoch in ((2**48, 0), (0, 2**32)):
        with pytest.raises(DataError, match=r"expected fewer than 2\^48 images and 2\^32 epochs"):
            uniform(np.array([image]), np.array(1), np.array(epoch), 3, 9)
