"""Features of your images by a trained network, in one file for numpy; and which images it takes for similar.

    python tools/embed.py runs/burn_stage2 photos/ features.npz --neighbors similar.png
    python tools/embed.py weights/resnet50.pth photos/ features.npz --layer map data.eval_view='{preset: whole}'
    torchrun --nproc_per_node=8 tools/embed.py net.bnn 'shards/*.tar' features.npz data.workers=4

    file = numpy.load("features.npz")    # file["features"] float32 [N, D], file["names"] [N]; label, classes, rows, of

Images need no labels. Those that cannot be decoded are left out and counted; the others keep the order of the data set,
for any number of ranks. Resizing and normalization are those of the network's own evaluations.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import _root  # noqa: F401
import numpy as np
from numpy.typing import NDArray

import loaders
from engine import dist
from engine.data import open_once
from engine.features import Features, check, data_of, extract, nearest, pixels_of
from engine.log import to_console
from engine.results.figures import draw_neighbors, pyplot
from engine.trained import Trained, open_trained
from loaders import DataConfig, DataError, Index
from loaders.files import aside, check_writable
from models.contract import LAYERS, Layer

NEIGHBORS = 8


def main() -> int:
    """Parse the command line, extract, write and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a run folder, a checkpoint, a published weight file, or a .bnn file")
    parser.add_argument("photos", type=Path, help="anything that data.train takes, with or without labels")
    parser.add_argument("out", type=Path, help="the file to write, such as features.npz")
    parser.add_argument("override", nargs="*", default=[], help="data.key=value, how images are read")
    parser.add_argument(
        "--layer",
        choices=LAYERS,
        default="features",
        help="features (behind fc), pooled (the last map, averaged), map (the same in four windows) (%(default)s)",
    )
    parser.add_argument("--part", help="a network of a pre-training run, such as teacher (the one that is evaluated)")
    parser.add_argument("--step", type=int, help="of a run folder (the newest)")
    parser.add_argument("--neighbors", type=Path, metavar="PNG", help="also draw images with their eight nearest here")
    parser.add_argument("--queries", type=int, default=8, help="--neighbors: how many, evenly spaced (%(default)s)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="(%(default)s)")
    arguments = parser.parse_intermixed_args()
    if arguments.queries < 1:
        parser.error(f"--queries: expected at least 1, got {arguments.queries}")
    to_console(is_main=dist.environment_rank() == 0)
    for path in filter(None, (arguments.out, arguments.neighbors)):
        check_writable(path)
    if arguments.neighbors:
        pyplot()
    trained = open_trained(arguments.source, step=arguments.step, part=arguments.part)
    embed(
        trained,
        arguments.photos,
        arguments.out,
        arguments.override,
        layer=arguments.layer,
        sheet=arguments.neighbors,
        queries=arguments.queries,
        device=arguments.device,
    )
    return 0


def embed(
    trained: Trained,
    photos: Path,
    out: Path,
    changes: Sequence[str] = (),
    *,
    layer: Layer = "features",
    sheet: Path | None = None,
    queries: int = 8,
    device: str = "auto",
) -> Features | None:
    """Write the features of some images, on all ranks that torchrun has started.

    Args:
        photos: anything that `data.train` takes.
        out: the .npz file.
        changes: `data.key=value`.
        sheet: a PNG file of images with their nearest neighbors by cosine.

    Returns:
        The features on rank 0, None on the others.

    Raises:
        DataError, LoaderError, RecipeError, OSError: in one line each.
    """
    data = data_of(trained, changes, val=photos, device=device)
    check(trained, layer, data.eval_view.size)
    with dist.group(device, 1800) as world:
        index = open_once(lambda: {"val": loaders.open_root(data, str(photos), labels=data.labels)}, data, world)["val"]
        features = extract(trained, data, index, layer=layer, world=world)
        dist.together(lambda: write(features, data, index, out, sheet, queries) if features else None)
    return features


def write(features: Features, data: DataConfig, index: Index, out: Path, sheet: Path | None, queries: int) -> None:
    """Write the features, draw their neighbors, and say so."""
    out.parent.mkdir(parents=True, exist_ok=True)
    features.save(out)
    count, width = features.array.shape
    left_out = f", {features.left_out:,} images left out" if features.left_out else ""
    print(f"{out}: {features.of['layer']} of {count:,} images, {width} numbers each{left_out}")
    if sheet is not None:
        draw(features, data, index, sheet, queries)
        print(f"{sheet}: images with those whose features are nearest, by cosine distance")


def draw(features: Features, data: DataConfig, index: Index, sheet: Path, queries: int) -> None:
    """Draw evenly spaced images, each with its nearest ones.

    Raises:
        DataError: there is only one image.
    """
    asked, found, distances = similar(features, queries, NEIGHBORS)
    pixels = pixels_of_all(features, data, index, asked, found)
    label = features.label if index.is_labeled else None
    same = None if label is None else label[found] == label[asked][:, None]
    title = f"{data.val}: each image and those that are nearest to it by {features.of['layer']}"
    sheet.parent.mkdir(parents=True, exist_ok=True)
    with aside(sheet) as out:
        draw_neighbors(out.part, title, pixels, distances, same)


def similar(
    features: Features, queries: int, count: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Evenly spaced rows [Q] of features, the rows [Q, K] that are nearest to them, and their distances [Q, K].

    Raises:
        DataError: there is only one.
    """
    if len(features.rows) < 2:
        raise DataError(f"{features.names[0]}: is the only image, expected at least 2 to compare")
    asked = np.linspace(0, len(features.rows) - 1, min(queries, len(features.rows))).round().astype(np.int64)
    return asked, *nearest(features.array, asked.tolist(), count)


def pixels_of_all(
    features: Features, data: DataConfig, index: Index, asked: NDArray[np.int64], found: NDArray[np.int64]
) -> NDArray[np.uint8]:
    """Images of rows of features, [Q] and [Q, K], each query first: uint8 [Q, 1 + K, size, size, 3]."""
    shown = np.concatenate((asked[:, None], found), axis=1)
    unique, place = np.unique(shown, return_inverse=True)
    return pixels_of(data, index, features.rows[unique].tolist())[place.reshape(shown.shape)]


if __name__ == "__main__":
    dist.leave(main)
