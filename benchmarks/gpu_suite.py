"""Everything that only a GPU can tell, in at most ten minutes: one command, one JSON.

    python benchmarks/gpu_suite.py --out benchmarks/gpu.json

Runs with torch alone; what needs DALI or images is skipped with its reason. Without a GPU it says so and ends.
"""

import argparse
import itertools
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
import torch.nn.functional as F

from engine import recipe as recipes
from engine.bench import step as step_bench
from engine.bench.clock import ceilings, device_seconds
from engine.provenance import environment
from models import halfblock
from models.binary import BinaryConv2d
from models.reactnet import Config, ReActNet
from models.weight_signs import signs_and_scales


class Skip(Exception):
    """A section cannot run here, and why."""


def shapes() -> list[tuple[str, int, int, int, int, int]]:
    """The distinct binary convolutions of ReActNet-A at 224: name, C_in, C_out, kernel, stride, input side."""
    found: dict[tuple[int, ...], str] = {}
    with torch.device("meta"):
        network = ReActNet(Config())

        def add(name: str) -> Callable[..., None]:
            def hook(module: Any, args: Any, output: Any) -> None:
                key = (
                    module.in_channels,
                    module.out_channels,
                    module.kernel_size[0],
                    module.stride[0],
                    args[0].shape[-1],
                )
                found.setdefault(key, name)

            return hook

        for name, module in network.named_modules():
            if isinstance(module, BinaryConv2d):
                module.register_forward_hook(add(name))
        network(torch.empty(1, 3, 224, 224))
    return [(name, *key) for key, name in found.items()]  # type: ignore[misc]


def exact_convolutions() -> dict[str, Any]:
    """Products of signs in fp16 must be whole numbers, equal to the bit to float64's."""
    wrong = []
    for name, c_in, c_out, kernel, stride, side in shapes():
        x = torch.randn(8, c_in, side, side, device="cuda").sign().to(memory_format=torch.channels_last)
        w = torch.randn(c_out, c_in, kernel, kernel, device="cuda").sign()
        options = {"stride": stride, "padding": kernel // 2}
        got = F.conv2d(x.half(), w.half(), **options)
        if not torch.equal(got.double(), F.conv2d(x.double(), w.double(), **options)):
            wrong.append(name)
    return {"shapes": len(shapes()), "not_equal": wrong}


def convolutions(batch: int) -> dict[str, Any]:
    """What cuDNN reaches of the product's ceiling in each binary convolution of the student."""
    torch.backends.cudnn.benchmark = True
    limits = ceilings(torch.device("cuda"))
    assert limits is not None
    found = {}
    for name, c_in, c_out, kernel, stride, side in shapes():
        x = torch.randn(batch, c_in, side, side, device="cuda").sign().half().to(memory_format=torch.channels_last)
        w = torch.randn(c_out, c_in, kernel, kernel, device="cuda").sign().half().to(memory_format=torch.channels_last)
        found[name] = convolution_times(x, w, stride, limits.matmul_flops, device_seconds)
    return found


def convolution_times(
    x: torch.Tensor, w: torch.Tensor, stride: int, ceiling: float, seconds_of: Callable[[Callable[[], Any]], float]
) -> dict[str, float]:
    """Microseconds of one convolution and of both its gradients, and their share of the ceiling."""
    padding = w.shape[-1] // 2
    y = F.conv2d(x, w, stride=stride, padding=padding)
    grad = torch.randn_like(y)
    one, two, no = [1, 1], [stride, stride], [0, 0]
    pads, wanted = [padding, padding], [True, True, False]
    backward = torch.ops.aten.convolution_backward
    flops = 2 * y.numel() * w[0].numel()
    forward_s = seconds_of(lambda: F.conv2d(x, w, stride=stride, padding=padding))
    backward_s = seconds_of(lambda: backward(grad, x, w, None, two, pads, one, False, no, 1, wanted))
    return {
        "forward_us": 1e6 * forward_s,
        "backward_us": 1e6 * backward_s,
        "forward_of_matmul": flops / forward_s / ceiling,
        "backward_of_matmul": 2 * flops / backward_s / ceiling,
    }


def weights() -> dict[str, Any]:
    """The kernel of all binary weights against PyTorch, and its time beside theirs."""
    from models import halfblock_triton as kernels

    network = ReActNet(Config()).cuda().to(memory_format=torch.channels_last)
    all_weights = [m.weight.detach() for m in network.modules() if isinstance(m, BinaryConv2d)]
    signs, scales = kernels.weight_signs(all_weights, torch.float16)
    wanted = signs_and_scales([weight.double() for weight in all_weights], torch.float16)  # float64: by PyTorch
    assert torch.equal(signs, wanted[0]) and torch.allclose(scales.double(), wanted[1], rtol=1e-5)
    return {
        "kernel_us": 1e6 * device_seconds(lambda: kernels.weight_signs(all_weights, torch.float16)),
        "one_by_one_us": 1e6
        * device_seconds(lambda: [(w.sign().half(), w.abs().mean((1, 2, 3))) for w in all_weights]),
    }


def half_blocks() -> dict[str, Any]:
    """The kernels against PyTorch on this device, at real sizes; and what of the copy ceiling they reach."""
    limits = ceilings(torch.device("cuda"))
    assert limits is not None
    cases = (("same", 32, 112), ("doubled", 64, 112), ("same", 128, 56), ("pooled", 256, 28), ("doubled", 512, 14),
             ("same", 1024, 7))  # fmt: skip
    return {
        f"{residual} {channels} {side}": _half_block(residual, channels, side, limits.copy_bytes_per_second)
        for residual, channels, side in cases
    }


def _half_block(residual: str, channels: int, side: int, copy: float) -> dict[str, Any]:
    from models import halfblock_triton as kernels

    torch.manual_seed(0)

    def nhwc(channels: int, side: int, scale: float = 1.0) -> torch.Tensor:
        x = torch.randn(256, channels, side, side, device="cuda") * scale
        return x.half().contiguous(memory_format=torch.channels_last)

    c, grad_h, grad_s = nhwc(channels, side, 30.0), nhwc(channels, side), nhwc(channels, side)
    stream = nhwc(channels // (2 if residual == "doubled" else 1), side * (2 if residual == "pooled" else 1))
    vectors = [torch.randn(channels, device="cuda") * s for s in (0.03, 0.3, 0.5, 0.3, 0.3)]
    scale, shift, slope, out, threshold = vectors

    mean, var = kernels.statistics(c)
    want_var, want_mean = torch.var_mean(c.float(), dim=(0, 2, 3), correction=0)
    assert torch.allclose(mean, want_mean, atol=1e-3, rtol=1e-4) and torch.allclose(var, want_var, rtol=1e-3)
    h, s = kernels.apply(c, stream, vectors, residual, True)
    u = halfblock.pre_activation(c, stream, scale, shift, residual)
    want = torch.where(u > 0, u, u * halfblock.per_channel(slope)) + halfblock.per_channel(out)
    assert torch.allclose(h.float(), want, atol=2e-2, rtol=2e-2)
    assert torch.equal(s.float(), (h.float() + halfblock.per_channel(threshold)).sign())
    all_vectors = [*vectors, mean, (var + 1e-5).rsqrt()]
    rest = (c, stream, all_vectors, residual, "burn", True)
    du, sums = kernels.backward_sums(grad_h, grad_s, *rest)
    in_float64 = [x.double() for x in (grad_h, grad_s, c, stream)]  # float64 goes through the PyTorch formulas
    vectors64 = [vector.double() for vector in all_vectors]
    want_du, want_sums = halfblock.backward_sums(*in_float64, vectors64, residual, "burn", True)
    off = ~torch.isclose(du.double(), want_du, atol=2e-2, rtol=2e-2)  # where |z| rounds to the other side of 1
    assert off.double().mean() < 2e-3, off.double().mean()
    assert ((sums - want_sums).abs() / want_sums.abs().amax(dim=1, keepdim=True)).max() < 2e-2
    dc = kernels.backward_input(grad_h, c, scale, shift, slope)
    want_dc = halfblock.backward_input(*(x.double() for x in (grad_h, c, scale, shift, slope)))
    assert torch.allclose(dc.double(), want_dc, atol=2e-2, rtol=2e-2)
    work: dict[str, tuple[Callable[[], Any], int]] = {
        "statistics": (lambda: kernels.statistics(c), c.nbytes),
        "apply": (lambda: kernels.apply(c, stream, vectors, residual, True), 3 * c.nbytes + stream.nbytes),
        "backward_sums": (lambda: kernels.backward_sums(grad_h, grad_s, *rest), 4 * c.nbytes + stream.nbytes),
        "backward_input": (lambda: kernels.backward_input(grad_h, c, scale, shift, slope), 3 * c.nbytes),
    }
    times = {name: (device_seconds(run), moved) for name, (run, moved) in work.items()}
    return {name: {"us": 1e6 * seconds, "of_copy": moved / seconds / copy} for name, (seconds, moved) in times.items()}


def tiles() -> dict[str, float]:
    """Microseconds of the half-block's kernels by the size of their tiles, in two of its shapes: what to write into
    models/halfblock_triton.py for this device."""
    from models import halfblock_triton as kernels

    found, chosen = {}, (kernels.TILE, kernels.ROWS)
    for channels, side in ((128, 56), (512, 14)):
        for kernels.TILE, kernels.ROWS in itertools.product((512, 1024, 2048), (256, 512, 1024)):
            name = f"{channels} channels of {side}, TILE {kernels.TILE}, ROWS {kernels.ROWS}"
            found[name] = 1e6 * _all_kernels(channels, side)
    kernels.TILE, kernels.ROWS = chosen
    return found


def _all_kernels(channels: int, side: int) -> float:
    from models import halfblock_triton as kernels

    c, stream, grad_h, grad_s = (
        torch.randn(256, channels, side, side, device="cuda").half().to(memory_format=torch.channels_last)
        for _ in range(4)
    )
    vectors = [torch.rand(channels, device="cuda") for _ in range(7)]

    def work() -> None:
        kernels.statistics(c)
        kernels.apply(c, stream, vectors[:5], "same", True)
        kernels.backward_sums(grad_h, grad_s, c, stream, vectors, "same", "burn", True)
        kernels.backward_input(grad_h, c, *vectors[:3])

    return device_seconds(work)


def step(recipe: str, micro_batch: int) -> dict[str, Any]:
    """Every variant of the step benchmark, interleaved."""
    loaded = recipes.load(
        ROOT / "recipes" / recipe,
        [f"data.batch_size={micro_batch}", f"data.micro_batch={micro_batch}", "data.backend=synthetic",
         "data.expect_images=null", "data.options={}", "run.device=cuda"],
    )  # fmt: skip
    measured = step_bench.measure(loaded, "step", steps=10, rounds=4, warm_up=5)
    print(step_bench.table(measured), flush=True)
    result = asdict(measured)
    if recipe == "burn_stage2.yaml":
        result["traffic"] = _traffic(measured)
    return result


def _traffic(measured: step_bench.Result) -> dict[str, dict[str, float]]:
    """Bytes that benchmarks/traffic.py counted for these graphs, and the bandwidth that they and the speed make."""
    networks = json.loads((ROOT / "benchmarks" / "traffic.json").read_text())["networks"]
    plain = "student, compiled", "teacher, teacher_bn train"
    graphs = {
        "compiled": plain,
        "combo": tuple(f"{name}, combo kernels" for name in plain),
        "fused": ("student, fused", plain[1]),
        "fused, teacher_bn eval": ("student, fused", "teacher, teacher_bn eval"),
    }
    assert measured.ceilings is not None
    traffic = {}
    for variant, names in graphs.items():
        counted = sum(networks[name]["mb"] for name in names)
        speed = measured.variants[variant].images_per_second
        of_copy = 1e6 * counted * speed / measured.ceilings.copy_bytes_per_second
        traffic[variant] = {"counted_mb_per_image": counted, "of_copy": of_copy}
        print(f"{variant}: {counted:.0f} MB per image, {counted * speed / 1e6:.2f} TB/s, {100 * of_copy:.0f} % of copy")
    return traffic


def with_loader(images: Path | None) -> dict[str, Any]:
    """The step fed by DALI, decoding on the GPU."""
    if images is None:
        raise Skip("no images: --images FOLDER, such as tools/make_images.py photos makes")
    from loaders import dali_loader

    if lacks := dali_loader.Options.missing():
        raise Skip(lacks)
    loaded = recipes.load(
        ROOT / "recipes" / "burn_stage2.yaml",
        [f"data.train={images}", "data.batch_size=256", "data.micro_batch=256", "data.expect_images=null",
         "run.device=cuda", "evals=[]"],
    )  # fmt: skip
    result = step_bench.measure(loaded, "train", steps=8, rounds=3, warm_up=5)
    print(step_bench.table(result), flush=True)
    return asdict(result)


def tests() -> dict[str, Any]:
    """tests/test_gpu.py."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_gpu.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    return {"exit_code": done.returncode, "said": done.stdout[-3000:]}


def _ceilings() -> dict[str, float]:
    limits = ceilings(torch.device("cuda"))
    assert limits is not None
    return asdict(limits)


def main() -> int:
    """Run every section; one that fails leaves its error and the others run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "gpu.json")
    parser.add_argument("--images", type=Path, help="a folder of class folders, for the step with DALI")
    parser.add_argument("--micro-batch", type=int, default=256)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: nothing to measure", file=sys.stderr)
        return 2
    started = time.monotonic()
    result: dict[str, Any] = {"device": torch.cuda.get_device_name(), "environment": environment(), "sections": {}}
    sections: dict[str, Callable[[], Any]] = {
        "ceilings": _ceilings,
        "exact convolutions": exact_convolutions,
        "convolutions": lambda: convolutions(arguments.micro_batch),
        "half blocks": half_blocks,
        "weights": weights,
        "step, BURN stage 2": lambda: step("burn_stage2.yaml", arguments.micro_batch),
        "tests": tests,
        "tiles": tiles,
        "with loader": lambda: with_loader(arguments.images),
        "step, BURN stage 1": lambda: step("burn_stage1.yaml", arguments.micro_batch),
    }
    for name, section in sections.items():
        print(f"== {name} ({time.monotonic() - started:.0f} s)", flush=True)
        try:
            result["sections"][name] = section()
        except Skip as reason:
            result["sections"][name] = {"skipped": str(reason)}
        except Exception:
            traceback.print_exc()
            result["sections"][name] = {"failed": traceback.format_exc()[-3000:]}
        torch.cuda.empty_cache()
        # After each section: a machine that is taken away keeps what is done.
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1, default=str) + "\n", encoding="utf-8")
    print(f"{arguments.out}: {time.monotonic() - started:.0f} s")
    return 1 if any("failed" in (part or {}) for part in result["sections"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
