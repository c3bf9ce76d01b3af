"""The ways to run a recipe's step that are timed beside each other, and the gate: no speed without equality.

Every variant is a `Trainer` of the same recipe with other machinery; nothing here computes a step of its own. The
first, `reference`, does what the authors' setup does and is what speed-ups are quoted against.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import loaders
from engine.dist import World
from engine.errors import NotEqual, RecipeError
from engine.log import logger
from engine.recipe import Recipe
from engine.train import Trainer
from loaders import Batch
from models.binary import Shift

ROTATING = 4  # batches that stay on the device and take turns
GATE_IMAGES = 4  # BatchNorm on fewer would be a comparison of rounding errors
GATE_TOLERANCE = 1e-7  # of float64: sign flips, where two orders of summation differ in the last bit, are far above it


class Variant(NamedTuple):
    """One way to run the step."""

    name: str
    what: str
    recipe: Recipe
    is_reference: bool = False
    same_maths: bool = True
    """Whether the gate compares it with the reference."""

    def trainer(self, world: World) -> Trainer:
        """A trainer on noise, ready to be stepped, its teacher random. Nothing is written."""
        data = loaders.on_noise(
            self.recipe.data,
            num_images=self.recipe.data.batch_size,
            num_classes=self.recipe.method.classes or 10,
            side=max(view.size for view in self.recipe.data.views),
        )
        # A folder in which nothing can lie is the same on all ranks.
        run = {"folder": os.devnull, "duration": "1000000it", "log_every": "1000000it", "save_every": "1000000it"}
        changes = {"data": data, "run": self.recipe.run.model_copy(update=run), "evals": (), "init": ()}
        recipe = self.recipe.model_copy(update={"name": "benchmark", **changes})
        with _quiet():  # a random teacher is all that a benchmark needs
            trainer = Trainer(recipe, world)
        if self.is_reference:
            for module in trainer.method.modules():
                if type(module) is Shift:
                    module.__class__ = ReferenceShift
            _one_kernel_per_parameter(trainer.optimizer)
        return trainer


def variants(recipe: Recipe, device: torch.device) -> list[Variant]:
    """The variants of a recipe on a device; `compile` and `channels_last` of the recipe itself do not matter.

    Raises:
        RecipeError: its steps have no one shape to be timed.
    """
    if recipe.method.takes_boxes:
        raise RecipeError(
            f"method.name: the steps of method {recipe.method.name} differ in the sizes of their images and in their "
            "boxes; no benchmark times them, a run's images_per_second does"
        )
    amp = recipe.run.amp if device.type == "cuda" else "off"

    def changed(**run: Any) -> Recipe:
        return recipe.model_copy(update={"run": recipe.run.model_copy(update={"amp": amp, **run})})

    found = [
        Variant(
            "reference",
            "the authors' setup: NCHW, float32 shifts in the stream, one kernel per operator and parameter, "
            "a host wait in each step",
            changed(compile=False, channels_last=False, kernels="torch"),
            is_reference=True,
        ),
        Variant(
            "eager",
            "channels_last, a stream that keeps its precision",
            changed(compile=False, channels_last=True, kernels="torch"),
        ),
        Variant("compiled", "and every backbone compiled", changed(compile=True, channels_last=True, kernels="torch")),
    ]
    if device.type == "cuda":
        options = {"combo_kernels": True}
        combined = changed(compile=True, compile_options=options, channels_last=True, kernels="torch")
        found.append(Variant("combo", "and small kernels of one kind made one, those of all weights too", combined))
    best = found[-1] if device.type == "cuda" else found[2]
    if torch.distributed.is_initialized():
        whole = changed(compile=True, channels_last=True, kernels="torch", optimize_ddp=False)
        found.append(Variant("one graph", "compiled, but not cut where gradients are reduced", whole))
    if any(network.fusable for network in recipe.method.networks.values()):
        fused = changed(compile=True, channels_last=True, kernels="fused")
        found.append(Variant("fused", "and half-blocks of the binary network in one pass", fused))
        best = found[-1] if device.type == "cuda" else best  # kernels are for GPUs
    for name, (what, method) in recipe.method.variants().items():
        other = best.recipe.model_copy(update={"method": method})
        found.append(Variant(f"{best.name}, {name}", what, other, same_maths=False))
    return found


class ReferenceShift(Shift):
    """A shift that lifts a 16-bit stream to float32, as the release's does under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to the same shape, in the wider of both precisions."""
        return x + self.bias


def _one_kernel_per_parameter(optimizer: torch.optim.Optimizer) -> None:
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
    """Batches of noise that stay on the device, in turn; views in `dtype`, float32 or wider by default."""

    def __init__(
        self, recipe: Recipe, device: torch.device, images: int | None = None, dtype: torch.dtype | None = None
    ) -> None:
        size = images or recipe.data.micro_batch
        generator = torch.Generator(device).manual_seed(recipe.seed)
        layout = torch.channels_last if recipe.run.channels_last else torch.contiguous_format
        batches = []
        for _ in range(ROTATING):
            views = [
                torch.randn(size, 3, v.size, v.size, generator=generator, device=device).to(dtype, memory_format=layout)
                for v in recipe.data.views
            ]
            label = torch.randint(recipe.method.classes or 10, (size,), generator=generator, device=device)
            batches.append(Batch(views, label, torch.arange(size)))
        self._turns = itertools.cycle(batches)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return next(self._turns)


def gate(candidates: Sequence[Variant], world: World) -> dict[str, float]:
    """Compare loss and gradients of every variant with the reference's in float64 on one small batch.

    Returns:
        Variant -> largest difference of any gradient relative to the gradient's norm.

    Raises:
        NotEqual: it is above `GATE_TOLERANCE`.
    """
    apart: dict[str, float] = {}
    reference: tuple[Tensor, dict[str, Tensor]] | None = None
    for variant in candidates:
        if not variant.same_maths:
            continue
        logger.info(f"checking {variant.name} against the reference in float64")
        torch.set_default_dtype(torch.float64)
        try:
            loss, gradients = _loss_and_gradients(variant, world)
        finally:
            torch.set_default_dtype(torch.float32)
        if reference is None:
            reference = loss, gradients
            continue
        scale = torch.stack([g.norm() for g in reference[1].values()]).norm()
        differences = [(gradients[name] - wanted).abs().max() / scale for name, wanted in reference[1].items()]
        differences.append((loss - reference[0]).abs() / reference[0].abs().clamp(min=1e-30))
        worst = float(torch.stack(differences).max())  # not a number if any is not
        if not worst <= GATE_TOLERANCE:
            raise NotEqual(
                f"variant {variant.name} differs from the reference by {worst:.2g} in float64; nothing was timed"
            )
        apart[variant.name] = worst
    torch._dynamo.reset()  # the graphs of float64 are not those that are timed
    return apart


def _loss_and_gradients(variant: Variant, world: World) -> tuple[Tensor, dict[str, Tensor]]:
    recipe = variant.recipe
    run = recipe.run.model_copy(update={"amp": "off"})
    sizes = {"batch_size": GATE_IMAGES * world.world_size, "micro_batch": GATE_IMAGES}
    recipe = recipe.model_copy(update={"run": run, "data": recipe.data.model_copy(update=sizes)})
    trainer = variant._replace(recipe=recipe).trainer(world)
    batch = next(Resident(recipe, world.device))
    loss = trainer.method(batch.views, batch.label, half_way(trainer))["loss"]
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in trainer.method.named_parameters() if p.grad is not None}


def half_way(trainer: Trainer) -> dict[str, Tensor]:
    """Scheduled scalars that switch nothing off."""
    return {name: torch.tensor(0.5, device=trainer.world.device) for name in trainer.recipe.method.schedules}
