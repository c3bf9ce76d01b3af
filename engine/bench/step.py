"""`--benchmark step` and `train`: the step that trains, its variants interleaved, by phase, against the ceilings of the
machine.

On a GPU times come from CUDA events, one synchronization per block of steps; on a CPU from the host's clock, where only
ratios mean something and no verdict is given.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import loaders
from engine import dist, faults
from engine.bench.clock import (
    MOST_NOISE,
    WARM_UP,
    Ceilings,
    Phases,
    Progress,
    ceilings,
    cpu_seconds,
    median_range,
    quantiles,
)
from engine.bench.variants import Resident, Variant, gate, half_way, variants
from engine.dist import World
from engine.errors import first_line
from engine.log import duration, logger, rate
from engine.provenance import environment
from engine.recipe import Recipe
from engine.train import Trainer
from loaders import Batch, Index
from models import cost, methods
from models.backbones import backbones_of

LEAST_GAP = 0.03
"""Share of the speed below which a difference is nobody's fault."""


class _Timed(nn.Module):
    """A backbone of a method whose call is a phase of its own; what follows in the forward is heads and loss. All else
    that a method may ask of the backbone, it answers itself."""

    def __init__(self, part: nn.Module, phase: str, phases: Phases) -> None:
        super().__init__()
        self._call, self._phase, self._phases = part, phase, phases

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("_call"), name)

    def forward(self, images: Tensor) -> Tensor:
        """As the part's own."""
        self._phases.mark(self._phase)
        result = self._call(images)
        self._phases.mark("heads and loss")
        return result


def watch(trainer: Trainer, phases: Phases) -> None:
    """Put the clock around the backbones of a trainer's method too."""
    for name, part in backbones_of(trainer.method).items():
        is_trained = any(parameter.requires_grad for parameter in part.parameters())
        parent = trainer.method.get_submodule(name.rpartition(".")[0])
        setattr(parent, name.rpartition(".")[2], _Timed(part, "student" if is_trained else "teacher", phases))


class Running:
    """A variant that is being timed."""

    def __init__(self, variant: Variant, world: World) -> None:
        self.variant = variant
        self.trainer = variant.trainer(world)
        self.phases = Phases(world.device)
        self.trainer.mark = self.phases.mark
        # As the loader hands views over; the release casts them in each network.
        dtype = None if variant.is_reference else self.trainer.amp_dtype
        self.resident = Resident(variant.recipe, world.device, dtype=dtype)
        self.blocks: list[list[dict[str, float]]] = []
        """For each round, milliseconds by phase of each step."""

    def run(self, steps: int, batches: Iterator[Batch] | None = None) -> list[dict[str, float]]:
        """Some steps, on resident batches by default; milliseconds by phase of each."""
        for _ in range(steps):
            bad = self.trainer.step(batches or self.resident)
            if self.variant.is_reference:
                bool(bad)  # the release reads its loss in every iteration
            self.phases.end_step()
        return self.phases.read()


class Augmented:
    """Batches of resident crops, each augmented anew, as a phase of its own: on a GPU what the step waits for it."""

    def __init__(self, running: Running) -> None:
        trainer = running.trainer
        data, place = trainer.recipe.data, trainer.world.place
        index = trainer.indices["train"]
        self._mark = running.phases.mark
        self._loader = loaders.open_resident(
            data, index, count=1, seed=trainer.recipe.seed, place=place, dtype=trainer.amp_dtype
        )

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        self._mark("augment")
        return next(self._loader)


def images_per_second(recipe: Recipe, world: World, *, warm_up: int, steps: int) -> float:
    """Speed of a recipe's step, unchanged, all ranks together, on batches that stay on the device."""
    running = Running(Variant("as it stands", "", recipe), world)
    running.run(warm_up)
    return 1000 * recipe.data.batch_size / median(sum(step.values()) for step in running.run(steps))


def with_and_without_loader(recipe: Recipe, world: World, *, steps: int) -> tuple[float, float]:
    """Speed of a recipe's step on this rank, on batches that stay on the device and fed by its loader, which then works
    on the same cores. The loader's first batches, made while nothing trained, do not count."""
    running = Running(Variant("as it stands", "", recipe), world)
    index = loaders.open_data(recipe.data, "train")
    running.run(1)
    alone = running.run(steps)
    loader = loaders.open_train(
        recipe.data, index, seed=recipe.seed, place=world.place, dtype=running.trainer.amp_dtype
    )
    try:
        running.run(WARM_UP, loader)
        fed = running.run(2 * steps, loader)
    finally:
        loader.close()
    batch = recipe.data.batch_size
    waits = sum(sum(step.values()) for step in fed) / len(fed)  # a mean: every n-th step may wait for all n
    return 1000 * batch / median(sum(step.values()) for step in alone), 1000 * batch / waits


def saved_bytes(trainer: Trainer, batch: Batch) -> int:
    """Bytes that one forward pass keeps for the backward, besides parameters and images."""
    views = trainer.inputs(batch)
    given = (*trainer.method.parameters(), *trainer.method.buffers(), *views)
    there = {tensor.untyped_storage()._cdata for tensor in given}
    storages: dict[int, tuple[int, Any]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in there:
            storages[storage._cdata] = storage.nbytes(), storage  # held, so that no other gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with trainer.autocast():
            loss = trainer.method(views, batch.label, half_way(trainer))["loss"]
    del loss
    return sum(size for size, _ in storages.values())


def kernels(running: Running) -> int | None:
    """Kernels of one step on a GPU, None on a CPU."""
    if running.trainer.world.device.type != "cuda":
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        running.run(1)
    kind = torch.autograd.DeviceType.CUDA
    return sum(1 for event in profile.events() if event.device_type == kind)


@dataclass
class Timing:
    """What one variant gave."""

    what: str
    step_ms: dict[str, float]
    noise: float | None
    """What two halves of its steps differ by, as a share; a gain below it does not count."""
    images_per_second: float
    times_reference: list[float] | None
    """Speed over the reference's, one ratio for each round in which both ran one after the other; None where the noise
    of either is above `MOST_NOISE`."""
    phases_ms: dict[str, float]
    tflops: float
    of_matmul: float | None
    saved_bytes_per_image: float
    peak_bytes: int | None = None
    kernels: int | None = None


@dataclass
class WithLoader:
    """The fastest variant fed by the recipe's loader, by resident views, by resident crops that are augmented, and the
    loader with nothing behind it."""

    variant: str
    backend: str
    images_per_second: dict[str, float]
    with_loader_over_resident: list[float]
    """One ratio for each round, in which both ran one after the other."""
    noise: float
    """What two halves of the resident steps or of the augmented ones differ by, as a share; above `MOST_NOISE` there is
    no verdict."""
    cores: float
    """CPU cores busy, of all processes of this rank, with the loader."""
    step_ms: dict[str, float]
    load_ms: dict[str, float]


@dataclass
class Result:
    """What `--benchmark step` or `train` measured."""

    mode: str
    recipe: str
    recipe_hash: str
    device: str
    ranks: int
    batch: int
    micro_batch: int
    amp: str
    ceilings: Ceilings | None
    largest_difference_in_float64: dict[str, float]
    gflop_per_image: float
    predicted: dict[str, float]
    variants: dict[str, Timing] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    """Variant -> why it could not be run."""
    train: WithLoader | None = None
    verdict: str = ""
    environment: dict[str, Any] = field(default_factory=environment)


def measure(
    recipe: Recipe,
    mode: str,
    *,
    steps: int = 8,
    rounds: int = 4,
    warm_up: int = 4,
    checks: bool = True,
    only: Sequence[str] = (),
    keep: Callable[[Result], None] = lambda result: None,
) -> Result:
    """Time the step of a recipe.

    Args:
        mode: `step` on batches that stay on the device, `train` with the recipe's own loader too.
        steps: of each variant in each round.
        rounds: of all variants.
        warm_up: steps of each variant before timing, in which it is compiled.
        checks: compare the variants in float64 first.
        only: names of variants, all by default; the reference is always among them.
        keep: called with what is measured so far after each round.

    Raises:
        NotEqual: a variant computes something other than the reference.
    """
    with dist.group(recipe.run.device, recipe.run.timeout_seconds) as world:
        index = loaders.open_data(recipe.data, "train") if mode == "train" else None
        chosen = variants(recipe, world.device)
        chosen = [variant for variant in chosen if not only or variant.is_reference or variant.name in only]
        parts = checks + len(chosen) + rounds + 1 + (1 + rounds if mode == "train" else 0)
        with Progress(parts) as progress:
            return _measure(recipe, mode, world, index, chosen, steps, rounds, warm_up, checks, keep, progress)


def _measure(
    recipe: Recipe,
    mode: str,
    world: World,
    index: Index | None,
    chosen: list[Variant],
    steps: int,
    rounds: int,
    warm_up: int,
    checks: bool,
    keep: Callable[[Result], None],
    progress: Progress,
) -> Result:
    device = world.device
    method, sizes = methods.on_meta(recipe.method), [view.size for view in recipe.data.views]
    flops = cost.training_flops(method, sizes)
    logger.info(f"{recipe.name}: {len(chosen)} variants of the step on {device}: {', '.join(v.name for v in chosen)}")
    if checks:
        progress.begin("checking the variants against the reference in float64")
    result = Result(
        mode=mode,
        recipe=recipe.name,
        recipe_hash=recipe.hash,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        ranks=world.world_size,
        batch=recipe.data.batch_size,
        micro_batch=recipe.data.micro_batch,
        amp=chosen[0].recipe.run.amp,
        ceilings=ceilings(device),
        largest_difference_in_float64=gate(chosen, world) if checks else {},
        gflop_per_image=flops / 1e9,
        predicted=cost.predictions(flops, cost.eager_traffic(method, sizes)),
    )
    running, details = [], []
    for number, variant in enumerate(chosen, 1):
        started = time.perf_counter()
        how = "compiling and warming up" if variant.recipe.run.compile else "warming up"
        progress.begin(f"{how} {variant.name} ({number} of {len(chosen)})")
        try:
            one, numbers = _warm_up(variant, world, warm_up)
        except Exception as error:
            # One that does not compile, or does not fit beside the others, must not cost the rest.
            if variant.is_reference or world.world_size > 1 or faults.is_lost(error):
                raise
            result.failed[variant.name] = first_line(error)
            logger.warning(f"{variant.name} cannot be run: {first_line(error)}")
            continue
        running.append(one)
        details.append(numbers)
        logger.info(f"{variant.name} is ready after {duration(time.perf_counter() - started)}")
    for number in range(rounds):
        progress.begin(f"timing round {number + 1} of {rounds}")
        for one in running:
            one.blocks.append(one.run(steps))
        for one, numbers in zip(running, details, strict=True):
            result.variants[one.variant.name] = _timing(one, running[0], result, numbers)
        keep(result)
    progress.begin("timing the augmentation")
    for one in running:
        fed = one.run(steps, Augmented(one))
        result.variants[one.variant.name].phases_ms["augment"] = median(step["augment"] for step in fed)
    if index is not None:
        fastest = max(
            running, key=lambda one: result.variants[one.variant.name].images_per_second * one.variant.same_maths
        )
        result.train = _with_loader(recipe, index, fastest, world, steps, rounds, warm_up, progress)
        result.verdict = verdict(result.train) if device.type == "cuda" else "none: a CPU's times are ratios only"
    keep(result)
    return result


def _warm_up(variant: Variant, world: World, steps: int) -> tuple[Running, dict[str, Any]]:
    on_gpu = world.device.type == "cuda"
    before = torch.cuda.memory_allocated() if on_gpu else 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    running = Running(variant, world)
    running.run(steps)
    numbers = {
        "peak_bytes": torch.cuda.max_memory_allocated() - before if on_gpu else None,
        "kernels": kernels(running),
        "saved_bytes_per_image": saved_bytes(running.trainer, next(running.resident)) / variant.recipe.data.micro_batch,
    }
    watch(running.trainer, running.phases)
    running.run(1)  # wrapped parts are recompiled where a guard says so
    return running, numbers


def _timing(one: Running, reference: Running, result: Result, numbers: dict[str, Any]) -> Timing:
    all_steps = [step for block in one.blocks for step in block]
    times = _sums(all_steps)
    speed = 1000 * result.batch / median(times)
    names = list(dict.fromkeys(name for step in all_steps for name in step))
    flops, limits = 1e9 * result.gflop_per_image, result.ceilings
    noises = _noise(one), _noise(reference)
    is_quiet = all(noise is not None and noise <= MOST_NOISE for noise in noises)
    return Timing(
        what=one.variant.what,
        step_ms=quantiles(times),
        noise=noises[0],
        images_per_second=speed,
        times_reference=_paired_ratios(reference.blocks, one.blocks) if is_quiet else None,
        phases_ms={name: median(step.get(name, 0.0) for step in all_steps) for name in names},
        tflops=speed * flops / 1e12,
        of_matmul=speed * flops / limits.matmul_flops / result.ranks if limits else None,
        **numbers,
    )


def _noise(one: Running) -> float | None:
    return _between_halves(_sums(chain(*one.blocks)))


def _sums(steps: Iterable[dict[str, float]]) -> list[float]:
    return [sum(step.values()) for step in steps]


def _between_halves(times: list[float]) -> float | None:
    half = len(times) // 2
    if not half:
        return None
    return abs(median(times[:half]) - median(times[half:])) / median(times)


def _paired_ratios(slow: list[list[dict[str, float]]], fast: list[list[dict[str, float]]]) -> list[float]:
    return [median(_sums(a)) / median(_sums(b)) for a, b in zip(slow, fast, strict=True)]


def _with_loader(
    recipe: Recipe, index: Index, one: Running, world: World, steps: int, rounds: int, warm_up: int, progress: Progress
) -> WithLoader:
    batch, micro_steps = recipe.data.batch_size, one.trainer.micro_steps
    loader = loaders.open_train(recipe.data, index, seed=recipe.seed, place=world.place, dtype=one.trainer.amp_dtype)
    crops = Augmented(one)
    resident: list[list[float]] = []
    augmented: list[list[float]] = []
    fed: list[list[dict[str, float]]] = []
    alone: list[float] = []
    busy: list[float] = []
    one.run(warm_up, loader)
    for number in range(rounds):
        progress.begin(f"with and without the loader, round {number + 1} of {rounds}")
        resident.append(_sums(one.run(steps)))
        augmented.append(_sums(one.run(steps, crops)))
        cpu, started = cpu_seconds(), time.perf_counter()
        fed.append(one.run(steps, loader))
        busy.append((cpu_seconds() - cpu) / (time.perf_counter() - started))
    progress.begin("the loader alone")
    for _ in range(rounds):
        started = time.perf_counter()
        for _ in range(steps * micro_steps):
            next(loader)
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        alone.append(1000 * (time.perf_counter() - started) / steps)
    loader.close()
    speeds = {
        "resident": 1000 * batch / median(chain(*resident)),
        "augmented": 1000 * batch / median(chain(*augmented)),
        "with_loader": 1000 * batch / median(_sums(chain(*fed))),
        "loader_alone": 1000 * batch / median(alone),
    }
    return WithLoader(
        variant=one.variant.name,
        backend=recipe.data.backend,
        images_per_second=speeds,
        with_loader_over_resident=[median(a) / median(_sums(b)) for a, b in zip(resident, fed, strict=True)],
        noise=max(_between_halves(list(chain(*blocks))) or 0.0 for blocks in (resident, augmented)),
        cores=median(busy),
        step_ms=quantiles(_sums(chain(*fed))),
        load_ms=quantiles([step["load"] for step in chain(*fed)]),
    )


def verdict(measured: WithLoader) -> str:
    """What to make faster: the loader, the transfer of its batches, or the computation.

    The measure is the same step on crops that lie on the device: whatever is slower than that by more than
    `LEAST_GAP`, or than what this measurement's own halves differ by, is the loader's doing.
    """
    speed = measured.images_per_second
    if measured.noise > MOST_NOISE:
        return f"none: two halves of the steps differ by {100 * measured.noise:.0f} %; measure again on a quiet machine"
    gap = max(LEAST_GAP, measured.noise)
    if speed["with_loader"] >= (1 - gap) * speed["augmented"]:
        share = 1 - speed["augmented"] / speed["resident"]
        return (
            f"compute-bound: the loader could feed {speed['loader_alone'] / speed['resident']:.2f} times as much; the "
            f"augmentation takes {100 * max(share, 0.0):.0f} % of the step"
        )
    if speed["loader_alone"] < (1 - gap) * speed["augmented"]:
        alone, computed = rate(speed["loader_alone"]), rate(speed["augmented"])
        return f"loader-bound: {alone} images/s alone against {computed} of computation"
    return "feed-bound: the loader is fast enough, copying or waiting for the host is not"


def table(result: Result) -> str:
    """The result for people, in Markdown."""
    phases = list(dict.fromkeys(name for timing in result.variants.values() for name in timing.phases_ms))
    lines = [
        f"{result.recipe}: batch {result.batch} in micro-batches of {result.micro_batch}, {result.ranks} x "
        f"{result.device}, amp {result.amp}, {result.gflop_per_image:.2f} GFLOP per image",
    ]
    if limits := result.ceilings:
        lines.append(
            f"ceilings of this call: copy {limits.copy_bytes_per_second / 1e12:.2f} TB/s, 16-bit product "
            f"{limits.matmul_flops / 1e12:.0f} TFLOP/s"
        )
    else:
        lines.append("on a CPU: ratios mean something, absolute times do not, and there is no verdict")
    lines += [
        "",
        "| variant | images/s | step ms (p10 to p90) | x reference, paired rounds | noise | "
        f"{' | '.join(f'{p}, ms' for p in phases)} | TFLOP/s | saved MB per image | peak GiB | kernels |",
        "|---" * (9 + len(phases)) + "|",
    ]
    for name, timing in result.variants.items():
        step = timing.step_ms
        share = f" ({100 * timing.of_matmul:.0f} % of the product)" if timing.of_matmul else ""
        cells = [
            name,
            rate(timing.images_per_second),
            f"{step['median']:.1f} ({step['p10']:.1f} to {step['p90']:.1f})",
            median_range(timing.times_reference) if timing.times_reference else "too noisy",
            "unknown" if timing.noise is None else f"{100 * timing.noise:.1f} %",
            *(f"{timing.phases_ms.get(phase, 0.0):.1f}" for phase in phases),
            f"{timing.tflops:.2f}{share}",
            f"{timing.saved_bytes_per_image / 1e6:.2f}",
            f"{timing.peak_bytes / 2**30:.1f}" if timing.peak_bytes else "",
            str(timing.kernels or ""),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *(f"{name}: {timing.what}" for name, timing in result.variants.items())]
    lines += [f"{name} could not be run: {why}" for name, why in result.failed.items()]
    if any(timing.times_reference is None for timing in result.variants.values()):
        lines.append(
            f"too noisy: two halves of the steps differ by more than {100 * MOST_NOISE:.0f} %, so no ratio is given; "
            "measure again on a quiet machine"
        )
    predicted = ", ".join(f"{gpu} {rate(speed)}" for gpu, speed in result.predicted.items())
    lines += ["", f"predicted for the compiled step, images/s on one GPU (models/cost.py): {predicted}"]
    if train := result.train:
        speed = train.images_per_second
        ratio = median_range(train.with_loader_over_resident) if train.noise <= MOST_NOISE else "too noisy a share"
        lines += [
            "",
            f"{train.variant} with loader {train.backend}: {rate(speed['with_loader'])} images/s, "
            f"{rate(speed['augmented'])} on resident crops, {rate(speed['resident'])} on resident views (paired "
            f"rounds: with the loader {ratio} of that), the loader alone {rate(speed['loader_alone'])}; "
            f"{train.cores:.1f} cores busy on each rank",
            f"verdict: {result.verdict}",
        ]
    return "\n".join(lines)
