"""`--nproc N`: this process becomes torch's elastic agent and starts N copies of the same command on this machine."""

import json
import logging
import os
import signal
import sys
import tempfile
import time
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from treering.cli.text import plain_lines
from treering.core.errors import CheckpointError, TreeringError

SAVING = 3600  # seconds that ranks have for their checkpoint after a signal; a second signal ends them at once
SAVING_2_11 = 30  # the same where torch cannot be asked for more: version 2.11
OUTCOME = "TORCHELASTIC_ERROR_FILE"  # names the file for how a rank ended; set for each rank by the agent
TAIL = 4000  # characters of a failed rank's log that are shown


class RanksFailed(TreeringError):
    """A rank ended with an error; `exit_code` is its own if that is one of ours."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


def saving_time() -> int:
    """Return the seconds after a signal at whose end torch's agent kills ranks that still write their checkpoint."""
    from torch.distributed.launcher.api import LaunchConfig

    return SAVING if any(field.name == "shutdown_timeout" for field in fields(LaunchConfig)) else SAVING_2_11


def start(nproc: int, arguments: list[str], logs: Path) -> None:
    """Run `treering ARGUMENTS` on `nproc` ranks of this machine and wait for all of them.

    Rank 0 keeps the terminal, and with it the live line; the output of the others goes to files under `logs`.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    _share_cores(nproc)
    try:
        logs.mkdir(parents=True, exist_ok=True)
        logs = Path(tempfile.mkdtemp(prefix="ranks-", dir=logs))
    except OSError as error:
        raise CheckpointError(f"{error.filename or logs} cannot be written: {error.strerror}; see `output`") from None
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # its report repeats ours, at length
    patience: dict[str, Any] = {"shutdown_timeout": SAVING} if saving_time() == SAVING else {}
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        run_id="treering",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",  # port 0: the system picks a free one
        local_addr="localhost",  # the machine's own name may not resolve, or resolve to another machine
        max_restarts=0,
        signals_to_handle="SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
        logs_specs=DefaultLogsSpecs(log_dir=str(logs), redirects=dict.fromkeys(range(1, nproc), Std.ALL)),
        **patience,
    )
    try:
        elastic_launch(config, sys.executable)("-u", "-m", "treering", *arguments)
    except ChildFailedError as error:
        _failed(error, logs)
    except SignalException as stopped:
        # The ranks got the signal too, and have ended by now: rank 0 has written how, unless the signal ended it.
        if (code := read_outcome(logs)) is not None:
            raise RanksFailed(f"stopped by {stopped.sigval.name}; rank 0's message is above", code) from None
        if stopped.sigval == signal.SIGINT:
            raise KeyboardInterrupt from None
        raise RanksFailed(f"stopped by {stopped.sigval.name}", 128 + stopped.sigval) from None


def write_outcome(message: str, code: int) -> None:
    """Write how this rank ends for the agent, which otherwise knows only the order in which it saw ranks end."""
    if OUTCOME in os.environ:
        outcome = {"message": message, "timestamp": str(int(time.time())), "exit_code": code}
        Path(os.environ[OUTCOME]).write_text(json.dumps(outcome), encoding="utf-8")


def read_outcome(logs: Path) -> int | None:
    """Return the exit code that rank 0 has written, if it has."""
    for file in logs.rglob("0/error.json"):
        return int(json.loads(file.read_text(encoding="utf-8"))["exit_code"])
    return None


def _share_cores(nproc: int) -> None:
    # Each rank would otherwise start as many threads as there are cores.
    if nproc > 1 and "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // nproc))


def _failed(error: Any, logs: Path) -> NoReturn:
    """Raise RanksFailed about the rank that failed first, with the end of its log."""
    rank, failure = error.get_first_failure()
    own = error.failures.get(0)
    if own is not None and own.exitcode == failure.exitcode:
        rank, failure = 0, own  # the same reason on all ranks, and rank 0 has reported it already
    code = failure.exitcode
    if code < 0:
        name = signal.Signals(-code).name
        hint = "; the system may have run out of memory" if name == "SIGKILL" else ""
        text = f"rank {rank} was killed by {name}{hint}"
    else:
        text = f"rank {rank} ended with exit code {code}"
    if rank == 0:
        text += "; its message is above"
    elif log := _tail(logs, rank):
        text += f". The end of its log:\n{log}"
    raise RanksFailed(text, code if code > 0 else 1)


def _tail(logs: Path, rank: int) -> str:
    for name in ("stderr.log", "stdout.log"):
        for file in logs.rglob(f"{rank}/{name}"):
            if text := file.read_bytes()[-TAIL:].decode(errors="replace").strip():
                return f"{plain_lines(text)}\n({file})"
    return ""
