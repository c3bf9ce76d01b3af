"""What runs wrote, read back; and results as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from engine.errors import RecipeError
from engine.log import row_of
from engine.recipe import Recipe
from loaders.files import aside


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's `metrics.jsonl`, without one that is being written or was cut."""
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8", errors="replace")
    return [row for row in map(row_of, text.splitlines()) if row]


def final(folder: Path, evaluation: str, name: str = "top1") -> float:
    """The last score of an evaluation in a run.

    Raises:
        RecipeError: there is none.
    """
    scores = [row[name] for row in metrics(folder) if row.get("evaluation") == evaluation and name in row]
    if not scores:
        raise RecipeError(f"{folder / 'metrics.jsonl'}: no {name} of {evaluation}, expected that one of evals has run")
    return scores[-1]


def evaluation(recipe: Recipe, number: int) -> dict[str, Any]:
    """The numbers of evaluation `number` of a recipe at the end of its run.

    Raises:
        RecipeError: it could not be measured.
    """
    rows = [row for row in metrics(recipe.folder) if "evaluation" in row]
    ends = [row for row in rows if row["step"] == rows[-1]["step"]]
    kinds = [evaluation.kind for evaluation in recipe.evals]
    if [row["evaluation"] for row in ends] != kinds:
        raise RecipeError(
            f"{recipe.folder / 'metrics.jsonl'}: expected numbers of {', '.join(kinds)} at its end; "
            f"{recipe.folder / 'output.txt'} says why there are none"
        )
    return ends[number]


def curve(folder: Path, name: str, evaluation: str | None = None) -> tuple[list[float], list[float]]:
    """Epochs and values of a scalar of a run."""
    rows = [row for row in metrics(folder) if row.get("evaluation") == evaluation and name in row]
    return [row["epoch"] for row in rows], [row[name] for row in rows]


def write_json(result: Any, path: Path) -> None:
    """Save a result: a dataclass, or plain data."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = asdict(result) if is_dataclass(result) and not isinstance(result, type) else result
    with aside(path) as out:
        out.part.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
