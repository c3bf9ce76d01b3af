"""How a run ends: on all ranks, with one reason, in time, and with what was trained so far saved."""

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta

import pytest
import torch

from engine import consensus, dist, train
from engine.consensus import Consensus
from engine.errors import Ended, MachineError, NotFinite, RankError, Stopped, own, report, reports, shared
from loaders import DataError, LoaderError
from tests.processes import PATIENCE, rank_environment, start_process, tool
from tests.runs import assert_same_run, differences, last_state, rows, run
from tests.tiny import ROOT, tiny, tiny_overrides

CPU = torch.device("cpu")
QUICK = "quick/burn_stage2.yaml"
# Two ranks and two micro-steps; nothing is saved before the end.
OVERRIDES = [
    "data.batch_size=16",
    "data.micro_batch=4",
    "run.save_every=100it",
    "run.duration=6it",
    "evals.0.every=4it",
]


@pytest.fixture(autouse=True)
def _no_deadline(monkeypatch):
    """The process of the tests is not to be ended; those of whole runs are others."""
    monkeypatch.setattr(Consensus, "_force", lambda self: None)


def two(**options):
    """The agreement of two ranks, in two threads of this process."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=60))
    other = torch.distributed.TCPStore("127.0.0.1", store.port, is_master=False, timeout=timedelta(seconds=60))
    return [Consensus(rank, 2, CPU, s, **options) for rank, s in enumerate((store, other))]


def at_once(*actions):
    """What each action returns, or the error that it raises."""
    results = [None] * len(actions)

    def do(number):
        try:
            results[number] = actions[number]()
        except Exception as error:
            results[number] = error

    threads = [threading.Thread(target=do, args=(number,)) for number in range(len(actions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    return results


@pytest.mark.parametrize("bad", [(0, 0), (1, 0), (0, 1), (1, 1)])
@pytest.mark.parametrize("stop", [(0, 0), (1, 0), (0, 1)])
def test_ranks_agree(bad, stop):
    ranks = two()
    for _ in range(3):  # one meeting does not see the flags of another
        found = at_once(*(lambda r=r: ranks[r].propose(torch.tensor(bool(bad[r])), bool(stop[r])) for r in (0, 1)))
        assert found == [(any(bad), any(stop))] * 2
        assert at_once(*(lambda r=r: ranks[r].propose(torch.tensor(False)) for r in (0, 1))) == [(False, False)] * 2
    for rank in ranks:
        rank.close(in_order=False)


def test_a_signal_is_heard_at_every_kind_of_meeting():
    ranks = two()
    ranks[1].asked_to_stop = True
    assert at_once(*(rank.stops for rank in ranks)) == [True, True]
    assert at_once(*(lambda r=r: r.propose(torch.tensor(False)) for r in ranks)) == [(False, True)] * 2
    assert [rank.agreed() for rank in ranks] == [(False, True)] * 2
    for rank in ranks:
        rank.close(in_order=False)


def test_the_first_to_end_decides_and_alone_reports():
    ranks = two()
    errors = [DataError("a.jpg: broken"), MachineError("out of memory")]
    raised = at_once(*(lambda r=r: ranks[r].end(errors[r], saves=True) for r in (0, 1)))
    (winner,) = (number for number in (0, 1) if raised[number] is errors[number])
    loser = raised[1 - winner]
    assert isinstance(loser, Ended) and loser.exit_code == errors[winner].exit_code
    assert reports(raised[winner], 5, 5) and not reports(loser, 0, 0)
    assert at_once(*(rank.claims for rank in ranks)) == [True, False]  # rank 0 is whole, so it is the one
    with pytest.raises(Ended):
        ranks[1 - winner].meet()
    for rank in ranks:
        rank.close(in_order=False)


@pytest.mark.parametrize(("saves", "whole", "wanted"), [(True, [1], [1]), (True, [0, 1], [0]), (False, [0, 1], [])])
def test_the_first_rank_that_is_whole_saves(saves, whole, wanted):
    ranks = two()
    at_once(*(lambda r=r: ranks[r].end(DataError("a.jpg: broken"), saves=saves) for r in (0, 1)))
    claims = at_once(*(ranks[number].claims for number in whole))
    assert [number for number, claimed in zip(whole, claims, strict=True) if claimed] == wanted
    for rank in ranks:
        rank.close(in_order=False)


def test_a_rank_that_waits_hears_of_the_end_and_one_that_is_alone_decides_alone():
    ranks = two()
    waiting = threading.Thread(target=lambda: heard.append(at_once(ranks[0].meet)[0]))
    heard = []
    waiting.start()
    ranks[1].end(DataError("a.jpg: broken"), saves=True)
    waiting.join(PATIENCE)
    assert isinstance(heard[0], Ended) and heard[0].exit_code == 2 and ranks[0].claims()
    for rank in ranks:
        rank.close(in_order=False)
    alone, error = Consensus(0, 1, CPU), DataError("b.jpg: broken")
    assert alone.end(error, saves=True) is error and alone.claims()


def test_where_one_rank_has_gone_on_all_do():
    ranks = two()
    ranks[0]._store.add("meeting/1", 1)  # rank 0 came, went on, and met trouble behind the meeting
    arrived, add = [], ranks[1]._store.add

    def add_late(key, value):
        count = add(key, value)
        if key == "meeting/1" and not arrived:
            arrived.append(1)
            ranks[1].ending = consensus.Ending(0, 6, "trouble", True, True)
            return count - 1  # as if rank 1 had asked a moment earlier
        return count

    ranks[1]._store = type("Store", (), {"add": staticmethod(add_late)})()
    ranks[1].meet()
    with pytest.raises(Ended):
        ranks[1].meet()
    for rank in ranks:
        rank.close(in_order=False)


def test_a_rank_that_never_answers_is_named():
    ranks = two(patience=0.2)
    with pytest.raises(MachineError, match=r"rank 0: rank 1 did not answer for 0 s"):
        ranks[0].meet()
    for rank in ranks:
        rank.close(in_order=False)


def test_a_rank_that_gives_no_sign_of_life_is_given_up(monkeypatch):
    # Killed between two collectives, with nobody to send a signal.
    monkeypatch.setattr(consensus, "SILENT", 1.5)
    ranks = two()
    ranks[1].close(in_order=False)  # its thread ends, as with its process
    with pytest.raises(MachineError, match="rank 1 is gone: no sign of life"):
        ranks[0].meet()
    ranks[0].close(in_order=False)


def test_a_slow_rank_is_waited_for(monkeypatch):
    monkeypatch.setattr(consensus, "SILENT", 1.5)
    ranks = two()
    results = at_once(ranks[0].meet, lambda: time.sleep(5) or ranks[1].meet())
    assert results == [None, None]
    for rank in ranks:
        rank.close(in_order=False)


def test_a_device_that_never_answers_does_not_hold_the_host(monkeypatch):
    # NCCL: the step before waits for a rank that is gone.
    monkeypatch.setattr(consensus, "UNANSWERED", 0.2)
    ranks = two(patience=0.5)
    ranks[0]._copied = type("Event", (), {"query": lambda self: False})()
    with pytest.raises(MachineError, match="the device did not answer"):
        ranks[0].agreed()
    ranks[0].asked_to_stop = True
    with pytest.raises(Stopped, match="the device did not answer"):
        ranks[0].agreed()
    ranks[1].end(DataError("a.jpg: broken"), saves=True)
    ranks[0].wait_for_ending()
    with pytest.raises(Ended):
        ranks[0].agreed()
    for rank in ranks:
        rank.close(in_order=False)


@pytest.mark.parametrize("is_done", [False, True])
def test_an_update_that_is_still_queued_is_not_saved(is_done, monkeypatch):
    # Freeing the device would make it of gradients that have not all arrived.
    ranks, freed = two(), []
    group = type("Group", (), {"abort": lambda self: freed.append(1)})()
    monkeypatch.setattr(torch.distributed.distributed_c10d, "_get_default_group", lambda: group)
    ranks[0].device = torch.device("cuda", 0)
    ranks[0]._updated = type("Event", (), {"query": lambda self: is_done})()
    ranks[1].end(DataError("a.jpg: broken"), saves=True)
    ranks[0].wait_for_ending()
    assert ranks[0].claims() is is_done and freed == [1]
    for rank in ranks:
        rank.close(in_order=False)


def test_an_end_is_said_once(capsys):
    error = DataError("a.jpg: broken")
    report(error), report(error)
    report(Stopped("stopped by a signal"))
    assert capsys.readouterr().err == "error: a.jpg: broken\nstopped by a signal\n"
    report(KeyError("a defect"))
    assert "KeyError: 'a defect'" in capsys.readouterr().err


def test_a_signal_does_not_wait_for_a_rank_that_is_gone(monkeypatch):
    monkeypatch.setattr(consensus, "UNANSWERED", 0.2)
    ranks = two()
    ranks[0].asked_to_stop = True
    with pytest.raises(Stopped, match="rank 1 did not answer"):
        ranks[0].meet()
    for rank in ranks:
        rank.close(in_order=False)


def test_who_reports():
    everywhere, here = shared(NotFinite("loss")), own(LoaderError("DALI"))
    assert not reports(shared(RankError(1, "no folder")), 8, 0)  # rank 0 has said it
    assert reports(everywhere, 0, 0) and not reports(everywhere, 8, 0)
    assert reports(here, 3, 3)
    assert reports(DataError("no folder"), 8, 0)  # once on each machine: its files are its own
    assert not reports(DataError("no folder"), 9, 1)


def test_all_have_left_in_time():
    # The deadline of a process, what it may take to leave the group, and the news of it.
    assert consensus.DEADLINE + dist.LEAVING < 15.1 and consensus.UNANSWERED + consensus.DEADLINE < 30


# ------------------------------------------------------------------------------------------------ whole runs


def main_of_rank(folder, trouble, overrides):
    """tools/train.py on one rank, with trouble, where `destroy_process_group` never returns."""
    rank = int(os.environ["RANK"])
    said = open(folder / f"said{rank}", "w", buffering=1)
    os.dup2(said.fileno(), 2)
    torch.distributed.destroy_process_group = lambda *_: time.sleep(10**6)
    if trouble:
        trouble(rank)
    path = ROOT / "recipes" / QUICK
    sys.argv = ["train.py", str(path), *tiny_overrides(path, folder / "runs"), *OVERRIDES, *overrides]
    dist.leave(tool("train").main)


def run_with(folder, trouble=None, overrides=(), ranks=2, by_agent=False):
    """Exit codes of the ranks, and what all of them said; `by_agent` holds the store here, as torchrun does."""
    folder.mkdir(exist_ok=True)
    environments, store = rank_environment(ranks), None
    if by_agent:
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=60))
        held = {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_PORT": str(store.port)}
        environments = [{**env, **held} for env in environments]
    processes = [start_process(main_of_rank, folder, trouble, overrides, **env) for env in environments]
    for process in processes:
        process.join(PATIENCE)
    said = "".join((folder / f"said{rank}").read_text() for rank in range(ranks))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes, said


def at_call(number, of_rank, act):
    """Do something after the forward pass number `number` of one rank, whose BatchNorm has then moved."""

    def trouble(rank):
        from models.methods import burn

        honest, calls = burn.Burn.forward, []

        def forward(self, *arguments):
            result = honest(self, *arguments)
            calls.append(1)
            if len(calls) == number and rank == of_rank:
                act()
            return result

        burn.Burn.forward = forward

    return trouble


def out_of_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nGPU 0 has ...")


class Trouble:
    """What can happen to one rank, as a class because it goes to another process."""

    def __init__(self, what, rank):
        self.what, self.rank = what, rank

    def __call__(self, rank):
        if self.what == "memory":
            at_call(6, self.rank, out_of_memory)(rank)  # the second micro-step of the third step
        elif self.what == "killed":
            at_call(6, self.rank, lambda: os.kill(os.getpid(), signal.SIGKILL))(rank)
        elif self.what == "decoder" and rank == self.rank:
            break_loader(5, LoaderError("data.backend=dali: DALI fails, and not for an image: no libnvjpeg"))
        elif self.what == "image" and rank == self.rank:
            break_loader(5, DataError("a/b.jpg: cannot be decoded"))
        elif self.what == "disk" and rank == self.rank:
            break_loader(5, OSError(errno.EIO, "Input/output error", "a/b.jpg"))
        elif self.what == "bug" and rank == self.rank:
            break_loader(5, KeyError("nobody thought of this"))


def break_loader(number, error):
    from loaders import Loader

    honest, calls = Loader.__next__, []

    def take(self):
        calls.append(1)
        if len(calls) == number:
            raise error
        return honest(self)

    Loader.__next__ = take


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of two ranks that had no trouble."""
    folder = tmp_path_factory.mktemp("whole")
    codes, said = run_with(folder)
    assert codes == [0, 0], said
    return tiny(QUICK, folder / "runs", *OVERRIDES)


LINES = {
    "memory": (6, r"^error: cpu: out of memory with data.micro_batch 4; [\d.]+ GiB are counted"),
    "decoder": (6, r"^error: data.backend=dali: DALI fails"),
    "image": (2, r"^error: a/b.jpg: cannot be decoded"),
    "disk": (6, r"^error: \[Errno 5\] Input/output error: 'a/b.jpg'; see to it and start again with --resume$"),
    "bug": (1, r"^KeyError: 'nobody thought of this'"),
    "killed": (6, r"^error: another rank is gone"),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "rank"),
    [("memory", 0), ("memory", 1), ("decoder", 0), ("image", 1), ("disk", 1), ("bug", 1), ("killed", 0), ("killed", 1)],
)
def test_trouble_on_one_rank_ends_all_and_loses_nothing(what, rank, tmp_path, whole):
    # reliability.md 18
    code, line = LINES[what]
    codes, said = run_with(tmp_path, Trouble(what, rank))
    wanted = [code, code]
    if what == "killed":
        wanted[rank] = -signal.SIGKILL
        line = "^error: (rank 0 is gone|another rank is gone)"  # rank 0 held the store
    assert codes == wanted, said
    recipe = tiny(QUICK, tmp_path / "runs", *OVERRIDES)
    assert len(re.findall(line, said, re.M)) == len(re.findall(r"^error: |^KeyError", said, re.M)) == 1, said
    if what == "killed":  # a part of the state died with it: the last checkpoint stays, and there was none
        assert not (recipe.folder / "checkpoints").exists()
        return
    assert last_state(recipe)["step"] == 2, said
    if what != "memory":
        return
    # In the middle of a step: nothing of it has stayed, the resumed run is that which had no trouble.
    codes, said = run_with(tmp_path, None, ["--resume"])
    assert codes == [0, 0], said
    one, two = last_state(recipe), last_state(whole)
    assert [place for key in ("method", "optimizer") for place in differences(one[key], two[key], key)] == []


@pytest.mark.slow
def test_all_end_where_a_rank_is_killed_under_torchrun(tmp_path):
    codes, said = run_with(tmp_path, Trouble("killed", 0), by_agent=True)
    assert codes == [-signal.SIGKILL, 6] and len(re.findall("^error: another rank is gone", said, re.M)) == 1, said


def test_trouble_on_a_single_rank_saves_too(tmp_path, monkeypatch):
    whole = tiny(QUICK, tmp_path / "whole", *OVERRIDES)
    run(whole)
    recipe = tiny(QUICK, tmp_path / "runs", *OVERRIDES)
    with monkeypatch.context() as patch:
        patch.setattr("loaders.Loader.__next__", train.loaders.Loader.__next__)
        break_loader(11, DataError("a/b.jpg: cannot be decoded"))  # the third micro-step of the third step
        with pytest.raises(DataError, match=r"^a/b.jpg: cannot be decoded$"):
            run(recipe)
    assert last_state(recipe)["step"] == 2
    run(recipe, resume=True)
    assert_same_run(whole, recipe)


def fails_at_the_start(rank):
    if rank == 1:
        from engine.train import Trainer

        def out_of_memory_here(self, *_):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nGPU 0 has ...")

        Trainer._start_from = out_of_memory_here


@pytest.mark.slow
def test_trouble_of_one_rank_before_the_first_step_ends_all(tmp_path):
    codes, said = run_with(tmp_path, fails_at_the_start)
    assert codes == [6, 6] and len(re.findall("^error: cpu: out of memory", said, re.M)) == 1, said
    assert "Traceback" not in said


class SignalAtTheStart:
    """A signal to some ranks while they index; the others wait for them in a collective."""

    def __init__(self, number, ranks):
        self.number, self.ranks = number, ranks

    def __call__(self, rank):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
        if rank in self.ranks:
            honest = train.open_indices

            def interrupted(*arguments):
                os.kill(os.getpid(), self.number)
                return honest(*arguments)

            train.open_indices = interrupted


@pytest.mark.slow
@pytest.mark.parametrize(("number", "ranks"), [(signal.SIGTERM, [0, 1]), (signal.SIGINT, [1]), (signal.SIGHUP, [0])])
def test_a_signal_before_the_steps_ends_all_ranks_with_one_line(number, ranks, tmp_path):
    codes, said = run_with(tmp_path, SignalAtTheStart(number, ranks))
    assert codes == [75, 75] and said.count("stopped by a signal") == 1 and "Traceback" not in said, said


class SaysThatItWaits:
    def __init__(self, path):
        self.path = path

    def __call__(self, rank):
        honest = torch.distributed.init_process_group

        def join(*arguments, **options):
            self.path.touch()
            honest(*arguments, **options)

        torch.distributed.init_process_group = join


def test_a_rank_that_waits_for_others_hears_a_signal(tmp_path):
    waits = SaysThatItWaits(tmp_path / "waits")
    overrides = [f"run.timeout_seconds={4 * PATIENCE}"]
    process = start_process(main_of_rank, tmp_path, waits, overrides, **rank_environment(2)[0])
    while not waits.path.exists() and process.is_alive():
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGTERM)
    process.join(PATIENCE)
    assert process.exitcode == 75
    assert (tmp_path / "said0").read_text() == "stopped by a signal outside the steps; start again with --resume\n"


def test_nothing_is_saved_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr("loaders.Loader.__next__", train.loaders.Loader.__next__)
    break_loader(1, DataError("a/b.jpg: cannot be decoded"))
    recipe = tiny(QUICK, tmp_path, *OVERRIDES)
    with pytest.raises(DataError):
        run(recipe)
    assert not (recipe.folder / "checkpoints").exists()


def test_a_signal_in_an_evaluation_saves_at_once_and_a_resumed_run_owes_the_evaluation(tmp_path, monkeypatch):
    whole = tiny(QUICK, tmp_path / "whole", *OVERRIDES)
    run(whole)
    recipe = tiny(QUICK, tmp_path / "stopped", *OVERRIDES)
    from engine import evals

    honest = evals._features

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return honest(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(evals, "_features", interrupted)
        with pytest.raises(Stopped):
            run(recipe)
    assert last_state(recipe)["step"] == 4
    assert not any("evaluation" in row for row in rows(recipe))
    run(recipe, resume=True)
    assert_same_run(whole, recipe)


# ------------------------------------------------------------------------------------------------ torchrun


def launcher(tmp_path, node, port, nodes, *overrides):
    """torchrun on one of some machines: each with a folder and a cache of its own."""
    home = tmp_path / f"node{node}"
    home.mkdir(exist_ok=True)
    path = ROOT / "recipes" / QUICK
    command = [
        sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}", "--nproc_per_node=1", f"--node_rank={node}",
        "--master_addr=127.0.0.1", f"--master_port={port}", str(ROOT / "tools/train.py"), str(path),
        *tiny_overrides(path, tmp_path / "runs"), *overrides,
    ]  # fmt: skip
    environment = {**os.environ, "XDG_CACHE_HOME": str(home / "cache")}
    return subprocess.Popen(command, cwd=home, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_two_nodes_end_together_at_a_bad_image_of_one(tmp_path, tree):
    port = rank_environment(2)[0]["MASTER_PORT"]
    more = [
        "data.backend=folder", "data.options={}", "data.workers=1", "data.train=images", "data.val=images",
        "data.micro_batch=4", "run.duration=400it", "run.save_every=1000it", "evals=[]",
    ]  # fmt: skip
    for node in (0, 1):
        shutil.copytree(tree, tmp_path / f"node{node}/images")
    nodes = [launcher(tmp_path, node, port, 2, *more) for node in (0, 1)]
    metrics = tmp_path / "runs/quick_burn_stage2/metrics.jsonl"
    deadline = time.monotonic() + PATIENCE
    while not (metrics.exists() and metrics.read_text()) and nodes[0].poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    for path in sorted((tmp_path / "node1/images").rglob("*.*")):
        path.write_bytes(b"broken")  # on the disk of the second node alone
    said = [node.communicate(timeout=PATIENCE)[1] for node in nodes]
    assert all(node.returncode for node in nodes), said
    assert sum(len(re.findall(r"^error: ", text, re.M)) for text in said) == 1, said
    assert re.search(r"^error: images/\S+: has changed", said[1], re.M), said
    assert re.search(r"exitcode *: 2 ", said[0]) and re.search(r"exitcode *: 2 ", said[1]), said
    assert last_state(tiny(QUICK, tmp_path / "runs", *more))["step"] > 0


@pytest.mark.slow
def test_a_group_of_one_rank_is_a_group_and_gives_the_same_bits(tmp_path):
    port = rank_environment(1)[0]["MASTER_PORT"]
    process = launcher(tmp_path, 0, port, 1, *OVERRIDES)
    said = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 0, said
    alone = tiny(QUICK, tmp_path / "alone", *OVERRIDES)
    run(alone)
    assert_same_run(alone, tiny(QUICK, tmp_path / "runs", *OVERRIDES))


def grouped(folder):
    with dist.group("cpu", 60) as world:
        trainer = train.Trainer(tiny(QUICK, folder, *OVERRIDES), world)
        assert isinstance(trainer.model, torch.nn.parallel.DistributedDataParallel)


def test_a_group_of_one_rank_averages_its_gradients(tmp_path):
    process = start_process(grouped, tmp_path, **rank_environment(1)[0])
    process.join(PATIENCE)
    assert process.exitcode == 0
