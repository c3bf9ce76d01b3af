"""Train a recipe: pre-training, supervised training and linear evaluation alike.

    python tools/train.py recipes/quick/burn_stage1.yaml
    torchrun --nproc_per_node=8 tools/train.py recipes/burn_stage2.yaml run.amp=bf16 --resume
    python tools/train.py recipes/burn_stage2.yaml data.train=data/photos/train --benchmark loader

Exit codes: 0 done; 2 bad input (found at the start: nothing was written); 3 loss or gradients not finite;
4 a parameter is not trained as declared; 5 the last checkpoint could not be written; 6 the machine failed (memory, a
device, another process); 75 stopped by a signal and saved, continue with --resume; 130 or 143 stopped where there was
nothing to save; 1 anything else.
"""

import argparse
import sys
from pathlib import Path

import _root  # noqa: F401

from engine import dist, keys, train
from engine import recipe as recipes
from engine.describe import describe
from engine.errors import RecipeError
from engine.log import to_console
from engine.preflight import missing
from engine.recipe import Recipe
from loaders.files import check_writable


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="a YAML file of recipes/, or recipe.yaml of a run folder")
    parser.add_argument("override", nargs="*", default=[], help="section.key=value, changes the recipe for this run")
    parser.add_argument("--resume", action="store_true", help="continue from the newest intact checkpoint, if any")
    parser.add_argument(
        "--allow-changes", action="store_true", help="resume although recipe, data or ranks have changed"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be done and what is missing")
    parser.add_argument(
        "--benchmark",
        choices=["loader", "step", "train"],
        help="measure instead of training: `loader` every back end of this machine on the recipe's views, `step` the "
        "training step beside the authors' way, by phase, `train` the same with the recipe's loader",
    )
    parser.add_argument("--keys", action=PrintKeys, nargs=0, help="print all keys of a recipe (docs/recipe_keys.md)")
    parser.add_argument("--json", type=Path, help="also write what --benchmark measured here")
    parser.add_argument("--figure", type=Path, help="also draw the phases of --benchmark step or train here (PNG)")
    arguments = parser.parse_intermixed_args()
    if arguments.figure and arguments.benchmark not in ("step", "train"):
        parser.error("--figure draws what --benchmark step or train measured")
    if arguments.json and not arguments.benchmark:
        parser.error("--json writes what --benchmark measured")
    # What is asked for goes to standard output: a run's log, or else the text or table alone.
    answers = arguments.dry_run or arguments.benchmark
    to_console(is_main=dist.environment_rank() == 0, progress=sys.stderr if answers else sys.stdout)
    recipe = recipes.load(arguments.recipe, arguments.override)
    if arguments.dry_run:
        print(describe(recipe, resumes=arguments.resume, allow_changes=arguments.allow_changes))
    elif arguments.benchmark:
        benchmark(recipe, arguments.benchmark, arguments.json, arguments.figure)
    else:

        def check() -> None:
            if problems := missing(recipe, resumes=arguments.resume):
                raise RecipeError(f"{arguments.recipe}: {'; '.join(map(str, problems))}")

        train.run(recipe, resume=arguments.resume, allow_changes=arguments.allow_changes, check=check)
    return 0


class PrintKeys(argparse.Action):
    """`--keys`: like `--help` it needs no recipe."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        """Print the reference and leave."""
        print(keys.page(), end="")
        parser.exit()


def benchmark(recipe: Recipe, mode: str, json: Path | None, figure: Path | None) -> None:
    """Measure, and on rank 0 print a table, and write and draw what is asked for."""
    from engine.bench import loader, step
    from engine.results import figures, runs

    needs = {"step": (), "loader": ("data.train",), "train": ("data.train", "data.backend")}[mode]
    if problems := [str(problem) for problem in missing(recipe) if problem.key in needs]:
        raise RecipeError(f"{recipe.name}: {'; '.join(problems)}")
    for path in filter(None, (json, figure)):
        check_writable(path)
    if figure:
        figures.pyplot()
    result = loader.measure(recipe) if mode == "loader" else step.measure(recipe, mode)
    if dist.environment_rank() != 0:
        return
    print(step.table(result) if isinstance(result, step.Result) else loader.table(result))
    if json:
        runs.write_json(result, json)
    if figure and isinstance(result, step.Result):
        figures.draw_phases(result, figure)


if __name__ == "__main__":
    dist.leave(main)
