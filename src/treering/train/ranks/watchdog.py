"""Ranks watch each other: when one is gone, stuck or at another collective, the others end and report which and where.

Twice a second a thread of each rank writes into the store of the process group where its rank is, and looks at the
rank after it. A main thread that waits in a collective for a rank that will not join cannot be interrupted, so the
thread then reports what it knows and ends the process.
"""

import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from treering.core.collectives import from_first
from treering.core.errors import RankLost, TreeringError
from treering.core.topology import STARTUP
from treering.train.ranks.heartbeat import BEAT, Board, Heartbeat, Phase, different_collectives, gone
from treering.train.ranks.signals import Now, Signals

GRACE = 2.0  # seconds that a main thread has to leave a collective by itself
TANGLED = 4.0  # seconds of all ranks waiting at different collectives, after which it is an error
SILENT = 3.0  # seconds without an entry, after a collective has failed, after which a rank is reported as silent
KEY = "treering/"


class Watchdog:
    """with Watchdog(timeout, signals) as watchdog: …   With one rank it does nothing."""

    def __init__(self, timeout: float, signals: Signals, leave: Callable[[str, int], None] | None = None):
        self.timeout, self.signals = timeout, signals
        self.phase = Phase()
        self.several = dist.is_initialized() and dist.get_world_size() > 1
        self._leave = leave or _leave
        self.exempt: Any = None  # a group whose timeout is not lowered
        self._over = threading.Event()
        self._lowered: list[tuple[Any, timedelta]] = []
        if self.several:
            self.rank, self.world = dist.get_rank(), dist.get_world_size()
            # A separate group: its timeout is shorter on any device, and training has other messages.
            self._group = dist.new_group(backend="gloo", timeout=STARTUP)
            self._board = Board(KEY + from_first(uuid.uuid4().hex), self.rank, self.world)

    def __enter__(self) -> "Watchdog":
        if self.several:
            self._heartbeat = Heartbeat(self.phase)
            self._board.write(self._heartbeat.take())
            threading.Thread(target=self._watch, name="treering-watchdog", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if not self.several:
            return
        lost: RankLost | None = None
        if error is not None and (_of_ranks(error) or self.signals.interrupted_by_thread):
            lost = self._lost(self._diagnosis(error))
        elif error is not None and not isinstance(error, RankLost) and not self._agreed:
            self._board.ended(_message(error, self.signals), _code(error))
        self._over.set()
        self._board.write(self._heartbeat.take() | {"done": True})
        for group, timeout in self._lowered:
            group.set_timeout(timeout)
        if lost is not None:
            self._board.wake_stopped()
            raise lost from error

    _agreed = False

    def stop_asked(self) -> bool:
        """Return whether any rank got a signal. Every rank asks at the same places, so all get the same answer."""
        if not self.several:
            return self.signals.asked
        if not self._agreed:
            asked = torch.tensor([self.signals.asked], dtype=torch.uint8)
            dist.all_reduce(asked, op=dist.ReduceOp.MAX, group=self._group)
            self._agreed = bool(asked)
        return self._agreed

    @contextmanager
    def first_rank_first(self) -> Iterator[None]:
        """Let rank 0 do the work first and the others wait for it without a timeout; a signal still ends them."""
        if not self.several:
            yield
            return
        self._turns += 1
        name = f"first-{self._turns}"
        while self.rank > 0 and not self._board.has(name):
            if self._board.end is not None or self._board.lost:
                raise self._lost(self._story("and waited for rank 0"))
            time.sleep(BEAT / 10)
        yield
        if self.rank == 0:
            self._board.put(name, "done")

    _turns = 0

    def lower_timeouts(self) -> None:
        """Lower the timeout of all collectives to `timeout`: from now on everything has been compiled and loaded."""
        if self.several and not self._lowered:
            for group in (dist.group.WORLD, self._group, *_groups()):
                before = _timeout_of(group)
                if group is not self.exempt and before > timedelta(seconds=self.timeout):
                    self._lowered.append((group, before))
                    group.set_timeout(timedelta(seconds=self.timeout))

    @contextmanager
    def usual_timeouts(self) -> Iterator[None]:
        """Restore the longer timeouts inside, for slow disks. A rank that is gone or stopped is still noticed."""
        lowered, self._lowered = self._lowered, []
        for group, before in lowered:
            group.set_timeout(before)
        yield
        if lowered:
            self.lower_timeouts()

    def _watch(self) -> None:
        end_seen = time.monotonic()
        while not self._over.wait(BEAT):
            report = self._heartbeat.take()
            self._board.write(report)
            if self._board.look() is None and not self._board.lost:
                problem = self._board.neighbour_gone(self.timeout)
                if not problem and report["waiting"] > TANGLED:
                    problem = different_collectives(self._board.all(), TANGLED)
                if problem:
                    self._board.ended(problem, None)
                end_seen = time.monotonic()
            elif self._board.end is None and self.signals.orphaned:
                continue  # the store went with the launcher; the ranks still reach each other, and save and stop
            elif time.monotonic() - end_seen > GRACE and report["waiting"] > GRACE and not self._over.is_set():
                story = self._story("and waited for it in a collective")
                self._board.wake_stopped()
                self._leave(story, self._exit_code())
            else:
                self.signals.interrupt_from_thread()  # it may compute for hours, for a run that has ended

    def _lost(self, message: str) -> RankLost:
        error = RankLost(message)
        error.exit_code = self._exit_code()
        return error

    def _exit_code(self) -> int:
        return (self._board.end or {}).get("code") or RankLost.exit_code

    def _diagnosis(self, error: BaseException) -> str:
        until = time.monotonic() + GRACE
        while self._board.look() is None and not self._board.lost and time.monotonic() < until:
            time.sleep(BEAT / 5)
        if self.signals.interrupted_by_thread:
            return self._story("and stopped there")
        first_line = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        return self._story(f"({first_line})")

    def _story(self, how: str) -> str:
        end, here = self._board.end, f"rank {self.rank} was in {self.phase}"
        if end is not None and end.get("rank") is not None and end["code"] is not None:
            head = f"rank {end['rank']} ended: {end['message']}"
        elif end is not None:
            head = str(end["message"])
        elif self._board.lost:
            head = (
                "the store of the process group is gone, and with it the process that kept it: rank 0 or the launcher"
            )
        else:
            silent = gone(self._board, SILENT)
            head = f"rank {silent} does not answer" if silent else "a collective failed, and every rank still answers"
        return f"{head}; {here} {how}. Last seen: {self._board.table()}"


def _groups() -> list[Any]:
    """Return the groups that collectives of the step run on."""
    return [group for group in dist.distributed_c10d._world.pg_map if group is not dist.group.WORLD]


def _timeout_of(group: Any) -> timedelta:
    devices = group._device_types
    return min(group._get_backend(device).options._timeout for device in devices)


def _of_ranks(error: BaseException) -> bool:
    """Return whether `error` is how torch reports that another rank did not take part."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(
        word in text for word in ("gloo", "nccl", "connection closed by peer")
    )


def _message(error: BaseException, signals: Signals) -> str:
    if isinstance(error, Now):
        return signals.cause
    return str(error) if isinstance(error, TreeringError) else f"{type(error).__name__}: {error}"


def _code(error: BaseException) -> int:
    return error.exit_code if isinstance(error, TreeringError) else 7 if isinstance(error, Now) else 1


def _leave(message: str, code: int) -> None:
    text = "".join(c if c.isprintable() else " " for c in f"[rank {os.environ.get('RANK', '')}] {message}")
    os.write(2, f"{text}\n".encode(errors="replace"))  # no other thread can report it
    os._exit(code)
