"""How fast a packed network is beside PyTorch on one core: ReActNet-A, from images to 1,000 scores.

    python benchmarks/deploy.py                      # a quarter of an hour on a quiet machine
    python benchmarks/deploy.py --rounds 3 --sides 224
    python benchmarks/deploy.py --draw benchmarks/deploy.json     # the figure and the table again

Writes deploy.json (every call), deploy.png and, on standard output, a table in Markdown. Weights are drawn at random,
of the shapes that are trained: time does not depend on them. Variants take turns (A B C A B C), each in a process of
its own that is pinned to as many cores as it has threads; a ratio is that of the best calls within a round, and claims
are medians of rounds with their range. "Folded" is PyTorch with weights binarized and BatchNorm folded into them
beforehand, the best that it can do; `torch.compile` compiles that with frozen weights.
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

from runtime import Runtime, native

CLASSES = 1000
FLOAT16_LINEAR = "float16"
FOLDED, EAGER, COMPILED, BFLOAT = "PyTorch folded", "PyTorch as trained", "torch.compile", "torch.compile bfloat16"
NUMPY = "runtime numpy"
SECONDS = {NUMPY: 4.0}
LEAST = {NUMPY: 3}


def variants(threads: int) -> list[str]:
    """Names of what is timed, the fastest first."""
    ours = [f"runtime {name}" for name in native.kernels()]
    return [*ours, *([NUMPY, FOLDED, EAGER, COMPILED, BFLOAT] if threads == 1 else [COMPILED])]


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
    from runtime import bnn

    packed = fold(*networks(side), linear=FLOAT16_LINEAR)
    layers = [_layer(layer) for layer in packed.layers]
    layers[0].blobs["table"] = np.tile(np.linspace(-2, 2, 256, dtype=np.float32), (3, 1))
    bnn.write(bnn.Network(side, CLASSES, layers, {}), path)


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
    while len(wall) < LEAST.get(name, 10) or time.perf_counter() - started < seconds:
        at, used = time.perf_counter(), time.process_time()
        call()
        wall.append(1000 * (time.perf_counter() - at) / batch)
        cpu.append(1000 * (time.process_time() - used) / batch)
    return {"ms": wall, "cpu_ms": cpu, **facts}


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
    for side, batch, threads in cases:
        file = folder / f"{side}.bnn"
        if not file.exists():
            write_network(file, side)
            found[f"bytes_{side}"] = file.stat().st_size
        title = f"side {side}, batch {batch}, {threads} thread{'s' * (threads > 1)}"
        rows: dict[str, list[Any]] = {name: [] for name in variants(threads)}
        for number in range(options.rounds):
            for name in rows:
                print(f"{title}: round {number + 1} of {options.rounds}, {name}", file=sys.stderr, flush=True)
                command = [sys.executable, __file__, "--one", name, str(file), str(side), str(batch), str(threads)]
                done = subprocess.run(
                    [*command, "--seconds", str(SECONDS.get(name, options.seconds))],
                    capture_output=True,
                    text=True,
                    check=True,
                    preexec_fn=lambda threads=threads: os.sched_setaffinity(0, cores[-threads:]),  # type: ignore[misc]
                )
                rows[name].append(json.loads(done.stdout.splitlines()[-1]))
        found["cases"][title] = rows
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
    return "\n".join(lines)


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
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of calls of a variant in a round (%(default)s)")
    parser.add_argument("--sides", type=int, nargs="+", default=[224, 128])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "deploy.json")
    parser.add_argument("--draw", type=Path, help="draw and print this file instead")
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        name, file, *numbers = options.one
        print(json.dumps(measure_one(name, Path(file), *map(int, numbers), options.seconds)))
        return 0
    if options.draw:
        found = json.loads(options.draw.read_text())
    else:
        with tempfile.TemporaryDirectory() as folder:
            found = measure(options, Path(folder))
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    path = options.draw or options.out
    draw(found, path.with_suffix(".png"))
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
