"""The step benchmark: its gates, phases and tables, on tiny recipes; and the cost model behind its predictions."""

import json

import pytest
import torch

from engine import dist
from engine.bench import step as step_bench
from engine.bench.clock import Ceilings, Phases, quantiles
from engine.bench.step import WithLoader, measure, table, verdict
from engine.bench.variants import Resident, gate, variants
from engine.errors import NotEqual
from engine.results import figures, runs
from models import cost, methods
from models.binary import Shift
from tests.processes import run_ranks, train_main
from tests.tiny import ROOT, tiny, tiny_overrides

CPU = torch.device("cpu")
EAGER = ("reference", "eager")


def eager_variants(recipe, device=CPU):
    return [variant for variant in variants(recipe, device) if variant.name in EAGER]


@pytest.mark.parametrize("path", ["burn_stage1.yaml", "burn_stage2.yaml", "swav.yaml", "byol.yaml", "moco_v2.yaml"])
def test_reference_and_eager_are_equal_in_float64(path, tmp_path):
    recipe = tiny(path, tmp_path)
    found = gate(eager_variants(recipe), dist.start("cpu", 60))
    assert set(found) == {"eager"} and found["eager"] < 1e-12
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.slow
def test_compiled_variant_is_equal_in_float64(tmp_path):
    recipe = tiny("quick/supervised.yaml", tmp_path)
    found = gate(variants(recipe, CPU), dist.start("cpu", 60))
    assert set(found) == {"eager", "compiled", "fused"} and max(found.values()) < 1e-10


def test_a_wrong_variant_stops_the_benchmark(tmp_path, monkeypatch):
    from models import reactnet

    recipe = tiny("burn_stage2.yaml", tmp_path)
    right = reactnet.ReActNet.pooled

    def wrong(self, x):
        return right(self, x) * (1 + 1e-5 * x.is_contiguous(memory_format=torch.channels_last))

    monkeypatch.setattr(reactnet.ReActNet, "pooled", wrong)
    with pytest.raises(NotEqual, match="variant eager differs from the reference by .* nothing was timed"):
        gate(eager_variants(recipe), dist.start("cpu", 60))


def test_nan_gradient_stops_the_benchmark(tmp_path, monkeypatch):
    from models import reactnet

    recipe = tiny("burn_stage2.yaml", tmp_path)
    right = reactnet.Block.forward

    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * float("nan")

    def wrong(self, x):
        h = right(self, x)
        return Poison.apply(h) if h.is_contiguous(memory_format=torch.channels_last) and h.shape[2] == 8 else h

    monkeypatch.setattr(reactnet.Block, "forward", wrong)
    with pytest.raises(NotEqual, match="by nan"):
        gate(eager_variants(recipe), dist.start("cpu", 60))


def test_the_reference_variant_is_the_authors_way(tmp_path):
    reference, eager = eager_variants(tiny("burn_stage2.yaml", tmp_path))
    one, other = (variant.trainer(dist.start("cpu", 60)) for variant in (reference, eager))
    shifts = [m for m in one.method.modules() if isinstance(m, Shift)]
    assert shifts and all(
        shift(torch.zeros(1, shift.bias.shape[1], 1, 1).half()).dtype == torch.float32 for shift in shifts
    )
    kept = next(m for m in other.method.modules() if isinstance(m, Shift))
    assert kept(torch.zeros(1, kept.bias.shape[1], 1, 1).half()).dtype == torch.float16
    assert all(not group["foreach"] and not group["fused"] for group in one.optimizer.param_groups)
    weight = one.method.student.blocks[1].conv3x3.weight
    assert weight.is_contiguous() and not weight.is_contiguous(memory_format=torch.channels_last)
    assert not other.method.student.blocks[1].conv3x3.weight.is_contiguous()


class Ticks:
    """A clock that moves by one second at each look: times then count looks, and must add up to the tick."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(step_bench.time, "perf_counter", self)

    def __call__(self):
        self.now += 1.0
        return self.now


def test_phases_cover_the_step(tmp_path, monkeypatch):
    recipe = tiny("burn_stage2.yaml", tmp_path)
    monkeypatch.setattr(step_bench, "variants", eager_variants)
    Ticks(monkeypatch)
    result = measure(recipe, "step", steps=2, rounds=2, warm_up=1)
    for timing in result.variants.values():
        # Two micro-steps: load (which looks twice more), forward, two calls of each backbone with heads behind them,
        # backward; and the optimizer at the end.
        assert timing.phases_ms == {
            "load": 6000.0,
            "forward": 2000.0,
            "teacher": 4000.0,
            "heads and loss": 8000.0,
            "student": 4000.0,
            "backward": 2000.0,
            "optimizer": 1000.0,
            "augment": 4000.0,  # of other steps; it looks once more, for the share of waiting
        }
        assert timing.step_ms == {"median": 27_000.0, "p10": 27_000.0, "p90": 27_000.0}
        assert timing.noise == 0 and timing.times_reference == [1.0, 1.0]
        assert timing.saved_bytes_per_image > 0 and timing.kernels is None
    text = table(result)
    assert "no verdict" in text and "| eager |" in text and result.ceilings is None and "too noisy" not in text
    runs.write_json(result, tmp_path / "step.json")
    assert json.loads((tmp_path / "step.json").read_text())["variants"]["eager"]["times_reference"] == [1.0, 1.0]
    result.ceilings = Ceilings(copy_bytes_per_second=1e12, matmul_flops=1e14)
    runs.write_json(result, tmp_path / "step.json")
    assert json.loads((tmp_path / "step.json").read_text())["ceilings"]["matmul_flops"] == 1e14
    assert "copy 1.00 TB/s" in table(result)
    result.ceilings = None
    figures.draw_phases(result, tmp_path / "phases.png")
    assert (tmp_path / "phases.png").stat().st_size > 5000


def test_ratios_are_of_paired_rounds_and_left_out_where_noise_is_larger():
    def blocks(*seconds):
        return [[{"step": second}] * 4 for second in seconds]

    # A machine that slows down by half between two rounds: each round's ratio is still 2.
    assert step_bench._paired_ratios(blocks(4, 8), blocks(2, 4)) == [2, 2]
    one = step_bench.Running.__new__(step_bench.Running)
    one.blocks = blocks(4, 5)
    assert step_bench._noise(one) == pytest.approx(1 / 4.5) and step_bench._noise(one) > step_bench.MOST_NOISE


def test_noise_hides_the_ratio_and_says_so(tmp_path, monkeypatch, capsys):
    recipe = tiny("burn_stage2.yaml", tmp_path)
    monkeypatch.setattr(step_bench, "variants", eager_variants)
    monkeypatch.setattr(step_bench, "MOST_NOISE", -1.0)
    result = measure(recipe, "step", steps=1, rounds=2, warm_up=1)
    assert all(timing.times_reference is None for timing in result.variants.values())
    assert "no ratio is given; measure again on a quiet machine" in table(result)


def test_it_says_what_it_is_doing(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "burn")
    monkeypatch.setattr(step_bench, "variants", eager_variants)
    measure(tiny("burn_stage2.yaml", tmp_path), "train", steps=1, rounds=1, warm_up=1)
    for text in (
        "2 variants of the step on cpu: reference, eager",
        "checking eager against the reference in float64",
        "warming up eager (2 of 2)",
        "timing round 1 of 1",
        "with and without the loader, round 1 of 1",
        "[7 of 7] the loader alone, about",
    ):
        assert text in caplog.text
    assert "[8 of" not in caplog.text


def on_ranks(folder):
    recipe = tiny("quick/burn_stage2.yaml", folder, "data.micro_batch=4")
    step_bench.variants = eager_variants
    result = measure(recipe, "train", steps=1, rounds=2, warm_up=1)
    assert result.ranks == 2 and result.train.images_per_second["with_loader"] > 0
    for timing in result.variants.values():
        assert {"load", "teacher", "student", "heads and loss", "backward", "optimizer"} <= set(timing.phases_ms)


@pytest.mark.slow
def test_on_two_ranks(tmp_path):
    assert run_ranks(2, on_ranks, tmp_path) == [0, 0]


@pytest.mark.parametrize("protocol", ["all", "linear", "pre-fc", "burn-release"])
def test_with_the_loader(protocol, tmp_path, monkeypatch):
    recipe = tiny("quick/supervised.yaml", tmp_path, f"method.trains={protocol}")
    monkeypatch.setattr(step_bench, "variants", eager_variants)
    result = measure(recipe, "train", steps=1, rounds=2, warm_up=1)
    assert result.train.variant in EAGER and result.train.images_per_second["loader_alone"] > 0
    assert len(result.train.with_loader_over_resident) == 2
    assert "none: a CPU" in result.verdict and "loader synthetic" in table(result)


def test_the_command_prints_keeps_and_draws(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(step_bench, "variants", eager_variants)
    monkeypatch.setattr(step_bench, "measure", lambda *a: measure(*a, steps=1, rounds=2, warm_up=1))
    overrides = tiny_overrides(ROOT / "recipes/quick/burn_stage2.yaml", tmp_path)
    files = ["--json", str(tmp_path / "step.json"), "--figure", str(tmp_path / "step.png")]
    command = [str(ROOT / "recipes/quick/burn_stage2.yaml"), *overrides, "--benchmark"]
    with pytest.raises(SystemExit) as left:
        train_main(*command, "step", *files)
    assert left.value.code == 0 and "predicted for the compiled step" in capsys.readouterr().out
    assert set(json.loads((tmp_path / "step.json").read_text())["variants"]) == set(EAGER)
    assert (tmp_path / "step.png").stat().st_size > 5000
    with pytest.raises(SystemExit) as left:
        train_main(*command, "loader", *files)
    assert left.value.code == 2 and "--figure draws what" in capsys.readouterr().err


def test_burn_has_a_variant_with_other_targets(tmp_path):
    found = variants(tiny("burn_stage2.yaml", tmp_path), CPU)
    assert [v.name for v in found] == ["reference", "eager", "compiled", "fused", "compiled, teacher_bn eval"]
    assert [v.same_maths for v in found] == [True] * 4 + [False]
    assert found[-1].recipe.method.teacher_bn == "eval"


def test_phases_add_up(monkeypatch):
    Ticks(monkeypatch)
    phases = Phases(CPU)
    for _ in range(2):
        for name in ("a", "b", "a"):
            phases.mark(name)
        phases.end_step()
    assert phases.read() == [{"a": 2000.0, "b": 1000.0}] * 2 and phases.read() == []


def test_verdicts():
    def of(with_loader, alone, augmented=100.0, noise=0.0):
        speeds = {
            "resident": 100.0, "augmented": augmented, "with_loader": with_loader, "loader_alone": alone
        }  # fmt: skip
        return verdict(WithLoader("eager", "turbo", speeds, [with_loader / 100], noise, 1.0, {}, {}))

    assert of(98.0, 300.0).startswith("compute-bound") and "3.00 times" in of(98.0, 300.0)
    # What the augmentation costs is no fault of the loader, and what is noise is nobody's.
    assert of(90.0, 300.0, augmented=92.0).startswith("compute-bound") and "takes 8 %" in of(90.0, 300.0, 92.0)
    assert of(90.0, 300.0, noise=0.12).startswith("compute-bound")
    assert of(60.0, 61.0).startswith("loader-bound")
    assert of(60.0, 61.0, noise=0.21).startswith("none: two halves of the steps differ by 21 %; measure again")
    assert "0.0061 images/s alone against 0.01 of" in of(0.006, 0.0061, augmented=0.01)
    assert of(90.0, 300.0).startswith("feed-bound")


def test_a_variant_that_cannot_be_run_does_not_cost_the_others(tmp_path, monkeypatch):
    recipe = tiny("burn_stage2.yaml", tmp_path)
    monkeypatch.setattr(step_bench, "variants", eager_variants)
    honest, kept = step_bench._warm_up, []

    def warm_up(variant, *rest):
        if variant.name == "eager":
            raise RuntimeError("no compiler\nand more")
        return honest(variant, *rest)

    monkeypatch.setattr(step_bench, "_warm_up", warm_up)
    result = measure(
        recipe, "step", steps=1, rounds=2, warm_up=1, checks=False, keep=lambda r: kept.append(len(r.variants))
    )
    assert result.failed == {"eager": "no compiler"} and set(result.variants) == {"reference"}
    assert "eager could not be run: no compiler" in table(result) and kept == [1, 1, 1]
    monkeypatch.setattr(step_bench, "_warm_up", honest)
    result = measure(recipe, "step", steps=1, rounds=1, warm_up=1, checks=False, only=["nothing"])
    assert set(result.variants) == {"reference"}


def test_quantiles():
    assert quantiles([float(x) for x in range(1, 12)]) == {"median": 6.0, "p10": 2.0, "p90": 10.0}


def test_resident_batches_take_turns(tmp_path):
    recipe = tiny("burn_stage2.yaml", tmp_path)
    batches = Resident(recipe, CPU)
    taken = [next(batches).views[0] for _ in range(5)]
    assert taken[0] is taken[4] and not torch.equal(taken[0], taken[1])
    assert next(Resident(recipe, CPU, dtype=torch.bfloat16)).views[0].dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------------ cost


def burn():
    from pathlib import Path

    from engine import recipe as recipes

    recipe = recipes.load(Path(ROOT / "recipes/burn_stage2.yaml"))
    return recipe, methods.on_meta(recipe.method)


def test_cost_of_burns_step():
    # step.md 1.1: 19.3 + 38.6 + 16.3 GFLOP without the heads' 0.17.
    # step.md 1.2: 957 + 372 MB in a clean 16-bit eager stream, some 10 % more than here, where an operator counts each
    # of its tensors once.
    recipe, method = burn()
    assert cost.training_flops(method, [224, 224]) == pytest.approx(74.3e9, rel=0.002)
    config = recipe.method.model_copy(update={"teacher_bn": "eval"})
    folding = methods.on_meta(config).train()
    assert cost.training_flops(folding, [224, 224]) == cost.training_flops(method, [224, 224])
    traffic = cost.eager_traffic(method, [224, 224])
    assert sum(traffic) == pytest.approx(1329e6, rel=0.15)
    wide = cost.eager_traffic(method, [224, 224], torch.float32)
    assert wide.convolutions == 2 * traffic.convolutions
    speeds = cost.predictions(cost.training_flops(method, [224, 224]), traffic)
    assert 2400 < speeds["H200"] < 3500 and speeds["H200"] > speeds["H100"] > speeds["A100"]


def test_cost_follows_views_and_training():
    module = methods.load("swav")
    config = {"name": "swav", "backbone": {"arch": "reactnet", "width": 4}}
    method = methods.on_meta(module.Config.model_validate(config))
    small, large = (cost.count(method.backbone, size).macs for size in (32, 64))
    assert cost.training_flops(method, [64, 64, 32, 32, 32]) == 6 * (2 * large + 3 * small)
    (part,) = cost.parts(method, [64, 64, 32])
    assert part.sizes == [64, 64, 32] and part.is_trained
