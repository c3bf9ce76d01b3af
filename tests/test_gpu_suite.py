"""benchmarks/gpu_suite.py: every line of it on a CPU, and what it survives."""

import importlib.util
import json
import os
import subprocess
import sys
import zipfile

import pytest

from tests.processes import PATIENCE
from tests.tiny import ROOT


@pytest.fixture(scope="module")
def suite():
    spec = importlib.util.spec_from_file_location("gpu_suite", ROOT / "benchmarks/gpu_suite.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_suite"] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_every_section_runs_on_a_cpu(suite, tmp_path):
    out = tmp_path / "gpu.json"
    command = [sys.executable, str(ROOT / "benchmarks/gpu_suite.py"), "--rehearse", "--budget", str(PATIENCE)]
    done = subprocess.run([*command, "--out", str(out)], cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE)
    result = json.loads(out.read_text())
    said = {name: part.get("said", "")[-500:] for name, part in result["sections"].items() if part["outcome"] != "done"}
    assert done.returncode == 0 and not said, (said, done.stdout[-500:], done.stderr[-500:])
    found = {name: part["found"] for name, part in result["sections"].items()}
    assert list(found) == list(suite.SECTIONS)
    assert found["facts"]["back_ends"]["folder"] == "there"
    assert found["one_rank"]["train"]["exit_code"] == 0 and len(found["one_rank"]["bad_image"]["lines"]) == 1
    assert "skipped" in " ".join(found["tests"]["tests"].values())
    assert found["kernels"]["weights"]["kernel_us"] > 0 and found["kernels"]["same 32 112"]["apply"]["us"] > 0
    assert found["training"]["exit_code_of_sigterm"] == 75 and found["training"]["rows"][-1]["step"] == 120
    assert "folder" in found["loader"]["measured"]["backends"]
    assert {"reference", "eager"} == set(found["variants"]["variants"])
    assert len(found["tiles"]) == 4 and found["convolutions"]


def test_its_limits_fit_a_loan_of_ten_minutes(suite):
    assert sum(limit for _, limit in suite.SECTIONS.values()) <= suite.BUDGET <= 540
    assert next(iter(suite.SECTIONS)) == "facts"


@pytest.mark.parametrize(
    ("code", "outcome", "kept"),
    [
        ("keep({'a': 1})", "done", {"a": 1}),
        ("keep({'a': 1}); raise SystemExit(3)", "failed with code 3", {"a": 1}),
        ("keep({'a': 1}); import os; os.abort()", "failed with code -6", {"a": 1}),
        ("keep({'a': 1}); import time; time.sleep(10**6)", "ended at 4 s", {"a": 1}),
        ("import subprocess; keep({'a': 1}); subprocess.run(['sleep', '100000'])", "ended at 4 s", {"a": 1}),
        ("raise SystemExit(1)", "failed with code 1", None),
    ],
    ids=["done", "error", "abort", "hang", "child", "nothing"],
)
def test_what_a_section_kept_survives_its_end(suite, code, outcome, kept, tmp_path):
    result = tmp_path / "section.json"
    head = (
        f"import json, pathlib\nfile = pathlib.Path({str(result)!r})\n"
        "def keep(found): file.write_text(json.dumps(found))\n"
    )
    found = suite.supervise([sys.executable, "-c", head + code], result, 4, dict(os.environ))
    assert found["outcome"] == outcome and found.get("found") == kept


def test_a_variant_section_that_dies_keeps_its_rounds(suite, tmp_path, monkeypatch):
    def dies(plan, keep, work):
        keep({"round": 1})
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setitem(suite.SECTIONS, "tiles", (dies, 5))
    with pytest.raises(RuntimeError):
        suite.run_section("tiles", suite.REHEARSAL, tmp_path / "tiles.json", tmp_path)
    assert json.loads((tmp_path / "tiles.json").read_text()) == {"round": 1}


def test_wheels_are_found_whole_or_in_pieces(suite, tmp_path, monkeypatch):
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    wheels.mkdir(), site.mkdir()
    for name in ("small", "large"):
        with zipfile.ZipFile(wheels / f"{name}-1.0-py3-none-any.whl", "w") as archive:
            archive.writestr(f"{name}_package/__init__.py", "x = 1\n" * 100)
    whole = wheels / "large-1.0-py3-none-any.whl"
    content = whole.read_bytes()
    whole.unlink()
    for number in range(3):
        piece = content[number * len(content) // 3 : (number + 1) * len(content) // 3]
        (wheels / f"{whole.name}.{number:02d}").write_bytes(piece)
    suite.unpack(wheels, site)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(suite, "NEEDED", {"small_package": "small", "large_package": "large", "no_such": "nothing"})
    assert suite.lacking(site) == ["nothing"]


def test_it_says_what_the_machine_lacks(suite, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(suite, "NEEDED", {"no_such": "pydantic", "nor_this": "tqdm"})
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", ["gpu_suite.py", "--out", str(tmp_path / "x.json")])
    assert suite.main() == 2
    assert capsys.readouterr().err == "lacking: pydantic, tqdm; pass --wheels DIR with their wheels\n"


def test_a_machine_without_a_gpu_is_told_so_in_a_line(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks/gpu_suite.py"), "--out", str(tmp_path / "gpu.json")]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "cuda:0 cannot be used" in done.stderr and "nothing to measure" in done.stderr


def test_the_check_of_half_blocks_refuses_wrong_kernels_and_no_right_ones(suite):
    """PyTorch's formulas stand for the kernels, on the same inputs: right ones pass whatever the seed."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("triton", reason="triton is not installed")
    from models import halfblock, halfblock_triton

    def as_kernels(function):
        def call(*arguments, wrap=None):
            before, halfblock.has_kernels = halfblock.has_kernels, lambda _: False
            try:
                return function(*arguments)
            finally:
                halfblock.has_kernels = before

        return call

    names = ("statistics", "apply", "backward_sums", "backward_input")
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(halfblock_triton, name, as_kernels(getattr(halfblock, name)))
        for case in suite.HALF_BLOCKS:
            suite.half_block(suite.REHEARSAL, torch.device("cpu"), *case, 1.0)
        for name in names:
            right = getattr(halfblock_triton, name)

            def wrong(*arguments, wrap=None, right=right):
                first, *rest = out if isinstance(out := right(*arguments), tuple) else (out,)
                first = first * 1.05
                return (first, *rest) if rest else first

            with patch.context() as inner:
                inner.setattr(halfblock_triton, name, wrong)
                with pytest.raises(AssertionError):
                    suite.half_block(suite.REHEARSAL, torch.device("cpu"), "same", 128, 56, 1.0)
