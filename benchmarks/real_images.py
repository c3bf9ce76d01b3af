"""Collect what the recipes of imagenette/ and cifar10/ gave, as JSON and as the tables of docs/real_images.md.

    python tools/train.py recipes/imagenette/moco.yaml                # and the others of the folder
    python tools/train.py recipes/imagenette/linear.yaml name=imagenette_linear_burn_stage2
    python benchmarks/real_images.py runs --json benchmarks/real_images.json

Runs are found by their names, `<set>_<recipe>` and `<set>_linear_<recipe>`; those that are not there, or not at their
end, are left out. It trains nothing.
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from engine import checkpoint
from engine import recipe as recipes
from engine.provenance import versions
from engine.results.runs import metrics, write_json

SETS = {"imagenette": "Imagenette, 64 pixels", "cifar10": "CIFAR-10 (JPEG), 32 pixels"}
ROWS = {
    "burn_stage1": "BURN stage 1: binary activations",
    "burn_stage2": "BURN stage 2: all binary",
    "burn_single": "BURN in a single stage, all binary",
    "supervised": "supervised, all binary, one stage",
    "moco": "its teacher: MoCo v2, floating point",
}
WATCHED = (
    "target_entropy",
    "target_entropy_of_mean",
    "target_std",
    "outputs/entropy",
    "outputs/entropy_of_mean",
    "features/rank",
)


def run(folder: Path) -> dict[str, Any] | None:
    """What a finished run gave; None where there is none."""
    newest, _ = checkpoint.latest(folder / "checkpoints")
    if newest is None:
        return None
    state = checkpoint.load(newest)
    if state["step"] < state["total_steps"]:
        return None
    rows, recipe = metrics(folder), recipes.load(folder / "recipe.yaml")
    trained = [row for row in rows if "evaluation" not in row]
    last = {row["evaluation"]: row for row in rows if "evaluation" in row}
    return {
        "recipe": recipe.hash,
        "duration": recipe.run.duration,
        "amp": recipe.run.amp,
        "images": trained[-1]["images"],
        "images_per_second": statistics.median(row["images_per_second"] for row in trained),
        "watched": {name: trained[-1][name] for name in WATCHED if name in trained[-1]},
        "evaluations": {
            kind: {name: value for name, value in row.items() if name.endswith(("top1", "_knn", "measured"))}
            for kind, row in last.items()
        },
    }


def collect(folder: Path) -> dict[str, Any]:
    """Set -> row -> its run and the linear evaluation of it."""
    found: dict[str, Any] = {}
    for name in SETS:
        rows = {
            row: {"run": run(folder / f"{name}_{row}"), "linear": run(folder / f"{name}_linear_{row}")} for row in ROWS
        }
        found[name] = {row: both for row, both in rows.items() if both["run"] is not None}
    return {name: rows for name, rows in found.items() if rows}


def table(rows: dict[str, Any]) -> str:
    """One set in Markdown."""
    lines = [
        "| network | linear, standardized | logistic regression | k-NN | images seen |",
        "|---|---|---|---|---|",
    ]
    probes = {name: both["linear"]["evaluations"] for name, both in rows.items() if both["linear"]}
    if probes:
        usual = probes.get("burn_stage2") or next(iter(probes.values()))
        baselines = usual["baselines"]
        lines.append(f"| raw pixels | | {baselines['pixels_top1']:.1f} | {baselines['pixels_knn']:.1f} | |")
        lines.append(f"| random weights, all binary | | {baselines['random_top1']:.1f} | | |")
    for name, both in rows.items():
        scores, evaluations = probes.get(name), both["run"]["evaluations"]
        linear = f"{scores['accuracy']['top1']:.1f}" if scores else ""
        logistic = f"{scores['baselines']['logistic_top1']:.1f}" if scores else ""
        lines.append(
            f"| {ROWS[name]} | {linear} | {logistic} | {evaluations['knn']['top1']:.1f} | {both['run']['images']:,} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Read, print, and write what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="folder of the runs")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    arguments = parser.parse_args()
    found = collect(arguments.runs)
    for name, rows in found.items():
        print(f"{SETS[name]}\n\n{table(rows)}\n")
    if arguments.json:
        write_json({"machine": "two CPU cores", "seed": 0, "versions": versions(), "sets": found}, arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
