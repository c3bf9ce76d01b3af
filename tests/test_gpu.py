"""What only a GPU can show. Skipped with its reason where there is none."""

import pytest
import torch

from engine import dist
from engine.bench import step as step_bench
from engine.train import Trainer
from tests.loading import config, open_train, take
from tests.runs import last_state, open_loader, run
from tests.tiny import tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
@pytest.mark.parametrize(
    "path", ["burn_stage1.yaml", "burn_stage2.yaml", "byol.yaml", "swav.yaml", "s2bnn_contrast_step1.yaml"]
)
def test_the_step_never_waits_for_the_device(path, amp, tmp_path):
    trainer = Trainer(tiny(path, tmp_path, f"run.amp={amp}"), dist.start("cuda", 60))
    batches = open_loader(trainer)
    consensus = dist.Consensus(trainer.world)
    for _ in range(3):  # the guard of the first step waits, and kernels are compiled
        consensus.propose(trainer.step(batches), False)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            consensus.propose(trainer.step(batches), False)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert consensus.agreed() == (False, False)


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_trains_and_resumes(amp, tmp_path):
    recipe = tiny("quick/burn_stage2.yaml", tmp_path, "run.device=cuda", f"run.amp={amp}")
    assert run(recipe)["step"] == 6
    longer = tiny("quick/burn_stage2.yaml", tmp_path, "run.device=cuda", f"run.amp={amp}", "run.duration=8it")
    run(longer, resume=True, allow_changes=True)
    assert last_state(longer)["step"] == 8


@pytest.mark.parametrize("compiles", ["true", "false"])
def test_fused_half_blocks_train(compiles, tmp_path):
    recipe = tiny(
        "burn_stage2.yaml", tmp_path, "run.device=cuda", "run.amp=fp16", "run.kernels=fused", f"run.compile={compiles}"
    )
    assert run(recipe)["step"] == 6


def test_the_step_benchmark_runs(tmp_path):
    recipe = tiny("burn_stage2.yaml", tmp_path, "run.device=cuda", "run.amp=fp16")
    result = step_bench.measure(recipe, "step", steps=2, rounds=2, warm_up=2)
    assert set(result.variants) >= {"reference", "eager", "compiled", "fused"} and result.ceilings
    assert all(timing.kernels > 0 and timing.peak_bytes > 0 for timing in result.variants.values())


def test_dali_decodes_the_same_pixels_on_the_gpu(tree):
    pytest.importorskip("nvidia.dali", reason="nvidia-dali is not installed")
    on_gpu = take(open_train(config("dali", tree), device=torch.device("cuda", 0)), 12)
    on_cpu = take(open_train(config("folder", tree)), 12)
    for a, b in zip(on_gpu, on_cpu, strict=True):
        assert a.views[0].is_cuda and torch.equal(a.rows, b.rows)
        for x, y in zip(a.views, b.views, strict=True):
            assert x.is_contiguous(memory_format=torch.channels_last)
            assert ((x.cpu() - y).abs() * 255 * 0.225).mean() <= 2.0
