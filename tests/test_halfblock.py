"""The fused half-block: against the plain network in float64, kernels by the interpreter, their machine code."""

import copy
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from engine import checkpoint
from engine.errors import RecipeError
from models import halfblock
from models.reactnet import Config, ReActNet
from tests.runs import run
from tests.tiny import ROOT, tiny

triton = pytest.importorskip("triton", reason="triton is not installed")
F64 = torch.float64


def networks(**keys):
    """A network whose every parameter has left its initial value, and its fused twin."""
    torch.manual_seed(0)
    net = ReActNet(Config(width=3, **keys)).to(memory_format=torch.channels_last).train()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if any(part in name for part in ("shift", "norm", "prelu")):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    other = copy.deepcopy(net)
    other.fused = True
    return net, other


def assert_same_gradients(net, other):
    for (name, p), q in zip(net.named_parameters(), other.parameters(), strict=True):
        assert (p.grad - q.grad).norm() <= 1e-10 * p.grad.norm(), name


@pytest.mark.parametrize("weights", ["real", "binary"])
@pytest.mark.parametrize("estimator", ["burn", "reactnet"])
def test_fused_network_equals_the_plain_one_in_float64(weights, estimator):
    torch.set_default_dtype(F64)
    try:
        net, other = networks(weights=weights, estimator=estimator)
        x = torch.randn(5, 3, 64, 32).contiguous(memory_format=torch.channels_last)
        a, b = net(x), other(x)
        g = torch.randn_like(a)
        a.backward(g), b.backward(g)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.allclose(a, b, atol=1e-12)
    assert_same_gradients(net, other)
    for (name, p), q in zip(net.named_buffers(), other.buffers(), strict=True):
        assert torch.allclose(p, q, atol=1e-12), name
    net.eval(), other.eval()
    assert torch.allclose(net(x), other(x), atol=1e-12)


def test_accumulated_gradients_equal_the_plain_ones():
    # β and shift_in have one gradient; in shared memory the second backward would add it twice.
    torch.set_default_dtype(F64)
    try:
        net, other = networks()
        for _ in range(3):
            x = torch.randn(4, 3, 32, 32).contiguous(memory_format=torch.channels_last)
            a, b = net(x), other(x)
            g = torch.randn_like(a)
            a.backward(g), b.backward(g)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same_gradients(net, other)
    memory = [p.grad.data_ptr() for p in other.parameters()]
    assert len(set(memory)) == len(memory)


def test_convolutions_before_a_fused_half_give_whole_numbers():
    _, net = networks()
    seen = []
    original = halfblock.statistics
    try:
        halfblock.statistics = lambda c: seen.append(c.detach()) or original(c)
        net(torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last))
    finally:
        halfblock.statistics = original
    assert len(seen) == 26 and all(torch.equal(c, c.round()) for c in seen)


@pytest.mark.slow
def test_fused_network_is_one_graph():
    _, net = networks(multiples=(1, 2, 4, 4))
    explained = torch._dynamo.explain(net)(torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last))
    assert explained.graph_break_count == 0 and explained.graph_count == 1
    torch._dynamo.reset()


def test_checkpoints_do_not_know_of_kernels(tmp_path):
    plain = tiny("burn_stage2.yaml", tmp_path / "a")
    fused = tiny("burn_stage2.yaml", tmp_path / "b", "run.kernels=fused")
    a, b = run(plain), run(fused)
    assert a["method"].keys() == b["method"].keys()
    assert [v.shape for v in a["method"].values()] == [v.shape for v in b["method"].values()]
    longer = tiny("burn_stage2.yaml", tmp_path / "b", "run.kernels=torch", "run.duration=8it")
    assert run(longer, resume=True, allow_changes=True)["step"] == 8


def test_a_checkpoint_from_before_a_key_resumes_with_its_default(tmp_path):
    recipe = tiny("burn_stage2.yaml", tmp_path)
    state = run(recipe)
    folder = recipe.folder / "checkpoints"
    del state["identity"]["run.kernels"]
    state["recipe"] = state["recipe"].replace("  kernels: torch\n", "")
    assert "kernels" not in state["recipe"]
    shutil.rmtree(folder)
    state.pop("format")
    checkpoint.save(folder, state.pop("step"), state, 1)
    run(recipe, resume=True)
    with pytest.raises(RecipeError, match=r"run\.kernels was torch, is fused"):
        run(tiny("burn_stage2.yaml", tmp_path, "run.kernels=fused"), resume=True)


# ------------------------------------------------------------------------------------------------ kernels


def inputs(residual, dtype, batch, channels, height, width):
    torch.manual_seed(channels + height)

    def nhwc(b, c, h, w, scale=1.0):
        return (torch.randn(b, c, h, w) * scale).to(dtype).contiguous(memory_format=torch.channels_last)

    c = nhwc(batch, channels, height, width, 30.0)
    if residual == "pooled":
        stream = nhwc(batch, channels, 2 * height, 2 * width)
    elif residual == "doubled":
        stream = nhwc(batch, channels // 2, height, width)
    else:
        stream = nhwc(batch, channels, height, width)
    vectors = [torch.randn(channels) * scale for scale in (0.03, 0.3, 0.5, 0.3, 0.3)]
    grads = [nhwc(batch, channels, height, width) for _ in range(2)]
    return c, stream, vectors, grads


def in_a_process(function, **environment):
    """Run a function of this file in a process whose Triton reads these variables when it is imported."""
    command = [sys.executable, "-c", f"from tests import test_halfblock; test_halfblock.{function}()"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr


def interpret():
    """All kernels against the PyTorch functions, by the interpreter; what torch.empty gives is NaN."""
    from models import halfblock_triton as kernels

    empty, empty_like = torch.empty, torch.empty_like
    torch.empty = lambda *a, **k: empty(*a, **k).fill_(float("nan"))
    torch.empty_like = lambda *a, **k: empty_like(*a, **k).fill_(float("nan"))

    def same(x):
        return x

    shapes = [(2, 48, 5, 7), (1, 16, 3, 3), (3, 20, 9, 5), (2, 130, 4, 2)]  # ragged rows and columns
    cases = itertools.product(("same", "pooled", "doubled"), ("burn", "reactnet"), (True, False), (0, 1))
    for number, (residual, estimator, has_sign, half) in enumerate(cases):
        shape = shapes[(number // 2 + 2 * half) % 4]  # two for each case
        dtype = (torch.float32, torch.float16, torch.bfloat16)[number % 3]
        c, stream, vectors, (gh, gs) = inputs(residual, dtype, *shape)
        scale, shift, slope, _, threshold = vectors
        what = f"{residual} {estimator} sign={has_sign} {shape} {dtype}"
        near = {"atol": 2e-5, "rtol": 2e-5} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
        for mine, wanted in zip(kernels.statistics(c, wrap=same), halfblock.statistics(c), strict=True):
            assert torch.allclose(mine, wanted, rtol=1e-4, atol=1e-3), what
        wanted = halfblock.apply(c, stream, vectors, residual, has_sign)
        got = kernels.apply(c, stream, vectors, residual, has_sign, wrap=same)
        assert torch.allclose(got[0].float(), wanted[0].float(), **near), what
        if has_sign:
            z = got[0].float() + threshold.view(1, -1, 1, 1)
            assert torch.equal(got[1].float(), z.sign()), what  # of the h that was stored, to the bit
        mean, var = halfblock.statistics(c)
        rest = (c, stream, [*vectors, mean, (var + 1e-5).rsqrt()], residual, estimator, has_sign)
        du, sums = kernels.backward_sums(gh, gs, *rest, wrap=same)
        wanted_du, wanted_sums = halfblock.backward_sums(gh, gs, *rest)
        # Where |z| is at the estimator's edge, two roundings of h may fall on two sides: few places, never in float32.
        off = ~torch.isclose(du.float(), wanted_du.float(), **near)
        assert off.float().mean() <= (0 if dtype == torch.float32 else 5e-3), (what, off.float().mean())
        scale_of_sums = wanted_sums.abs().amax(dim=1, keepdim=True).clamp(min=1.0)
        tolerance = 1e-4 if dtype == torch.float32 else 3e-2
        clean = ~off.any(dim=3).any(dim=2).any(dim=0)  # channels without such a place
        assert clean.float().mean() > 0.5, what
        assert ((sums - wanted_sums).abs() / scale_of_sums)[:, clean].max() < tolerance, what
        got = kernels.backward_input(gh, c, scale, slope, shift, wrap=same)
        assert torch.allclose(got.float(), halfblock.backward_input(gh, c, scale, slope, shift).float(), **near), what


@pytest.mark.slow
def test_kernels_by_the_interpreter():
    in_a_process("interpret", TRITON_INTERPRET="1")


def interpret_network():
    """A step of the whole network through the kernels, by the interpreter, against the same in PyTorch."""
    torch.library.wrap_triton = lambda kernel: kernel  # before the kernels' file takes it
    from models import halfblock_triton, weight_signs

    weights = [torch.randn(5, 3, 3, 3), torch.randn(2, 700, 1, 1), torch.randn(7, 20, 3, 3)]
    weights[1][0, :9], weights[2] = 0, weights[2].contiguous(memory_format=torch.channels_last)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        wanted, got = weight_signs.signs_and_scales(weights, dtype), halfblock_triton.weight_signs(weights, dtype)
        assert torch.equal(got[0], wanted[0]) and torch.allclose(got[1], wanted[1], rtol=1e-6)

    used = []
    kernel = halfblock_triton.weight_signs
    halfblock_triton.weight_signs = lambda *a: used.append(1) or kernel(*a)
    for keys in ({"weights": "binary", "estimator": "reactnet"}, {"weights": "real"}):
        _, plain = networks(multiples=(1, 2, 4, 4), **keys)
        net = copy.deepcopy(plain)
        # Enough positions in the last map that BatchNorm's backward does not cancel to rounding errors.
        x = torch.randn(5, 3, 32, 32).contiguous(memory_format=torch.channels_last)
        a = plain(x)
        g = torch.randn_like(a)
        a.backward(g)
        weight_signs.has_kernels = halfblock.has_kernels = lambda _: True
        b = net(x)
        b.backward(g)
        weight_signs.has_kernels = halfblock.has_kernels = lambda _: False
        assert (a - b).norm() <= 1e-4 * a.norm(), keys
        for (name, p), q in zip(plain.named_parameters(), net.parameters(), strict=True):
            apart = (p.grad - q.grad).norm() / p.grad.norm()
            assert apart <= 1e-3, (keys, name, apart)
        for (name, p), q in zip(plain.named_buffers(), net.buffers(), strict=True):
            assert torch.allclose(p, q, atol=1e-4, rtol=1e-4), (keys, name)
    assert len(used) == 1  # one kernel for all weights of a forward; none for real ones


@pytest.mark.slow
def test_a_step_through_the_kernels_by_the_interpreter():
    in_a_process("interpret_network", TRITON_INTERPRET="1")


def machine_code():
    """Compile every kernel without a GPU; registers, spills and 16-byte accesses. In every form for
    sm_90, in the largest for sm_80 and sm_100."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from models import halfblock_triton as kernels

    class Driver:
        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

        def get_active_torch_device(self):
            return torch.device("cuda", 0)

        def get_current_device(self):
            return 0

        def is_active(self):
            return True

    triton.runtime.driver.set_active(Driver())
    dump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    stream = ("c_ptr", "stream_ptr", "h_ptr", "s_ptr", "grad_h_ptr", "grad_s_ptr", "du_ptr", "dc_ptr", "sign_ptr")
    types = {**dict.fromkeys(stream, "*fp16"), "table_ptr": "*i64"}
    bm, bc = kernels.tile(256)
    flags = [{"POOLED": p, "DOUBLED": d} for p, d in ((False, False), (True, False), (False, True))]
    plan = [(kernels._statistics_kernel, {"ROWS": kernels.ROWS}), (kernels._input_kernel, {})]
    plan += [(kernels._apply_kernel, {**flag, "SIGN": True}) for flag in flags]
    plan += [
        (kernels._sums_kernel, {**flag, "SIGN": True, "QUADRATIC": quadratic, "ROWS": kernels.ROWS})
        for flag in flags
        for quadratic in (False, True)
    ]
    plan += [(kernels._weight_kernel, {"BLOCK": kernels.TILE})]
    others = [(80, *item) for item in plan[-3:]] + [(100, *item) for item in plan[-3:]]
    for capability, kernel, flag in [*((90, *item) for item in plan), *others]:
        constants = flag if "BLOCK" in flag else {**flag, "BM": bm, "BC": bc}
        names = kernel.arg_names
        signature = {
            n: "constexpr" if n in constants else types.get(n, "*fp32" if n.endswith("_ptr") else "i32") for n in names
        }
        divisible = [i for i, n in enumerate(names) if n.endswith("_ptr") or n in ("C", "M", "stream_channels")]
        compiled = triton.compile(
            ASTSource(
                fn=kernel,
                signature=signature,
                constexprs={(names.index(n),): value for n, value in constants.items()},
                attrs={(i,): [["tt.divisibility", 16]] for i in divisible},
            ),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": 4},
        )
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            said = [
                subprocess.run([dump, how, file.name], capture_output=True, text=True)
                for how in ("-res-usage", "-sass")
            ]
        usage, code = (done.stdout + done.stderr for done in said)
        registers = int(re.search(r"REG:(\d+)", usage)[1])
        spilled = len(re.findall(r"\b(?:LDL|STL)", code))
        wide = len(re.findall(r"(?:LDG|STG)\.E[^ ]*128", code))
        print(capability, kernel.__name__, flag, "registers", registers, "spilled", spilled, "16-byte accesses", wide)
        assert registers <= (168 if kernel is kernels._sums_kernel else 128), (kernel.__name__, flag, registers)
        assert spilled == 0, (kernel.__name__, flag)
        # The rows of weights start where they start: the table's addresses promise nothing.
        assert wide >= 1 or kernel is kernels._weight_kernel, (kernel.__name__, flag)


@pytest.mark.slow
def test_machine_code(tmp_path):
    dump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not os.access(dump, os.X_OK):
        pytest.skip("this Triton brings no cuobjdump")
    in_a_process("machine_code", TRITON_CACHE_DIR=str(tmp_path))
