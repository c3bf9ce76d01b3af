"""Back end `dali`: NVIDIA DALI reads, decodes once and cuts every view; on a CPU, or on a GPU with `mixed` decoding.

Our sampler's order and windows are fed to it batch by batch, so it has no reader, shuffling or random state of
its own. It is given JPEGs alone; other images, and those that it cannot decode, are decoded or replaced on the host
as in the `folder` back end. Whether a JPEG is bad does not depend on what its windows see (`loaders.decode`).
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torchvision.io import encode_jpeg

from loaders import contract
from loaders.contract import CropMemory, HostBatch, Order, on_device
from loaders.dali_probe import probe
from loaders.decode import JPEG_END, JPEGS, is_cut_short, jpeg_frame
from loaders.errors import BadImage, DataError, LoaderError, starting
from loaders.host import Row, Sample, gather, load_row
from loaders.index import Index
from loaders.sampler import Plan, Stream

_NVJPEG = {"nvidia-dali-cuda120": "nvidia-nvjpeg-cu12", "nvidia-dali-cuda130": "nvidia-nvjpeg"}
"""Wheels of DALI -> those of the nvJPEG that each brings."""
# Words of errors that tell of the machine. There are others: a picture that certainly can be decoded is the judge.
_OF_THE_MACHINE = re.compile(
    r"CUDA (?:runtime|driver) API error|CUDA is not available|requires a CUDA-capable|version is insufficient"
    r"|Can't allocate|allocation failed|bad_alloc|out of memory|Insufficient memory|libcuda|nvml|CUDA Runtime failure",
    re.IGNORECASE,
)
CPU = torch.device("cpu")
logger = logging.getLogger("burn.loaders")


class Options(contract.Options):
    """`data.options` of this back end."""

    prefetch: int = Field(default=2, ge=1)
    """Micro-batches that DALI works on ahead of the one in use."""
    hw_decoder_load: float = Field(default=0.9, ge=0, le=1)
    """GPU only: share of a batch that the hardware JPEG decoder takes, where the GPU has one."""

    @classmethod
    def missing(cls) -> str:
        """DALI is optional."""
        try:
            import nvidia.dali  # noqa: F401
        except ImportError as error:
            return (
                f"dali needs NVIDIA DALI, which is not installed ({error}); run `pip install nvidia-dali-cuda120` "
                "(nvidia-dali-cuda130 for CUDA 13), or set data.backend=folder"
            )
        return ""

    @classmethod
    def preference(cls, on_gpu: bool, root: Path | None) -> int:
        """The first choice where a GPU decodes."""
        return 3 if on_gpu else 0

    @classmethod
    def about(cls) -> str:
        """What decodes on each device."""
        gpu = {"GPU": torch.device("cuda", 0)} if torch.cuda.is_available() else {}
        return "; ".join(f"on the {name} {probe(device)}" for name, device in {"CPU": CPU, **gpu}.items())

    def notes(self, device: torch.device) -> list[str]:
        """What decodes on the GPU: a slow decoder is no error, and easily missed."""
        return [f"loader dali: on {device} {probe(device)}"] if device.type == "cuda" else []

    @classmethod
    def versions(cls) -> dict[str, str]:
        """Of the wheels of DALI that are installed."""
        versions = {}
        for package in (*_NVJPEG, *_NVJPEG.values()):
            with contextlib.suppress(metadata.PackageNotFoundError):
                versions[package] = metadata.version(package)
        return versions

    def batches(self, order: Order) -> Iterator[HostBatch]:
        """See `contract.Options`."""
        if problem := self.missing():
            raise DataError(f"data.backend: {problem}")
        return _Batches(order, self)


def decodes_regions() -> bool:
    """Whether nvJPEG may decode a part of an image on a GPU as libjpeg-turbo would decode the whole.

    Before nvJPEG 13.2 nvImageCodec hands a region of an image with subsampled colors to the host if it is to be
    upsampled as libjpeg does it ("fancy"). Most photographs are of that kind.
    """
    versions = Options.versions()
    for dali, nvjpeg in _NVJPEG.items():
        if dali in versions and nvjpeg in versions:
            return tuple(int(part) for part in versions[nvjpeg].split(".")[:2]) >= (13, 2)
    return False


class _Failed(Exception):
    """DALI did not do a batch; its cause is DALI's error."""


class _Work(NamedTuple):
    positions: list[int]
    plan: Plan
    rows: list[int]  # those of its rows that DALI does
    others: dict[int, Future[Row]]  # those that the host does


class _Batches:
    def __init__(self, order: Order, options: Options) -> None:
        self.stream, self.replace, self.workers = order.stream, order.replace, max(order.workers, 1)
        self.device, self.options = order.device, options
        self._positions, self._memory = iter(order.positions), CropMemory(order.stream)
        self._fed: deque[_Work] = deque()
        # What becomes of a row does not depend on when its image was found bad: the whole batch is then done
        # again without it, so a resumed run gets the same pixels.
        self._host_only: set[int] = set(self.stream.index.problems)
        self._whole: set[int] = set()  # images with something behind their end
        self._refused = 0  # images that DALI was given and could not decode
        self._host = ThreadPoolExecutor(self.workers, thread_name_prefix="dali host")
        self._pipeline: Any = None
        self._batch_size = 0

    def __iter__(self) -> Iterator[HostBatch]:
        return self

    def __next__(self) -> HostBatch:
        wanted = self.options.prefetch + 1 - len(self._fed)
        self._feed([self._plan(positions) for positions in islice(self._positions, wanted)])
        if not self._fed:
            raise StopIteration
        while True:
            work = self._fed[0]
            try:
                views, changed = self._take(work) if work.rows else ([], [])
            except _Failed as error:
                self._refuse(self._culprits(work, error.__cause__))
                continue
            if changed:
                self._exclude(changed)
                continue
            self._fed.popleft()
            return self._assemble(work, views)

    def close(self) -> None:
        """Drop the pipeline with its threads and memory."""
        self._pipeline = None
        self._fed.clear()
        self._host.shutdown(wait=True, cancel_futures=True)

    def _plan(self, positions: list[int]) -> _Work:
        plan = self.stream.plan(positions)
        is_jpeg = np.isin(self.stream.index.format[plan.image], JPEGS).tolist()
        images = plan.image.tolist()
        rows = [row for row, image in enumerate(images) if is_jpeg[row] and image not in self._host_only]
        with starting(f"{self.workers} threads"):
            others = {
                row: self._host.submit(load_row, self.stream, plan, row, positions[row], replace=self.replace)
                for row in sorted({*range(len(positions))} - {*rows})
            }
        return _Work(positions, plan, rows, others)

    def _feed(self, works: list[_Work]) -> None:
        self._fed.extend(works)
        feeds = [work for work in works if work.rows]
        try:
            if self._pipeline is None and feeds:
                # DALI's first `schedule_run` starts as many runs as its queue is deep: all of them need their input.
                self._batch_size = max(self._batch_size, *(len(work.positions) for work in feeds), 1)
                self._pipeline = self._build(self._batch_size, depth=len(feeds))
                for work in feeds:
                    _feed(self._pipeline, self.stream, work.plan, work.rows)
                self._pipeline.schedule_run()
                return
            for work in feeds:
                _feed(self._pipeline, self.stream, work.plan, work.rows)
                self._pipeline.schedule_run()
        except RuntimeError as error:  # images fail where their batch is taken
            raise _fault(error) from error

    def _build(self, batch_size: int, depth: int) -> Any:
        from nvidia import dali
        from nvidia.dali import math

        fn, types = _untyped(dali.fn), _untyped(dali.types)  # their stubs do not know all that they hold

        on_gpu = self.device.type == "cuda"
        pipeline = dali.Pipeline(
            batch_size=batch_size,
            num_threads=self.workers,
            device_id=(self.device.index or 0) if on_gpu else None,
            exec_dynamic=True,
            prefetch_queue_depth=depth,
        )
        filters = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}
        with pipeline:
            content = fn.external_source(name="content", dtype=types.UINT8, ndim=1)
            if self.stream.index.pieces is None:
                content = fn.io.file.read(content)  # the content of what is fed is a path
            shape = fn.peek_image_shape(content, adjust_orientation=False)  # height, width, channels
            # Only what the windows can see is decoded. The limits are for an image that has shrunk since it was
            # indexed: DALI would read past its end. `_take` discards the result.
            sides = fn.cast(shape[:2], dtype=types.INT32)
            first = math.min(fn.external_source(name="start", dtype=types.INT32, ndim=1), sides - 1)
            last = math.max(math.min(fn.external_source(name="end", dtype=types.INT32, ndim=1), sides), first + 1)
            region = fn.cast(last - first, dtype=types.FLOAT)
            # As the reference decodes: EXIF orientation is not applied. Fancy upsampling makes the GPU's decoders agree
            # with libjpeg-turbo, which always does it.
            how: dict[str, Any] = {"output_type": types.RGB, "adjust_orientation": False, "device": "cpu"}
            if on_gpu:
                width, height = self._usual_size()
                how |= {
                    "device": "mixed",
                    "hw_decoder_load": self.options.hw_decoder_load,
                    "jpeg_fancy_upsampling": True,
                    "preallocate_width_hint": width,
                    "preallocate_height_hint": height,
                }
            if on_gpu and not decodes_regions():
                image = fn.slice(fn.decoders.image(content, **how), start=first, end=last, axes=[0, 1])
            else:
                image = fn.decoders.image_slice(content, start=first, end=last, axes=[0, 1], **how)
            crops = []
            for number, view in enumerate(self.stream.views):
                start = fn.external_source(name=f"start{number}", dtype=types.FLOAT, ndim=1)
                end = fn.external_source(name=f"end{number}", dtype=types.FLOAT, ndim=1)
                crops.append(
                    fn.resize(
                        image,
                        size=[view.size, view.size],
                        # A window whose ends are swapped comes out mirrored, at no cost.
                        roi_start=math.min(start, region),
                        roi_end=math.min(end, region),
                        interp_type=filters[view.interpolation],
                        antialias=True,
                    )
                )
            pipeline.set_outputs(*crops, shape, content[-2:])
        pipeline.build()
        return pipeline

    def _usual_size(self) -> tuple[int, int]:
        """Width and height that the GPU's decoders allocate for at the start: without it their memory creeps up with
        each larger image until there is none. One image in a hundred may be larger."""
        index = self.stream.index
        some = slice(None, None, -(-len(index) // 100_000))
        width, height = (int(np.quantile(sides[some], 0.99)) for sides in (index.width, index.height))
        return width, height

    def _take(self, work: _Work) -> tuple[list[Tensor], list[int]]:
        """The next crops of the pipeline, G x uint8 [k, rows, size, size, 3] on the device, and the images among them
        that the host has to judge: no longer of the size that was indexed, so that their windows mean nothing, or
        cut short, which DALI only sees where a window reaches the cut."""
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        try:
            *outputs, shapes, ends = self._pipeline.share_outputs(cuda_stream=stream)
        except RuntimeError as error:
            raise _Failed from error
        # A copy, though DALI says that its buffers outlive their release: not past the end of their pipeline.
        theirs = [torch.from_dlpack(output.as_tensor()) for output in outputs]
        crops = self._memory.crops(len(work.rows), theirs[0].device)
        for view, output in zip((view for crop in crops for view in crop), theirs, strict=True):
            view.copy_(output)
        sizes, end = np.array(shapes.as_tensor())[:, :2], np.array(ends.as_tensor())  # [rows, 2]: height, width; bytes
        self._pipeline.release_outputs()
        images = work.plan.image[work.rows]
        indexed = np.stack((self.stream.index.height[images], self.stream.index.width[images]), axis=1)
        doubtful = (sizes != indexed).any(axis=1)
        has_end = (end == np.frombuffer(JPEG_END, dtype=np.uint8)).all(axis=1)
        doubtful |= [
            not sound and self._is_cut_short(image) for image, sound in zip(images.tolist(), has_end, strict=True)
        ]
        return crops, images[doubtful].tolist()

    def _is_cut_short(self, image: int) -> bool:
        """Whether a JPEG that does not end as one has no end at all; cameras put more behind it."""
        if image in self._whole:
            return False
        content = _content(self.stream.index, image)
        frame = jpeg_frame(content)
        if frame is None or is_cut_short(content, frame):
            return True
        self._whole.add(image)
        return False

    def _culprits(self, work: _Work, error: BaseException | None) -> list[int]:
        """The images of a failed batch that DALI cannot do.

        Raises:
            LoaderError: it cannot do an image either that it can do, so it is no image's fault.
        """
        culprits = []
        with tempfile.NamedTemporaryFile(suffix=".jpg") as file:
            file.write(_good_image())
            file.flush()
            good = os.fsencode(file.name) if self.stream.index.pieces is None else _good_image()
            alone = self._build_for_one()
            for row in work.rows:
                why = _why_failed(alone, lambda: _feed(alone, self.stream, work.plan, [row]))  # noqa: B023
                if why is None:
                    continue
                if any(map(_OF_THE_MACHINE.search, _said(why))):
                    raise _fault(why) from why
                culprits.append(int(work.plan.image[row]))
                if _why_failed(alone, lambda: _feed_good(alone, self.stream, good)) is not None:  # noqa: B023
                    alone = self._build_for_one()  # DALI promises nothing for a pipeline that has failed
                    if still := _why_failed(alone, lambda: _feed_good(alone, self.stream, good)):  # noqa: B023
                        raise _fault(still) from still
        if not culprits:
            raise _fault(error) from error
        return culprits

    def _build_for_one(self) -> Any:
        try:
            return self._build(1, depth=1)
        except RuntimeError as error:
            raise _fault(error) from error

    def _refuse(self, images: list[int]) -> None:
        """Leave images that DALI cannot do to the host, and say so: it is slow if there are many."""
        for image in images:
            self._refused += 1
            if str(self._refused).strip("0") == "1":  # 1, 10, 100, ...
                path = self.stream.index.path(image)
                logger.warning(f"DALI cannot decode {self._refused} image(s) so far, the host does it; now {path}")
        self._exclude(images)

    def _exclude(self, images: list[int]) -> None:
        """Leave images to the host, and feed all that was in flight again."""
        self._host_only.update(images)
        self._pipeline = None  # what was in flight went with it
        again = [self._plan(work.positions) for work in self._fed]
        self._fed.clear()
        self._feed(again)

    def _assemble(self, work: _Work, crops: list[Tensor]) -> HostBatch:
        plan, stream = work.plan, self.stream
        if not work.others:
            return HostBatch.of(stream, plan.image, plan.color, crops, [])
        done = {row: number for number, row in enumerate(work.rows)}
        of_views = [view for crop in crops for view in crop]  # V x [rows, size, size, 3]
        rows: list[Row] = []
        for row in range(len(work.positions)):
            if row in done:
                cuts = [view[done[row]] for view in of_views]
                rows.append(Row(Sample(int(plan.image[row]), plan.color[row], cuts), []))
                continue
            found = work.others[row].result()
            if found.sample:
                cuts = [on_device(cut, self.device) for cut in found.sample.crops]
                found = found._replace(sample=found.sample._replace(crops=cuts))
            rows.append(found)
        return gather(stream, rows)


def _untyped(module: Any) -> Any:
    return module


def _why_failed(pipeline: Any, feed: Callable[[], None]) -> RuntimeError | None:
    """Run one batch of a pipeline; DALI's error, None where it was done."""
    try:
        feed()
        pipeline.schedule_run()
        pipeline.share_outputs()
        pipeline.release_outputs()
    except RuntimeError as error:
        return error
    return None


def _said(error: BaseException | None) -> list[str]:
    """Lines of an error of DALI, without those of its traceback, whose paths may hold any word."""
    lines = (line.strip() for line in str(error).splitlines())
    return [line for line in lines if line and not line.startswith("File ")]


def _fault(error: BaseException | None) -> LoaderError:
    lines = _said(error)
    said = next((line for line in lines if _OF_THE_MACHINE.search(line)), lines[0] if lines else "no reason")
    return LoaderError(f"data.backend=dali: DALI fails, and not for an image: {said[:200]}")


@functools.cache
def _good_image() -> bytes:
    """A JPEG that can be decoded."""
    return encode_jpeg(torch.full((3, 16, 16), 128, dtype=torch.uint8)).numpy().tobytes()


def _feed_good(pipeline: Any, stream: Stream, content: bytes) -> None:
    whole = np.array([[16, 16]])
    _feed_windows(pipeline, [content], whole * 0, whole, [(whole * 0, whole)] * len(stream.views))


def _feed(pipeline: Any, stream: Stream, plan: Plan, rows: list[int]) -> None:
    index, images = stream.index, plan.image[rows].tolist()
    if index.pieces is None:
        content = [index.location(image)[0] for image in images]
    else:
        content = [_content(index, image) for image in images]
    # Only what the windows can see is decoded.
    sees = plan.sees[rows].astype(np.int32)  # [rows, V, 4]
    start, end = sees[:, :, :2].min(axis=1), sees[:, :, 2:].max(axis=1)
    windows = []
    for number in range(len(stream.views)):
        window = plan.windows[rows, number]  # [rows, 4]: top, left, height, width
        first, last = window[:, :2] - start, window[:, :2] + window[:, 2:] - start
        flips = plan.flip[rows, number]
        first[flips, 1], last[flips, 1] = last[flips, 1], first[flips, 1]
        windows.append((first, last))
    _feed_windows(pipeline, content, start, end, windows)


def _feed_windows(pipeline: Any, content: list[bytes], start: Any, end: Any, windows: list[tuple[Any, Any]]) -> None:
    """One batch: paths or bytes, what is decoded of each image [rows, 2] to [rows, 2], and the window of each view in
    that, whose ends are swapped where it is mirrored."""
    pipeline.feed_input("content", [np.frombuffer(item, dtype=np.uint8) for item in content])
    pipeline.feed_input("start", start.astype(np.int32))
    pipeline.feed_input("end", end.astype(np.int32))
    for number, (first, last) in enumerate(windows):
        pipeline.feed_input(f"start{number}", first.astype(np.float32))
        pipeline.feed_input(f"end{number}", last.astype(np.float32))


def _content(index: Index, image: int) -> bytes:
    try:
        return index.content(image)
    except BadImage:
        return b"\0"  # what DALI cannot decode, so that the host gets to say what is wrong
