"""Ranks that may be killed, and started again: what a launcher does, without one.

`start` gives the processes instead of their results, so that a trial can pick its victim. As soon as one of them ends
before its work is done, the others are killed, as a launcher would.
"""

import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tests import namespaces
from tests.ranks import PRELOAD

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload([*PRELOAD, "tests.chaos.warm"])
PATIENCE = 600.0  # seconds until a trial counts as hung; the machine may be busy


class Hung(AssertionError):
    """Somebody waits for somebody who will never come."""


class Ended(AssertionError):
    """A rank raised an error; the message is its traceback."""


class Ranks:
    """The processes of one start."""

    def __init__(self, world: int, function: Callable[..., Any], arguments: tuple[Any, ...], *, apart: bool = False):
        self.folder = tempfile.TemporaryDirectory(prefix="chaos-ranks-")
        self.processes, self.pipes = [], []
        for rank in range(world):
            here, there = _context.Pipe(duplex=False)
            store = Path(self.folder.name) / "store"
            process = _context.Process(
                target=_rank, args=(there, rank, world, str(store), function, arguments, apart), daemon=True
            )
            process.start()
            there.close()
            self.processes.append(process)
            self.pipes.append(here)

    @property
    def pids(self) -> list[int]:
        return [process.pid or 0 for process in self.processes]

    def met(self) -> None:
        """Wait until all ranks have found each other and begin their work."""
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(PATIENCE):
                self.stop()
                raise Hung(f"rank {rank} has not begun after {PATIENCE:.0f} s")
            pipe.recv()

    def kill(self, rank: int) -> None:
        """At once, as the kernel does when memory runs out. One that is gone already stays gone."""
        if self.processes[rank].exitcode is None:
            send(self.pids[rank], signal.SIGKILL)

    def gone(self, seconds: float) -> bool:
        """Wait at most so long; whether any rank has ended by then."""
        return bool(wait([p.sentinel for p in self.processes], timeout=seconds))

    def join(self, grace: float = 0.0) -> bool:
        """Wait for the end; whether all ranks did their work. A killed rank ends them all, `grace` seconds later."""
        until = time.monotonic() + PATIENCE
        while alive := [p for p in self.processes if p.exitcode is None]:
            if any(p.exitcode for p in self.processes):
                time.sleep(grace)
                break
            if time.monotonic() > until:
                self.stop()
                raise Hung(f"{len(alive)} of {len(self.processes)} ranks were not done after {PATIENCE:.0f} s")
            wait([p.sentinel for p in alive], timeout=1.0)
        codes = [p.exitcode for p in self.processes]
        self.stop()
        if any(codes) and -signal.SIGKILL not in codes:
            raise Ended(self._said())
        return not any(codes)

    def finished(self) -> None:
        """Wait until all have met and done their work; anything else is an error."""
        self.met()
        if not self.join():
            raise Ended("a rank was killed by somebody else")

    def _said(self) -> str:
        texts = []
        for pipe in self.pipes:
            with suppress(EOFError):  # of a rank that was stopped before it could speak
                texts += [pipe.recv()] if pipe.poll(0.5) else []
        return "\n".join(texts) or "a rank failed without a word"

    def stop(self) -> None:
        """Kill whoever is left, and wait until the kernel has forgotten them all."""
        for rank, process in enumerate(self.processes):
            self.kill(rank)
            process.join()
        self.folder.cleanup()


def start(world: int, function: Callable[..., Any], *arguments: Any, apart: bool = False) -> Ranks:
    """Start `function(*arguments)` on so many ranks, each in a PID namespace if `apart`; it must be importable."""
    return Ranks(world, function, arguments, apart=apart)


def run(world: int, function: Callable[..., Any], *arguments: Any) -> None:
    """Start it, and wait until it is done; anything else is an error."""
    start(world, function, *arguments).finished()


def send(pid: int, number: int) -> None:
    """Send a signal to a process that may be gone."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _rank(
    pipe: Connection,
    rank: int,
    world: int,
    store: str,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    apart: bool,
) -> None:
    import torch
    import torch.distributed as dist

    if apart and not namespaces.enter():
        os._exit(1)
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    code = 0
    try:
        if world > 1:
            dist.init_process_group(
                "gloo",
                store=dist.FileStore(store, world),
                rank=rank,
                world_size=world,
                timeout=timedelta(seconds=PATIENCE),
            )
        pipe.send("met")
        function(*arguments)
        if world > 1:
            dist.barrier()
    except BaseException:
        pipe.send(f"rank {rank}:\n{traceback.format_exc()}")
        code = 1
    pipe.close()
    os._exit(code)
