"""Pictures and small data sets of files, sound and odd ones."""

from __future__ import annotations

import contextlib
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


def variants():
    """A small picture in each format that is accepted, in its usual forms: name -> bytes."""
    rgb = Image.fromarray(picture(7, 44, 60))
    deep = Image.fromarray(picture(8, 44, 60)[:, :, 0].astype(np.uint16) * 257)
    forms = {
        "baseline.jpg": (rgb, {"quality": 92}),
        "restarts.jpg": (rgb, {"restart_marker_blocks": 3, "subsampling": "4:2:0"}),
        "progressive.jpg": (rgb, {"progressive": True}),
        "gray.jpg": (rgb.convert("L"), {}),
        "cmyk.jpg": (rgb.convert("CMYK"), {}),
        "color.png": (rgb, {}),
        "alpha.png": (rgb.convert("RGBA"), {}),
        "palette.png": (rgb.convert("P"), {"transparency": 3}),
        "deep.png": (deep, {}),
        "plain.bmp": (rgb, {}),
        "palette.bmp": (rgb.convert("P"), {}),
        "still.gif": (rgb, {}),
        "moving.gif": (rgb, {"save_all": True, "append_images": [rgb.rotate(90), rgb.rotate(180)]}),
        "plain.ppm": (rgb, {}),
        "gray.ppm": (rgb.convert("L"), {}),
        "plain.tiff": (rgb, {}),
        "deflate.tiff": (rgb, {"compression": "tiff_adobe_deflate"}),
        "lzw.tiff": (rgb, {"compression": "tiff_lzw"}),
        "deep.tiff": (deep, {}),
        "pages.tiff": (rgb, {"save_all": True, "append_images": [rgb, rgb]}),
        "lossy.webp": (rgb, {"quality": 80}),
        "lossless.webp": (rgb, {"lossless": True}),
    }
    found = {}
    for name, (image, options) in forms.items():
        out = io.BytesIO()
        image.save(
            out, {"jpg": "JPEG", "tiff": "TIFF", "ppm": "PPM"}.get(name.split(".")[1], name.split(".")[1]), **options
        )
        found[name] = out.getvalue()
    return found


def damaged(content, rng):
    """The bytes of an image with one kind of damage: a few bytes changed or zeroed, cut short, or, in a PNG, its
    payload changed under checksums that fit."""
    kind = int(rng.integers(5))
    if kind == 0:
        return content[: int(rng.integers(8, len(content)))]
    if kind == 1:
        start, count = int(rng.integers(8, len(content))), int(rng.integers(1, 64))
        return (content[:start] + b"\0" * count + content[start + count :])[: len(content)]
    if content.startswith(b"\x89PNG") and kind != 2:
        with contextlib.suppress(zlib.error, struct.error, ValueError):  # it may be damaged already
            return _damaged_png(content, rng, unpacks=kind == 3)
    changed = bytearray(content)
    for _ in range(int(rng.integers(1, 4))):
        # Half in the headers, where it does most, half anywhere.
        most = min(len(content), 200) if kind == 3 else len(content)
        changed[int(rng.integers(2, most))] = int(rng.integers(256))
    return bytes(changed)


def _damaged_png(content, rng, *, unpacks):
    chunks, at = [], 8
    while at < len(content):
        length = struct.unpack_from(">I", content, at)[0]
        chunks.append((content[at + 4 : at + 8], bytearray(content[at + 8 : at + 8 + length])))
        at += 12 + length
    kind, data = chunks[int(rng.integers(len(chunks) - 1))]
    if kind == b"IDAT" and unpacks:
        raw = bytearray(zlib.decompress(bytes(data)))
        raw[int(rng.integers(len(raw)))] = int(rng.integers(256))
        data[:] = zlib.compress(bytes(raw[: int(rng.integers(1, len(raw) + 1))] if rng.integers(2) else raw))
    else:
        data[int(rng.integers(len(data)))] = int(rng.integers(256))
    return content[:8] + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def write_kit(root, scenes, *, split="2007_trainval", classes=None, pictures=True):
    """A split in the layout of PASCAL VOC: id -> (width, height, objects), each object (class, box, difficult) with a
    box of inclusive pixels from 1 on. `classes`: write the files of these, with what is in each image."""
    year, name = split.split("_")
    folder = root / f"VOC{year}"
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    (folder / "ImageSets/Main" / f"{name}.txt").write_text("".join(f"{number}\n" for number in scenes))
    for number, (width, height, objects) in scenes.items():
        if pictures:
            image = Image.fromarray(picture(int(number), height, width))
            image.save(folder / "JPEGImages" / f"{number}.jpg", quality=95)
        said = "".join(
            f"<object><name>{label}</name><difficult>{int(difficult)}</difficult><bndbox><xmin>{x1}</xmin>"
            f"<ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox>"
            f"<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part></object>"
            for label, (x1, y1, x2, y2), difficult in objects
        )
        (folder / "Annotations" / f"{number}.xml").write_text(f"<annotation>{said}</annotation>\n")
    for label in classes or ():
        lines = []
        for number, (_, _, objects) in scenes.items():
            difficult = [d for c, _, d in objects if c == label]
            lines.append(f"{number} {-1 if not difficult else 0 if all(difficult) else 1:2d}\n")
        (folder / "ImageSets/Main" / f"{label}_{name}.txt").write_text("".join(lines))
    return root
