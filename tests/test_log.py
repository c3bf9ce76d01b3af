"""What a run says, and where: its log, its errors, TensorBoard."""

import logging
import re
import struct
import time

import pytest

from engine import accelerator, dist
from engine.log import logger, to_console
from tests.processes import tool, train_main
from tests.runs import rows, run
from tests.tiny import ROOT, tiny, tiny_overrides

QUICK = ROOT / "recipes/quick/burn_stage1.yaml"


@pytest.fixture
def console():
    """The root logger as it was, afterwards."""
    root, level = logging.getLogger(), logger.level
    handlers = root.handlers[:]
    yield
    root.handlers[:] = handlers
    logger.setLevel(level)


def test_progress_is_on_standard_output_and_warnings_on_standard_error(console, capsys):
    to_console(is_main=True)
    logger.info("step 1")
    logger.warning("small")
    to_console(is_main=False)
    logger.info("of another rank")
    logger.warning("there too")
    said = capsys.readouterr()
    assert said.out == "step 1\n" and said.err == "small\nthere too\n"


def test_a_log_file_has_the_steps_and_the_monitors(console, tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        train_main(str(QUICK), *tiny_overrides(QUICK, tmp_path), "run.duration=2it")
    said = capsys.readouterr()
    assert left.value.code in (0, None)
    lines = [line for line in said.out.splitlines() if line.startswith("step ")]
    steps = [line for line in lines if "img/s" in line]
    assert len(steps) == 2 and all(re.search(r"features/rank [\d.]+  outputs/information", line) for line in steps)
    assert any("knn" in line and "top1" in line and "online" not in line for line in lines)
    assert "saved " in said.out and "step " not in said.err


def test_the_text_of_a_dry_run_stands_alone(console, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train_main(str(QUICK), *tiny_overrides(QUICK, tmp_path), "--dry-run")
    assert capsys.readouterr().out.startswith("name: quick_burn_stage1\n")


def records(folder):
    """The records of TensorBoard's files, as they lie there."""
    for path in sorted(folder.iterdir()):
        content, place = path.read_bytes(), 0
        while place < len(content):
            (length,) = struct.unpack_from("<Q", content, place)
            yield content[place + 12 : place + 12 + length]
            place += 16 + length


def test_tensorboard_has_groups_the_recipe_and_no_constants(tmp_path):
    recipe = tiny(QUICK, tmp_path, "run.duration=3it")
    run(recipe)
    everything = b"".join(records(recipe.folder / "tensorboard"))
    tags = {"train/loss", "train/grad_norm", "schedule/lr", "schedule/balance", "speed/images_per_second", "knn/top1"}
    for tag in (*tags, "features/rank", "outputs/information"):
        assert tag.encode() in everything, tag
    for tag in ("knn/measured", "knn/online", "train/lr", "train/features/rank"):
        assert tag.encode() not in everything, tag
    assert f"    {recipe.dump().splitlines()[0]}".encode() in everything


def test_an_evaluation_before_the_first_step(tmp_path):
    recipe = tiny(QUICK, tmp_path, "evals.0.at_start=true", "run.duration=3it")
    run(recipe)
    knn = [row for row in rows(recipe) if row.get("evaluation") == "knn"]
    assert [(row["step"], row["images"]) for row in knn] == [(0, 0), (3, 48)]
    without = tiny(QUICK, tmp_path / "without", "run.duration=3it")
    run(without)
    assert [row for row in rows(recipe) if row["step"]] == rows(without)  # it changes nothing that is trained
    longer = tiny(QUICK, tmp_path, "evals.0.at_start=true", "run.duration=4it")
    run(longer, resume=True, allow_changes=True)
    assert [row["step"] for row in rows(longer) if "evaluation" in row] == [0, 3, 4]


def test_a_benchmark_says_where_it_is(caplog):
    from engine.bench.clock import Progress

    caplog.set_level("INFO", "burn")
    with Progress(2, every=0.01) as progress:
        progress.begin("compiling")
        while "compiling: " not in caplog.text:  # the reminder of what goes on
            time.sleep(0.01)
        progress.begin("timing")
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "[1 of 2] compiling"
    assert re.fullmatch(r"    compiling: \d+s since the start", lines[1])
    assert any(re.fullmatch(r"\[2 of 2\] timing, about \d+s left", line) for line in lines)
    assert not progress._thread.is_alive()


@pytest.mark.parametrize(
    ("asked", "ranks", "by_torchrun", "expected"),
    [
        (None, 1, False, 8),
        (None, 2, False, 4),
        ("3", 1, False, 3),
        ("3", 2, True, 3),
        ("1", 1, False, 1),
        ("1", 2, True, 4),  # torchrun's own, which says so
        ("1", 2, False, 1),
        ("5,2", 1, False, 5),
        ("many", 1, False, 8),
        ("99999", 1, False, 8),
        ("²", 1, False, 8),
        ("0", 1, False, 8),
    ],
)
def test_threads_are_those_that_are_asked_for(asked, ranks, by_torchrun, expected, monkeypatch):
    monkeypatch.setattr(accelerator.machine, "cores", lambda: 8)
    for name, value in (("OMP_NUM_THREADS", asked), ("TORCHELASTIC_RUN_ID", "x" if by_torchrun else None)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    used = []
    monkeypatch.setattr(accelerator.torch, "set_num_threads", used.append)
    accelerator.open_device("cpu", 0, ranks)
    assert used == [expected]


def test_the_doctor_reads_the_load(monkeypatch):
    doctor = tool("doctor")
    for load, busy in ((0.1, False), (7.5, True)):
        monkeypatch.setattr(doctor.os, "getloadavg", lambda load=load: (load, 0.0, 0.0))
        monkeypatch.setattr(doctor.machine, "cores", lambda: 8)
        said = dict(doctor.facts())["load"]
        assert said.startswith(f"{load:.1f} of 8 cores") and ("busy" in said) == busy


@pytest.mark.parametrize(("together", "verdict"), [(95.0, "keeps up"), (72.0, "is the bottleneck")])
def test_the_doctor_judges_loader_and_step_running_together(together, verdict, tmp_path, monkeypatch, capsys):
    doctor = tool("doctor")
    measured = {"whole": {"images_per_second": [500.0]}}  # five times what the step takes, alone
    found = {"backends": {"synthetic": measured}, "best": "synthetic", "device": "cpu"}
    monkeypatch.setattr(doctor.loader_bench, "measure", lambda *_, **__: found)
    monkeypatch.setattr(doctor.step_bench, "with_and_without_loader", lambda *_, **__: (100.0, together))
    doctor._keeps_up(tiny(QUICK, tmp_path))
    said = capsys.readouterr().out
    assert verdict in said and f"loses {1 - together / 100:.0%}" in said


def test_a_step_is_measured_with_its_loader(tmp_path):
    from engine.bench import step

    recipe = tiny(QUICK, tmp_path, "data.batch_size=8")
    alone, together = step.with_and_without_loader(recipe, dist.start("cpu", 60), steps=1)
    assert alone > 0 and together > 0
