"""Images decoded and cut one by one on the host: what the `folder` back end does, and what every other back end falls
back to for an image that it cannot handle itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import default_collate
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from loaders.contract import CropMemory, HostBatch
from loaders.decode import decode, read_header
from loaders.errors import BadImage, DataError
from loaders.sampler import NUM_COLOR, Plan, Stream, resized_sides
from loaders.views import View

MODES = {"bilinear": InterpolationMode.BILINEAR, "bicubic": InterpolationMode.BICUBIC}
_MOST_RESIZED = 1 << 24  # pixels
MAX_SUCCESSORS = 100
"""Images in a row that may be bad before a run ends."""


class Sample(NamedTuple):
    """One image of a batch."""

    image: int  # row of the index
    color: NDArray[np.float32]  # [V, NUM_COLOR]
    crops: list[Tensor]  # V x uint8 [size, size, 3]


class Decoded(NamedTuple):
    """An image, and where what was drawn for it stands: after a bad one in the plan of its successor."""

    plan: Plan
    row: int
    pixels: Tensor  # uint8 [3, H, W]

    @property
    def image(self) -> int:
        """Row of the index."""
        return int(self.plan.image[self.row])


class Row(NamedTuple):
    """What became of one row of a plan."""

    sample: Sample | None  # None where it is left out
    bad: list[tuple[str, str]]  # (path, reason) of what could not be decoded


def load_batch(stream: Stream, positions: Sequence[int], *, replace: bool) -> HostBatch:
    """Read, decode and crop the images at `positions`.

    Args:
        replace: see `contract.Order`. Either way a bad image is listed in `HostBatch.bad`.

    Raises:
        DataError: `MAX_SUCCESSORS` images in a row cannot be decoded.
    """
    plan = stream.plan(positions)
    return gather(stream, [load_row(stream, plan, row, p, replace=replace) for row, p in enumerate(positions)])


def gather(stream: Stream, rows: list[Row]) -> HostBatch:
    """The batch of images that were done one by one; in a worker it is stacked right in shared memory."""
    samples = [row.sample for row in rows if row.sample]
    bad = [found for row in rows for found in row.bad]
    if samples:
        crops = [
            default_collate([sample.crops[view] for view in group for sample in samples]).unflatten(0, (len(group), -1))
            for group in stream.groups
        ]
    else:
        crops = CropMemory(stream).crops(0)
    image = np.array([sample.image for sample in samples], dtype=np.int64)
    color = np.array([sample.color for sample in samples], dtype=np.float32)
    return HostBatch.of(stream, image, color.reshape(len(samples), len(stream.views), NUM_COLOR), crops, bad)


def load_row(stream: Stream, plan: Plan, row: int, position: int, *, replace: bool) -> Row:
    """The crops of one row of a plan, see `decode_row`."""
    decoded, bad = decode_row(stream, plan, row, position, replace=replace)
    if decoded is None:
        return Row(None, bad)
    return Row(Sample(decoded.image, decoded.plan.color[decoded.row], list(_cuts(stream, decoded))), bad)


def decode_row(
    stream: Stream, plan: Plan, row: int, position: int, *, replace: bool
) -> tuple[Decoded | None, list[tuple[str, str]]]:
    """The image of one row of a plan; with `replace` the successors of one that cannot be decoded are tried.

    Returns:
        The image, None where it is left out, and (path, reason) of what could not be decoded.

    Raises:
        DataError: `MAX_SUCCESSORS` images in a row cannot be decoded.
    """
    bad: list[tuple[str, str]] = []
    for successor in range(MAX_SUCCESSORS):
        if successor:
            plan, row = stream.plan([position + successor]), 0
        image = int(plan.image[row])
        try:
            pixels = stream.index.read(image)
        except BadImage as error:
            bad.append((stream.index.path(image), str(error)))
            if not replace:
                return None, bad
            continue
        return Decoded(plan, row, pixels), bad
    raise DataError(f"{MAX_SUCCESSORS} images in a row cannot be decoded, the last is {bad[-1][0]}: {bad[-1][1]}")


def _cuts(stream: Stream, decoded: Decoded) -> Iterator[Tensor]:
    plan, row = decoded.plan, decoded.row
    for view, window, flips in zip(stream.views, plan.windows[row], plan.flip[row].tolist(), strict=True):
        crop = cut(decoded.pixels, window, view)
        yield crop.flip(1) if flips else crop


def cut(pixels: Tensor, window: NDArray[np.float64], view: View) -> Tensor:
    """Crop and resize with antialiasing: uint8 [3, H, W] to uint8 [size, size, 3], as torchvision does it."""
    mode = MODES[view.interpolation]
    if view.crop == "center":
        height, width = pixels.shape[1:]
        new_w, new_h = (int(side) for side in resized_sides(view, np.array(float(width)), np.array(float(height))))
        if new_w * new_h > _MOST_RESIZED:
            return _middle(pixels, new_h, new_w, view)
        pixels = F.resize(pixels, [new_h, new_w], interpolation=mode, antialias=True)
        crop = F.center_crop(pixels, [view.size, view.size])
    else:
        top, left, height, width = (int(side) for side in window)
        crop = F.resized_crop(
            pixels, top, left, height, width, [view.size, view.size], interpolation=mode, antialias=True
        )
    return crop.permute(1, 2, 0)


def read_picture(path: Path, view: View) -> Tensor:
    """A file as evaluations see it, uint8 [size, size, 3].

    Args:
        view: a center crop.

    Raises:
        DataError: it cannot be decoded.
        OSError: it cannot be read.
    """
    content = path.read_bytes()
    header = read_header(BytesIO(content))
    try:
        if header.problem:
            raise BadImage(header.problem)
        return cut(decode(content, header.width, header.height), np.zeros(4), view)
    except BadImage as error:
        raise DataError(f"{path}: {error}") from None


def _middle(pixels: Tensor, new_h: int, new_w: int, view: View) -> Tensor:
    """Resize and center crop of a picture so long and thin that all of it, resized, would take gigabytes: only what the
    crop sees is resized. Its place is exact to half a pixel."""
    if new_h > new_w:
        return _middle(pixels.transpose(1, 2), new_w, new_h, view).transpose(0, 1)
    width, factor = pixels.shape[2], new_w / pixels.shape[2]
    reach = (view.size / 2 + 4) / factor + 4  # beyond it the filters see nothing
    first, last = max(0, int(width / 2 - reach)), min(width, int(width / 2 + reach) + 1)
    near = F.resize(
        pixels[:, :, first:last],
        [new_h, round((last - first) * factor)],
        interpolation=MODES[view.interpolation],
        antialias=True,
    )
    top, left = round((new_h - view.size) / 2), round((new_w - view.size) / 2 - first * factor)
    return F.crop(near, top, left, view.size, view.size).permute(1, 2, 0)
