"""The architecture: who imports whom, names, tools and what the README promises."""

import ast
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT

ROOMS = {"engine": {"engine", "loaders", "models"}, "loaders": {"loaders"}, "models": {"models"}}
TOOLS = sorted(path for path in (ROOT / "tools").glob("*.py") if path.name != "_root.py")


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module


@pytest.mark.parametrize("room", ROOMS)
def test_imports_flow_one_way(room):
    ours = {"engine", "loaders", "models", "tools", "tests"}
    for path in (ROOT / room).rglob("*.py"):
        for name in imported(path):
            top = name.split(".")[0]
            assert top not in ours or top in ROOMS[room], f"{path} imports {name}"


def test_optional_packages_are_imported_where_they_are_used():
    homes = {"nvidia": "loaders/dali_loader.py", "matplotlib": "engine/report.py", "sklearn": "tools/"}
    for room in (*ROOMS, "tools"):
        for path in (ROOT / room).rglob("*.py"):
            place = str(path.relative_to(ROOT))
            for name in imported(path):
                home = homes.get(name.split(".")[0])
                assert home is None or place.startswith(home), f"{place} imports {name}"


def test_names():
    for path in ROOT.rglob("*.py"):
        if not any(part.startswith(".") for part in path.relative_to(ROOT).parts):
            assert path.stem not in ("utils", "util", "misc", "common", "helpers"), path
    for path in TOOLS:
        assert path.stem not in sys.stdlib_module_names, f"{path} hides a module of Python"


@pytest.mark.parametrize("tool", TOOLS, ids=lambda p: p.name)
def test_tools_explain_themselves_from_any_folder(tool, tmp_path):
    done = subprocess.run(
        [sys.executable, str(tool), "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and "usage:" in done.stdout and tool.name in done.stdout


def test_readme_names_only_what_exists():
    text = (ROOT / "README.md").read_text()
    for name in re.findall(r"\b((?:engine|models|loaders|recipes|tools|tests|benchmarks|docs)/[\w./-]*\w)", text):
        if "<" not in name:
            assert (ROOT / name).exists(), name


def test_every_recipe_is_in_the_readme():
    text = (ROOT / "README.md").read_text()
    for path in (ROOT / "recipes").glob("*.yaml"):
        assert path.name in text, path
