"""`--benchmark step` and `train`: the step that trains, arm beside arm, by phase, against the ceilings of the machine.

Every arm is a `Trainer` of the same recipe with other machinery; nothing here computes a step of its own. Arms take
turns in one process, after gates that they compute the same. The first arm, `reference`, does what the authors' set-up
does and is what speed-ups are quoted against.

On a GPU times come from CUDA events, one synchronisation for each block of steps; on a CPU from the host's clock, where
only ratios mean something and no verdict is given.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import loaders
from engine import dist
from engine.dist import World
from engine.log import environment, logger
from engine.recipe import Recipe
from engine.train import Trainer
from loaders import Batch
from loaders.synthetic_loader import Options as SyntheticOptions
from models import backbones, cost, methods
from models.binary import Shift
from models.reactnet import Config as ReActNetConfig

ROTATING = 4  # batches that stay on the device and take turns
GATE_IMAGES = 4  # BatchNorm on fewer would be a comparison of rounding errors
GATE_TOLERANCE = 1e-7  # of float64: sign flips, where two orders of summation differ in the last bit, are far above it


class Arm(NamedTuple):
    """One way to run the step."""

    name: str
    what: str
    recipe: Recipe
    is_reference: bool = False
    same_maths: bool = True
    """Whether the gate compares it with the reference."""


class NotEqual(RuntimeError):
    """Two arms that should compute the same do not; nothing was timed."""


def _has_binary_student(recipe: Recipe) -> bool:
    networks = [part for part in dict(recipe.method).values() if isinstance(part, ReActNetConfig)]
    return any(network.activations == "binary" for network in networks)


def arms(recipe: Recipe, device: torch.device) -> list[Arm]:
    """The arms for a recipe on a device; `compile` and `channels_last` of the recipe itself do not matter."""
    amp = recipe.run.amp if device.type == "cuda" else "off"

    def variant(**run: Any) -> Recipe:
        return recipe.model_copy(update={"run": recipe.run.model_copy(update={"amp": amp, **run})})

    found = [
        Arm(
            "reference",
            "the authors' set-up: NCHW, float32 shifts in the stream, one kernel for each operator and parameter, "
            "a host wait in each step",
            variant(compile=False, channels_last=False, kernels="torch"),
            is_reference=True,
        ),
        Arm(
            "eager",
            "channels_last, a stream that keeps its precision",
            variant(compile=False, channels_last=True, kernels="torch"),
        ),
        Arm("compiled", "and every backbone compiled", variant(compile=True, channels_last=True, kernels="torch")),
    ]
    if device.type == "cuda":
        what = "and small kernels of one kind made one, those of all weights among them"
        options = {"combo_kernels": True}
        found.append(
            Arm("combo", what, variant(compile=True, compile_options=options, channels_last=True, kernels="torch"))
        )
    if _has_binary_student(recipe):
        what = "and half-blocks of the binary network in one pass"
        found.append(Arm("fused", what, variant(compile=True, channels_last=True, kernels="fused")))
    if getattr(recipe.method, "teacher_bn", None) == "train":
        method = recipe.method.model_copy(update={"teacher_bn": "eval"})
        before = found[-1] if device.type == "cuda" else found[2]  # kernels are for GPUs
        found.append(
            Arm(
                f"{before.name}, teacher_bn eval",
                "and the teacher's own running statistics (other targets than the reference's)",
                before.recipe.model_copy(update={"method": method}),
                same_maths=False,
            )
        )
    return found


# ------------------------------------------------------------------------------------------------ an arm's trainer


class ReferenceShift(Shift):
    """A shift that lifts a 16-bit stream to float32, as the release's does under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to the same shape, in the wider of both precisions."""
        return x + self.bias


def trainer_of(arm: Arm, world: World) -> Trainer:
    """A trainer of the arm on synthetic data, ready to be stepped, its teacher random."""
    recipe = arm.recipe
    options = SyntheticOptions(
        num_images=recipe.data.batch_size,
        num_classes=getattr(recipe.method, "num_classes", 10),
        side=max(view.size for view in recipe.data.views),
    )
    data = {"backend": "synthetic", "options": options, "expect_images": None}
    # Nothing is written; a folder in which nothing can lie is the same on all ranks.
    run = {"folder": os.devnull, "duration": "1000000it", "log_every": "1000000it", "save_every": "1000000it"}
    recipe = recipe.model_copy(
        update={
            "name": "benchmark",
            "data": recipe.data.model_copy(update=data),
            "run": recipe.run.model_copy(update=run),
            "evals": (),
            "init": (),
        }
    )
    with _quiet():  # a random teacher is all that a benchmark needs
        trainer = Trainer(recipe, world)
    if arm.is_reference:
        for module in trainer.method.modules():
            if type(module) is Shift:
                module.__class__ = ReferenceShift
        _one_kernel_for_each_parameter(trainer.optimizer)
    return trainer


def _one_kernel_for_each_parameter(optimizer: torch.optim.Optimizer) -> None:
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]  # a promise of the fused form
    for group in optimizer.param_groups:
        if "fused" in group:
            group.update(fused=False, foreach=False)
        elif "foreach" in group:
            group.update(foreach=False)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


class Resident:
    """Batches of noise that stay on the device, in turn."""

    def __init__(self, recipe: Recipe, device: torch.device, images: int | None = None) -> None:
        size = images or recipe.data.micro_batch
        generator = torch.Generator(device).manual_seed(recipe.seed)
        layout = torch.channels_last if recipe.run.channels_last else torch.contiguous_format
        classes = getattr(recipe.method, "num_classes", 10)
        batches = []
        for _ in range(ROTATING):
            views = [
                torch.randn(size, 3, v.size, v.size, generator=generator, device=device).to(memory_format=layout)
                for v in recipe.data.views
            ]
            label = torch.randint(classes, (size,), generator=generator, device=device)
            batches.append(Batch(views, label, torch.arange(size)))
        self._turns = itertools.cycle(batches)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return next(self._turns)

    def close(self) -> None:
        """Nothing to end."""


# ------------------------------------------------------------------------------------------------ phases


class Phases:
    """Where a step's time goes: marks on the device's stream, read after a block of steps."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []
        self.steps: list[list[tuple[str, Any]]] = []

    def mark(self, phase: str) -> None:
        """A phase begins, the one before ends."""
        if self._cuda:
            now: Any = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self._marks.append((phase, now))

    def end_step(self) -> None:
        """The last phase of a step ends."""
        self.mark("end")
        self.steps.append(self._marks)
        self._marks = []

    def read(self) -> list[dict[str, float]]:
        """Milliseconds by phase of each step since the last reading; waits for the device."""
        if self._cuda:
            torch.cuda.synchronize()
        found = []
        for marks in self.steps:
            times: dict[str, float] = {}
            for (phase, begin), (_, end) in itertools.pairwise(marks):
                ms = begin.elapsed_time(end) if self._cuda else 1000 * (end - begin)
                times[phase] = times.get(phase, 0.0) + ms
            found.append(times)
        self.steps = []
        return found


class _Timed(nn.Module):
    """A part of a method whose call is a phase of its own; what follows in the forward is heads and loss."""

    def __init__(self, part: nn.Module, phase: str, phases: Phases) -> None:
        super().__init__()
        self._call, self._phase, self._phases = part, phase, phases

    def forward(self, images: Tensor) -> Tensor:
        """As the part's own."""
        self._phases.mark(self._phase)
        result = self._call(images)
        self._phases.mark("heads and loss")
        return result


def watch(trainer: Trainer, phases: Phases) -> None:
    """Put the clock into a trainer's step and around the backbones of its method."""
    trainer.mark = phases.mark
    if getattr(trainer.recipe.method, "trains", "all") not in ("all", "linear"):
        return  # they are not called as a whole
    for name, part in list(trainer.method.named_modules()):
        if isinstance(part, backbones.Backbone):
            is_trained = any(parameter.requires_grad for parameter in part.parameters())
            parent = trainer.method.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], _Timed(part, "student" if is_trained else "teacher", phases))


# ------------------------------------------------------------------------------------------------ gates


def gate(all_arms: Sequence[Arm], world: World) -> dict[str, float]:
    """Compare loss and gradients of every arm with the reference's in float64 on one small batch.

    Returns:
        Arm -> largest difference of any gradient relative to the gradient's norm.

    Raises:
        NotEqual: it is above `GATE_TOLERANCE`.
    """
    found: dict[str, float] = {}
    reference: tuple[Tensor, dict[str, Tensor]] | None = None
    for arm in all_arms:
        if not arm.same_maths:
            continue
        torch.set_default_dtype(torch.float64)
        try:
            recipe = arm.recipe.model_copy(update={"run": arm.recipe.run.model_copy(update={"amp": "off"})})
            sizes = {"batch_size": GATE_IMAGES * world.world_size, "micro_batch": GATE_IMAGES}
            data = recipe.data.model_copy(update=sizes)
            recipe = recipe.model_copy(update={"data": data})
            trainer = trainer_of(arm._replace(recipe=recipe), world)
            batch = next(Resident(recipe, world.device))
            loss = trainer.method(batch.views, batch.label, _first_values(trainer))["loss"]
            loss.backward()
        finally:
            torch.set_default_dtype(torch.float32)
        gradients = {n: p.grad for n, p in trainer.method.named_parameters() if p.grad is not None}
        if reference is None:
            reference = loss.detach(), gradients
            continue
        scale = torch.stack([g.norm() for g in reference[1].values()]).norm()
        apart = [(gradients[name] - wanted).abs().max() / scale for name, wanted in reference[1].items()]
        apart.append((loss.detach() - reference[0]).abs() / reference[0].abs().clamp(min=1e-30))
        worst = float(torch.stack(apart).max())  # not a number if any is not
        if not worst <= GATE_TOLERANCE:
            raise NotEqual(f"arm {arm.name} differs from the reference by {worst:.2g} in float64; nothing was timed")
        found[arm.name] = worst
    torch._dynamo.reset()  # the graphs of float64 are not those that are timed
    return found


def _first_values(trainer: Trainer) -> dict[str, Tensor]:
    return {name: torch.tensor(0.5, device=trainer.world.device) for name in trainer.recipe.method.schedules}


# ------------------------------------------------------------------------------------------------ measuring


def device_seconds(work: Callable[[], Any]) -> float:
    """Median time of some work on the GPU."""
    times = []
    for number in range(23):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        if number >= 3:
            times.append(begin.elapsed_time(end) / 1000)
    return median(times)


def ceilings(device: torch.device) -> dict[str, float] | None:
    """Bytes per second of a large copy (read and written) and FLOP/s of a large 16-bit product, None on a CPU."""
    if device.type != "cuda":
        return None

    def copy_time() -> float:
        source = torch.randn(1 << 29, device=device)
        target = torch.empty_like(source)
        return device_seconds(lambda: target.copy_(source))

    copy = 2 * 4 * (1 << 29) / copy_time()
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.float16) for _ in range(2))
    matmul = 2 * 8192**3 / device_seconds(lambda: a @ b)
    return {"copy_bytes_per_second": copy, "matmul_flops": matmul}


class Running:
    """An arm that is being timed."""

    def __init__(self, arm: Arm, world: World) -> None:
        self.arm = arm
        self.trainer = trainer_of(arm, world)
        self.phases = Phases(world.device)
        self.blocks: list[list[dict[str, float]]] = []

    def feed(self, batches: Any) -> None:
        """Take batches from here from now on."""
        self.trainer.loader = batches

    def run(self, steps: int) -> list[dict[str, float]]:
        """Some steps; milliseconds by phase of each."""
        for _ in range(steps):
            bad = self.trainer.step()
            self.trainer.steps_done += 1
            if self.arm.is_reference:
                bool(bad)  # the release reads its loss in every iteration
            self.phases.end_step()
        return self.phases.read()


def saved_bytes(trainer: Trainer, batch: Batch) -> int:
    """Bytes that one forward pass keeps for the backward, beside parameters and images."""
    views = trainer.inputs(batch)
    given = (*trainer.method.parameters(), *trainer.method.buffers(), *views)
    there = {tensor.untyped_storage().data_ptr() for tensor in given}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in there:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    amp = trainer.amp_dtype
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast(trainer.world.device.type, amp, enabled=amp is not None):
            loss = trainer.method(views, batch.label, _first_values(trainer))["loss"]
    del loss
    return sum(storages.values())


def kernels(running: Running) -> int | None:
    """Kernels of one step on a GPU, None on a CPU."""
    if running.trainer.world.device.type != "cuda":
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        running.run(1)
    kind = torch.autograd.DeviceType.CUDA
    return sum(1 for event in profile.events() if event.device_type == kind)


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Median, p10 and p90."""
    ranked = sorted(values)
    last = len(ranked) - 1
    return {"median": median(ranked), "p10": ranked[round(0.1 * last)], "p90": ranked[round(0.9 * last)]}


def measure(recipe: Recipe, mode: str, *, steps: int = 8, rounds: int = 4, warm_up: int = 4) -> dict[str, Any]:
    """Time the step of a recipe.

    Args:
        mode: `step` on batches that stay on the device, `train` with the recipe's own loader too.
        steps: of each arm in each turn.
        rounds: turns.
        warm_up: steps of each arm before, in which it is compiled.

    Returns:
        Plain data for JSON.

    Raises:
        NotEqual: an arm computes something else than the reference.
    """
    world = dist.start(recipe.run.device, recipe.run.timeout_seconds)
    try:
        return _measure(recipe, mode, world, steps, rounds, warm_up)
    finally:
        dist.stop()


def _measure(recipe: Recipe, mode: str, world: World, steps: int, rounds: int, warm_up: int) -> dict[str, Any]:
    device, batch = world.device, recipe.data.batch_size
    chosen = arms(recipe, device)
    limits = ceilings(device)
    equal = gate(chosen, world)
    running: list[Running] = []
    details: dict[str, dict[str, Any]] = {}
    for arm in chosen:
        before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        one = Running(arm, world)
        running.append(one)
        one.feed(Resident(one.arm.recipe, device))
        one.run(warm_up)
        details[one.arm.name] = {
            "peak_bytes": torch.cuda.max_memory_allocated() - before if device.type == "cuda" else None,
            "kernels": kernels(one),
            "saved_bytes_per_image": saved_bytes(one.trainer, next(Resident(one.arm.recipe, device)))
            / recipe.data.micro_batch,
        }
        watch(one.trainer, one.phases)
        one.run(1)  # wrapped parts are compiled anew where a guard says so
    for _, one in itertools.product(range(rounds), running):
        one.blocks.append(one.run(steps))
    result: dict[str, Any] = {
        "mode": mode,
        "recipe": recipe.name,
        "recipe_hash": recipe.hash,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "ranks": world.world_size,
        "batch": batch,
        "micro_batch": recipe.data.micro_batch,
        "amp": chosen[0].recipe.run.amp,
        "ceilings": limits,
        "largest_difference_in_float64": equal,
        "arms": {},
        "environment": environment(),
    }
    method, sizes = methods.on_meta(recipe.method), [view.size for view in recipe.data.views]
    flops = cost.training_flops(method, sizes)
    base = [sum(step.values()) for block in running[0].blocks for step in block]
    for one in running:
        result["arms"][one.arm.name] = _summary(one, base, batch, flops, limits) | details[one.arm.name]
    result["gflop_per_image"] = flops / 1e9
    result["predicted"] = cost.predictions(flops, cost.eager_traffic(method, sizes))
    if mode == "train":
        fastest = max(running, key=lambda one: result["arms"][one.arm.name]["images_per_second"] * one.arm.same_maths)
        result["train"] = _train(recipe, fastest, world, steps, rounds, warm_up)
        result["verdict"] = verdict(result["train"]) if device.type == "cuda" else "none: a CPU's times are ratios only"
    return result


def _summary(
    one: Running, base: list[float], batch: int, flops: float, limits: dict[str, float] | None
) -> dict[str, Any]:
    all_steps = [step for block in one.blocks for step in block]
    times = [sum(step.values()) for step in all_steps]
    half = len(times) // 2
    speed = 1000 * batch / median(times)
    names = list(dict.fromkeys(name for step in all_steps for name in step))
    return {
        "what": one.arm.what,
        "step_ms": quantiles(times),
        # What two halves of one arm differ by is noise; a gain below it is none.
        "noise": abs(median(times[:half]) - median(times[half:])) / median(times),
        "images_per_second": speed,
        "times_reference": median(base) / median(times),
        "phases_ms": {name: median(step.get(name, 0.0) for step in all_steps) for name in names},
        "tflops": speed * flops / 1e12,
        "of_matmul": speed * flops / limits["matmul_flops"] / one.trainer.world.world_size if limits else None,
    }


def _train(recipe: Recipe, one: Running, world: World, steps: int, rounds: int, warm_up: int) -> dict[str, Any]:
    """The same arm with resident batches and with the loader, in turn, and the loader with nothing behind it."""
    batch = recipe.data.batch_size
    index = loaders.open_data(recipe.data, "train")

    def open_loader() -> Any:
        return loaders.open_train(
            recipe.data,
            index,
            seed=recipe.seed,
            step=0,
            rank=world.rank,
            world_size=world.world_size,
            local_world_size=world.local_world_size,
            device=world.device,
        )

    resident, loader = Resident(one.arm.recipe, world.device), open_loader()
    synthetic: list[float] = []
    fed: list[dict[str, float]] = []
    one.feed(loader)
    one.run(warm_up)
    for _ in range(rounds):
        one.feed(resident)
        synthetic += [sum(step.values()) for step in one.run(steps)]
        one.feed(loader)
        fed += one.run(steps)
    micro_steps = one.trainer.micro_steps
    alone = []
    for _ in range(rounds):
        started = time.perf_counter()
        for _ in range(steps * micro_steps):
            next(loader)
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        alone.append(1000 * (time.perf_counter() - started) / steps)
    loader.close()
    speeds = {
        "synthetic": 1000 * batch / median(synthetic),
        "with_loader": 1000 * batch / median(sum(step.values()) for step in fed),
        "loader_alone": 1000 * batch / median(alone),
    }
    return {
        "arm": one.arm.name,
        "backend": recipe.data.backend,
        "images_per_second": speeds,
        "with_loader_over_synthetic": speeds["with_loader"] / speeds["synthetic"],
        "step_ms": quantiles([sum(step.values()) for step in fed]),
        "load_ms": quantiles([step["load"] for step in fed]),
    }


def verdict(measured: dict[str, Any]) -> str:
    """What to make faster: the loader, its hand-over, or the computation."""
    speed = measured["images_per_second"]
    if measured["with_loader_over_synthetic"] >= 0.97:
        return f"compute-bound: the loader could feed {speed['loader_alone'] / speed['synthetic']:.2f} times as much"
    if speed["loader_alone"] < 0.95 * speed["synthetic"]:
        return (
            f"loader-bound: {speed['loader_alone']:.0f} images/s alone against {speed['synthetic']:.0f} of computation"
        )
    return "feed-bound: the loader is fast enough, copying, augmenting or waiting for the host is not"


# ------------------------------------------------------------------------------------------------ for people


def table(result: dict[str, Any]) -> str:
    """The result in Markdown."""
    phases = list(dict.fromkeys(name for arm in result["arms"].values() for name in arm["phases_ms"]))
    lines = [
        f"{result['recipe']}: batch {result['batch']} in micro-batches of {result['micro_batch']}, {result['ranks']} x "
        f"{result['device']}, amp {result['amp']}, {result['gflop_per_image']:.2f} GFLOP an image",
    ]
    if result["ceilings"]:
        copy, matmul = result["ceilings"]["copy_bytes_per_second"], result["ceilings"]["matmul_flops"]
        lines.append(f"ceilings of this call: copy {copy / 1e12:.2f} TB/s, 16-bit product {matmul / 1e12:.0f} TFLOP/s")
    else:
        lines.append("on a CPU: ratios mean something, absolute times do not, and there is no verdict")
    lines += [
        "",
        f"| arm | images/s | step ms (p10 to p90) | x reference | noise | {' | '.join(f'{p}, ms' for p in phases)} "
        "| TFLOP/s | saved MB an image | peak GiB | kernels |",
        "|---" * (9 + len(phases)) + "|",
    ]
    for name, arm in result["arms"].items():
        step = arm["step_ms"]
        share = f" ({100 * arm['of_matmul']:.0f} % of the product)" if arm["of_matmul"] else ""
        cells = [
            name,
            f"{arm['images_per_second']:.1f}",
            f"{step['median']:.1f} ({step['p10']:.1f} to {step['p90']:.1f})",
            f"{arm['times_reference']:.2f}",
            f"{100 * arm['noise']:.1f} %",
            *(f"{arm['phases_ms'].get(phase, 0.0):.1f}" for phase in phases),
            f"{arm['tflops']:.2f}{share}",
            f"{arm['saved_bytes_per_image'] / 1e6:.2f}",
            f"{arm['peak_bytes'] / 2**30:.1f}" if arm["peak_bytes"] else "",
            str(arm["kernels"] or ""),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *(f"{name}: {arm['what']}" for name, arm in result["arms"].items())]
    foreseen = ", ".join(f"{gpu} {speed:,.0f}" for gpu, speed in result["predicted"].items())
    lines += ["", f"predicted for the compiled step, images/s on one GPU (models/cost.py): {foreseen}"]
    if train := result.get("train"):
        speed = train["images_per_second"]
        lines += [
            "",
            f"{train['arm']} with loader {train['backend']}: {speed['with_loader']:.1f} images/s, "
            f"{speed['synthetic']:.1f} on resident batches ({100 * train['with_loader_over_synthetic']:.0f} %), "
            f"the loader alone {speed['loader_alone']:.1f}",
            f"verdict: {result['verdict']}",
        ]
    return "\n".join(lines)
