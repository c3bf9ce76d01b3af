"""Train a recipe: pre-training, supervised training and linear evaluation alike.

    python tools/train.py recipes/quick/burn_stage1.yaml
    torchrun --nproc_per_node=8 tools/train.py recipes/burn_stage2.yaml run.amp=bf16 --resume
    python tools/train.py recipes/burn_stage2.yaml data.train=data/photos/train --benchmark loader

Exit codes: 0 done; 2 bad input (found at the start: nothing was written); 3 loss or gradients not finite;
4 a parameter is not trained as declared; 5 the last checkpoint could not be written; 75 stopped by SIGTERM, SIGINT
or SIGUSR1 and saved, go on with --resume; 1 anything else.
"""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import _root  # noqa: F401

from engine import bench, bench_step, dist, report, train
from engine import recipe as recipes
from engine.checkpoint import CheckpointError
from engine.describe import describe, missing
from engine.log import to_console
from engine.recipe import RecipeError
from loaders import DataError
from models.weights import WeightsError


def main() -> int:
    """Parse the command line, run, and turn what can go wrong into one line and an exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="a YAML file of recipes/, or recipe.yaml of a run folder")
    parser.add_argument("override", nargs="*", help="section.key=value, changes the recipe for this run")
    parser.add_argument("--resume", action="store_true", help="go on from the newest complete checkpoint, if any")
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
    parser.add_argument("--json", type=Path, help="also write what --benchmark measured here")
    parser.add_argument("--figure", type=Path, help="also draw the phases of --benchmark step or train here (PNG)")
    arguments = parser.parse_intermixed_args()
    if arguments.figure and arguments.benchmark not in ("step", "train"):
        parser.error("--figure draws what --benchmark step or train measured")
    if arguments.figure and not find_spec("matplotlib"):
        parser.error("--figure needs matplotlib: pip install matplotlib")
    to_console(is_main=dist.environment_rank() == 0)
    try:
        recipe = recipes.load(arguments.recipe, arguments.override)
        if arguments.dry_run:
            print(describe(recipe))
            return 0
        if arguments.benchmark:
            mode: Any = bench if arguments.benchmark == "loader" else bench_step
            result = bench.loader(recipe) if mode is bench else bench_step.measure(recipe, arguments.benchmark)
            if dist.environment_rank() == 0:
                print(mode.table(result))
                if arguments.json:
                    bench.write(result, arguments.json)
                if arguments.figure:
                    report.draw_phases(result, arguments.figure)
            return 0
        if problems := missing(recipe, resumes=arguments.resume):
            raise RecipeError(f"{arguments.recipe}: {'; '.join(problems)}")
        train.run(recipe, resume=arguments.resume, allow_changes=arguments.allow_changes)
    except (RecipeError, DataError, CheckpointError, WeightsError) as error:
        return _fail(error, train.EXIT_BAD_INPUT)
    except bench_step.NotEqual as error:
        return _fail(error, 1)
    except train.NotFinite as error:
        return _fail(error, train.EXIT_NOT_FINITE)
    except train.Untrained as error:
        return _fail(error, train.EXIT_UNTRAINED)
    except train.NotSaved as error:
        return _fail(error, train.EXIT_NOT_SAVED)
    except train.Stopped as error:
        return _fail(error, train.EXIT_STOPPED)
    return 0


def _fail(error: Exception, code: int) -> int:
    if code == train.EXIT_BAD_INPUT and dist.environment_rank(local=True) != 0:
        return code  # one line per machine is enough
    print(f"error: {error}" if code != train.EXIT_STOPPED else str(error), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
