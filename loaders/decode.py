"""The bytes of one image to pixels, and what its header says: the one place where an image is decoded on the host.

JPEG goes through libjpeg-turbo, which is made for bytes that nobody has checked; everything else through Pillow
(torchvision's PNG decoder ends the process at a damaged file). Whether an image is bad is a function of its bytes: see
`decode`. The back ends that decode themselves, in the compiled core or with DALI, take JPEG alone and leave to this
room whatever they cannot do.
"""

from __future__ import annotations

import contextlib
import importlib
import re
import struct
import warnings
from collections.abc import Iterator
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from loaders.errors import BadImage

RAW = b"RAW"
"""Format of an image whose bytes are its pixels, [height, width, 3]."""
JPEG4 = b"JPEG4"
"""Format of a JPEG of four channels (CMYK, YCCK): what they mean depends on who wrote it, and Pillow is who knows."""
JPEGS = (b"JPEG", b"MPO")
"""Formats whose bytes are a JPEG in gray or color; of an MPO, which holds several pictures, the first counts."""
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
"""What is decoded, as Pillow names it; an MPO opens as a JPEG. Pillow knows more, and starts a program for some of it
(Ghostscript for EPS)."""
for _reader in ("Jpeg", "Mpo", "Png", "Bmp", "Gif", "Ppm", "Tiff", "WebP"):
    importlib.import_module(f"PIL.{_reader}ImagePlugin")  # registers it; Pillow itself waits until it needs one
# A color profile or a text beside the pixels may have more than Pillow's 1 MiB.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 64 << 20
JPEG_END = b"\xff\xd9"
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_ALONE = {0x00, 0x01, 0xFF, *range(0xD0, 0xD8)}  # not followed by a length: stuffing, fill bytes, restarts
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]", re.DOTALL)  # what ends a scan: no stuffing, no restart


def decode(content: bytes, width: int, height: int) -> Tensor:
    """Decode an image as RGB, uint8 [3, height, width]. An EXIF orientation is not applied, as in the reference, but
    that of a TIFF is; of 16 bits the upper 8 are kept, of several pictures the first, transparency is left out.

    An image is bad if its header or its tables cannot be read, if Pillow refuses it, if its numbers have no range
    (floats, signed integers), or if it is a JPEG without an end-of-image marker: it has been cut short. Other damage in
    the data of a JPEG is decoded as libjpeg does.

    Raises:
        BadImage: it cannot be decoded, or is not of the expected size.
    """
    # The size is read again before anything of that size is allocated: the file may be another one by now.
    frame = jpeg_frame(content)
    size = frame[:2] if frame else _opened(content).size
    if size != (width, height):
        raise BadImage(f"is {size[0]}x{size[1]} pixels, the index says {width}x{height}")
    if frame and is_cut_short(content, frame):
        raise BadImage("cannot be decoded: is cut short (a JPEG without its end)")
    image = _by_torchvision(content, frame) if frame and frame.components in (1, 3) else None
    return _by_pillow(content, (width, height)) if image is None else image


def is_cut_short(content: bytes, frame: Frame) -> bool:
    """Whether a JPEG has no end-of-image marker behind its headers, where previews have theirs."""
    return content.rfind(JPEG_END, frame.scan or len(content)) < 0


def _by_torchvision(content: bytes, frame: Frame) -> Tensor | None:
    """A JPEG in gray or color; None where torchvision refuses it."""
    try:
        return decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), mode=ImageReadMode.RGB)
    except RuntimeError:
        pass
    # It reads on to the end of the file. Who stops at the last pixel does not see what damage put in between.
    end = _MARKER.search(content, frame.scan) if frame.is_single_scan else None
    if end is None or end[0] == JPEG_END:
        return None
    try:
        data = torch.frombuffer(bytearray(content[: end.start()] + JPEG_END), dtype=torch.uint8)
        return decode_jpeg(data, mode=ImageReadMode.RGB)
    except RuntimeError:
        return None


def _by_pillow(content: bytes, size: tuple[int, int]) -> Tensor:
    picture = _opened(content)
    try:
        with _quiet():
            if picture.size != size:  # a JPEG whose header Pillow reads otherwise
                raise BadImage(f"cannot be decoded: is {picture.size[0]}x{picture.size[1]} pixels for Pillow")
            if problem := _without_range(picture):
                raise BadImage(problem)
            if bits := _deep_bits(picture):  # Pillow clips them at 255
                gray = (np.asarray(picture) >> (bits - 8)).astype(np.uint8)
                is_inverted = _tiff_tag(picture, TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0
                pixels = np.repeat((255 - gray if is_inverted else gray)[:, :, None], 3, axis=2)
            else:
                pixels = np.array(picture.convert("RGB"))
    except BadImage:
        raise
    except Exception as error:  # damage makes Pillow's readers raise whatever there is
        raise BadImage(f"cannot be decoded: {_reason(error)}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _deep_bits(picture: Image.Image) -> int:
    """Bits of a gray picture of more than eight; 0 of any other."""
    if picture.mode == "I" and picture.format in ("PNG", "PPM"):
        return 16
    if not picture.mode.startswith("I;16"):
        return 0
    return int((_tiff_tag(picture, TiffImagePlugin.BITSPERSAMPLE) or (16,))[0])


def _tiff_tag(picture: Image.Image, tag: int) -> Any:
    return picture.tag_v2.get(tag) if isinstance(picture, TiffImagePlugin.TiffImageFile) else None


def _without_range(picture: Image.Image) -> str:
    """Why nobody can say what is black and what is white in a picture, or ""."""
    if picture.mode not in ("I", "F") or _deep_bits(picture):
        return ""
    numbers = "floats" if picture.mode == "F" else "integers that are signed or have 32 bits"
    return f"holds {numbers}, which do not say what is white; expected unsigned integers of 8 or 16 bits"


def _opened(content: bytes) -> Image.Image:
    try:
        with _quiet():
            return Image.open(BytesIO(content), formats=FORMATS)
    except Exception as error:
        raise BadImage(f"cannot be decoded: {_reason(error)}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # Pillow warns of bombs (`max_pixels` refuses them), palettes and EXIF.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def from_raw(content: bytes, width: int, height: int) -> Tensor:
    """Stored pixels [height, width, 3] as uint8 [3, height, width].

    Raises:
        BadImage: there are more or fewer of them.
    """
    if len(content) != 3 * width * height:
        raise BadImage(f"has {len(content)} bytes, expected {width} x {height} x 3")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).view(height, width, 3).permute(2, 0, 1)


class Frame(NamedTuple):
    """What the headers of a JPEG say."""

    width: int
    height: int
    components: int
    scan: int
    """Where the data of the first scan begins; 0 if the file does not have them."""
    is_single_scan: bool
    """Whether that scan is all: neither progressive nor one component at a time."""


def jpeg_frame(content: bytes) -> Frame | None:
    """The headers of a JPEG up to its first scan; None if it is not a JPEG, or an odd one."""
    if content[:2] != b"\xff\xd8":
        return None
    at, frame = 2, None
    while (at := content.find(0xFF, at)) >= 0 and at + 10 <= len(content):  # as libjpeg looks for markers
        marker = content[at + 1]
        if marker in _ALONE:
            at += 1
            continue
        length = struct.unpack_from(">H", content, at + 2)[0]
        if marker == 0xDA:
            is_single = frame is not None and frame.is_single_scan and content[at + 4] == frame.components
            return frame and frame._replace(scan=at + 2 + length, is_single_scan=is_single)
        if marker in _FRAMES:
            height, width, components = struct.unpack_from(">HHB", content, at + 5)
            frame = Frame(width, height, components, 0, is_single_scan=marker in (0xC0, 0xC1, 0xC9))
        at += 2 + length
    return frame


class Header(NamedTuple):
    """What is known of an image before it is decoded."""

    width: int
    height: int
    format: str
    """As Pillow names it, or `JPEG4`."""
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
        with _quiet(), Image.open(file, formats=FORMATS) as image:
            if problem := _without_range(image):
                return Header.unusable(problem)
            format = JPEG4.decode() if (image.format, image.mode) == ("JPEG", "CMYK") else image.format or ""
            return Header(image.width, image.height, format, "")
    except Image.DecompressionBombError:
        return Header.unusable("is a decompression bomb: more pixels than Pillow opens")
    except UnidentifiedImageError:
        return Header.unusable(f"is not an image; expected {', '.join(FORMATS)}")
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        return Header.unusable(f"is not an image: {_reason(error)}")


def _reason(error: Exception) -> str:
    # Pillow's "cannot identify image file <_io.BytesIO object at 0x...>" names an address, not a reason.
    text = str(error).split("<_io", 1)[0].strip()
    return text or type(error).__name__
