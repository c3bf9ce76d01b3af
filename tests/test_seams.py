"""A method is one file, and so is a back end: both are written into a copy of the repository, and the suite's generic
tests must pass for them without another edit."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.processes import PATIENCE
from tests.tiny import ROOT

METHOD = '''
"""A method that is like none of the others: agreement of two views, pushed away from a bank of earlier embeddings."""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from models import backbones, collectives
from models.methods import Method, MethodConfig


class Config(MethodConfig):
    """Its keys."""

    num_views = 2
    schedules = ("repulsion",)
    name: Literal["aardvark"]
    encoder: backbones.Config
    embedding: int = Field(default=96, ge=1)
    bank_rows: int = Field(default=128, ge=1)

    def build(self):
        """The method."""
        return Aardvark(self)


class Aardvark(Method):
    """L = mean of 1 - cos(z1, z2) + repulsion · mean of cos(z1, bank)²."""

    views_per_backbone = 2
    moved_after_step = ("bank",)

    def __init__(self, config):
        super().__init__()
        self.encoder = config.encoder.build()
        self.projection = nn.Linear(self.encoder.out_channels, config.embedding)
        self.register_buffer("bank", F.normalize(torch.randn(config.bank_rows, config.embedding), dim=1))
        self._new = []

    def forward(self, views, label, values):
        """Two views to the loss."""
        one, two = (F.normalize(self.projection(self.encoder(view)).to(self.bank.dtype), dim=1) for view in views)
        apart = (one @ self.bank.T).square().mean()
        self._new.append(collectives.all_gather(two.detach()))
        return {"loss": 1 - (one * two).sum(dim=1).mean() + values["repulsion"] * apart, "apart": apart.detach()}

    @torch.no_grad()
    def after_step(self, values):
        """The newest embeddings come first."""
        self.bank.copy_(torch.cat((*self._new[::-1], self.bank))[: len(self.bank)])
        self._new.clear()

    def outputs(self, features):
        """The embedding, read as logits."""
        return F.normalize(self.projection(features), dim=1) / 0.1

    @property
    def evaluated(self):
        """The encoder."""
        return self.encoder
'''

RECIPE = """\
# A method that is like none of the others, on digits.
#   python tools/train.py recipes/quick/aardvark.yaml
# status: a test
base: ../base/digits.yaml
name: quick_aardvark
method:
  name: aardvark
  encoder: {arch: reactnet, width: 8}
data:
  backend: zebra
  options: {label_noise: 0.0}
  views: [{preset: digits, repeat: 2}]
optim: {name: adam}
schedules:
  lr: {shape: cosine, start: 1e-2}
  repulsion: {shape: switch, start: 0.1, end: 1.0, milestones: [20%]}
"""

BACKEND = '''
"""Back end `zebra`: one image after the other, in the training process."""

from pydantic import Field

from loaders import contract
from loaders.host import load_batch


class Options(contract.Options):
    """Its options."""

    label_noise: float = Field(default=0.0, ge=0, le=0)

    @classmethod
    def about(cls):
        """It always works."""
        return "works: stripes"

    def batches(self, order):
        """See `contract.Options`."""
        return (load_batch(order.stream, positions, replace=order.replace) for positions in order.positions)
'''

GENERIC = [
    # The method: dry run, a step on noise, exact resume on one rank and on two, two equal runs, losses in float64.
    ("tests/test_recipe.py", "aardvark"),
    ("tests/test_training.py", "aardvark"),
    ("tests/test_golden.py", "aardvark"),
    # The back end: its contract, parity with the others, bad files, evaluation, shards.
    ("tests/test_loaders.py", "zebra and not memory"),
    ("tests/test_sources.py", "zebra or benchmark_of_loaders or (test_doctor and not names)"),
    # Nothing that lists methods or back ends breaks.
    ("tests/test_recipe.py", "test_messages or test_missing_parts or test_auto or decides"),
]


@pytest.mark.slow
def test_a_seventh_method_and_a_sixth_back_end_are_one_file_each(tmp_path):
    copy = tmp_path / "copy"
    kept = ("engine", "models", "loaders", "runtime", "recipes", "tools", "tests", "setup.cfg")
    copy.mkdir()
    for name in kept:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, copy / name)
    (copy / "models/methods/aardvark.py").write_text(METHOD)
    (copy / "loaders/zebra_loader.py").write_text(BACKEND)
    (copy / "recipes/quick/aardvark.yaml").write_text(RECIPE)
    environment = {**os.environ, "PYTHONPATH": str(copy)}
    for number, (file, which) in enumerate(GENERIC):
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file, "-k", which]
        done = subprocess.run(
            command, cwd=copy, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
        passed = int(done.stdout.rsplit(" passed", 1)[0].rsplit(maxsplit=1)[-1].lstrip("="))
        assert passed >= (3, 4, 1, 10, 3, 10)[number], f"{file} -k '{which}': only {passed} tests ran"
