"""The detector: goldens of its parts, what trains, that it learns, and its evaluation on any number of ranks."""

import json
import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from engine import evals
from engine import recipe as recipes
from engine.bench.variants import variants
from engine.data import sets_of
from engine.errors import RecipeError
from engine.results.chain import network_of, probe_of
from engine.results.runs import final
from engine.schedules import Horizon, value
from models import cost, detector, methods
from models.reactnet import Config as ReActNetConfig
from models.resnet import Config as ResNetConfig
from models.statistics import reestimate
from tests.processes import run_ranks, tool
from tests.runs import differences, prepare, rows, run, trainer_of
from tests.tiny import ROOT, SHALLOW, tiny

F64 = torch.float64
VOC = "downstream/voc_c4.yaml"


def build(**keys):
    backbone = {"arch": "reactnet", "width": 4, "multiples": tuple(SHALLOW), "pooled_mlp": False}
    values = {
        "name": "detect",
        "backbone": backbone,
        "num_classes": 3,
        "rois": 16,
        "pyramid_dim": 16,
        "hidden_dim": 32,
        **keys,
    }
    return methods.load("detect").Config.model_validate(values).build().train()


def scene(*objects, width=64, height=64):
    """The label of one image."""
    return torch.tensor([[(-1, 0, 0, width, height, 0), *objects, (-2,) * 6]], dtype=torch.float32)


# ------------------------------------------------------------------------------------------------ goldens


def test_boxes_are_coded_as_published():
    coder = detector.heads(detector.Pool([16], 14), nn.Identity(), nn.Identity(), 512).box_coder
    proposal, truth = torch.tensor([[0.0, 0, 10, 20]], dtype=F64), torch.tensor([[2.0, 3, 12, 33]], dtype=F64)
    coded = coder.encode_single(truth, proposal)
    assert torch.allclose(coded, torch.tensor([[2, 4, 0, 2.027325540541]], dtype=F64), atol=1e-12, rtol=0)
    assert torch.allclose(coder.decode_single(coded, proposal), truth, atol=1e-12)
    assert abs(coder.bbox_xform_clip - 4.135166556743) < 1e-12


def test_anchors_have_whole_sides():
    (base,) = detector.region_proposals(4, [[32]], (10, 10)).anchor_generator.cell_anchors
    assert base.tolist() == [[-23, -11, 23, 11], [-16, -16, 16, 16], [-11, -23, 11, 23]]


def test_regions_are_pooled_aligned():
    ramp = torch.arange(16, dtype=F64).view(1, 1, 4, 4)
    pooled = detector.Pool([16], 2)({"16": ramp}, [torch.tensor([[8.0, 8, 40, 56]], dtype=F64)])
    assert pooled.flatten().tolist() == [3.5, 4.5, 9.5, 10.5]
    assert detector.Pool([16], 2)({"16": ramp}, [torch.zeros(0, 4)]).shape == (0, 1, 2, 2)


def test_a_box_is_pooled_from_the_map_of_its_size():
    pool = detector.Pool([4, 8, 16, 32], 2)
    sides = torch.tensor([0.0, 111, 112, 223, 224, 447, 448, 5000])
    assert pool.levels(torch.stack((0 * sides, 0 * sides, sides, sides), dim=1)).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    # On a map of ones of each level, in the order of the boxes and not of the levels.
    maps = {str(stride): torch.full((2, 1, 640 // stride, 640 // stride), float(stride)) for stride in pool.strides}
    boxes = [torch.tensor([[64.0, 64, 500, 500], [64, 64, 96, 96]]), torch.tensor([[64.0, 64, 200, 200]])]
    pooled = pool({**maps, "pool": torch.zeros(0)}, boxes)
    assert pooled.shape == (3, 1, 2, 2) and pooled[:, 0, 0, 0].tolist() == [16, 4, 8]


def test_the_schedule_is_the_published_one():
    lr = recipes.load(ROOT / "recipes" / VOC).schedules["lr"]
    horizon = Horizon.of("24000it", 16551, 16)
    found = [value(lr, step, horizon) for step in (0, 1, 50, 99, 100, 18000, 22000)]
    assert found == pytest.approx([2e-5, 2.198e-4, 0.01001, 0.0198002, 0.02, 0.002, 0.0002], rel=1e-12)


def test_maps_have_their_strides_and_channels():
    network = ReActNetConfig(width=2, pooled_mlp=False).build().eval()
    images = torch.randn(1, 3, 96, 160)
    maps = network.maps(images)
    assert {stride: tuple(x.shape[1:]) for stride, x in maps.items()} == {
        2: (4, 48, 80), 4: (8, 24, 40), 8: (16, 12, 20), 16: (32, 6, 10), 32: (64, 3, 5)
    }  # fmt: skip
    assert {stride: x.shape[1] for stride, x in maps.items()} == network.map_channels
    assert torch.equal(maps[32], network.map(images)) and torch.equal(network.last_stage(maps[16]), maps[32])
    assert list(network.maps(images, until=8)) == [2, 4, 8]
    assert network.last_stage(torch.randn(5, 32, 14, 14)).shape == (5, 64, 7, 7)
    for config in (ResNetConfig(arch="resnet18"), ResNetConfig(arch="resnet18", stem="small")):
        network = config.build().eval()
        maps = network.maps(images)
        assert {stride: x.shape[1] for stride, x in maps.items()} == network.map_channels
        assert all(x.shape[-1] * stride == 160 for stride, x in maps.items())
        assert torch.equal(list(maps.values())[-1].mean(dim=(2, 3)), network(images))


@pytest.mark.parametrize("kernels", ["torch", "fused"])
def test_maps_of_a_training_step_are_parts_of_its_last_one(kernels):
    torch.manual_seed(0)
    network = ReActNetConfig(width=2, pooled_mlp=False).build().double().train()
    network.fused = kernels == "fused"
    images = torch.randn(2, 3, 64, 64, dtype=F64)
    maps = network.maps(images)
    assert torch.allclose(maps[32], network.map(images), atol=1e-9)
    assert [len(stage) for stage in network._stages()] == [1, 2, 2, 6, 2]


# ------------------------------------------------------------------------------------------------ what trains


@pytest.mark.parametrize("norm", ["batch", "frozen"])
@pytest.mark.parametrize("neck", ["c4", "fpn"])
def test_all_but_what_is_frozen_trains(neck, norm):
    torch.manual_seed(0)
    method = build(neck=neck, norm=norm)
    buffers = {name: buffer.clone() for name, buffer in method.named_buffers()}
    label = torch.cat((scene((0, 4, 4, 40, 36, 0)), scene((2, 20, 8, 60, 60, 1), width=60, height=48)))
    losses = method([torch.randn(2, 3, 64, 64)], label, {})
    losses["loss"].backward()
    parts = ("objectness", "proposal_boxes", "classes", "boxes")
    assert losses.keys() == {"loss", *parts}
    assert torch.allclose(losses["loss"], sum(losses[name] for name in parts)) and all(losses[p] > 0 for p in parts)
    frozen = {
        f"backbone.{name}.{leaf}"
        for name, part in method.backbone.named_modules()
        if isinstance(part, nn.BatchNorm2d)
        for leaf in ("weight", "bias")
    }
    for name, parameter in method.named_parameters():
        is_frozen = norm == "frozen" and name in frozen
        assert parameter.requires_grad != is_frozen, name
        assert is_frozen == (parameter.grad is None) and (is_frozen or parameter.grad.any()), name
    changed = {name for name, buffer in method.named_buffers() if not torch.equal(buffer, buffers[name])}
    of_norms = {name for name in buffers if not (norm == "frozen" and name.startswith("backbone."))}
    assert changed == of_norms
    children = {"backbone", "rpn", "predictor", "roi_norm" if neck == "c4" else "fpn"}
    assert {name for name, _ in method.named_children()} == children
    assert len(method.state_dict()) == len({t.data_ptr() for t in method.state_dict(keep_vars=True).values()})


@pytest.mark.slow
def test_one_image_is_learned_by_heart():
    from engine.average_precision import Detections, Objects, detection_scores

    torch.manual_seed(0)
    backbone = {"arch": "reactnet", "width": 4, "multiples": (1, 2, 4, 8), "pooled_mlp": False}
    method = build(rois=32, backbone=backbone)
    objects = [(1, 6, 6, 26, 30, 0), (0, 34, 10, 60, 44, 0), (2, 8, 36, 30, 62, 0)]
    image = 0.3 * torch.randn(1, 3, 64, 64)
    for number, (_, x1, y1, x2, y2, _) in enumerate(objects):
        image[0, number, y1:y2, x1:x2] += 2
    label = scene(*objects)
    optimizer = torch.optim.Adam(method.parameters(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        method([image], label, {})["loss"].backward()
        optimizer.step()
    reestimate(method, [image] * 2, lambda x: method([x], label, {}))
    (found,) = method.eval().detections(image, label)
    found = found.detach().double().numpy()
    claimed = Detections(np.zeros(len(found), int), found[:, 0].astype(int), found[:, 1], found[:, 2:])
    there = np.array(objects, dtype=float)
    truth = Objects(np.zeros(3, int), there[:, 0].astype(int), there[:, 1:5], np.zeros(3, bool))
    assert detection_scores(claimed, truth, 3).ap50 == 1


def test_what_is_found_depends_on_the_image_alone():
    method = build().eval()
    image, other = torch.randn(1, 3, 64, 64), torch.randn(1, 3, 64, 96)
    label = scene(width=61, height=50)
    image[:, :, 50:], image[:, :, :, 61:] = 0, 0
    beside = torch.cat((torch.nn.functional.pad(image, (0, 32, 0, 0)), other))
    with torch.no_grad():
        (alone,) = method.detections(image, label)
        first, _ = method.detections(beside, torch.cat((label, scene(width=96, height=64))))
    assert len(alone) and torch.equal(alone, first)
    assert alone.shape[1] == 6 and set(alone[:, 0].tolist()) <= {0, 1, 2}
    assert (alone[:, 1].diff() <= 0).all() and alone[:, 4].max() <= 61 and alone[:, 5].max() <= 50


@pytest.mark.parametrize("neck", ["c4", "fpn"])
def test_sixteen_bits_hold_no_place_in_an_image_and_change_little(neck, tmp_path):
    losses = []
    for amp in ("off", "bf16"):  # a coordinate in bf16 would be pixels off
        trainer, batches = prepare(tiny(VOC, tmp_path, f"run.amp={amp}", f"method.neck={neck}"))
        trainer.step(batches)
        losses.append(trainer.meter.read())
    for name in ("objectness", "proposal_boxes", "classes"):
        assert losses[1][name] == pytest.approx(losses[0][name], rel=0.01)


# ------------------------------------------------------------------------------------------------ recipes


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("run.compile=true", "run.compile: method detect cannot have true: the shapes of images"),
        ("method.backbone.pooled_mlp=true", "backbone.pooled_mlp: expected false: a detector looks at maps"),
        ("method.backbone.multiples=[1, 2]", "backbone: expected a network with maps of at least two strides"),
        ("evals.0.kind=knn", "evals.0.kind: method detect learns boxes, expected detection"),
        ("data.options={}", "data.backend: synthetic does not fit method detect, expected a back end with boxes"),
    ],
)
def test_what_does_not_fit_is_one_line(change, expected, tmp_path):
    with pytest.raises(RecipeError) as caught:
        tiny(VOC, tmp_path, "evals.0.precise_bn=0", change)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_more_that_does_not_fit(tmp_path):
    with pytest.raises(RecipeError, match="run.kernels: .* they take the statistics of the batch"):
        tiny(VOC, tmp_path, "run.kernels=fused", "method.norm=frozen")
    with pytest.raises(RecipeError, match="evals.0.kind: method classify learns no boxes"):
        tiny("quick/supervised.yaml", tmp_path, "evals.0.kind=detection")
    with pytest.raises(RecipeError, match="differ in the sizes of their images"):
        variants(tiny(VOC, tmp_path), torch.device("cpu"))
    assert tiny(VOC, tmp_path, "run.kernels=fused", "evals.0.average_precision=envelope").evals[0].precise_bn == 1


class Proposing(nn.Module):
    """A detector up to its proposals."""

    def __init__(self, method):
        super().__init__()
        self.method = method

    def forward(self, x):
        return self.method.rpn.head(list(self.method._maps(x).values()))


class Looking(nn.Module):
    """What a detector does with each region."""

    def __init__(self, method):
        super().__init__()
        self.method = method

    def forward(self, x):
        return self.method.predictor(self.method._stage(x))


def test_costs_are_those_of_the_page():
    # docs/downstream.md, "Detection on VOC": one image of 800 x 1,088.
    config = recipes.load(ROOT / "recipes" / VOC).method
    cells = {"up to the proposals": [], "512 regions, training": [], "1,000 regions, evaluation": []}
    for neck, region in (("c4", (512, 14, 14)), ("fpn", (256, 7, 7))):
        with torch.device("meta"):
            method = config.model_copy(update={"neck": neck}).build()
        whole, one = cost.count(Proposing(method), (3, 800, 1088)), cost.count(Looking(method), region)
        for row, counted, times in zip(cells.values(), (whole, one, one), (1, 512, 1000), strict=True):
            row += [times * counted.binary_macs / 1e9, times * counted.float_macs / 1e9]
    page = (ROOT / "docs/downstream.md").read_text()
    for name, numbers in cells.items():
        assert f"| {name} | {' | '.join(f'{number:.1f}' for number in numbers)} |" in page, (name, numbers)


# ------------------------------------------------------------------------------------------------ statistics


def test_statistics_are_means_over_batches():
    torch.manual_seed(0)
    network = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3)).double()
    network[1].eval()
    network[0].momentum = 0.3
    before = {name: buffer.clone() for name, buffer in network[1].named_buffers()}
    batches = [torch.randn(4, 3, 5, 5, dtype=F64) * (1 + number) + number for number in range(3)]
    reestimate(network[0], iter(batches))
    means, variances = zip(*((x.mean((0, 2, 3)), x.var((0, 2, 3))) for x in batches), strict=True)
    assert torch.allclose(network[0].running_mean, torch.stack(means).mean(0), atol=1e-14)
    assert torch.allclose(network[0].running_var, torch.stack(variances).mean(0), atol=1e-13)
    assert network[0].momentum == 0.3 and network[0].training and not network[1].training
    assert all(torch.equal(buffer, before[name]) for name, buffer in network[1].named_buffers())
    with pytest.raises(ValueError, match="no batches"):
        reestimate(network, [])
    frozen = build(norm="frozen").eval()
    before = {name: buffer.clone() for name, buffer in frozen.backbone.named_buffers()}
    reestimate(frozen, [torch.randn(1, 3, 64, 64)], lambda x: frozen([x], scene((0, 4, 4, 40, 36, 0)), {}))
    assert all(torch.equal(buffer, before[name]) for name, buffer in frozen.backbone.named_buffers())
    assert frozen.roi_norm.num_batches_tracked == 1 and not frozen.training


@pytest.mark.parametrize("kernels", ["torch", "fused"])
def test_statistics_of_a_network_are_means_over_batches(kernels):
    torch.manual_seed(0)
    network = ReActNetConfig(width=2, multiples=tuple(SHALLOW), pooled_mlp=False).build().double().train()
    network.fused = kernels == "fused"
    norm, batches = network.blocks[0].norm1, [torch.randn(2, 3, 32, 32, dtype=F64) * (1 + n) + n for n in range(3)]
    inputs = []
    network.fused, is_fused = False, network.fused
    hook = norm.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    for batch in batches:
        network(batch)
    hook.remove()
    network.fused = is_fused
    reestimate(network, iter(batches))
    assert torch.allclose(norm.running_mean, torch.stack([x.mean((0, 2, 3)) for x in inputs]).mean(0), atol=1e-12)
    assert torch.allclose(norm.running_var, torch.stack([x.var((0, 2, 3)) for x in inputs]).mean(0), atol=1e-12)
    assert norm.momentum == 0.1 and norm.training


# ------------------------------------------------------------------------------------------------ evaluation


def evaluate(folder, precise_bn):
    """Evaluate on this rank; rank 0 keeps the scores."""
    from engine import dist

    recipe = tiny(VOC, folder, f"evals.0.precise_bn={precise_bn}", "data.options.num_val_images=7")
    trainer = trainer_of(recipe)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # one order of summation on one rank and on two
    with torch.no_grad():  # so that the boxes differ
        trainer.method.predictor.cls_score.weight.mul_(100)
        trainer.method.predictor.bbox_pred.weight.mul_(100)
    before = {name: tensor.clone() for name, tensor in trainer.method.state_dict().items()}
    scores = evals.run(recipe.evals[0], trainer.method, recipe, sets_of(recipe, 0, trainer.indices), trainer.world, 3)
    assert differences(before, dict(trainer.method.state_dict())) == [] and trainer.method.training
    if trainer.world.is_main:
        (folder / f"{trainer.world.world_size}.json").write_text(json.dumps(scores))
        (recipe.folder / "detections-3.npz").rename(folder / f"{trainer.world.world_size}.npz")
    torch.set_num_threads(threads)
    dist.stop()


@pytest.mark.parametrize("precise_bn", [0, 2])
def test_detections_are_scored_the_same_on_any_number_of_ranks(precise_bn, tmp_path):
    evaluate(tmp_path, precise_bn)
    assert run_ranks(2, evaluate, tmp_path, precise_bn) == [0, 0]
    one, two = (json.loads((tmp_path / f"{n}.json").read_text()) for n in (1, 2))
    assert one == two and one["measured"] == 7
    assert {"ap50", "ap", "ap75"} <= one.keys() and any(name.startswith("ap50/") for name in one)
    found, same = (np.load(tmp_path / f"{n}.npz")["detections"] for n in (1, 2))
    assert np.array_equal(found, same) and found.shape[1] == 7 and len(set(found[:, 0])) > 1
    assert found[:, 3:].min() >= 0 and found[:, 3:].max() <= 36  # pixels of the image, not of its 32-pixel view
    assert found[:, 3:].max() > 32


def test_precise_statistics_are_others_than_those_of_training(tmp_path):
    scores = []
    for precise_bn in (0, 3):
        evaluate(tmp_path, precise_bn)
        scores.append(np.load(tmp_path / "1.npz")["detections"])
    assert len(scores[0]) != len(scores[1]) or not np.array_equal(*scores)


def test_a_run_keeps_its_detections(tmp_path):
    recipe = tiny(VOC, tmp_path, "run.duration=2it", "evals.0.every=1it", "evals.0.precise_bn=1")
    run(recipe)
    assert sorted(path.name for path in recipe.folder.glob("*.npz")) == ["detections-1.npz", "detections-2.npz"]
    scored = [row for row in rows(recipe) if row.get("evaluation") == "detection"]
    assert len(scored) == 2 and all(math.isfinite(row["ap50"]) for row in scored)


def test_what_is_frozen_is_not_measured_anew(tmp_path):
    recipe = tiny(VOC, tmp_path, "method.norm=frozen", "evals.0.precise_bn=2")
    trainer = trainer_of(recipe)
    method, seen = trainer.method, []

    def watch(module, args):
        seen.append({name: buffer.clone() for name, buffer in method.named_buffers()})

    before = {name: buffer.clone() for name, buffer in method.named_buffers()}
    method.roi_norm.register_forward_pre_hook(watch)
    evals.run(recipe.evals[0], method, recipe, sets_of(recipe, 0, trainer.indices), trainer.world)
    changed = {name for name, buffer in seen[-1].items() if not torch.equal(buffer, before[name])}
    assert changed and all(name.startswith("roi_norm.") for name in changed)
    assert differences(before, dict(method.named_buffers())) == []


def test_detections_are_drawn(tmp_path, monkeypatch, capsys):
    def draw(*arguments):
        monkeypatch.setattr(sys, "argv", ["show_detections.py", str(tmp_path), *arguments])
        return tool("show_detections").main()

    assert draw() == 2 and "detections-*.npz: no such file, there is none" in capsys.readouterr().err
    Image.new("RGB", (80, 40)).save(tmp_path / "a.png")
    kept = {
        "detections": [[5, 1, 0.9, 10, 10, 30, 30], [5, 0, 0.4, 50, 5, 70, 35]],
        "images": [3, 5],
        "paths": [str(tmp_path / "a.png")] * 2,
        "classes": ["cat", "dog"],
    }
    np.savez(tmp_path / "detections-7.npz", **kept)
    assert draw() == 0
    sheet = np.asarray(Image.open(tmp_path / "detections.png"))
    scale = 320 / 40
    assert sheet.shape[:2] == (324, 2 * (80 * scale + 4))
    second = sheet[:, int(80 * scale) + 4 :]
    assert tuple(second[int(20 * scale), int(10 * scale)]) == (51, 255, 255)  # dog: half around the circle of hues
    assert not sheet[:320, : int(80 * scale)].any() and not second[50:320, int(50 * scale) : int(79 * scale)].any()
    assert draw("--score", "0.3", "--step", "7", "--count", "1", "--out", str(tmp_path / "b.png")) == 0
    assert draw("--step", "8") == 2 and "there are those of steps 7" in capsys.readouterr().err
    (tmp_path / "detections-7.npz").write_bytes(b"PK\3\4")
    assert draw() == 2 and "not the detections of an evaluation, or damaged" in capsys.readouterr().err


def test_a_table_may_ask_for_detection(tmp_path):
    student = tiny("quick/burn_stage2.yaml", tmp_path, "run.duration=1it", "evals=[]")
    state = run(student)["method"]
    changes = probe_of(network_of(student), tiny(VOC, tmp_path), layer="pooled")
    recipe = tiny(VOC, tmp_path, "run.duration=1it", "schedules.lr=0", "evals.0.every=1it", *changes)
    assert recipe.init[0].drop == ("fc",) and recipe.method.backbone.width == student.method.student.width
    found = run(recipe)["method"]
    assert torch.equal(found["backbone.stem.0.weight"], state["student.stem.0.weight"])
    assert final(recipe.folder, "detection", "ap50") >= 0
