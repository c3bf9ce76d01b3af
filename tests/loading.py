"""Loaders over small data sets, for the tests of back ends and sources."""

import argparse
from pathlib import Path

import pytest
import torch

import loaders
from loaders import DataConfig, Place
from loaders.views import View
from tests.processes import tool

CPU = torch.device("cpu")
BACKENDS = [name for name in loaders.backends() if not loaders.load(name).Options().gives_boxes]
FILES = [  # read the files of a folder
    name
    for name in BACKENDS
    if (options := loaders.load(name).Options).reads_files and not options.refuses(Path("folder"))
]
VIEWS = (
    View.model_validate({"preset": "burn", "size": 24}),
    View.model_validate({"preset": "crop_flip", "size": 16}),
)
CENTER = View.model_validate({"preset": "validation", "size": 24, "resize": 28})


def needs(*names):
    for name in names:
        if reason := loaders.load(name).Options.missing():
            pytest.skip(reason)


def as_beton(root, **options):
    """The same images as one file, made once for each set of options."""
    path = root.with_name(f"{root.name}{'-'.join(f'{k}{v}' for k, v in options.items())}.beton")
    if not path.exists():
        convert(root, path, **options)
    return path


def config(backend, root=None, **changes):
    options = loaders.load(backend).Options
    if backend == "ffcv" and root.suffix != ".beton":
        root = as_beton(root)
    values = {
        "backend": backend,
        "train": str(root),
        "val": str(root),
        "batch_size": 8,
        "micro_batch": 4,
        "views": VIEWS,
        "eval_view": CENTER,
        "eval_batch": 5,
        "on_bad_image": "replace",
        "workers": 2,
        "options": options(num_images=24, side=32) if backend == "synthetic" else options(),
    }
    return DataConfig(**{**values, **changes})


def open_train(data, *, step=0, rank=0, world_size=1, seed=7, device=CPU):
    place = Place(rank, world_size, device=device)
    return loaders.open_train(data, loaders.open_data(data, "train"), seed=seed, step=step, place=place)


def take(loader, count):
    try:
        return [next(loader) for _ in range(count)]
    finally:
        loader.close()


def open_eval(data, rank=0, world_size=1):
    return loaders.open_eval(data, loaders.open_data(data, "val"), place=Place(rank, world_size))


def convert(source, out, **options):
    """tools/convert_imagenet_to_ffcv.py with its defaults."""
    given = {
        "source": source, "out": out, "mode": "jpg", "max_side": 500, "quality": 90, "reencode": False,
        "raw_share": 0.5, "smart_kib": 360, "on_bad_image": "stop", "quarantine": None, "max_pixels": 10**8,
        "page_mib": 2, "workers": 2, "limit": None, "labels": None, **options,
    }  # fmt: skip
    return tool("convert_imagenet_to_ffcv").convert(argparse.Namespace(**given))


def equal(a, b):
    return (
        torch.equal(a.rows, b.rows)
        and torch.equal(a.label, b.label)
        and all(torch.equal(x, y) for x, y in zip(a.views, b.views, strict=True))
    )
