"""Pack a trained binary network into one file that runs on a CPU without PyTorch: python -m runtime, docs/deploy.md.

    python tools/export.py runs/linear_burn_stage2 net.bnn
    python tools/export.py runs/burn_stage2 features.bnn --linear float32    # features, before any classifier

Before the file takes its name it is compared with PyTorch, layer by layer and on images of the run's validation set.
Exit code 2 and one line for what cannot be packed (stage 1's real weights, a ResNet) or answers otherwise than PyTorch.
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

import _root  # noqa: F401

from engine import openvino
from engine.errors import ExportError, guarded
from engine.export import Report, export, write_safetensors
from engine.log import to_console
from engine.results.runs import write_json
from engine.trained import open_trained, reestimated
from loaders.files import check_writable
from models import weights
from runtime import bnn

SHOWN = 5
"""Images that disagree, of which a line is printed."""


@guarded
def main() -> int:
    """Open, pack, compare, write, and say so."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a run folder, a checkpoint, or a published weight file")
    parser.add_argument("out", type=Path, help="the file to write, such as net.bnn")
    parser.add_argument("--checkpoint", type=int, metavar="STEP", help="of a run folder (the newest)")
    parser.add_argument("--part", help="a network of a pre-training run, such as student (the one that is evaluated)")
    parser.add_argument(
        "--linear",
        choices=["float16", "float32", "int8"],
        default="float16",
        help="how weights of linear layers are stored (%(default)s)",
    )
    parser.add_argument("--check", type=int, default=256, metavar="N", help="images to compare (%(default)s)")
    parser.add_argument(
        "--precise-bn",
        type=int,
        default=0,
        metavar="N",
        help="re-estimate BatchNorm's statistics on N micro-batches of the run's training images first (0)",
    )
    parser.add_argument("--force", action="store_true", help="write although answers differ from PyTorch's")
    parser.add_argument("--json", type=Path, help="also write the report here")
    parser.add_argument("--safetensors", type=Path, help="also write the weights for other PyTorch code here")
    parser.add_argument("--openvino", type=Path, metavar="NET.XML", help="also write a graph for OpenVINO here")
    arguments = parser.parse_args()
    if arguments.check < 1:
        parser.error(f"--check: expected at least 1, got {arguments.check}")
    if arguments.precise_bn < 0:
        parser.error(f"--precise-bn: expected at least 0, got {arguments.precise_bn}")
    to_console(is_main=True, progress=sys.stderr)
    for path in filter(None, (arguments.out, arguments.json, arguments.safetensors, arguments.openvino)):
        check_writable(path)
        path.parent.mkdir(parents=True, exist_ok=True)
    if arguments.safetensors and (problem := weights.missing_safetensors()):
        raise ExportError(f"--safetensors: {problem}")
    if arguments.openvino and arguments.openvino.suffix != ".xml":
        raise ExportError(f"--openvino: {arguments.openvino}: expected a name that ends in .xml")
    if arguments.openvino and (problem := openvino.missing()):
        raise ExportError(f"--openvino: {problem}")
    trained = open_trained(arguments.source, step=arguments.checkpoint, part=arguments.part)
    if arguments.precise_bn:
        trained = reestimated(trained, arguments.precise_bn)
    report = export(trained, arguments.out, linear=arguments.linear, check=arguments.check, force=arguments.force)
    print(text(report))
    if arguments.json:
        write_json({**asdict(report), "agreement": report.agreement}, arguments.json)
    if arguments.safetensors:
        write_safetensors(trained, arguments.safetensors)
        print(f"{arguments.safetensors}: the weights under their published names")
    if arguments.openvino:
        openvino.write(bnn.read(arguments.out.read_bytes()), arguments.openvino)
        print(f"{arguments.openvino}, {arguments.openvino.with_suffix('.bin')}: a graph for OpenVINO, batch 1")
    return 0


def text(report: Report) -> str:
    """The report for people."""
    lines = [
        f"{report.file}: {report.bytes:,} bytes, {report.part} of {report.source}",
        f"  SHA-256 {report.sha256}",
        *(f"  {count:>12,}  {what}" for what, count in report.bytes_of.items()),
        f"  {report.float32_bytes / report.bytes:.1f} times smaller than its weights in float32, "
        f"{report.source_bytes / report.bytes:.1f} times than the file it came from",
        f"  {report.binary_weights:,} binary weights, {report.zero_weights} of them exactly 0 and stored as +1",
        f"compared with PyTorch on {report.images_from}",
        f"  layers, each on the same input: at most {report.layer_difference:.1e} of a layer's largest value",
    ]
    if report.images:
        said = "no image is decided in PyTorch itself" if report.agreement is None else f"{report.agreement:.2%}"
        lines.append(
            f"  answers: {report.agreed} of {report.images} images alike, {report.undecided} undecided in PyTorch "
            f"itself ({said}); scores differ by at most {report.output_difference:.1e} of their spread"
        )
        lines += [
            f"  image {one.image}: {one.packed} instead of {one.pytorch}, by a margin of {one.margin:.2%}"
            for one in report.disagreements[:SHOWN]
        ]
    else:
        lines.append("  answers: not compared, no image of the run is on this machine")
    lines.append(f"one image, one thread: {report.ms:.2f} ms ({report.kernels}), PyTorch {report.pytorch_ms:.2f} ms")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
