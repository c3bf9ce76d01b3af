"""The training loop. `Trainer.step` is all that happens in a step, in order; `Trainer.fit` all that happens around."""

from __future__ import annotations

import contextlib
import fcntl
import inspect
import json
import signal
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import loaders
from engine import checkpoint, dist, evals, optim
from engine.dist import World
from engine.log import Clock, Meter, RunLog, duration, environment, logger, versions
from engine.monitors import IMAGES, Monitors
from engine.recipe import Recipe, RecipeError, micro_steps, resolve
from engine.schedules import Horizon, due, value
from loaders import Batch, DataError, Index
from models import methods
from models.backbones import Backbone
from models.methods import Method
from models.reactnet import ReActNet

# Exit codes of tools/train.py, besides 0 and 1 (an unforeseen error).
EXIT_BAD_INPUT = 2
EXIT_NOT_FINITE = 3
EXIT_UNTRAINED = 4
EXIT_NOT_SAVED = 5
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: saved, start again with --resume

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# What may differ between a run and its resumption without changing a number that it computes.
_FREE = ("run.log_every", "run.save_every", "run.keep", "run.timeout_seconds", "run.folder", "data.workers")
_COVERED = ("data.train", "data.val", "data.expect_images")  # the fingerprint speaks for them


class NotFinite(RuntimeError):
    """A loss, a gradient or the network is not finite; nothing was saved after it."""


class NotSaved(RuntimeError):
    """The last checkpoint of a run, or that of a signal, could not be written."""


class Untrained(RuntimeError):
    """A parameter that should move has no gradient, or one that should not has one."""


class Stopped(Exception):
    """A signal asked the run to stop; it is saved."""


class Trainer:
    """One run of a recipe on this process's device.

    Args:
        recipe: what to run.
        world: this process among those of the run.
        resume: go on from the newest complete checkpoint of the run folder, if there is one.
        allow_changes: resume even though recipe, data or number of ranks differ from the checkpoint's.

    Raises:
        RecipeError, loaders.DataError, checkpoint.CheckpointError, models.weights.WeightsError: the recipe
            cannot be run here. Nothing was written.
    """

    def __init__(self, recipe: Recipe, world: World, *, resume: bool = False, allow_changes: bool = False) -> None:
        self.recipe, self.world = recipe, world
        self.micro_steps = micro_steps(recipe, world.world_size)
        self.indices = _open_indices(recipe, world)
        self.horizon = Horizon.of(recipe.run.duration, len(self.indices["train"]), recipe.data.batch_size)
        self.steps_done = 0
        self.meter, self.clock = Meter(), Clock()
        self.bad_images: dict[str, str] = {}

        torch.manual_seed(recipe.seed)
        self.method: Method = methods.build(recipe.method)
        self.method.to(world.device)
        if recipe.run.channels_last:
            _to_channels_last(self.method)
        self.optimizer = optim.build(recipe.optim, self.method)
        self.amp_dtype = _AMP[recipe.run.amp]
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=recipe.run.amp == "fp16")
        self._skipped = torch.zeros((), device=world.device)
        # Rank 0 chooses, all load: a disk that only one machine sees must not send ranks to different steps.
        found = dist.together(lambda: self._newest_checkpoint(resume) if world.is_main else None)
        found = dist.gather_objects(found)[0]
        dist.together(lambda: self._restore(found, allow_changes) if found else self._initialise())
        dist.must_agree(
            {
                "the recipe": recipe.hash,
                "the number of steps": self.horizon.total_steps,
                "the step to start from": self.steps_done,
                **{f"the fingerprint of data.{split}": index.fingerprint for split, index in self.indices.items()},
            }
        )

        if recipe.run.kernels == "fused":
            for part in self.method.modules():
                if isinstance(part, ReActNet) and part.config.activations == "binary":
                    part.fused = True
        if recipe.run.compile:
            # Backbones alone, each one graph that all of its views share; heads and losses are 0.2 % of the
            # arithmetic. In place: keys of the checkpoint never know of it.
            for part in self.method.modules():
                if isinstance(part, Backbone):
                    part.compile(fullgraph=True, dynamic=False, options=recipe.run.compile_options)
        self.model: torch.nn.Module = self.method
        if world.world_size > 1:
            # Statistics of BatchNorm stay per rank, as in the reference; evaluations use rank 0's.
            # The key that says so has a new name since PyTorch 2.15.
            names = inspect.signature(DistributedDataParallel).parameters
            buffers = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
            options: dict[str, Any] = {buffers: False, "gradient_as_bucket_view": True}
            # With accumulation a static graph needs its first step to be reduced with every micro-step (PyTorch 2.14
            # asserts it), which rounds differently: a resumed run would no longer be equal to the bit.
            options["static_graph"] = self.micro_steps == 1
            device_ids = [world.device] if world.device.type == "cuda" else None
            self.model = DistributedDataParallel(self.method, device_ids=device_ids, **options)
        self.method.train()
        self.trained = [p for p in self.method.parameters() if p.requires_grad]
        self.values = {name: torch.zeros((), device=world.device) for name in recipe.method.schedules}
        self.mark = _unmarked
        self._guarded = self.steps_done > 0  # a run that has passed once may go on, whatever became of it
        self._signal: int | None = None

    # -------------------------------------------------------------------------------------------- the step

    def step(self) -> Tensor:
        """One optimizer step. Nothing here waits for the device, but for the guard of the first step.

        Returns:
            0-d bool tensor: whether the loss or gradients of this rank are not finite.
        """
        now = {name: value(s, self.steps_done, self.horizon) for name, s in self.recipe.schedules.items()}
        optim.apply(self.optimizer, now["lr"], now.get("weight_decay", 0.0))
        for name, scalar in self.values.items():
            scalar.fill_(now[name])
        # All that a method draws is a function of (seed, step): a resumed run draws the same.
        torch.manual_seed((self.recipe.seed << 31) + self.steps_done)
        bad = torch.zeros((), dtype=torch.bool, device=self.world.device)
        for micro_step in range(self.micro_steps):
            self.mark("load")
            started = time.perf_counter()
            batch = next(self.loader)
            self.clock.waited(time.perf_counter() - started)
            self.mark("forward")
            is_last = micro_step == self.micro_steps - 1
            # Gradients are reduced over ranks once per optimizer step, with the last micro-step.
            with nullcontext() if is_last or self.model is self.method else self.model.no_sync():  # type: ignore[operator]
                with torch.autocast(self.world.device.type, self.amp_dtype, enabled=self.amp_dtype is not None):
                    scalars = self.model(self.inputs(batch), batch.label, self.values)
                self.mark("backward")
                self.scaler.scale(scalars["loss"] / self.micro_steps).backward()
            bad |= ~scalars["loss"].detach().isfinite()
            self.meter.add(scalars)
        if due(self.steps_done + 1, self.recipe.run.log_every, self.horizon):
            self._watched = batch.views[0][:IMAGES].clone()
        self.mark("optimizer")
        if not self._guarded:
            self._guard()
        self.method.before_update(now)
        self.scaler.unscale_(self.optimizer)
        norm = optim.gradient_norm(self.trained)
        # With a loss scaler an overflow skips a step; too many in a row, or any without one, end the run.
        self._skipped = torch.where(norm.isfinite(), 0, self._skipped + 1)
        allowed = self.recipe.run.max_skipped_steps if self.scaler.is_enabled() else 0
        bad |= self._skipped > allowed
        self.meter.add({"grad_norm": norm.nan_to_num(0, 0, 0), "skipped_steps": (self._skipped > 0).float()})
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.method.after_step(now)
        self.clock.trained(self.recipe.data.batch_size)
        return bad

    def inputs(self, batch: Batch) -> list[Tensor]:
        """The views of a batch in the precision that convolutions run in: cast once, not by every network."""
        return [view.to(self.amp_dtype) for view in batch.views] if self.amp_dtype else batch.views

    def _guard(self) -> None:
        """Once: what should move has a gradient, nothing else has one. The released BURN code fails here."""
        wrong = []
        for name, parameter in self.method.named_parameters():
            gradient = parameter.grad
            if parameter.requires_grad and gradient is None:
                wrong.append(f"{name} has no gradient")
            elif parameter.requires_grad and not gradient.any():  # type: ignore[union-attr]
                wrong.append(f"{name} has a gradient of zeros")
            elif not parameter.requires_grad and gradient is not None:
                wrong.append(f"{name} is frozen and has a gradient")
        if wrong:
            raise Untrained(
                f"{len(wrong)} of {sum(1 for _ in self.method.parameters())} parameters are not trained as "
                f"declared: {'; '.join(wrong[:8])}"
            )
        self._guarded = True

    # -------------------------------------------------------------------------------------------- the run

    def fit(self) -> None:
        """Train to the end, with logs, evaluations and checkpoints.

        Raises:
            NotFinite: on all ranks at the same step, before anything is saved.
            Untrained: the guard of the first step.
            Stopped: a signal came; all ranks saved the same step.
        NotSaved: the disk refused the last checkpoint, or that of a signal.
        """
        recipe, horizon = self.recipe, self.horizon
        dist.together(self._open_folder)
        consensus = dist.Consensus(self.world)
        if self.world.local_rank == 0:
            for text in loaders.warnings(recipe.data, self.world.local_world_size):
                logger.warning(text)
        before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        try:
            self.loader = loaders.open_train(
                recipe.data,
                self.indices["train"],
                seed=recipe.seed,
                step=self.steps_done,
                rank=self.world.rank,
                world_size=self.world.world_size,
                local_world_size=self.world.local_world_size,
                device=self.world.device,
            )
            self.loader.bad.update(self.bad_images)
            self.bad_images = self.loader.bad
            self.clock.run()
            while self.steps_done < horizon.total_steps:
                bad = self.step()
                self.steps_done += 1
                step = self.steps_done
                if self.log:
                    self.log.tick()
                is_bad, stops = consensus.propose(bad, self._signal is not None)
                logs, saves = due(step, recipe.run.log_every, horizon), due(step, recipe.run.save_every, horizon)
                due_evals = [evaluation for evaluation in recipe.evals if due(step, evaluation.every, horizon)]
                if logs or saves or due_evals or stops:
                    newest_bad, newest_stops = consensus.agreed()
                    is_bad, stops = is_bad or newest_bad, stops or newest_stops
                if is_bad:
                    raise NotFinite(
                        f"loss or gradients are not finite at step {step}; nothing was saved after the last "
                        f"checkpoint in {recipe.folder / 'checkpoints'}"
                    )
                if logs:
                    self._log_step(step)
                self.clock.pause()
                for evaluation in due_evals:
                    self._evaluate(evaluation, step)
                if saves or stops:
                    self._save(step, must=stops or step == horizon.total_steps)
                if stops and step < horizon.total_steps:
                    raise Stopped(f"stopped by a signal after step {step}, saved; go on with --resume")
                self.clock.run()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self.close()

    def close(self) -> None:
        """Free the loader and flush the logs."""
        if hasattr(self, "loader"):
            self.loader.close()
        if getattr(self, "log", None):
            assert self.log
            self.log.close()
            self._lock.close()

    def _on_signal(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT and self._signal == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C means now; a checkpoint being written stays unfinished
        self._signal = number

    def _log_step(self, step: int) -> None:
        now = {name: value(s, step - 1, self.horizon) for name, s in self.recipe.schedules.items()}
        images_left = (self.horizon.total_steps - step) * self.recipe.data.batch_size
        row = {**self.meter.read(), **now, **self.clock.read(images_left)}
        if self.log:
            # On rank 0 alone: its BatchNorm statistics are those of the checkpoint. Eager: other batch sizes would
            # be other graphs.
            with torch.compiler.set_stance("force_eager"):
                watched = self.monitors.read(self._watched)
            if watched:
                row |= dict(zip(watched, torch.stack(list(watched.values())).tolist(), strict=True))
            self.log.row(step, row)

    def _evaluate(self, config: Any, step: int) -> None:
        with torch.compiler.set_stance("force_eager"):
            scores = evals.run(config, self.method, self.recipe.data, self.indices, self.world)
        if self.log:
            self.log.row(step, {**scores, "online": True}, evaluation=config.kind)

    # -------------------------------------------------------------------------------------------- what lasts

    def state_dict(self) -> dict[str, Any]:
        """All that must survive; called on all ranks. The data stream, the schedules and every draw are functions
        of the step."""
        return {
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "skipped": self._skipped,
            "meter": self.meter.state_dict(),
            "monitors": self.monitors.state_dict(),
            "seconds": self.clock.seconds,
            "bad_images": {p: reason for bad in dist.gather_objects(self.bad_images) for p, reason in bad.items()},
            "total_steps": self.horizon.total_steps,
            "recipe": self.recipe.dump(),
            "identity": self._identity(),
            "versions": versions(),
        }

    def _identity(self) -> dict[str, Any]:
        """What has to be equal for a resumed run to give the same numbers."""
        content = yaml.safe_load(self.recipe.dump())
        flat = {key: item for key, item in _flatten(content).items() if key not in (*_FREE, *_COVERED)}
        flat["world_size"] = self.world.world_size
        for split, index in self.indices.items():
            flat[f"fingerprint of data.{split}"] = index.fingerprint
        return flat

    def _save(self, step: int, *, must: bool) -> None:
        state = self.state_dict()
        problem, is_finite = "", True
        if self.world.is_main:
            try:
                folder = self.recipe.folder / "checkpoints"
                logger.info(f"saved {checkpoint.save(folder, step, state, self.recipe.run.keep)}")
            except checkpoint.CheckpointError as error:
                problem, is_finite = str(error), not isinstance(error, checkpoint.NotFiniteError)
            self._list_bad_images(state["bad_images"])
        problem, is_finite = dist.gather_objects((problem, is_finite))[0]
        if not is_finite:
            raise NotFinite(problem)
        if problem and must:
            raise NotSaved(problem)
        if problem and self.world.is_main:
            logger.warning(f"{problem}; training goes on")

    def _list_bad_images(self, bad: dict[str, str]) -> None:
        if not bad:
            return
        path = self.recipe.folder / "bad_images.tsv"
        logger.warning(f"{len(bad)} images could not be decoded and were replaced, listed in {path}")
        with contextlib.suppress(OSError):
            path.write_text("".join(f"{name}\t{reason}\n" for name, reason in sorted(bad.items())), encoding="utf-8")

    def _newest_checkpoint(self, resume: bool) -> Path | None:
        folder = self.recipe.folder / "checkpoints"
        newest, damaged = checkpoint.latest(folder)
        if newest is None and not damaged:
            return None
        if not resume:
            raise RecipeError(
                f"{self.recipe.folder}: holds a run already; pass --resume to go on with it, or give this one "
                "another name (name=...) or folder (run.folder=...)"
            )
        for path in damaged:
            logger.warning(f"{path}: damaged, its content does not match the hash in its name; passed over")
        if newest is None:
            raise checkpoint.CheckpointError(f"{folder}: every checkpoint is damaged; remove them to start anew")
        return newest

    def _initialise(self) -> None:
        given = set()
        for init in self.recipe.init:
            checkpoint.initialise(self.method, init)
            given |= set(init.load)
        for name, part in self.method.named_children():
            frozen = not any(parameter.requires_grad for parameter in part.parameters())
            follows = any(prefix.startswith(name) for prefix in self.method.moved_after_step)
            if frozen and not follows and name not in given and self.world.is_main:
                logger.warning(f"{name} is frozen and random: no entry of init loads it")
        self.monitors = Monitors(self.method)

    def _restore(self, path: Path, allow_changes: bool) -> None:
        state = checkpoint.load(path)
        then, now = _filled(state, path), self._identity()
        changed = [
            f"{key} was {then.get(key)}, is {now.get(key)}" for key in {**then, **now} if then.get(key) != now.get(key)
        ]
        if changed and not allow_changes:
            raise RecipeError(
                f"{path}: cannot be resumed exactly: {'; '.join(changed)}; restore these, or pass "
                f"--allow-changes to go on differently (free to change: {', '.join(_FREE)})"
            )
        self.method.load_state_dict(state["method"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self._skipped = state["skipped"].to(self.world.device)
        self.meter.load_state_dict(state["meter"], self.world.rank)
        self.monitors = Monitors(self.method)
        self.monitors.load_state_dict(state["monitors"])
        self.clock.seconds = state["seconds"]
        self.bad_images = state["bad_images"]
        self.steps_done = state["step"]
        if state["versions"] != versions():
            logger.warning(f"{path} was written with {state['versions']}, here are {versions()}: numbers may differ")
        logger.info(f"resumed {path} at step {self.steps_done}")

    def _open_folder(self) -> None:
        self.log: RunLog | None = None
        if not self.world.is_main:
            return
        folder = self.recipe.folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = open(folder / ".lock", "w")
        except OSError as error:
            raise RecipeError(f"run.folder: {folder} cannot be made or written: {error.strerror}") from None
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, workers do not inherit it
        except OSError:
            raise RecipeError(f"{folder}: another process is running here; wait for it or name this run anew") from None
        (folder / "recipe.yaml").write_text(self.recipe.dump(), encoding="utf-8")
        (folder / "environment.json").write_text(json.dumps(environment(), indent=2) + "\n", encoding="utf-8")
        self.log = RunLog(folder, self.horizon, self.steps_done)
        trained = sum(parameter.numel() for parameter in self.trained)
        logger.info(
            f"{folder}: recipe {self.recipe.hash}, {len(self.indices['train'])} images, "
            f"{self.horizon.total_steps} steps of {self.recipe.data.batch_size} = {self.recipe.run.duration}, "
            f"{self.micro_steps} micro-steps, {self.world.world_size} x {self.world.device.type}, "
            f"{trained:,} trained parameters"
        )


def run(recipe: Recipe, *, resume: bool = False, allow_changes: bool = False) -> None:
    """Run a recipe from start to end in the process group that torchrun describes, or alone.

    Raises:
        As `Trainer` and `Trainer.fit`.
    """
    world = dist.start(recipe.run.device, recipe.run.timeout_seconds)
    try:
        started = time.perf_counter()
        trainer = Trainer(recipe, world, resume=resume, allow_changes=allow_changes)
        trainer.fit()
        logger.info(f"{recipe.folder}: done in {duration(time.perf_counter() - started)}")
    finally:
        dist.stop()


def _unmarked(phase: str) -> None:
    """Where a phase of the step begins; `--benchmark` puts a clock here."""


def _to_channels_last(module: torch.nn.Module) -> None:
    # Only where there is a spatial extent: on [C, 1, 1] the two layouts are one and PyTorch's answer to which it is
    # differs between a parameter and its gradient.
    for parameter in module.parameters():
        if parameter.ndim == 4 and parameter.shape[2] * parameter.shape[3] > 1:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def _open_indices(recipe: Recipe, world: World) -> dict[str, Index]:
    """Index training and validation images; one process of each machine makes the cache, the others read it."""
    splits = ["train", *(["val"] if recipe.evals else [])]

    def open_mine() -> dict[str, Index]:
        opened = {split: loaders.open_data(recipe.data, split) for split in splits}  # type: ignore[arg-type]
        _check_data(recipe, opened)
        return opened

    first = dist.together(lambda: open_mine() if world.local_rank == 0 else None)
    return dist.together(lambda: first or open_mine())


def _check_data(recipe: Recipe, indices: dict[str, Index]) -> None:
    train = indices["train"]
    expected = recipe.data.expect_images
    count = len(train) + train.quarantined
    if expected is not None and count != expected:
        raise DataError(
            f"{train.root}: {count} images, the recipe expects {expected}; complete the data set, or set "
            f"data.expect_images={count}"
        )
    if "val" in indices and indices["val"].classes != train.classes:
        raise DataError(f"{indices['val'].root}: its classes differ from those of {train.root}")
    num_classes = getattr(recipe.method, "num_classes", None)
    if num_classes is not None and num_classes != len(train.classes):
        raise DataError(
            f"{train.root}: {len(train.classes)} classes, the recipe expects method.num_classes={num_classes}"
        )
    for split, index in indices.items():
        if index.problems:
            row, reason = next(iter(index.problems.items()))
            text = f"{index.root}: {len(index.problems)} of {len(index)} images are unusable, the first is "
            text += f"{index.path(row)}: {reason}"
            if split == "train" and recipe.data.on_bad_image == "stop":
                raise DataError(f"{text}; remove or repair them, or set data.on_bad_image=replace")
            logger.warning(text)


def _filled(state: dict[str, Any], path: Path) -> dict[str, Any]:
    """A checkpoint's identity, where keys that its engine did not know yet have today's defaults."""
    try:
        today = resolve(yaml.safe_load(state["recipe"]), path)
    except RecipeError:
        return state["identity"]
    flat = _flatten(yaml.safe_load(today.dump()))
    return {**{key: item for key, item in flat.items() if key not in (*_FREE, *_COVERED)}, **state["identity"]}


def _flatten(content: Any, prefix: str = "") -> dict[str, Any]:
    items = content.items() if isinstance(content, dict) else enumerate(content)
    flat: dict[str, Any] = {}
    for key, item in items:
        path = f"{prefix}{key}"
        if isinstance(item, dict | list) and item:
            flat.update(_flatten(item, f"{path}."))
        else:
            flat[path] = item
    return flat
