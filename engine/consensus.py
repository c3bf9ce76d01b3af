"""How all ranks end together: agreement at each step, and one protocol for whatever one rank meets alone.

Agreement goes over the process group's store, from host to host, so it waits for no device and works where a device no
longer does. Before a step, and again before its update, every rank says that it is well; the update happens on all or
on none. A rank that cannot go on writes why, and which rank saves what all of them have; the others read it at their
next meeting or, where a collective holds them, in a thread of their own, and everyone is gone within `DEADLINE`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from engine.errors import Ended, LostRank, MachineError, Stopped, first_line, own

DEADLINE = 10.0
"""Seconds from the news of an ending to the end of the process, however stuck it is."""
SAVING = 60.0
"""Seconds that saving may take beyond that."""
UNANSWERED = 8.0
"""Seconds after a signal that a rank waits for others that do not answer."""
SILENT = 30.0
"""Seconds without a sign of life after which a rank that others wait for is given up."""
CLAIM = 2.0
"""Seconds that the other ranks leave to rank 0, whose buffers are those of a checkpoint, to say that it saves."""
_POLL = 0.25
_KEY = "ending"
_FLAG = 1 << 20  # a meeting is one number: ranks that have come, and of them those that ask to stop and that are bad


def exit_now(code: int) -> NoReturn:
    """End the process, whatever its threads and devices do and whether anyone reads what it says."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # broken, closed, none
            stream.flush()
    os._exit(code)


class Ending(NamedTuple):
    """Why a run ends on all ranks though only one has met the reason."""

    rank: int
    code: int
    """Exit code of every rank."""
    text: str
    saves: bool
    """Whether what was trained so far is to be saved."""
    is_whole: bool
    """Whether the state of `rank` is that after a whole step, so that it can save."""


class Consensus:
    """Agreement between the ranks of a run; with one rank alone it agrees with itself.

    Args:
        rank, world_size, device: of this process.
        store: the process group's, None without a group.
        patience: seconds that a rank waits for the others at a meeting.
    """

    asked_to_stop: bool
    """Whether a signal arrived here."""
    ending: Ending | None
    """Why the run ends, once that is known here."""

    def __init__(
        self, rank: int, world_size: int, device: torch.device, store: Any = None, patience: float = 1800.0
    ) -> None:
        self.rank, self.world_size, self.device, self.patience = rank, world_size, device, patience
        self.asked_to_stop, self.ending = False, None
        self._bad = torch.zeros((), pin_memory=device.type == "cuda")
        self._copied: torch.cuda.Event | None = None
        self._meetings = 0
        self._agreed = (False, False)
        self._updated: torch.cuda.Event | None = None
        self._is_saving = self._is_torn = False
        self._others_listen = True
        self._closed, self._looked = threading.Event(), threading.Event()
        self._store: Any = None
        if store is not None and world_size > 1:
            self._store = torch.distributed.PrefixStore("consensus", store)
            threading.Thread(target=self._watch, args=(self._store.clone(),), name="consensus", daemon=True).start()

    # -------------------------------------------------------------------------------------------- every step

    def meet(self) -> None:
        """Wait until every rank has come this far.

        Raises:
            Ended: one of them will not.
        """
        self._meet(False)

    def stops(self) -> bool:
        """Meet, and learn whether any rank is asked to stop: inside an evaluation.

        Raises:
            Ended: one of them will not come.
        """
        return self._meet(False)[1]

    def propose(self, bad: Tensor, stop: bool = False) -> tuple[bool, bool]:
        """Meet, and learn whether any rank has bad numbers or is asked to stop.

        Args:
            bad: 0-d bool, of this step. On a GPU it is read at the next call, when it has long been computed, so that
                the host never waits for the step it has just launched.
            stop: ask to stop; a signal that arrived asks too.

        Returns:
            (bad, stop), bad of this step on a CPU and of the one before on a GPU.
        """
        if self.device.type == "cuda":
            before = self._newest()
            self._bad.copy_(bad, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        else:
            before = bool(bad)
        self._agreed = self._meet(before, stop)
        return self._agreed

    def agreed(self) -> tuple[bool, bool]:
        """(bad, stop) of the newest step, waiting for it: before anything is saved or evaluated."""
        if self._copied is not None:
            bad, stop = self._meet(self._newest())
            self._agreed = bad or self._agreed[0], stop or self._agreed[1]
        return self._agreed

    def updated(self) -> None:
        """The update of a step has been queued on the device."""
        if self.device.type == "cuda":
            self._updated = torch.cuda.Event()
            self._updated.record()

    def _newest(self) -> bool:
        if self._copied is not None:
            # Not `synchronize`: a device that waits for a rank that is gone would hold the host too.
            self._wait(self._copied.query, lambda: "the device")
        return bool(self._bad)

    def _meet(self, bad: bool, stop: bool = False) -> tuple[bool, bool]:
        stop = stop or self.asked_to_stop
        if self._store is None:
            return bad, stop
        self._meetings += 1
        key = f"meeting/{self._meetings}"
        came = self._ask(lambda: self._store.add(key, 1 + stop * _FLAG + bad * _FLAG**2))

        def are_here() -> bool:
            nonlocal came
            if came % _FLAG < self.world_size:
                # Whatever happens after all have come: where one has gone on, all do.
                came = self._ask(lambda: self._store.add(key, 0), heeds_ending=False)
            return came % _FLAG == self.world_size

        self._wait(are_here, lambda: self._missing(key), watched=True)
        if self.rank == 0 and self._meetings > 1:  # all have left it
            self._ask(lambda: self._store.delete_key(f"meeting/{self._meetings - 1}"))
        return came // _FLAG**2 > 0, came // _FLAG % _FLAG > 0

    def _wait(self, is_done: Callable[[], bool], for_whom: Callable[[], str], *, watched: bool = False) -> None:
        started, pause, signaled = time.monotonic(), 0.0, None
        beats: dict[int, tuple[int, float]] = {}  # rank -> its beats, and since when there were no more
        looked = started
        while not is_done():
            time.sleep(pause)
            pause = min(1.3 * pause + 1e-5, 0.01)
            waited = time.monotonic() - started
            if self.ending is not None:
                raise self._ended(self.ending)
            if self.asked_to_stop and signaled is None:
                signaled = waited
            if signaled is not None and waited - signaled > UNANSWERED:
                raise Stopped(f"stopped by a signal; {for_whom()} did not answer")
            if watched and time.monotonic() - looked > 1:
                looked = time.monotonic()
                for rank in range(self.world_size):
                    count = self._ask(functools.partial(self._store.add, f"beat/{rank}", 0))
                    if rank not in beats or beats[rank][0] != count:
                        beats[rank] = count, looked
                    elif looked - beats[rank][1] > SILENT:
                        raise LostRank(f"rank {rank} is gone: no sign of life for {SILENT:.0f} s")
            if waited > self.patience:
                raise MachineError(f"rank {self.rank}: {for_whom()} did not answer for {self.patience:.0f} s")

    def _missing(self, key: str) -> str:
        """Names of the ranks that are not at a meeting that takes too long: those that are, say so now."""
        self._store.set(f"{key}/{self.rank}", "here")
        time.sleep(2 * _POLL)
        missing = [str(rank) for rank in range(self.world_size) if not self._store.check([f"{key}/{rank}"])]
        return f"rank {', '.join(missing)}" if missing else "another rank"

    def _ask(self, question: Callable[[], Any], *, heeds_ending: bool = True) -> Any:
        if heeds_ending and self.ending is not None:
            raise self._ended(self.ending)
        try:
            return question()
        except RuntimeError as error:
            # The store went with the process that holds it; the thread that watches learns that, too.
            self.wait_for_ending(2.0)
            raise self._ended(self.ending or self._lost()) from error

    def _ended(self, ending: Ending) -> BaseException:
        """What to raise at a meeting that will not take place."""
        if ending.rank == self.rank:  # what is left of a group whose store is gone
            return LostRank(ending.text)
        return Ended(ending.code, ending.text)

    # -------------------------------------------------------------------------------------------- the end

    @property
    def is_grouped(self) -> bool:
        """Whether there are other ranks."""
        return self._store is not None

    def end(self, error: BaseException, *, saves: bool, is_whole: bool = False) -> BaseException:
        """Make all ranks end; the first to call it decides how.

        Args:
            error: why.
            saves: whether what was trained so far is to be saved.
            is_whole: whether this rank could do so.

        Returns:
            What to raise here: the error where it decides, `Ended` on the others.
        """
        code = getattr(error, "exit_code", 130 if isinstance(error, KeyboardInterrupt) else 1)
        mine = Ending(self.rank, code, first_line(error), saves, is_whole)
        self.ending = ending = self.ending or self._decide(mine)
        return own(error) if ending.rank == self.rank else Ended(ending.code, ending.text)

    def claims(self) -> bool:
        """Whether this rank, whose state is whole, is the one to save it."""
        if self.ending is None or not self.ending.saves:
            return False
        if self._store is None:
            return True
        self._looked.wait(DEADLINE / 2)
        # One whose end frees the others from a collective must not wait for them.
        if self._is_torn or (self.rank and self.ending.rank == self.rank and self._others_listen):
            return False
        try:
            deadline = time.monotonic() + (CLAIM if self.rank and self._others_listen else 0.0)
            while time.monotonic() < deadline and not self._store.check(["saver"]):
                time.sleep(_POLL / 5)
            return int(self._store.compare_set("saver", "", str(self.rank))) == self.rank
        except RuntimeError:  # the store has gone with rank 0, which could not save, or with the launcher
            has_saved = self.ending.rank == 0 and self.ending.is_whole
            return self.rank == self._lost().rank and not has_saved

    def _decide(self, mine: Ending) -> Ending:
        if self._store is None:
            return mine
        try:
            decided = Ending(*json.loads(self._store.compare_set(_KEY, "", json.dumps(mine))))
            # This process may hold the store, and its end is what frees those that a collective holds.
            deadline = time.monotonic() + 8 * _POLL
            while (seen := self._store.add("seen", 0)) < self.world_size and time.monotonic() < deadline:
                time.sleep(_POLL / 5)
            self._others_listen = seen > 1
        except RuntimeError:
            return self.ending or mine
        return decided

    def wait_for_ending(self, seconds: float = 3.0) -> None:
        """Wait for the news of what broke a collective here, at most so long."""
        deadline = time.monotonic() + seconds
        while self._store is not None and self.ending is None and time.monotonic() < deadline:
            time.sleep(_POLL / 5)

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Around what the deadline has to wait for."""
        self._is_saving = True
        try:
            yield
        finally:
            self._is_saving = False

    def close(self, *, in_order: bool) -> None:
        """The run is over here. Rank 0, which may hold the store, leaves last.

        Args:
            in_order: all ranks do this.
        """
        if self._store is not None and in_order:
            with contextlib.suppress(RuntimeError):
                deadline = time.monotonic() + DEADLINE / 2
                left = self._store.add("left", 1)
                while self.rank == 0 and left < self.world_size and time.monotonic() < deadline:
                    time.sleep(0.005)
                    left = self._store.add("left", 0)
        self._closed.set()

    def _watch(self, store: Any) -> None:
        """Learn of an ending whatever the main thread is doing, and see to it that the process ends."""
        while not self._closed.wait(_POLL):
            try:
                store.add(f"beat/{self.rank}", 1)
                if not store.check([_KEY]):
                    continue
                self.ending = self.ending or Ending(*json.loads(store.get(_KEY)))
                store.add("seen", 1)
            except RuntimeError:
                if self._closed.is_set():
                    return
                self.ending = self.ending or self._lost()
            threading.Thread(target=self._force, name="deadline", daemon=True).start()
            if self.device.type == "cuda":
                self._free()
            self._looked.set()
            return

    def _free(self) -> None:
        """Free a host that waits for a collective that will never be complete. An update that is queued behind one
        would then be made of what has arrived, so a state with one is no longer whole."""
        deadline = time.monotonic() + 1
        while self._updated is not None and not self._updated.query():
            if time.monotonic() > deadline:
                self._is_torn = True
                break
            time.sleep(0.01)
        with contextlib.suppress(Exception):
            torch.distributed.distributed_c10d._get_default_group().abort()

    def _force(self) -> None:
        if self._closed.wait(DEADLINE) or (self._is_saving and self._closed.wait(SAVING)):
            return
        exit_now(self.ending.code if self.ending else 1)

    def _lost(self) -> Ending:
        # torchrun's agent holds the store; started by hand, rank 0 does, and the next one speaks.
        by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        who, rank = ("the launcher", 0) if by_agent else ("rank 0", 1)
        self._others_listen = False
        return Ending(rank, LostRank.exit_code, f"{who} is gone, with the store that the ranks meet in", False, True)
