"""The runtime's compiled core: each of its kernels against PyTorch's convolution and numpy's meaning, to the bit."""

import os
import shutil
import struct
import subprocess
import sys
import venv
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from models.reactnet import CHANNEL_MULTIPLES
from runtime import bnn, native, reference
from runtime.bnn import BnnError, Layer, Limits, Network, Record
from tests.packed import random_images, random_network
from tests.processes import PATIENCE
from tests.tiny import ROOT

pytestmark = pytest.mark.skipif(bool(native.why_missing()), reason=native.why_missing() or "built")

KERNELS = native.kernels()
RUNTIME = ROOT / "runtime"
FLAGS = ("-std=c11", "-O3", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror")


def same(got, want):
    """Equal in every bit."""
    return got.shape == want.shape and got.tobytes() == want.tobytes()


def streams(network, images):
    """What each layer gives, one after another."""
    x, before = None, None
    for layer in network.layers:
        operation = layer.record.operation
        if operation == bnn.STEM:
            x = reference.stem(layer, reference.pixels(layer, images))
        elif operation == bnn.HALF_BLOCK:
            x = reference.half_block(layer, reference.signs(before, x), x)
        else:
            x = reference.mean(x) if operation == bnn.MEAN else reference.linear(layer, x)
        before = layer
        yield x


def assert_same_streams(network, images):
    """Of all kernels. Maps and their mean to the bit; behind them sums have an order of their own."""
    nets = [native.Net(bnn.to_bytes(network), name) for name in KERNELS]
    for upto, (layer, want) in enumerate(zip(network.layers, streams(network, images), strict=True), 1):
        for net in nets:
            got = net.stream(images, upto)
            if layer.record.operation == bnn.LINEAR:
                assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max(), (net.kernels, upto)
            else:
                assert same(got, want), (net.kernels, upto)


# ------------------------------------------------------------------------------------------------ one layer


def counting_network(channels, side, kernel, stride, random):
    """A stream of whole numbers, then a half-block that adds P to it, or to its average over 2x2 pixels."""
    bits = random.integers(0, 2**32, (channels, kernel**2, -(-channels // 32)), np.uint32)
    bits[..., -1] &= 0xFFFFFFFF >> -channels % 32
    ones, zeros = np.ones(channels, np.float32), np.zeros(channels, np.float32)
    weight = random.integers(-8, 9, (3, 3, 3, channels)).astype(np.float32)
    weight[:, :, 0] = 0
    weight[1, 1, 0] = 4096  # a first color of +1 makes all signs of the pixel +1, and one of -1 makes them -1
    table = np.zeros((3, 256), np.float32)
    stem = {"weight": weight, "bias": zeros, "threshold": zeros + np.float32(0.5), "table": table}
    half = {"bits": bits, "a": ones, "b": zeros, "slope": ones, "shift": zeros}
    residual = bnn.POOLED if stride == 2 else bnn.SAME
    layers = [
        Layer(Record(bnn.STEM, 3, 1, bnn.NO_RESIDUAL, 3, channels, bnn.FLOAT32, 0), stem),
        Layer(Record(bnn.HALF_BLOCK, kernel, stride, residual, channels, channels, bnn.FLOAT32, 0), half),
        Layer(Record(bnn.MEAN, 1, 1, bnn.NO_RESIDUAL, channels, channels, bnn.FLOAT32, 0), {}),
    ]
    return Network(side, channels, layers, {})


@pytest.mark.parametrize("kernel", (1, 3))
@pytest.mark.parametrize("channels", (8, 32, 64, 96, 256, 1024))
def test_counts_are_those_of_a_convolution_of_signs(channels, kernel):
    random = np.random.default_rng(channels + kernel)
    for side in (1, 2, 3, 5, 7, 14, 20):
        for stride in (1, 2) if side % 2 == 0 else (1,):
            network = counting_network(channels, side, kernel, stride, random)
            images = random.integers(-8, 9, (3, 3, side, side)).astype(np.float32)
            images[0, 0], images[1, 0], images[2, 0] = 1, -1, 0  # all +1, all -1, random
            x = reference.stream(network, images, 1)
            s = torch.from_numpy(np.where(x > 0.5, np.float32(1), np.float32(-1))).permute(0, 3, 1, 2)
            assert (s[0] == 1).all() and (s[1] == -1).all()
            bits = np.unpackbits(network.layers[1].blobs["bits"].view(np.uint8), axis=2, bitorder="little")
            weight = torch.from_numpy(bits[..., :channels].astype(np.float32) * 2 - 1).permute(0, 2, 1)
            weight = weight.reshape(channels, channels, kernel, kernel)
            c = F.conv2d(s, weight, stride=stride, padding=kernel // 2).permute(0, 2, 3, 1).numpy()
            residual = x.reshape(3, side // stride, stride, side // stride, stride, channels).mean(axis=(2, 4))
            content = bnn.to_bytes(network)
            for name in KERNELS:
                got = native.Net(content, name).stream(images, 2)
                assert np.array_equal(got - residual, c * np.float32(-0.5)), (name, side, stride)


@pytest.mark.parametrize("width", (2, 8, 16, 32, 34, 96))
def test_half_blocks_to_the_bit(width):
    # Residuals of all kinds; slopes below 0, 0 and above 1; every threshold is met exactly by some value.
    network = random_network(width=width, side=12, stem_stride=1, multiples=(1, 1, 2, 4, 4), seed=width)
    images = random_images(3, 12, seed=1)
    for _, blobs in network.layers:
        if "slope" in blobs:
            blobs["slope"][::5] = 0
    for (_, blobs), x in zip(network.layers, streams(network, images), strict=True):
        if "threshold" in blobs:  # before the next layer reads it
            blobs["threshold"][:] = x[0, x.shape[1] // 2, 1]
            assert (x == blobs["threshold"]).any(axis=(0, 1, 2)).all()
    slopes = np.concatenate([blobs["slope"] for _, blobs in network.layers if "slope" in blobs])
    assert (slopes < 0).any() and (slopes == 0).any() and (slopes > 1).any()
    assert_same_streams(network, images)


def test_channels_without_end_are_counted():
    # More than bytes and 16-bit sums could hold if they were not widened in time.
    network = counting_network(8192, 3, 3, 1, np.random.default_rng(0))
    network.layers[1].blobs["bits"][:] = 0xFFFFFFFF
    content = bnn.to_bytes(network)
    images = np.zeros((1, 3, 3, 3), np.float32)
    images[:, 0] = -1
    taps = np.outer((2, 3, 2), (2, 3, 2))[None, :, :, None]  # of which every bit differs
    for name in KERNELS:
        got = native.Net(content, name).stream(images, 2)
        assert (got == taps * 8192 / 2 - 4096).all(), name


# ------------------------------------------------------------------------------------------------ whole networks


@pytest.mark.parametrize("number_type", (bnn.FLOAT32, bnn.FLOAT16, bnn.INT8))
def test_every_layer_of_a_network_to_the_bit(number_type):
    for width, stem_stride in ((2, 1), (8, 2), (34, 2)):
        network = random_network(width=width, side=16, stem_stride=stem_stride, number_type=number_type)
        assert_same_streams(network, random_images(3, 16))


@pytest.mark.parametrize("stem_stride", (1, 2))
@pytest.mark.parametrize("width", (2, 8, pytest.param(32, marks=pytest.mark.slow)))
def test_whole_networks_to_the_bit(width, stem_stride):
    for side in (32, 64, 160, 224):
        network = random_network(width=width, side=side, stem_stride=stem_stride, multiples=CHANNEL_MULTIPLES)
        images, upto = random_images(1, side), len(network.layers) - 2
        content, want = bnn.to_bytes(network), reference.stream(network, images, upto)
        for name in KERNELS:
            assert same(native.Net(content, name).stream(images, upto, threads=2), want), (name, side)


def test_floats_and_odd_sides():
    network = random_network(side=31, stem_stride=2, multiples=(1, 2, 4, 8, 16))
    images = np.random.default_rng(0).normal(size=(2, 3, 31, 31)).astype(np.float32)
    assert_same_streams(network, images)
    images[1, 0, 3, 5] = np.nan  # which is no sign of +1
    for name in KERNELS:
        got = native.Net(bnn.to_bytes(network), name).stream(images, 4)
        assert np.array_equal(got, reference.stream(network, images, 4), equal_nan=True), name


# ------------------------------------------------------------------------------------------------ calls


def test_threads_change_no_bit():
    network = random_network(width=8, side=24, stem_stride=1)
    net = native.Net(bnn.to_bytes(network))
    images = random_images(7, 24)
    for features in (False, True):
        want = np.concatenate([net.run(images[i : i + 1], features=features) for i in range(7)])
        for threads in (1, 2, 5):
            for count in (0, 1, 4, 7):
                assert same(net.run(images[:count], threads, features), want[:count])
    with ThreadPoolExecutor(8) as pool:
        for got in pool.map(lambda i: net.run(images[i % 7 :], 1 + i % 3), range(64)):
            assert same(got, net.run(images)[7 - len(got) :])


def test_wrong_calls_are_one_line():
    net = native.Net(bnn.to_bytes(random_network(side=8)))
    for images in (np.zeros((1, 8, 8), np.uint8), np.zeros((1, 3, 8, 8), np.uint8), np.zeros((1, 3, 8, 8))):
        with pytest.raises(BnnError, match=r"^images: expected uint8 \[B, 8, 8, 3\] or float32 \[B, 3, 8, 8\], got"):
            net.run(images)
    for threads in (0, 65):
        with pytest.raises(BnnError, match=f"^threads: expected 1 to 64, got {threads}$"):
            net.run(random_images(1, 8), threads)
    with pytest.raises(BnnError, match="^kernels 'mmx': expected one that this CPU can run, .*plain$"):
        native.Net(bnn.to_bytes(random_network()), "mmx")
    net.close()
    net.close()
    with pytest.raises(BnnError, match="closed"):
        net.run(random_images(1, 8))


# ------------------------------------------------------------------------------------------------ hostile files


def opens(content, limits=bnn.DEFAULT):
    """Whether the core takes a file, which has to be whether Python's reader does."""
    try:
        net = native.Net(content, "plain", limits=limits)
    except BnnError as error:
        assert str(error) and "\n" not in str(error)
        taken = False
    else:
        taken = True
        if limits == bnn.DEFAULT:
            net.run(np.zeros((1, net.side, net.side, 3), np.uint8))
        net.close()
    try:
        bnn.read(content, limits=limits)
    except BnnError as error:
        assert not taken or str(error).startswith("metadata"), error  # which the core skips
    else:
        assert taken
    return taken


def mended(content):
    content = bytearray(content)
    content[16:24] = struct.pack("<Q", len(content))
    content[12:16] = struct.pack("<I", zlib.crc32(content[16:]))
    return bytes(content)


@pytest.fixture(scope="module")
def small():
    return bnn.to_bytes(random_network(number_type=bnn.INT8, multiples=(1, 2, 2), side=4))


def test_a_file_cut_anywhere_is_refused(small):
    assert opens(small) and mended(small) == small
    for count in range(len(small)):
        assert not opens(small[:count])
        if count >= 64:
            assert not opens(mended(small[:count]))
    assert not opens(mended(small + bytes(64)))


def test_every_bit_of_header_and_records(small):
    records = 64 + 32 * struct.unpack_from("<H", small, 28)[0]
    for bit in range(8 * records):
        changed = bytearray(small)
        changed[bit // 8] ^= 1 << bit % 8
        if bit // 8 >= 12:
            assert not opens(bytes(changed))  # the checksum, or what it is of
        opens(mended(changed))


def test_odd_numbers_in_arrays(small):
    random = np.random.default_rng(0)
    for at in random.choice(np.arange(320, len(small) - 4, 4), 600, replace=False):
        for value in (0xFF, 0x7F800000, 0x7FC00000, 0xFF800000):
            opens(mended(small[:at] + struct.pack("<I", value) + small[at + 4 :]))


def test_limits(small):
    for limits in (Limits(side=3), Limits(channels=3), Limits(records=4), Limits(macs=100), Limits(memory=1000)):
        assert not opens(small, limits)
    assert opens(small, Limits(side=4, channels=4, records=8, macs=10_000, memory=1 << 20))
    with pytest.raises(BnnError, match="need more than 6000 bytes of memory"):  # with channels in blocks of 32
        native.Net(small, limits=Limits(memory=6000))
    # Limits of the caller above what sums can hold
    huge = Limits(2**32 - 1, 2**32 - 1, 2**32 - 1, 2**64 - 1, 2**64 - 1)
    for offset in (32, 64 + 16, 64 + 20, 96 + 16, 96 + 20):
        for value in (16385, 2**31 - 1, 2**32 - 1):
            changed = mended(small[:offset] + struct.pack("<I", value) + small[offset + 4 :])
            with pytest.raises(BnnError):
                native.Net(changed, limits=huge)


# ------------------------------------------------------------------------------------------------ without Python


def run_example(program, folder, kernels):
    # Wide enough for bytes of counts to be widened on the way.
    network = random_network(width=34, side=32, multiples=(1, 2, 4, 4), number_type=bnn.FLOAT16)
    images = random_images(1, 32)
    bnn.write(network, folder / "net.bnn")
    (folder / "image.rgb").write_bytes(images.tobytes())
    for upto, layer in enumerate(network.layers, 1):
        command = [*program, folder / "net.bnn", folder / "image.rgb", kernels, str(upto)]
        done = subprocess.run(command, capture_output=True, timeout=PATIENCE)
        assert done.returncode == 0, done.stderr
        want = reference.stream(network, images, upto)
        got = np.frombuffer(done.stdout, np.float32).reshape(want.shape)
        assert layer.record.operation == bnn.LINEAR or same(got, want), upto
        assert np.allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())
    refused = subprocess.run([*program, folder / "image.rgb", folder / "image.rgb"], capture_output=True, text=True)
    assert refused.returncode == 2 and "is not a binary network's file" in refused.stderr


def build_example(compiler, folder, *flags):
    sources = [RUNTIME / "example.c", RUNTIME / "core.c"]
    subprocess.run([compiler, *FLAGS, *flags, "-o", folder / "example", *sources], check=True, timeout=PATIENCE)
    return folder / "example"


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("gcc"), reason="needs gcc")
def test_the_example_in_c(tmp_path):
    run_example([build_example("gcc", tmp_path, "-D_GNU_SOURCE")], tmp_path, "plain")


ARM = ("aarch64-linux-gnu-gcc", "qemu-aarch64")


@pytest.mark.slow
@pytest.mark.skipif(not all(map(shutil.which, ARM)), reason=f"needs {' and '.join(ARM)} (see the Makefile)")
def test_arm_to_the_bit(tmp_path):
    program = [ARM[1], build_example(ARM[0], tmp_path, "-static", "-D_GNU_SOURCE")]
    for kernels in ("neon", "plain"):
        run_example(program, tmp_path, kernels)


@pytest.mark.slow
def test_the_runtime_installs_alone(tmp_path):
    pytest.importorskip("setuptools")
    shutil.copytree(RUNTIME, tmp_path / "source", ignore=shutil.ignore_patterns("*.so", "*.egg-info", "__pycache__"))
    venv.create(tmp_path / "venv", symlinks=True)
    python = tmp_path / "venv/bin/python"
    site = next((tmp_path / "venv/lib").glob("*/site-packages"))
    for name in ("numpy", "numpy.libs"):
        found = Path(np.__file__).parent.parent / name
        if found.exists():
            (site / name).symlink_to(found)
    offline, pip = ("--no-index", "--no-deps"), [sys.executable, "-m", "pip"]
    wheels = tmp_path / "wheels"
    for command in (
        [*pip, "wheel", *offline, "--no-build-isolation", "--wheel-dir", wheels, tmp_path / "source"],
        [*pip, "--python", python, "install", *offline, "--find-links", wheels, "burn-runtime"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 0, done.stderr
    network, images = random_network(), random_images(2, 8)
    bnn.write(network, tmp_path / "net.bnn")
    np.save(tmp_path / "images.npy", images)
    code = (
        "import importlib.util, pathlib, sys; import numpy as np; from runtime import native; "
        "assert importlib.util.find_spec('torch') is None and 'venv' in native.__file__; "
        "net = native.Net(pathlib.Path('net.bnn').read_bytes()); "
        "sys.stdout.buffer.write(net.stream(np.load('images.npy'), net.layers - 2).tobytes())"
    )
    environment = {"PATH": os.environ["PATH"]}
    done = subprocess.run([python, "-c", code], cwd=tmp_path, env=environment, capture_output=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert done.stdout == reference.stream(network, images, len(network.layers) - 2).tobytes()
