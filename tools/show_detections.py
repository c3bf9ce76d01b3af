"""Draw what a detector has found in some of its validation images, as its last evaluation has kept it.

    python tools/show_detections.py runs/voc_c4 --out detections.png

Each class has a color; beside a box stand the name and the score.
"""

import argparse
import colorsys
import sys
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import _root  # noqa: F401
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from engine.errors import RecipeError, guarded
from loaders import DataError
from loaders.files import check_writable

GAP, HEIGHT, COLUMNS = 4, 320, 4
KEYS = {"detections", "images", "paths", "classes"}


def newest(run: Path, step: int | None) -> Path:
    """The file of a run's last evaluation, or of that at a step.

    Raises:
        RecipeError: there is none.
    """
    steps = {int(name): path for path in run.glob("detections-*.npz") if (name := path.stem[11:]).isdecimal()}
    if not steps or (step is not None and step not in steps):
        there = f"there are those of steps {', '.join(map(str, sorted(steps)))}" if steps else "there is none"
        wanted = "*" if step is None else step
        raise RecipeError(
            f"{run}/detections-{wanted}.npz: no such file, {there}; expected a run folder with an evaluation of kind "
            "detection"
        )
    return steps[max(steps) if step is None else step]


def read(path: Path) -> dict[str, NDArray[Any]]:
    """What an evaluation has kept.

    Raises:
        RecipeError: the file is damaged or another one.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            columns = {name: file[name] for name in KEYS}
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise RecipeError(f"{path}: not the detections of an evaluation, or damaged: {error}") from None
    return columns


def draw(path: str, boxes: NDArray[np.float64], classes: NDArray[Any]) -> Image.Image:
    """One image with its boxes [n, 6] of (class, score, x1, y1, x2, y2), `HEIGHT` pixels high.

    Raises:
        DataError: the image is not where it was.
    """
    try:
        picture = Image.open(path).convert("RGB")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    scale = HEIGHT / picture.height
    picture = picture.resize((max(1, round(picture.width * scale)), HEIGHT))
    pen = ImageDraw.Draw(picture)
    for label, score, *corners in boxes[boxes[:, 1].argsort(kind="stable")]:  # the surest on top
        red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(label / len(classes), 0.8, 1))
        x1, y1, x2, y2 = (scale * corner for corner in corners)
        pen.rectangle((x1, y1, x2, y2), outline=(red, green, blue), width=2)
        text, at = f"{classes[int(label)]} {score:.2f}", (x1 + 3, max(0, y1 - 11) if y1 > 11 else y1 + 2)
        pen.rectangle(pen.textbbox(at, text), fill=(red, green, blue))
        pen.text(at, text, fill="black")
    return picture


def sheet(pictures: list[Image.Image]) -> Image.Image:
    """Pictures side by side in rows."""
    rows = [pictures[first : first + COLUMNS] for first in range(0, len(pictures), COLUMNS)]
    width = max(sum(picture.width + GAP for picture in row) for row in rows)
    canvas = Image.new("RGB", (width, len(rows) * (HEIGHT + GAP)), "white")
    for number, row in enumerate(rows):
        left = 0
        for picture in row:
            canvas.paste(picture, (left, number * (HEIGHT + GAP)))
            left += picture.width + GAP
    return canvas


@guarded
def main() -> int:
    """Draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--step", type=int, help="of the evaluation (the last)")
    parser.add_argument("--out", type=Path, help="the picture (detections.png in the run folder)")
    parser.add_argument("--count", type=int, default=8, help="how many images, evenly spaced (%(default)s)")
    parser.add_argument("--score", type=float, default=0.5, help="draw what scores more (%(default)s)")
    arguments = parser.parse_args()
    if not 1 <= arguments.count <= 100:
        parser.error(f"--count: expected 1 to 100, got {arguments.count}")
    out = arguments.out or arguments.run / "detections.png"
    if out.suffix.lower() not in Image.registered_extensions():
        parser.error(f"--out: expected the name of a picture, such as detections.png, got {out}")
    check_writable(out)
    kept = read(newest(arguments.run, arguments.step))
    images = kept["images"]
    chosen = np.unique(np.linspace(0, len(images), min(arguments.count, len(images)), endpoint=False).astype(int))
    if not len(chosen):
        raise RecipeError(f"{arguments.run}: no image was looked at")
    found = kept["detections"][kept["detections"][:, 2] > arguments.score]
    pictures = [
        draw(str(kept["paths"][number]), found[found[:, 0] == images[number], 1:], kept["classes"]) for number in chosen
    ]
    picture = sheet(pictures)
    out.parent.mkdir(parents=True, exist_ok=True)
    picture.save(out)
    print(f"{out}: {picture.width}x{picture.height} pixels, {len(pictures)} images")
    return 0


if __name__ == "__main__":
    sys.exit(main())
