"""The reports of each rank about itself to the others, in the store of the process group."""

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from treering.train.ranks.lock import comparable, stopped, whoami

BEAT = 0.5  # seconds between two entries of a rank
IDLE = 0.2  # of a processor; a rank that uses more is at work
INNERMOST = 4  # frames that are searched for a collective: frames of an operator may be above it
Beat = dict[str, Any]


@dataclass
class Phase:
    """The phase and step of this rank. Written by the loop, read by the thread of the watchdog."""

    name: str = "preparing"
    step: int = 0

    def begin(self, step: int) -> None:
        self.name, self.step = "beginning", step

    def __str__(self) -> str:
        return f"{self.name} of step {self.step}" if self.step else self.name


class Heartbeat:
    """Reports about this process: its phase, its collectives, and how long it has waited at one."""

    def __init__(self, phase: Phase):
        self.phase = phase
        self.thread = threading.get_ident()
        self.fixed = {"host": socket.gethostname(), **whoami(os.getpid())}
        self.waiting = 0.0  # seconds for which the loop has been at one collective, with an idle processor
        self._beats = 0
        self._last: Any = None
        self._since = self._now = time.monotonic()
        self._used = time.process_time()

    def take(self) -> Beat:
        now, used = time.monotonic(), time.process_time()
        busy = (used - self._used) / max(now - self._now, 1e-3) > IDLE
        at = (self.phase.name, self.phase.step, counts := issued(), self._place())
        if at != self._last or busy or at[3] is None:
            self._since = now
        self._last, self._now, self._used = at, now, used
        self.waiting = now - self._since
        self._beats += 1
        return {
            **self.fixed,
            "phase": self.phase.name,
            "step": self.phase.step,
            "issued": counts,
            "at": "" if at[3] is None else at[3][0],
            "waiting": self.waiting,
            "beat": self._beats,
        }

    def _place(self) -> tuple[str, int] | None:
        """Return the function and line of torch.distributed at which the loop is; None if it is elsewhere."""
        frame = sys._current_frames().get(self.thread)
        for _ in range(INNERMOST):
            if frame is None:
                return None
            if os.path.join("torch", "distributed") in frame.f_code.co_filename:
                return frame.f_code.co_name, frame.f_lineno
            frame = frame.f_back
        return None


def issued() -> dict[str, int]:
    """Return how many collectives this rank has started, by group."""
    groups: dict[Any, str] = dict(dist.distributed_c10d._world.pg_names)
    return {name: int(group._get_sequence_number_for_group()) for group, name in groups.items()}


class Board:
    """The entries of all ranks under one name, which belongs to one run of one job."""

    def __init__(self, name: str, rank: int, world: int):
        # A separate client: a shared one would block while the main thread waits in it.
        self._store = dist.PrefixStore(name, dist.distributed_c10d._get_default_store().clone())  # type: ignore[attr-defined]
        self._lock = threading.Lock()
        self.rank, self.world = rank, world
        self.end: Beat | None = None  # the report of the first rank that ended
        self.lost = False  # the store cannot be reached
        self._neighbour: tuple[int, float] = (-1, time.monotonic())

    def put(self, key: str, value: str) -> None:
        with self._lock:
            try:
                self._store.set(key, value)
            except RuntimeError:
                self.lost = True

    def has(self, key: str) -> bool:
        with self._lock:
            try:
                return not self.lost and bool(self._store.check([key]))
            except RuntimeError:
                self.lost = True
                return False

    def get(self, key: str) -> Beat | None:
        if not self.has(key):
            return None
        with self._lock:
            try:
                return dict(json.loads(self._store.get(key)))
            except RuntimeError:
                self.lost = True
                return None

    def write(self, entry: Mapping[str, Any]) -> None:
        self.put(str(self.rank), json.dumps(entry))

    def all(self) -> list[Beat | None]:
        return [self.get(str(rank)) for rank in range(self.world)]

    def ended(self, message: str, code: int | None) -> None:
        """Report why this rank ends, or (without a code) what is wrong with another. The first report counts."""
        if self.look() is None:
            entry = {"rank": self.rank, "message": message, "code": code}
            with self._lock:
                try:
                    self.end = dict(json.loads(self._store.compare_set("end", "", json.dumps(entry))))
                except RuntimeError:
                    self.lost = True

    def look(self) -> Beat | None:
        self.end = self.end or self.get("end")
        return self.end

    def neighbour_gone(self, timeout: float) -> str | None:
        """Return why the rank after this one will not answer any more; None if it may."""
        other = (self.rank + 1) % self.world
        entry = self.get(str(other))
        if entry is None or entry.get("done"):
            self._neighbour = (-1, time.monotonic())
            return None
        if entry["beat"] != self._neighbour[0]:
            self._neighbour = (entry["beat"], time.monotonic())
        silent = time.monotonic() - self._neighbour[1]
        if silent > 2 * BEAT and dead(entry):
            return f"rank {other} is gone without a message in {phase_of(entry)}; it was killed, perhaps for its memory"
        if silent > timeout:
            return f"rank {other} has not answered for {silent:.0f} s; it was in {phase_of(entry)}"
        return None

    def wake_stopped(self) -> None:
        """Let ranks of this machine that are stopped go on: they then see that the run has ended, and end as well.

        Launchers send them SIGTERM, which reaches no process that is stopped, and wait half a minute before they kill.
        """
        for entry in self.all():
            if entry is not None and comparable(entry) and not dead(entry) and stopped(entry["pid"]):
                with suppress(OSError):
                    os.kill(entry["pid"], signal.SIGCONT)

    def table(self) -> str:
        return ", ".join(f"rank {r} {phase_of(e) if e else 'nothing yet'}" for r, e in enumerate(self.all()))


def phase_of(entry: Mapping[str, Any]) -> str:
    """Return the phase of a rank, for messages."""
    if entry.get("done"):
        return "done"
    return str(Phase(entry["phase"], entry["step"]))


def dead(entry: Mapping[str, Any]) -> bool:
    """Return whether the process is known to be dead; only a rank in its PID namespace can know."""
    if not comparable(entry) or entry["started"] is None:
        return False
    return whoami(entry["pid"])["started"] != entry["started"]


def gone(board: Board, seconds: float) -> str:
    """Return the ranks from which no report comes within `seconds`."""
    before = board.all()
    time.sleep(seconds)
    after = board.all()
    silent = [
        str(rank)
        for rank, (old, new) in enumerate(zip(before, after))
        if rank != board.rank
        and (new is None or (old is not None and new["beat"] == old["beat"] and not new.get("done")))
    ]
    return ", ".join(silent)


def different_collectives(entries: list[Beat | None], seconds: float) -> str | None:
    """Return which ranks wait at which collective, if all wait and not at the same one; else None."""
    if any(entry is None or entry.get("done") or entry["waiting"] < seconds for entry in entries):
        return None
    reports = {rank: entry for rank, entry in enumerate(entries) if entry is not None}
    for name in reports[0]["issued"]:
        places = {r: f"{e['issued'][name]} {e['at']}" for r, e in reports.items() if name in e["issued"]}
        usual = max(sorted(set(places.values())), key=list(places.values()).count)
        if strays := [rank for rank, place in places.items() if place != usual]:
            which = ", ".join(f"rank {r} is in {phase_of(reports[r])} at collective {places[r]}" for r in strays)
            return f"the ranks wait at different collectives: {which}, the others at {usual}; one was left out or added"
    return None
