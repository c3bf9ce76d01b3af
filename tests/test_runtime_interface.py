"""`Runtime`: one interface to the compiled core and to numpy."""

import gc
import logging
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import runtime
from runtime import BnnError, Runtime, bnn, native, reference
from tests.packed import random_images, random_network

METADATA = {"classes": ["a", "b", "c"], "mean": [0.5, 0.5, 0.5], "side": 1}
needs_core = pytest.mark.skipif(native.why_missing() != "", reason=native.why_missing())


@pytest.fixture(params=[pytest.param(None, marks=needs_core), "numpy"], ids=["core", "numpy"])
def kernels(request):
    return request.param


@pytest.fixture
def path(tmp_path):
    bnn.write(random_network(width=8, side=32, metadata=METADATA), tmp_path / "net.bnn")
    return tmp_path / "net.bnn"


def test_scores_and_features(path, kernels):
    network, images = bnn.read(path), random_images(5, 32)
    opened = Runtime(path, kernels=kernels, threads=2)
    scores, features = opened.run(images), opened.features(images)
    assert scores.shape == (5, 3) and features.shape == (5, 32) and features.dtype == scores.dtype == np.float32
    expected = reference.run(network, images)
    assert np.abs(scores - expected).max() <= 1e-5 * np.abs(expected).max()
    assert np.abs(features - reference.stream(network, images, 9)).max() <= 1e-5 * features.max()
    floats = np.stack([network.layers[0].blobs["table"][c][images[..., c]] for c in range(3)], axis=1)
    assert opened.run(floats).tobytes() == scores.tobytes() and opened.run(images[:0]).shape == (0, 3)


def test_info_is_the_metadata_and_what_holds_here(path, kernels):
    opened = Runtime(str(path), kernels=kernels, threads=2)
    said = {"side": 32, "outputs": 3, "features": 32, "bytes": path.stat().st_size, "threads": 2}
    assert opened.info == METADATA | said | {"kernels": kernels or native.kernels()[0]}


def test_a_network_without_a_classifier_gives_its_features(tmp_path, kernels):
    network = random_network()
    bnn.write(network._replace(layers=network.layers[:9], outputs=8), tmp_path / "net.bnn")
    opened, images = Runtime(tmp_path / "net.bnn", kernels=kernels), random_images(2, 8)
    assert opened.run(images).tobytes() == opened.features(images).tobytes() and opened.info["features"] == 8


@pytest.mark.parametrize(
    "images",
    (
        np.zeros((32, 32, 3), np.uint8),
        np.zeros((1, 3, 32, 32), np.uint8),
        np.zeros((1, 32, 32, 3), np.float32),
        np.zeros((1, 3, 32, 32)),
        np.zeros((1, 3, 32, 31), np.float32),
        np.uint8(1),
        [],
    ),
)
def test_other_images_are_refused(path, kernels, images):
    opened = Runtime(path, kernels=kernels)
    for call in (opened.run, opened.features):
        with pytest.raises(
            BnnError, match=r"images: expected uint8 \[B, 32, 32, 3\] or float32 \[B, 3, 32, 32\], got "
        ):
            call(images)


def test_bad_files_kernels_and_threads_are_one_line(tmp_path, path, kernels):
    (tmp_path / "cut.bnn").write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BnnError, match=r"^.*cut\.bnn: has \d+ bytes where its header says \d+"):
        Runtime(tmp_path / "cut.bnn", kernels=kernels)
    with pytest.raises(FileNotFoundError):
        Runtime(tmp_path / "none.bnn", kernels=kernels)
    with pytest.raises(BnnError, match=r"net\.bnn: header: images of side 32, expected 1 to 31"):
        Runtime(path, kernels=kernels, limits=bnn.Limits(side=31))
    for threads in (0, 65):
        with pytest.raises(BnnError, match=f"threads: expected 1 to 64, got {threads}"):
            Runtime(path, kernels=kernels, threads=threads)
    with pytest.raises(BnnError, match="sse9|not built"):
        Runtime(path, kernels="sse9")


def test_eight_callers_get_the_bits_of_one(path, kernels):
    opened, images = Runtime(path, kernels=kernels, threads=2), random_images(4, 32)
    expected = opened.run(images).tobytes()
    with ThreadPoolExecutor(8) as pool:
        assert {one.tobytes() for one in pool.map(lambda _: opened.run(images), range(32))} == {expected}


def test_without_the_core_numpy_is_used_and_said_once(path, monkeypatch, caplog):
    monkeypatch.setattr(native, "why_missing", lambda: "the compiled core was not built; do this")
    monkeypatch.delenv("BNN_KERNELS", raising=False)
    runtime._say_once.cache_clear()
    with caplog.at_level(logging.WARNING, "runtime"):
        assert [Runtime(path).info["kernels"] for _ in range(3)] == ["numpy"] * 3
    assert [record.getMessage() for record in caplog.records] == [
        "the compiled core was not built; do this; until then numpy does the work, far slower"
    ]
    caplog.clear()
    runtime._say_once.cache_clear()
    assert Runtime(path, kernels="numpy").run(random_images(1, 32)).shape == (1, 3) and not caplog.records


def test_the_environment_chooses_kernels(path, monkeypatch):
    monkeypatch.setenv("BNN_KERNELS", "numpy")
    assert Runtime(path).info["kernels"] == "numpy"
    monkeypatch.setenv("BNN_KERNELS", "sse9")
    assert Runtime(path, kernels="numpy").info["kernels"] == "numpy"


@needs_core
def test_the_cores_memory_goes_with_the_network(path, monkeypatch):
    closed = []
    close = native.Net.close
    monkeypatch.setattr(native.Net, "close", lambda net: (closed.append(1), close(net)))
    opened = Runtime(path)
    content = weakref.ref(opened)
    opened.run(random_images(1, 32))
    del opened
    gc.collect()
    assert content() is None and closed == [1]
