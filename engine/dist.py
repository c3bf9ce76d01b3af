"""The processes of a run: the group's life, what all do or refuse together, and rows gathered for an evaluation."""

from __future__ import annotations

import contextlib
import inspect
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, NamedTuple, NoReturn, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from engine import accelerator
from engine.consensus import Consensus, exit_now
from engine.errors import (
    KNOWN,
    Ended,
    EngineError,
    MachineError,
    RankError,
    RecipeError,
    first_line,
    guarded,
    is_own,
    is_shared,
    own,
    report,
    reports,
    shared,
)
from loaders import Place

T = TypeVar("T")
LEAVING = 5.0
"""Seconds that leaving the process group may take."""


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
    rank = os.environ.get("LOCAL_RANK" if local else "RANK", "")
    return int(rank) if rank.isdecimal() else 0  # `start` refuses what is no number


def _places() -> dict[str, int]:
    """What torchrun has set, as numbers; a world of one without it.

    Raises:
        RecipeError: only a part of it is there, or it makes no sense.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "MASTER_ADDR")
    given = {name: os.environ[name] for name in (*names, "LOCAL_WORLD_SIZE") if os.environ.get(name)}
    alone = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    if given.keys() <= {"LOCAL_WORLD_SIZE"}:
        return alone
    wrong = [f"{name} is not set" for name in names if name not in given]
    numbers = {name: int(text) for name, text in given.items() if text.isdecimal()}
    wrong += [f"{name}={given[name]} is no number" for name in given.keys() - numbers.keys() - {"MASTER_ADDR"}]
    for rank, size in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if {rank, size} <= numbers.keys() and numbers[rank] >= numbers[size]:
            wrong.append(f"{rank}={numbers[rank]} is not below {size}={numbers[size]}")
    if wrong:
        there = ", ".join(f"{name}={text}" for name, text in given.items())
        raise own(
            RecipeError(
                f"the environment has a part of what torchrun sets ({there}): {'; '.join(sorted(wrong))}; start with "
                "torchrun, set all of it, or unset it to train in one process"
            )
        )
    return {**alone, **numbers}


def start(device: str, timeout_seconds: int) -> World:
    """Join the process group that torchrun describes (NCCL on GPUs, gloo on CPUs), or run alone without it.

    Raises:
        RecipeError: the environment has a part of what torchrun sets.
        DeviceError: a GPU is asked for and there is none, or fewer than ranks on this machine.
        MachineError: the ranks do not meet.
    """
    places = _places()
    local_rank, local_world_size = places["LOCAL_RANK"], places["LOCAL_WORLD_SIZE"]
    here = accelerator.open_device(device, local_rank, local_world_size)
    world = World(places["RANK"], places["WORLD_SIZE"], local_rank, local_world_size, here)
    # torchrun with one rank makes a group too: one GPU then runs all that many run.
    if "MASTER_PORT" in places:
        _join(here, timeout_seconds)
    global _consensus
    # The store of the default group has no public name.
    store = dist.distributed_c10d._get_default_store() if dist.is_initialized() else None
    _consensus = Consensus(world.rank, world.world_size, here, store, timeout_seconds)
    return world


def _join(device: torch.device, timeout_seconds: int) -> None:
    """Make the process group, in a thread: the call may wait for a machine that never comes, and hears no signal."""
    global _left
    failed: list[Exception] = []

    def join() -> None:
        try:
            if device.type == "cuda":
                torch.cuda.set_device(device)  # each thread has its own
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                timeout=timedelta(seconds=timeout_seconds),
                device_id=device if device.type == "cuda" else None,
            )
        except Exception as error:
            failed.append(error)

    _left = False
    joins = threading.Thread(target=join, name="init_process_group", daemon=True)
    joins.start()
    joins.join()
    _left = True
    for error in failed:
        said, address, port = first_line(error)[:200].rstrip("."), os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
        remedy = "start all ranks, with the address of rank 0's machine and a port that is free there"
        if "EADDRINUSE" in said:
            remedy = "set a MASTER_PORT that is free"
        try:  # only now: a name may come into being while the ranks wait
            socket.getaddrinfo(address, None)
        except OSError as unknown:
            said, remedy = str(unknown), "set a MASTER_ADDR that this machine knows"
        raise own(MachineError(f"the ranks do not meet at {address}:{port}: {said}; {remedy}, or use torchrun"))


_consensus: Consensus | None = None  # of the process group, and like it one for the process
_left = True  # whether the process may end as any other


def consensus(world: World) -> Consensus:
    """The agreement of the ranks of this run."""
    if _consensus is None or _consensus.device != world.device:  # a world made by hand
        return Consensus(world.rank, 1, world.device)
    return _consensus


def wrap(method: nn.Module, world: World, *, accumulates: bool) -> nn.Module:
    """The module to call in training: on several ranks one that averages gradients over them.

    Args:
        accumulates: whether some backward passes run under `no_sync`.
    """
    if not dist.is_initialized():
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


@contextlib.contextmanager
def group(device: str, timeout_seconds: int) -> Iterator[World]:
    """`start` and `stop` around a run; what goes wrong on one rank ends it on all.

    Raises:
        Ended: another rank has ended the run and says why.
    """
    world = start(device, timeout_seconds)
    agreement = consensus(world)
    try:
        yield world
    except BaseException as error:
        raised = error
        if not (is_shared(error) or is_own(error) or isinstance(error, Ended)):
            if is_connection(error):
                agreement.wait_for_ending()
            raised = agreement.end(error, saves=False)
            if agreement.is_grouped and is_own(raised) and isinstance(raised, Exception):  # no interrupt
                report(raised)
        stop(in_order=is_shared(error))
        if raised is error:
            raise
        raise raised from None
    stop()


def is_connection(error: BaseException) -> bool:
    """Whether an error is what the end of another rank looks like here."""
    words = ("gloo", "NCCL", "Connection", "Socket", "Broken pipe")
    is_of_torch = isinstance(error, RuntimeError) and not isinstance(error, KNOWN)
    return isinstance(error, dist.DistError) or (is_of_torch and any(word in str(error) for word in words))


def stop(*, in_order: bool = True) -> None:
    """Leave the process group.

    Args:
        in_order: all ranks do so. Otherwise the group is left as it is: NCCL's `destroy_process_group` waits for the
            others, which may be waiting for this rank; `leave` then ends the process.
    """
    global _consensus, _left
    if _consensus is not None:
        _left = in_order or not _consensus.is_grouped
        _consensus.close(in_order=in_order)
        _consensus = None
    if in_order and dist.is_initialized():
        destroys = threading.Thread(target=dist.destroy_process_group, name="destroy_process_group", daemon=True)
        destroys.start()
        destroys.join(LEAVING)
        _left = not destroys.is_alive()


def leave(main: Callable[[], int]) -> NoReturn:
    """Run a tool's `main` and end the process with its code, whatever other ranks and their devices are doing."""
    rank, local_rank = environment_rank(), environment_rank(local=True)
    try:
        code = guarded(
            main,
            says=lambda error: reports(error, rank, local_rank),
            # A rank that waits for others does not hear a handler of Python's: a signal ends it as it is.
            takes_signals="RANK" not in os.environ,
        )()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 2
    if _left:
        sys.exit(code)
    exit_now(code)


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
        raise shared(error)
    for rank, text in enumerate(errors):
        if text is not None:
            raise shared(RankError(rank, text))
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
                text = f"{name} is {fact} on rank 0 and {theirs[name]} on rank {rank}, expected the same"
                raise shared(RecipeError(text))


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
