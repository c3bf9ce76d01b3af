"""Seed inputs for the fuzzers: small JPEGs of every variant, whole and broken, behind varied choices; small networks.

python -m tests.fuzz.make_corpus FOLDER
"""

import io
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from runtime import bnn
from tests.packed import random_network

HEAD = 44


def jpegs():
    rng = np.random.default_rng(0)
    for number, (width, height) in enumerate([(1, 1), (1, 40), (40, 1), (17, 23), (64, 64), (97, 130), (200, 33)]):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        smooth = Image.fromarray(pixels).resize((width, height)).convert("RGB")
        for subsampling in (0, 1, 2):
            for progressive in (False, True):
                out = io.BytesIO()
                smooth.save(out, "JPEG", quality=60 + 5 * number, subsampling=subsampling, progressive=progressive)
                yield out.getvalue()
        for mode in ("L", "CMYK"):
            out = io.BytesIO()
            smooth.convert(mode).save(out, "JPEG")
            yield out.getvalue()
        out = io.BytesIO()
        smooth.save(out, "JPEG", restart_marker_blocks=2)
        yield out.getvalue()


def networks():
    for number, (width, multiples) in enumerate(
        [(2, (1, 2)), (2, (1, 1, 2, 4)), (8, (1, 2, 4)), (34, (1, 1)), (64, (1, 2))]
    ):
        for number_type in (bnn.FLOAT32, bnn.FLOAT16, bnn.INT8):
            shape = {"width": width, "multiples": multiples, "side": 4 * (1 + number), "stem_stride": 1 + number % 2}
            yield bnn.to_bytes(random_network(**shape, number_type=number_type))


def main():
    for folder in ("turbo_seeds", "runtime_seeds"):
        (Path(sys.argv[1]) / folder).mkdir(parents=True, exist_ok=True)
    for number, content in enumerate(networks()):
        for choice in (0, 1, 2, 0x14, 0x38):
            (Path(sys.argv[1]) / "runtime_seeds" / f"{number:02d}_{choice:02x}").write_bytes(bytes([choice]) + content)
    folder = Path(sys.argv[1]) / "turbo_seeds"
    rng = np.random.default_rng(1)
    for number, content in enumerate(jpegs()):
        broken = bytearray(content)
        broken[int(rng.integers(len(broken) // 2, len(broken)))] ^= 1 << int(rng.integers(8))
        for variant, body in enumerate(
            (content, content[: len(content) * 2 // 3], bytes(broken), content + b"trailing")
        ):
            head = rng.integers(0, 255, HEAD, dtype=np.uint8)
            head[0] &= 1
            (folder / f"{number:03d}_{variant}").write_bytes(head.tobytes() + body)
    for number in range(6):
        head = rng.integers(0, 255, HEAD, dtype=np.uint8)
        head[0], head[2], head[3] = 2 | (number & 1), 10 + number, 20
        (folder / f"raw_{number}").write_bytes(head.tobytes() + bytes(3 * (11 + number) * 21))


if __name__ == "__main__":
    main()
