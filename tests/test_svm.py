"""SVMs on frozen features: golden values, draws, and the tool from end to end."""

import json
import os
import shutil
import statistics
import sys

import numpy as np
import pytest
import torch

from engine import dist, evals, pool, svm
from engine.average_precision import classified
from engine.errors import MachineError
from engine.features import Features
from loaders import DataError, voc
from loaders.philox import uniform
from tests.images import write_tree
from tests.processes import run_ranks, start_process, tool
from tests.runs import run
from tests.tiny import tiny

ROWS = np.array([(1, 2), (2, 0), (0, 1), (-1, -1), (0.5, -1.5), (-2, 0.5)])
POSITIVE = np.array([1, 1, 0, 0, 0, 1], dtype=bool)
SOLUTIONS = {  # cost -> w1, w2, b, objective: by Newton's method to a gradient below 3e-13
    0.0625: (0.088787960850, 0.217485855004, 0.152827623067, 0.486557928567),
    0.5: (0.164415981313, 0.488535077809, 0.211687938438, 3.356265552086),
    10: (0.184282922769, 0.596736400459, 0.213326597166, 63.638959346371),
    100: (0.185299590305, 0.603180534894, 0.213171086265, 634.411562691813),
}
TARGETS = np.array(
    [(1, 0, 0), (1, 0, 0), (0, 1, 0), (0, 1, 0), (0, 0, 1), (0, 0, 1),
     (1, 1, 0), (0, 0, -1), (-1, 0, 0), (0, 1, 1), (0, 0, 0), (1, 0, 1)], dtype=np.int8,
)  # fmt: skip
ALL = np.arange(12)


# ------------------------------------------------------------------------------------------------ mathematics


def test_rows_are_divided_by_their_norm_and_a_little():
    assert svm.normalized(np.array([[1, 2]], np.float32))[0] == pytest.approx(
        [0.447211595509, 0.894423191018], abs=1e-12
    )
    assert svm.normalized(np.zeros((1, 3), np.float32)).tolist() == [[0, 0, 0]]


@pytest.mark.parametrize("cost", SOLUTIONS)
def test_the_minimum_is_the_one(cost):
    *expected, objective = SOLUTIONS[cost]
    rows = svm.normalized(ROWS)
    found = svm.fit(rows, POSITIVE, cost, tolerance=1e-12)
    got = [*found.weight, found.bias]
    assert found.converged and got == pytest.approx(expected, abs=5e-8)
    loss = np.where(POSITIVE, 2, 1) * np.maximum(0, 1 - np.where(POSITIVE, 1, -1) * found.scores(rows)) ** 2
    assert (np.square(got).sum() / 2 + cost * loss.sum()) == pytest.approx(objective, abs=1e-9)
    usual = svm.fit(rows, POSITIVE, cost)  # with the tolerance that is used
    assert usual.converged and [*usual.weight, usual.bias] == pytest.approx(expected, abs=1e-5)


def test_costs_and_folds_are_the_protocols():
    assert len(svm.COSTS) == 19 and svm.COSTS[:4] == (1, 10, 100, 2**-4) and svm.COSTS[-1] == 1.9073486328125e-06
    positive = np.zeros(12, dtype=bool)
    positive[::3] = True
    positive[[0, 3, 6, 9]] = True
    assert [fold.tolist() for fold in svm.folds(positive)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_cross_validation_scores_each_fold_by_a_classifier_of_the_others():
    rng = np.random.default_rng(0)
    rows, positive = svm.normalized(rng.normal(size=(30, 5))), rng.random(30) < 0.4
    for fold, score in zip(svm.folds(positive), svm.cross_validated(rows, positive, 1.0), strict=True):
        others = np.setdiff1d(np.arange(30), fold)
        scores = svm.fit(rows[others], positive[others], 1.0).scores(rows[fold])
        assert score == classified(positive[fold], scores, "step")


def test_low_shot_reports_the_population_and_two_costs():
    samples = [0.4, 0.5, 0.6, 0.45, 0.55]
    assert svm.over_samples(samples)["std"] == pytest.approx(0.070710678119, abs=1e-12)
    assert statistics.stdev(samples) == pytest.approx(0.079056941504, abs=1e-12)
    ap = np.stack([[samples, np.array(samples) + 0.1, np.array(samples) + 0.1]] * 2).transpose(2, 0, 1)  # [5, 2, 3]
    found = svm.low_shot_result(ap, [1.0, 10.0, 100.0])
    assert found["chosen_on_test"]["cost"] == 10 and found["chosen_on_test"]["mean"] == pytest.approx(0.6)
    assert found["at_cost_1"]["cost"] == 1 and found["at_cost_1"]["max"] == pytest.approx(0.6)
    assert svm.low_shot_result(ap, [0.5, 10.0, 100.0])["at_cost_1"] is None


# ------------------------------------------------------------------------------------------------ draws


def drawn(shots, sample, **changes):
    options = {"targets": TARGETS, "rows": ALL, **changes}
    found = svm.draw(options["targets"], options["rows"], shots, sample, options.get("seed", 0))
    rows = options["rows"]
    return [tuple(sorted(rows[found[:, number] == symbol].tolist()) for symbol in (1, 0)) for number in range(3)]


def test_draws_are_the_golden_ones():
    assert drawn(1, 0) == [([6], [2, 4]), ([6], [5, 10]), ([11], [2, 10])]
    assert drawn(1, 1) == [([0], [3, 4]), ([9], [7, 11]), ([4], [1, 8])]
    assert drawn(2, 0) == [([1, 6], [2, 5, 7, 10]), ([6, 9], [1, 4, 5, 10]), ([5, 11], [1, 2, 6, 10])]
    zeros = np.zeros(3, dtype=np.int64)
    u = uniform(np.arange(3), zeros, zeros + 1, 1, 0)[:, 0]
    assert u == pytest.approx([0.178931468516, 0.308717645356, 0.056865736027], abs=1e-12)


def test_a_draw_depends_on_the_numbers_of_rows_and_not_on_their_order():
    order = np.random.default_rng(1).permutation(12)
    assert drawn(2, 0, targets=TARGETS[order], rows=ALL[order]) == drawn(2, 0)
    assert drawn(2, 0, seed=1) != drawn(2, 0) != drawn(2, 1)
    for shots in (1, 2):
        for sample in range(20):
            found = svm.draw(TARGETS, ALL, shots, sample)
            assert ((found == 1).sum(0) == shots).all() and ((found == 0).sum(0) == 2 * shots).all()
            assert found[8, 0] == found[7, 2] == svm.UNUSED  # difficult
            assert (TARGETS[found != svm.UNUSED] == found[found != svm.UNUSED]).all()


def test_shots_for_which_a_class_is_too_rare_are_left_out():
    assert svm.possible(TARGETS, svm.SHOTS) == [1, 2]
    with pytest.raises(DataError, match="class 0: 3 images of target 1, 4 are to be drawn"):
        svm.draw(TARGETS[1:], ALL[1:], 4, 0)


def test_a_class_that_cannot_be_learned_or_tested_is_named():
    svm.check(TARGETS, "abc", "train", 3)
    with pytest.raises(DataError, match="^train: class 'a': 2 images show it, expected at least 3$"):
        svm.check(TARGETS[2:], "abc", "train", 3)
    with pytest.raises(DataError, match="^test: class 'b': 0 images show it, expected at least 1$"):
        svm.check(TARGETS[[0, 4, 10]], "abc", "test", 1)
    assert svm.rarest(TARGETS, "abc") == "4 images show 'a', and 7 do not"


def test_pcl_trains_every_class_on_all_images_that_are_drawn():
    found = svm.draw_images(TARGETS.clip(0), ALL, 2, 0)
    used = (found != svm.UNUSED).any(1)
    assert used.tolist() == (found != svm.UNUSED).all(1).tolist() and 2 <= used.sum() <= 6
    assert (found[used] == TARGETS.clip(0)[used]).all() and (found[used].sum(0) >= 2).all()
    own = [set(rows[0]) for rows in drawn(2, 0)]  # the same positives as the other protocol draws
    assert set(np.flatnonzero(used).tolist()) == set().union(*own)


def test_published_draws_are_read_and_checked(tmp_path):
    good, path = svm.draw(TARGETS, ALL, 1, 0), tmp_path / "train_targets_sample1_k1.npy"
    np.save(path, good.astype(np.int32))
    assert (svm.read_draw(tmp_path, TARGETS, 1, 0) == good).all()
    assert svm.digest(good) == svm.digest(good.astype(np.int32)) != svm.digest(-good)
    swapped = good.copy()
    swapped[[6, 0], 0] = swapped[[0, 6], 0]
    swapped[[2, 0], 0] = swapped[[0, 2], 0]
    fewer = good.copy()
    fewer[6, 0] = -1
    bad = {
        "expected integers \\[12, 3\\] \\(images, classes\\), got int32 \\[11, 3\\]": good[1:].astype(np.int32),
        "got float64": good.astype(float),
        "holds -3, expected 1, 0 and -1 alone": good - 2,
        "class 0 has 0 entries of 1, expected 1": fewer,
        "row 0 of class 0 is 0, the data set says 1; expected the images by ascending name": swapped,
        "is no array of numbers": np.array([{}] * 3),
    }
    for said, content in bad.items():
        np.save(path, content)
        with pytest.raises(DataError, match=f"^{path}: .*{said}"):
            svm.read_draw(tmp_path, TARGETS, 1, 0)
    with pytest.raises(DataError, match="sample2_k1.npy: cannot be read: No such file"):
        svm.read_draw(tmp_path, TARGETS, 1, 1)


# ------------------------------------------------------------------------------------------------ units of work


def sets(targets=TARGETS, rows=ALL):
    rng = np.random.default_rng(0)
    centers, noise = rng.normal(size=(3, 6)), rng.normal(size=(2, 12, 6))
    train, test = (svm.normalized(np.maximum(TARGETS, 0) @ centers + 0.7 * part) for part in noise)
    return svm.Sets(train[rows], targets[rows], test, TARGETS)


def here(units, title):
    """Work in this process, without a ledger."""
    return [unit.work(*unit.arguments) for unit in units]


def test_difficult_images_train_the_full_svm_and_no_other(tmp_path):
    results = {}
    without = np.setdiff1d(ALL, [7, 8])  # those that are difficult for a class
    for name, rows, targets in (("all", ALL, TARGETS), ("without", without, TARGETS), ("absent", ALL, TARGETS.clip(0))):
        found = sets(targets, rows)
        folder = found.write(tmp_path)
        draws = {(1, sample): svm.draw(TARGETS, ALL, 1, sample)[rows] for sample in range(20)}
        draws = {key: drawn for key, drawn in draws.items() if all((svm.draw(TARGETS, ALL, *key)[[7, 8]] == -1).all(1))}
        full = svm.measure(folder, found.train_targets, "abc", [1.0], here)["ap"]
        weight = svm.fit(found.train, found.train_targets[:, 0] == 1, 1.0).weight
        results[name] = full, weight, svm.measure_low_shot(folder, draws, [1.0, 10.0], here)["shots"]
    full, weight, low_shot = ({name: found[part] for name, found in results.items()} for part in range(3))
    assert draws and low_shot["all"] == low_shot["without"] == low_shot["absent"]
    assert np.array_equal(weight["all"], weight["absent"]) and not np.allclose(weight["all"], weight["without"])
    assert full["all"]["a"] == full["absent"]["a"]


def test_a_test_leaves_out_what_is_difficult_of_its_class(tmp_path):
    found = sets()
    turned = found.test.copy()
    # Difficult for the first class, and what a classifier of the second takes for it, which it is not.
    turned[8] = svm.normalized(svm.fit(found.train, TARGETS[:, 1] == 1, 0.5).weight[None])[0]
    one, two = (
        svm.measure(found._replace(test=test).write(tmp_path), TARGETS, "abc", [0.5], here)
        for test in (found.test, turned)
    )
    assert one["ap"]["a"] == two["ap"]["a"] and one["ap"]["b"] > two["ap"]["b"]
    assert one["unconverged"] == 0 and one["cross_validation"] is None and set(one["cost"].values()) == {0.5}


def test_the_full_protocol_takes_the_best_cost_of_each_class(tmp_path):
    found, costs = sets(), [1.0, 100.0, 2.0**-4]
    got = svm.measure(found.write(tmp_path), TARGETS, "abc", costs, here)
    for number, name in enumerate("abc"):
        positive = TARGETS[:, number] == 1
        scores = [100 * np.mean(svm.cross_validated(found.train, positive, cost)) for cost in costs]
        assert got["cross_validation"][name] == pytest.approx(scores, abs=1e-9)
        assert got["cost"][name] == costs[int(np.argmax(got["cross_validation"][name]))]
        scores = svm.fit(found.train, positive, got["cost"][name]).scores(found.test)
        assert got["ap"][name] == pytest.approx(100 * classified(TARGETS[:, number], scores, "envelope"))
    assert got["map"] == pytest.approx(statistics.fmean(got["ap"].values()))


def double(number):
    return 2 * number


def die(number):
    os._exit(number)


def units(work, count=4):
    return [pool.Unit({"n": number}, work, (number,), size=1 + number) for number in range(count)]


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_ledger_keeps_what_is_done(jobs, tmp_path, caplog):
    caplog.set_level("INFO", logger="burn")
    path = tmp_path / "new" / "results.jsonl"
    with pool.Pool(pool.Ledger(path), jobs) as workers:
        assert workers.run(units(double), "work") == [0, 2, 4, 6]
        assert caplog.messages[-1].startswith("work: 4 of 4, ") and caplog.messages[-1].endswith(" left")
        assert workers.run([pool.Unit({"n": "?"}, os.getpid, (), size=1)], "work") != [os.getpid()] or jobs == 1
        if jobs == 1:  # a lock belongs to a process: another has to ask
            other = start_process(pool.Ledger, path)
            other.join()
            assert other.exitcode == 1
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) == 5
    if jobs == 1:
        assert lines[0] == b'{"key": {"n": 3}, "result": 6}\n'  # the longest first
    path.write_bytes(b"".join(lines[:2]) + b"nonsense\n" + lines[2][:9])  # killed while it wrote
    with pool.Pool(pool.Ledger(path), jobs) as workers:
        assert (
            workers.run(units(double), "work", here=True) == [0, 2, 4, 6] and len(path.read_bytes().splitlines()) == 5
        )
        assert "work: 2 of 4 are there from an earlier call" in caplog.messages
        caplog.clear()
        assert workers.run(units(die), "work") == [0, 2, 4, 6] and not caplog.messages  # nothing is left to do


def test_a_worker_that_is_killed_is_one_line_and_what_is_done_is_kept(tmp_path):
    with pool.Pool(pool.Ledger(tmp_path / "results.jsonl"), 2) as workers:
        workers.ledger.add(units(double)[2], 4)
        with pytest.raises(MachineError, match="a worker process was killed .* fewer than 2 --jobs"):
            workers.run(units(die), "work")
    assert (tmp_path / "results.jsonl").read_bytes() == b'{"key": {"n": 2}, "result": 4}\n'


# ------------------------------------------------------------------------------------------------ k-NN


def test_any_numbers_of_neighbors_in_one_pass_are_those_of_one_each():
    generator = torch.Generator().manual_seed(0)
    bank, query = (torch.randn(count, 5, generator=generator) for count in (60, 30))
    label = torch.arange(60) % 7
    ranked = evals.knn_ranked(bank, label, query, 7, (1, 3, 50, 100), 0.07)
    for number, count in enumerate((1, 3, 50, 100)):
        assert torch.equal(ranked[number, :, 0], evals.knn(bank, label, query, 7, count, 0.07))
    assert ranked.shape == (4, 30, 5)
    assert (ranked[0, :, 1:] == -1).all()  # one neighbor has one class: the others are no answers
    assert ((ranked[1] >= 0).sum(1) <= 3).all() and (ranked[2] >= 0).all()
    similarity = torch.nn.functional.normalize(query, dim=1) @ torch.nn.functional.normalize(bank, dim=1).T
    votes = torch.stack([(similarity[:, label == c].double() / 0.07).exp().sum(1) for c in range(7)], dim=1)
    assert torch.equal(ranked[3], votes.topk(5).indices)  # more neighbors than there are: all vote
    parts = []
    evals._SIMILARITIES, before = 60 * 7, evals._SIMILARITIES
    try:
        assert torch.equal(evals.knn_ranked(bank, label, query, 7, (3,), 0.07, done=parts.append)[0], ranked[1])
    finally:
        evals._SIMILARITIES = before
    assert parts == [7, 14, 21, 28, 30]


# ------------------------------------------------------------------------------------------------ the tool


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """A run of a floating-point network: its features do not depend on how images share batches."""
    recipe = tiny("quick/moco.yaml", tmp_path_factory.mktemp("run") / "net", "run.duration=1it", "evals=[]")
    run(recipe)
    return recipe.folder


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Scenes in VOC's layout."""
    root = tmp_path_factory.mktemp("scenes") / "kit"
    tool("make_images").make("digit_scenes", root, limit=100)
    return root


def main(*arguments):
    sys.argv = ["probe.py", *map(str, arguments), "--device", "cpu"]
    dist.leave(tool("probe").main)


def probe(*arguments):
    with pytest.raises(SystemExit) as left:
        main(*arguments)
    return left.value.code


def test_a_probe_that_was_killed_goes_on_to_the_same_results(network, scenes, tmp_path, monkeypatch, capsys):
    arguments = [network, "--task", "lowshot", "svm", "--data", f"{scenes}#2007", "--shots", 1, 2, 200,
                 "--costs", 1, 0.01, "--jobs", 1]  # fmt: skip
    assert probe(*arguments, "--out", tmp_path / "whole") == 0
    said = capsys.readouterr()
    assert f"--shots 200: left out, {scenes}#2007_trainval: " in said.err and "## Low-shot SVM" in said.out
    result = json.loads((tmp_path / "whole/probe.json").read_text())
    found = result["networks"][str(network)]
    assert found["svm"]["layer"] == "map" and found["svm"]["images"] == [100, 25] and len(found["svm"]["ap"]) == 10
    assert found["svm"]["unconverged"] == found["lowshot"]["unconverged"] == 0 and not found["lowshot"]["published"]
    assert list(found["lowshot"]["shots"]) == ["1", "2"] and result["protocol"]["shots"] == [1, 2]
    for shots in found["lowshot"]["shots"].values():
        chosen, at_1 = shots["chosen_on_test"], shots["at_cost_1"]
        assert chosen["mean"] >= at_1["mean"] and len(at_1["samples"]) == 5 and at_1["cost"] == 1
        assert 0 < chosen["min"] <= chosen["mean"] <= chosen["max"] < 100
    assert sum(result["data"]["train"]["positives"].values()) >= 100

    honest, count = pool.Ledger.add, iter(range(45))

    def add(ledger, unit, result):
        honest(ledger, unit, result)
        if next(count) == 44:
            raise KeyboardInterrupt

    with monkeypatch.context() as killing:
        killing.setattr(pool.Ledger, "add", add)
        assert probe(*arguments, "--out", tmp_path / "killed") == 130
    assert capsys.readouterr().err.endswith("stopped\n") and not (tmp_path / "killed/probe.json").exists()
    monkeypatch.setattr("engine.features.batches", lambda *_, **__: pytest.fail("extracted again"))
    assert probe(*arguments, "--out", tmp_path / "killed") == 0
    names = {"probe.json", "probe.md", "probe.png", "results.jsonl"}
    for name in names - {"probe.png", "results.jsonl"}:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    lines = [(tmp_path / place / "results.jsonl").read_text().splitlines() for place in ("killed", "whole")]
    assert sorted(lines[0]) == sorted(lines[1]) and len(lines[0]) == 10 * 2 + 10 + 2 * 5 * 10
    assert {path.name for path in (tmp_path / "whole").iterdir() if path.suffix != ".npz"} == names


def test_files_of_draws_take_the_place_of_our_own(network, scenes, tmp_path, capsys):
    targets = voc.read(f"{scenes}#2007_trainval").targets
    for sample in range(5):
        np.save(tmp_path / f"train_targets_sample{sample + 1}_k1.npy", svm.draw(targets, np.arange(100), 1, sample))
    for out, more in (("ours", []), ("files", ["--samples", tmp_path])):
        arguments = [network, "--task", "lowshot", "--data", f"{scenes}#2007", "--shots", 1, "--costs", 1, "--jobs", 1]
        assert probe(*arguments, *more, "--out", tmp_path / out) == 0
    ours, files = (json.loads((tmp_path / out / "probe.json").read_text()) for out in ("ours", "files"))
    assert ours["networks"] == files["networks"] and ours["protocol"] != files["protocol"]
    assert probe(*arguments, "--samples", tmp_path, "--shots", 2, "--out", tmp_path / "none") == 2
    assert "train_targets_sample1_k2.npy: cannot be read" in capsys.readouterr().err


def test_images_that_cannot_be_decoded_are_not_drawn(network, scenes, tmp_path, capsys):
    copy = tmp_path / "kit"
    shutil.copytree(scenes, copy)
    scene = voc.read(f"{copy}#2007_trainval")
    first = svm.draw(scene.targets, np.arange(100), 1, 0)
    row = int(np.flatnonzero((first != svm.UNUSED).any(1))[0])  # one that would be drawn
    path = copy / scene.names[row]
    path.write_bytes(path.read_bytes()[:-300])
    for sample in range(5):
        np.save(
            tmp_path / f"train_targets_sample{sample + 1}_k1.npy", svm.draw(scene.targets, np.arange(100), 1, sample)
        )
    arguments = [network, "--task", "lowshot", "--data", f"{copy}#2007", "--shots", 1, "--costs", 1, "--jobs", 1]
    assert probe(*arguments, "--out", tmp_path / "out") == 0
    found = json.loads((tmp_path / "out/probe.json").read_text())["networks"][str(network)]["lowshot"]
    assert found["images"] == [99, 25] and found["left_out"] == [1, 0]
    capsys.readouterr()
    assert probe(*arguments, "--samples", tmp_path, "--out", tmp_path / "out") == 2
    assert f"{path}: cannot be decoded, and {tmp_path} has drawn it" in capsys.readouterr().err


def test_pcls_protocol_is_another(network, scenes, tmp_path, capsys):
    arguments = [network, "--task", "svm", "lowshot", "--data", f"{scenes}#2007", "--shots", 1, "--jobs", 1]
    assert probe(*arguments, "--protocol", "pcl", "--out", tmp_path / "pcl") == 0
    assert "SVMs by protocol pcl: not to be compared with voc07's." in capsys.readouterr().out
    result = json.loads((tmp_path / "pcl/probe.json").read_text())
    found, (one,) = result["networks"][str(network)], result["networks"][str(network)]["lowshot"]["shots"].values()
    for task in ("svm", "lowshot"):
        assert found[task]["layer"] == "pooled" and found[task]["view"]["crop"] == "center"
    assert set(found["svm"]["cost"].values()) == {one["chosen_on_test"]["cost"]} == {0.5} and one["at_cost_1"] is None
    assert result["data"]["train"]["difficult"] == 0
    assert (
        probe(*arguments[:3], *arguments[4:6], "--jobs", 1, "--size", 64, "--costs", 1, "--out", tmp_path / "large")
        == 0
    )
    found = json.loads((tmp_path / "large/probe.json").read_text())["networks"][str(network)]["svm"]
    assert (found["view"]["crop"], found["view"]["size"], found["layer"]) == ("whole", 64, "map")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    write_tree(root / "train", count=24), write_tree(root / "val", count=15)
    return root


def test_labeled_folders_and_several_networks(network, folders, tmp_path, capsys):
    published = tmp_path / "copy.pt"
    published.write_bytes(next((network / "checkpoints").glob("*.pt")).read_bytes())
    arguments = [network, published, "--task", "svm", "knn", "--data", folders, "--costs", 1, "--jobs", 1]
    assert probe(*arguments, "--out", tmp_path / "out") == 0
    result = json.loads((tmp_path / "out/probe.json").read_text())
    one, two = result["networks"].values()
    assert one == two and one["knn"]["layer"] == "features" and one["svm"]["layer"] == "map"
    found = {
        features.images: features
        for features in map(Features.load, (tmp_path / "out").glob("*.npz"))
        if features.of["layer"] == "features"
    }
    train, val = (torch.from_numpy(found[count].array) for count in (24, 15))
    label = [torch.from_numpy(found[count].label) for count in (24, 15)]
    hits = evals.knn(train, label[0], val, 3, 10, 0.07) == label[1]
    assert one["knn"]["neighbors"]["10"] == {"top1": pytest.approx(100 * hits.double().mean().item()), "top5": 100}
    assert "| network | 10 | 20 | 100 | 200 |" in capsys.readouterr().out


@pytest.mark.slow
def test_features_of_two_ranks_give_the_same_results(network, folders, tmp_path):
    arguments = [network, "--task", "knn", "--data", f"train={folders}/train", f"val={folders}/val", "--out"]
    assert run_ranks(2, main, *arguments, tmp_path / "two") == [0, 0]
    assert probe(*arguments, tmp_path / "one") == 0
    one, two = (json.loads((tmp_path / name / "probe.json").read_text()) for name in ("one", "two"))
    assert one == two


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["knn", "--data", "{scenes}#2007"],
            "--task knn: expected one class for each image, {scenes}#2007_trainval has several",
        ),
        (["svm", "--data", "{scenes}#2012"], "VOC2012/ImageSets/Main/trainval.txt: no such file"),
        (["svm", "--data", "{scenes}"], "--data: expected data/VOCdevkit#2007, a folder with train and val in it"),
        (["lowshot", "--data", "{scenes}#2007", "--shots", "300"], "too few for --shots 300"),
        (["svm", "--data", "train={scenes}#2007_trainval", "val={folders}/val"], "its 3 classes differ from the 10 of"),
        (["svm", "--data", "{scenes}#2007", "--costs", "-1"], "--costs: expected different numbers above 0, got -1"),
        (["lowshot", "--data", "{scenes}#2007", "--shots", "2", "2"], "--shots: expected different numbers above 0"),
        (["svm", "--data", "{scenes}#2007", "--check", "torchvision", "--costs", "1"], "--check: expected one source"),
        (
            ["lowshot", "--data", "{scenes}#2007", "--protocol", "pcl", "--samples", "x"],
            "--samples: published files are of",
        ),
    ],
)
def test_what_cannot_be_measured_is_one_line_before_any_feature(
    arguments, said, network, scenes, folders, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(tool("probe"), "extract", lambda *_, **__: pytest.fail("extracted"))
    words = [word.format(scenes=scenes, folders=folders) for word in arguments]
    assert probe(network, "--out", tmp_path / "out", "--task", *words) == 2
    assert said.format(scenes=scenes, folders=folders) in capsys.readouterr().err.splitlines()[-1]


def test_a_split_file_that_is_missing_or_a_class_that_is_empty_is_named(network, scenes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tool("probe"), "extract", lambda *_, **__: pytest.fail("extracted"))
    copy = tmp_path / "scenes"
    shutil.copytree(scenes, copy)
    path = next((copy / "VOC2007/ImageSets/Main").glob("*_trainval.txt"))
    path.write_text(path.read_text().replace(" 1\n", "-1\n"))
    assert probe(network, "--out", tmp_path / "out", "--task", "svm", "--data", f"{copy}#2007") == 2
    name = path.stem.removesuffix("_trainval")
    assert f"{copy}#2007_trainval: class '{name}': 0 images show it" in capsys.readouterr().err
    path.unlink()
    assert probe(network, "--out", tmp_path / "out", "--task", "svm", "--data", f"{copy}#2007") == 2
    assert capsys.readouterr().err.count(name) >= 1


def test_svms_without_scikit_learn_are_one_line(network, scenes, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn.svm", None)
    monkeypatch.setattr(tool("probe"), "open_trained", lambda *_, **__: pytest.fail("opened"))
    assert probe(network, "--out", tmp_path / "out", "--task", "svm", "--data", f"{scenes}#2007") == 2
    said = capsys.readouterr().err
    assert "scikit-learn, which fits the SVMs, is missing" in said and "pip install 'scikit-learn>=1.4'" in said
    assert said.count("\n") == 1 and not list(tmp_path.iterdir())


def test_known_answers_are_compared_one_by_one(capsys):
    shots = {number: {"chosen_on_test": {"mean": mean}} for number, mean in (("1", 51.98), ("96", 86.96))}
    network = {"svm": {"map": 87.0}, "lowshot": {"shots": shots}}
    result = {"networks": {"x": network}}
    assert tool("probe").checked_answers(result, "torchvision") == [
        "FAIL low-shot k = 1: 51.98, torchvision has 52.99 ± 1.0"
    ]
    assert [row["passed"] for row in result["check"]] == [True, False, True]
    assert capsys.readouterr().out.splitlines()[0] == "pass SVM: 87.00, torchvision has 87.17 ± 0.3"
