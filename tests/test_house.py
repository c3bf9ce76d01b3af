"""The architecture: who imports whom, names, tools, and what README and docs promise."""

import ast
import importlib.util
import re
import subprocess
import sys

import pytest

import loaders
from engine import errors
from engine import recipe as recipes
from models import methods
from tests.processes import PATIENCE, tool
from tests.tiny import RECIPES, ROOT

ROOMS = {
    "engine": {"engine", "loaders", "models", "runtime"},
    "loaders": {"loaders"},
    "models": {"models"},
    "runtime": {"runtime"},
}
TOOLS = sorted(path for path in (ROOT / "tools").glob("*.py") if path.name != "_root.py")
DOCS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "recipes/README.md", *sorted((ROOT / "docs").glob("*.md"))]


def imported(path):
    """Full names of the modules that a file imports, `from a import b` as a.b."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("room", ROOMS)
def test_imports_flow_one_way(room):
    ours = {*ROOMS, "tools", "tests"}
    for path in (ROOT / room).rglob("*.py"):
        for name in imported(path):
            top = name.split(".")[0]
            assert top not in ours or top in ROOMS[room], f"{path} imports {name}"


def test_the_runtime_needs_numpy_alone():
    for path in set((ROOT / "runtime").rglob("*.py")) - {ROOT / "runtime/setup.py"}:
        for name in imported(path):
            top = name.split(".")[0]
            images = top == "PIL" and path.name == "__main__.py"  # an extra, for those who give it a JPEG
            assert top in {*sys.stdlib_module_names, "numpy", "runtime"} or images, f"{path} imports {name}"


def test_what_trains_knows_nothing_of_measuring_and_drawing():
    for path in (ROOT / "engine").glob("*.py"):
        for name in imported(path):
            assert not name.startswith(("engine.bench", "engine.results")), f"{path} imports {name}"


def test_no_test_module_imports_another():
    for path in (ROOT / "tests").glob("*.py"):
        for name in imported(path):
            assert not name.startswith(("tests.test_", "tests.conftest")), f"{path} imports {name}"


def test_the_engine_names_no_method_and_no_back_end():
    """Neither their names nor the keys of their configs, except those that the contracts have."""
    contract = {*methods.MethodConfig.model_fields, *loaders.DataConfig.model_fields, "momentum", "backbone"}
    own = {key for name in methods.available() for key in methods.load(name).Config.model_fields} - contract
    own |= {key for name in loaders.backends() for key in loaders.load(name).Options.model_fields} - contract
    names = {*methods.available(), *loaders.backends()} - {"folder"} | own
    allowed = {  # words of their own in another sense
        "engine/checkpoint.py": {"student"},
        "engine/bench/step.py": {"student", "teacher"},  # phases: a trained and a frozen network
        "engine/results/table.py": {"teacher"},  # of a table: a key of its own
        "engine/log.py": {"burn"},  # the logger's
    }
    for path in (ROOT / "engine").rglob("*.py"):
        place = str(path.relative_to(ROOT))
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert node.value not in names - allowed.get(place, set()), f"{place}:{node.lineno}: {node.value!r}"
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute):
                if node.value.attr in ("method", "options"):
                    assert node.attr not in own, f"{place}:{node.lineno}: {node.value.attr}.{node.attr}"


def test_optional_packages_are_imported_where_they_are_used():
    homes = {
        "nvidia": ("loaders/dali_loader.py",),
        "matplotlib": ("engine/results/figures.py", "tools/"),
        "sklearn": ("engine/svm.py", "tools/"),
        "threadpoolctl": ("engine/svm.py",),
        "safetensors": ("models/weights.py",),
        "openvino": ("engine/openvino.py",),
    }
    for room in (*ROOMS, "tools"):
        for path in (ROOT / room).rglob("*.py"):
            place = str(path.relative_to(ROOT))
            for name in imported(path):
                home = homes.get(name.split(".")[0])
                assert home is None or place.startswith(home), f"{place} imports {name}"


def test_sections_are_strict_in_two_places_alone():
    # One for models, one for loaders, which share nothing.
    found = [path for room in ROOMS for path in (ROOT / room).rglob("*.py") if 'extra="forbid"' in path.read_text()]
    assert sorted(str(path.relative_to(ROOT)) for path in found) == ["loaders/config.py", "models/contract.py"]


def test_names():
    for path in ROOT.rglob("*.py"):
        if not any(part.startswith(".") for part in path.relative_to(ROOT).parts):
            assert path.stem not in ("utils", "util", "misc", "common", "helpers"), path
    for path in TOOLS:
        assert path.stem not in sys.stdlib_module_names, f"{path} hides a module of Python"


@pytest.mark.parametrize("path", TOOLS, ids=lambda p: p.name)
def test_tools_explain_themselves(path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    with pytest.raises(SystemExit) as left:
        tool(path.stem).main()
    said = capsys.readouterr().out
    assert left.value.code == 0 and "usage:" in said and path.name in said


def test_no_tool_answers_errors_by_itself():
    for path in TOOLS:
        text = path.read_text()
        assert ("dist.leave(main)" in text) != ("@guarded\ndef main" in text and "sys.exit(main())" in text), path
        assert "KNOWN" not in text and "error: {" not in text, path


def test_tools_start_from_any_folder(tmp_path):
    command = [sys.executable, str(ROOT / "tools/train.py"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0 and "usage:" in done.stdout


def test_benchmarks_import():
    for path in sorted((ROOT / "benchmarks").glob("*.py")):
        spec = importlib.util.spec_from_file_location(f"benchmark_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        assert callable(module.main)


# ------------------------------------------------------------------------------------------------ documents


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_documents_name_only_what_exists(path):
    text = path.read_text()
    for name in re.findall(
        r"(?<![\w/.-])((?:engine|models|loaders|recipes|tools|tests|benchmarks|docs)/[\w./-]*\w)", text
    ):
        if not any(sign in name for sign in "<{*") and name != "benchmarks/gpu.json":  # is written on a GPU
            assert (ROOT / name).exists() or list(ROOT.glob(f"{name}*")), f"{path.name}: {name}"
    for link in re.findall(r"\]\(([^)#]+)", text):
        assert link.startswith("http") or (path.parent / link).exists(), f"{path.name}: {link}"


def test_every_recipe_is_in_its_readme():
    text = (ROOT / "recipes/README.md").read_text()
    for path in (ROOT / "recipes").glob("*.yaml"):
        assert path.name in text, path


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 120 and len(text.split()) <= 1200
    assert "![" in text and "not measured" not in text
    assert not re.search(r"^[A-Z_]+$", text, re.M)  # a number still to be filled in


def test_exit_codes_are_documented():
    documented = {int(code) for code in re.findall(r"^\| (\d+) \|", (ROOT / "docs/running.md").read_text(), re.M)}
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.KNOWN)]
    assert documented == {0, *(c.exit_code for c in classes)} and len(classes) > 10


def citations():
    """(file, document, section) of every citation in code and tests."""
    for room in (*ROOMS, "tests", "benchmarks"):
        for path in (ROOT / room).rglob("*.py"):
            if path.name == "test_house.py":
                continue
            for line in path.read_text().splitlines():
                for match in re.finditer(
                    r"\b(methods|reliability|step)(?:\.md)? (\d[\d.]*\d|\d+)(?: and (\d+))?", line
                ):
                    for section in (match[2], match[3]):
                        if section:
                            yield path, match[1], section


def test_every_citation_resolves():
    headings = {
        name: set(re.findall(r"^#+ (\d[\d.]*\d|\d+)\.? ", (ROOT / f"docs/{name}.md").read_text(), re.M))
        for name in ("methods", "reliability", "step")
    }
    found = list(citations())
    assert len(found) >= 48
    for path, document, section in found:
        assert section in headings[document], f"{path}: {document}.md {section}"


def test_tests_that_documents_name_exist():
    everything = "\n".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    names = {name for path in DOCS for name in re.findall(r"`(test_\w+)`", path.read_text())}
    assert len(names) > 60
    for name in sorted(names):
        assert f"def {name}(" in everything, name


# ------------------------------------------------------------------------------------------------ GPUs and ranks

_ASKS = re.compile(
    r"""\.type [!=]= "cuda"|is_cuda\b|torch\.cuda\.|world_size (?:>|==|<) 1|is_initialized\(\)|is_grouped\(\)"""
    r"""|has_kernels\(|compiles\(|if on_gpu|self\._cuda\b|_side is None"""
)


def asking(path):
    """Functions of a file that ask whether they are on a GPU, or whether there is more than one rank."""
    text = path.read_text()
    functions = []

    def walk(node, prefix):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                if isinstance(child, ast.FunctionDef):
                    functions.append((child.lineno, child.end_lineno, f"{prefix}{child.name}"))
                walk(child, f"{prefix}{child.name}.")

    walk(ast.parse(text), "")
    for number, line in enumerate(text.splitlines(), 1):
        if _ASKS.search(line) and not line.strip().startswith(("#", '"""', "def ", "|")):
            around = [function for function in functions if function[0] <= number <= function[1]]
            if around:
                yield max(around)[2]


def test_every_branch_of_gpus_and_ranks_is_listed_with_what_reaches_it():
    found = {
        (str(path.relative_to(ROOT)), name)
        for room in (*ROOMS, "tools")
        for path in (ROOT / room).rglob("*.py")
        for name in asking(path)
    }
    rows = re.findall(r"^\| `([\w/]+\.py)` \| ([\w., ]+) \| (.+) \|$", (ROOT / "docs/gpu.md").read_text(), re.M)
    listed = {(file, name) for file, names, _ in rows for name in names.split(", ")}
    assert found - listed == set(), "add to docs/gpu.md what reaches these"
    assert listed - found == set(), "these ask no more"
    assert len(rows) > 30 and all("`test_" in reached or "alone" in reached for _, _, reached in rows)


# ------------------------------------------------------------------------------------------------ recipe keys


def keys_of(path):
    flat = set()

    def walk(item, prefix):
        if isinstance(item, dict) and item:
            for key, value in item.items():
                walk(value, f"{prefix}.{key}" if prefix else key)
        elif isinstance(item, list) and item:
            for value in item:
                walk(value, f"{prefix}.*")
        else:
            flat.add(prefix)

    walk(recipes.load(path).model_dump(mode="json", by_alias=True, serialize_as_any=True), "")
    # Names of parts are the user's, and so are those of schedules and of what the method or back end has.
    flat = {re.sub(r"^schedules\.\w+\.", "schedules.*.", key) for key in flat}
    flat = {re.sub(r"^(init\.\*\.load|optim\.lr_scale|run\.compile_options)\..*", r"\1", key) for key in flat}
    return {key for key in flat if not key.startswith(("method.", "data.options"))}


def test_recipe_keys_are_these():
    """A new key is a decision: add it here, and a test that sets it."""
    found = set().union(*(keys_of(path) for path in RECIPES))
    listed = set((ROOT / "tests/recipe_keys.txt").read_text().split())
    assert found <= listed, sorted(found - listed)
    own = {f"{name}.{key}" for name in methods.available() for key in methods.load(name).Config.model_fields}
    own |= {f"{name}.{key}" for name in loaders.backends() for key in loaders.load(name).Options.model_fields}
    assert own <= listed, sorted(own - listed)
    assert listed == found | own, sorted(listed - found - own)
