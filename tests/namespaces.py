"""Commands in a PID namespace of their own, as a container has one, on this machine and under its host name."""

import ctypes
import os
import signal
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

_NEW_MOUNTS, _NEW_PID, _PARENT_DEATH, _PRIVATE = 0x20000, 0x20000000, 1, 0x4000 | 0x40000  # of linux/sched.h and others
_ALONE = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]


@lru_cache
def _prefix() -> tuple[str, ...]:
    for user in ([], ["--user", "--map-root-user"]):
        try:
            if subprocess.run([*_ALONE, *user, "true"], capture_output=True, check=False).returncode == 0:
                return (*_ALONE, *user)
        except OSError:  # there is no such command
            break
    return ()


def started(*words: Any, **options: Any) -> subprocess.Popen[str]:
    """Start a command as process 1 of a new PID namespace; skip the test where the machine does not allow that."""
    if not _prefix():
        pytest.skip("unshare cannot make a PID namespace here")
    words = tuple(str(word) for word in (*_prefix(), *words))
    return subprocess.Popen(words, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, **options)


def kill(process: subprocess.Popen[str]) -> None:
    """Kill a command that was started here, by SIGKILL, and wait until it has closed its output."""
    process.kill()  # of `unshare`, which kills the command as it ends
    assert process.stdout is not None
    process.stdout.read()


def enter() -> bool:
    """Move this process into a PID namespace of its own, as process 1. Return whether that is allowed, and nothing else
    outside: the process that was there waits for the one inside, and ends as it does."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_NEW_PID | _NEW_MOUNTS):
        return False
    inside = os.fork()
    if inside:
        code = os.waitstatus_to_exitcode(os.waitpid(inside, 0)[1])
        if code < 0:
            os.kill(os.getpid(), -code)
        os._exit(code)
    libc.prctl(_PARENT_DEATH, signal.SIGKILL)
    if libc.mount(b"none", b"/", None, _PRIVATE, None) or libc.mount(b"proc", b"/proc", b"proc", 0, None):
        raise OSError(ctypes.get_errno(), "/proc cannot be mounted")
    return True


def allowed() -> bool:
    """Return whether `enter` can work here."""
    asker = os.fork()
    if not asker:
        os._exit(0 if ctypes.CDLL(None).unshare(_NEW_PID | _NEW_MOUNTS) == 0 else 1)
    return os.waitpid(asker, 0)[1] == 0


def children(pid: int) -> list[int]:
    """Return the processes that `pid` has started and that still run."""
    return [int(number) for number in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
