"""Splits of a PASCAL VOC development kit, with the objects of each image."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from loaders import voc
from loaders.config import Request
from loaders.index import Index, Names
from loaders.sources.folders import index_of

WHAT = "splits of a PASCAL VOC development kit"


def claims(root: Path) -> bool:
    """By the `#` in its name."""
    return voc.is_kit(root)


def open_index(root: Path, request: Request) -> Index:
    """Rows in the order of the splits, then of the ids; objects where somebody asks for labels. No image has one label.

    Raises:
        DataError: a list or an annotation is missing, damaged, or does not fit its image.
    """
    base = voc.kit_of(root)
    names = Names.of(os.fsencode(name) for name in voc.image_names(root))
    index = index_of(root, base, names, None, [], "images of a PASCAL VOC development kit", request)
    if request.labels == "none" or not request.asks_labels:
        return index
    # Half a set is noticed by `data.expect_images`; who measures with its labels checks more.
    scenes = voc.read(root, any_counts=True)
    objects = voc.read_objects(scenes, index)
    reading = f"{index.reading}, {len(objects.label):,} objects of {len(scenes.classes)} classes"
    return replace(index, classes=scenes.classes, objects=objects, reading=reading, file=None)
