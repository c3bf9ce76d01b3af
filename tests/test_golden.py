"""Losses of 100 steps in float64 against committed ones: a change that should not change the math must not.

    python -m pytest tests/test_golden.py --update-golden        rewrites them, for a change that should

float64, because a binary network turns the rounding differences of two processors into flipped signs. Two runs on one
machine must be bit-identical in float32 too: reliability.md 5.
"""

import numpy as np
import pytest
import torch

from tests.runs import losses_in_float64, rows, run
from tests.tiny import ROOT, distinct, full_depth, tiny

GOLDEN = ROOT / "tests" / "golden"
STEPS = 100
NUM_VIEWS = {"burn_stage1.yaml": 2, "burn_stage2.yaml": 2, "moco_v2.yaml": 2, "linear_burn_release.yaml": 1}


def losses(path, folder):
    # Bicubic everywhere: PyTorch's bilinear filter of uint8 rounds differently with and without AVX2.
    filters = [f"data.views.{number}.interpolation=bicubic" for number in range(NUM_VIEWS[path])]
    # The widths and the depth with which these losses were written.
    widths = ["method.hidden_dim=8", "method.out_dim=8"] if path.startswith("burn") else []
    widths = ["method.out_dim=8"] if path.startswith("moco") else widths
    widths += full_depth(path)
    recipe = tiny(path, folder, f"run.duration={STEPS}it", "data.batch_size=8", "evals=[]", *filters, *widths)
    return losses_in_float64(recipe, STEPS)


@pytest.mark.parametrize("path", distinct(), ids=lambda path: path.stem)
def test_losses_in_float64_are_finite_and_repeat(path, tmp_path):
    recipe = tiny(path, tmp_path)
    found = losses_in_float64(recipe, 3)
    assert np.isfinite(found).all() and found == losses_in_float64(recipe, 3)


@pytest.mark.parametrize("path", NUM_VIEWS)
@pytest.mark.slow
def test_losses_are_the_committed_ones(path, tmp_path, request):
    found = losses(path, tmp_path)
    file = (GOLDEN / path).with_suffix(".txt")
    if request.config.getoption("--update-golden"):
        file.write_text(f"# torch {torch.__version__}\n" + "".join(f"{loss:.9g}\n" for loss in found))
    expected = [float(line) for line in file.read_text().splitlines() if not line.startswith("#")]
    assert len(expected) == STEPS
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_hundred_steps_twice_are_equal_to_the_bit(tmp_path):
    overrides = ["run.duration=100it", "data.batch_size=8", "evals=[]", "run.save_every=100it"]
    a, b = (tiny("quick/burn_stage2.yaml", tmp_path / name, *overrides) for name in "ab")
    run(a), run(b)
    assert len(rows(a)) == 100 and rows(a) == rows(b)
