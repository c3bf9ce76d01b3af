"""The file of a packed network: what is written is read, and nothing else is."""

import json
import os
import struct
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from runtime import bnn, reference
from runtime.bnn import BnnError, Layer, Limits, Network
from tests.packed import random_images, random_network
from tests.processes import PATIENCE
from tests.tiny import ROOT

GOLDEN = ROOT / "tests" / "golden" / "network-1.bnn"
METADATA = {"classes": ["Kaß", "a\tb"], "mean": [0.5, 1e-300], "deep": {"none": None}}
HEADER, RECORD = 64, 32


def mended(content):
    """The content with the size and the checksum that belong to it."""
    content = bytearray(content)
    content[16:24] = struct.pack("<Q", len(content))
    content[12:16] = struct.pack("<I", zlib.crc32(content[16:]))
    return bytes(content)


def replaced(network, number, **changes):
    """The network with other numbers in one record, or other arrays."""
    layers = list(network.layers)
    record, blobs = layers[number]
    arrays = {name: changes.pop(name) for name in list(changes) if name in blobs}
    layers[number] = Layer(record._replace(**changes), blobs | arrays)
    return network._replace(layers=layers)


# ------------------------------------------------------------------------------------------------ what is written


@pytest.mark.parametrize("number_type", (bnn.FLOAT32, bnn.FLOAT16, bnn.INT8))
@pytest.mark.parametrize(("width", "stem_stride"), ((2, 1), (8, 2), (34, 2)))
def test_what_is_written_is_read(tmp_path, width, stem_stride, number_type):
    network = random_network(width=width, stem_stride=stem_stride, number_type=number_type, metadata=METADATA)
    size = bnn.write(network, tmp_path / "net.bnn")
    assert size == (tmp_path / "net.bnn").stat().st_size and os.listdir(tmp_path) == ["net.bnn"]
    found = bnn.read(tmp_path / "net.bnn")
    assert found._replace(layers=[]) == network._replace(layers=[])
    for one, other in zip(found.layers, network.layers, strict=True):
        assert one.record == other.record and one.blobs.keys() == other.blobs.keys()
        for name, blob in one.blobs.items():
            assert blob.dtype == other.blobs[name].dtype and blob.tobytes() == other.blobs[name].tobytes()
            assert blob.shape == other.blobs[name].shape and not blob.flags.writeable
    assert bnn.to_bytes(found) == bnn.to_bytes(network) == (tmp_path / "net.bnn").read_bytes()


def test_version_1_stays_what_it_is():
    """The file of then, which is never written again, gives the means of its last maps that its metadata holds."""
    network = bnn.read(GOLDEN)
    pooled = reference.stream(network, random_images(2, 8), len(network.layers) - 2)
    assert [x.hex() for x in pooled.flatten().tolist()] == network.metadata["pooled"]
    assert bnn.to_bytes(network) == GOLDEN.read_bytes() and GOLDEN.stat().st_size < 10_000


def test_a_reader_without_our_code_finds_everything():
    network = random_network(width=8, metadata=METADATA)
    content = bnn.to_bytes(network)
    assert content[:8] == b"\x89BNN\r\n\x1a\n" and struct.unpack_from("<HH", content, 8) == (1, 0)
    crc, size, metadata, count, zero, side, outputs = struct.unpack_from("<IQIHHII", content, 12)
    assert crc == zlib.crc32(content[16:]) and size == len(content) and (zero, side, outputs) == (0, 8, 3)
    first = struct.unpack_from("<8I", content, HEADER + RECORD)
    assert count == 10 and first == (2, 3, 1, 1, 8, 8, 0, 0)
    at = HEADER + count * RECORD
    at += -at % 64
    assert json.loads(content[at : at + metadata]) == METADATA
    at += metadata + -metadata % 64
    assert content[at : at + 4] == network.layers[0].blobs["weight"][0, 0, 0, :1].tobytes()
    at += 27 * 8 * 4 + -(27 * 8 * 4) % 64 + 64 + 64 + 3 * 256 * 4  # weight, bias, threshold, table
    word = struct.unpack_from("<I", content, at)[0]
    assert word == network.layers[1].blobs["bits"][0, 0, 0] and word < 1 << 8


def test_a_refused_network_leaves_the_old_file(tmp_path):
    path = tmp_path / "net.bnn"
    bnn.write(random_network(), path)
    before = path.read_bytes()
    slope = np.full(2, np.nan, np.float32)
    with pytest.raises(BnnError, match=r"record 1 \(half-block\): slope: holds a number that is not finite"):
        bnn.write(replaced(random_network(), 1, slope=slope), path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["net.bnn"]
    with pytest.raises(OSError):
        bnn.write(random_network(), tmp_path / "none" / "net.bnn")


@pytest.mark.parametrize(
    ("changes", "said"),
    (
        ({"a": np.zeros(3, np.float32)}, r"a: expected float32 \[2\], got float32 \[3\]"),
        ({"a": np.zeros(2)}, r"a: expected float32 \[2\], got float64 \[2\]"),
        ({"bits": np.zeros((2, 9, 1), np.int32)}, r"bits: expected uint32 \[2, 9, 1\], got int32"),
        ({"channels_in": -2}, "a number of the header or of a record does not fit"),
    ),
)
def test_arrays_of_another_form_are_refused(changes, said):
    with pytest.raises(BnnError, match=said):
        bnn.to_bytes(replaced(random_network(), 1, **changes))


def test_missing_and_superfluous_arrays_are_refused():
    network = random_network()
    assert "threshold" not in network.layers[6].blobs
    network.layers[6].blobs["threshold"] = np.zeros(8, np.float32)
    with pytest.raises(BnnError, match=r"record 6 \(half-block\): has .*'threshold'.*, expected \['a', 'b', 'bits'"):
        bnn.to_bytes(network)
    network = random_network()
    del network.layers[0].blobs["table"]
    with pytest.raises(BnnError, match="expected .*'table'"):
        bnn.to_bytes(network)


# ------------------------------------------------------------------------------------------------ hostile files


def test_a_file_cut_short_at_any_byte_is_refused():
    content = GOLDEN.read_bytes()
    for end in range(len(content)):
        with pytest.raises(BnnError):
            bnn.read(content[:end])
        if end >= HEADER:  # and by one who mends size and checksum
            with pytest.raises(BnnError):
                bnn.read(mended(content[:end]))
    with pytest.raises(BnnError, match="records need"):
        bnn.read(mended(content + bytes(64)))
    with pytest.raises(BnnError, match="checksum"):
        bnn.read(content[:-100] + b"\x01" + content[-99:])


def test_every_bit_of_header_and_records_is_checked():
    """With the checksum mended: refused in one line, or another network that is whole."""
    content = GOLDEN.read_bytes()
    count = struct.unpack_from("<H", content, 28)[0]
    accepted = set()
    for bit in range(8 * (HEADER + count * RECORD)):
        byte = bit // 8
        if 12 <= byte < 16:
            continue
        changed = bytearray(content)
        changed[byte] ^= 1 << bit % 8
        changed[12:16] = struct.pack("<I", zlib.crc32(changed[16:]))
        try:
            network = bnn.read(bytes(changed))
        except BnnError as error:
            assert "\n" not in str(error)
        else:
            assert bnn.to_bytes(network) == bytes(changed)
            accepted.add(byte if byte < HEADER else HEADER + (byte - HEADER) % RECORD)
    # The side, the metadata's size within its padding, the stem's stride, ReLU.
    assert accepted <= {32, 33, HEADER + 8, HEADER + 28} and 32 in accepted


@pytest.mark.parametrize(
    ("start", "said"),
    (
        (b"", "not a binary network's file"),
        (b"PK\x03\x04" + bytes(100), "not a binary network's file; expected one that tools/export.py wrote"),
        (b"\x89BNN\n\x1a\n" + bytes(100), "copy in text mode"),
        (b"\x89BNN\r\n\x1a\n" + struct.pack(">HH", 1, 0) + bytes(100), "version 256.0"),
        (b"\x89BNN\r\n\x1a\n" + struct.pack("<HH", 1, 1) + bytes(100), "version 1.1"),
        (b"\x89BNN\r\n\x1a\n" + struct.pack("<HH", 2, 0) + bytes(100), "version 2.0"),
    ),
)
def test_other_files_are_named(tmp_path, start, said):
    (tmp_path / "x.bnn").write_bytes(start)
    with pytest.raises(BnnError, match=said) as refused:
        bnn.read(tmp_path / "x.bnn")
    assert str(refused.value).startswith(str(tmp_path / "x.bnn"))


def test_what_is_no_file_is_the_systems_error(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(OSError):
            bnn.read(path)
    with pytest.raises(BnnError):
        bnn.read(type(tmp_path)("/dev/zero"))


@pytest.mark.parametrize(
    ("number", "changes", "said"),
    (
        (0, {"operation": 2}, r"record 0: operation 2, expected 1 \(stem\)"),
        (0, {"channels_in": 4}, "channels_in 4, expected 3"),
        (1, {"operation": 3}, r"record 1: operation 3, expected 2 \(half-block\)"),
        (1, {"operation": 9}, "operation 9"),
        (1, {"kernel": 2}, "kernel 2, expected 1 or 3"),
        (1, {"stride": 2}, "stride 2 with residual 1"),
        (1, {"residual": 0}, "residual 0, expected 1 or 2 or 3"),
        (1, {"residual": 2}, "stride 1 with residual 2"),
        (1, {"residual": 3}, "2 channels in and 2 out, expected 4 out"),
        (1, {"channels_out": 4}, "2 channels in and 4 out, expected 2 out"),
        (1, {"channels_in": 0}, "0 channels, expected 1 to 8192"),
        (1, {"channels_in": 8194}, "8194 channels"),
        (1, {"channels_in": 4, "channels_out": 4}, "4 channels in, the layer before has 2 out"),
        (1, {"number_type": 1}, "number_type 1, expected 0"),
        (1, {"flags": 1}, "flags 1, expected 0"),
        (6, {"operation": 1}, r"expected 2 or 3 \(half-block or mean\)"),
        (7, {"operation": 4}, r"record 7: operation 4"),
        (7, {"kernel": 3}, "kernel 3, expected 1"),
        (7, {"channels_out": 16}, "8 channels in and 16 out, expected 8 out"),
        (8, {"operation": 3}, r"record 8: operation 3, expected 4 \(linear\)"),
        (8, {"number_type": 3}, "number_type 3, expected 0 or 1 or 2"),
        (8, {"flags": 2}, "flags 2, expected 0 or 1"),
        (8, {"flags": 0}, "comes after a linear layer without ReLU"),
        (8, {"channels_out": 8193}, "8193 channels"),
        (9, {"channels_in": 9}, "9 channels in, the layer before has 8 out"),
        (9, {"channels_out": 4}, "3 outputs, the last layer has 4"),
    ),
)
def test_the_rules_of_the_chain(number, changes, said):
    network = replaced(random_network(), number, **changes)
    content = bytearray(bnn.to_bytes(random_network()))
    at = HEADER + RECORD * number
    content[at : at + RECORD] = struct.pack("<8I", *network.layers[number].record)
    with pytest.raises(BnnError, match=said):
        bnn.read(mended(content))
    with pytest.raises(BnnError):
        bnn.to_bytes(network)


def test_a_network_has_an_end_an_even_width_and_even_maps():
    network = random_network()
    for layers in ([], network.layers[:1], network.layers[:4]):
        with pytest.raises(BnnError, match="expected a mean or a linear layer at the end"):
            bnn.to_bytes(network._replace(layers=layers))
    features = bnn.to_bytes(Network(8, 8, network.layers[:8], {}))
    assert bnn.read(features).feature_layers == 8 and bnn.read(GOLDEN).feature_layers == 9
    with pytest.raises(BnnError, match="3 channels in, expected an even number"):
        bnn.to_bytes(random_network(width=3))
    with pytest.raises(BnnError, match="halves a map of side 5, expected an even side"):
        bnn.to_bytes(random_network(side=9))


@pytest.mark.parametrize(
    ("limits", "said"),
    (
        (Limits(side=7), "side 8, expected 1 to 7"),
        (Limits(channels=7), "8 channels, expected 1 to 7"),
        (Limits(records=9), "10 records, expected at most 9"),
        (Limits(macs=1000), "multiply-accumulates an image, expected at most 1000"),
        (Limits(memory=6000), "bytes, at most 6000 are read"),
    ),
)
def test_limits_hold_before_anything_is_read(tmp_path, limits, said):
    bnn.write(random_network(), tmp_path / "net.bnn")
    for source in (tmp_path / "net.bnn", (tmp_path / "net.bnn").read_bytes()):
        with pytest.raises(BnnError, match=said):
            bnn.read(source, limits=limits)


def test_a_small_file_cannot_ask_for_much():
    content = bytearray(bnn.to_bytes(random_network()))
    content[32:36] = struct.pack("<I", 4096)
    with pytest.raises(BnnError, match="bytes of memory"):
        bnn.read(mended(content), limits=Limits(memory=1 << 20))
    content[HEADER + 20 : HEADER + 24] = struct.pack("<I", 0xFFFFFFFF)
    with pytest.raises(BnnError, match="4294967295 channels"):
        bnn.read(mended(content))


def test_filling_bits_are_zero():
    network = random_network(width=34)
    for bit, fits in ((1, True), (2, False), (31, False)):
        bits = network.layers[1].blobs["bits"].copy()
        bits[5, 3, 1] |= np.uint32(1 << bit)
        changed = replaced(network, 1, bits=bits)
        if fits:
            bnn.to_bytes(changed)
        else:
            with pytest.raises(BnnError, match="expected zeros in the bits beyond channel 34"):
                bnn.to_bytes(changed)


@pytest.mark.parametrize("value", (np.nan, np.inf, -np.inf))
@pytest.mark.parametrize("number_type", (bnn.FLOAT32, bnn.FLOAT16, bnn.INT8))
def test_numbers_are_finite_but_thresholds_that_are_never_passed(value, number_type):
    network = random_network(number_type=number_type)
    for number, layer in enumerate(network.layers):
        for name, blob in layer.blobs.items():
            if blob.dtype.kind != "f":
                continue
            changed = blob.copy()
            changed.flat[-1] = value
            if name == "threshold" and value == np.inf:
                bnn.to_bytes(replaced(network, number, **{name: changed}))
            else:
                with pytest.raises(BnnError, match=rf"record {number} \(.*\): {name}: holds"):
                    bnn.to_bytes(replaced(network, number, **{name: changed}))


@pytest.mark.parametrize(
    "text",
    (
        b"",
        b"[]",
        b"3",
        b"{",
        b'{"a": NaN}',
        b'{"a": 1e999}',
        b'{"a": -Infinity}',
        b'{"a": "\xff"}',
        b'{"a": "\\ud800"}',
        b'{"a": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
        b'{"a":' * 40 + b"1" + b"}" * 40,
        b'{"a": "' + b'\\"' * 50_000,
        b'{"a": 1}\x00',
    ),
    ids=range(14),
)
def test_hostile_metadata_is_refused(text):
    with pytest.raises(BnnError, match="^metadata: "):
        bnn.read(with_metadata(text))


def with_metadata(text):
    network = random_network(metadata={"x": ""})
    content = bnn.to_bytes(network)
    at = HEADER + RECORD * len(network.layers)
    at += -at % 64
    header = bytearray(content[:at])
    header[24:28] = struct.pack("<I", len(text))
    return mended(bytes(header) + text + bytes(-len(text) % 64) + content[at + 64 :])


def test_metadata_within_its_limits_is_read():
    deep = {"a": json.loads("[" * 31 + "]" * 31), "brackets": "[" * 1000 + '"{\\'}
    assert bnn.read(with_metadata(json.dumps(deep).encode())).metadata == deep
    with pytest.raises(BnnError, match="bytes of metadata, expected at most 1048576"):
        bnn.to_bytes(random_network(metadata={"a": "x" * (1 << 20)}))
    for wrong in ({"a": {1, 2}}, {"a": float("nan")}, {"a": "\ud800"}):
        with pytest.raises(BnnError, match="^metadata: "):
            bnn.to_bytes(random_network(metadata=wrong))


def test_padding_is_zero():
    content = bytearray(bnn.to_bytes(random_network()))
    gap = HEADER + 10 * RECORD + -(10 * RECORD) % 64 + len("{}")
    content[gap] = 1
    with pytest.raises(BnnError, match=f"expected zeros at bytes {gap} to"):
        bnn.read(mended(content))
    content[gap], content[-1] = 0, 1
    with pytest.raises(BnnError, match="expected zeros at bytes"):
        bnn.read(mended(content))
    content[-1], content[40] = 0, 1
    with pytest.raises(BnnError, match="header: expected zeros"):
        bnn.read(mended(content))


# ------------------------------------------------------------------------------------------------ the reference


def test_the_runtime_works_without_torch():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from runtime import Runtime; import numpy as np\n"
        f"for kernels in (None, 'numpy'): network = Runtime({str(GOLDEN)!r}, kernels=kernels)\n"
        "print(network.run(np.zeros((2, 8, 8, 3), np.uint8)).shape)\n"
        "assert not any(name.split('.')[0] in ('engine', 'models', 'loaders') for name in sys.modules)\n"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stdout) == (0, "(2, 3)\n"), done.stderr


def test_eight_threads_get_the_bits_of_one():
    network, images = random_network(width=8, side=32), random_images(16, 32)
    expected = reference.run(network, images)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: reference.run(network, images), range(16)))
    assert all(one.tobytes() == expected.tobytes() for one in found)
    alone = np.concatenate([reference.run(network, one[None]) for one in images])
    assert alone.tobytes() == expected.tobytes() and reference.run(network, images[:0]).shape == (0, 3)


def test_bytes_and_floats_are_the_same_images():
    network, images = random_network(width=8, side=32), random_images(4, 32)
    floats = np.stack([network.layers[0].blobs["table"][c][images[..., c]] for c in range(3)], axis=1)
    assert reference.run(network, floats).tobytes() == reference.run(network, images).tobytes()


def test_the_mean_is_a_sum_in_order_from_zero():
    x = (10.0 ** np.random.default_rng(0).uniform(-4, 4, (2, 7, 7, 5))).astype(np.float32)
    x[0, ..., 0] = -0.0
    total = np.zeros((2, 5), np.float32)
    for row in range(7):
        for column in range(7):
            total = total + x[:, row, column]
    assert reference.mean(x).tobytes() == (total / np.float32(49)).tobytes()
    assert not np.signbit(reference.mean(x)[0, 0])


def test_other_images_are_refused():
    for images in (np.zeros((1, 3, 8, 8)), np.zeros((1, 8, 8, 3), np.float32), random_images(1, 9)):
        with pytest.raises(BnnError, match=r"images: expected uint8 \[B, 8, 8, 3\] or float32 \[B, 3, 8, 8\], got "):
            reference.run(random_network(), images)
