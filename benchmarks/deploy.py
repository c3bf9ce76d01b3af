"""How fast a packed network is beside PyTorch on one core: ReActNet-A, from images to 1,000 scores.

    python benchmarks/deploy.py                      # half an hour on a quiet machine
    python benchmarks/deploy.py --rounds 3 --sides 224
    python benchmarks/deploy.py --draw benchmarks/deploy.json     # the figure and the table again
    python benchmarks/deploy.py --trained runs/linear_imagenette_stage2   # answers of a trained network, BatchNorm anew

Writes deploy.json (every call), deploy.png and, on standard output, a table in Markdown. Weights are drawn at random,
of the shapes that are trained: time does not depend on them. Variants take turns (A B C A B C), each in a process of
its own that is pinned to as many cores as it has threads; a ratio is that of the best calls within a round, and claims
are medians of rounds with their range. "Folded" is PyTorch with weights binarized and BatchNorm folded into them
beforehand, the best that it can do; `torch.compile` compiles that with frozen weights. OpenVINO, where it is installed,
runs the graph that `tools/export.py --openvino` writes.

Ceilings are what benchmarks/ceilings.c finds here for the instructions of each path; "at the ceiling" is the time that
a network's binary multiply-accumulates would take at that rate, with all that is float for free. "One block" is the
time that one more pair of a 3x3 and a 1x1 half-block takes: float epilogues are in it, stem and linear layers are not.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from engine import openvino
from runtime import Runtime, bnn, native
from tests.packed import random_images, random_network

CLASSES = 1000
FLOAT16_LINEAR = "float16"
FOLDED, EAGER, COMPILED, BFLOAT = "PyTorch folded", "PyTorch as trained", "torch.compile", "torch.compile bfloat16"
NUMPY, OPENVINO = "runtime numpy", "OpenVINO"
LEAST = {NUMPY: 3, EAGER: 3}
OTHER_ROUNDS = 3
"""At most, of cases that no claim is about."""
FORMS = {"avx512": ("avx512 parity", "avx512 classic"), "avx2": ("avx2 table",) * 2, "plain": ("popcnt",) * 2}
"""Of a path: its ceilings for 3x3 and for 1x1 convolutions."""
BLOCKS = [(128, 56), (256, 28), (512, 14), (1024, 7)]
"""Channels and side of the map."""


def variants(threads: int, batch: int) -> list[str]:
    """Names of what is timed, the fastest first."""
    ours = [f"runtime {name}" for name in native.kernels() if batch == 1 or name != "plain"]
    theirs = [COMPILED] if threads > 1 else [COMPILED, BFLOAT]
    if threads == 1 and batch == 1:
        theirs += [FOLDED, NUMPY, EAGER]
    return [*ours, *([] if openvino.missing() else [OPENVINO]), *theirs]


# ------------------------------------------------------------------------------------------------ one process


def networks(side: int) -> tuple[Any, Any]:
    """A random ReActNet-A with statistics of its own, and its classifier."""
    import torch
    from torch import nn

    from models.reactnet import Config

    torch.manual_seed(0)
    backbone = Config(weights="binary", activations="binary").build().eval().requires_grad_(False)
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    return backbone, nn.Linear(backbone.out_channels, CLASSES).requires_grad_(False)


def folded(backbone: Any, classifier: Any) -> Any:
    """The same function in as few float operations as PyTorch can have."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    from models.binary import weight_scale

    def joined(convs: list[Any], norms: list[Any], is_binary: bool) -> nn.Conv2d:
        weights, biases = [], []
        for conv, norm in zip(convs, norms, strict=True):
            scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
            weight = conv.weight.sign() * weight_scale(conv.weight) if is_binary else conv.weight
            weights.append(weight * scale.view(-1, 1, 1, 1))
            biases.append(norm.bias - norm.running_mean * scale)
        weight = torch.cat(weights)
        out = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2], convs[0].stride, convs[0].padding)
        out.weight.data, out.bias.data = weight, torch.cat(biases)
        return out

    class Folded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = joined([backbone.stem[0]], [backbone.stem[1]], False)
            self.first = nn.ModuleList(joined([b.conv3x3], [b.norm1], True) for b in backbone.blocks)
            self.second = nn.ModuleList(joined(list(b.conv1x1), list(b.norm2), True) for b in backbone.blocks)
            self.blocks, self.fc, self.classifier = backbone.blocks, backbone.fc, classifier

        def forward(self, x: Any) -> Any:
            x = self.stem(x)
            for first, second, block in zip(self.first, self.second, self.blocks, strict=True):
                residual = F.avg_pool2d(x, 2) if block.stride == 2 else x
                x = block.act1(first(block.shift1(x).sign()) + residual)
                residual = torch.cat((x, x), 1) if len(block.conv1x1) == 2 else x
                x = block.act2(second(block.shift2(x).sign()) + residual)
            return self.classifier(F.relu(self.fc(x.mean((2, 3)))))

    return Folded().eval().requires_grad_(False)


def pytorch(name: str, side: int, batch: int, threads: int) -> Callable[[], Any]:
    """A call of a variant of PyTorch."""
    import torch
    from torch import nn

    torch.set_num_threads(threads)
    backbone, classifier = networks(side)
    images = torch.randn(batch, 3, side, side).to(memory_format=torch.channels_last)
    if name == EAGER:
        network: Any = nn.Sequential(backbone, classifier).eval()
        return torch.inference_mode()(lambda: network(images))
    network = folded(backbone, classifier).to(memory_format=torch.channels_last)
    with torch.no_grad():
        wanted, got = classifier(backbone(images)), network(images)
        stem = (backbone.stem(images) - network.stem(images)).abs().max()  # beyond it signs on the threshold differ
    assert stem < 1e-4 and wanted.shape == got.shape
    if name == FOLDED:
        return torch.inference_mode()(lambda: network(images))
    import torch._inductor.config

    torch._inductor.config.freezing = True
    compiled = torch.compile(network)

    @torch.no_grad()
    def call() -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=name == BFLOAT):
            return compiled(images)

    return call


def write_network(path: Path, side: int) -> None:
    """Pack the random network."""
    import numpy as np

    from engine.export import _layer
    from models.fold import fold

    packed = fold(*networks(side), linear=FLOAT16_LINEAR)
    layers = [_layer(layer) for layer in packed.layers]
    layers[0].blobs["table"] = np.tile(np.linspace(-2, 2, 256, dtype=np.float32), (3, 1))
    network = bnn.Network(side, CLASSES, layers, {})
    bnn.write(network, path)
    if not openvino.missing():
        openvino.write(network, path.with_suffix(".xml"))


def peak_kib() -> int:
    """Peak memory of this process since it was started; getrusage's would be that of its parent, too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def measure_one(name: str, file: Path, side: int, batch: int, threads: int, seconds: float) -> dict[str, Any]:
    """Time one variant in this process."""
    import numpy as np

    before = peak_kib()
    facts: dict[str, Any] = {}
    if name.startswith("runtime"):
        started = time.perf_counter()
        runtime = Runtime(file, threads=threads, kernels=name.split()[1])
        facts["load_ms"] = 1000 * (time.perf_counter() - started)
        images = np.random.default_rng(0).integers(0, 256, (batch, side, side, 3), dtype=np.uint8)

        def call() -> Any:
            return runtime.run(images)
    elif name == OPENVINO:
        run = openvino.opened(file.with_suffix(".xml"), threads=threads, batch=batch)
        normalized = np.random.default_rng(0).standard_normal((batch, 3, side, side), dtype=np.float32)

        def call() -> Any:
            return run(normalized)
    else:
        call = pytorch(name, side, batch, threads)
    warm = time.perf_counter()
    call()
    while time.perf_counter() - warm < seconds / 4:
        call()
    facts["peak_mib"] = (peak_kib() - before) / 1024
    wall: list[float] = []
    cpu: list[float] = []
    started = time.perf_counter()
    while len(wall) < LEAST.get(name, 10 if batch == 1 else 5) or time.perf_counter() - started < seconds:
        at, used = time.perf_counter(), time.process_time()
        call()
        wall.append(round(1000 * (time.perf_counter() - at) / batch, 3))
        cpu.append(round(1000 * (time.process_time() - used) / batch, 3))
    return {"ms": wall, "cpu_ms": cpu, **facts}


# ------------------------------------------------------------------------------------------------ answers


def answers(run: Path, images: int, estimates: list[int], folder: Path) -> dict[str, Any]:
    """How a trained network answers once it is packed, and what re-estimating BatchNorm on so many batches changes."""
    import torch

    import loaders
    from engine.export import export
    from engine.trained import open_trained, reestimated

    kept = open_trained(run)
    assert kept.recipe is not None
    found: dict[str, Any] = {"recipe": kept.recipe.name, "hash": kept.recipe.hash, "step": kept.step, "precise_bn": {}}
    index = loaders.open_data(kept.recipe.data, "val")
    for batches in estimates:
        trained = reestimated(kept, batches) if batches else kept
        hits = measured = 0
        loader = loaders.open_eval(trained.recipe.data, index)
        with torch.no_grad():
            for batch in loader:
                hits += int((trained.network(batch.views[0]).argmax(1) == batch.label).sum())
                measured += len(batch.label)
        loader.close()
        report = export(trained, folder / "net.bnn", check=images, force=True)
        found["precise_bn"][str(batches)] = {
            "top1": 100 * hits / measured,
            "measured": measured,
            "compared": report.images,
            "agreed": report.agreed,
            "undecided": report.undecided,
            "agreement": report.agreement,
            "disagreements": [one._asdict() for one in report.disagreements],
            "output_difference": report.output_difference,
            "layer_difference": report.layer_difference,
        }
    return found


# ------------------------------------------------------------------------------------------------ ceilings


def ceilings(folder: Path, core: int) -> dict[str, float]:
    """10^12 bit multiply-accumulates a second, by kind of instructions; {} without a compiler for x86."""
    program = folder / "ceilings"
    built = ["cc", "-O2", "-o", str(program), str(ROOT / "benchmarks" / "ceilings.c")]
    try:
        subprocess.run(built, check=True, capture_output=True)
        said = subprocess.run(["taskset", "-c", str(core), program], check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return {}
    return json.loads(said)


def binary_macs(network: bnn.Network) -> dict[int, int]:
    """Multiply-accumulates of an image's half-blocks by kernel size; rows beyond the map are skipped by the kernels."""
    side = -(-network.side // network.layers[0].record.stride)
    counted = {1: 0, 3: 0}
    for layer in network.layers:
        record = layer.record
        if record.operation == bnn.HALF_BLOCK:
            out = -(-side // record.stride)
            rows = sum(
                0 <= record.stride * y + k - record.kernel // 2 < side for y in range(out) for k in range(record.kernel)
            )
            counted[record.kernel] += rows * out * record.kernel * record.channels_in * record.channels_out
            side = out
    return counted


def at_ceiling(macs: dict[int, int], path: str, found: dict[str, float]) -> float:
    """Milliseconds of an image's binary multiply-accumulates at a path's ceilings."""
    rows, points = FORMS[path]
    return 1e-9 * (macs[3] / found[rows] + macs[1] / found[points])


def measure_blocks(folder: Path, core: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of one block for each path and size: what ten more take, in turns, a tenth of it."""
    results: dict[str, Any] = {}
    os.sched_setaffinity(0, {core})
    for channels, side in BLOCKS:
        networks = {}
        for count in (2, 12):
            file = folder / f"{channels}-{count}.bnn"
            bnn.write(random_network(width=channels, multiples=(1,) * (count + 1), side=2 * side), file)
            networks[count] = file
        images = random_images(1, 2 * side)
        binary = {k: v // 2 for k, v in binary_macs(bnn.read(networks[2])).items()}
        for path in native.kernels():
            runtimes = {count: Runtime(file, kernels=path) for count, file in networks.items()}
            best = {count: [float("inf")] * rounds for count in networks}
            for turn in range(rounds):
                for count, runtime in runtimes.items():
                    for _ in range(20):
                        at = time.perf_counter()
                        runtime.run(images)
                        best[count][turn] = min(best[count][turn], 1000 * (time.perf_counter() - at))
            taken = [(more - few) / 10 for few, more in zip(best[2], best[12], strict=True)]
            results[f"{path}, {channels} channels, {side}x{side}"] = {"ms": taken, "macs": binary}
    return results


# ------------------------------------------------------------------------------------------------ all of them


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Time all variants in turns."""
    cores = sorted(os.sched_getaffinity(0))
    cases = [(side, batch, 1) for side in options.sides for batch in options.batches]
    if len(cores) > 1:
        cases.append((options.sides[0], 1, 2))
    found: dict[str, Any] = {"rounds": options.rounds, "load_before": os.getloadavg()[0], "cases": {}}
    from engine.provenance import environment

    found["environment"] = environment()
    found["cpu"] = next(
        (line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "unknown"
    )
    found["ceilings"] = ceilings(folder, cores[-1])
    child = [sys.executable, __file__, "--blocks", str(folder), str(cores[-1]), str(options.rounds)]
    found["blocks"] = json.loads(subprocess.run(child, capture_output=True, text=True, check=True).stdout)
    for side, batch, threads in cases:
        file = folder / f"{side}.bnn"
        if not file.exists():
            write_network(file, side)
            found[f"bytes_{side}"] = file.stat().st_size
            found[f"macs_{side}"] = binary_macs(bnn.read(file))
        title = f"side {side}, batch {batch}, {threads} thread{'s' * (threads > 1)}"
        rows: dict[str, list[Any]] = {name: [] for name in variants(threads, batch)}
        is_claim = side == options.sides[0] and batch == 1
        rounds = options.rounds if is_claim else min(options.rounds, OTHER_ROUNDS)
        for number in range(rounds):
            for name in rows:
                print(f"{title}: round {number + 1} of {rounds}, {name}", file=sys.stderr, flush=True)
                command = [sys.executable, __file__, "--one", name, str(file), str(side), str(batch), str(threads)]
                done = subprocess.run(
                    [*command, "--seconds", str(options.seconds)],
                    capture_output=True,
                    text=True,
                    check=True,
                    preexec_fn=lambda threads=threads: os.sched_setaffinity(0, cores[-threads:]),  # type: ignore[misc]
                )
                rows[name].append(json.loads(done.stdout.splitlines()[-1]))
        found["cases"][title] = rows
    for name, rate in ceilings(folder, cores[-1]).items():  # the better of before and after
        found["ceilings"][name] = max(rate, found["ceilings"][name])
    return found


def ratios(rows: dict[str, list[Any]], name: str, reference: str) -> list[float]:
    """How many times faster a variant is than another, for each round."""
    return [min(b["ms"]) / min(a["ms"]) for a, b in zip(rows[name], rows[reference], strict=True)]


def table(found: dict[str, Any]) -> str:
    """The table in Markdown."""
    lines = []
    for title, rows in found["cases"].items():
        best = next(iter(rows))
        lines += [
            "",
            f"**{title}**",
            "",
            f"| | ms an image, best of all calls | median of calls | {best} is faster by |",
        ]
        lines.append("|---|---|---|---|")
        for name, rounds in rows.items():
            calls = [ms for one in rounds for ms in one["ms"]]
            of = ratios(rows, best, name)
            said = "" if name == best else f"{median(of):.1f} ({min(of):.1f} to {max(of):.1f})"
            lines.append(f"| {name} | {min(calls):.2f} | {median(calls):.2f} | {said} |")
    first = next(iter(found["cases"].values()))
    ours = first[next(iter(first))]
    size = next(value for key, value in found.items() if key.startswith("bytes_"))
    lines += [
        "",
        f"{found['cpu']}; load average before {found['load_before']:.1f}. The file has {size / 1e6:.2f} MB (linear "
        f"layers in {FLOAT16_LINEAR}); it opens in {median(one['load_ms'] for one in ours):.1f} ms.",
    ]
    if peaks := [one["peak_mib"] for one in ours if "peak_mib" in one]:
        lines[-1] += f" Peak memory is {max(peaks):.1f} MiB above the interpreter with numpy."
    return "\n".join([*lines, *against_ceilings(found)])


def against_ceilings(found: dict[str, Any]) -> list[str]:
    """How near each path comes to its ceilings."""
    if not found.get("ceilings"):
        return []
    rates = ", ".join(f"{name} {rate:.2f}" for name, rate in found["ceilings"].items())
    lines = ["", f"Ceilings of this core, 10^12 bit multiply-accumulates a second: {rates}.", ""]
    lines += ["| one block | ms | at the ceiling | share |", "|---|---|---|---|"]
    for name, block in found["blocks"].items():
        path, macs, ms = name.split(",")[0], {int(k): v for k, v in block["macs"].items()}, median(block["ms"])
        least = at_ceiling(macs, path, found["ceilings"]) if path in FORMS else float("nan")
        lines.append(f"| {name} | {ms:.3f} | {least:.3f} | {least / ms:.0%} |")
    lines += ["", "| whole network, batch 1, one thread | ms | at the ceiling | share |", "|---|---|---|---|"]
    for title, rows in found["cases"].items():
        if not title.endswith("batch 1, 1 thread"):
            continue
        macs = {int(k): v for k, v in found[f"macs_{title.split()[1].rstrip(',')}"].items()}
        for name in rows:
            path = name.removeprefix("runtime ")
            if path in FORMS:
                ms = min(ms for one in rows[name] for ms in one["ms"])
                least = at_ceiling(macs, path, found["ceilings"])
                lines.append(f"| {title.split(',')[0]}, {path} | {ms:.2f} | {least:.2f} | {least / ms:.0%} |")
    return lines


def draw(found: dict[str, Any], path: Path) -> None:
    """Bars of the first case on a logarithmic axis."""
    from engine.results.figures import pyplot

    plt = pyplot()
    title, rows = next(iter(found["cases"].items()))
    names = list(rows)[::-1]
    best = [min(ms for one in rows[name] for ms in one["ms"]) for name in names]
    figure, axis = plt.subplots(figsize=(7, 0.45 * len(names) + 1.2), layout="constrained")
    bars = axis.barh(names, best, color=["tab:blue" if name.startswith("runtime") else "tab:gray" for name in names])
    axis.bar_label(bars, [f"{ms:.2f} ms" for ms in best], padding=3)
    axis.set(xscale="log", xlim=(min(best) / 2, max(best) * 4), xlabel="ms an image (best call)", title=f"{title}")
    figure.savefig(path, dpi=120)


def main() -> int:
    """Measure, write, draw, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rounds", type=int, default=5, help=f"(%(default)s; at most {OTHER_ROUNDS} of what no claim is about)"
    )
    parser.add_argument("--seconds", type=float, default=3.0, help="of calls of a variant in a round (%(default)s)")
    parser.add_argument("--sides", type=int, nargs="+", default=[224, 128])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "deploy.json")
    parser.add_argument("--draw", type=Path, help="draw and print this file instead")
    parser.add_argument("--trained", type=Path, metavar="RUN", help="look at the answers of this run instead")
    parser.add_argument("--images", type=int, default=1000, help="with --trained: images to compare (%(default)s)")
    parser.add_argument("--precise-bn", type=int, nargs="+", default=[0, 50], help="with --trained (%(default)s)")
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    parser.add_argument("--blocks", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.blocks:
        folder, core, rounds = options.blocks
        print(json.dumps(measure_blocks(Path(folder), int(core), int(rounds))))
        return 0
    if options.one:
        name, file, *numbers = options.one
        print(json.dumps(measure_one(name, Path(file), *map(int, numbers), options.seconds)))
        return 0
    if options.trained:
        with tempfile.TemporaryDirectory() as folder:
            found = answers(options.trained, options.images, options.precise_bn, Path(folder))
        text = json.dumps(found, indent=1)
        options.out.with_name("deploy_answers.json").write_text(text + "\n")
        print(text)
        return 0
    if options.draw:
        found = json.loads(options.draw.read_text())
    else:
        with tempfile.TemporaryDirectory() as folder:
            found = measure(options, Path(folder))
        options.out.write_text(json.dumps(found) + "\n")
    path = options.draw or options.out
    draw(found, path.with_suffix(".png"))
    path.with_suffix(".md").write_text(f"# {found['cpu']}\n{table(found)}\n")
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
