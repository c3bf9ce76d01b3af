"""Tables of methods: what they refuse, what they plan, and one that runs, fails in one row, stops and continues."""

import itertools
import json
import shlex
import signal
import subprocess
import sys
import time

import pytest

from engine.errors import RecipeError, Stopped
from engine.results import table
from engine.results.chain import Run, evaluated_part
from engine.schedules import Horizon
from tests.processes import PATIENCE, tool
from tests.tiny import ROOT, TABLES

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
    for row in spec.rows:
        chain = table.chain(spec, row, 1, path, tmp_path, [])
        *stages, probe = [run.recipe() for run in chain.runs]
        steps = [Horizon.of(r.run.duration, 60_000, r.data.batch_size) for r in stages]
        images = sum(h.total_steps * h.batch_size for h in steps)
        if not row.overrides:  # an equal budget, up to half a batch for each stage
            assert abs(images - spec.images) <= sum(r.data.batch_size for r in stages) / 2
        part = dict(stages[-1].method)[evaluated_part(stages[-1])]
        assert probe.method.trains == ("pre-fc" if part.pooled_mlp else "linear")  # one layer for all
        assert {r.seed for r in (*stages, probe)} == {1} and probe.init[0].source == str(stages[-1].folder)
        assert len({r.folder for r in (*stages, probe)}) == len(chain.runs)
        for before, after in itertools.pairwise(stages):
            assert str(before.folder) in [init.source for init in after.init]
        default = [init.source for r in stages for init in r.init if init.source.startswith("runs/")]
        assert default == [], "a stage reads the default folder of another run"


def test_the_teacher_is_shared(tmp_path):
    spec = table.load(FASHION)
    burn = next(row for row in spec.rows if row.name == "BURN")
    swav = next(row for row in spec.rows if row.name == "SwAV")
    chain = table.chain(spec, burn, 0, FASHION, tmp_path, [])
    teacher = table.teacher_chain(spec, FASHION, tmp_path, [])
    assert chain.needs_teacher and not table.chain(spec, swav, 0, FASHION, tmp_path, []).needs_teacher
    folder = str(teacher.runs[0].recipe().folder)
    assert all(folder in [i.source for i in run.recipe().init] for run in chain.runs[:-1])


def write(path, **changes):
    content = {
        "title": "t",
        "images": 32,
        "seeds": 1,
        "probe": str(ROOT / "recipes/quick/linear.yaml"),
        "rows": [{"name": "A", "stages": [str(ROOT / "recipes/quick/supervised.yaml")]}],
    }
    path.write_text(json.dumps({**content, **changes}))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"imags": 3}, "imags: unknown key, did you mean 'images'"),
        ({"seeds": 0}, "seeds: expected"),
        ({"probe": "nowhere.yaml"}, "probe: no recipe"),
        ({"rows": []}, "rows: "),
        ({"rows": [{"name": "A", "stages": ["a.yaml"]}]}, r"rows\.0\.stages\.0: no recipe"),
        ({"rows": [{"name": "A b", "stages": ["a"]}, {"name": "a-b", "stages": ["a"]}]}, "two rows are named"),
        ({"rows": [{"name": "teacher", "stages": ["a"]}]}, "a row needs a name with letters a-z or digits"),
        ({"rows": [{"name": "ü", "stages": ["a"]}]}, "other than teacher; got 'ü'"),
        ({"rows": [{"name": "A", "stages": ["a.yaml"], "papr": 1.0}]}, "did you mean 'paper'"),
    ],
)
def test_bad_tables_are_refused_in_one_line(changes, message, tmp_path):
    with pytest.raises(RecipeError, match=message) as caught:
        table.load(write(tmp_path / "t.yaml", **changes))
    assert "\n" not in str(caught.value) and "t.yaml" in str(caught.value)


def test_a_probe_that_evaluates_nothing_is_refused(tmp_path):
    path = write(tmp_path / "t.yaml", probe=str(ROOT / "recipes/quick/moco.yaml"))
    loaded = table.load(path)
    with pytest.raises(RecipeError, match=r"t\.yaml: probe: .*moco\.yaml: method moco is not a linear evaluation"):
        table.chain(loaded, loaded.rows[0], 0, path, tmp_path, [])


@pytest.mark.parametrize(("layer", "trains"), [("pooled", "pre-fc"), ("features", "linear")])
def test_a_plan_says_which_layer_it_probes(layer, trains, tmp_path, monkeypatch, capsys):
    rows = [{"name": "A", "stages": [str(ROOT / "recipes/quick/burn_stage1.yaml")]}]
    path = write(tmp_path / "t.yaml", layer=layer, rows=rows)
    monkeypatch.setattr(sys, "argv", ["compare.py", str(path), "--plan"])
    assert tool("compare").main() == 0
    first, *commands = capsys.readouterr().out.splitlines()
    assert first.startswith("# Linear evaluation is of") and ("pre-fc" in first) == (layer == "pooled")
    assert len(commands) == 2 and f'"trains":"{trains}"' in commands[1]


def test_old_names_of_keys_load_in_a_table(tmp_path):
    path = write(tmp_path / "t.yaml", knn={"kind": "knn", "every": "100%", "neighbours": 7})
    assert table.load(path).knn.neighbors == 7


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
    pixels = "raw pixels (logistic regression)"
    assert list(record["rows"]) == ["good", pixels]
    (result,) = record["rows"]["good"]["runs"]
    assert result["images"] == 2 * 32 and 0 <= result["linear"] <= 100 and len(result["recipes"]) == 3
    assert result["monitors"]["binary/sign_flips"] >= 0
    assert result["baselines"].keys() == {"pixels_top1", "pixels_knn", "random_top1", "logistic_top1"}
    text = (tmp_path / "out/table.md").read_text()
    assert f"| {result['baselines']['pixels_top1']:.1f}" in text and "raw pixels (logistic regression)" in text
    assert "linear top-1 % (pooled)" in text and "method.trains=pre-fc" in text, "which layer is probed"
    assert (tmp_path / "out/table.png").stat().st_size > 10_000 and "64.10" in (tmp_path / "out/table.md").read_text()
    # Again, without the bad row: nothing runs twice, the numbers are the same.
    refused = compare(*arguments, "schedules.lr.start=0.02", "--only", "good")
    text, _ = refused.communicate(timeout=PATIENCE)
    assert refused.returncode == 2 and "schedules.lr.start was" in text and "(1 of 3)" not in text, text
    again = compare(*arguments, "--only", "good")
    text, _ = again.communicate(timeout=PATIENCE)
    assert again.returncode == 0 and "(1 of 3)" not in text, text
    assert json.loads((tmp_path / "out/table.json").read_text())["rows"]["good"]["runs"] == [result]
    # A call for another row adds it; one that fails takes nothing away.
    more = [*rows, {"name": "more", "stages": [quick], "overrides": few}]
    other = compare(write(path, rows=more), *arguments[1:], "--only", "more", "bad")
    text, _ = other.communicate(timeout=PATIENCE)
    assert other.returncode == 1, text
    record = json.loads((tmp_path / "out/table.json").read_text())
    assert list(record["rows"]) == ["good", "more", pixels] and record["rows"]["good"]["runs"] == [result]


@pytest.mark.slow
def test_a_stopped_table_is_saved_and_continues(tmp_path):
    few = ["method.num_classes=4", "run.log_every=1it", "run.save_every=1000it"]
    rows = [{"name": "long", "stages": [str(ROOT / "recipes/quick/supervised.yaml")], "overrides": few}]
    path = write(tmp_path / "t.yaml", rows=rows)
    arguments = [path, *SYNTHETIC, "method.num_classes=4", "--out", tmp_path / "out", "--images", 8 * 100_000]
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
    path = write(tmp_path / "t.yaml", rows=rows, teacher=str(quick / "moco.yaml"))
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
    plain, same = plan_of(monkeypatch, capsys, path), plan_of(monkeypatch, capsys, path, "--images", 32)
    assert plain == same and "run.folder=runs/table_t/a/seed0" in plain
    assert "run.folder=runs/table_t_64/a/seed0" in plan_of(monkeypatch, capsys, path, "--images", 64)
    more = plan_of(monkeypatch, capsys, path, "--seeds", 2)  # adds to the same table
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
        ("evals=[]", "evals: expected one of kind knn"),
        ("evals=[{kind: baselines}]", "evals: expected one of kind knn"),
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
    assert found.count("data.workers=3 run.amp=off --resume") == 4
    monkeypatch.setattr(sys, "argv", ["compare.py", str(path), "--only", "run.amp=off"])
    assert tool("compare").main() == 2 and "--only: expected some of 'A'" in capsys.readouterr().err


def test_a_plan_is_for_a_shell(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "my $HOME 'tables'"
    folder.mkdir()
    path = folder / "t.yaml"
    write(path, rows=[{"name": "A", "stages": ["a b.yaml"]}])
    (folder / "a b.yaml").write_text(f"base: {ROOT / 'recipes/quick/supervised.yaml'}\nname: ab\n")
    for launcher in ("", "env 'A=a b'"):
        found = plan_of(monkeypatch, capsys, path, "--launcher", launcher, "data.options={prefetch: 3}").splitlines()[1]
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
    pool = compare.Pool([], tmp_path, [], 1)
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
