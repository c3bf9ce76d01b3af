"""Back end `dali`: NVIDIA DALI reads, decodes once and cuts every view; on a CPU, or on a GPU with `mixed` decoding.

Our sampler's order and windows are fed to it batch by batch, so it has no reader, shuffling or random state of
its own. An image that DALI cannot decode is decoded, or replaced, on the host as in the `folder` back end.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from loaders import contract
from loaders.contract import CropMemory, HostBatch, Order
from loaders.errors import BadImage, DataError
from loaders.host import Sample, gather, load_row
from loaders.index import Index
from loaders.sampler import Plan, Stream

# Formats (as Pillow names them) that DALI is given. Others are decoded on the host: DALI 2.4 does not always survive
# an unknown one, a GIF was seen to end the process.
_FORMATS = [b"JPEG", b"MPO", b"PNG", b"BMP", b"TIFF", b"PPM", b"WEBP"]


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
        """Whether it runs on each device."""
        devices = {"CPU": None, **({"GPU": 0} if torch.cuda.is_available() else {})}
        return ", ".join(f"on the {name} {try_device(device)}" for name, device in devices.items())

    @classmethod
    def versions(cls) -> dict[str, str]:
        """Of the wheels of DALI that are installed."""
        versions = {}
        for package in ("nvidia-dali-cuda120", "nvidia-dali-cuda130"):
            with contextlib.suppress(metadata.PackageNotFoundError):
                versions[package] = metadata.version(package)
        return versions

    def batches(self, order: Order) -> Iterator[HostBatch]:
        """See `contract.Options`."""
        if problem := self.missing():
            raise DataError(f"data.backend: {problem}")
        return _Batches(order, self)


def try_device(device_id: int | None) -> str:
    """Run the smallest pipeline on a GPU, or on the CPU (None): "works (version)" or how it fails."""
    from nvidia import dali

    fn = _untyped(dali.fn)
    try:
        pipeline = dali.Pipeline(batch_size=1, num_threads=1, device_id=device_id)
        with pipeline:
            pipeline.set_outputs(fn.constant(idata=1))
        pipeline.build()
        pipeline.run()
    except RuntimeError as error:
        return f"FAILS: {str(error).splitlines()[0][:160]}"
    return f"works ({dali.__version__})"


class _Work(NamedTuple):
    positions: list[int]
    plan: Plan
    rows: list[int]  # those of its rows that DALI does; the host does the others


class _Batches:
    def __init__(self, order: Order, options: Options) -> None:
        self.stream, self.replace, self.workers = order.stream, order.replace, max(order.workers, 1)
        self.device, self.options = order.device, options
        self._positions, self._memory = iter(order.positions), CropMemory(order.stream)
        self._fed: deque[_Work] = deque()
        # What becomes of a row does not depend on when its image was found bad: the whole batch is then done
        # again without it, so a resumed run gets the same pixels.
        index = self.stream.index
        foreign = np.flatnonzero(~np.isin(index.format, _FORMATS))
        self._host_only = {*index.problems, *foreign.tolist()}
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
            except RuntimeError as error:
                self._exclude(self._culprits(work, error))
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

    def _plan(self, positions: list[int]) -> _Work:
        plan = self.stream.plan(positions)
        rows = [row for row, image in enumerate(plan.image.tolist()) if image not in self._host_only]
        return _Work(positions, plan, rows)

    def _feed(self, works: list[_Work]) -> None:
        self._fed.extend(works)
        feeds = [work for work in works if work.rows]
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
            # As the reference decodes: EXIF orientation is not applied. Fancy upsampling makes the GPU's decoder
            # agree with libjpeg-turbo, which always does it.
            width, height = self._usual_size()
            gpu_options = {
                "hw_decoder_load": self.options.hw_decoder_load,
                "jpeg_fancy_upsampling": True,
                "preallocate_width_hint": width,
                "preallocate_height_hint": height,
            }
            shape = fn.peek_image_shape(content, adjust_orientation=False)  # height, width, channels
            # Only what the windows can see is decoded. The limits are for an image that has shrunk since it was
            # indexed: DALI would read past its end. `_take` discards the result.
            sides = fn.cast(shape[:2], dtype=types.INT32)
            first = math.min(fn.external_source(name="start", dtype=types.INT32, ndim=1), sides - 1)
            last = math.max(math.min(fn.external_source(name="end", dtype=types.INT32, ndim=1), sides), first + 1)
            region = fn.cast(last - first, dtype=types.FLOAT)
            image = fn.decoders.image_slice(
                content,
                start=first,
                end=last,
                axes=[0, 1],
                device="mixed" if on_gpu else "cpu",
                output_type=types.RGB,
                adjust_orientation=False,
                **(gpu_options if on_gpu else {}),
            )
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
            pipeline.set_outputs(*crops, shape)
        pipeline.build()
        return pipeline

    def _usual_size(self) -> tuple[int, int]:
        """Width and height that the GPU's decoders allocate for at the start: without it their memory creeps up with
        each larger image until there is none. A few giants are left out of the count."""
        index = self.stream.index
        return tuple(int(np.quantile(sides, 0.999)) for sides in (index.width, index.height))  # type: ignore[return-value]

    def _take(self, work: _Work) -> tuple[list[Tensor], list[int]]:
        """The next crops of the pipeline, G x uint8 [k, rows, size, size, 3] on the device, and the images among them
        that are no longer of the size that was indexed, so that their windows mean nothing."""
        on_gpu = self.device.type == "cuda"
        stream = torch.cuda.current_stream(self.device) if on_gpu else None
        *outputs, shapes = self._pipeline.share_outputs(cuda_stream=stream)
        count = len(work.rows)
        if on_gpu:
            crop_shapes = self._memory.shapes(count)
            crops = [torch.empty(shape, dtype=torch.uint8, device=self.device) for shape in crop_shapes]
        else:
            crops = self._memory.crops(count)
        of_views = [view for crop in crops for view in crop]
        for view, output in zip(of_views, outputs, strict=True):
            # A copy, though DALI says that its buffers outlive their release: not past the end of their pipeline.
            view.copy_(torch.from_dlpack(output.as_tensor()))
        sizes = np.array(shapes.as_tensor())[:, :2]  # [rows, 2]: height, width
        self._pipeline.release_outputs()
        images = work.plan.image[work.rows]
        indexed = np.stack((self.stream.index.height[images], self.stream.index.width[images]), axis=1)
        return crops, images[(sizes != indexed).any(axis=1)].tolist()

    def _culprits(self, work: _Work, error: RuntimeError) -> list[int]:
        """The images of a failed batch that DALI cannot do."""
        culprits = []
        for row in work.rows:
            alone = self._build(1, depth=1)
            try:
                _feed(alone, self.stream, work.plan, [row])
                alone.schedule_run()
                alone.share_outputs()
            except RuntimeError:
                culprits.append(int(work.plan.image[row]))
        if not culprits:
            raise error  # not an image's fault: out of memory, say
        return culprits

    def _exclude(self, images: list[int]) -> None:
        """Leave images to the host, and feed all that was in flight again."""
        self._host_only.update(images)
        self._pipeline = None  # what was in flight went with it
        again = [self._plan(work.positions) for work in self._fed]
        self._fed.clear()
        self._feed(again)

    def _assemble(self, work: _Work, crops: list[Tensor]) -> HostBatch:
        plan, stream = work.plan, self.stream
        if len(work.rows) == len(work.positions):
            return HostBatch.of(stream, plan.image, plan.color, crops, [])
        bad: list[tuple[str, str]] = []
        done = {row: number for number, row in enumerate(work.rows)}
        of_views = [view for crop in crops for view in crop]  # V x [rows, size, size, 3]
        samples: list[Sample] = []
        for row, position in enumerate(work.positions):
            if row in done:
                cuts = [view[done[row]] for view in of_views]
                samples.append(Sample(int(plan.image[row]), plan.color[row], cuts))
            elif sample := load_row(stream, plan, row, position, replace=self.replace, bad=bad):
                samples.append(sample)
        batch = gather(stream, samples, bad)
        return batch._replace(crops=[crop.to(self.device) for crop in batch.crops])


def _untyped(module: Any) -> Any:
    return module


def _feed(pipeline: Any, stream: Stream, plan: Plan, rows: list[int]) -> None:
    index, images = stream.index, plan.image[rows].tolist()
    if index.pieces is None:
        content = [index.location(image)[0] for image in images]
    else:
        content = [_content(index, image) for image in images]
    pipeline.feed_input("content", [np.frombuffer(item, dtype=np.uint8) for item in content])
    # Only what the windows can see is decoded.
    sees = plan.sees[rows].astype(np.int32)  # [rows, V, 4]
    start, end = sees[:, :, :2].min(axis=1), sees[:, :, 2:].max(axis=1)
    pipeline.feed_input("start", start)
    pipeline.feed_input("end", end)
    for number in range(len(stream.views)):
        window = plan.windows[rows, number]  # [rows, 4]: top, left, height, width
        first, last = window[:, :2] - start, window[:, :2] + window[:, 2:] - start
        flips = plan.flip[rows, number]
        first[flips, 1], last[flips, 1] = last[flips, 1], first[flips, 1]
        pipeline.feed_input(f"start{number}", first.astype(np.float32))
        pipeline.feed_input(f"end{number}", last.astype(np.float32))


def _content(index: Index, image: int) -> bytes:
    try:
        return index.content(image)
    except BadImage:
        return b"\0"  # what DALI cannot decode, so that the host gets to say what is wrong
