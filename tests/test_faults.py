"""What goes wrong around the steps: evaluations, disks, streams, signals, launchers. A run loses nothing by it."""

import contextlib
import errno
import json
import os
import resource
import signal
import socket
import sys

import numpy as np
import pytest
import torch

from engine import accelerator, consensus, dist, evals, faults, train
from engine.errors import MachineError, RecipeError, Stopped, reports
from engine.log import RunLog, _line, logger, rate, to_console
from engine.results.chain import Run
from engine.schedules import Horizon
from engine.train import Trainer
from loaders import DataError, LoaderError
from tests.images import write_tree
from tests.processes import PATIENCE, run_ranks, start_process, train_main
from tests.runs import assert_same_run, last_state, rows, run, trainer_of
from tests.tiny import ROOT, tiny, tiny_overrides

SUPERVISED = "quick/supervised.yaml"
BOTH = "evals=[{kind: accuracy, every: 3it}, {kind: knn, every: 3it}]"
UNSAVED = ["run.duration=6it", "run.save_every=100it", BOTH]


# ------------------------------------------------------------------------------------------------ evaluations


def dies_in(monkeypatch, kind, number):
    """The process ends in evaluation `number` of a kind, from 1."""
    honest, calls = evals.run, []

    def dies(config, *arguments):
        calls.append(config.kind)
        if config.kind == kind and calls.count(kind) == number:
            raise KeyboardInterrupt
        return honest(config, *arguments)

    monkeypatch.setattr(evals, "run", dies)
    return calls


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    recipe = tiny(SUPERVISED, tmp_path_factory.mktemp("whole"), *UNSAVED)
    run(recipe)
    return recipe


@pytest.mark.parametrize(("kind", "number"), [("accuracy", 1), ("knn", 1), ("knn", 2)])
def test_what_ends_in_an_evaluation_has_lost_no_step_and_no_row_comes_twice(kind, number, whole, tmp_path, monkeypatch):
    recipe = tiny(SUPERVISED, tmp_path / "runs", *UNSAVED)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        dies_in(patch, kind, number)
        run(recipe)
    state = last_state(recipe)
    assert state["step"] == 3 * number and state["due_evals"] == [0, 1]
    chained = Run(
        ROOT / "recipes" / SUPERVISED, [*tiny_overrides(ROOT / "recipes" / SUPERVISED, tmp_path / "runs"), *UNSAVED]
    )
    assert not chained.is_done()
    calls = dies_in(monkeypatch, kind, 0)
    run(recipe, resume=True)
    assert calls == ["accuracy", "knn", "accuracy", "knn"][2 * number - (2 if kind == "accuracy" else 1) :]
    if number == 1:
        assert_same_run(whole, recipe)
    assert chained.is_done()
    calls.clear()
    run(recipe, resume=True)
    assert not calls and rows(recipe) == rows(whole)


def test_a_run_that_is_killed_after_its_last_row_is_done_by_its_resume(tmp_path, monkeypatch):
    recipe = tiny(SUPERVISED, tmp_path, *UNSAVED)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        save = Trainer._save

        def dies(self, step, *, must):
            if must:  # the last one
                raise KeyboardInterrupt
            save(self, step, must=must)

        patch.setattr(Trainer, "_save", dies)
        run(recipe)
    written = rows(recipe)
    monkeypatch.setattr(evals, "run", lambda *_: pytest.fail("it has its row"))
    assert last_state(recipe)["due_evals"] == [0, 1]
    assert run(recipe, resume=True)["due_evals"] == [] and rows(recipe) == written


TROUBLE = {
    "loader": (LoaderError("data.backend=dali: DALI fails"), "data.backend=dali: DALI fails"),
    "data": (DataError("a.jpg: gone"), "a.jpg: gone"),
    "zero": (ZeroDivisionError("float division by zero"), "ZeroDivisionError: float division by zero"),
    "shapes": (RuntimeError("shapes do not match\nat"), "RuntimeError: shapes do not match"),
    "files": (OSError(24, "Too many open files"), r"OSError: \[Errno 24\] Too many open files"),
    "bug": (KeyError("x"), "KeyError: 'x'"),
}


def fails(error):
    """Batches of an evaluation that meet an error."""

    def batches(*_):
        raise error
        yield

    return batches


@pytest.mark.parametrize("what", TROUBLE)
@pytest.mark.parametrize("kind", ["accuracy", "knn", "baselines"])
def test_an_evaluation_that_fails_has_no_number_and_one_line(what, kind, tmp_path, monkeypatch):
    error, said = TROUBLE[what]
    recipe = tiny(SUPERVISED, tmp_path, f"evals=[{{kind: {kind}}}]")
    trainer = trainer_of(recipe)
    monkeypatch.setattr(evals, "_batches", fails(error))
    with pytest.raises(evals.NotMeasured, match=f"^{said}$"):
        evals.run(recipe.evals[0], trainer.method, recipe, trainer.indices, trainer.world)
    assert trainer.method.training


def test_training_goes_on_without_an_evaluation_that_fails(tmp_path, monkeypatch, caplog):
    recipe = tiny(SUPERVISED, tmp_path, *UNSAVED)
    honest, asked = evals._accuracy, []

    def fails_once(*arguments):
        asked.append(1)
        if len(asked) == 1:
            raise evals.NotMeasured("no validation image can be decoded")
        return honest(*arguments)

    monkeypatch.setattr(evals, "_accuracy", fails_once)
    state = run(recipe)
    assert state["step"] == 6 and state["due_evals"] == []
    measured = [(row["step"], row["evaluation"]) for row in rows(recipe) if "evaluation" in row]
    assert measured == [(3, "knn"), (6, "accuracy"), (6, "knn")]
    lines = [record.getMessage() for record in caplog.records if "training continues" in record.getMessage()]
    assert lines == ["step 3: no accuracy: no validation image can be decoded; training continues"]


@pytest.mark.parametrize("which", ["train", "val"])
def test_images_none_of_which_can_be_decoded(which, tmp_path):
    broken = write_tree(tmp_path / "broken")
    intact = write_tree(tmp_path / "intact")
    places = {"train": intact, "val": intact, which: broken}
    files = ["data.backend=folder", "data.options={}", "data.workers=0", "method.num_classes=3", f"data.train={intact}"]
    own = f"train: {places['train']}, val: {places['val']}"
    recipe = tiny(
        SUPERVISED,
        tmp_path,
        *files,
        f"data.val={intact}",
        f"evals=[{{kind: knn, {own}}}, {{kind: accuracy, val: {broken}}}]",
    )
    trainer = trainer_of(recipe)
    for path in broken.rglob("*.*"):
        path.write_bytes(path.read_bytes()[:400])
    from engine.data import sets_of

    for number in (0, 1) if which == "val" else (0,):
        with pytest.raises(evals.NotMeasured, match="can be decoded"):
            sets = sets_of(recipe, number, trainer.indices)
            evals.run(recipe.evals[number], trainer.method, recipe, sets, trainer.world)


def test_a_bank_that_is_smaller_than_its_neighbors():
    bank, label = torch.eye(3), torch.tensor([0, 1, 2])
    assert evals.knn(bank, label, bank, 3, 20, 0.07).tolist() == [0, 1, 2]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError()])
def test_memory_that_runs_out_in_an_evaluation_ends_the_run(error, tmp_path, monkeypatch):
    recipe = tiny(SUPERVISED, tmp_path, *UNSAVED)
    monkeypatch.setattr(evals, "_batches", fails(error))
    with pytest.raises(MachineError, match="out of memory"):
        run(recipe)
    assert last_state(recipe)["step"] == 3


def fails_on_one_of_two(folder):
    recipe = tiny(SUPERVISED, folder, "data.micro_batch=4", "evals=[{kind: accuracy}, {kind: knn}, {kind: baselines}]")
    world = dist.start("cpu", 60)
    trainer = Trainer(recipe, world)
    honest, heard = evals._batches, []
    for rank, (error, _) in enumerate(TROUBLE.values()):
        for config in recipe.evals:
            evals._batches = fails(error) if world.rank == rank % 2 else honest
            try:
                evals.run(config, trainer.method, recipe, trainer.indices, world)
            except evals.NotMeasured as caught:
                heard.append(str(caught))
    (folder / f"heard{world.rank}").write_text(json.dumps(heard))
    dist.stop()


def test_all_ranks_learn_that_an_evaluation_fails_on_one(tmp_path):
    assert run_ranks(2, fails_on_one_of_two, tmp_path) == [0, 0]
    one, two = (json.loads((tmp_path / f"heard{rank}").read_text()) for rank in (0, 1))
    assert one == two and len(one) == 3 * len(TROUBLE)
    assert all(text.startswith(f"rank {number // 3 % 2}: ") for number, text in enumerate(one))


@pytest.mark.parametrize("temperature", [0.001, 0.003, 0.01, 0.0113, 0.03, 0.07])
def test_knn_votes_as_in_float64(temperature):
    rng = np.random.default_rng(0)
    center = rng.normal(size=(4, 16))
    label, truth = rng.integers(0, 4, 300), rng.integers(0, 4, 200)
    bank, query = center[label] + 2 * rng.normal(size=(300, 16)), center[truth] + 2 * rng.normal(size=(200, 16))
    got = evals.knn(*(torch.tensor(a) for a in (bank, label, query)), 4, 20, temperature)
    unit = [a / np.linalg.norm(a, axis=1, keepdims=True) for a in (bank, query)]
    cosine = unit[1] @ unit[0].T
    for i, row in enumerate(cosine):
        nearest = np.argsort(-row)[:20]
        votes = np.bincount(label[nearest], np.exp(row[nearest] / temperature - row.max() / temperature), 4)
        assert got[i] == votes.argmax()


# ------------------------------------------------------------------------------------------------ what is logged


def curve(recipe, tag):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(recipe.folder / "tensorboard"))
    board.Reload()
    return [point.step for point in board.Scalars(tag)]


def ends_in_step(monkeypatch, number):
    honest = Trainer.step

    def step(self, batches):
        if self.steps_done + 1 == number:
            raise KeyboardInterrupt
        return honest(self, batches)

    monkeypatch.setattr(Trainer, "step", step)


def test_curves_have_no_points_of_before(tmp_path, monkeypatch):
    recipe = tiny(SUPERVISED, tmp_path, "evals=[]", "run.duration=5it", "run.save_every=3it")
    for number, options in ((3, {}), (5, {"resume": True})):  # before the first checkpoint, and after it
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            ends_in_step(patch, number)
            run(recipe, **options)
        assert curve(recipe, "train/loss") == list(range(1, number))
    run(recipe, resume=True)
    assert curve(recipe, "train/loss") == [row["step"] for row in rows(recipe)] == [1, 2, 3, 4, 5]


def logs_over_a_full_disk(folder):
    folder.mkdir()
    horizon, said = Horizon(9, 9, 1), []
    logger.warning = said.append
    rows = open(folder / "metrics.jsonl", "ab", buffering=0)
    log = RunLog(folder, rows, horizon, 0)
    to_console(is_main=False)

    def flush():
        with contextlib.suppress(OSError):
            if log._board:
                log._board.flush()

    for step in range(1, 7):
        log.row(step, {"loss": 1.0 * step})
        flush()
        if step == 2:  # room for some bytes of a row, or of a point, more
            sizes = [path.stat().st_size for path in (folder / "metrics.jsonl", *(folder / "tensorboard").iterdir())]
            resource.setrlimit(resource.RLIMIT_FSIZE, (min(sizes) + 7, resource.RLIM_INFINITY))
        if step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    log.close()
    (folder / "said.json").write_text(json.dumps(said))


def test_rows_and_points_come_again_after_a_full_disk(tmp_path):
    process = start_process(logs_over_a_full_disk, tmp_path / "runs")
    process.join(PATIENCE)
    assert process.exitcode == 0
    written = [json.loads(line) for line in (tmp_path / "runs/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in written] == [1, 2, 5, 6]
    from types import SimpleNamespace

    steps = curve(SimpleNamespace(folder=tmp_path / "runs"), "train/loss")
    assert steps[:2] == [1, 2] and steps[-1] == 6
    said = json.loads((tmp_path / "runs/said.json").read_text())
    assert said and all("cannot be written: File too large; training continues" in text for text in said)


def without_streams(folder, how):
    path = ROOT / "recipes" / SUPERVISED
    if how == "closed":
        for number, name in enumerate(("stdin", "stdout", "stderr")):
            os.close(number)
            setattr(sys, name, None)
    else:
        if how == "broken":
            end, write = os.pipe()
            os.close(end)
        else:
            write = os.open("/dev/full", os.O_WRONLY)
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(write, number)
            setattr(sys, name, open(number, "w", closefd=False))
    train_main(str(path), *tiny_overrides(path, folder), "evals=[]", "run.duration=2it", "run.log_every=1it")


@pytest.mark.parametrize("how", ["closed", "broken", "full"])
def test_a_run_needs_no_standard_streams(how, tmp_path):
    process = start_process(without_streams, tmp_path, how)
    process.join(PATIENCE)
    recipe = tiny(SUPERVISED, tmp_path, "evals=[]", "run.duration=2it")
    assert last_state(recipe)["step"] == 2
    assert process.exitcode == 0 or how == "full"  # multiprocessing flushes what no disk takes
    assert [row["step"] for row in rows(recipe)] == [1, 2]


@pytest.mark.parametrize("error", [BrokenPipeError, OSError, ValueError, None])
def test_a_process_ends_though_nobody_reads_what_it_says(error, monkeypatch):
    class Stream:
        def flush(self):
            raise error

    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, Stream() if error else None)
    left = []
    monkeypatch.setattr(consensus.os, "_exit", left.append)
    consensus.exit_now(6)
    assert left == [6]


def test_a_slow_rate_has_digits():
    assert [rate(speed) for speed in (0.0123, 0.5, 4.987, 45.67, 123.4, 12345.6)] == [
        "0.0123", "0.5", "4.99", "45.7", "123", "12,346",
    ]  # fmt: skip
    assert "0.0123 img/s" in _line(1, Horizon(9, 9, 1), {"images_per_second": 0.0123}, None)


# ------------------------------------------------------------------------------------------------ signals


@pytest.mark.parametrize("number", train.SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("place", ["open_indices", "optim.build", "Trainer"])
def test_a_signal_outside_the_steps_ends_a_run_at_once_in_a_line(number, place, tmp_path, monkeypatch):
    under_nohup = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    before = [signal.getsignal(each) for each in train.SIGNALS]

    def interrupted(*_, **__):
        os.kill(os.getpid(), number)
        pytest.fail("the signal was not heard")

    monkeypatch.setattr(f"engine.train.{place}", interrupted)
    recipe = tiny(SUPERVISED, tmp_path)
    with pytest.raises(Stopped, match="^stopped by a signal outside the steps; start again with --resume$") as caught:
        run(recipe)
    assert caught.value.exit_code == 75 and reports(caught.value, 5, 5) and not recipe.folder.exists()
    assert [signal.getsignal(each) for each in train.SIGNALS] == before
    signal.signal(signal.SIGHUP, under_nohup)


def test_a_signal_while_a_finished_run_closes_changes_nothing(tmp_path, monkeypatch):
    from engine.folder import RunFolder

    honest = RunFolder.close
    monkeypatch.setattr(RunFolder, "close", lambda self: (os.kill(os.getpid(), signal.SIGTERM), honest(self)))
    assert run(tiny(SUPERVISED, tmp_path, "evals=[]", "run.duration=1it"))["step"] == 1


def test_a_hang_up_that_is_ignored_stays_so(tmp_path, monkeypatch):
    honest = Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda self, b: (os.kill(os.getpid(), signal.SIGHUP), honest(self, b))[1])
    recipe = tiny(SUPERVISED, tmp_path, "evals=[]", "run.duration=2it")
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert run(recipe)["step"] == 2
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_interrupt_in_a_step_leaves_at_once(tmp_path, monkeypatch):
    def step(self, batches):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("it was not heard")

    monkeypatch.setattr(Trainer, "step", step)
    recipe = tiny(SUPERVISED, tmp_path, "evals=[]", "run.duration=2it")
    with pytest.raises(KeyboardInterrupt):
        run(recipe)
    train.RunFolder(recipe).close()  # nothing holds it


# ------------------------------------------------------------------------------------------------ the launcher

FULL = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.fixture
def launched(monkeypatch):
    """Sets what a launcher sets, and nothing else."""

    def launch(**environment):
        for name in (*FULL, "LOCAL_WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

    return launch


@pytest.mark.parametrize("missing", FULL)
def test_a_part_of_torchruns_environment_is_refused_by_name(missing, launched):
    launched(**{name: value for name, value in FULL.items() if name != missing})
    with pytest.raises(RecipeError, match=f"{missing} is not set; start with torchrun") as caught:
        dist.start("cpu", 5)
    assert reports(caught.value, 1, 1) and "\n" not in str(caught.value)
    launched(**{missing: FULL[missing]})
    with pytest.raises(RecipeError) as caught:
        dist.start("cpu", 5)
    assert all(f"{name} is not set" in str(caught.value) for name in set(FULL) - {missing})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"RANK": "abc"}, "RANK=abc is no number"),
        ({"RANK": "-1"}, "RANK=-1 is no number"),
        ({"WORLD_SIZE": "1.5"}, "WORLD_SIZE=1.5 is no number"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT=http is no number"),
        ({"RANK": "1"}, "RANK=1 is not below WORLD_SIZE=1"),
        ({"WORLD_SIZE": "0"}, "RANK=0 is not below WORLD_SIZE=0"),
        ({"LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"}, "LOCAL_RANK=2 is not below LOCAL_WORLD_SIZE=2"),
        ({"RANK": ""}, "RANK is not set"),
    ],
)
def test_an_environment_that_makes_no_sense_is_refused(changes, said, launched):
    launched(**{**FULL, **changes})
    with pytest.raises(RecipeError, match=said):
        dist.start("cpu", 5)
    assert dist.environment_rank() in (0, 1)  # asked before: it fails for nothing


def test_without_a_launcher_or_under_sruns_alone_a_run_is_alone(launched, monkeypatch):
    launched()
    monkeypatch.setenv("SLURM_PROCID", "3")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert dist.start("cpu", 5)[:4] == (0, 1, 0, 1)


def test_ranks_that_do_not_meet_are_one_line(launched, monkeypatch):
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as taken:
        port = str(taken.getsockname()[1])
        launched(**{**FULL, "MASTER_PORT": port})
        with pytest.raises(
            MachineError, match=f"do not meet at 127.0.0.1:{port}: .*set a MASTER_PORT that is free"
        ) as caught:
            dist.start("cpu", 5)
    assert reports(caught.value, 3, 3) and "\n" not in str(caught.value)

    def never(*_, **__):
        raise torch.distributed.DistNetworkError("The client socket has timed out after 5000ms.\nException raised from")

    monkeypatch.setattr(dist.dist, "init_process_group", never)
    for address, remedy in (
        ("127.0.0.1", "start all ranks"),
        ("nowhere.invalid", "set a MASTER_ADDR that this machine"),
    ):
        launched(**{**FULL, "MASTER_ADDR": address})
        with pytest.raises(MachineError, match=remedy) as caught:
            dist.start("cpu", 5)
        assert caught.value.exit_code == 6 and "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------ the machine


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EMFILE, "Too many open files", "a.jpg"),
        OSError(errno.EIO, "Input/output error"),
        BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"),
        RuntimeError("can't start new thread"),
        RuntimeError("unable to open shared memory object: Too many open files (24)"),
    ],
    ids=str,
)
def test_what_the_machine_refuses_is_one_line_and_the_run_is_saved(error, tmp_path, monkeypatch):
    honest, calls, step = Trainer.step, [], 1

    def refused(self, batches):
        calls.append(1)
        if len(calls) > step:
            raise error
        return honest(self, batches)

    monkeypatch.setattr(Trainer, "step", refused)
    recipe = tiny(SUPERVISED, tmp_path, "evals=[]", "run.save_every=100it", "data.micro_batch=16")
    with pytest.raises(MachineError) as caught:
        run(recipe)
    assert str(error) in str(caught.value) and "start again with --resume" in str(caught.value)
    assert last_state(recipe)["step"] == step


@pytest.mark.parametrize("place", ["open_indices", "RunFolder", "loaders.open_train"])
def test_what_the_machine_refuses_before_the_steps_is_one_line(place, tmp_path, monkeypatch):
    def refused(*_, **__):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(f"engine.train.{place}", refused)
    with pytest.raises(MachineError, match="Cannot allocate memory; see to it and start again"):
        run(tiny(SUPERVISED, tmp_path, "evals=[]"))


def test_a_run_keeps_its_number_of_cpu_threads(tmp_path, monkeypatch, caplog):
    def on(cores, duration, **environment):
        caplog.clear()
        with monkeypatch.context() as patch:
            patch.delenv("OMP_NUM_THREADS", raising=False)
            patch.setattr(accelerator.machine, "cores", lambda: cores)
            for name, value in environment.items():
                patch.setenv(name, value)
            recipe = tiny(SUPERVISED, tmp_path, "evals=[]", f"run.duration={duration}it")
            state = run(recipe, resume=True, allow_changes=True)
        return state["threads"], [text for text in caplog.messages if "CPU threads" in text]

    threads = torch.get_num_threads()
    try:
        assert on(2, 1) == (2, [])
        assert on(4, 2) == (2, [])
        changed, said = on(1, 3)
        assert changed == 1 and said == [
            "resumed differently: the run had 2 CPU threads, and has 1 now, because this machine gives it 1 cores: "
            "numbers differ in rounding"
        ]
        changed, said = on(4, 4, OMP_NUM_THREADS="3")
        assert changed == 3 and "by OMP_NUM_THREADS: numbers differ in rounding; set OMP_NUM_THREADS=1" in said[0]
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("name", "text", "is_damaged"),
    [
        ("ab/cabc.main.so", "{}: cannot read file data", True),
        ("ab/cabc.main.so", "{}: file too short", True),
        (
            "ab/cabc.py",
            "backend='inductor' raised:\nRuntimeError: Failed to import {}\nSyntaxError: '(' was never closed",
            True,
        ),
        ("ab/cabc.main.cpp", "CppCompileError: C++ compile error\n\nCommand:\ng++ {}", False),
        ("ab/cabc.py", "AssertionError: wrong stride in {}:12", False),
    ],
)
@pytest.mark.parametrize("kind", [ImportError, RuntimeError])
def test_damaged_code_of_the_compiler_is_removed_for_the_next_start(
    kind, name, text, is_damaged, tmp_path, monkeypatch
):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    (tmp_path / "ab").mkdir()
    files = [tmp_path / name, (tmp_path / name).with_suffix(".lock"), tmp_path / "ab/cother.so"]
    for file in files:
        file.write_text("garbage")
    known = faults.fault(kind(text.format(files[0])), tiny(SUPERVISED, tmp_path), torch.device("cpu"))
    assert [file.exists() for file in files] == [not is_damaged, not is_damaged, True]
    assert not is_damaged or str(known) == (
        f"{files[0]}: damaged code in the compiler's cache, now removed; start again with --resume"
    )
