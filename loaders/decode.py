"""The bytes of one image to pixels, and what its header says."""

from __future__ import annotations

import struct
import warnings
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image

from loaders.errors import BadImage

RAW = b"RAW"
"""Format of an image whose bytes are its pixels, [height, width, 3]."""


def decode(content: bytes, width: int, height: int) -> Tensor:
    """Decode an image as RGB, uint8 [3, height, width]. An EXIF orientation is not applied, as in the reference.

    Raises:
        BadImage: it cannot be decoded, or is not of the expected size.
    """
    # The size is read again before anything of that size is allocated: the file may be another one by now.
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of bombs, palettes and EXIF, which do not matter here
            frame = jpeg_frame(content)
            size = frame[:2] if frame else Image.open(BytesIO(content)).size
    except Exception as error:
        raise BadImage(f"cannot be decoded: {_reason(error)}") from error
    if size != (width, height):
        raise BadImage(f"is {size[0]}x{size[1]} pixels, the index says {width}x{height}")
    try:
        data = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        image = decode_image(data, mode=ImageReadMode.RGB)
        if image.dtype == torch.uint16:  # a PNG of 16 bits: keep the upper 8
            image = (image.int() >> 8).to(torch.uint8)
        if tuple(image.shape) == (3, height, width):  # an animation has four axes
            return image
    except (RuntimeError, ValueError):
        pass  # a format or variant that torchvision does not read: Pillow reads more, and says why it cannot
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            picture = Image.open(BytesIO(content)).convert("RGB")
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    except Exception as error:
        raise BadImage(f"cannot be decoded: {_reason(error)}") from error


def from_raw(content: bytes, width: int, height: int) -> Tensor:
    """Stored pixels [height, width, 3] as uint8 [3, height, width].

    Raises:
        BadImage: there are more or fewer of them.
    """
    if len(content) != 3 * width * height:
        raise BadImage(f"has {len(content)} bytes, expected {width} x {height} x 3")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).view(height, width, 3).permute(2, 0, 1)


class Frame(NamedTuple):
    """What a JPEG's frame header says."""

    width: int
    height: int
    components: int


def jpeg_frame(content: bytes) -> Frame | None:
    """The frame header of a JPEG; None if it is not a JPEG, or an odd one."""
    if content[:2] != b"\xff\xd8":
        return None
    at = 2
    while at + 10 <= len(content) and content[at] == 0xFF:
        marker = content[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width, components = struct.unpack_from(">HHB", content, at + 5)
            return Frame(width, height, components)
        else:
            at += 2 + struct.unpack_from(">H", content, at + 2)[0]
    return None


class Header(NamedTuple):
    """What is known of an image before it is decoded."""

    width: int
    height: int
    format: str
    """As Pillow names it."""
    problem: str
    """Why it cannot be used, or ""; the size is then 1x1."""

    @classmethod
    def unusable(cls, problem: str) -> Header:
        """The header of something that is not an image."""
        return cls(1, 1, "", problem)


def read_header(file: Any) -> Header:
    """Read the header from an open binary file; nothing is decoded.

    Raises:
        OSError: the file cannot be read, which says nothing of the image.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of decompression bombs: `max_pixels` refuses those
            with Image.open(file) as image:
                return Header(image.width, image.height, image.format or "", "")
    except Image.DecompressionBombError:
        return Header.unusable("is a decompression bomb: more pixels than Pillow opens")
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        return Header.unusable(f"is not an image: {_reason(error)}")


def _reason(error: Exception) -> str:
    # Pillow's "cannot identify image file <_io.BytesIO object at 0x...>" names an address, not a reason.
    text = str(error).split("<_io", 1)[0].strip()
    return text or type(error).__name__
