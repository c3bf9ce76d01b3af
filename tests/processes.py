"""Functions of the tests in processes of their own, alone or as ranks, and the tools as modules."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterable
from typing import Any

import torch

from engine import dist
from tests.tiny import ROOT

PATIENCE = 900
"""Seconds that a test waits for what takes seconds: a busy machine is no failure."""
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
        process.join(PATIENCE)
    hung = [process for process in processes if process.is_alive()]
    for process in hung:
        process.kill()
    assert not hung, "ranks hang"
    return [process.exitcode for process in processes]


def train_main(*arguments: str) -> None:
    """tools/train.py's main in this process."""
    sys.argv = ["train.py", *arguments]
    dist.leave(tool("train").main)


def tool(name: str) -> Any:
    """A file of tools/ as a module."""
    if str(ROOT / "tools") not in sys.path:
        sys.path.insert(0, str(ROOT / "tools"))
    return importlib.import_module(name)
