"""Checkpoints of older versions, as they were written then."""

import logging
import shutil

import pytest

from engine import checkpoint, recipe, train
from engine.errors import CheckpointError
from tests.runs import last_state
from tests.tiny import ROOT

# Of commit f9b53a6: a linear evaluation of the tiny network (width 1) on noise, after 3 of 6 steps; order of version 1.
OLD = ROOT / "tests" / "golden" / "step-000000003-88bcc5362af96909.pt"


@pytest.fixture
def old_run(tmp_path):
    """The old run's folder, and its recipe as that folder has it."""
    (tmp_path / "old" / "checkpoints").mkdir(parents=True)
    shutil.copy(OLD, tmp_path / "old" / "checkpoints")
    kept = tmp_path / "old" / "recipe.yaml"
    kept.write_text(checkpoint.load(OLD)["recipe"])
    return recipe.load(kept, [f"run.folder={tmp_path}"])


def test_an_old_run_goes_on(old_run, caplog):
    # reliability 38
    caplog.set_level(logging.INFO)
    train.run(old_run, resume=True)
    assert "at step 3" in caplog.text and "version 1 of the stream" in caplog.text
    said = [record.getMessage() for record in caplog.records if "resumed differently" in record.getMessage()]
    assert all("was written with" in text for text in said)  # other versions of packages, nothing of the recipe
    then, now = checkpoint.load(OLD), last_state(old_run)
    assert now["step"] == 6 and now["method"].keys() == then["method"].keys()
    assert now["identity"]["version of the stream"] == 1


def test_an_old_run_is_a_source(old_run, tmp_path):
    new = recipe.load(
        tmp_path / "old" / "recipe.yaml",
        ["name=new", f"run.folder={tmp_path}", f"init=[{{from: {tmp_path}/old, load: [backbone]}}]"],
    )
    train.run(new)
    old, mine = (state["method"] for state in (checkpoint.load(OLD), last_state(new)))
    frozen = [name for name in mine if name.startswith("backbone.") and name.endswith("weight") and "fc" not in name]
    assert frozen and all((old[name] == mine[name]).all() for name in frozen)


def test_a_format_that_is_not_known_is_one_line(tmp_path):
    import torch

    torch.save({**checkpoint.load(OLD), "format": 99}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"not a checkpoint of format 2, found 99"):
        checkpoint.load(tmp_path / "x.pt")


def test_what_a_checkpoint_lacks_is_one_line(tmp_path):
    import torch

    whole = checkpoint.load(OLD)
    for key in checkpoint._KEYS:
        for part in ({key: None}, {}):
            torch.save({name: item for name, item in whole.items() if name != key} | part, tmp_path / "x.pt")
            with pytest.raises(CheckpointError, match=rf"x\.pt: incomplete or changed by hand, at {key};"):
                checkpoint.load(tmp_path / "x.pt")


def test_a_checkpoint_of_another_network_is_named(old_run):
    wider = recipe.load(old_run.folder / "recipe.yaml", [f"run.folder={old_run.run.folder}", "method.backbone.width=2"])
    with pytest.raises(CheckpointError, match=rf"^{old_run.folder}/.*\.pt: the checkpoint is of another network"):
        train.run(wider, resume=True, allow_changes=True)
