"""Everything that only a GPU can tell, in at most nine minutes: one command, one JSON.

    python benchmarks/gpu_suite.py --out benchmarks/gpu.json --wheels wheels
    python benchmarks/gpu_suite.py --out rehearsal.json --rehearse      # every line of it, tiny, on a CPU

Each section is a process of its own that is ended at its limit, so that neither a hang nor a lost CUDA context nor a
failed compilation costs more than itself; what a section has found is kept as it finds it, and the JSON is written
after each. `--wheels` names a folder with wheels of what the machine lacks (pydantic and tqdm with what they need;
DALI, if its loader is to be measured; large ones may be split into `name.whl.00`, `name.whl.01`, ...): they are
unpacked beside the results, nothing is installed.
"""

import argparse
import contextlib
import importlib.util
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import xml.etree.ElementTree as ElementTree
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
NEEDED = {  # what is imported -> what brings it
    "torch": "torch", "torchvision": "torchvision", "numpy": "numpy", "yaml": "pyyaml", "tensorboard": "tensorboard",
    "PIL": "pillow", "pytest": "pytest", "pydantic": "pydantic", "pydantic_core": "pydantic", "tqdm": "tqdm",
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """How large everything is: for a GPU, or to rehearse on a CPU."""

    device: str
    micro_batch: int
    recipe: str
    overrides: tuple[str, ...]
    """Of the recipe, beside what names data and device."""
    shapes: int
    """At most so many convolutions and half-blocks."""
    shrink: int
    """Sides and channels are divided by this."""
    steps: int
    """Of the training run."""
    images: int
    """JPEGs that are made for the loaders."""

    @property
    def on_gpu(self) -> bool:
        """Whether this is the real thing."""
        return self.device == "cuda"


GPU = Plan("cuda", 256, "burn_stage2.yaml", ("run.amp=fp16",), 10**6, 1, 60, 1024)
REHEARSAL = Plan(
    "cpu", 8, "quick/burn_stage2.yaml", ("run.amp=off", "run.compile=false", "data.eval_batch=8"), 2, 16, 120, 24
)
Keep = Callable[[Any], None]


# ------------------------------------------------------------------------------------------------ sections


def facts(plan: Plan, keep: Keep, work: Path) -> None:
    """The machine, its versions, one allocation, and what it can do at best."""
    import torch

    import loaders
    from engine import accelerator
    from engine.bench.clock import ceilings
    from engine.provenance import environment

    found: dict[str, Any] = {"environment": environment(), "problem": ""}
    device = torch.device(plan.device, 0) if plan.on_gpu else torch.device("cpu")
    if plan.on_gpu:
        found["problem"] = accelerator.why_unusable(device)
        if not found["problem"]:
            properties = torch.cuda.get_device_properties(device)
            found["device"] = properties.name
            found["memory_gib"] = properties.total_memory / 2**30
            found["capability"] = torch.cuda.get_device_capability(device)
            found["nccl"] = torch.cuda.nccl.version()
            found["cudnn"] = torch.backends.cudnn.version()
    keep(found)
    if found["problem"]:
        return
    torch.ones(1 << 20, device=device).sum().item()
    found["back_ends"] = {name: loaders.load(name).Options.missing() or "there" for name in loaders.backends()}
    limits = ceilings(device)
    found["ceilings"] = asdict(limits) if limits else None
    keep(found)


def one_rank(plan: Plan, keep: Keep, work: Path) -> None:
    """A process group of one rank: NCCL, DDP's buckets, a checkpoint, and the end of a run that meets a bad image."""
    images = make_images(work / "images", plan.images)
    base = [*small_recipe(plan, images, work), "run.duration=4it", "run.save_every=2it", "data.backend=folder"]
    base.append("run.compile=false")
    found: dict[str, Any] = {}
    # What torchrun --nproc_per_node=1 sets.
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    rank["MASTER_PORT"] = str(20000 + os.getpid() % 20000)
    code, seconds, said = call([sys.executable, "tools/train.py", *base, "name=one_rank"], **rank)
    found["train"] = {"exit_code": code, "seconds": seconds, "said": "" if code == 0 else said[-1500:]}
    keep(found)
    broken = make_images(work / "broken", plan.images)
    for path in sorted(broken.rglob("*.jpg"))[plan.images // 2 :]:
        path.write_bytes(path.read_bytes()[:600])
    bad = [*(part.replace(str(images), str(broken)) for part in base), "run.duration=1000it", "name=bad_image"]
    code, seconds, said = call([sys.executable, "tools/train.py", *bad], **rank)
    lines = re.findall(r"^error: .*", said, re.M)
    found["bad_image"] = {"exit_code": code, "seconds": seconds, "lines": lines, "said": "" if lines else said[-1500:]}
    keep(found)
    if found["train"]["exit_code"] or code != 2 or len(lines) != 1:
        raise AssertionError("a group of one rank does not train, or does not end as it should")


def tests(plan: Plan, keep: Keep, work: Path) -> None:
    """tests/test_gpu.py: nothing waits, training in each precision, resume to the bit, fused kernels, loaders."""
    report = work / "junit.xml"
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS reads it once in a process
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", f"--junitxml={report}"]
    code, seconds, said = call([*command, "tests/test_gpu.py"], partial=lambda text: keep({"so_far": text[-4000:]}))
    found: dict[str, Any] = {"exit_code": code, "seconds": seconds, "said": said[-4000:], "tests": {}}
    keep(found)
    for case in ElementTree.parse(report).iter("testcase"):
        outcome = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        text = "passed" if outcome is None else f"{outcome.tag}: {outcome.get('message', '')[:300]}"
        found["tests"][case.get("name")] = text
    keep(found)
    if code not in (0, 5):
        raise AssertionError(f"{sum(t.startswith(('failure', 'error')) for t in found['tests'].values())} tests fail")


def loader(plan: Plan, keep: Keep, work: Path) -> None:
    """Every back end of the machine on JPEGs: speed, waits, cores, and what decodes."""
    import torch

    import loaders
    from engine import recipe as recipes
    from engine.bench import loader as loader_bench

    images = make_images(work / "images", plan.images)
    device = torch.device(plan.device, 0) if plan.on_gpu else torch.device("cpu")
    path, *overrides = small_recipe(plan, images, work)
    recipe = recipes.load(Path(path), [*overrides, "data.backend=folder"])
    found: dict[str, Any] = {"decoders": {}}
    for name in loaders.backends():
        options = loaders.load(name).Options
        if not options.missing():
            found["decoders"][name] = options().notes(device)
    keep(found)
    measured = loader_bench.measure(recipe, batches=6 if plan.on_gpu else 1, rounds=2 if plan.on_gpu else 1)
    print(loader_bench.table(measured), flush=True)
    keep({**found, "measured": measured})


def kernels(plan: Plan, keep: Keep, work: Path) -> None:
    """Exact convolutions of signs, the kernel of all weights, and the half-blocks: right, and how near to the copy."""
    import torch

    from engine.bench.clock import ceilings

    device = torch.device(plan.device)
    limits = ceilings(device)
    found: dict[str, Any] = {}
    for name, check in {
        "convolutions": lambda: exact_convolutions(plan, device),
        "weights": lambda: weights(plan, device),
        **{
            f"{residual} {channels} {side}": lambda case=(residual, channels, side): half_block(
                plan, device, *case, limits.copy_bytes_per_second if limits else 1.0
            )
            for residual, channels, side in HALF_BLOCKS[: plan.shapes]
        },
    }.items():
        try:
            found[name] = check()
        except Exception:  # one kernel must not cost the others their check
            found[name] = {"failed": traceback.format_exc()[-1500:]}
        keep(found)
    wrong = [name for name, part in found.items() if "failed" in part]
    if wrong:
        raise AssertionError(f"wrong: {', '.join(wrong)}")


def training(plan: Plan, keep: Keep, work: Path) -> None:
    """tools/train.py as a user starts it: compiled steps, SIGTERM, resume to the end; speed, waiting, memory."""
    images = make_images(work / "images", plan.images)
    command = [sys.executable, "tools/train.py", *small_recipe(plan, images, work), f"run.duration={plan.steps}it",
               "run.log_every=5it", "run.save_every=1000it", "name=training", "--resume"]  # fmt: skip
    metrics = work / "runs/training/metrics.jsonl"

    def rows() -> list[dict[str, Any]]:
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    started = time.monotonic()
    log = work / "training.log"
    with open(log, "w") as out:  # a pipe that nobody reads would stop it
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
    while process.poll() is None and not rows():
        time.sleep(0.05)
    found: dict[str, Any] = {"first_row_after_s": time.monotonic() - started}
    process.send_signal(signal.SIGTERM)
    asked = time.monotonic()
    process.wait()
    said = log.read_text(errors="replace")
    found |= {"stopped_after_s": time.monotonic() - asked, "exit_code_of_sigterm": process.returncode, "rows": rows()}
    keep({**found, "said": said[-1500:]})
    code, seconds, said = call(command)
    found |= {"exit_code": code, "resumed_s": seconds, "rows": rows(), "notes": re.findall(r"^loader .*", said, re.M)}
    keep({**found, "said": said[-1500:]})
    if process.returncode != 75 or code or rows()[-1]["step"] < plan.steps:
        raise AssertionError(f"exit codes {process.returncode} and {code}, last step {rows()[-1]['step']}")


def variants(plan: Plan, keep: Keep, work: Path) -> None:
    """Variants of the step, interleaved, written after each round."""
    from engine import recipe as recipes
    from engine.bench import step as step_bench

    path, *overrides = small_recipe(plan, work, work)
    recipe = recipes.load(Path(path), [*overrides, *NO_FILES])
    names = ("compiled", "fused", "fused, teacher_bn eval") if plan.on_gpu else ("eager",)

    def written(result: step_bench.Result) -> None:
        keep({**asdict(result), "traffic": traffic(result)})

    sizes = {"steps": 10, "rounds": 4, "warm_up": 5} if plan.on_gpu else {"steps": 1, "rounds": 2, "warm_up": 1}
    print(step_bench.table(step_bench.measure(recipe, "step", checks=False, only=names, keep=written, **sizes)))


def tiles(plan: Plan, keep: Keep, work: Path) -> None:
    """Microseconds of the half-block's kernels by the size of their tiles, in two of its shapes: what to write into
    models/halfblock_triton.py for this device."""
    from models import halfblock_triton

    found: dict[str, float] = {}
    chosen = (halfblock_triton.TILE, halfblock_triton.ROWS)
    sizes = itertools.product((512, 1024, 2048), (256, 512, 1024))
    for halfblock_triton.TILE, halfblock_triton.ROWS in list(sizes)[: None if plan.on_gpu else 2]:
        for channels, side in ((128, 56), (512, 14)):
            name = f"{channels} channels of {side}, TILE {halfblock_triton.TILE}, ROWS {halfblock_triton.ROWS}"
            found[name] = 1e6 * all_kernels(plan, channels // plan.shrink, max(side // plan.shrink, 2))
        keep(found)
    halfblock_triton.TILE, halfblock_triton.ROWS = chosen


def convolutions(plan: Plan, keep: Keep, work: Path) -> None:
    """What cuDNN reaches of the product's ceiling in each binary convolution of the student."""
    import torch

    from engine.bench.clock import ceilings

    device = torch.device(plan.device)
    torch.backends.cudnn.benchmark = plan.on_gpu  # of this process alone, and as the engine trains
    limits = ceilings(device)
    found = {}
    for name, c_in, c_out, kernel, stride, side in shapes(plan):
        x, w = signs(plan.micro_batch, c_in, side, device), signs(c_out, c_in, kernel, device)
        found[name] = convolution_times(plan, x, w, stride, limits.matmul_flops if limits else 1.0)
        keep(found)


SECTIONS: dict[str, tuple[Callable[[Plan, Keep, Path], None], int]] = {  # in this order; seconds that each may take
    "facts": (facts, 30),
    "one_rank": (one_rank, 55),
    "tests": (tests, 95),
    "kernels": (kernels, 40),
    "training": (training, 110),
    "loader": (loader, 40),
    "variants": (variants, 130),
    "tiles": (tiles, 20),
    "convolutions": (convolutions, 20),
}
BUDGET = 540
"""Seconds of all sections together."""


# ------------------------------------------------------------------------------------------------ what they measure


HALF_BLOCKS = (("same", 32, 112), ("doubled", 64, 112), ("same", 128, 56), ("pooled", 256, 28), ("doubled", 512, 14),
               ("same", 1024, 7))  # fmt: skip
NO_FILES = ("data.backend=synthetic", "data.options={}")


def small_recipe(plan: Plan, images: Path, work: Path) -> list[str]:
    """The recipe on some images, a batch of one micro-batch, with a random teacher: arguments of tools/train.py."""
    batch = plan.micro_batch
    return [
        str(ROOT / "recipes" / plan.recipe), *plan.overrides, f"data.train={images}", f"data.val={images}",
        f"data.batch_size={batch}", f"data.micro_batch={batch}", "data.expect_images=null", "data.options={}",
        f"run.device={plan.device}", f"run.folder={work / 'runs'}", "evals=[]", "init=[]",
    ]  # fmt: skip


def make_images(folder: Path, count: int) -> Path:
    """JPEGs of some structure, 4:2:0, some 400 x 300 pixels, in two classes."""
    import torch
    from torchvision.io import write_jpeg

    if folder.exists():
        return folder
    generator = torch.Generator().manual_seed(0)
    for number in range(count):
        path = folder / f"class{number % 2}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = torch.rand(1, 3, 12, 16, generator=generator)
        pixels = torch.nn.functional.interpolate(coarse, (288 + number % 32, 400), mode="bicubic")[0]
        write_jpeg((255 * pixels.clamp(0, 1)).to(torch.uint8), str(path))
    return folder


def call(
    command: list[str], partial: Callable[[str], None] = lambda text: None, **environment: str
) -> tuple[int, float, str]:
    """Run a command to its end: exit code, seconds, all that it said; `partial` gets that every few seconds."""
    started, last, lines = time.monotonic(), 0.0, []
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        if time.monotonic() - last > 3:
            last = time.monotonic()
            partial("".join(lines))
    return process.wait(), time.monotonic() - started, "".join(lines)


def seconds_of(plan: Plan, work: Callable[[], Any]) -> float:
    """Median time of some work on the device; on a CPU that of one call."""
    from engine.bench.clock import device_seconds

    if plan.on_gpu:
        return device_seconds(work)
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def shapes(plan: Plan) -> list[tuple[str, int, int, int, int, int]]:
    """The distinct binary convolutions of ReActNet-A at 224: name, C_in, C_out, kernel, stride, input side."""
    import torch

    from models.binary import BinaryConv2d
    from models.reactnet import Config, ReActNet

    found: dict[tuple[int, ...], str] = {}
    with torch.device("meta"):
        network = ReActNet(Config())

        def add(name: str) -> Callable[..., None]:
            def hook(module: Any, args: Any, output: Any) -> None:
                sizes = (module.in_channels, module.out_channels, module.kernel_size[0], module.stride[0])
                found.setdefault((*sizes, args[0].shape[-1]), name)

            return hook

        for name, module in network.named_modules():
            if isinstance(module, BinaryConv2d):
                module.register_forward_hook(add(name))
        network(torch.empty(1, 3, 224, 224))
    small = plan.shrink
    return [
        (name, max(key[0] // small, 1), max(key[1] // small, 1), key[2], key[3], max(key[4] // small, 2))
        for key, name in list(found.items())[: plan.shapes]
    ]


def signs(count: int, channels: int, side: int, device: Any) -> Any:
    """Signs in fp16, [count, channels, side, side] in channels_last."""
    import torch

    return torch.randn(count, channels, side, side, device=device).sign().half().to(memory_format=torch.channels_last)


def exact_convolutions(plan: Plan, device: Any) -> dict[str, Any]:
    """Products of signs in fp16 must be whole numbers, equal to the bit to float64's."""
    import torch
    import torch.nn.functional as F

    wrong, count = [], 0
    for name, c_in, c_out, kernel, stride, side in shapes(plan):
        x, w = signs(8, c_in, side, device), signs(c_out, c_in, kernel, device)
        options = {"stride": stride, "padding": kernel // 2}
        count += 1
        if not torch.equal(F.conv2d(x, w, **options).double(), F.conv2d(x.double(), w.double(), **options)):
            wrong.append(name)
    if wrong:
        raise AssertionError(f"not equal to float64: {wrong}")
    return {"shapes": count}


def weights(plan: Plan, device: Any) -> dict[str, Any]:
    """The kernel of all binary weights against PyTorch, and its time beside theirs."""
    import torch

    from models import halfblock_triton
    from models.binary import BinaryConv2d
    from models.reactnet import Config, ReActNet
    from models.weight_signs import signs_and_scales

    network = ReActNet(Config(width=32 // plan.shrink)).to(device).to(memory_format=torch.channels_last)
    all_weights = [m.weight.detach() for m in network.modules() if isinstance(m, BinaryConv2d)][: plan.shapes]
    made, scales = halfblock_triton.weight_signs(all_weights, torch.float16)
    wanted = signs_and_scales([weight.double() for weight in all_weights], torch.float16)  # float64: by PyTorch
    assert torch.equal(made, wanted[0]) and torch.allclose(scales.double(), wanted[1], rtol=1e-5)
    apart = lambda: [(w.sign().half(), w.abs().mean((1, 2, 3))) for w in all_weights]  # noqa: E731
    together = lambda: halfblock_triton.weight_signs(all_weights, torch.float16)  # noqa: E731
    return {"kernel_us": 1e6 * seconds_of(plan, together), "one_by_one_us": 1e6 * seconds_of(plan, apart)}


def half_block(plan: Plan, device: Any, residual: str, channels: int, side: int, copy: float) -> dict[str, Any]:
    """One shape's kernels against the PyTorch formulas on the same 16-bit inputs, which round h where they do."""
    import torch

    from models import halfblock
    from models import halfblock_triton as triton_

    torch.manual_seed(0)
    channels, side = max(channels // plan.shrink, 16), max(side // plan.shrink, 3)

    def nhwc(channels: int, side: int, scale: float = 1.0) -> torch.Tensor:
        x = torch.randn(plan.micro_batch, channels, side, side, device=device) * scale
        return x.half().contiguous(memory_format=torch.channels_last)

    c, grad_h, grad_s = nhwc(channels, side, 30.0), nhwc(channels, side), nhwc(channels, side)
    stream = nhwc(channels // (2 if residual == "doubled" else 1), side * (2 if residual == "pooled" else 1))
    vectors = [torch.randn(channels, device=device) * s for s in (0.03, 0.3, 0.5, 0.3, 0.3)]
    scale, shift, slope, _, threshold = vectors
    wrap = {} if plan.on_gpu else {"wrap": lambda kernel: kernel}  # the interpreter takes kernels as they are

    def near(got: Any, wanted: Any, what: str, off: float = 0.0) -> float:
        share = float((~torch.isclose(got.float(), wanted.float(), atol=2e-2, rtol=2e-2)).double().mean())
        assert share <= off, f"{what}: {share:.1e} of all are apart"
        return share

    before = halfblock.has_kernels
    halfblock.has_kernels = lambda _: False
    try:
        want_mean, want_var = halfblock.statistics(c)
        want_h, _ = halfblock.apply(c, stream, vectors, residual, True)
        all_vectors = [*vectors, want_mean, (want_var + 1e-5).rsqrt()]
        rest = (c, stream, all_vectors, residual, "burn", True)
        want_du, want_sums = halfblock.backward_sums(grad_h, grad_s, *rest)
        want_dc = halfblock.backward_input(grad_h, c, scale, shift, slope)
    finally:
        halfblock.has_kernels = before
    mean, var = triton_.statistics(c, **wrap)
    assert torch.allclose(mean, want_mean, atol=1e-3, rtol=1e-4) and torch.allclose(var, want_var, rtol=1e-3)
    h, s = triton_.apply(c, stream, vectors, residual, True, **wrap)
    near(h, want_h, "h")
    assert torch.equal(s.float(), (h.float() + halfblock.per_channel(threshold)).sign()), "signs of what was stored"
    du, sums = triton_.backward_sums(grad_h, grad_s, *rest, **wrap)
    # A rounding of h apart by one place may put |z| on the other side of 1, where the estimator ends.
    off = near(du, want_du, "du", off=2e-3)
    # Such a place moves a sum by a whole gradient: a channel's sum may be off by as many as there are.
    flips = (~torch.isclose(du.float(), want_du.float(), atol=2e-2, rtol=2e-2)).float().sum(dim=(0, 2, 3)) * 6.0
    apart = (sums - want_sums).abs() - flips * (1 + want_sums.abs() / c[:, 0].numel())
    assert (apart <= 1e-3 * want_sums.abs().amax(dim=1, keepdim=True) + 1e-3).all(), f"sums are off by {apart.max()}"
    near(triton_.backward_input(grad_h, c, scale, shift, slope, **wrap), want_dc, "dc")
    work: dict[str, tuple[Callable[[], Any], int]] = {
        "statistics": (lambda: triton_.statistics(c, **wrap), c.nbytes),
        "apply": (lambda: triton_.apply(c, stream, vectors, residual, True, **wrap), 3 * c.nbytes + stream.nbytes),
        "backward_sums": (lambda: triton_.backward_sums(grad_h, grad_s, *rest, **wrap), 4 * c.nbytes + stream.nbytes),
        "backward_input": (lambda: triton_.backward_input(grad_h, c, scale, shift, slope, **wrap), 3 * c.nbytes),
    }
    times = {name: (seconds_of(plan, run), moved) for name, (run, moved) in work.items()}
    found: dict[str, Any] = {name: {"us": 1e6 * t, "of_copy": moved / t / copy} for name, (t, moved) in times.items()}
    return {**found, "apart_in_du": off}


def all_kernels(plan: Plan, channels: int, side: int) -> float:
    """Seconds of the four kernels of one half-block."""
    import torch

    from models import halfblock_triton as triton_

    wrap = {} if plan.on_gpu else {"wrap": lambda kernel: kernel}
    c, stream, grad_h, grad_s = (
        torch.randn(plan.micro_batch, channels, side, side, device=plan.device)
        .half()
        .contiguous(memory_format=torch.channels_last)
        for _ in range(4)
    )
    vectors = [torch.rand(channels, device=plan.device) for _ in range(7)]

    def work() -> None:
        triton_.statistics(c, **wrap)
        triton_.apply(c, stream, vectors[:5], "same", True, **wrap)
        triton_.backward_sums(grad_h, grad_s, c, stream, vectors, "same", "burn", True, **wrap)
        triton_.backward_input(grad_h, c, *vectors[:3], **wrap)

    return seconds_of(plan, work)


def convolution_times(plan: Plan, x: Any, w: Any, stride: int, ceiling: float) -> dict[str, float]:
    """Microseconds of one convolution and of both its gradients, and their share of the ceiling."""
    import torch
    import torch.nn.functional as F

    padding = w.shape[-1] // 2
    y = F.conv2d(x, w, stride=stride, padding=padding)
    grad = torch.randn_like(y)
    one, two, no = [1, 1], [stride, stride], [0, 0]
    pads, wanted = [padding, padding], [True, True, False]
    backward = torch.ops.aten.convolution_backward
    flops = 2 * y.numel() * w[0].numel()
    forward_s = seconds_of(plan, lambda: F.conv2d(x, w, stride=stride, padding=padding))
    backward_s = seconds_of(plan, lambda: backward(grad, x, w, None, two, pads, one, False, no, 1, wanted))
    return {
        "forward_us": 1e6 * forward_s,
        "backward_us": 1e6 * backward_s,
        "forward_of_matmul": flops / forward_s / ceiling,
        "backward_of_matmul": 2 * flops / backward_s / ceiling,
    }


def traffic(measured: Any) -> dict[str, dict[str, float]]:
    """Bytes that benchmarks/traffic.py counted for these graphs, and the share of the copy that they and the speed
    make."""
    networks = json.loads((ROOT / "benchmarks" / "traffic.json").read_text())["networks"]
    plain = "student, compiled", "teacher, teacher_bn train"
    graphs = {
        "compiled": plain,
        "fused": ("student, fused", plain[1]),
        "fused, teacher_bn eval": ("student, fused", "teacher, teacher_bn eval"),
    }
    found = {}
    for variant, names in graphs.items():
        if variant in measured.variants and measured.ceilings is not None:
            counted = sum(networks[name]["mb"] for name in names)
            speed = measured.variants[variant].images_per_second
            of_copy = 1e6 * counted * speed / measured.ceilings.copy_bytes_per_second
            found[variant] = {"counted_mb_per_image": counted, "of_copy": of_copy}
    return found


# ------------------------------------------------------------------------------------------------ the parent


def supervise(command: list[str], result: Path, limit: float, environment: dict[str, str]) -> dict[str, Any]:
    """Run a section's process and end it, and all that it started, at its limit.

    Returns:
        Its outcome, seconds, the end of what it said, and what it has kept so far, however it ended.
    """
    started = time.monotonic()
    log = result.with_suffix(".log")
    with open(log, "w") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out, start_new_session=True)
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        for number in (*descendants(process.pid), process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):  # what is left of a section that ended by itself
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    outcome = "done" if code == 0 else f"failed with code {code}" if code is not None else f"ended at {limit:.0f} s"
    found: dict[str, Any] = {"outcome": outcome, "seconds": round(time.monotonic() - started, 1)}
    if code != 0:
        found["said"] = log.read_text(errors="replace")[-3000:]
    with contextlib.suppress(OSError, ValueError):
        found["found"] = json.loads(result.read_text())
    return found


def descendants(process: int) -> list[int]:
    """All that a process started, and what that started: torchrun's ranks have sessions of their own."""
    found = []
    with contextlib.suppress(OSError):
        for thread in Path(f"/proc/{process}/task").iterdir():
            for child in (thread / "children").read_text().split():
                found += [*descendants(int(child)), int(child)]
    return found


def unpack(wheels: Path, into: Path) -> None:
    """Unpack wheels, those in pieces too, to be found through PYTHONPATH."""
    for first in wheels.glob("*.whl.00"):
        whole = into / first.name.removesuffix(".00")
        with open(whole, "wb") as out:
            for piece in sorted(wheels.glob(f"{whole.name}.[0-9][0-9]")):
                out.write(piece.read_bytes())
    for wheel in (*wheels.glob("*.whl"), *into.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(into)


def lacking(into: Path) -> list[str]:
    """Packages that neither this Python nor the unpacked wheels have."""
    sys.path.insert(0, str(into))
    importlib.invalidate_caches()
    return sorted({package for name, package in NEEDED.items() if importlib.util.find_spec(name) is None})


def run_section(name: str, plan: Plan, result: Path, work: Path) -> None:
    """In a section's own process."""

    def keep(found: Any) -> None:
        part = result.with_suffix(".part")
        part.write_text(json.dumps(found, indent=1, default=str))
        part.replace(result)

    SECTIONS[name][0](plan, keep, work)


def main() -> int:
    """Run every section; one that fails leaves its error and the others run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "gpu.json")
    parser.add_argument("--wheels", type=Path, help="a folder with wheels of what the machine lacks")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="sections, all by default")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds of all sections together")
    parser.add_argument("--rehearse", action="store_true", help="run every line, tiny, on a CPU")
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    plan = REHEARSAL if arguments.rehearse else GPU
    if arguments.section:
        run_section(arguments.section, plan, arguments.work / f"{arguments.section}.json", arguments.work)
        return 0
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        work, site = Path(folder), Path(folder) / "site"
        site.mkdir()
        if arguments.wheels:
            unpack(arguments.wheels, site)
        if missing := lacking(site):
            print(f"lacking: {', '.join(missing)}; pass --wheels DIR with their wheels", file=sys.stderr)
            return 2
        paths = [str(site), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "TORCHINDUCTOR_CACHE_DIR": str(work / "cache"),
        }
        if arguments.rehearse:
            environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        result: dict[str, Any] = {"rehearsal": arguments.rehearse, "sections": {}}
        for name in arguments.only:
            left = arguments.budget - (time.monotonic() - started)
            limit = min(SECTIONS[name][1] * (1 if plan.on_gpu else 20), left)
            command = [sys.executable, str(Path(__file__).resolve()), "--section", name, "--work", str(work)]
            command += ["--rehearse"] if arguments.rehearse else []
            print(f"== {name} ({time.monotonic() - started:.0f} s, at most {limit:.0f})", flush=True)
            if limit < 5:
                result["sections"][name] = {"outcome": "not started: the budget is used up"}
            else:
                result["sections"][name] = supervise(command, work / f"{name}.json", limit, environment)
            print(f"   {result['sections'][name]['outcome']}", flush=True)
            # After each section: a machine that is taken away keeps what is done.
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            problem = result["sections"][name].get("found", {}).get("problem") if name == "facts" else ""
            if problem:
                print(f"{problem}: nothing to measure", file=sys.stderr)
                return 2
    print(f"{arguments.out}: {time.monotonic() - started:.0f} s")
    return 1 if any(part["outcome"] != "done" for part in result["sections"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
