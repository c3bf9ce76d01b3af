"""What a run says, and where: its log, its errors, TensorBoard."""

import logging
import re
import struct

import pytest

from engine.log import logger, to_console
from tests.processes import train_main
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
