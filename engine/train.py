"""The training loop. `Trainer.step` is all that happens in a step, in order; `Trainer.fit` is what surrounds it."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import loaders
from engine import accelerator, checkpoint, dist, evals, faults, optim, precision, teacher_cache
from engine.consensus import Consensus
from engine.data import open_indices, sets_of
from engine.dist import World
from engine.errors import (
    KNOWN,
    CheckpointError,
    EngineError,
    LostRank,
    NotFinite,
    NotFiniteState,
    NotSaved,
    RecipeError,
    Stopped,
    Untrained,
    first_line,
    is_own,
    is_shared,
    own,
    report,
    shared,
)
from engine.folder import RunFolder
from engine.log import Clock, Meter, RunLog, duration, logger
from engine.monitors import IMAGES, Monitors
from engine.provenance import versions
from engine.recipe import Recipe, micro_steps
from engine.resume import (
    check_identity,
    free_changes,
    horizon_of,
    identity,
    jumps,
    newest_checkpoint,
    recipe_of,
    stream_version,
)
from engine.schedules import Horizon, due, value
from loaders import Batch, Index, Loader
from loaders.machine import SIGNALS
from models import backbones
from models.methods import Method
from models.precision import at_least_float32

UNSAVED = (NotFinite, Untrained, LostRank)
"""What ends a run without a checkpoint of its own: the last one stays."""


class Trainer:
    """One run of a recipe on this process's device.

    Args:
        recipe: what to run.
        world: this process among those of the run.
        resume: continue from the newest intact checkpoint of the run folder, if there is one.
        allow_changes: resume even though recipe, data or number of ranks differ from the checkpoint's.

    Raises:
        RecipeError, DataError, FolderError, CheckpointError, WeightsError: the recipe cannot be run here. Nothing was
            written.
    """

    recipe: Recipe
    world: World
    indices: dict[str, Index]
    """`train`, `val`, and those that evaluations name (`evals.0.train`) -> data set."""
    horizon: Horizon
    """How long the run is."""
    micro_steps: int
    """Forward and backward passes of one optimizer step."""
    steps_done: int
    """Optimizer steps so far; the next one has this number."""
    stream_version: int
    """Version of the order of the images: today's, or in a resumed run the one that it began with."""

    method: Method
    """What is trained, with all networks that it needs."""
    model: nn.Module
    """What is called: the method, or what averages its gradients over ranks."""
    trained: list[nn.Parameter]
    """What the optimizer moves."""
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    """Scales the loss in fp16; passes everything through otherwise."""
    amp_dtype: torch.dtype | None
    """What convolutions run in under autocast, None without it."""
    values: dict[str, Tensor]
    """The method's scheduled scalars of this step, 0-d on the device."""
    skipped: Tensor
    """Steps in a row that the loss scaler has skipped, 0-d on the device."""

    meter: Meter
    """Means of the step's scalars since the last log."""
    clock: Clock
    """Training time and speed."""
    monitors: Monitors
    """Health of the network, read at log time."""
    watched: Tensor | None
    """Images that the monitors look at, [B, 3, H, W], of the newest step that logs."""
    bad_images: dict[str, str]
    """Path -> reason of the training images that were replaced so far."""
    mark: Callable[[str], None]
    """Called where a phase of the step begins; the step benchmark puts a clock here."""

    loader: Loader | None
    """The training batches, while `fit` runs."""
    folder: RunFolder | None
    """The run folder, on rank 0 while `fit` runs."""
    log: RunLog | None
    """Where rows of metrics go, on rank 0 while `fit` runs."""

    consensus: Consensus
    """What all ranks agree on."""
    verdict: tuple[bool, bool]
    """Of the newest step: whether any rank has bad numbers, and whether any is asked to stop."""

    _cache: str  # identity of `data.teacher_cache`, "" without one
    _guarded: bool  # whether the guard of the first step is over
    _signal: int | None  # the signal that asked the run to stop
    _is_whole: bool  # whether the state is that after `steps_done` steps, but for buffers inside a step
    _is_inside: bool  # whether a step has begun that has not ended
    _saved: int  # the step of the newest checkpoint, or that the run started from
    _due_evals: list[int]  # evaluations of the recipe that are to be run after the newest step
    _is_resumed: bool  # whether the run continues from a checkpoint
    _is_renumbered: bool  # whether it continues one whose steps had another number of images
    _buffers: list[tuple[list[Tensor], list[Tensor]]]  # copies and buffers of each dtype

    def __init__(self, recipe: Recipe, world: World, *, resume: bool = False, allow_changes: bool = False) -> None:
        self.recipe, self.world = recipe, world
        self.micro_steps = micro_steps(recipe, world.world_size)
        self.indices = open_indices(recipe, world)
        self.horizon = Horizon.of(recipe.run.duration, len(self.indices["train"]), recipe.data.batch_size)
        self._cache = dist.together(lambda: teacher_cache.identity(recipe))
        self.steps_done, self.stream_version = 0, loaders.STREAM_VERSION
        self.meter, self.clock = Meter(), Clock()
        self.watched, self.bad_images = None, {}
        self.mark = _no_mark
        self.loader = self.folder = self.log = self._signal = None
        self.consensus, self.verdict = dist.consensus(world), (False, False)
        self._is_whole, self._is_inside, self._due_evals = True, False, []
        self._is_resumed = self._is_renumbered = False

        usable, self._refused = accelerator.usable(recipe.run, world.device)
        accelerator.set_up(usable, world.device, world.local_world_size)
        torch.manual_seed(recipe.seed)
        self.method = recipe.method.build()
        self.method.to(world.device)
        backbones.prepare(
            self.method,
            channels_last=usable.channels_last,
            fused=usable.kernels == "fused",
            compiled=usable.compile,
            compile_options=usable.compile_options,
        )
        self.optimizer = optim.build(recipe.optim, self.method)
        self.amp_dtype = precision.DTYPES[recipe.run.amp]
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=recipe.run.amp == "fp16")
        self.skipped = torch.zeros((), device=world.device)
        self._start_from(resume, allow_changes)
        self.model = dist.wrap(self.method, world, accumulates=self.micro_steps > 1)
        self.method.train()
        self.trained = [p for p in self.method.parameters() if p.requires_grad]
        self.values = {name: torch.zeros((), device=world.device) for name in recipe.method.schedules}
        self._saved = self.steps_done
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for buffer in self.method.buffers():
            by_dtype.setdefault(buffer.dtype, []).append(buffer)
        self._buffers = [([buffer.clone() for buffer in buffers], buffers) for buffers in by_dtype.values()]
        self._guarded = self.steps_done > 0  # a run that has passed once may continue, whatever became of it

    # -------------------------------------------------------------------------------------------- the step

    def step(self, batches: Iterator[Batch]) -> Tensor:
        """One optimizer step. Nothing here waits for the device, but for the guard of the first step.

        Args:
            batches: gives the step's micro-batches, `micro_steps` of them.

        Returns:
            0-d bool tensor: whether the loss or gradients of this rank are not finite.

        Raises:
            Ended: another rank cannot take this step; it was not taken here either.
        """
        now = {name: value(s, self.steps_done, self.horizon) for name, s in self.recipe.schedules.items()}
        optim.apply(self.optimizer, now["lr"], now.get("weight_decay", 0.0))
        for name, scalar in self.values.items():
            scalar.fill_(now[name])
        # All that a method draws is a function of (seed, step): a resumed run draws the same.
        torch.manual_seed((self.recipe.seed << 31) + self.steps_done)
        bad = torch.zeros((), dtype=torch.bool, device=self.world.device)
        self._remember()
        of_micro_steps = []
        for micro_step in range(self.micro_steps):
            self.mark("load")
            started = time.perf_counter()
            batch = next(batches)
            self.clock.waited(time.perf_counter() - started)
            self.consensus.meet()  # no rank begins what another has no images for
            self.mark("forward")
            is_last = micro_step == self.micro_steps - 1
            # Gradients are reduced over ranks once per optimizer step, with the last micro-step.
            with nullcontext() if is_last or self.model is self.method else self.model.no_sync():  # type: ignore[operator]
                with self.autocast():
                    scalars = self.model(self.inputs(batch), batch.label, self.values, *cached(batch))
                self.mark("backward")
                self.scaler.scale(scalars["loss"] / self.micro_steps).backward()
            bad |= ~scalars["loss"].detach().isfinite()
            of_micro_steps.append(scalars)
        if due(self.steps_done + 1, self.recipe.run.log_every, self.horizon):
            self.watched = at_least_float32(batch.views[0][:IMAGES]).clone()
        self.mark("optimizer")
        if not self._guarded:
            self._guard()
        self.method.before_update(now)
        self.scaler.unscale_(self.optimizer)
        norm = optim.gradient_norm(self.trained)
        # With a loss scaler an overflow skips a step; too many in a row, or any without one, end the run.
        skipped = torch.where(norm.isfinite(), 0, self.skipped + 1)
        allowed = self.recipe.run.max_skipped_steps if self.scaler.is_enabled() else 0
        bad |= skipped > allowed
        self.verdict = self.consensus.propose(bad)  # no rank updates what another could not compute
        self._is_whole = False
        self.skipped = skipped
        for scalars in of_micro_steps:
            self.meter.add(scalars)
        self.meter.add({"grad_norm": norm.nan_to_num(0, 0, 0), "skipped_steps": (skipped > 0).float()})
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.method.after_step(now)
        self.clock.trained(self.recipe.data.batch_size)
        self.consensus.updated()
        self.steps_done += 1
        self._is_whole, self._is_inside = True, False
        return bad

    @torch.no_grad()
    def _remember(self) -> None:
        """Keep what the forward pass changes before any update: buffers, statistics of BatchNorm above all."""
        self._is_inside = True
        for copies, buffers in self._buffers:
            torch._foreach_copy_(copies, buffers)

    @torch.no_grad()
    def _recall(self) -> None:
        """Leave a step that came to no update as if it had not begun."""
        if self._is_inside:
            for copies, buffers in self._buffers:
                torch._foreach_copy_(buffers, copies)
            self.optimizer.zero_grad(set_to_none=True)
            self._is_inside = False

    def autocast(self) -> torch.autocast:
        """What the forward pass runs under."""
        return torch.autocast(self.world.device.type, self.amp_dtype, enabled=self.amp_dtype is not None)

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
            Stopped: a signal arrived; all ranks saved the same step.
            NotSaved: the disk refused the last checkpoint, or the one saved on a signal.
            MachineError: memory ran out, a device is lost, or a rank is gone.
            Ended: another rank met something that ends the run, and raises that itself.
            FolderError: the run folder cannot be written, or another process is running there.
        """
        with _heard(self._on_signal):
            try:
                evaluated = dist.gather_objects(dist.together(self._open_folder))[0]
                self._warn()
                if self._is_renumbered:
                    self._save(self.steps_done, must=True)
                    if self.folder:
                        self.folder.drop_old()
                self.loader = loaders.open_train(
                    self.recipe.data,
                    self.indices["train"],
                    seed=self.recipe.seed,
                    step=self.steps_done,
                    place=self.world.place,
                    dtype=self.amp_dtype,
                    version=self.stream_version,
                )
                self.loader.bad.update(self.bad_images)
                self.bad_images = self.loader.bad
                self._train(evaluated)
            except Exception as error:
                raised = self._end(error)
                if raised is error:
                    raise
                raise raised from None
            finally:
                self.close()

    def _train(self, evaluated: list[str]) -> None:
        """`evaluated`: kinds of the evaluations after the newest step that have their rows."""
        recipe, horizon = self.recipe, self.horizon
        assert self.loader is not None
        if not self._is_resumed:
            self._due_evals = [number for number, evaluation in enumerate(recipe.evals) if evaluation.at_start]
        owed = bool(self._due_evals)
        self._strike(evaluated)
        if not self._evaluate():  # what a signal has cut
            raise shared(Stopped(f"stopped by a signal after step {self.steps_done}; continue with --resume"))
        if owed and self.steps_done == horizon.total_steps:
            self._save(self.steps_done, must=False)  # nothing is owed any more
        self.clock.run()
        while self.steps_done < horizon.total_steps:
            self.step(self.loader)
            step = self.steps_done
            if self.log:
                self.log.tick()
            is_bad, stops = self.verdict
            logs, saves = due(step, recipe.run.log_every, horizon), due(step, recipe.run.save_every, horizon)
            self._due_evals = [i for i, evaluation in enumerate(recipe.evals) if due(step, evaluation.every, horizon)]
            if logs or saves or self._due_evals or stops:
                is_bad, stops = self.consensus.agreed()
            if is_bad:
                raise shared(
                    NotFinite(
                        f"loss or gradients are not finite at step {step}; nothing was saved after the last "
                        f"checkpoint in {recipe.folder / 'checkpoints'}"
                    )
                )
            if logs:
                self._log_step(step)
            self.clock.pause()
            if self._due_evals and not stops:
                self._save(step, must=False)  # with what is owed: an evaluation may take hours, or be the end
                stops = not self._evaluate()
            if saves or stops:
                self._save(step, must=stops or step == horizon.total_steps)
            if stops and (step < horizon.total_steps or self._due_evals):
                raise shared(Stopped(f"stopped by a signal after step {step}, saved; continue with --resume"))
            self.clock.run()

    def _end(self, error: Exception) -> BaseException:
        """End the run on all ranks because of what happened on this one.

        Returns:
            What to raise: the error on the rank that met it, `Ended` on the others.
        """
        if is_shared(error):
            return error
        consensus, recipe, device = self.consensus, self.recipe, self.world.device
        if dist.is_connection(error):
            consensus.wait_for_ending()
        known = error if isinstance(error, KNOWN) else faults.fault(error, recipe, device) or error
        is_whole = self._is_whole and not faults.is_lost(error)
        raised = consensus.end(known, saves=not isinstance(known, UNSAVED), is_whole=is_whole)
        saves = is_whole and self.steps_done != self._saved and consensus.claims()
        if isinstance(raised, faults.OutOfMemory):
            raised = own(raised.with_advice(recipe, device))
        if consensus.is_grouped and is_own(raised):
            report(raised)  # before anything that another rank's end could cut short
        if saves:
            with consensus.saving():
                self._save_alone()
        return raised

    def _save_alone(self) -> None:
        """Save the last whole step without asking the other ranks for anything."""
        try:
            self._recall()
            path = self._write(self.steps_done, self.state_dict(together=False))
        except (EngineError, RuntimeError, OSError) as error:
            logger.warning(f"step {self.steps_done} cannot be saved: {first_line(error)}")
        else:
            logger.warning(f"saved {path}; continue with --resume")

    def close(self) -> None:
        """Free the loader, flush the logs and let others write to the run folder."""
        for part in (self.loader, self.log, self.folder):
            if part is not None:
                part.close()
        self.loader = self.log = self.folder = None

    def _on_signal(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT and self._signal == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C means now; a checkpoint being written stays unfinished
        self._signal = number
        self.consensus.asked_to_stop = True

    def _log_step(self, step: int) -> None:
        now = {name: value(s, step - 1, self.horizon) for name, s in self.recipe.schedules.items()}
        images_left = (self.horizon.total_steps - step) * self.recipe.data.batch_size
        row = {**self.meter.read(), **now, **self.clock.read(images_left)}
        if self.log:
            # On rank 0 alone: its BatchNorm statistics are those of the checkpoint. Eager: other batch sizes would
            # be other graphs.
            assert self.watched is not None
            with torch.compiler.set_stance("force_eager"):
                health = self.monitors.read(self.watched)
            if health:
                row |= dict(zip(health, torch.stack(list(health.values())).tolist(), strict=True))
            self.log.row(step, row)
            for text in self.monitors.alarms(row):
                logger.warning(f"step {step}: {text}")

    def _evaluate(self) -> bool:
        """Run the evaluations that are due after the newest step; False if a signal cut them short, so that a resumed
        run owes the rest."""
        while self._due_evals:
            config = self.recipe.evals[self._due_evals[0]]
            sets = sets_of(self.recipe, self._due_evals[0], self.indices)
            try:
                with torch.compiler.set_stance("force_eager"):
                    scores = evals.run(config, self.method, self.recipe, sets, self.world, self.steps_done)
            except evals.NotMeasured as error:  # owed no longer: a resumed run would meet it again
                scores = {}
                if self.world.is_main:
                    logger.warning(f"step {self.steps_done}: no {config.kind}: {error}; training continues")
            if scores is None:
                return False
            if self.log and scores:
                self.log.row(self.steps_done, {**scores, "online": True}, evaluation=config.kind)
            del self._due_evals[0]
        return True

    def _strike(self, evaluated: list[str]) -> None:
        """Owe no evaluation that has its row: the run was ended after that, and before it saved again."""
        kinds = list(evaluated)
        for number, evaluation in enumerate(self.recipe.evals):
            if kinds and evaluation.kind == kinds[0] and due(self.steps_done, evaluation.every, self.horizon):
                del kinds[0]
                self._due_evals = [owed for owed in self._due_evals if owed != number]

    def _open_folder(self) -> list[str]:
        if not self.world.is_main:
            return []
        recipe, world = self.recipe, self.world
        self.folder = RunFolder(recipe, self.steps_done)
        if self._is_renumbered:
            self.folder.set_aside()
        rows, evaluated = self.folder.open_rows(self.steps_done * recipe.data.batch_size if self._is_resumed else None)
        self.log = RunLog(
            recipe.folder, rows, self.horizon, self.steps_done, recipe=recipe.dump(), schedules=recipe.schedules
        )
        logger.info(
            f"{recipe.folder}: recipe {recipe.hash}, {len(self.indices['train'])} images, {self.horizon.total_steps} "
            f"steps of {recipe.data.batch_size} = {recipe.run.duration}, {self.micro_steps} micro-steps, "
            f"{world.world_size} x {world.device.type}, amp {recipe.run.amp}, loader {recipe.data.backend}, "
            f"{sum(parameter.numel() for parameter in self.trained):,} trained parameters"
        )
        return evaluated

    def _warn(self) -> None:
        # Once per machine: each has a /dev/shm and a GPU of its own.
        recipe, world = self.recipe, self.world
        if world.local_rank == 0:
            for text in (
                *loaders.warnings(recipe.data, world.local_world_size),
                *self._refused,
                precision.warning(recipe.run.amp, world.device),
                accelerator.warning(recipe.run, world.device),
            ):
                if text:
                    logger.warning(text)
            for text in loaders.notes(recipe.data, world.device):
                logger.info(text)

    # -------------------------------------------------------------------------------------------- what lasts

    def state_dict(self, *, together: bool = True) -> dict[str, Any]:
        """All that must survive. The data stream, the schedules and every draw are functions of the step.

        Args:
            together: called on all ranks, so that what only they know is in it: sums of the log's interval and the
                images that they replaced.
        """
        of_ranks = dist.gather_objects(self.bad_images) if together else [self.bad_images]
        return {
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "skipped": self.skipped,
            "meter": self.meter.state_dict(together=together),
            "monitors": self.monitors.state_dict(),
            "seconds": self.clock.seconds,
            "bad_images": {p: reason for bad in of_ranks for p, reason in bad.items()},
            "due_evals": self._due_evals,
            "threads": torch.get_num_threads(),
            "total_steps": self.horizon.total_steps,
            "horizon": self.horizon._asdict(),
            "recipe": self.recipe.dump(),
            "identity": self._identity(),
            "versions": versions(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> list[str]:
        """Continue after the images of a checkpoint: at its step, or at the last whole one of today's size.

        Returns:
            A line for each thing that starts anew.

        Raises:
            CheckpointError: the method has other tensors.
        """
        try:
            self.method.load_state_dict(state["method"])
        except RuntimeError as error:
            said = "; ".join(line.strip() for line in str(error).splitlines()[1:3])
            raise CheckpointError(f"the checkpoint is of another network than the recipe: {said}") from None
        anew = [optim.load_state_dict(self.optimizer, state["optimizer"])]
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        elif self.scaler.is_enabled():
            anew.append("the loss scaler starts anew")
        self.skipped = state["skipped"].to(self.world.device)
        self.meter.load_state_dict(state["meter"], self.world.rank)
        self.monitors.load_state_dict(state["monitors"])
        self.clock.seconds = state["seconds"]
        self.bad_images = state["bad_images"]
        self.steps_done = state["step"] * horizon_of(state, 0).batch_size // self.recipe.data.batch_size
        return [text for text in anew if text]

    def _identity(self) -> dict[str, Any]:
        world = self.world
        return identity(
            self.recipe, world.world_size, world.device.type, self.indices, self.stream_version, self._cache
        )

    def _start_from(self, resume: bool, allow_changes: bool) -> None:
        """Initialize the method, or continue a run; the same on all ranks."""
        # Rank 0 chooses, all load: a disk that only one machine sees must not send ranks to different steps.
        path = dist.together(lambda: newest_checkpoint(self.recipe, resume=resume) if self.world.is_main else None)
        path = dist.gather_objects(path)[0]

        def load() -> None:
            if path is None:
                self._initialize()
            self.monitors = Monitors(self.method)
            if path is not None:
                self._resume(path, allow_changes)

        dist.together(load)
        if self.recipe.data.teacher_cache:
            dist.together(lambda: teacher_cache.check(self.recipe, self.method, self.indices["train"]))
        dist.must_agree(
            {
                "the recipe": self.recipe.hash,
                "the number of steps": self.horizon.total_steps,
                "the step to start from": self.steps_done,
                "the version of the stream": self.stream_version,
                "the identity of data.teacher_cache": self._cache,
                **{f"the fingerprint of data.{split}": index.fingerprint for split, index in self.indices.items()},
            }
        )

    def _resume(self, path: Path, allow_changes: bool) -> None:
        """Continue from a checkpoint, and say all that is different from then."""
        state = checkpoint.load(path)
        self.stream_version = stream_version(state, path)
        recipe, then, before = self.recipe, recipe_of(state, path), horizon_of(state, self.horizon.num_images)
        changed = check_identity(state, path, self._identity(), allow_changes=allow_changes)
        try:
            changed += self.load_state_dict(state)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None
        if self.steps_done > self.horizon.total_steps:
            raise RecipeError(
                f"run.duration={recipe.run.duration} is {self.horizon.total_steps} steps, and {path} has gone "
                f"{self.steps_done}; set a run.duration that is not shorter, or start anew under another name"
            )
        if self.world.device.type == "cpu" and "threads" in state:
            changed.append(accelerator.keep_threads(state["threads"], self.world.local_world_size))
        if state["versions"] != versions():
            changed.append(f"{path} was written with {state['versions']}, this is {versions()}: numbers may differ")
        self._is_resumed, self._is_renumbered = True, before.batch_size != recipe.data.batch_size
        if then:
            changed += jumps(then, before, state["step"], recipe, self.horizon, self.steps_done)
            owed = [then.evals[number] for number in state.get("due_evals", [])]
            self._due_evals = [number for number, evaluation in enumerate(recipe.evals) if evaluation in owed]
        if not self.world.is_main:
            return
        for text in filter(None, changed):
            logger.warning(f"resumed differently: {text}")
        for text in free_changes(then, recipe) if then else ():
            logger.info(f"resumed the same: {text}")
        logger.info(f"resumed {path} at step {self.steps_done}")
        if self.stream_version != loaders.STREAM_VERSION:
            logger.info(
                f"the run keeps the order of images that it began with, version {self.stream_version} of the stream; a "
                f"new run has version {loaders.STREAM_VERSION}"
            )
        if self._is_renumbered:
            seen, kept = state["step"] * before.batch_size, self.steps_done * recipe.data.batch_size
            again = f", the last {seen - kept:,} are seen again" if seen > kept else ""
            logger.warning(
                f"steps of {recipe.data.batch_size} images instead of {before.batch_size}: step {state['step']} is "
                f"step {self.steps_done} now, of {seen:,} images{again}; what was before is kept in "
                f"{recipe.folder}/before_step_{self.steps_done}"
            )

    def _initialize(self) -> None:
        given = set()
        for init in self.recipe.init:
            checkpoint.initialize(self.method, self.recipe.method, init)
            given |= set(init.load)
        for name, part in self.method.named_children():
            is_frozen = not any(parameter.requires_grad for parameter in part.parameters())
            follows = any(prefix.startswith(name) for prefix in self.method.moved_after_step)
            if is_frozen and not follows and name not in given and self.world.is_main:
                logger.warning(f"{name} is frozen and random: no entry of init loads it")

    def _save(self, step: int, *, must: bool) -> None:
        state = self.state_dict()
        problem, is_finite = "", True
        if self.world.is_main:
            try:
                with self.consensus.saving():
                    logger.info(f"saved {self._write(step, state)}")
            except CheckpointError as error:
                problem, is_finite = str(error), not isinstance(error, NotFiniteState)
        if self.folder:
            self.folder.list_bad_images(state["bad_images"])
        problem, is_finite = dist.gather_objects((problem, is_finite))[0]
        if not is_finite:
            raise shared(NotFinite(problem))
        if problem and must:
            raise shared(NotSaved(problem))
        if problem and self.world.is_main:
            logger.warning(f"{problem}; training continues")

    def _write(self, step: int, state: dict[str, Any]) -> Path:
        path = checkpoint.save(self.recipe.folder / "checkpoints", step, state, self.recipe.run.keep)
        self._saved = step
        return path


def run(
    recipe: Recipe,
    *,
    resume: bool = False,
    allow_changes: bool = False,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Run a recipe from start to end in the process group that torchrun describes, or alone.

    Args:
        recipe, resume, allow_changes: see `Trainer`.
        check: what each machine has to find in order first; where it raises on one rank, all end.

    Raises:
        As `Trainer` and `Trainer.fit`.
    """
    with _ended_by_signals(), dist.group(recipe.run.device, recipe.run.timeout_seconds) as world:
        started = time.perf_counter()
        try:
            dist.together(check)
            Trainer(recipe, world, resume=resume, allow_changes=allow_changes).fit()
        except Exception as error:
            known = None if isinstance(error, KNOWN) else faults.fault(error, recipe, world.device)
            if known is None:
                raise
            known.__dict__ |= error.__dict__  # who reports it
            raise known from None
        logger.info(f"{recipe.folder}: done in {duration(time.perf_counter() - started)}")


class _Interrupted(KeyboardInterrupt):
    exit_code = Stopped.exit_code


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Around what is no step: a signal ends it at once, with nothing to be saved.

    Raises:
        Stopped: a signal arrived.
    """

    def interrupt(number: int, frame: Any) -> None:
        raise _Interrupted

    with _heard(interrupt):
        try:
            yield
        except _Interrupted:
            raise own(Stopped("stopped by a signal outside the steps; start again with --resume")) from None


@contextmanager
def _heard(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Give the signals to a handler; a hang-up that is ignored, as under nohup, stays so."""
    heard = [s for s in SIGNALS if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in heard}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old or signal.SIG_DFL)


def cached(batch: Batch) -> tuple[Tensor, ...]:
    """What a cache has of a batch, as a further argument of the method; nothing without one."""
    return () if batch.features is None else (batch.features,)


def _no_mark(phase: str) -> None:
    pass
