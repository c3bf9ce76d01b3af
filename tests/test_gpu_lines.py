"""The lines that only a GPU runs, on any machine: on a device that is not there, by DALI's CPU pipeline, by what
PyTorch is told. What each branch is reached by is listed in docs/gpu.md."""

import contextlib
import itertools
import os
from concurrent.futures import Future
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import loaders
from engine import accelerator, dist, faults, optim, precision, train
from engine import recipe as recipes
from engine.errors import DeviceError, MachineError, RecipeError
from engine.optim import load_state_dict
from engine.recipe import OptimConfig
from loaders import LoaderError, augment, dali_probe
from loaders.contract import CropMemory, HostBatch, on_device
from loaders.host import load_row
from models import binary, cost, halfblock, losses, methods, weight_signs
from models.precision import has_kernels
from tests.fake_gpu import CUDA, Event, Waits, fake_gpu, step_of, trains
from tests.images import write_tree
from tests.loading import config, needs, open_train
from tests.runs import run
from tests.tiny import ROOT, of_each_method, tiny

CPU = torch.device("cpu")
PRECISIONS = ("fp16", "bf16", "off")


# ------------------------------------------------------------------------------------------------ the step


# One of each method and number of views, in every precision, with and without the fused half-blocks of a student. A
# method that takes boxes chooses among them by value, for which the host has to wait.
STEPS = [
    (path, amp, kernels)
    for path, amp in itertools.product(of_each_method(), PRECISIONS)
    if not tiny(path, ROOT).method.takes_boxes
    for kernels in ("torch", "fused")
    if kernels == "torch" or any(n.fusable for n in tiny(path, ROOT).method.networks.values())
]


@pytest.mark.parametrize(
    ("path", "amp", "kernels"), STEPS, ids=[f"{path.stem}-{amp}-{kernels}" for path, amp, kernels in STEPS]
)
def test_a_step_waits_for_nothing_and_mixes_no_devices(path, amp, kernels, tmp_path):
    recipe = tiny(path, tmp_path, "run.device=cuda", f"run.amp={amp}", f"run.kernels={kernels}", "data.micro_batch=16")
    with fake_gpu():
        trainer, waits = step_of(recipe, loads=False)
        assert waits.found == {}
        state = [*trainer.method.parameters(), *trainer.method.buffers(), *trainer.meter._sums.values()]
        assert {tensor.device for tensor in state} == {CUDA}
        assert trainer.optimizer._step_supports_amp_scaling or amp != "fp16"
        # The guard, the log and a checkpoint may wait; the step before is read when it is long done.
        before = Event.waits
        assert trainer.consensus.agreed() == (False, False) and Event.waits == before + 1


@pytest.mark.parametrize("path", ["swav.yaml", "linear.yaml"])
def test_a_step_with_its_loader_waits_for_nothing(path, tmp_path):
    with fake_gpu():
        waits = step_of(tiny(path, tmp_path, "run.device=cuda", "run.amp=fp16", "data.micro_batch=16"))[1]
        assert waits.found == {}


def test_accumulation_waits_for_nothing(tmp_path):
    with fake_gpu():
        trainer, waits = step_of(tiny("burn_stage2.yaml", tmp_path, "run.device=cuda", "run.amp=fp16"))
        assert trainer.micro_steps == 2 and waits.found == {}


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x[:, [0, 1]],
        lambda x: torch.tensor([1.0]).to(CUDA),
        lambda x: torch.tensor([1.0]).to(CUDA, non_blocking=True),
        lambda x: x.cpu(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.copy_(torch.zeros(8, 2)),
        lambda x: bool((x > 0).any()),
    ],
    ids=["item", "list", "blocking", "pageable", "cpu", "nonzero", "mask", "copy_", "bool"],
)
def test_the_fake_device_sees_every_kind_of_wait(wait):
    with fake_gpu():
        x = torch.zeros(8, 2, device=CUDA)
        with Waits() as waits, contextlib.suppress(Exception):
            wait(x)
        assert waits.found
        with pytest.raises(RuntimeError, match="device"), Waits():
            x + torch.zeros(8, 2)


def test_a_list_as_index_of_colors_would_be_found(tmp_path):
    # The fault that this lane was made for: a wait in each micro-batch.
    with fake_gpu():
        color = torch.zeros(8, 2, 9, device=CUDA)
        with Waits() as waits:
            color[:, [0, 1]]
        assert len(waits.found) == 1
        with Waits() as waits:
            color[:, 0:2]
        assert not waits.found


@pytest.mark.parametrize("kernels", ["torch", "fused"])
@pytest.mark.parametrize("estimator", ["burn", "reactnet"])
def test_backwards_stay_on_the_device_and_wait_for_nothing(kernels, estimator):
    # PyTorch's autograd refuses devices that are not there: each backward of ours is called by hand.
    with fake_gpu(), mock.patch.object(halfblock, "has_kernels", lambda x: kernels == "fused" and has_kernels(x)):
        x = torch.randn(4, 16, 8, 8, device=CUDA, dtype=torch.float16).contiguous(memory_format=torch.channels_last)
        weight, scale = torch.randn(16, 16, 3, 3, device=CUDA), torch.rand(16, 1, 1, 1, device=CUDA)
        vector = torch.rand(16, device=CUDA)
        with Waits() as waits:
            found = [
                binary._ACTIVATION[estimator].backward(SimpleNamespace(saved_tensors=(x,)), x),
                binary._WEIGHT[estimator].backward(
                    SimpleNamespace(saved_tensors=(scale if estimator == "burn" else weight,)), weight
                )[0],
            ]
            ctx = SimpleNamespace(saved_tensors=(x, x, *[vector] * 7), options=("same", estimator, True))
            found += halfblock._HalfBlock.backward(ctx, x, x)
            ctx = SimpleNamespace(
                saved_tensors=(vector, *([weight] if estimator == "reactnet" else ())),
                groups=(1,), dtypes=[torch.float32], estimator=estimator,
            )  # fmt: skip
            found += weight_signs._WeightSigns.backward(ctx, vector, weight.half())
        tensors = [tensor for tensor in found if isinstance(tensor, torch.Tensor)]
        assert waits.found == {} and len(tensors) > 8 and {tensor.device for tensor in tensors} == {CUDA}


def graphs_of(module, *inputs):
    """Forward and backward graphs as the compiler gets them."""
    from functorch.compile import aot_module, make_boxed_func

    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    out = aot_module(module, fw_compiler=keep, bw_compiler=keep)(*inputs)
    out.float().sum().backward()
    return graphs


@pytest.mark.parametrize("fused", [False, True])
def test_compiled_graphs_hold_nothing_that_waits(fused):
    from models.reactnet import Config, ReActNet

    network = ReActNet(Config(width=4, multiples=(1, 2, 4, 4))).to(memory_format=torch.channels_last).train()
    network.fused = fused
    images = torch.randn(4, 3, 32, 32, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        graphs = graphs_of(network, images)
    assert len(graphs) == 2
    for graph in graphs:
        calls = [node for node in graph.graph.nodes if node.op == "call_function"]
        names = {getattr(node.target, "overloadpacket", node.target).__name__ for node in calls}
        assert not names & {"_local_scalar_dense", "nonzero", "item", "index_put", "masked_select"}
        # Every constant is made on the network's own device.
        assert {str(node.kwargs["device"]) for node in calls if node.kwargs.get("device")} <= {"cpu"}
        assert len(calls) > 50


# ------------------------------------------------------------------------------------------------ the loader


def test_everything_that_happens_to_a_batch_happens_beside_the_step(tmp_path):
    data = tiny("swav.yaml", tmp_path).data
    index, entered, recorded = loaders.open_data(data, "train"), [], []
    with fake_gpu():
        loader = loaders.open_train(data, index, seed=0, place=loaders.Place(device=CUDA), dtype=torch.float16)
        side, current = loader._side, torch.cuda.current_stream()

        @contextlib.contextmanager
        def stream(which):
            entered.append(which)
            yield
            entered.append("left")

        augments, batches = loader._augment, loader._batches
        loader._augment = lambda *a, **k: entered.append("augments") or augments(*a, **k)
        loader._batches = (entered.append("takes") or batch for batch in batches)

        with (
            mock.patch("torch.cuda.stream", stream),
            mock.patch("torch.Tensor.record_stream", lambda self, s: recorded.append((self, s))),
        ):
            batch = next(loader)
        assert entered == [side, "takes", "augments", "augments", "left"] and current.waited_for[-1] is side
        assert {id(tensor) for tensor, s in recorded if s is current} == {id(t) for t in (*batch.views, batch.label)}
        for view in (*batch.views, batch.label):
            assert view.device == CUDA
        assert {view.dtype for view in batch.views} == {torch.float16} and batch.rows.device == CPU
        assert all(view.is_contiguous(memory_format=torch.channels_last) for view in batch.views)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_views_in_another_precision_are_those_in_float32_rounded_once(dtype, tmp_path):
    data = tiny("swav.yaml", tmp_path).data
    index = loaders.open_data(data, "train")
    one, other = (loaders.open_train(data, index, seed=0, dtype=wanted) for wanted in (None, dtype))
    for a, b in zip(next(one).views, next(other).views, strict=True):
        assert a.dtype == torch.float32 and torch.equal(a.to(dtype), b)


def test_the_frame_for_gpus_rounds_once_too():
    color = torch.rand(4, 9).clamp(max=0.9)
    view = config("synthetic").views[0]
    arguments = (torch.randint(0, 256, (4, 16, 16, 3), dtype=torch.uint8), color, [view], torch.zeros(3), torch.ones(3))
    wide = augment.augment_batch(*arguments)
    assert torch.equal(augment.augment_batch(*arguments, dtype=torch.float16), wide.half())


def test_host_memory_is_pinned_before_it_is_copied():
    with fake_gpu():
        x = torch.zeros(3)
        with Waits() as waits:
            assert on_device(x, CUDA).device == CUDA
            assert on_device(x.pin_memory(), CUDA).device == CUDA
        assert waits.found == {}
    assert on_device(x, CPU) is x


def test_turbo_writes_into_pinned_memory(tree):
    needs("turbo")
    from loaders import turbo
    from loaders.contract import Order

    stream = open_train(config("turbo", tree))._stream
    positions = [[0, 1, 2], [3, 4, 5]]
    wanted = next(turbo.Batches(Order(stream, positions, True, 1, CPU), prefetch=1))
    asked, empty = [], torch.empty

    def pinned(*shape, pin_memory=False, **keys):
        asked.append(pin_memory)
        return empty(*shape, **keys)

    with mock.patch("torch.empty", pinned):
        batches = turbo.Batches(Order(stream, positions, True, 1, CUDA), prefetch=1)
        batch = next(batches)
        batches.close()
    assert asked and all(asked)  # by the threads that fill it, in the context of this rank's GPU
    assert all(torch.equal(a, b) for a, b in zip(batch.crops, wanted.crops, strict=True))


def test_indices_drawn_on_the_host_are_copied_without_a_wait():
    from models.momentum import _without_wait

    with fake_gpu():
        order = torch.arange(8)
        with Waits() as waits:
            assert _without_wait(order, CUDA).device == CUDA
        assert waits.found == {} and _without_wait(order, CPU) is order


# ------------------------------------------------------------------------------------------------ DALI


def dali_batches(tree, **changes):
    """DALI's batches over a tree, with what stands for DALI's own: nothing of ours has a device of its own."""
    needs("dali")
    data = config("dali", tree, **changes)
    loader = open_train(data)
    return loader._batches


def on_fake_gpu(batches):
    """Pretend that the pipeline of some batches decodes on a GPU: PyTorch finds its crops there."""
    batches.device = CUDA
    return batches


def test_dalis_crops_on_a_gpu_are_those_of_the_cpu(tree, monkeypatch):
    # The pipeline is the CPU's and its crops too; every line between them and the batch is the GPU's.
    wanted = next(dali_batches(tree))
    batches = dali_batches(tree)
    batches._feed([batches._plan(next(batches._positions)) for _ in range(3)])
    on_fake_gpu(batches)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: None)
    made, crops = [], CropMemory.crops
    monkeypatch.setattr(CropMemory, "crops", lambda self, count, device: made.append(device) or crops(self, count))
    got = batches._take(batches._fed[0])
    assert made == [CPU] and got[1] == []  # asked for where DALI's crops are
    for a, b in zip(got[0], wanted.crops, strict=True):
        assert torch.equal(a, b)


def test_crops_of_a_gpu_are_made_on_it(tree):
    batches = dali_batches(tree)
    with fake_gpu():
        crops = batches._memory.crops(3, CUDA)
        assert {crop.device for crop in crops} == {CUDA} and crops[0].shape[1] == 3


def test_an_image_from_the_host_joins_those_on_the_gpu(tree):
    batches = on_fake_gpu(dali_batches(tree))
    work = batches._plan(next(batches._positions))
    of_host = Future()
    of_host.set_result(load_row(batches.stream, work.plan, 1, work.positions[1], replace=True))
    work = work._replace(rows=[row for row in work.rows if row != 1], others={1: of_host})
    with fake_gpu(), Waits() as waits:
        crops = [torch.empty(shape, dtype=torch.uint8, device=CUDA) for shape in batches._memory.shapes(len(work.rows))]
        batch = batches._assemble(work, crops)
        assert isinstance(batch, HostBatch) and {crop.device for crop in batch.crops} == {CUDA}
        assert all(crop.shape[1] == len(work.positions) for crop in batch.crops)
        assert waits.found == {}
    # And in their places, with the bits of the CPU.
    batches.device = CPU
    wanted = next(dali_batches(tree))
    of_others = [torch.cat((crop[:, :1], crop[:, 2:]), dim=1) for crop in wanted.crops]
    for a, b in zip(batches._assemble(work, of_others).crops, wanted.crops, strict=True):
        assert ((a.float() - b.float()).abs().mean() <= 2) and torch.equal(a[:, 0], b[:, 0])


class Dead:
    """A pipeline on a machine that has failed."""

    def __init__(self, text):
        self.text = text

    def feed_input(self, *_):
        pass

    def schedule_run(self):
        pass

    def share_outputs(self, **_):
        raise RuntimeError(self.text)


@pytest.mark.parametrize(
    "text",
    [
        "Critical error in pipeline:\nCUDA runtime API error cudaErrorMemoryAllocation (2): out of memory",
        "std::bad_alloc",
        "Can't allocate 123 bytes on device 0.",
        "a text that nobody has seen before",
        "Failed to decode sample #3 : ",
    ],
)
def test_a_fault_of_the_machine_is_no_fault_of_images(tree, monkeypatch, text):
    from loaders import dali_loader

    batches, built = dali_batches(tree), []
    monkeypatch.setattr(dali_loader._Batches, "_build", lambda self, size, depth: built.append(size) or Dead(text))
    with pytest.raises(LoaderError, match="DALI fails, and not for an image: ") as raised:
        next(batches)
    assert "\n" not in str(raised.value) and len(built) <= 3 and LoaderError.exit_code == 6


def test_words_of_a_path_are_no_fault_of_the_machine():
    from loaders import dali_loader

    error = RuntimeError('Critical error\n  File "/home/nvml/libcuda/loader.py", line 3\nFailed to decode sample #5 : ')
    assert dali_loader._said(error) == ["Critical error", "Failed to decode sample #5 :"]
    assert not any(map(dali_loader._OF_THE_MACHINE.search, dali_loader._said(error)))


def test_an_error_that_no_image_repeats_is_the_machines(tree, monkeypatch):
    batches = dali_batches(tree)
    next(batches)

    batches._pipeline = Dead("something passing")
    with pytest.raises(LoaderError, match="something passing"):
        next(batches)


def test_only_the_images_that_fail_are_left_to_the_host(tmp_path, caplog):
    from PIL import Image

    tree = write_tree(tmp_path / "images")
    path = sorted(tree.rglob("*.jpg"))[2]
    size = Image.open(path).size
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])  # a header and half of a picture
    batches = dali_batches(tree, batch_size=8, micro_batch=8)
    seen, first = set(), len(batches._host_only)
    for _ in range(6):
        batch = next(batches)
        seen |= set(batch.rows.tolist())
    index = batches.stream.index
    (culprit,) = (
        batches._host_only - set(index.problems) - {r for r in batches._host_only if index.format[r] != b"JPEG"}
    )
    assert index.path(culprit).endswith(path.name) and first <= len(batches._host_only) <= first + 1 and size
    assert "DALI cannot decode 1 image(s) so far" in caplog.text


VERSIONS = [
    ({"nvidia-dali-cuda120": "2.4.0", "nvidia-nvjpeg-cu12": "12.4.0.76"}, False),
    ({"nvidia-dali-cuda130": "2.4.0", "nvidia-nvjpeg": "13.1.9"}, False),
    ({"nvidia-dali-cuda130": "2.4.0", "nvidia-nvjpeg": "13.2.0"}, True),
    ({"nvidia-dali-cuda130": "2.4.0", "nvidia-nvjpeg": "14.0"}, True),
    ({"nvidia-dali-cuda130": "2.4.0"}, False),
    ({"nvidia-dali-cuda120": "2.4.0", "nvidia-nvjpeg": "13.3.2"}, False),  # PyTorch's own would not be DALI's
]


@pytest.mark.parametrize(("versions", "allowed"), VERSIONS)
def test_regions_are_decoded_where_nvjpeg_may(versions, allowed, monkeypatch):
    from loaders import dali_loader

    def version(package):
        if package not in versions:
            raise dali_loader.metadata.PackageNotFoundError(package)
        return versions[package]

    monkeypatch.setattr(dali_loader.metadata, "version", version)
    assert dali_loader.decodes_regions() is allowed


class Recorder:
    """DALI's operators that only a GPU has, replaced by the CPU's, with what they were asked for."""

    def __init__(self, monkeypatch, regions):
        from nvidia import dali

        from loaders import dali_loader

        self.asked = []
        for name in ("image", "image_slice"):
            monkeypatch.setattr(dali.fn.decoders, name, self.of(name, getattr(dali.fn.decoders, name)))
        pipeline = dali.Pipeline
        monkeypatch.setattr(dali, "Pipeline", lambda **keys: pipeline(**{**keys, "device_id": None}))
        monkeypatch.setattr(dali_loader, "decodes_regions", lambda: regions)

    def of(self, name, operator):
        def call(*inputs, **keys):
            self.asked.append((name, keys))
            gpu = ("hw_decoder_load", "jpeg_fancy_upsampling", "preallocate_width_hint", "preallocate_height_hint")
            return operator(*inputs, **{**{k: v for k, v in keys.items() if k not in gpu}, "device": "cpu"})

        return call


@pytest.mark.parametrize("regions", [False, True])
def test_the_gpus_pipeline_decodes_the_whole_image_or_a_region_with_the_same_pixels(tree, monkeypatch, regions):
    # nvImageCodec hands regions of 4:2:0 images to the host, unless nvJPEG is new enough.
    wanted = [next(dali_batches(tree)) for _ in range(1)]
    with monkeypatch.context() as patch:
        recorder = Recorder(patch, regions)
        patch.setattr(torch.cuda, "current_stream", lambda device=None: None)
        batches = on_fake_gpu(dali_batches(tree))
        got = [next(batches)]
    ((name, keys),) = recorder.asked
    assert name == ("image_slice" if regions else "image") and keys["device"] == "mixed"
    assert keys["jpeg_fancy_upsampling"] is True  # as libjpeg-turbo, which the host and every other back end use
    assert keys["preallocate_width_hint"] > 0
    for a, b in zip(got, wanted, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.crops, b.crops, strict=True))


HOST = """\x1b[0;32m[INFO] \x1b[0m[nvimgcodec] ImageGenericDecoder::decode num_samples=2
\x1b[0;32m[INFO] \x1b[0m[nvimgcodec] 0: libjpeg_turbo_decoder process #0
\x1b[0;32m[INFO] \x1b[0m[nvimgcodec] 0: libjpeg_turbo_decoder process #1
"""
KERNELS = (
    HOST.replace("libjpeg_turbo_decoder", "nvjpeg_cuda_decoder") + "[nvjpeg-ext] nvJPEG version: 12.4.0 (CUDA 12.0)\n"
)
HARDWARE = """[INFO] [nvjpeg-ext] nvJPEG version: 13.3.2 (CUDA version is 13.0)
[INFO] [nvimgcodec] create nvjpeg_hw_decoder load_hint 0.9
[INFO] [nvimgcodec] ImageGenericDecoder::decode num_samples=2
"""


def test_what_the_log_says_of_the_decoder(monkeypatch):
    assert dali_probe.decoder_of("") == ""
    assert dali_probe.read(HOST, CPU) == ("host", "", "")
    assert str(dali_probe.read(HOST, CPU)) == "JPEGs are decoded by the host"
    refused = HOST + "[WARNING] [p] ROI decode with fancy upsampling may produce wrong results, nvJPEG < 13.2\n"
    assert dali_probe.read(refused, CUDA).problem.startswith("ROI decode with fancy upsampling")
    assert dali_probe.read(HARDWARE, CUDA) == ("hardware", "13.3.2", "")
    assert str(dali_probe.read(HARDWARE, CUDA)) == "JPEGs are decoded by the GPU's JPEG decoder (nvJPEG 13.3.2)"
    failed = HARDWARE + "nvjpeg_hw_decoder failed #0. Trying next: nvjpeg_cuda_decoder\n"
    assert dali_probe.decoder_of(failed) == ""

    def no_library(name):
        raise OSError(name)

    monkeypatch.setattr(dali_probe.ctypes, "CDLL", no_library)
    found = dali_probe.read(KERNELS, CUDA)
    assert found.decoder == "CUDA" and found.nvjpeg == "12.4.0"
    assert "NVIDIA_DRIVER_CAPABILITIES=compute,utility,video" in str(found)
    monkeypatch.setattr(dali_probe.ctypes, "CDLL", lambda name: None)
    no_chip = KERNELS + "[nvjpeg-ext] HW decoder not supported by this platform. Skip.\n"
    assert dali_probe.read(no_chip, CUDA).problem == "this GPU has no JPEG decoder that nvJPEG can use"


def test_the_probe_decodes_through_the_loaders_own_pipeline():
    needs("dali")
    assert dali_probe.probe(CPU) == ("host", "", "")
    found = dali_probe.probe(CUDA) if not torch.cuda.is_available() else None
    if found is not None:  # a GPU that is not there: one line
        assert found.decoder == "" and "\n" not in found.problem and str(found).startswith("FAILS: ")


def test_a_run_on_a_gpu_says_once_what_decodes(tree, monkeypatch):
    needs("dali")
    from loaders import dali_loader

    monkeypatch.setattr(dali_loader, "probe", lambda device: dali_probe.read(HARDWARE, device))
    data = config("dali", tree)
    assert loaders.notes(data, CUDA) == [
        "loader dali: on cuda:0 JPEGs are decoded by the GPU's JPEG decoder (nvJPEG 13.3.2)"
    ]
    assert loaders.notes(data, CPU) == [] and loaders.notes(config("folder", tree), CUDA) == []
    assert "on the CPU JPEGs are decoded by" in dali_loader.Options.about()


def test_the_container_lets_the_gpu_decode():
    text = (ROOT / "Dockerfile").read_text()
    assert "NVIDIA_DRIVER_CAPABILITIES=compute,utility,video" in text and "NVIDIA_VISIBLE_DEVICES=all" in text
    assert " g++ " in text  # Inductor's code for the CPU side of a step, and FFCV


# ------------------------------------------------------------------------------------------------ the device


def broken(text):
    def fail(*_, **__):
        raise RuntimeError(text)

    return fail


def test_no_gpu_where_one_is_asked_for(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(accelerator, "_driver", lambda: "")
    monkeypatch.delenv("NVIDIA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(DeviceError, match=r"^run.device: 1 ranks on this machine need a GPU each, found 0; "):
        accelerator.open_device("cuda", 0, 1)
    assert accelerator.open_device("auto", 0, 1) == CPU
    assert accelerator.warning(tiny("byol.yaml", tmp_path).run, CPU) == ""
    monkeypatch.setattr(accelerator, "_driver", lambda: "580.95")  # the kernel has one, the container shows no GPU
    with pytest.raises(DeviceError, match="start the container with --gpus all"):
        accelerator.open_device("cuda", 0, 1)
    assert "start the container with --gpus all" in accelerator.warning(tiny("byol.yaml", tmp_path).run, CPU)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES is empty" in accelerator.warning(tiny("byol.yaml", tmp_path).run, CPU)
    assert accelerator.warning(tiny("byol.yaml", tmp_path, "run.device=cpu").run, CPU) == ""


def test_a_driver_that_is_too_old(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(
        torch.cuda, "set_device", broken("The NVIDIA driver on your system is too old (found 12040).\nx")
    )
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(accelerator, "_driver", lambda: "550.54")
    for wanted in ("auto", "cuda"):
        with pytest.raises(
            DeviceError, match=r"needs driver 580 or newer, found 550.54; .* or set run.device=cpu$"
        ) as e:
            accelerator.open_device(wanted, 0, 1)
        assert "\n" not in str(e.value)
    monkeypatch.setattr(torch.cuda, "set_device", broken("Found no NVIDIA driver on your system. Please check"))
    with pytest.raises(DeviceError, match="cuda:0 cannot be used: this machine has no NVIDIA driver; or set"):
        accelerator.open_device("cuda", 0, 1)
    monkeypatch.setattr(torch.cuda, "set_device", broken("CUDA error: all devices are busy\nmore"))
    with pytest.raises(DeviceError, match=r"cuda:0 cannot be used: CUDA error: all devices are busy; or set"):
        accelerator.open_device("cuda", 0, 1)


def test_doctor_says_in_a_line_why_a_gpu_cannot_be_used(monkeypatch):
    from tests.processes import tool

    doctor = tool("doctor")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", broken("The NVIDIA driver on your system is too old (found 12040)."))
    monkeypatch.setattr(torch.cuda, "get_device_name", broken("the same"))
    found = dict(doctor.facts())
    assert "cannot be used" in found["GPUs"] and "\n" not in found["GPUs"]


@pytest.mark.parametrize(("capability", "falls_back"), [((6, 1), True), ((7, 0), False), ((9, 0), False)])
def test_a_gpu_that_is_too_old_for_the_kernels_runs_without(capability, falls_back, tmp_path):
    recipe = tiny("burn_stage2.yaml", tmp_path, "run.device=cuda", "run.kernels=fused", "run.compile=true")
    with fake_gpu(capability=capability):
        run_config, said = accelerator.usable(recipe.run, CUDA)
        assert (run_config.compile, run_config.kernels) == ((False, "torch") if falls_back else (True, "fused"))
        assert len(said) == 2 * falls_back and all("compute capability 6.1" in line for line in said)
        assert (augment.augmenter(CUDA) is augment.augment_batch) is falls_back
        assert ("emulated" in precision.warning("bf16", CUDA)) is (capability < (8, 0))
        assert precision.warning("fp16", CUDA) == "" and accelerator.usable(recipe.run, CPU)[1] == []


def test_the_compiler_gets_the_cores_of_one_rank(tmp_path, monkeypatch):
    from torch._dynamo import config as dynamo
    from torch._inductor import config as inductor

    monkeypatch.setattr(accelerator.machine, "cores", lambda: 96)
    monkeypatch.setattr(inductor, "compile_threads", 32)
    monkeypatch.setattr(dynamo, "optimize_ddp", True)
    run_config = tiny("burn_stage2.yaml", tmp_path, "run.compile=true", "run.optimize_ddp=false").run
    accelerator.set_up(run_config, CPU, local_world_size=8)
    assert inductor.compile_threads == 12 and dynamo.optimize_ddp is False
    accelerator.set_up(run_config, CPU, local_world_size=1)
    assert inductor.compile_threads == 32


def test_deterministic_sets_every_switch_and_is_part_of_the_identity(tmp_path, monkeypatch):
    from torch._inductor import config as inductor

    for owner, name in ((torch.backends.cudnn, "deterministic"), (torch.backends.cudnn, "benchmark")):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    monkeypatch.setattr(inductor, "deterministic", False)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)

    def switches():
        cudnn = torch.backends.cudnn
        return (
            torch.are_deterministic_algorithms_enabled(),
            cudnn.deterministic,
            cudnn.benchmark,
            inductor.deterministic,
        )

    plain, exact = (tiny("byol.yaml", tmp_path, f"run.deterministic={value}") for value in ("false", "true"))
    try:
        accelerator.set_up(exact.run, CUDA, 1)
        assert switches() == (True, True, False, True)
        assert os.environ.pop("CUBLAS_WORKSPACE_CONFIG") == ":4096:8"
        run(exact)  # no operator of a step refuses
    finally:
        accelerator.set_up(plain.run, CUDA, 1)
    assert switches() == (False, False, True, False)  # cuDNN looks for its fastest
    accelerator.set_up(plain.run, CPU, 1)
    assert not torch.backends.cudnn.benchmark
    with pytest.raises(RecipeError, match=r"run\.deterministic was True, is False"):
        run(plain, resume=True)


def test_the_devices_type_is_part_of_the_identity(tmp_path):
    from engine.resume import check_identity

    recipe = tiny("byol.yaml", tmp_path)
    state = run(recipe)
    assert state["identity"]["device"] == "cpu"
    on_gpu = {**state["identity"], "device": "cuda"}
    with pytest.raises(RecipeError, match="device was cpu, is cuda"):
        check_identity(state, tmp_path, on_gpu, allow_changes=False)
    check_identity(state, tmp_path, on_gpu, allow_changes=True)
    del state["identity"]["device"]  # a checkpoint from before
    check_identity(state, tmp_path, on_gpu, allow_changes=False)


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_a_checkpoint_does_not_say_how_to_compute_an_update(name):
    module = torch.nn.Linear(3, 2)
    cpu, gpu = (optim.build(OptimConfig(name=name), module) for _ in range(2))
    for group in gpu.param_groups:
        group["fused"] = True
    load_state_dict(gpu, cpu.state_dict())
    assert all(group["fused"] is True for group in gpu.param_groups)
    load_state_dict(cpu, gpu.state_dict())
    assert not any(group["fused"] for group in cpu.param_groups)


def test_sgd_whose_first_step_was_skipped_starts_from_zero():
    # PyTorch's fused SGD makes its buffers without writing them when the scaler found an overflow.
    module = torch.nn.Linear(3, 2, bias=False)
    optimizer = optim.build(OptimConfig(name="sgd", momentum=0.9), module)
    assert all((state["momentum_buffer"] == 0).all() for state in optimizer.state.values()) and optimizer.state
    plain = torch.optim.SGD([w := module.weight.detach().clone().requires_grad_()], lr=0.1, momentum=0.9)
    optim.apply(optimizer, 0.1, 0.0)
    for step in range(3):
        gradient = torch.full((2, 3), 0.3 + step)
        module.weight.grad, w.grad = gradient.clone(), gradient.clone()
        optimizer.step(), plain.step()
    assert torch.equal(module.weight, w)


def test_contrast_is_computed_in_float32_under_autocast():
    query, key, queue = (torch.nn.functional.normalize(torch.randn(*s), dim=-1) for s in ((8, 16), (8, 16), (16, 64)))
    wanted = losses.info_nce(query, key, queue, 0.2)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(losses.info_nce(query, key, queue, 0.2)[0], wanted)


# ------------------------------------------------------------------------------------------------ memory


def test_memory_that_ran_out_names_what_would_fit(monkeypatch):
    recipe = recipes.load(
        ROOT / "recipes/burn_stage2.yaml", ["data.backend=synthetic", "data.options={}", "run.amp=fp16"]
    )
    needs_bytes = faults.memory(recipe)
    # step.md 1.2: 88 MB an image in 16 bits, both views; parameters, gradients and two moments.
    assert needs_bytes["per_image"] == pytest.approx(88e6, rel=0.1)
    trained = 38e6
    assert trained * 12 < needs_bytes["state"] < trained * 30
    for gib, best in ((24, 128), (80, None), (8, 32)):
        gpu = SimpleNamespace(total_memory=gib << 30)
        with mock.patch("torch.cuda.get_device_properties", lambda _, gpu=gpu: gpu):
            error = faults.fault(torch.OutOfMemoryError("CUDA out of memory.\nTried"), recipe, CUDA)
            error = error.with_advice(recipe, CUDA)
        assert isinstance(error, MachineError) and "\n" not in str(error) and error.exit_code == 6
        assert "data.micro_batch 256" in str(error) and f"the device has {gib}.0" in str(error)
        if best:
            assert f"data.micro_batch={best} would fit" in str(error), str(error)
    assert faults.largest_micro_batch(recipe, 1 << 30, needs_bytes) is None
    tiny_gpu = faults.fault(MemoryError(), recipe, CPU)
    assert "cpu: out of memory" in str(tiny_gpu)


def test_faults_of_the_machine_are_told_from_bugs(tmp_path):
    recipe = tiny("byol.yaml", tmp_path)
    lost = faults.fault(RuntimeError("CUDA error: an illegal memory access was encountered\nmore"), recipe, CUDA)
    assert str(lost).startswith("cuda:0: CUDA error: an illegal memory access") and "\n" not in str(lost)
    gone = faults.fault(
        RuntimeError("[/pytorch/gloo/transport/tcp/pair.cc:537] Connection closed by peer"), recipe, CPU
    )
    assert "another rank is gone" in str(gone)
    assert faults.fault(RuntimeError("shapes do not match"), recipe, CPU) is None
    assert faults.fault(KeyError("x"), recipe, CPU) is None
    assert faults.is_lost(RuntimeError("CUDA error: x")) and not faults.is_lost(torch.OutOfMemoryError("CUDA error: x"))


def test_the_dry_run_says_what_a_gpu_needs(tmp_path):
    from engine.describe import describe

    recipe = recipes.load(ROOT / "recipes/burn_stage2.yaml", ["run.amp=fp16", f"run.folder={tmp_path}"])
    assert "memory" in describe(recipe) and "GiB on each GPU" in describe(recipe)


# ------------------------------------------------------------------------------------------------ measuring


def test_the_step_benchmark_measures_on_a_gpu(tmp_path, monkeypatch):
    from engine.bench import clock
    from engine.bench import step as step_bench
    from engine.bench.variants import variants

    recipe = tiny("burn_stage2.yaml", tmp_path, "run.device=cuda", "run.amp=fp16", "data.micro_batch=16")
    names = [variant.name for variant in variants(recipe, CUDA)]
    assert names == ["reference", "eager", "compiled", "combo", "fused", "fused, teacher_bn eval"]
    monkeypatch.setattr(step_bench, "kernels", lambda running: 7)  # of PyTorch's profiler
    monkeypatch.setattr(step_bench, "ceilings", lambda device: clock.Ceilings(3e12, 8e14))
    method, sizes = methods.on_meta(recipe.method), [view.size for view in recipe.data.views]
    counted = cost.training_flops(method, sizes), cost.eager_traffic(method, sizes)  # needs no device at all
    monkeypatch.setattr(cost, "training_flops", lambda *_: counted[0])
    monkeypatch.setattr(cost, "eager_traffic", lambda *_: counted[1])
    with fake_gpu(), trains(recipe):
        chosen = [variant for variant in variants(recipe, CUDA) if variant.name == "eager"]
        world, index = dist.World(0, 1, 0, 1, CUDA), loaders.open_data(recipe.data, "train")
        result = step_bench._measure(
            recipe, "train", world, index, chosen, 1, 2, 1, False, lambda result: None, clock.Progress(9)
        )
    timing = result.variants["eager"]
    assert result.device == "a GPU that is not there" and timing.peak_bytes == 2 << 20 and timing.kernels == 7
    assert timing.saved_bytes_per_image > 1000 and timing.of_matmul > 0
    assert timing.phases_ms["augment"] == 1.0 and set(timing.phases_ms) > {"load", "student", "teacher", "optimizer"}
    assert result.verdict.startswith(("compute-bound", "loader-bound", "feed-bound")) and result.train.cores > 0
    assert "16-bit product" in step_bench.table(result)


def test_the_ceilings_of_a_gpu():
    from engine.bench.clock import Phases, ceilings, device_seconds

    with fake_gpu():
        before = Event.waits
        assert device_seconds(lambda: None) == 1e-3 and Event.waits == before + 23
        limits = ceilings(CUDA)
        assert limits.copy_bytes_per_second == 8 * (1 << 29) / 1e-3 and limits.matmul_flops == 2 * 8192**3 / 1e-3
        phases = Phases(CUDA)
        phases.mark("load"), phases.mark("forward"), phases.end_step()
        assert phases.read() == [{"load": 1.0, "forward": 1.0}]
    assert ceilings(CPU) is None


def test_what_a_gpu_that_cannot_be_used_does_to_a_report(monkeypatch):
    from engine.provenance import environment

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", broken("The NVIDIA driver is too old\nmore"))
    assert environment()["gpus"] == ["The NVIDIA driver is too old"]


def test_jobs_of_a_table_get_a_gpu_each(tmp_path, monkeypatch):
    from tests.processes import tool

    compare, seen = tool("compare"), []

    class Process:
        def __init__(self, command, env, **_):
            seen.append(env["CUDA_VISIBLE_DEVICES"])

        def wait(self):
            return 0

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(compare.subprocess, "Popen", Process)
    pool = compare.Pool.__new__(compare.Pool)
    pool.jobs, pool.launcher, pool.running = 3, None, {}
    pool.stopping = SimpleNamespace(is_set=lambda: False)
    job = SimpleNamespace(path=tmp_path / "recipe.yaml", overrides=[])
    for visible, wanted in ((None, ["0", "1", "0"]), ("4,6", ["4", "6", "4"])):
        seen.clear()
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        for number in range(3):
            pool._run_one(job, tmp_path / str(number), "row", number)
        assert seen == wanted


# ------------------------------------------------------------------------------------------------ ranks


def compiled_in_ddp(folder):
    """What DDP makes of the compiled student: graphs and the parameters that each reduces, cut and whole."""
    from torch._dynamo.backends import distributed as of_dynamo

    from tests.runs import open_loader

    seen, honest, compile_ = [], of_dynamo.DDPOptimizer.compile_fn, torch.nn.Module.compile

    def compile_fn(self, graph, example, **keys):
        result = honest(self, graph, example, **keys)
        seen.append([len(bucket.params) for bucket in self.buckets])
        return result

    def without_inductor(self, *arguments, options=None, **keys):
        return compile_(self, *arguments, **{**keys, "backend": "aot_eager"})

    of_dynamo.DDPOptimizer.compile_fn, torch.nn.Module.compile = compile_fn, without_inductor
    sums = []
    with dist.group("cpu", 300) as world:
        for optimize in ("true", "false"):
            torch._dynamo.reset()
            recipe = tiny(
                "supervised_stage2.yaml", folder, "run.device=cpu", "run.compile=true", f"run.optimize_ddp={optimize}",
                "method.backbone.width=16", "method.backbone.multiples=[1, 2, 4, 8, 16]",
            )  # fmt: skip
            trainer = train.Trainer(recipe, world)
            batches = open_loader(trainer)
            trainer.step(batches)
            sums.append(torch.stack([p.detach().double().norm() for p in trainer.method.parameters()]))
    (cut,) = seen  # with `optimize_ddp: false` DDP's part of the compiler is not asked
    assert len(cut) > 1 and sum(cut) > 40, seen
    assert torch.allclose(*sums, rtol=1e-4), (sums[0] - sums[1]).abs().max()


@pytest.mark.slow
def test_ddp_cuts_the_compiled_student_and_changes_no_number(tmp_path):
    from tests.processes import run_ranks

    assert run_ranks(2, compiled_in_ddp, tmp_path) == [0, 0]
