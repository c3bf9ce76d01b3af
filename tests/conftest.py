"""Shared by the tests: tiny versions of every recipe, small image folders, and runs on several ranks."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from engine import recipe as recipes
from engine import train
from engine.log import TIMING
from engine.recipe import Recipe

ROOT = Path(__file__).resolve().parent.parent
TABLES = sorted(ROOT.glob("recipes/tables/*.yaml"))
RECIPES = sorted(set(ROOT.glob("recipes/**/*.yaml")) - set(TABLES))
RECIPE_IDS = [str(path.relative_to(ROOT / "recipes")) for path in RECIPES]
STUDENT = "{arch: reactnet, width: 2, stem_stride: 2, weights: %s, activations: binary}"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write tests/golden anew")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    torch.manual_seed(0)


def tiny_overrides(path: Path, folder: Path) -> list[str]:
    """What shrinks a recipe to seconds: small networks on synthetic images; methods and structure stay."""
    content = recipes.load(path)
    method = content.method
    sizes = sorted({view.size for view in content.data.views})
    small = dict(zip(sizes, (32, 64), strict=False))
    overrides = [
        f"run.folder={folder}",
        "data.backend=synthetic",
        "data.options={num_images: 40, num_val_images: 16, num_classes: 4, side: 36}",
        "data.expect_images=null",
        "data.batch_size=16",
        "data.micro_batch=8",
        "data.eval_view={crop: center, size: 32, resize: 32}",
        # Two sizes stay two sizes: the smaller crops of multi-crop keep a resolution of their own.
        "data.views=" + json.dumps([{**v.model_dump(), "size": small[v.size]} for v in content.data.views]),
        "run.duration=6it",
        "run.log_every=1it",
        "run.save_every=2it",
        "run.keep=100",
        "run.amp=off",
        "run.compile=false",
        "init=[]",
    ]
    if method.name == "burn":
        overrides += [
            f"method.student={STUDENT % method.student.weights}",
            "method.teacher={arch: reactnet, width: 2, weights: real, activations: real}",
            "method.hidden_dim=8",
            "method.out_dim=8",
        ]
    elif method.name == "moco":
        is_binary = method.backbone.arch == "reactnet" and method.backbone.activations == "binary"
        real = "{arch: reactnet, width: 2, weights: real, activations: real}"
        overrides += [
            f"method.backbone={STUDENT % method.backbone.weights if is_binary else real}",
            "method.out_dim=8",
            "method.queue_size=48",
        ]
    elif method.name == "s2bnn":
        overrides += [
            f"method.backbone={STUDENT % method.backbone.weights}",
            "method.teacher={arch: reactnet, width: 2, weights: real, activations: real}",
            "method.out_dim=8",
            "method.queue_size=48",
        ]
    elif method.name == "byol":
        overrides += [f"method.backbone={STUDENT % 'binary'}", "method.hidden_dim=8", "method.out_dim=8"]
    elif method.name == "swav":
        overrides += [
            f"method.backbone={STUDENT % 'binary'}",
            "method.hidden_dim=8",
            "method.out_dim=8",
            "method.num_prototypes=10",
            "method.queue_size=32",
            "schedules.prototypes.milestones=[1it]",
            "schedules.queue.milestones=[1it]",
        ]
    else:
        overrides += [f"method.backbone={STUDENT % method.backbone.weights}", "method.num_classes=4"]
        if method.teacher is not None:
            overrides += ["method.teacher={arch: reactnet, width: 2, weights: real, activations: real}"]
    if content.evals:
        overrides += ["evals.0.every=3it"]
    return overrides


def tiny(path: Path | str, folder: Path, *more: str) -> Recipe:
    """A tiny version of a recipe of this repository, with further overrides."""
    path = ROOT / "recipes" / path
    return recipes.load(path, [*tiny_overrides(path, folder), *more])


def distinct() -> list[Path]:
    """Recipes whose tiny versions differ in more than names and numbers: one of each, for what takes long."""
    found: dict[Any, Path] = {}
    for path in sorted(RECIPES, key=lambda p: len(p.parts)):
        recipe = tiny(path, Path("nowhere"))
        sizes = tuple(view.size for view in recipe.data.views)
        found.setdefault((recipe.method.model_dump_json(), recipe.optim.name, sizes), path)
    return list(found.values())


def run(recipe: Recipe, **options: Any) -> dict[str, Any]:
    """Run a recipe to its end; its last checkpoint."""
    train.run(recipe, **options)
    return last_state(recipe)


def last_state(recipe: Recipe) -> dict[str, Any]:
    from engine import checkpoint

    newest, damaged = checkpoint.latest(recipe.folder / "checkpoints")
    assert newest and not damaged
    return checkpoint.load(newest)


def rows(recipe: Recipe) -> list[dict[str, Any]]:
    """Rows of metrics without what differs between two equal runs."""
    lines = (recipe.folder / "metrics.jsonl").read_text().splitlines()
    return [{key: item for key, item in json.loads(line).items() if key not in TIMING} for line in lines]


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Where two nested states are not equal to the bit."""
    if isinstance(a, torch.Tensor):
        same = isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
        return [] if same else [path]
    if isinstance(a, dict):
        if not isinstance(b, dict) or a.keys() != b.keys():
            return [path]
        return [found for key in a for found in differences(a[key], b[key], f"{path}.{key}")]
    if isinstance(a, list | tuple):
        if len(a) != len(b):
            return [path]
        return [found for i, (x, y) in enumerate(zip(a, b)) for found in differences(x, y, f"{path}.{i}")]
    return [] if a == b else [path]


def assert_same_run(a: Recipe, b: Recipe) -> None:
    """Weights, buffers, optimizer and metrics of two finished runs are equal to the bit."""
    one, two = last_state(a), last_state(b)
    for key in ("step", "method", "optimizer", "scaler", "meter", "bad_images"):
        assert differences(one[key], two[key], key) == []
    assert rows(a) == rows(b)


# ------------------------------------------------------------------------------------------------ processes

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["engine.train", "engine.describe", "models.methods.burn", "models.methods.moco"])


def start_process(target: Callable[..., Any], *arguments: Any, **environment: str) -> Any:
    """Start `target(*arguments)` in a process of its own, which has torch imported already."""
    process = _context.Process(target=_child, args=(target, arguments, environment))
    process.start()
    return process


def _child(target: Callable[..., Any], arguments: Iterable[Any], environment: dict[str, str]) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        target(*arguments)
    except SystemExit:
        raise
    except BaseException as error:
        traceback.print_exc()
        raise SystemExit(1) from error


def rank_environment(world_size: int) -> list[dict[str, str]]:
    """What torchrun sets for each rank of one machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return [
        {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        for rank in range(world_size)
    ]


def run_ranks(world_size: int, target: Callable[..., Any], *arguments: Any) -> list[int]:
    """Run `target` on several ranks; their exit codes."""
    processes = [start_process(target, *arguments, **env) for env in rank_environment(world_size)]
    for process in processes:
        process.join(120)
    hung = [process for process in processes if process.is_alive()]
    for process in hung:
        process.kill()
    assert not hung, "ranks hang"
    return [process.exitcode for process in processes]


def train_main(*arguments: str) -> None:
    """tools/train.py's main in this process."""
    import sys

    sys.argv = ["train.py", *arguments]
    raise SystemExit(tool("train").main())


def tool(name: str) -> Any:
    """A file of tools/ as a module."""
    import importlib
    import sys

    if str(ROOT / "tools") not in sys.path:
        sys.path.insert(0, str(ROOT / "tools"))
    return importlib.import_module(name)


# ------------------------------------------------------------------------------------------------ images


def picture(seed: int, height: int, width: int) -> np.ndarray:
    """A smooth textured uint8 image [height, width, 3]."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    image = np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)).astype(float)
    return (image + rng.normal(0, 6, image.shape)).clip(0, 255).astype(np.uint8)


def write_tree(root: Path, count: int = 24, classes: int = 3) -> Path:
    """`count` JPEG files of varied sizes in class folders."""
    for number in range(count):
        folder = root / f"class{number % classes}"
        folder.mkdir(parents=True, exist_ok=True)
        height, width = 40 + 7 * (number % 5), 36 + 9 * (number % 4)
        Image.fromarray(picture(number, height, width)).save(folder / f"{number:04d}.jpg", quality=92)
    return root


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tree(tmp_path_factory.mktemp("images"))
