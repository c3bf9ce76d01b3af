"""The data: from files to augmented batches on the device. Imports torch and itself only.

What the engine and the tools use is named here; a back end is one file (`loaders.contract`), and so is a source of
images (`loaders.sources`).
"""

from loaders.errors import DataError, LoaderError
from loaders.features import FeatureCache
from loaders.index import Index, Objects
from loaders.loader import (
    AUTO,
    Batch,
    DataConfig,
    IndexPlace,
    Loader,
    Place,
    backends,
    choose,
    load,
    map_index,
    notes,
    on_noise,
    open_data,
    open_eval,
    open_fixed,
    open_resident,
    open_root,
    open_train,
    place_of,
    warnings,
    why_unusable,
    with_backend,
    workers_per_rank,
)
from loaders.order import VERSION as STREAM_VERSION

__all__ = [
    "AUTO",
    "STREAM_VERSION",
    "Batch",
    "DataConfig",
    "DataError",
    "FeatureCache",
    "Index",
    "IndexPlace",
    "Loader",
    "LoaderError",
    "Objects",
    "Place",
    "backends",
    "choose",
    "load",
    "map_index",
    "notes",
    "on_noise",
    "open_data",
    "open_eval",
    "open_fixed",
    "open_resident",
    "open_root",
    "open_train",
    "place_of",
    "warnings",
    "why_unusable",
    "with_backend",
    "workers_per_rank",
]
