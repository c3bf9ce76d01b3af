"""All that the loaders draw: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

A draw has an address, not a history: its counter is (block of draws, image, view, epoch), its key the seed. So nothing
here keeps a state, and no draw depends on a library's version.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from loaders.errors import DataError

IMAGES, EPOCHS = 2**48, 2**32
"""What a counter has room for."""


def philox(counter: NDArray[np.uint32], key: tuple[int, int]) -> NDArray[np.uint32]:
    """Philox4x32 with 10 rounds: counters [..., 4] to random words [..., 4]."""
    c0, c1, c2, c3 = (counter[..., i].astype(np.uint64) for i in range(4))
    k0, k1 = np.uint64(key[0] & 0xFFFFFFFF), np.uint64(key[1] & 0xFFFFFFFF)
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    for _ in range(10):
        product0, product1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (
            (product1 >> shift) ^ c1 ^ k0,
            product1 & low,
            (product0 >> shift) ^ c3 ^ k1,
            product0 & low,
        )
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
    return np.stack((c0, c1, c2, c3), axis=-1).astype(np.uint32)


def words(
    image: NDArray[np.int64], view: NDArray[np.int64], epoch: NDArray[np.int64], draws: int, seed: int
) -> NDArray[np.uint32]:
    """Random words keyed by image, view and epoch (broadcast together): [..., draws].

    Raises:
        DataError: an image or epoch that the counter has no room for.
    """
    if image.max(initial=0) >= IMAGES or epoch.max(initial=0) >= EPOCHS:
        raise DataError(
            f"image {image.max()} of epoch {epoch.max()}: expected fewer than 2^48 images and 2^32 epochs, "
            "as many as there are random numbers for"
        )
    blocks = np.arange(-(-draws // 4))
    image, view, epoch, block = np.broadcast_arrays(image[..., None], view[..., None], epoch[..., None], blocks)
    # The upper bits of an image's number share a word with the block, which is small.
    counter = np.stack((block + ((image >> 32) << 16), image & 0xFFFFFFFF, view, epoch), axis=-1).astype(np.uint32)
    drawn = philox(counter, (seed & 0xFFFFFFFF, seed >> 32))
    return drawn.reshape(*drawn.shape[:-2], -1)[..., :draws]


def uniform(
    image: NDArray[np.int64], view: NDArray[np.int64], epoch: NDArray[np.int64], draws: int, seed: int
) -> NDArray[np.float64]:
    """`words` as numbers in (0, 1)."""
    return (words(image, view, epoch, draws, seed).astype(np.float64) + 0.5) / 2.0**32
