"""Tables of methods: what they refuse, plan and choose, and ones that run, fail in one row, stop and continue."""

import itertools
import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from engine import train
from engine.errors import CheckpointError, RecipeError, Stopped
from engine.results import scores, table
from engine.results.chain import Run, evaluated_part, forwards, network_at
from engine.results.scores import Difference, Entry, Outcome, t_quantile, t_share
from engine.results.table import Plan
from tests.processes import PATIENCE, start_process, tool
from tests.runs import run as run_recipe
from tests.tiny import ROOT, TABLES, tiny

FASHION = ROOT / "recipes/tables/fashion.yaml"
SYNTHETIC = [
    "data.backend=synthetic",
    "data.options={num_images: 40, num_val_images: 16, num_classes: 4, side: 36}",
    "data.batch_size=8",
    "data.micro_batch=8",
]


@pytest.mark.parametrize("path", TABLES, ids=lambda p: p.name)
def test_tables_plan_every_row(path, tmp_path):
    spec = table.load(path)
    plan = Plan(spec, path, tmp_path)
    for variant in plan.variants:
        runs = list(plan.chain(variant, 1).make())
        stages, answers = ([run.recipe() for run in runs if bool(run.tasks) == asks] for asks in (False, True))
        done = {name for run in runs if run.cell is None for name in run.tasks}
        if variant.row.pixels:
            assert not stages and done == {task.name for task in spec.tasks if task.measure}
            assert all(evaluation.pixels for recipe in answers for evaluation in recipe.evals)
            continue
        assert done == {task.name for task in spec.tasks if not task.seeds or task.seeds > 1}
        views = sum(int(r.run.duration[:-2]) * r.data.batch_size * forwards(r) for r in stages)
        if not variant.row.random:  # an equal budget, up to half a batch for each stage
            wrong = abs(views - spec.views * variant.row.budget)
            assert wrong <= sum(r.data.batch_size * forwards(r) for r in stages) / 2
        assert len({r.folder for r in (*stages, *answers)}) == len(runs)
        assert all(r.seed == 1 for r, run in zip((*stages, *answers), runs, strict=True) if run.cell is None)
        for before, after in itertools.pairwise(stages):
            assert str(before.folder) in [init.source for init in after.init]
        part = evaluated_part(stages[-1])
        for recipe in answers:
            (init,) = recipe.init
            assert init.source in (str(stages[-1].folder), str(stages[-1].folder).replace("seed1", "seed0"))
            assert set(init.load.values()) == {part}
        default = [init.source for r in stages for init in r.init if init.source.startswith("runs/")]
        assert default == [], "a stage reads the default folder of another run"


def test_the_teacher_is_shared(tmp_path):
    plan = Plan(table.load(FASHION), FASHION, tmp_path)
    chains = {chain.key: chain for chain in plan.chains(["BURN", "SwAV"])}
    teacher, *answers = chains["teacher MoCo v2", 0].make()
    assert chains["BURN", 0].needs == (("teacher MoCo v2", 0), ("BURN", "tries")) and answers
    assert chains["SwAV", 0].needs == (("SwAV", "tries"),)
    for key in (("BURN", 1), ("BURN", "tries")):
        stages = [run.recipe() for run in chains[key].make() if not run.tasks]
        assert all(str(teacher.recipe().folder) in [i.source for i in recipe.init] for recipe in stages)
    assert [run.tasks for run in answers] == [("ridge", "k-NN", "k-NN, centered")]


def test_an_image_costs_the_views_that_the_evaluated_network_runs():
    views = {"burn_stage1": 2, "byol": 2, "moco": 1, "s2bnn_step1": 1, "supervised": 1, "swav": 4}
    for name, expected in views.items():
        assert forwards(tiny(f"quick/{name}.yaml", "nowhere")) == expected, name


def test_a_rate_is_tried_on_images_that_no_try_trains_on(tmp_path):
    plan = Plan(table.load(FASHION), FASHION, tmp_path)
    variant = next(v for v in plan.variants if v.label == "S2-BNN, twice the views")
    runs = list(plan.tries_chain(variant).make())
    assert [run.cell for run in runs] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for number, rate in enumerate((0.01, 0.03, 0.1)):
        *stages, judge = [run.recipe() for run in runs[3 * number : 3 * number + 3]]
        assert sum(int(r.run.duration[:-2]) * r.data.batch_size for r in stages) == pytest.approx(37500, abs=64)
        assert all(r.schedules["lr"].start == rate and r.data.hold_out == 0.1 and r.seed == 0 for r in stages)
        assert judge.data.hold_out == 0.1 and [e.split for e in judge.evals] == ["held_out"]
        assert judge.init[0].source == str(stages[-1].folder)


KNN = {"name": "k-NN", "measure": {"kind": "knn"}}


def write(path, **changes):
    content = {
        "title": "t",
        "views": 32,
        "seeds": 1,
        "probe": str(ROOT / "recipes/quick/linear.yaml"),
        "tasks": [{"name": "linear"}, KNN],
        "rows": [{"name": "A", "stages": [str(ROOT / "recipes/quick/supervised.yaml")]}],
    }
    path.write_text(json.dumps({key: item for key, item in {**content, **changes}.items() if item is not None}))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"imags": 3}, "imags: unknown key, did you mean 'images'"),
        ({"images": 3}, "expected either views or images"),
        ({"views": None}, "expected either views or images"),
        ({"seeds": 0}, "seeds: expected"),
        ({"probe": "nowhere.yaml"}, "probe: no recipe"),
        ({"rows": []}, "rows: "),
        ({"rows": [{"name": "A", "stages": ["a.yaml"]}]}, r"rows\.0\.stages\.0: no recipe"),
        ({"rows": [{"name": "A b", "stages": ["a"]}, {"name": "a-b", "stages": ["a"]}]}, "two rows are named"),
        ({"rows": [{"name": "teacher", "stages": ["a"]}]}, "a row needs a name with letters a-z or digits"),
        ({"rows": [{"name": "ü", "stages": ["a"]}]}, "other than teacher, stage1, measured and tries; got 'ü'"),
        ({"tasks": [{"name": "Stage1"}]}, "a task needs a name .* got 'Stage1'"),
        ({"rows": [{"name": "A"}]}, "expected one of stages, from and pixels"),
        ({"rows": [{"name": "A", "pixels": True, "from": "x"}]}, "expected one of stages, from and pixels"),
        ({"rows": [{"name": "A", "stages": {"T": ["a"]}}]}, "row A: stages: 'T', expected one of"),
        ({"pairs": [["A", "B"]]}, "pairs: 'B', expected one of 'A'"),
        (
            {"expect": [{"row": "A", "over": "A", "by": 1, "task": "x"}]},
            "expect: 'x', expected one of 'linear', 'k-NN'",
        ),
        ({"tasks": [{**KNN, "grid": {"a": [1]}}]}, "grid: expected without measure"),
        ({"grid": {"schedules.lr": [1, 2]}}, "tries: missing"),
        ({"grid": {"schedules.lr": [1, 2]}, "tries": 9, "judge": "linear"}, "judge: expected a task with measure"),
        ({"teachers": {"T": {}}}, "expected either recipe or network"),
        (
            {"rows": [{"name": n, "stages": ["a"], "grid": {"b": [0] * k}} for k, n in enumerate("AB", 1)]},
            "expected as many cells for every row that trains, got {'A': 1, 'B': 2}",
        ),
        ({"rows": [{"name": "A", "stages": ["a.yaml"], "papr": 1.0}]}, "did you mean 'paper'"),
    ],
)
def test_bad_tables_are_refused_in_one_line(changes, message, tmp_path):
    with pytest.raises(RecipeError, match=message) as caught:
        table.load(write(tmp_path / "t.yaml", **changes))
    assert "\n" not in str(caught.value) and "t.yaml" in str(caught.value)


def test_a_probe_that_evaluates_nothing_is_refused(tmp_path):
    path = write(tmp_path / "t.yaml", probe=str(ROOT / "recipes/quick/moco.yaml"))
    plan = Plan(table.load(path), path, tmp_path)
    with pytest.raises(RecipeError, match=r"t\.yaml: .*moco\.yaml: method moco is no evaluation of a trained network"):
        list(plan.chain(plan.variants[0], 0).make())


@pytest.mark.parametrize(("layer", "trains"), [("pooled", "pre-fc"), ("features", "linear")])
def test_a_plan_says_which_layer_it_probes(layer, trains, tmp_path, monkeypatch, capsys):
    rows = [{"name": "A", "stages": [str(ROOT / "recipes/quick/burn_stage1.yaml")]}]
    path = write(tmp_path / "t.yaml", tasks=[{"name": "linear", "layer": layer}, {**KNN, "layer": layer}], rows=rows)
    monkeypatch.setattr(sys, "argv", ["compare.py", str(path), "--plan"])
    assert tool("compare").main() == 0
    first, second, *commands = capsys.readouterr().out.splitlines()
    assert first.startswith("# linear: linear.yaml") and ("pre-fc" in first) == (layer == "pooled")
    assert second.startswith("# k-NN: 20 nearest neighbors")
    assert len(commands) == 3 and all(f'"trains":"{trains}"' in command for command in commands[1:])


def test_old_names_of_keys_load_in_a_table(tmp_path):
    measure = {"kind": "knn", "every": "100%", "neighbours": 7}
    path = write(tmp_path / "t.yaml", tasks=[{"name": "k-NN", "measure": measure}])
    assert table.load(path).tasks[0].measure.neighbors == 7


def test_fine_tuning_leaves_the_layer_on_top_behind(tmp_path):
    tasks = [KNN, {"name": "semi", "recipe": str(ROOT / "recipes/quick/supervised.yaml")}]
    rows = [{"name": "A", "stages": [str(ROOT / "recipes/quick/burn_stage1.yaml")]}]
    path = write(tmp_path / "t.yaml", tasks=tasks, rows=rows)
    plan = Plan(table.load(path), path, tmp_path)
    *_, semi = plan.chain(plan.variants[0], 0).make()
    recipe = semi.recipe()
    assert recipe.method.trains == "all" and not recipe.method.backbone.has_fc and recipe.init[0].drop == ("fc",)


def test_rows_run_under_each_teacher(tmp_path):
    quick = ROOT / "recipes/quick"
    (tmp_path / "other.yaml").write_text(f"base: {quick / 'burn_stage1.yaml'}\nname: other\ninit: []\n")
    path = write(
        tmp_path / "t.yaml",
        teachers={
            "T2": {"recipe": str(quick / "moco.yaml"), "overrides": ["run.duration=7it"]},
            "T1": {"network": {"arch": "resnet18"}, "from": "weights/x.pth"},
        },
        rows=[
            {"name": "BURN", "stages": {"T2": [str(quick / "burn_stage1.yaml")], "T1": ["other.yaml"]}},
            {"name": "S2", "stages": [str(quick / "s2bnn_step1.yaml")]},
            {"name": "BYOL", "stages": [str(quick / "byol.yaml")]},
        ],
        pairs=[["BURN", "S2"], ["BURN", "BYOL"]],
    )
    plan = Plan(table.load(path), path, tmp_path / "out")
    chains = {chain.key: chain for chain in plan.chains()}
    needs = {chain.name: [name for name, _ in chain.needs] for chain in chains.values()}
    assert needs == {
        **{"teacher T2": [], "teacher T1": [], "BURN, T1": [], "BYOL": []},
        **{"BURN, T2": ["teacher T2"], "S2, T2": ["teacher T2"]},
    }
    assert [chain.name for chain in plan.chains(["BURN, T1", "BYOL"])] == ["teacher T1", "BURN, T1", "BYOL"]
    trained, measured = (run.recipe() for run in chains["teacher T2", 0].make())
    assert trained.run.duration == "7it" and measured.init[0].source == str(trained.folder)
    (brought,) = (run.recipe() for run in chains["teacher T1", 0].make())
    assert brought.init[0].source == "weights/x.pth" and brought.method.backbone.arch == "resnet18"
    results = {key: Outcome({"k-NN": float(len(key[0]))}, 1, 1, 1.0, {}, []) for key in chains}
    names = [d.name for d in scores.differences(plan.entries(results), plan.spec.pairs, ["k-NN"])]
    assert names == ["BURN, T2 - S2, T2", "BURN, T2 - BYOL", "BURN, T1 - BYOL"]


def test_a_row_may_start_at_a_network_file(tmp_path):
    run_recipe(tiny("quick/burn_stage1.yaml", tmp_path / "runs", "run.duration=1it", "evals=[]"))
    folder = tmp_path / "runs/quick_burn_stage1"
    network = network_at(folder, None)
    assert network.part == "student" and network.config.width == 2 and network_at(folder, "teacher").part == "teacher"
    with pytest.raises(CheckpointError, match="has no network 'x', expected one of student, teacher"):
        network_at(folder, "x")
    with pytest.raises(CheckpointError, match="no such file or run folder"):
        network_at(tmp_path / "nowhere.pth", None)
    path = write(tmp_path / "t.yaml", rows=[{"name": "file", "from": str(folder)}], seeds=3)
    plan = Plan(table.load(path), path, tmp_path / "out")
    (chain,) = plan.chains()
    assert [run.recipe().init[0].load for run in chain.make()] == [{"backbone": "student"}] * 2


# ------------------------------------------------------------------------------------------------ statistics


def test_quantiles_of_students_t():
    golden = {1: 12.706204736432, 2: 4.302652729911, 3: 3.182446305284, 4: 2.776445105198, 5: 2.570581835636,
              9: 2.262157162741, 30: 2.042272456301, 1000: 1.962339080825}  # fmt: skip
    for freedom, expected in golden.items():
        assert t_quantile(freedom) == pytest.approx(expected, abs=1e-9)
    assert t_quantile(5, 0.99) == pytest.approx(4.032142983558, abs=1e-9) and t_share(0.0, 4) == 0


def test_a_difference_has_an_interval():
    one, three = Difference("a - b", "t", [2.0]), Difference("a - b", "t", [1.0, 2.0, 3.0])
    assert one.interval is None and str(one) == "+2.0 (one seed)"
    assert three.interval == pytest.approx((2 - 4.302652729911 / 3**0.5, 2 + 4.302652729911 / 3**0.5))
    assert str(three) == "+2.0 [-0.5, +4.5]"


def test_differences_are_of_equal_seeds():
    def entry(name, **by_seed):
        outcomes = {int(seed[1:]): Outcome({"t": value}, 1, 1, 1.0, {}, []) for seed, value in by_seed.items()}
        return Entry(name, name, None, None, False, outcomes)

    entries = [entry("a", s0=5.0, s2=9.0, s3=1.0), entry("b", s0=4.0, s1=0.0, s2=7.0)]
    (found,) = scores.differences(entries, [("a", "b")], ["t", "none"])
    assert found.values == [1.0, 2.0] and found.name == "a - b"


# ------------------------------------------------------------------------------------------------ whole tables


def run_cell(path, overrides):
    from engine import recipe as recipes

    train.run(recipes.load(path, overrides), resume=True)


@pytest.fixture
def quickly(monkeypatch):
    """compare.py whose runs are processes with torch loaded; the recipes that it has run, in order."""
    module, ran = tool("compare"), []

    def run_one(self, run, folder, title, number):
        process = start_process(run_cell, run.path, run.overrides)
        process.join()
        ran.append(run)
        if process.exitcode:
            raise module.ChainError(f"{title}: exit code {process.exitcode}")

    monkeypatch.setattr(module.Pool, "_run_one", run_one)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, arguments)])
        ran.clear()
        return module.main()

    return SimpleNamespace(call=call, ran=ran)


def test_a_table_chooses_rates_runs_tasks_and_runs_nothing_twice(tmp_path, quickly, monkeypatch, capsys):
    quick = str(tmp_path / "small.yaml")
    network = "{arch: reactnet, width: 2, multiples: [1, 2, 4, 4], stem_stride: 2}"
    base = ROOT / "recipes/quick/supervised.yaml"
    Path(quick).write_text(f"base: {base}\nmethod: {{backbone: {network}, num_classes: 4}}\n")
    monkeypatch.setattr(table, "RANDOM_STEPS", 2)
    few = ["method.num_classes=4", "run.device=cpu"]
    path = write(
        tmp_path / "t.yaml",
        views=48,
        tasks=[
            {"name": "ridge", "measure": {"kind": "ridge"}},
            {**KNN, "measure": {"kind": "knn", "center": True}},
            {"name": "semi", "recipe": quick, "overrides": ["run.duration=2it"], "seeds": 1,
             "grid": {"schedules.lr.start": [1e-4, 1e-2]}},
        ],
        grid={"schedules.lr.start": [1e-3, 3e-2]},
        tries=16,
        rows=[
            {"name": "pixels", "pixels": True},
            {"name": "random", "stages": [quick], "random": True, "seeds": 1},
            {"name": "trained", "stages": [quick], "seeds": 2},
        ],
        pairs=[["trained", "random"]],
        expect=[{"row": "trained", "over": "random", "by": 1000, "task": "ridge"}],
    )  # fmt: skip
    arguments = [path, *SYNTHETIC, *few, "--out", tmp_path / "out", "--jobs", 2]
    assert quickly.call(*arguments) == 1
    said = capsys.readouterr()
    assert "not as expected: trained - random, ridge: " in said.err and "expected at least 1000" in said.err
    assert "left" in said.out and len(quickly.ran) == 4 + 1 + (1 + 1 + 3) + (2 * 2 + 3)
    record = json.loads((tmp_path / "out/table.json").read_text())
    assert list(record["rows"]) == ["pixels", "random", "trained"] and record["not_as_expected"]
    trained = record["rows"]["trained"]
    tries = trained["choices"]["tries"]
    by_score = max(tries["cells"], key=lambda cell: cell["score"])  # the first of equals
    assert tries["chosen"] == by_score["cell"] and tries["judge"] == "ridge" and tries["on"] == "held_out"
    for seed in (0, 1):
        recipe = (tmp_path / f"out/trained/seed{seed}/stage1/recipe.yaml").read_text()
        assert f"start: {tries['chosen']['schedules.lr.start']}\n" in recipe and "hold_out: null" in recipe
    assert trained["seeds"]["0"]["scores"].keys() == {"ridge", "k-NN", "semi"}
    assert (
        trained["seeds"]["1"]["scores"].keys()
        == {"ridge", "k-NN"}
        == record["rows"]["pixels"]["seeds"]["0"]["scores"].keys()
    )
    assert trained["seeds"]["0"]["views"] == 48 and trained["choices"]["semi"]["on"] == "held_out"
    (pair,) = (pair for pair in record["pairs"] if pair["task"] == "ridge")
    assert len(pair["values"]) == 1 and pair["interval"] is None
    text = (tmp_path / "out/table.md").read_text()
    assert "2 cells a row, 16 views each" in text and "trained - random" in text and "(one seed)" in text
    assert (tmp_path / "out/table.png").stat().st_size > 10_000
    # Nothing runs twice; what is lost in the middle is all that runs again.
    assert quickly.call(*arguments) == 1 and quickly.ran == []
    for part in (tmp_path / "out/trained/seed1/measured/checkpoints").iterdir():
        part.unlink()
    assert quickly.call(*arguments) == 1 and [run.tasks for run in quickly.ran] == [("ridge", "k-NN")]
    assert json.loads((tmp_path / "out/table.json").read_text())["rows"] == record["rows"]


def test_a_table_counts_images_where_it_says_so(tmp_path, monkeypatch, capsys):
    rows = [{"name": "A", "stages": [str(ROOT / "recipes/quick/burn_stage1.yaml")]}]
    for key, steps in (("views", 8), ("images", 16)):
        path = write(tmp_path / "t.yaml", rows=rows, **{"views": None, key: 16 * 64})
        assert f"run.duration={steps}it" in plan_of(monkeypatch, capsys, path).splitlines()[2]
        other = {"views": "images", "images": "views"}[key]
        monkeypatch.setattr(sys, "argv", ["compare.py", str(path), f"--{other}", "5"])
        assert tool("compare").main() == 2 and f"--{other}: {path} counts {key}" in capsys.readouterr().err


def test_time_left_is_that_of_finished_runs_of_the_same_recipe(tmp_path):
    module = tool("compare")
    path = write(tmp_path / "t.yaml", seeds=3)
    plan = Plan(table.load(path), path, tmp_path)
    left, chains = module.Left(), plan.chains()
    for chain in chains:
        for run in chain.make():
            left.add(run)
    assert left.seconds({}, 1) == (0.0, False)
    stage, measured, linear = chains[0].make()
    left.done(stage, 10.0)
    assert left.seconds({}, 1) == (pytest.approx(20), False)
    left.done(measured, 3.0)
    left.done(linear, 4.0)
    assert left.seconds({}, 1) == (pytest.approx(2 * 17), True) and left.seconds({}, 2)[0] == pytest.approx(17)
    running = next(iter(chains[1].make())).recipe().folder
    assert left.seconds({running: 1.0}, 1)[0] == pytest.approx(17 + 8)


def test_seconds_of_an_epoch_are_not_those_of_an_image(tmp_path):
    module = tool("compare")
    path = write(tmp_path / "t.yaml", seeds=1)
    stage, *_ = Plan(table.load(path), path, tmp_path).chains()[0].make()
    teacher = stage._replace(overrides=[*stage.overrides, "run.duration=2ep", "name=teacher"])
    left = module.Left()
    left.add(stage)
    left.done(teacher, 600.0)
    assert left.seconds({}, 1) == (0.0, False)


def compare(*arguments, **options):
    command = [sys.executable, str(ROOT / "tools/compare.py"), *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, **options
    )


@pytest.mark.slow
def test_a_table_runs_fails_in_one_row_and_continues(tmp_path):
    quick = str(ROOT / "recipes/quick/supervised.yaml")
    few = ["method.num_classes=4", "run.log_every=1it"]
    rows = [
        {"name": "good", "stages": [quick, quick], "overrides": few, "paper": 64.1},
        {"name": "bad", "stages": [quick], "overrides": [*few, "schedules.lr=1e30"]},
    ]
    path = write(tmp_path / "t.yaml", rows=rows)
    probe = ["run.duration=4it"]
    arguments = [path, *SYNTHETIC, *probe, "method.num_classes=4", "--out", tmp_path / "out"]
    done = compare(*arguments, "--jobs", 2)
    text, _ = done.communicate(timeout=PATIENCE)
    assert done.returncode == 1 and "exit code 3" in text, text
    record = json.loads((tmp_path / "out/table.json").read_text())
    assert list(record["rows"]) == ["good"]
    result = record["rows"]["good"]["seeds"]["0"]
    assert result["images"] == result["views"] == 2 * 32 and result["scores"].keys() == {"linear", "k-NN"}
    assert result["monitors"]["binary/sign_flips"] >= 0 and len(result["recipes"]) == 4
    assert "method.trains=pre-fc" in (tmp_path / "out/table.md").read_text(), "which layer is probed"
    assert (tmp_path / "out/table.png").stat().st_size > 10_000 and "64.10" in (tmp_path / "out/table.md").read_text()
    # Again, without the bad row: nothing runs twice, the numbers are the same.
    refused = compare(*arguments, "schedules.lr.start=0.02", "--only", "good")
    text, _ = refused.communicate(timeout=PATIENCE)
    assert refused.returncode == 2 and "schedules.lr.start was" in text and "(1 of 4)" not in text, text
    again = compare(*arguments, "--only", "good")
    text, _ = again.communicate(timeout=PATIENCE)
    assert again.returncode == 0 and "(1 of 4)" not in text, text
    assert json.loads((tmp_path / "out/table.json").read_text())["rows"]["good"]["seeds"] == {"0": result}
    # A call for another row adds it; one that fails takes nothing away.
    more = [*rows, {"name": "more", "stages": [quick], "overrides": few}]
    other = compare(write(path, rows=more), *arguments[1:], "--only", "more", "bad")
    text, _ = other.communicate(timeout=PATIENCE)
    assert other.returncode == 1, text
    record = json.loads((tmp_path / "out/table.json").read_text())
    assert list(record["rows"]) == ["good", "more"] and record["rows"]["good"]["seeds"] == {"0": result}


@pytest.mark.slow
def test_a_stopped_table_is_saved_and_continues(tmp_path):
    few = ["method.num_classes=4", "run.log_every=1it", "run.save_every=1000it"]
    rows = [{"name": "long", "stages": [str(ROOT / "recipes/quick/supervised.yaml")], "overrides": few}]
    path = write(tmp_path / "t.yaml", rows=rows)
    arguments = [path, *SYNTHETIC, "method.num_classes=4", "--out", tmp_path / "out", "--views", 8 * 100_000]
    process = compare(*arguments)
    folder = tmp_path / "out/long/seed0/stage1"
    deadline = time.monotonic() + PATIENCE
    while not ((folder / "metrics.jsonl").exists() and (folder / "metrics.jsonl").read_text()):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 75 and "start this command again" in text, text
    (saved,) = {int(path.name.split("-")[1]) for path in (folder / "checkpoints").iterdir()}
    again = compare(*arguments)
    deadline = time.monotonic() + PATIENCE
    while int(json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["step"]) <= saved:
        assert time.monotonic() < deadline and again.poll() is None
        time.sleep(0.2)
    again.send_signal(signal.SIGTERM)
    again.communicate(timeout=PATIENCE)
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert again.returncode == 75 and steps == list(range(1, len(steps) + 1)), "a step twice, or none"


@pytest.mark.slow
def test_rows_do_not_run_behind_a_teacher_that_failed(tmp_path):
    quick = ROOT / "recipes/quick"
    net = "method.teacher={arch: reactnet, width: 2}"
    rows = [{"name": "student", "stages": [str(quick / "s2bnn_step1.yaml")], "overrides": [net]}]
    path = write(tmp_path / "t.yaml", rows=rows, teachers={"T": {"recipe": str(quick / "moco.yaml")}})
    extra = ["method.backbone={arch: reactnet, width: 2}", "schedules.lr=1e30", "run.duration=4it"]
    extra += ["data.options={num_images: 40, num_val_images: 16, num_classes: 10, side: 36}"]  # the probe's classes
    process = compare(path, *SYNTHETIC, *extra, "--out", tmp_path / "out")
    text, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1 and "teacher" in text and "student, seed 0: its teacher failed" in text, text
    assert not (tmp_path / "out/student/seed0/stage1/checkpoints").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0"], "--seeds"),
        (["--only", "BRUN"], "no row 'BRUN'"),
        (["--jobs", "2", "--launcher", "true"], "--jobs"),
        (["--launcher", "torchrun 'a"], '--launcher: "torchrun \'a" is no command line: No closing quotation'),
        (["name=x"], "override 'name=x': every run has its own; use --out or --seeds"),
        (["seed=3", "--plan"], "override 'seed=3': every run has its own"),
        (["--only", "BURN", "run.folder=x"], "override 'run.folder=x': every run has its own"),
        (["--launcher", "torchrn -n 8"], "--launcher: no program 'torchrn'"),
    ],
)
def test_bad_arguments_are_refused(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compare.py", str(FASHION), *arguments])
    assert tool("compare").main() == 2
    said = capsys.readouterr()
    assert message in said.err and said.err.count("\n") == 1 and not said.out


def plan_of(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, arguments), "--plan"])
    assert tool("compare").main() == 0
    return capsys.readouterr().out


def test_another_budget_is_another_folder(tmp_path, monkeypatch, capsys):
    path = write(tmp_path / "t.yaml")
    plain, same = plan_of(monkeypatch, capsys, path), plan_of(monkeypatch, capsys, path, "--views", 32)
    assert plain == same and "run.folder=runs/table_t/a/seed0" in plain
    assert "run.folder=runs/table_t_64/a/seed0" in plan_of(monkeypatch, capsys, path, "--views", 64)
    rows = [{"name": "A", "stages": [str(ROOT / "recipes/quick/supervised.yaml")], "seeds": 1}]
    more = plan_of(monkeypatch, capsys, write(path, rows=rows), "--seeds", 2)  # adds to the same table
    assert "run.folder=runs/table_t/a/seed1" in more


QUICK = ROOT / "recipes/quick"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        # An override that only the second stage refuses, and a part that would not fit what the first one will make.
        (
            {"stages": ["supervised.yaml", "s2bnn_step1.yaml"], "overrides": ["method.num_classes=4"]},
            "method.num_classes: unknown key",
        ),
        ({"stages": ["burn_stage1.yaml", "wider.yaml"]}, "part 'student' does not fit"),
        ({"stages": ["burn_stage1.yaml", "typo.yaml"]}, "has no part 'studnt'"),
    ],
)
def test_every_stage_is_checked_before_the_first_starts(row, message, tmp_path, monkeypatch, capsys):
    base, net = QUICK / "burn_stage2.yaml", "{arch: reactnet, width: 2}"
    teacher = f"method: {{teacher: {net}, student: {{width: 2, stem_stride: 2}}}}\ninit: []\n"
    (tmp_path / "burn_stage1.yaml").write_text(f"base: {QUICK / 'burn_stage1.yaml'}\nname: one\n{teacher}")
    for name, more, part in (("wider", "width: 4", "student"), ("typo", "width: 2", "studnt")):
        (tmp_path / f"{name}.yaml").write_text(
            f"base: {base}\nmethod: {{teacher: {net}, student: {{{more}, stem_stride: 2}}}}\n"
            f"init: [{{from: runs/one, load: {{student: {part}}}}}]\n"
        )
    stages = [str(tmp_path / s if (tmp_path / s).exists() else QUICK / s) for s in row["stages"]]
    path = write(tmp_path / "t.yaml", rows=[{**row, "name": "A", "stages": stages}])
    monkeypatch.setattr(sys, "argv", ["compare.py", str(path), *SYNTHETIC, "--out", str(tmp_path / "out")])
    assert tool("compare").main() == 2
    said = capsys.readouterr()
    assert message in said.err and said.err.count("\n") == 1 and not said.out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("evals=[]", "evals: expected one of kind accuracy"),
        ("evals=[{kind: knn}]", "evals: expected one of kind accuracy"),
    ],
)
def test_a_table_without_its_scores_is_refused_before_it_trains(change, message, tmp_path, monkeypatch, capsys):
    path = write(tmp_path / "t.yaml")
    arguments = [str(path), *SYNTHETIC, "method.num_classes=4", change, "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["compare.py", *arguments])
    assert tool("compare").main() == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_overrides_behind_only_are_overrides(tmp_path, monkeypatch, capsys):
    quick = str(ROOT / "recipes/quick/supervised.yaml")
    path = write(tmp_path / "t.yaml", rows=[{"name": name, "stages": [quick]} for name in ("A", "B c", "x=1")])
    found = plan_of(monkeypatch, capsys, path, "--only", "B c", "x=1", "data.workers=3", "run.amp=off")
    assert "/b_c/" in found and "/x_1/" in found and "/a/" not in found
    assert found.count("data.workers=3 run.amp=off") == 6
    monkeypatch.setattr(sys, "argv", ["compare.py", str(path), "--only", "run.amp=off"])
    assert tool("compare").main() == 2 and "--only: expected some of 'A'" in capsys.readouterr().err


def test_a_plan_is_for_a_shell(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "my $HOME 'tables'"
    folder.mkdir()
    path = folder / "t.yaml"
    write(path, rows=[{"name": "A", "stages": ["a b.yaml"]}])
    (folder / "a b.yaml").write_text(f"base: {ROOT / 'recipes/quick/supervised.yaml'}\nname: ab\n")
    for launcher in ("", "env 'A=a b'"):
        found = plan_of(monkeypatch, capsys, path, "--launcher", launcher, "data.options={prefetch: 3}").splitlines()[2]
        words = shlex.split(found)
        assert words[: words.index("tools/train.py")] == (shlex.split(launcher) or ["python"])
        assert str(folder / "a b.yaml") in words and "data.options={prefetch: 3}" in words


def test_matplotlib_is_missed_before_the_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    path = write(tmp_path / "t.yaml")
    monkeypatch.setattr(sys, "argv", ["compare.py", str(path), *SYNTHETIC, "--out", str(tmp_path / "out")])
    assert tool("compare").main() == 2
    assert "matplotlib, which draws figures, is missing" in capsys.readouterr().err and not (tmp_path / "out").exists()


HOLDS = """
import fcntl, pathlib, sys, time
lock = open(".lock", "w")
fcntl.lockf(lock, fcntl.LOCK_EX)
print(flush=True)
time.sleep(float(sys.argv[1]))
"""


def held(folder, seconds):
    """A process that holds a run folder for a while."""
    process = subprocess.Popen([sys.executable, "-c", HOLDS, str(seconds)], cwd=folder, stdout=subprocess.PIPE)
    process.stdout.readline()
    return process


def test_a_row_waits_for_the_run_of_a_call_that_was_killed(tmp_path, monkeypatch, capsys):
    compare = tool("compare")
    monkeypatch.setattr(compare, "HELD_SECONDS", 0.05)
    monkeypatch.setattr(compare, "TRAIN", "-c")
    pool = compare.Pool(None, [], [], 1)
    with held(tmp_path, 0.5) as orphan:
        pool._run_one(Run("pass", []), tmp_path, "row", 0)  # `python -c pass`
        assert orphan.wait() == 0
    assert capsys.readouterr().out == f"row: waits for another process that is running in {tmp_path}\n"
    with held(tmp_path, PATIENCE) as orphan:
        pool.stopping.set()
        with pytest.raises(Stopped):
            pool._run_one(Run("pass", []), tmp_path, "row", 0)
        assert orphan.poll() is None
        orphan.kill()
