"""What a frozen network makes of images: the one extraction for k-NN, probes and embeddings, and a cache of it.

features = extract(trained, data_of(trained, ["data.val=photos"]), index, layer="pooled", cache=Path("runs/x"))
features.array  # float32 [N, D], in the order of the index for any number of ranks
"""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

import loaders
from engine import dist, strict_yaml
from engine import recipe as recipes
from engine.dist import World
from engine.errors import RecipeError, shared
from engine.log import Progress, logger
from engine.trained import Trained, hash_of
from loaders import DataConfig, DataError, Index
from loaders.augment import to_pixels
from loaders.files import aside
from models.contract import Layer

_CHUNK = 4096  # rows that are gathered, or compared, at a time
Network = Callable[[Tensor], Tensor]
ALONE = World(0, 1, 0, 1, torch.device("cpu"))


@dataclass(frozen=True, eq=False)
class Features:
    """Features of the images of a data set, those left out that cannot be decoded."""

    array: NDArray[np.float32]
    """[N, D], in the order of the index."""
    rows: NDArray[np.int64]
    """[N], rows of the index, ascending."""
    label: NDArray[np.int64] | None
    """[N]; None where the data set has no labels."""
    names: NDArray[np.str_]
    """[N], paths below the data set's root; what is not UTF-8 is escaped."""
    classes: tuple[str, ...]
    """Names of the labels; () without."""
    images: int
    """That were asked for."""
    of: dict[str, Any]
    """What they are features of, as plain data: `layer`, `weights` (hash), `images` (fingerprint of the index),
    `view`, `mean`, `std`."""

    @property
    def left_out(self) -> int:
        """Images that cannot be decoded."""
        return self.images - len(self.rows)

    @property
    def hash(self) -> str:
        """Of all that they depend on, 16 hex digits: other weights, images, view or layer give another."""
        return _hash(self.of)

    def save(self, path: Path) -> None:
        """Write an .npz of plain arrays: `features`, `rows`, `names`, `label` (-1: none), `classes`, `images`, and `of`
        as JSON; `numpy.load(path, allow_pickle=False)` reads it.

        Raises:
            OSError: the disk refuses; nothing is left.
        """
        label = np.full(len(self.rows), -1, dtype=np.int64) if self.label is None else self.label
        with aside(path) as out, open(out.part, "wb") as file:
            np.savez(
                file, features=self.array, rows=self.rows, names=self.names, label=label,
                classes=np.array(self.classes, dtype=np.str_), images=np.int64(self.images),
                of=np.array(json.dumps(self.of)),
            )  # fmt: skip

    @classmethod
    def load(cls, path: Path) -> Features:
        """Read what `save` wrote; no code of the file is run.

        Raises:
            OSError: it cannot be read.
            ValueError: it is no such file, or damaged.
        """
        try:
            # Opened here: numpy leaves a damaged file open.
            with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
                got = {name: file[name] for name in ("features", "rows", "names", "label", "classes", "images", "of")}
            array, rows, names, label = (got[name] for name in ("features", "rows", "names", "label"))
            classes, images, of = tuple(map(str, got["classes"])), int(got["images"]), json.loads(str(got["of"]))
            kinds = [(array, "f4"), (rows, "i8"), (label, "i8"), (names, "U")]
            if any(item.dtype.str.lstrip("<|=")[: len(kind)] != kind for item, kind in kinds) or not isinstance(
                of, dict
            ):
                raise ValueError("its arrays are of other types")
            if array.ndim != 2 or any(item.shape != (len(array),) for item in (rows, names, label)):
                raise ValueError("its arrays do not fit together")
            return cls(array, rows, None if (label < 0).any() else label, names, classes, images, of)
        except (KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error, ValueError, AttributeError) as error:
            raise ValueError(f"{path}: is no whole file of features: {error}") from None


class Part(NamedTuple):
    """Features of some images, on the device."""

    array: Tensor
    """[n, D]."""
    label: Tensor | None
    """int64 [n]; None where the data set has no labels."""
    rows: Tensor
    """int64 [n], rows of the index, on the host."""


def batches(
    data: DataConfig,
    index: Index,
    rows: Sequence[int] | None,
    world: World,
    *,
    is_over: Callable[[], bool] = lambda: False,
    bad: dict[str, str] | None = None,
) -> Iterator[loaders.Batch]:
    """This rank's share of a data set, as evaluations see it; without what cannot be decoded. A long one says how far
    it is.

    Args:
        rows: of the index; by default all.
        is_over: asked before each batch; nothing comes any more where it says so.
        bad: gets path -> reason of what cannot be decoded.
    """
    loader = loaders.open_eval(data, index, rows=rows, place=world.place)
    progress = Progress(str(index.root), len(index) if rows is None else len(rows), "images")
    done = 0
    try:
        for batch in loader:
            if is_over():
                return
            if len(batch.rows):
                yield batch
            done += len(batch.rows) * world.world_size
            progress.update(done)
    finally:
        if bad is not None:
            bad.update(loader.bad)
        loader.close()


def parts(network: Network, images: Iterable[loaders.Batch]) -> Iterator[Part]:
    """What a network makes of each batch of images [b, 3, H, W]."""
    for batch in images:
        yield Part(network(batch.views[0]), batch.label, batch.rows)


def joined(found: Iterable[Part], network: Network, data: DataConfig, device: torch.device) -> Part:
    """All parts of a rank in one, on the device; of a rank without images, too."""
    of_rank = list(found)
    if not of_rank:
        width = network(torch.zeros(1, 3, *(data.eval_view.size,) * 2, device=device)).shape[1]
        of_rank = [Part(torch.zeros(0, width, device=device), _none(device), _none())]
    arrays, labels, rows = zip(*of_rank, strict=True)
    return Part(torch.cat(arrays), None if labels[0] is None else torch.cat(labels), torch.cat(rows))


def _none(device: torch.device | None = None) -> Tensor:
    return torch.zeros(0, dtype=torch.int64, device=device)


def gathered(part: Part) -> Part:
    """Labeled features of all ranks on each of them, in the order of the index."""
    assert part.label is not None
    rows = dist.gather_rows(part.rows.to(part.array.device))
    order = rows.argsort()
    return Part(dist.gather_rows(part.array)[order], dist.gather_rows(part.label)[order], rows[order])


def extract(
    trained: Trained,
    data: DataConfig,
    index: Index,
    *,
    layer: Layer = "features",
    rows: Sequence[int] | None = None,
    world: World = ALONE,
    cache: Path | None = None,
) -> Features | None:
    """Run a network over a data set in float32, without changing it, on all ranks of a group.

    Args:
        data: how images are read and normalized, and with which `eval_view`; as `data_of` gives it.
        layer: `features` (behind `fc`), `pooled` (the last map, averaged), or `map` (the same in four windows, see
            `models.contract.windows`).
        rows: of the index, ascending; by default all.
        world: this process among the ranks, which share the images out.
        cache: a folder, made where it is missing, in which `features-<hash>.npz` is looked for and written. One that is
            damaged or of something else is made anew.

    Returns:
        The features on rank 0, None on the others.

    Raises:
        RecipeError: the network has no such layer, or does not take images of this size.
        DataError, LoaderError: the images cannot be read, or none can be decoded; on every rank.
        OSError: the cache cannot be written.
    """
    view = data.eval_view
    check(trained, layer, view.size)
    wanted = range(len(index)) if rows is None else rows
    of = json.loads(
        json.dumps(
            {
                "layer": layer,
                "weights": hash_of(trained.backbone),
                "images": index.fingerprint,
                "classes": _hash(index.classes),
                "bytes": None if index.size is None else _hash(hashlib.sha256(index.size.tobytes()).hexdigest()),
                "rows": None if rows is None else _hash(list(rows)),
                "view": view.model_dump(mode="json"),
                "mean": data.mean,
                "std": data.std,
            }
        )
    )
    path = None if cache is None else cache / f"features-{_hash(of)}.npz"
    if path is not None:
        found = _cached(path, of) if world.is_main else None
        if dist.gather_objects(found is not None)[0]:
            return found
    trained.network.to(world.device)
    bad: dict[str, str] = {}
    array, rows_of_rank = dist.together(lambda: _of_rank(trained, data, index, wanted, layer, world, bad))
    everyone, all_bad = dist.gather_objects(rows_of_rank), dist.gather_objects(bad)
    order = np.sort(np.concatenate(everyone))
    if not len(order):
        raise shared(DataError(f"{index.root}: none of its {len(wanted)} images can be decoded"))
    whole = _on_main(array, everyone, order, world)
    if whole is None:
        dist.together(lambda: None)  # of the cache
        return None
    if left_out := {path: reason for of_rank in all_bad for path, reason in of_rank.items()}:
        first = next(f"{name}: {reason}" for name, reason in left_out.items())
        logger.warning(f"{len(left_out):,} of {len(wanted):,} images are left out, the first is {first}")
    features = Features(
        whole,
        order,
        None if index.label is None else index.label[order].astype(np.int64),
        np.array([index.name(row).decode("utf-8", errors="backslashreplace") for row in order.tolist()], dtype=np.str_),
        tuple(index.classes),
        len(wanted),
        of,
    )
    dist.together(lambda: _keep(features, path))
    return features


def check(trained: Trained, layer: Layer, side: int) -> None:
    """Refuse what a network cannot do, before any image is looked at.

    Raises:
        RecipeError: it has no such layer, or does not take images of this side.
    """
    if layer not in trained.backbone.layers:
        has = ", ".join(trained.backbone.layers)
        raise RecipeError(f"{trained.source}: has no layer '{layer}', expected one of {has}")
    try:
        trained.backbone.check_side(side)
    except ValueError as error:
        raise RecipeError(f"data.eval_view.size: {error}") from None


def _of_rank(
    trained: Trained,
    data: DataConfig,
    index: Index,
    rows: Sequence[int],
    layer: Layer,
    world: World,
    bad: dict[str, str],
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Features and rows of this rank's share, on the host."""
    mine = len(range(world.rank, len(rows), world.world_size))
    array: NDArray[np.float32] | None = None
    found, done = np.zeros(mine, dtype=np.int64), 0
    with torch.no_grad():
        images = batches(data, index, rows, world, bad=bad)
        for part in parts(lambda x: trained.backbone.layer(layer, x), images):
            if array is None:  # one piece of memory from the start, not twice as much at the end
                array = np.empty((mine, part.array.shape[1]), dtype=np.float32)
            end = done + len(part.rows)
            array[done:end], found[done:end] = part.array.float().cpu().numpy(), part.rows.numpy()
            done = end
    return (np.zeros((0, 0), dtype=np.float32) if array is None else array[:done]), found[:done]


def _on_main(
    array: NDArray[np.float32], rows: list[NDArray[np.int64]], order: NDArray[np.int64], world: World
) -> NDArray[np.float32] | None:
    """Features of all ranks on rank 0, in order; piece by piece, so that no other rank ever holds them all."""
    if len(rows) == 1 and np.array_equal(rows[0], order):
        return array
    width = max(dist.gather_objects(array.shape[1]))
    array = array if len(array) else np.zeros((0, width), dtype=np.float32)  # a rank without images
    whole = np.empty((len(order), width), dtype=np.float32) if world.is_main else None
    for first in range(0, max(map(len, rows)), _CHUNK):
        piece = dist.gather_rows(torch.from_numpy(array[first : first + _CHUNK]).to(world.device))
        if whole is not None:
            places = np.searchsorted(order, np.concatenate([of_rank[first : first + _CHUNK] for of_rank in rows]))
            whole[places] = piece.cpu().numpy()
    return whole


def _cached(path: Path, of: dict[str, Any]) -> Features | None:
    try:
        found = Features.load(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logger.warning(f"{error}; made anew")
        return None
    if found.of != of:
        logger.warning(f"{path}: is of something else than its name says; made anew")
        return None
    logger.info(f"{path}: {len(found.rows):,} features, as they were")
    return found


def _keep(features: Features, path: Path | None) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        features.save(path)


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def data_of(
    trained: Trained, changes: Sequence[str] = (), *, val: Path | None = None, device: str = "auto"
) -> DataConfig:
    """How to read images as a network's evaluations do: its view and normalization, the back end that is fastest here.

    Args:
        changes: `data.key=value`, as on the command line of a run: `data.val=photos`, `data.eval_view={crop: whole}`.
        val: images to look at, if not named there.
        device: as `run.device`: what reads files fastest depends on it.

    Raises:
        RecipeError: a key or value that `data` cannot take.
    """
    own, content = (trained.recipe.data if trained.recipe else None), {}
    names_files = val is not None or any(change.startswith(("data.val=", "data.train=")) for change in changes)
    if own is not None and not names_files:
        content = own.model_dump(mode="json", include={"labels", "quarantine"})
        if not own.options.reads_files:
            content |= {"backend": own.backend, "options": own.options.model_dump(mode="json")}
    if own is not None:
        content |= own.model_dump(mode="json", include={"train", "val", "max_pixels", "eval_batch"})
    else:
        content["eval_batch"] = 64  # for 224 pixels on a CPU
    content |= {"mean": trained.mean, "std": trained.std, "eval_view": trained.view.model_dump(mode="json")}
    section = {"data": json.loads(json.dumps(content)) | ({} if val is None else {"val": str(val)})}
    for change in changes:
        if not change.startswith("data."):
            raise RecipeError(f"override {change!r}: expected data.key=value")
        strict_yaml.override(section, change)
    section["data"] |= {"batch_size": 1, "micro_batch": 1, "views": [{"crop": "whole", "size": 1}]}  # of training
    return recipes.resolve_data(section["data"], trained.source, device=device)


# ------------------------------------------------------------------------------------------------ neighbors


def nearest(
    array: NDArray[np.float32], queries: Sequence[int], count: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The nearest of all other rows by cosine.

    Args:
        array: features [N, D].
        queries: Q rows of it.
        count: K, at most N - 1.

    Returns:
        Rows [Q, K] and cosine distances [Q, K], nearest first.
    """
    unit = F.normalize(torch.from_numpy(array[list(queries)]), dim=1)
    cosine = torch.cat(
        [unit @ F.normalize(torch.from_numpy(array[at : at + _CHUNK]), dim=1).T for at in range(0, len(array), _CHUNK)],
        dim=1,
    )
    cosine[torch.arange(len(unit)), torch.as_tensor(list(queries))] = -torch.inf
    found = cosine.topk(min(count, len(array) - 1), dim=1)
    return found.indices.numpy(), (1 - found.values).numpy()


def pixels_of(data: DataConfig, index: Index, rows: Sequence[int]) -> NDArray[np.uint8]:
    """Some images as evaluations see them, uint8 [n, size, size, 3].

    Raises:
        DataError: one of them cannot be decoded.
        LoaderError: they cannot be read.
    """
    bad: dict[str, str] = {}
    views = [to_pixels(batch.views[0], data.mean, data.std) for batch in batches(data, index, rows, ALONE, bad=bad)]
    for path, reason in bad.items():
        raise DataError(f"{path}: {reason}")
    return torch.cat(views).numpy()
