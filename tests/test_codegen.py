"""The code that the compiler makes for GPUs, without one: what it launches, in which layouts, how many bytes it moves,
and whether its kernels spill. Each case in a process of its own, because Triton keeps a driver that is not there."""

import inspect
import itertools
import math
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
import torch

from loaders import augment
from models.reactnet import Config, ReActNet
from tests.processes import PATIENCE
from tests.tiny import ROOT

triton = pytest.importorskip("triton", reason="triton is not installed")

BATCH, SIDE, WIDTH, MULTIPLES = 64, 96, 16, (1, 2, 4, 4)
CHANNELS = {1, 3, 16, 32, 64}  # none is the side of a map (48, 24), so that the innermost axis tells the layout
CAPABILITIES = {80: (8, 0), 90: (9, 0), 100: (10, 0)}


def in_a_process(call, tmp_path):
    dump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not os.access(dump, os.X_OK):
        pytest.skip("this Triton brings no cuobjdump")
    caches = {"TRITON_CACHE_DIR": str(tmp_path / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    done = subprocess.run(
        [sys.executable, "-c", f"from tests import test_codegen; test_codegen.{call}"],
        cwd=ROOT, env={**os.environ, **caches}, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.slow
def test_the_fused_student(tmp_path):
    in_a_process("check_student(True, 90)", tmp_path)


@pytest.mark.slow
def test_the_plain_student(tmp_path):
    in_a_process("check_student(False, 80)", tmp_path)


@pytest.mark.slow
def test_the_augmentation(tmp_path):
    in_a_process("check_augmentation(100)", tmp_path)


@pytest.mark.slow
def test_every_gpu_gets_code_and_a_wrong_layout_would_be_seen(tmp_path):
    in_a_process("check_every_gpu()", tmp_path)


def student(is_fused, capability):
    """The code of a small ReActNet, whose channels are multiples of 16 as ReActNet-A's are."""
    from benchmarks import codegen

    torch.set_num_threads(1)
    network = ReActNet(Config(width=WIDTH, multiples=MULTIPLES)).to(memory_format=torch.channels_last).train()
    network.fused = is_fused
    images = torch.empty(BATCH, 3, SIDE, SIDE, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    with (
        mock.patch("models.weight_signs.has_kernels", lambda _: True),
        mock.patch("models.halfblock.has_kernels", lambda _: True),
    ):
        return codegen.generate(network, images, capability=capability)


def half_blocks():
    """Elements of what each half-block reads and writes: sign, convolution, residual; and whether a sign follows."""
    found, side, blocks = [], SIDE // 2, list(itertools.pairwise(MULTIPLES))
    for number, (a, b) in enumerate(blocks):
        before, is_pooled = side, a != b and number > 0
        side //= 1 + is_pooled
        full, inside, out = (BATCH * WIDTH * c * s * s for c, s in ((a, before), (a, side), (b, side)))
        found.append((full, inside, full, is_pooled, 1))
        found.append((inside, out, inside, a != b, int(number < len(blocks) - 1)))
    return found


def expected_bytes():
    """What the fused network must move, forward and backward, without weights and statistics: step.md 3."""
    stem, images = BATCH * WIDTH * (SIDE // 2) ** 2, BATCH * 3 * SIDE**2
    last = half_blocks()[-1][1]
    forward = images + stem + stem + 3 * stem + last  # convolution, statistics, normalization with sign; mean
    backward = 2 * last  # gradient of the mean, which Inductor writes twice
    for sign, c, residual, is_other, signs in half_blocks():
        forward += sign + c + c + (2 + signs) * c + residual
        backward += 4 * c + residual + 3 * c + c + 2 * sign  # sums, input, convolution
        backward += c + residual if is_other else 0  # spread or added up, by PyTorch
    backward += 4 * stem + 5 * stem + stem + images  # of the stem: sums, input, convolution
    return 2 * forward, 2 * backward  # 16 bits


def check_student(is_fused, cc):
    from benchmarks import codegen

    generated = student(is_fused, CAPABILITIES[cc])
    forward, backward = (Counter(re.sub(r"_\d+$", "", name) for name in graph.launches) for graph in generated)
    halves = 2 * (len(MULTIPLES) - 1)
    convolutions = 1 + halves
    if not is_fused:  # both 1x1 convolutions of a doubling block stand alone
        convolutions += sum(a != b for a, b in itertools.pairwise(MULTIPLES))
    outside = {name: count for name, count in (forward + backward).items() if "." in name}
    wanted = {  # no operator falls back to one of PyTorch's but these
        "extern_kernels.convolution": convolutions,
        "extern_kernels.addmm": 1,
        "extern_kernels.mm": 2,
        "torch.ops.aten.convolution_backward.default": convolutions,
    }
    if is_fused:
        wanted["torch.ops.burn.weight_signs.default"] = 1
        assert forward["_statistics_kernel"] == forward["_apply_kernel"] == halves, forward
        assert backward["_sums_kernel"] == backward["_input_kernel"] == halves, backward
    assert outside == wanted, outside
    for graph in generated:  # what convolutions read and write, and every map between them, lies in channels_last
        assert {m.innermost for m in graph.maps} <= CHANNELS, [m for m in graph.maps if m.innermost not in CHANNELS]
        assert len(graph.launches) == graph.kernels and f"cc={cc}," in graph.code
    if not is_fused:
        return
    for graph, expected in zip(generated, expected_bytes(), strict=True):
        assert 1 <= graph.bytes / expected < 1.02, graph.bytes / expected
    codes = codegen.machine_code(generated, CAPABILITIES[cc], is_large)
    assert all(code.spilled == 0 for code in codes), codes
    custom = [code for code in codes if code.name.startswith("_")]
    assert len(custom) > 10 and all(code.wide and code.registers <= 168 for code in custom), custom


def is_large(name, source):
    """A kernel of ours, or one over the largest maps."""
    sides = re.findall(r"^    \w*numel = (\d+)$", source, re.M)
    return name.startswith("_") or math.prod(map(int, sides)) > 4_000_000


def check_augmentation(cc):
    from benchmarks import codegen

    torch.set_num_threads(1)
    count, side = 8, 64
    values = {
        "images": torch.zeros(count, side, side, 3, dtype=torch.uint8),
        "color": torch.rand(count, 9),
        "jitter": (torch.rand(count, 6, 3), torch.rand(count)),
        "gray": True,
        "radius": 6,
        "solarize": True,
        "mean": torch.rand(3),
        "std": torch.rand(3),
        "dtype": torch.bfloat16,
    }
    inputs = [values[name] for name in inspect.signature(augment._together).parameters]
    generated = codegen.generate(augment._together, *inputs, capability=CAPABILITIES[cc], is_trained=False)
    (graph,) = generated
    assert not [name for name in graph.launches if "." in name]  # no fallback
    # step.md 1.2: some 25 MB for an image and view of 224 pixels.
    assert graph.kernels <= 22 and 480 < graph.bytes / (count * side * side) < 510
    codes = codegen.machine_code(generated, CAPABILITIES[cc], lambda _, source: "reflection" in source)
    for name in {code.name for code in codes}:  # of the configurations Inductor does not take one that spills
        assert any(code.spilled == 0 for code in codes if code.name == name), name


def check_every_gpu():
    from benchmarks import codegen

    torch.set_num_threads(1)
    network = torch.nn.Sequential(torch.nn.Conv2d(16, 32, 3, padding=1), torch.nn.BatchNorm2d(32), torch.nn.ReLU())
    network, images = network.to(memory_format=torch.channels_last), torch.zeros(64, 16, 48, 48)
    last = images.contiguous(memory_format=torch.channels_last)
    bad = codegen.generate(network, images)
    assert 48 in {m.innermost for graph in bad for m in graph.maps}
    moved = set()
    for cc, capability in CAPABILITIES.items():
        graphs = codegen.generate(network, last, capability=capability)
        assert {m.innermost for graph in graphs for m in graph.maps} <= {16, 32}
        assert all(f"cc={cc}," in graph.code and f"major={cc // 10}," in graph.code for graph in graphs)
        moved.add(sum(graph.bytes for graph in graphs))
        codes = codegen.machine_code(graphs[:1], capability, lambda name, _: "poi" in name)
        assert codes and all(code.spilled == 0 for code in codes)
    assert len(moved) == 1 and moved.pop() < sum(graph.bytes for graph in bad)
    assert torch.compile(lambda x: x.sin() + 1)(torch.zeros(3)).equal(torch.ones(3))  # the CPU's Inductor is as it was
