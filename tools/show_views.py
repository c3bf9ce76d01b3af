"""Draw the augmented views of a recipe, all back ends of this machine side by side, with their differences.

    python tools/show_views.py recipes/burn_stage1.yaml data.train=data/photos/train --out views.png

Rows are images. For each view the first back end's pixels come first, then the others', then their difference from
the first, amplified eight times (gray means none). Scenes have their boxes, thin ones where an object is difficult.
"""

import argparse
import sys
from pathlib import Path

import _root  # noqa: F401
import numpy as np
import torch
from PIL import Image, ImageDraw
from torchvision.utils import draw_bounding_boxes

import loaders
from engine import recipe as recipes
from engine.errors import guarded
from engine.recipe import Recipe
from loaders import DataError
from loaders.augment import to_pixels
from loaders.files import check_writable

GAP, HEAD, GAIN = 4, 18, 8


def views_of(recipe: Recipe, backend: str, count: int) -> list[torch.Tensor]:
    """The first `count` images of the stream: V x uint8 [count, size, size, 3]."""
    sizes = {"batch_size": count, "micro_batch": count, "on_bad_image": "replace"}
    data = loaders.with_backend(recipe.data, backend, **sizes)
    index = loaders.open_data(data, "train")
    loader = loaders.open_train(data, index, seed=recipe.seed)
    try:
        batch = next(loader)
    finally:
        loader.close()
    views = [to_pixels(view, data.mean, data.std) for view in batch.views]
    if not data.options.gives_boxes:
        return views
    assert batch.label is not None
    return [boxed(views[0], batch.label, index.classes)]


def boxed(pixels: torch.Tensor, label: torch.Tensor, classes: list[str]) -> torch.Tensor:
    """Whole images, uint8 [B, H, W, 3], with the boxes of their `label` [B, 1 + M, 6]; thin if difficult."""
    for image, rows in zip(pixels, label, strict=True):
        for is_difficult in (0, 1):
            chosen = rows[(rows[:, 0] >= 0) & (rows[:, 5] == is_difficult)]
            names = [classes[int(number)] for number in chosen[:, 0]]
            drawn = draw_bounding_boxes(image.permute(2, 0, 1), chosen[:, 1:5], names, "lime", width=2 - is_difficult)
            image.copy_(drawn.permute(1, 2, 0))
    return pixels


def sheet(pixels: dict[str, list[torch.Tensor]]) -> Image.Image:
    """The contact sheet of all back ends' views."""
    first, *others = pixels
    count = len(pixels[first][0])
    columns: list[tuple[str, torch.Tensor]] = []
    for number, reference in enumerate(pixels[first]):
        columns.append((f"{number} {first}", reference))
        for name in others:
            difference = (pixels[name][number].int() - reference.int()) * GAIN + 128
            columns.append((name, pixels[name][number]))
            columns.append(("difference", difference.clamp(0, 255).to(torch.uint8)))
    height = max(view.shape[1] for _, view in columns)
    width = sum(view.shape[2] + GAP for _, view in columns)
    picture = Image.new("RGB", (width, HEAD + count * (height + GAP)), "white")
    pen, left = ImageDraw.Draw(picture), 0
    for title, view in columns:
        pen.text((left + 2, 3), title[: max(4, view.shape[2] // 6)], fill="black")
        for row in range(count):
            picture.paste(Image.fromarray(view[row].numpy()), (left, HEAD + row * (height + GAP)))
        left += view.shape[2] + GAP
    return picture


@guarded
def main() -> int:
    """Draw, and print how far apart the back ends are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="a YAML file of recipes/")
    parser.add_argument("override", nargs="*", default=[], help="section.key=value, changes the recipe")
    parser.add_argument("--out", type=Path, default=Path("views.png"), help="the picture (%(default)s)")
    parser.add_argument("--count", type=int, default=6, help="how many images (%(default)s)")
    parser.add_argument("--backends", nargs="+", help="which, the first is the reference (all that work here)")
    arguments = parser.parse_intermixed_args()
    if not 1 <= arguments.count <= 100:
        parser.error(f"--count: expected 1 to 100, got {arguments.count}")
    check_writable(arguments.out)
    if arguments.out.suffix.lower() not in Image.registered_extensions():
        parser.error(f"--out: expected the name of a picture, such as views.png, got {arguments.out}")
    recipe = recipes.load(arguments.recipe, arguments.override)
    reasons = loaders.why_unusable(recipe.data)
    names = arguments.backends or sorted(
        (n for n, reason in reasons.items() if not reason), key=lambda n: n != "folder"
    )
    for name in names:
        if reason := reasons.get(name, f"no such back end; expected one of {', '.join(reasons)}"):
            raise DataError(f"--backends: {name}: {reason}")
    one = loaders.with_backend(recipe.data, names[0], batch_size=1, micro_batch=1)
    images = len(loaders.open_data(one, "train"))
    count = min(arguments.count, images)
    if count < arguments.count:
        print(f"--count: the data set has {images} images; all are drawn", file=sys.stderr)
    pixels = {name: views_of(recipe, name, count) for name in names}
    picture = sheet(pixels)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    picture.save(arguments.out)
    for name in names[1:]:
        apart = [(a.int() - b.int()).abs().numpy() for a, b in zip(pixels[names[0]], pixels[name], strict=True)]
        flat = np.concatenate([difference.ravel() for difference in apart])
        print(f"{name} against {names[0]}: mean {flat.mean():.3f} levels of 255, 99.9 % within "
              f"{np.percentile(flat, 99.9):.0f}, most {flat.max()}")  # fmt: skip
    print(f"{arguments.out}: {picture.width}x{picture.height} pixels, {count} images, {', '.join(names)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
