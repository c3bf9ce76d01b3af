"""The file of a bit-packed binary network, version 1: written, and read with every check that a hostile file needs.

Little-endian. A header of 64 bytes, records of 32, metadata, then the arrays of each record in order; metadata and
arrays begin at multiples of 64, what lies between is zero, and the file ends at such a multiple.

| offset | bytes | |
|---|---|---|
| 0 | 8 | `89 'B' 'N' 'N' 0D 0A 1A 0A` |
| 8 | 2 + 2 | major version 1, minor 0 |
| 12 | 4 | CRC-32 of all bytes from 16 on |
| 16 | 8 | bytes of the file |
| 24 | 4 | bytes of metadata, at most 1 MiB |
| 28 | 2 + 2 | number of records; 0 |
| 32 | 4 + 4 | side of the images; outputs, the channels of the last layer |
| 40 | 24 | 0 |
| 64 | 32 each | records, see `Record` |

No offset, length or name is read from the file: records give the size of everything, and the end must be where header
and file say. Layers are a stem, half-blocks (at least one), the mean over the map, linear layers (or none). What each
computes is `runtime/reference.py`.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

STEM, HALF_BLOCK, MEAN, LINEAR = 1, 2, 3, 4
NO_RESIDUAL, SAME, POOLED, DOUBLED = 0, 1, 2, 3
FLOAT32, FLOAT16, INT8 = 0, 1, 2
RELU = 1

OPERATIONS = ("", "stem", "half-block", "mean", "linear")
RESIDUALS = ("none", "same", "pooled", "doubled")
NUMBER_TYPES = ("float32", "float16", "int8")

MAGIC = b"\x89BNN\r\n\x1a\n"
MAJOR, MINOR = 1, 0
ALIGNMENT = 64
MAX_METADATA = 1 << 20
MAX_DEPTH = 32  # of lists and objects in the metadata

_HEADER = struct.Struct("<8sHHIQIHHII24s")
_RECORD = struct.Struct("<8I")
_CHECKED_FROM = 16  # where the bytes begin that the CRC is of


class BnnError(ValueError):
    """A file, network or input that cannot be used; one line that says what was expected."""


class Record(NamedTuple):
    """One layer, as eight numbers of 32 bits; the constants above name their values.

    What a layer does not have is 0, and 1 for `kernel` and `stride`: a mean is
    `Record(MEAN, 1, 1, NO_RESIDUAL, C, C, FLOAT32, 0)`.
    """

    operation: int
    kernel: int  # 3 of a stem, 1 or 3 of a half-block
    stride: int  # 1 or 2
    residual: int  # of half-blocks; pooled with stride 2 alone, and the others with stride 1
    channels_in: int  # even in half-blocks, whose counters start at half of them
    channels_out: int
    number_type: int  # of a linear layer's weight
    flags: int  # RELU: of each linear layer but a classifier, which is the last


class Layer(NamedTuple):
    """A layer and its arrays, by name, in the order of the file.

    - stem: `weight` [ky, kx, c, o], `bias` [o], `threshold` [o] of the first signs, `table` [3, 256] of what each byte
      of an image stands for; float32.
    - half-block: `bits` [o, taps, ceil(c / 32)] uint32 (bit i of word j: channel 32 j + i; 1 is +1), `a`, `b`, `slope`,
      `shift` and `threshold` [o] float32, the last not after the last half-block.
    - mean: none.
    - linear: `weight` [o, i] in its number type, `scale` [o] float32 with int8 alone, `bias` [o] float32.
    """

    record: Record
    blobs: dict[str, NDArray[Any]]


class Network(NamedTuple):
    """A file's content. `metadata` is for people and Python: a JSON object that no layer depends on."""

    side: int
    outputs: int
    layers: list[Layer]
    metadata: dict[str, Any]

    @property
    def feature_layers(self) -> int:
        """How many layers give the features: all but a classifier, which is a last linear layer without ReLU."""
        last = self.layers[-1].record
        return len(self.layers) - (last.operation == LINEAR and not last.flags & RELU)


class Limits(NamedTuple):
    """What a reader takes on before it looks at the arrays."""

    side: int = 4096
    channels: int = 8192
    records: int = 512
    macs: int = 1 << 40
    """Multiply-accumulates of one image, binary ones included."""
    memory: int = 1 << 30
    """Bytes of the file, and of the arrays with the two maps of the largest layer in float32."""


DEFAULT = Limits()


def write(network: Network, path: Path) -> int:
    """Write a file and return its bytes; what was at `path` stays until the new file is whole.

    Raises:
        BnnError: what `read` would refuse; nothing is written.
        OSError: the file cannot be written.
    """
    content = to_bytes(network)
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(aside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    return len(content)


def to_bytes(network: Network) -> bytes:
    """The content of the file.

    Raises:
        BnnError: what `read` would refuse.
    """
    records = [layer.record for layer in network.layers]
    try:
        text = json.dumps(network.metadata, ensure_ascii=False, separators=(",", ":")).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise BnnError(f"metadata: {error}; expected what JSON can hold") from None
    try:
        packed = b"".join(_RECORD.pack(*record) for record in records)
        sizes = (len(text), len(records), 0, network.side, network.outputs, bytes(24))
        _HEADER.pack(MAGIC, MAJOR, MINOR, 0, 0, *sizes)
    except struct.error as error:
        raise BnnError(f"a number of the header or of a record does not fit: {error}") from None
    content = bytearray(_HEADER.size) + packed
    content += bytes(-len(content) % ALIGNMENT) + text
    for number, (layer, expected) in enumerate(
        zip(network.layers, _layout(records, network.side, DEFAULT), strict=True)
    ):
        if set(layer.blobs) != set(expected):
            raise BnnError(f"{_name(number, layer.record)}: has {sorted(layer.blobs)}, expected {sorted(expected)}")
        for name, (dtype, shape) in expected.items():
            blob = layer.blobs[name]
            if (blob.dtype.newbyteorder("<"), blob.shape) != (dtype, shape):
                raise BnnError(
                    f"{_name(number, layer.record)}: {name}: expected {dtype.name} {list(shape)}, "
                    f"got {blob.dtype} {list(blob.shape)}"
                )
            content += bytes(-len(content) % ALIGNMENT) + blob.astype(dtype, copy=False).tobytes()
    content += bytes(-len(content) % ALIGNMENT)
    content[: _HEADER.size] = _HEADER.pack(MAGIC, MAJOR, MINOR, 0, len(content), *sizes)
    content[12:16] = zlib.crc32(memoryview(content)[_CHECKED_FROM:]).to_bytes(4, "little")
    written = bytes(content)
    _parse(written, DEFAULT)
    return written


def read(source: Path | bytes, *, limits: Limits = DEFAULT) -> Network:
    """Read a file, or its content.

    The arrays are read-only views of the content.

    Raises:
        BnnError: it is not such a file, is damaged, breaks a rule of the format or exceeds `limits`.
        OSError: the file cannot be opened.
    """
    if isinstance(source, bytes):
        return _parse(source, limits)
    try:
        return _parse(content_of(source, limits=limits), limits)
    except BnnError as error:
        raise BnnError(f"{source}: {error}") from None


def content_of(path: Path, *, limits: Limits = DEFAULT) -> bytes:
    """The bytes of a file, unless they are too many.

    Raises:
        BnnError: it exceeds `limits`.
        OSError: the file cannot be opened.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > limits.memory:
            raise BnnError(f"has {size} bytes, at most {limits.memory} are read")
        return file.read(size + 1)


def check_images(images: NDArray[Any], side: int) -> None:
    """Refuse what is not a batch of images.

    Raises:
        BnnError: another shape or type than uint8 [B, side, side, 3] or float32 [B, 3, side, side].
    """
    if (images.dtype, *images.shape[1:]) not in ((np.uint8, side, side, 3), (np.float32, 3, side, side)):
        raise BnnError(
            f"images: expected uint8 [B, {side}, {side}, 3] or float32 [B, 3, {side}, {side}], "
            f"got {images.dtype} {list(images.shape)}"
        )


def _parse(content: bytes, limits: Limits) -> Network:
    if len(content) > limits.memory:
        raise BnnError(f"has {len(content)} bytes, at most {limits.memory} are read")
    if not content.startswith(MAGIC):
        if content.startswith(MAGIC[:4]):
            raise BnnError("was changed by a copy in text mode; copy it again as binary")
        raise BnnError("is not a binary network's file; expected one that tools/export.py wrote")
    if len(content) < _HEADER.size:
        raise BnnError("is cut short within its header; copy it again")
    header = _HEADER.unpack_from(content)
    _, major, minor, crc, size, metadata_size, count, zero, side, outputs, zeros = header
    if (major, minor) != (MAJOR, MINOR):
        raise BnnError(f"has version {major}.{minor} of the format, this reader knows {MAJOR}.{MINOR}; export it again")
    if size != len(content):
        raise BnnError(f"has {len(content)} bytes where its header says {size}; copy it again")
    if zlib.crc32(memoryview(content)[_CHECKED_FROM:]) != crc:
        raise BnnError("is damaged, its checksum differs; copy it again")
    if zero or any(zeros):
        raise BnnError("header: expected zeros at bytes 30 and 40 to 63")
    if metadata_size > MAX_METADATA:
        raise BnnError(f"header: {metadata_size} bytes of metadata, expected at most {MAX_METADATA}")
    if count > limits.records:
        raise BnnError(f"header: {count} records, expected at most {limits.records}")
    at = _HEADER.size + count * _RECORD.size
    if at > size:
        raise BnnError("is cut short within its records")
    records = [Record(*numbers) for numbers in _RECORD.iter_unpack(content[_HEADER.size : at])]
    layout = _layout(records, side, limits)
    if outputs != records[-1].channels_out:
        raise BnnError(f"header: {outputs} outputs, the last layer has {records[-1].channels_out}")

    start = _aligned(content, at)
    at = start + metadata_size
    layers = []
    for number, (record, expected) in enumerate(zip(records, layout, strict=True)):
        blobs = {}
        for name, (dtype, shape) in expected.items():
            at = _aligned(content, at)
            if at + dtype.itemsize * math.prod(shape) > size:
                raise BnnError(f"{_name(number, record)}: {name} does not fit into the {size} bytes of the file")
            blob = np.frombuffer(content, dtype, math.prod(shape), at).reshape(shape)
            _check_numbers(f"{_name(number, record)}: {name}", blob, name, record)
            blobs[name] = blob
            at += blob.nbytes
        layers.append(Layer(record, blobs))
    if _aligned(content, at) != size:
        raise BnnError(f"has {size} bytes, its records need {_aligned(content, at)}")
    return Network(side, outputs, layers, _metadata(content[start : start + metadata_size]))


_FORMS: dict[int, dict[str, tuple[int, ...]]] = {
    STEM: {"kernel": (3,), "stride": (1, 2), "channels_in": (3,)},
    HALF_BLOCK: {"kernel": (1, 3), "stride": (1, 2), "residual": (SAME, POOLED, DOUBLED)},
    MEAN: {},
    LINEAR: {"number_type": (FLOAT32, FLOAT16, INT8), "flags": (0, RELU)},
}
_ABSENT = {"kernel": (1,), "stride": (1,), "residual": (NO_RESIDUAL,), "number_type": (FLOAT32,), "flags": (0,)}
_AFTER = {None: (STEM,), STEM: (HALF_BLOCK,), HALF_BLOCK: (HALF_BLOCK, MEAN), MEAN: (LINEAR,), LINEAR: (LINEAR,)}

_Layout = dict[str, tuple[np.dtype[Any], tuple[int, ...]]]


def _layout(records: list[Record], side: int, limits: Limits) -> list[_Layout]:
    """Type and shape of each array of each layer, once the records are a network within the limits."""
    if not 1 <= side <= limits.side:
        raise BnnError(f"header: images of side {side}, expected 1 to {limits.side}")
    if len(records) > limits.records:
        raise BnnError(f"{len(records)} layers, expected at most {limits.records}")
    if not records or records[-1].operation not in (MEAN, LINEAR):
        raise BnnError("records: expected a mean or a linear layer at the end")
    macs, largest, layouts = 0, 0, []
    before: Record | None = None
    for number, record in enumerate(records):
        _check_record(number, record, before, side, limits)
        i, o, taps = record.channels_in, record.channels_out, record.kernel**2
        after = 1 if record.operation in (MEAN, LINEAR) else -(-side // record.stride)
        if record.operation != MEAN:
            macs += taps * i * o * after**2
        largest = max(largest, 4 * (i * side**2 + o * after**2))
        is_last = number + 1 < len(records) and records[number + 1].operation == MEAN
        layouts.append(_blobs(record, is_last))
        side, before = after, record
    if macs > limits.macs:
        raise BnnError(f"records: {macs} multiply-accumulates an image, expected at most {limits.macs}")
    arrays = sum(dtype.itemsize * math.prod(shape) for layout in layouts for dtype, shape in layout.values())
    if arrays + largest > limits.memory:
        raise BnnError(f"records: need {arrays + largest} bytes of memory, expected at most {limits.memory}")
    return layouts


def _check_record(number: int, record: Record, before: Record | None, side: int, limits: Limits) -> None:
    allowed = _AFTER[before.operation if before else None]
    if record.operation not in allowed:
        names = " or ".join(OPERATIONS[one] for one in allowed)
        raise BnnError(
            f"record {number}: operation {record.operation}, expected {' or '.join(map(str, allowed))} ({names})"
        )
    where = _name(number, record)
    for field, values in {**_ABSENT, **_FORMS[record.operation]}.items():
        if getattr(record, field) not in values:
            raise BnnError(f"{where}: {field} {getattr(record, field)}, expected {' or '.join(map(str, values))}")
    i, o = record.channels_in, record.channels_out
    for channels in (i, o):
        if not 1 <= channels <= limits.channels:
            raise BnnError(f"{where}: {channels} channels, expected 1 to {limits.channels}")
    if before and i != before.channels_out:
        raise BnnError(f"{where}: {i} channels in, the layer before has {before.channels_out} out")
    if record.operation in (HALF_BLOCK, MEAN) and o != i * (1 + (record.residual == DOUBLED)):
        raise BnnError(f"{where}: {i} channels in and {o} out, expected {i * (1 + (record.residual == DOUBLED))} out")
    if record.operation == HALF_BLOCK and i % 2:
        raise BnnError(f"{where}: {i} channels in, expected an even number")
    if record.operation == HALF_BLOCK and (record.stride == 2) != (record.residual == POOLED):
        raise BnnError(
            f"{where}: stride {record.stride} with residual {record.residual}, expected 2 (pooled) with 2 alone"
        )
    if record.residual == POOLED and side % 2:
        raise BnnError(f"{where}: halves a map of side {side}, expected an even side")
    if before and before.operation == LINEAR and not before.flags & RELU:
        raise BnnError(f"{where}: comes after a linear layer without ReLU, expected that one last")


def _blobs(record: Record, is_last: bool) -> _Layout:
    i, o = record.channels_in, record.channels_out
    f4 = np.dtype("<f4")
    if record.operation == STEM:
        return {"weight": (f4, (3, 3, i, o)), "bias": (f4, (o,)), "threshold": (f4, (o,)), "table": (f4, (3, 256))}
    if record.operation == HALF_BLOCK:
        constants = ("a", "b", "slope", "shift") if is_last else ("a", "b", "slope", "shift", "threshold")
        bits: _Layout = {"bits": (np.dtype("<u4"), (o, record.kernel**2, -(-i // 32)))}
        return bits | dict.fromkeys(constants, (f4, (o,)))
    if record.operation == LINEAR:
        weight: _Layout = {"weight": (np.dtype(("<f4", "<f2", "i1")[record.number_type]), (o, i))}
        scale: _Layout = {"scale": (f4, (o,))} if record.number_type == INT8 else {}
        return weight | scale | {"bias": (f4, (o,))}
    return {}


def _check_numbers(where: str, blob: NDArray[Any], name: str, record: Record) -> None:
    if name == "bits":
        used = record.channels_in % 32
        if used and (blob[..., -1] >> np.uint32(used)).any():
            raise BnnError(f"{where}: expected zeros in the bits beyond channel {record.channels_in}")
    elif name == "threshold":  # +inf never lets a sign be +1
        if not (blob > -np.inf).all():
            raise BnnError(f"{where}: holds NaN or -inf")
    elif blob.dtype == np.float16:  # its own isfinite is slow
        if (blob.view("<u2") & 0x7C00 == 0x7C00).any():
            raise BnnError(f"{where}: holds a number that is not finite")
    elif blob.dtype.kind == "f" and not np.isfinite(blob).all():
        raise BnnError(f"{where}: holds a number that is not finite")


def _metadata(text: bytes) -> dict[str, Any]:
    depth, deepest, quoted = 0, 0, False
    for token in re.finditer(rb'\\.|["{}[\]]', text, re.DOTALL):
        if token[0] == b'"':
            quoted = not quoted
        elif not quoted and token[0] in b"{}[]":
            depth += 1 if token[0] in b"{[" else -1
            deepest = max(deepest, depth)
    if deepest > MAX_DEPTH:
        raise BnnError(f"metadata: nested {deepest} deep, expected at most {MAX_DEPTH}")
    try:
        metadata = json.loads(text.decode())
        # Neither NaN, nor numbers beyond float64, nor half a character, which could not be printed.
        json.dumps(metadata, ensure_ascii=False, allow_nan=False).encode()
    except ValueError as error:
        raise BnnError(f"metadata: expected UTF-8 JSON ({error})") from None
    if not isinstance(metadata, dict):
        raise BnnError(f"metadata: expected a JSON object, got {type(metadata).__name__}")
    return metadata


def _name(number: int, record: Record) -> str:
    return f"record {number} ({OPERATIONS[record.operation] if 0 < record.operation <= LINEAR else record.operation})"


def _aligned(content: bytes, at: int) -> int:
    """The next multiple of the alignment, with zeros in between as far as there is content."""
    end = at + -at % ALIGNMENT
    if any(content[at:end]):
        raise BnnError(f"expected zeros at bytes {at} to {end - 1}")
    return end
