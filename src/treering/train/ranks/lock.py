"""One run at a time in an output folder: `run.lock` names the process that uses it.

The number of a process says something only in the PID namespace in which it was written: containers on one machine may
have one host name, and each of them its own process 1. Elsewhere the touches of the file are all that is known.
"""

import json
import logging
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from treering.core.collectives import from_first, is_first
from treering.core.errors import CheckpointError

NAME = "run.lock"
BEAT = 5.0  # seconds between two touches of the file
STALE = 60.0  # a lock of a process that cannot be seen is no longer in use when it was not touched for so long


class Clock:
    """The age of a lock, and waiting. Tests pass another clock."""

    def age(self, path: Path) -> float:
        """Return the seconds since `path` was touched, by the clock of its file system: two hosts may differ."""
        probe = path.with_name(f"{NAME}.now-{uuid.uuid4().hex[:8]}")
        probe.touch()
        try:
            return probe.stat().st_mtime - path.stat().st_mtime
        finally:
            probe.unlink()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


CLOCK = Clock()


@contextmanager
def locked(folder: Path, clock: Clock = CLOCK) -> Iterator[None]:
    """Keep the lock of `folder` inside the context, on rank 0 for all ranks; a second run is a CheckpointError."""
    path, problem = folder / NAME, ""
    over = threading.Event()
    if is_first():
        try:
            mine = _take(path, clock)
        except CheckpointError as error:
            problem = str(error)
        except OSError as error:
            problem = f"{path} cannot be made: {error.strerror}; see `output`"
    try:
        if problem := from_first(problem):
            raise CheckpointError(problem)
        if is_first():
            threading.Thread(target=_beat, args=(path, over), name="treering-lock", daemon=True).start()
        yield
    finally:
        over.set()
        if is_first() and not problem:
            with suppress(OSError):
                if path.read_bytes() == mine:  # a user may have removed it, and started another run
                    path.unlink()


def _take(path: Path, clock: Clock) -> bytes:
    content = json.dumps({**whoami(os.getpid()), "host": socket.gethostname(), "id": uuid.uuid4().hex}).encode()
    for _ in range(3):
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            _clear_if_stale(path, clock)
            continue
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
        except OSError:  # a full disk; an empty lock would make the next run wait
            path.unlink(missing_ok=True)
            raise
        return content
    raise CheckpointError(f"{path} is taken by several runs at once; start one of them")


def _clear_if_stale(path: Path, clock: Clock) -> None:
    """Remove a lock whose process is dead; raise CheckpointError for one that is in use."""
    try:
        content = path.read_bytes()
        holder = _holder(content)
        if alive(holder, path, clock):
            raise CheckpointError(
                f"{path.parent} is in use by another run: process {holder.get('pid', 'unknown')} on "
                f"{holder.get('host', 'an unknown host')}. Wait for it, or give this run another output folder. "
                f"If there is no such process, remove {path}"
            )
        aside = path.with_name(f"{NAME}.stale-{uuid.uuid4().hex[:8]}")
        os.rename(path, aside)
    except FileNotFoundError:  # released, or cleared by another run
        return
    if aside.read_bytes() != content:  # another run has just taken it over; give it back
        with suppress(FileExistsError):
            os.link(aside, path)
    aside.unlink()


def _holder(content: bytes) -> dict[str, Any]:
    try:
        holder = json.loads(content)
    except ValueError:
        return {}  # just made and not yet written, or damaged: its age decides
    return holder if isinstance(holder, dict) else {}


def alive(holder: dict[str, Any], path: Path, clock: Clock = CLOCK) -> bool:
    """Return whether the process that `holder` describes may still run. Where it cannot be seen, its touches decide."""
    if not comparable(holder) or not isinstance(holder.get("pid"), int):
        return _touched(path, clock)
    now = whoami(holder["pid"])
    if now["started"] is not None:
        return holder.get("started") == now["started"]
    return now["boot"] is None and _answers(holder["pid"])


def whoami(pid: int) -> dict[str, Any]:
    """Return what identifies a process among all that had or will have its number; `started` is None if it is dead."""
    boot = started = None
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        fields = _stat(pid)
        started = None if fields[0] in "ZX" else int(fields[19])
    return {"pid": pid, "boot": boot, "started": started, "namespace": _namespace()}


def stopped(pid: int) -> bool:
    """Return whether the process is known to be stopped, by SIGSTOP or a debugger."""
    with suppress(OSError):
        return _stat(pid)[0] in "Tt"
    return False


def _stat(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def comparable(entry: Mapping[str, Any]) -> bool:
    """Return whether `entry`, written by some process, has its number from the PID namespace of this process.

    Not where one of the two is unknown: a lock of an earlier version has none.
    """
    here = {"host": socket.gethostname(), **whoami(os.getpid())}
    if any(entry.get(key) != here[key] for key in ("host", "boot", "namespace")):
        return False
    return here["namespace"] is not None or sys.platform != "linux"  # other systems have no such namespaces


def _namespace() -> int | None:
    """Return the PID namespace of this process; None where /proc does not have it, or shows that of others."""
    with suppress(OSError, ValueError):
        if int(os.readlink("/proc/self")) == os.getpid():
            return os.stat("/proc/self/ns/pid").st_ino
    return None


def _answers(pid: int) -> bool:
    """Return whether a process has the number `pid`; without /proc nothing else is known of it."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _touched(path: Path, clock: Clock) -> bool:
    """Wait until `path` is touched or is too old: a job that was started again elsewhere must not be refused.

    Nobody waits for longer than STALE, whatever the date of the file: a clock may have been set back since.
    """
    first, waited = path.stat().st_mtime, 0.0
    while (age := clock.age(path)) < STALE and waited < STALE:
        if not waited:
            dated = f", which is dated {-age:,.0f} s in the future" if age < -1.0 else ""
            logging.getLogger("treering").warning(
                f"waiting up to {STALE - max(age, 0.0):.0f} s for whether another run still uses {path}{dated}: its "
                "process cannot be seen from here"
            )
        clock.sleep(1.0)
        waited += 1.0
        if path.stat().st_mtime != first:
            return True
    return False


def _beat(path: Path, over: threading.Event) -> None:
    while not over.wait(BEAT):
        with suppress(OSError):
            os.utime(path)
