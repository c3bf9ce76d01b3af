"""Options and fixtures of all tests. What else they share is in `tiny`, `runs`, `processes`, `images` and `loading`."""

from __future__ import annotations

import os
from pathlib import Path

if worker := os.environ.get("PYTEST_XDIST_WORKER"):  # before torch counts the cores that it may use
    # Each worker has a core of its own: threads of two workers that wait for each other take ten times as long.
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})

import pytest
import torch

from tests.images import write_tree


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tree(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 + 10 scenes of digits in the layout of PASCAL VOC."""
    pytest.importorskip("sklearn")
    from tests.processes import tool

    out = tmp_path_factory.mktemp("scenes") / "kit"
    tool("make_images").make("digit_scenes", out, limit=24)
    return out
