"""Commands in a PID namespace of their own, as a container has one, on this machine and under its host name."""

import os
import subprocess
from functools import lru_cache
from typing import Any

import pytest

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
