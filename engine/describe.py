"""What a recipe will do, before any device is touched: its parts, steps and cost."""

from __future__ import annotations

import loaders
from engine import faults
from engine.errors import RecipeError
from engine.optim import is_weight
from engine.preflight import look
from engine.recipe import Recipe, micro_steps
from engine.schedules import Horizon, to_steps, value
from loaders import Index
from models import cost, methods


def describe(recipe: Recipe, *, resumes: bool = False, allow_changes: bool = False) -> str:
    """The text of `--dry-run`.

    Args:
        resumes, allow_changes: what the run would be started with.
    """
    lines = [recipe.dump().rstrip(), "", f"recipe hash      {recipe.hash}"]
    problems, no, indices = look(recipe, resumes=resumes, allow_changes=allow_changes)
    has_train = not any(problem.key in ("data.train", "data.backend") for problem in problems)
    horizon = _horizon(recipe, indices["train"] if indices else None, has_train)
    lines += _length(recipe, horizon)
    method = methods.on_meta(recipe.method)
    lines += _parameters(recipe, method)
    lines += _cost(recipe, method, horizon.total_steps * horizon.batch_size if horizon else None)
    lines += ["", "missing:", *(f"  {problem}" for problem in problems)] if problems else ["", "missing: nothing"]
    if no:
        lines += ["", "would be refused:", *(f"  {text}" for text in no)]
    return "\n".join(lines)


def _horizon(recipe: Recipe, train: Index | None, has_train: bool) -> Horizon | None:
    data = recipe.data
    images = data.expect_images
    if images and data.hold_out is not None:
        images = round(images * (1 - data.hold_out))
    try:
        if train is not None or has_train:
            images = len(loaders.open_data(data, "train") if train is None else train)
    except loaders.DataError:  # it is among what would be refused
        pass
    return Horizon.of(recipe.run.duration, images, data.batch_size) if images else None


def _length(recipe: Recipe, horizon: Horizon | None) -> list[str]:
    data = recipe.data
    if horizon is None:
        return ["images           unknown: no data and no data.expect_images; steps cannot be counted"]
    lines = [
        f"images           {horizon.num_images:,} x {horizon.epochs:.2f} epochs",
        f"steps            {horizon.total_steps:,} of {data.batch_size} images",
        f"checkpoints      every {to_steps(recipe.run.save_every, horizon):,} steps",
    ]
    splits = []
    for ranks in (1, 2, 4, 8, 16, 32, 64):
        try:
            splits.append(f"{ranks} ranks: {micro_steps(recipe, ranks)}")
        except RecipeError:
            break
    lines.append(f"micro-steps      {', '.join(splits)} (of {data.micro_batch} images per rank)")
    for name, schedule in recipe.schedules.items():
        first, middle, last = (
            value(schedule, step, horizon) for step in (0, horizon.total_steps // 2, max(horizon.total_steps - 1, 0))
        )
        lines.append(f"{name:16} {first:.6g} first, {middle:.6g} halfway, {last:.6g} last")
    return lines


def _parameters(recipe: Recipe, method: methods.Method) -> list[str]:
    lines = ["", f"{'part':24}{'parameters':>14}  trained by"]
    for name, part in method.named_children():
        parameters = list(part.parameters())
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        count = sum(p.numel() for p in parameters)
        moved = any(f"{name}.".startswith(prefix) for prefix in method.moved_after_step)
        how = recipe.optim.name if trained == count else f"{recipe.optim.name}: {trained:,}"
        lines.append(f"{name:24}{count:>14,}  {how if trained else 'momentum' if moved else 'frozen'}")
    trained_parameters = [p for p in method.parameters() if p.requires_grad]
    total = sum(p.numel() for p in method.parameters())
    lines.append(f"{'all':24}{total:>14,}  of which trained {sum(p.numel() for p in trained_parameters):,}")
    if recipe.optim.decay == "weights":
        decayed = sum(p.numel() for p in trained_parameters if is_weight(p))
        lines.append(f"{'with weight decay':24}{decayed:>14,}")
    return lines


def _cost(recipe: Recipe, method: methods.Method, images: float | None) -> list[str]:
    if recipe.data.teacher_cache is not None:
        delattr(method, recipe.method.cacheable)  # it is not run
    lines = ["", f"{'forward of one view':24}{'float GMACs':>14}{'binary GMACs':>14}{'OPs (1e9)':>11}"]
    sizes = [view.size for view in recipe.data.views]
    for part in cost.parts(method, sizes):
        counted = cost.count(part.network, part.sizes[0])
        float_gmacs, binary_gmacs, ops = (x / 1e9 for x in (counted.float_macs, counted.binary_macs, counted.ops))
        lines.append(f"{part.name:24}{float_gmacs:>14.3f}{binary_gmacs:>14.3f}{ops:>11.4f}")
    flops = cost.training_flops(method, sizes)
    total = f", {flops * images / 1e18:.3g} EFLOP for the run" if images else ""
    lines.append(f"training: {flops / 1e9:.1f} GFLOP per image in the backbones (2 per multiply-accumulate){total}")
    needs = faults.memory(recipe)
    per_rank = needs["state"] + recipe.data.micro_batch * needs["per_image"]
    lines.append(
        f"memory: {per_rank / 2**30:.1f} GiB on each GPU at micro_batch {recipe.data.micro_batch}, eager: "
        f"{needs['state'] / 2**30:.1f} for the state, {needs['per_image'] / 2**20:.1f} MiB an image (counted)"
    )
    for name, speed in cost.predictions(flops, cost.eager_traffic(method, sizes)).items():
        hours = f", {images / speed / 3600:,.1f} hours" if images else ""
        lines.append(f"predicted on one {name}: {speed:,.0f} images/s{hours} ({cost.GPUS[name].source} ceilings)")
    return lines
