"""The processes of a run: the group's life, agreement between ranks, and rows gathered for an evaluation."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from engine.errors import DeviceError, EngineError, RankError, RecipeError
from loaders import Place, machine

T = TypeVar("T")


class World(NamedTuple):
    """This process among all of the run."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and logs."""
        return self.rank == 0

    @property
    def place(self) -> Place:
        """What a loader has to know about it."""
        return Place(self.rank, self.world_size, self.local_world_size, self.device)


def environment_rank(*, local: bool = False) -> int:
    """This process's rank in the run, or on its machine, as torchrun gives it before the group exists."""
    return int(os.environ.get("LOCAL_RANK" if local else "RANK", 0))


def start(device: str, timeout_seconds: int) -> World:
    """Join the process group that torchrun describes (NCCL on GPUs, gloo on CPUs), or run alone without it.

    Raises:
        DeviceError: a GPU is asked for and there is none, or fewer than ranks on this machine.
    """
    rank, local_rank = environment_rank(), environment_rank(local=True)
    world_size, local_world_size = (int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    gpus = torch.cuda.device_count()
    if device == "cuda" or (device == "auto" and gpus):
        if gpus < local_world_size:
            raise DeviceError(
                f"run.device: {local_world_size} ranks on this machine need a GPU each, found {gpus}; "
                "start fewer with --nproc_per_node or set run.device=cpu"
            )
        here = torch.device("cuda", local_rank)
        torch.cuda.set_device(here)
    else:
        here = torch.device("cpu")
        torch.set_num_threads(max(1, machine.cores() // local_world_size))
    if world_size > 1:
        dist.init_process_group(
            "nccl" if here.type == "cuda" else "gloo",
            timeout=timedelta(seconds=timeout_seconds),
            device_id=here if here.type == "cuda" else None,
        )
    return World(rank, world_size, local_rank, local_world_size, here)


def wrap(method: nn.Module, world: World, *, accumulates: bool) -> nn.Module:
    """The module to call in training: on several ranks one that averages gradients over them.

    Args:
        accumulates: whether some backward passes run under `no_sync`.
    """
    if world.world_size == 1:
        return method
    # Statistics of BatchNorm stay per rank, as in the reference; evaluations use rank 0's.
    # The key that says so has a new name since PyTorch 2.15.
    names = inspect.signature(DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    options: dict[str, Any] = {buffers: False, "gradient_as_bucket_view": True}
    # With accumulation a static graph needs its first step to be reduced with every micro-step (PyTorch 2.14
    # asserts it), which rounds differently: a resumed run would no longer be bit-identical.
    options["static_graph"] = not accumulates
    device_ids = [world.device] if world.device.type == "cuda" else None
    return DistributedDataParallel(method, device_ids=device_ids, **options)


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def gather_objects(mine: Any) -> list[Any]:
    """Plain data of every rank, in rank order."""
    if not dist.is_initialized():
        return [mine]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def together(action: Callable[[], T]) -> T:
    """Do something that can fail on every rank; where it fails on one, all raise and none waits for it.

    Raises:
        EngineError, ValueError, OSError: what `action` raised here.
        RankError: what it raised on another rank, which is named.
    """
    result: T | None = None
    error: EngineError | ValueError | OSError | None = None
    try:
        result = action()
    except (EngineError, ValueError, OSError) as caught:
        error = caught
    errors = gather_objects(str(error) if error else None)
    if error:
        raise error
    for rank, text in enumerate(errors):
        if text is not None:
            raise RankError(rank, text)
    return cast(T, result)


def must_agree(facts: dict[str, Any]) -> None:
    """Check that all ranks are about to do the same.

    Raises:
        RecipeError: on all ranks, naming the fact and two ranks that differ.
    """
    everyone = gather_objects(facts)
    for rank, theirs in enumerate(everyone):
        for name, fact in everyone[0].items():
            if theirs[name] != fact:
                raise RecipeError(f"{name} is {fact} on rank 0 and {theirs[name]} on rank {rank}, expected the same")


class Consensus:
    """Lets all ranks see, at the same step, that one of them has a bad number or was asked to stop.

    One small maximum over ranks at each step. On a GPU it is read one step later, when it has long been done, so
    that the host never waits for the step it has just launched.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self._flags = torch.zeros(2, device=world.device)  # bad, stop
        self._host = torch.zeros(2, pin_memory=world.device.type == "cuda")
        self._copied: torch.cuda.Event | None = None

    def propose(self, bad: Tensor, stop: bool) -> tuple[bool, bool]:
        """Put in this step's flags and get (bad, stop) of all ranks, of the step before on a GPU."""
        agreed = self.agreed() if self._copied is not None else (False, False)
        self._flags[0] = bad
        self._flags[1].fill_(float(stop))
        if self.world.world_size > 1:
            dist.all_reduce(self._flags, op=dist.ReduceOp.MAX)
        self._host.copy_(self._flags, non_blocking=True)
        if self.world.device.type != "cuda":
            return self.agreed()
        self._copied = torch.cuda.Event()
        self._copied.record()
        return agreed

    def agreed(self) -> tuple[bool, bool]:
        """(bad, stop) of the newest step, waiting for it: before anything is saved or evaluated."""
        if self._copied is not None:
            self._copied.synchronize()
        bad, stop = self._host.tolist()
        return bad > 0, stop > 0


def mean(values: Tensor) -> Tensor:
    """Mean over ranks of a vector."""
    if dist.is_initialized():
        values = values.clone()
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values


def total(values: Tensor) -> Tensor:
    """Sum over ranks of a vector."""
    if dist.is_initialized():
        values = values.clone()
        dist.all_reduce(values)
    return values


def gather_rows(rows: Tensor) -> Tensor:
    """Rows [n, D] or [n] of all ranks, n differing between them, in rank order."""
    if not dist.is_initialized():
        return rows
    sizes = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(rows)], device=rows.device))
    counts = [int(size) for size in sizes]
    padded = rows.new_zeros((max(counts), *rows.shape[1:]))
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def broadcast_buffers(module: nn.Module) -> None:
    """Give every rank rank 0's buffers: BatchNorm statistics are per rank, and an evaluation needs one network."""
    if dist.is_initialized():
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)
