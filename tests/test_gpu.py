"""What only a GPU can show. Skipped with its reason where there is none; `tests/test_gpu_lines.py` runs the same lines
without one."""

import pytest
import torch

from engine import dist
from engine.bench import step as step_bench
from engine.train import Trainer
from tests.images import write_tree
from tests.loading import config, open_train, take
from tests.runs import assert_same_run, last_state, open_loader, run
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
    for _ in range(3):  # the guard of the first step waits, and kernels are compiled
        trainer.step(batches)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            trainer.step(batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.consensus.agreed() == (False, False)


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_trains_and_resumes(amp, tmp_path):
    recipe = tiny("quick/burn_stage2.yaml", tmp_path, "run.device=cuda", f"run.amp={amp}")
    assert run(recipe)["step"] == 6
    longer = tiny("quick/burn_stage2.yaml", tmp_path, "run.device=cuda", f"run.amp={amp}", "run.duration=8it")
    run(longer, resume=True, allow_changes=True)
    assert last_state(longer)["step"] == 8


@pytest.mark.filterwarnings("default")  # PyTorch warns of operators that have no deterministic form
@pytest.mark.parametrize("kernels", ["torch", "fused"])
def test_a_deterministic_run_resumes_to_the_bit(kernels, tmp_path):
    more = ["run.device=cuda", "run.amp=fp16", "run.deterministic=true", f"run.kernels={kernels}", "evals=[]"]
    whole = tiny("burn_stage2.yaml", tmp_path / "whole", *more)
    run(whole)
    parts = tiny("burn_stage2.yaml", tmp_path / "parts", *more)
    run(parts)
    for path in sorted((parts.folder / "checkpoints").glob("step-*"))[2:]:
        path.unlink()
    run(parts, resume=True)
    assert_same_run(whole, parts)


@pytest.mark.parametrize("compiles", ["true", "false"])
def test_fused_half_blocks_train(compiles, tmp_path):
    recipe = tiny(
        "burn_stage2.yaml", tmp_path, "run.device=cuda", "run.amp=fp16", "run.kernels=fused", f"run.compile={compiles}"
    )
    assert run(recipe)["step"] == 6


def assert_same_views(backend, tree, most):
    on_gpu = take(open_train(config(backend, tree), device=torch.device("cuda", 0)), 12)
    on_cpu = take(open_train(config("folder", tree)), 12)
    for a, b in zip(on_gpu, on_cpu, strict=True):
        assert a.views[0].is_cuda and torch.equal(a.rows, b.rows)
        for x, y in zip(a.views, b.views, strict=True):
            assert x.is_contiguous(memory_format=torch.channels_last)
            assert ((x.cpu() - y).abs() * 255 * 0.225).mean() <= most


def test_views_on_the_gpu_are_those_of_the_cpu(tree):
    # Pinned copies, the stream beside the step, and the compiled augmentation.
    assert_same_views("folder", tree, 0.5)


def test_dali_decodes_the_same_pixels_on_the_gpu(tree):
    pytest.importorskip("nvidia.dali", reason="nvidia-dali is not installed")
    assert_same_views("dali", tree, 2.0)


def test_the_gpu_decodes_and_says_so(capfd):
    pytest.importorskip("nvidia.dali", reason="nvidia-dali is not installed")
    from loaders.dali_probe import probe

    found = probe(torch.device("cuda", 0))
    assert found.decoder in ("hardware", "CUDA") and found.nvjpeg, str(found)


def test_an_image_from_the_host_joins_those_of_the_gpu(tmp_path):
    pytest.importorskip("nvidia.dali", reason="nvidia-dali is not installed")
    tree = write_tree(tmp_path / "images")
    path = sorted(tree.rglob("*.jpg"))[2]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    for batch in take(open_train(config("dali", tree), device=torch.device("cuda", 0)), 12):
        assert {view.device.type for view in batch.views} == {"cuda"}


def test_the_step_benchmark_runs(tmp_path):  # the last: it compiles every variant
    recipe = tiny("burn_stage2.yaml", tmp_path, "run.device=cuda", "run.amp=fp16")
    result = step_bench.measure(recipe, "step", steps=2, rounds=2, warm_up=2, checks=False, only=["eager", "fused"])
    assert set(result.variants) == {"reference", "eager", "fused"} and result.ceilings
    assert all(timing.kernels > 0 and timing.peak_bytes > 0 for timing in result.variants.values())
    assert all(timing.phases_ms["augment"] >= 0 for timing in result.variants.values())
