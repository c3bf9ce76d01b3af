"""Pictures and small data sets of files, sound and odd ones."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def picture(seed: int, height: int, width: int) -> np.ndarray:
    """A smooth textured uint8 image [height, width, 3]."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    image = np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)).astype(float)
    return (image + rng.normal(0, 6, image.shape)).clip(0, 255).astype(np.uint8)


def write_tree(root: Path, count: int = 24, classes: int = 3) -> Path:
    """`count` JPEG files of varied sizes in class folders."""
    for number in range(count):
        folder = root / f"class{number % classes}"
        folder.mkdir(parents=True, exist_ok=True)
        height, width = 40 + 7 * (number % 5), 36 + 9 * (number % 4)
        Image.fromarray(picture(number, height, width)).save(folder / f"{number:04d}.jpg", quality=92)
    return root


def jpeg(image, **options):
    out = io.BytesIO()
    image.save(out, "JPEG", **options)
    return out.getvalue()


def odd_files(root):
    """The files of reliability.md 26: name -> whether it decodes."""
    folder = root / "class0"
    rgb = Image.fromarray(picture(99, 60, 80))
    good = {}

    def add(name, content, decodes):
        (folder / name).write_bytes(content)
        good[f"class0/{name}"] = decodes

    add("truncated.jpg", jpeg(rgb)[:900], False)
    add("empty.jpg", b"", False)
    add("text.jpg", b"this is not an image", False)
    add("garbage.jpg", jpeg(rgb)[:40] + b"\x00" * 500, False)
    png = io.BytesIO()
    rgb.save(png, "PNG")
    add("png_named.JPEG", png.getvalue(), True)
    add("cmyk.jpg", jpeg(rgb.convert("CMYK")), True)
    add("gray.jpg", jpeg(rgb.convert("L")), True)
    exif = Image.Exif()
    exif[0x0112] = 6
    add("rotated.jpg", jpeg(rgb, exif=exif), True)
    add("progressive.jpg", jpeg(rgb, progressive=True), True)
    add("one.jpg", jpeg(Image.new("RGB", (1, 1), (200, 10, 60))), True)
    add("line.jpg", jpeg(rgb.resize((1, 40))), True)
    for name, mode in (("alpha.png", "RGBA"), ("palette.png", "P"), ("deep.png", "I;16")):
        out = io.BytesIO()
        (
            Image.fromarray(picture(3, 20, 20)[:, :, 0].astype(np.uint16) * 257)
            if mode == "I;16"
            else rgb.convert(mode)
        ).save(out, "PNG")
        add(name, out.getvalue(), True)
    gif = io.BytesIO()
    rgb.save(gif, "GIF")
    add("moving.gif", gif.getvalue(), True)
    (folder / "bomb.png").write_bytes(bomb(50_000, 50_000))
    good["class0/bomb.png"] = False
    name = b"caf\xe9 \n.jpg"

    with open(os.path.join(os.fsencode(folder), name), "wb") as file:
        file.write(jpeg(rgb))
    return good


def bomb(width, height):
    """A PNG header that promises 2.5 gigapixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
