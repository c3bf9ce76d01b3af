"""Compute a frozen teacher's features of K fixed views of every image once, to be read in place of running it.

    python tools/cache_teacher.py recipes/imagenette/regress_lite0.yaml caches/imagenette --views 8
    torchrun --nproc_per_node=8 tools/cache_teacher.py recipes/regress.yaml caches/imagenet --views 8 --components 256
    python tools/train.py recipes/imagenette/regress_lite0.yaml data.fixed_views=8 data.teacher_cache=caches/imagenette

The views are those that training with data.fixed_views=K draws: same windows, same colors. Called again after it was
stopped it continues; what is in the folder is held against the live teacher at the end. Features are kept in 16 bits,
whole or as their first principal components. Methods whose teacher depends on the batch
(teacher_bn: train) cannot use one.
"""

import argparse
from pathlib import Path

import _root  # noqa: F401

from engine import dist
from engine import recipe as recipes
from engine.errors import RecipeError
from engine.log import logger, to_console
from engine.preflight import missing
from engine.recipe import Recipe
from engine.teacher_cache import Maker
from loaders.files import check_writable


def main() -> int:
    """Parse the command line and fill the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="of the training that will read the cache")
    parser.add_argument("out", type=Path, help="the folder to make, or to continue")
    parser.add_argument("override", nargs="*", default=[], help="section.key=value, as for tools/train.py")
    parser.add_argument("--views", type=int, required=True, help="K, fixed draws of the recipe's views for each image")
    parser.add_argument("--components", type=int, help="keep this many principal components of the features")
    arguments = parser.parse_intermixed_args()
    for name in ("views", "components"):
        if (number := getattr(arguments, name)) is not None and number < 1:
            parser.error(f"--{name}: expected at least 1, got {number}")
    to_console(is_main=dist.environment_rank() == 0)
    fixed = [f"data.fixed_views={arguments.views}", "data.teacher_cache=null"]
    recipe = recipes.load(arguments.recipe, [*arguments.override, *fixed])
    make(recipe, arguments.recipe, arguments.out, arguments.components)
    return 0


def make(recipe: Recipe, path: Path, out: Path, components: int | None) -> None:
    """Fill the folder on all ranks, and hold it against the live teacher."""
    try:
        part = recipe.method.cacheable
    except ValueError as error:
        raise RecipeError(f"{path}: {error}") from None
    check_writable(out / "cache.json")
    keys = ("data.backend", "data.train", f"method.{part}", *(f"init.{number}.from" for number in _loads(recipe, part)))
    if problems := [str(problem) for problem in missing(recipe) if problem.key in keys]:
        raise RecipeError(f"{path}: {'; '.join(problems)}")
    with dist.group(recipe.run.device, recipe.run.timeout_seconds) as world:
        maker = Maker(recipe, world)
        cache = maker.make(out, components)
        worst = maker.compare(out)
        draws, images, views, numbers = cache.shape
        logger.info(
            f"{out}: {draws} draws of {images:,} images in {views} views, {2 * draws * views * numbers:,} bytes an "
            f"image; the live teacher's features differ by {100 * worst:.2g} % of their length at most"
        )


def _loads(recipe: Recipe, part: str) -> list[int]:
    return [number for number, init in enumerate(recipe.init) if part in init.load]


if __name__ == "__main__":
    dist.leave(main)
