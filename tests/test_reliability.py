"""Kills, signals and broken disks, in processes of their own. Numbers are those of the project's reliability list."""

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from engine import checkpoint, train
from engine.errors import CheckpointError, RankError, RecipeError, Stopped, Untrained
from loaders import DataError, files
from tests.processes import PATIENCE, rank_environment, start_process, train_main
from tests.runs import assert_same_run, last_state, rows, run
from tests.tiny import ROOT, tiny

QUICK = "quick/burn_stage2.yaml"
SHORT = ["run.duration=16it", "run.save_every=1it", "run.log_every=3it", "evals.0.every=7it", "data.batch_size=8"]


def fit(folder, overrides=(), resume=True):
    train.run(tiny(QUICK, folder, *SHORT, *overrides), resume=resume)


def slowed(folder, overrides=(), seconds=0.05):
    """`fit` with steps that last, so that a signal falls inside one."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    from engine.train import Trainer

    step = Trainer.step

    def slow(self, batches):
        time.sleep(seconds)
        return step(self, batches)

    Trainer.step = slow
    try:
        fit(folder, overrides)
    except Stopped:
        raise SystemExit(Stopped.exit_code) from None


def checkpoints_of(recipe):
    folder = recipe.folder / "checkpoints"
    return len(list(folder.glob("step-*"))) if folder.exists() else 0


def wait_for_checkpoints(recipe, count, processes):
    """Wait until a run has so many checkpoints, or its processes have ended."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if checkpoints_of(recipe) >= count or not any(process.is_alive() for process in processes):
            return
        time.sleep(0.005)
    raise AssertionError("the run does not save")


def kill_resume_compare(tmp_path, runs, kills, overrides=(), ranks=1):
    """Runs that are killed -9 at random moments, one rank or all of them, and resumed each time end like one that was
    never killed."""
    whole = tiny(QUICK, tmp_path / "whole", *SHORT, *overrides)
    environments = rank_environment(ranks) if ranks > 1 else [{}]
    start(whole, overrides, environments, at_once=True)
    rng = random.Random(0)
    killed = 0
    for number in range(runs):
        again = tiny(QUICK, tmp_path / f"run{number}", *SHORT, *overrides)
        for _ in range(kills):
            seen = checkpoints_of(again)
            processes = start(again, overrides, rank_environment(ranks) if ranks > 1 else [{}])
            wait_for_checkpoints(again, seen + 1, processes)
            time.sleep(rng.uniform(0, 0.05))
            victims = processes if rng.random() < 0.5 else [rng.choice(processes)]
            killed += any(process.is_alive() for process in victims)
            for process in victims:
                process.kill()
            for process in processes:
                process.join(PATIENCE)  # the others must not hang
            assert not any(process.is_alive() for process in processes)
        start(again, overrides, rank_environment(ranks) if ranks > 1 else [{}], at_once=True)
        assert_same_run(whole, again)
        shutil.rmtree(again.folder)
    assert killed >= 0.8 * runs * kills  # the others had ended by then


def start(recipe, overrides, environments, *, at_once=False):
    """Processes that run a recipe; with `at_once` they end here, and well."""
    processes = [start_process(fit, recipe.folder.parent, overrides, **env) for env in environments]
    if at_once:
        for process in processes:
            process.join(PATIENCE)
        assert [process.exitcode for process in processes] == [0] * len(processes)
    return processes


@pytest.mark.slow
def test_kill_at_random_times(tmp_path):
    # reliability 1: after 50 kills bit-identical
    kill_resume_compare(tmp_path, 5, 10, ["run.duration=40it"])


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["folder", "dali"])
def test_kill_while_images_are_decoded(tmp_path, tree, backend):
    if backend == "dali":
        pytest.importorskip("nvidia.dali", reason="nvidia-dali is not installed")
    files = [f"data.backend={backend}", "data.options={}", f"data.train={tree}", f"data.val={tree}", "data.workers=2"]
    kill_resume_compare(tmp_path, 1, 3, files)


def a_worker_dies(folder, tree):
    import multiprocessing

    from engine.train import Trainer

    step = Trainer.step

    def murder(self, batches):
        if self.steps_done == 2:
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        return step(self, batches)

    Trainer.step = murder
    fit(folder, ["data.backend=folder", "data.options={}", f"data.train={tree}", f"data.val={tree}", "data.workers=2"])


def test_a_killed_worker_ends_the_run_and_leaves_no_process(tmp_path, tree):
    # reliability 34
    process = start_process(a_worker_dies, tmp_path, tree)
    process.join(PATIENCE)
    assert process.exitcode == 1


@pytest.mark.slow
def test_kill_one_or_both_of_two_ranks(tmp_path):
    # reliability 2: after 20 kills of one rank or both bit-identical
    kill_resume_compare(tmp_path, 2, 10, ["data.micro_batch=4", "run.duration=40it"], ranks=2)


@pytest.mark.parametrize("number", train.SIGNALS, ids=lambda n: n.name)
def test_signal_saves_and_leaves_with_its_code(tmp_path, number):
    # reliability 8
    whole = tiny(QUICK, tmp_path / "whole", *SHORT)
    run(whole)
    again = tiny(QUICK, tmp_path / "stopped", *SHORT)
    process = start_process(slowed, tmp_path / "stopped", ["run.save_every=100it"])
    wait_for_rows(again, 1)
    os.kill(process.pid, number)
    process.join(PATIENCE)
    assert process.exitcode == Stopped.exit_code
    step = last_state(again)["step"]
    assert 0 < step < 16
    fit(tmp_path / "stopped", ["run.save_every=100it"])
    assert_same_run(whole, again)


def wait_for_rows(recipe, count):
    path = recipe.folder / "metrics.jsonl"
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if path.exists() and len(path.read_text().splitlines()) >= count:
            return
        time.sleep(0.01)
    raise AssertionError("the run does not start")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_signal_to_one_rank_stops_all_at_the_same_step(tmp_path, rank):
    # reliability 10
    overrides = ["data.micro_batch=4", "run.save_every=100it"]
    recipe = tiny(QUICK, tmp_path, *SHORT, *overrides)
    ranks = [start_process(slowed, tmp_path, overrides, **env) for env in rank_environment(2)]
    wait_for_rows(recipe, 1)
    os.kill(ranks[rank].pid, signal.SIGTERM)
    for process in ranks:
        process.join(PATIENCE)
    assert [process.exitcode for process in ranks] == [Stopped.exit_code] * 2
    assert 3 <= last_state(recipe)["step"] < 16
    for folder in (tmp_path, tmp_path / "whole"):
        ranks = [start_process(fit, folder, overrides, **env) for env in rank_environment(2)]
        for process in ranks:
            process.join(PATIENCE)
    assert_same_run(tiny(QUICK, tmp_path / "whole", *SHORT, *overrides), recipe)


@pytest.mark.slow
def test_torchrun_trains_stops_and_resumes(tmp_path):
    from tests.tiny import tiny_overrides

    more = [*SHORT, "data.micro_batch=4", "run.duration=90it", "run.save_every=1000it", "evals.0.every=25it"]
    path = ROOT / "recipes" / QUICK
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "tools/train.py"]
    command += [str(path), *tiny_overrides(path, tmp_path / "torchrun"), *more, "--resume"]
    recipe = tiny(QUICK, tmp_path / "torchrun", *more)
    launcher = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    wait_for_rows(recipe, 3)
    launcher.terminate()  # it passes the signal on to the ranks, and kills them after 30 s
    said = launcher.communicate(timeout=PATIENCE)[1]
    assert launcher.returncode != 0 and said.count("stopped by a signal after step") == 1
    stopped = last_state(recipe)["step"]
    assert 9 <= stopped < 90
    # USR1 would kill torchrun; tools/slurm.sh lets it ignore the signal, and sends it to the ranks.
    ignores = ["bash", "-c", 'trap "" USR1; exec "$@"', "bash", *command]
    launcher = subprocess.Popen(ignores, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    wait_for_rows(recipe, stopped // 3 + 3)
    launcher.send_signal(signal.SIGUSR1)
    for rank in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
        os.kill(int(rank), signal.SIGUSR1)
    assert "stopped by a signal after step" in launcher.communicate(timeout=PATIENCE)[1]
    assert stopped < last_state(recipe)["step"] < 90
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert "2 x cpu" in done.stdout and "resumed" in done.stdout and f"step {90}/90" in done.stdout
    ranks = [start_process(fit, tmp_path / "whole", more, **env) for env in rank_environment(2)]
    for process in ranks:
        process.join(PATIENCE)
    assert_same_run(tiny(QUICK, tmp_path / "whole", *more), recipe)


def only_rank_0_has_data(folder, tree):
    mine = tree if os.environ["RANK"] == "0" else folder / "nowhere"
    files = ["data.backend=folder", "data.options={}", f"data.train={mine}", f"data.val={mine}", "data.micro_batch=4"]
    os.environ["LOCAL_RANK"] = "0"  # each on a machine of its own
    try:
        fit(folder, files)
    except (RankError, DataError) as error:
        (folder.parent / f"error{os.environ['RANK']}").write_text(str(error))
        raise SystemExit(2) from None


def test_trouble_on_one_rank_stops_all_with_its_reason(tmp_path, tree):
    ranks = [start_process(only_rank_0_has_data, tmp_path / "runs", tree, **env) for env in rank_environment(2)]
    for process in ranks:
        process.join(PATIENCE)
    assert [process.exitcode for process in ranks] == [2, 2]
    assert (tmp_path / "error0").read_text().startswith("rank 1: ")
    assert all("nowhere: no such folder" in (tmp_path / f"error{rank}").read_text() for rank in (0, 1))


def resumes_apart(folder):
    """Rank 1 sees another run folder than rank 0, as on a disk of its own."""
    mine = folder if os.environ["RANK"] == "0" else folder / "elsewhere"
    try:
        fit(mine, ["data.micro_batch=4", "run.duration=18it"])
    except (RecipeError, RankError, CheckpointError) as error:
        print(error)
        raise SystemExit(2) from None


@pytest.mark.slow
def test_ranks_never_start_from_different_steps(tmp_path):
    ranks = [start_process(fit, tmp_path, ["data.micro_batch=4"], **env) for env in rank_environment(2)]
    for process in ranks:
        process.join(PATIENCE)
    assert last_state(tiny(QUICK, tmp_path, *SHORT))["step"] == 16
    ranks = [start_process(resumes_apart, tmp_path, **env) for env in rank_environment(2)]
    for process in ranks:
        process.join(PATIENCE)
    assert [process.exitcode for process in ranks] == [2, 2]


# ------------------------------------------------------------------------------------------------ checkpoints


def state_of(step):
    torch.manual_seed(step)
    parts = ("optimizer", "scaler", "meter", "monitors", "bad_images", "identity", "versions")
    facts = {"total_steps": 9, "seconds": 0.0, "recipe": "", "skipped": torch.zeros(())}
    return {**{part: {} for part in parts}, **facts, "method": {"w": torch.randn(1000)}}


def test_keeps_the_newest(tmp_path):
    for step in (1, 5, 10, 200):
        checkpoint.save(tmp_path, step, state_of(step), keep=2)
    assert sorted(path.name.split("-")[1] for path in tmp_path.iterdir()) == ["000000010", "000000200"]
    path, damaged = checkpoint.latest(tmp_path)
    assert path.name.startswith("step-000000200-") and not damaged


@pytest.mark.parametrize("damage", [0.0, 0.01, 0.5, 0.99, "flip"])
def test_damage_is_found_and_the_one_before_is_used(tmp_path, damage):
    # reliability 13
    for step in (1, 2):
        checkpoint.save(tmp_path, step, state_of(step), keep=2)
    newest, _ = checkpoint.latest(tmp_path)
    content = bytearray(newest.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    else:
        content = content[: int(len(content) * damage)]
    newest.write_bytes(content)
    found, damaged = checkpoint.latest(tmp_path)
    assert checkpoint.load(found)["step"] == 1 and damaged == [newest]


def test_resume_passes_over_a_damaged_checkpoint_and_ends_the_same(tmp_path, caplog):
    whole = tiny(QUICK, tmp_path / "whole", *SHORT)
    run(whole)
    again = tiny(QUICK, tmp_path / "again", *SHORT)
    shutil.copytree(whole.folder, again.folder)
    newest, _ = checkpoint.latest(again.folder / "checkpoints")
    newest.write_bytes(newest.read_bytes()[:-1])
    fit(tmp_path / "again")
    assert newest.name in caplog.text and "damaged" in caplog.text
    assert_same_run(whole, again)


STAGES = ["open", "write", "fsync", "rename", "sync folder", "delete old"]


def dies_while_saving(folder, stage):
    """Save step 2 and be killed at one stage of it."""

    def die(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.MonkeyPatch.context() as patch:
        if stage == "open":
            patch.setattr(checkpoint._HashingFile, "__init__", die)
        elif stage == "write":
            honest, written = checkpoint._HashingFile.write, []

            def write(self, data):
                written.append(1)
                if len(written) == 3:
                    die()
                return honest(self, data)

            patch.setattr(checkpoint._HashingFile, "write", write)
        elif stage == "fsync":
            patch.setattr(os, "fsync", die)
        elif stage == "rename":
            patch.setattr(os, "replace", die)
        elif stage == "sync folder":
            honest_sync = files.sync
            patch.setattr(files, "sync", lambda path: die() if path == folder else honest_sync(path))
        else:
            honest_unlink = Path.unlink
            patch.setattr(Path, "unlink", lambda path, **k: die() if path.suffix == ".pt" else honest_unlink(path, **k))
        checkpoint.save(folder, 2, state_of(2), keep=1)


@pytest.mark.parametrize("stage", STAGES)
def test_kill_at_every_stage_of_a_save(tmp_path, stage):
    # reliability 12: the newest complete checkpoint loads, and the next save clears what was left
    checkpoint.save(tmp_path, 1, state_of(1), keep=1)
    process = start_process(dies_while_saving, tmp_path, stage)
    process.join(PATIENCE)
    assert process.exitcode == -signal.SIGKILL
    path, damaged = checkpoint.latest(tmp_path)
    renamed = stage in ("sync folder", "delete old")
    assert checkpoint.load(path)["step"] == (2 if renamed else 1) and not damaged
    checkpoint.save(tmp_path, 3, state_of(3), keep=1)
    assert [p.name[:14] for p in tmp_path.iterdir()] == ["step-000000003"]


def second_signal_while_saving(folder):
    """A second SIGTERM arrives while the first one's checkpoint is being written."""
    honest = files.sync

    def sync(path):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        honest(path)

    files.sync = sync
    slowed(folder, ["run.save_every=100it"])


def test_second_signal_during_the_save_loses_nothing(tmp_path):
    # reliability 9
    recipe = tiny(QUICK, tmp_path, *SHORT)
    process = start_process(second_signal_while_saving, tmp_path)
    wait_for_rows(recipe, 1)
    os.kill(process.pid, signal.SIGTERM)
    process.join(PATIENCE)
    assert process.exitcode == Stopped.exit_code
    assert last_state(recipe)["step"] < 16


def fill_the_disk(folder):
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with pytest.raises(CheckpointError, match="step 2 cannot be saved"):
        checkpoint.save(folder, 2, state_of(2), keep=1)


def test_full_disk_keeps_the_last_checkpoint(tmp_path):
    # reliability 11
    checkpoint.save(tmp_path, 1, state_of(1), keep=1)
    process = start_process(fill_the_disk, tmp_path)
    process.join(PATIENCE)
    assert process.exitcode == 0
    assert [path.name[:14] for path in tmp_path.iterdir()] == ["step-000000001"]
    assert checkpoint.load(checkpoint.latest(tmp_path)[0])["step"] == 1


def test_not_finite_state_never_replaces_a_good_one(tmp_path):
    # reliability 14
    checkpoint.save(tmp_path, 1, state_of(1), keep=1)
    state = state_of(2)
    state["method"]["w"][3] = float("inf")
    with pytest.raises(CheckpointError, match="step 2 is not saved, not finite: w; the last good checkpoint stays"):
        checkpoint.save(tmp_path, 2, state, keep=1)
    assert [path.name[:14] for path in tmp_path.iterdir()] == ["step-000000001"]


def test_checkpoint_that_would_run_code_is_refused(tmp_path):
    # reliability 23
    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'canary'}",)

    path = tmp_path / "step-000000001-0000000000000000.pt"
    torch.save({"format": checkpoint.FORMAT, "x": Payload()}, path)
    with pytest.raises(CheckpointError, match="could run code"):
        checkpoint.load(path)
    assert not (tmp_path / "canary").exists()
    torch.save({"format": 99}, path)
    with pytest.raises(CheckpointError, match=f"format {checkpoint.FORMAT}, found 99"):
        checkpoint.load(path)


def test_metrics_of_a_killed_run_stay_readable(tmp_path):
    # reliability 41: a half-written last line, rows past the checkpoint
    recipe = tiny(QUICK, tmp_path, *SHORT)
    run(recipe)
    whole = rows(recipe)
    for path in (recipe.folder / "checkpoints").iterdir():
        if int(path.name.split("-")[1]) > 9:
            path.unlink()
    with open(recipe.folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 17, "lo')
    fit(tmp_path)
    assert rows(recipe) == whole


# ------------------------------------------------------------------------------------------------ the command


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["recipes/nowhere.yaml"], 2, "recipes/nowhere.yaml: no such file"),
        (["recipes/burn_stage2.yaml", "method.temprature=1"], 2, "did you mean 'temperature'"),
        (["recipes/burn_stage2.yaml"], 2, "data.train: no folder or file data/imagenet/train"),
        (["recipes/burn_stage2.yaml", "--dry-run"], 0, ""),
        (["recipes/quick/linear.yaml", "init.0.from=nowhere", "data.backend=synthetic"], 2, "init.0.from: nowhere"),
    ],
)
def test_exit_codes_of_bad_input_and_nothing_written(tmp_path, monkeypatch, capfd, arguments, code, text):
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        train_main(*arguments)
    said = capfd.readouterr().err
    assert left.value.code == code and text in said and "Traceback" not in said
    assert len(said.splitlines()) == (1 if code == 2 else 0)
    assert [path.name for path in tmp_path.iterdir()] == ["recipes"]


def untrained(folder):
    from models.methods import burn

    honest = burn.burn_loss
    burn.burn_loss = lambda *a: {**honest(*a), "loss": honest(*a)["loss"].detach().requires_grad_()}
    from tests.tiny import tiny_overrides

    train_main(f"{ROOT}/recipes/{QUICK}", *tiny_overrides(ROOT / "recipes" / QUICK, folder))


def test_exit_code_of_the_guard(tmp_path):
    process = start_process(untrained, tmp_path)
    process.join(PATIENCE)
    assert process.exitcode == Untrained.exit_code
