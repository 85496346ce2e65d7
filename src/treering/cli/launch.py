"""The ranks of a run: given by torchrun or srun in the environment, or started here by `--nproc N`.

With `--nproc N` this process becomes the elastic agent of torch and starts N copies of its command on this machine.
"""

import json
import logging
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, NoReturn

from treering.cli.text import plain_lines
from treering.core.errors import CheckpointError, ConfigError, TreeringError

SAVING = 3600  # seconds that ranks have for their checkpoint after a signal; a second signal ends them at once
SAVING_2_11 = 30  # the same where torch cannot be asked for more: version 2.11
OUTCOME = "TORCHELASTIC_ERROR_FILE"  # names the file for how a rank ended; set for each rank by the agent
TAIL = 4000  # characters of a failed rank's log that are shown


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among those of a job."""

    rank: int
    world: int
    local_rank: int
    address: str
    port: int
    by: Literal["torchrun", "srun"]


def ranks_from(environ: Mapping[str, str]) -> Ranks | None:
    """Return the rank that a launcher gave this process; None without a launcher."""
    if "RANK" in environ or "WORLD_SIZE" in environ:
        return _checked(
            Ranks(
                rank=_number(environ, "RANK"),
                world=_number(environ, "WORLD_SIZE"),
                local_rank=_number(environ, "LOCAL_RANK"),
                address=_given(environ, "MASTER_ADDR"),
                port=_number(environ, "MASTER_PORT"),
                by="torchrun",
            )
        )
    if _in_srun(environ):
        return _checked(_from_srun(environ))
    return None


def _in_srun(environ: Mapping[str, str]) -> bool:
    # A batch script has SLURM_PROCID=0 and SLURM_NTASKS too, but the other tasks were not started: joining there
    # would wait for them without end. Only srun makes a step with tasks.
    tasks = environ.get("SLURM_STEP_NUM_TASKS") or (
        environ.get("SLURM_NTASKS") if "SLURM_STEP_ID" in environ or "SLURM_STEPID" in environ else None
    )
    return "SLURM_PROCID" in environ and tasks is not None and tasks != "1"


def _from_srun(environ: Mapping[str, str]) -> Ranks:
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_NODELIST") or _given(environ, "SLURM_JOB_NODELIST")
    local = _number(environ, "SLURM_LOCALID")
    if len(environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")) == 1:
        local = 0  # --gpus-per-task=1: every task sees its own GPU as the first
    return Ranks(
        rank=_number(environ, "SLURM_PROCID"),
        world=_number(environ, "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"),
        local_rank=local,
        address=environ.get("MASTER_ADDR") or first_host(nodes),
        # Every task must choose the same port without a message, and two jobs on one node different ones.
        port=_number(environ, "MASTER_PORT")
        if "MASTER_PORT" in environ
        else 15_000 + _number(environ, "SLURM_JOB_ID") % 20_000,
        by="srun",
    )


def first_host(nodes: str) -> str:
    """Return the first host of SLURM's compressed list: `node[01-04,7],login` → `node01`."""
    first = re.match(r"(?:[^,\[\]]|\[[^\]]*\])+", nodes.strip())
    host = re.sub(r"\[([^\]]*)\]", lambda m: re.split("[-,]", m.group(1))[0], first.group()) if first else ""
    if not re.fullmatch(r"[A-Za-z0-9._-]+", host):
        raise ConfigError(f"SLURM_NODELIST is {nodes[:100]!r}, in which there is no host; set MASTER_ADDR yourself")
    return host


def forgotten_srun(environ: Mapping[str, str]) -> int | None:
    """Return how many tasks a SLURM job asked for that were not started, because its script does not use srun."""
    tasks = environ.get("SLURM_NTASKS", "1")
    outside_step = "SLURM_JOB_ID" in environ and "SLURM_STEP_ID" not in environ and "SLURM_STEPID" not in environ
    return int(tasks) if outside_step and tasks.isdecimal() and int(tasks) > 1 else None


def set_environment(ranks: Ranks, environ: MutableMapping[str, str]) -> None:
    """Set the variables in `environ` that torch.distributed reads."""
    environ["RANK"], environ["WORLD_SIZE"] = str(ranks.rank), str(ranks.world)
    environ["LOCAL_RANK"] = str(ranks.local_rank)
    environ["MASTER_ADDR"], environ["MASTER_PORT"] = ranks.address, str(ranks.port)


def _checked(ranks: Ranks) -> Ranks:
    if not 0 <= ranks.rank < ranks.world:
        raise ConfigError(f"the launcher gave rank {ranks.rank} of {ranks.world}; ranks go from 0 to {ranks.world - 1}")
    return ranks


def _given(environ: Mapping[str, str], name: str) -> str:
    value = environ.get(name, "").strip()
    if not value:
        raise ConfigError(f"the launcher did not set {name}; start with torchrun, srun or `treering train --nproc N`")
    return value


def _number(environ: Mapping[str, str], name: str) -> int:
    value = _given(environ, name)
    if not (value.isascii() and value.isdecimal()):
        raise ConfigError(f"{name} is {value[:40]!r} in the environment; it must be a whole number")
    return int(value)


class RanksFailed(TreeringError):
    """A rank ended with an error; `exit_code` is that of the rank if it is one of ours."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


def saving_time() -> int:
    """Return how many seconds after a signal torch's agent kills ranks that still write their checkpoint."""
    from torch.distributed.launcher.api import LaunchConfig

    return SAVING if any(field.name == "shutdown_timeout" for field in fields(LaunchConfig)) else SAVING_2_11


def started(command: str, nproc: int | None) -> bool:
    """Join the ranks of a launcher or, with `nproc` above 1, start so many of this process's command.

    Args:
        command: the first word of the command, from which on its arguments are given to the ranks.

    Returns:
        Whether ranks were started and have ended, so that nothing is left to do here.
    """
    if (ranks := ranks_from(os.environ)) is not None:
        set_environment(ranks, os.environ)
    elif nproc is not None and nproc > 1:
        start(nproc, sys.argv[sys.argv.index(command) :], Path(tempfile.gettempdir()) / "treering-logs")
        return True
    return False


def start(nproc: int, arguments: list[str], logs: Path) -> None:
    """Run `treering ARGUMENTS` on `nproc` ranks of this machine and wait for all of them.

    Rank 0 keeps the terminal, and with it the live line; the output of the others goes to files under `logs`.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from treering.train.ranks.signals import LAUNCHER

    _share_cores(nproc)
    os.environ[LAUNCHER] = str(os.getpid())
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
        # But not where the signal came while the agent was starting them: it had no list of them yet.
        end_children(stopped.sigval, saving_time())
        if (code := read_outcome(logs)) is not None:
            raise RanksFailed(f"stopped by {stopped.sigval.name}; rank 0's message is above", code) from None
        if stopped.sigval == signal.SIGINT:
            raise KeyboardInterrupt from None
        raise RanksFailed(f"stopped by {stopped.sigval.name}", 128 + stopped.sigval) from None


def end_children(signal_number: int, seconds: float) -> None:
    """Send a signal to the processes that this one has started and that still run, and wait for their end; kill those
    that run after so many seconds. Nothing, on a system without /proc."""
    until = time.monotonic() + seconds
    every = running = _running_children()
    for child in every:
        with suppress(ProcessLookupError):
            os.kill(child, signal_number)
    while running and time.monotonic() < until:
        time.sleep(0.05)
        running = _running_children()
    for child in running:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    for child in every:  # the agent does not list them, so nobody else would reap them
        with suppress(ChildProcessError):
            os.waitpid(child, 0)


def _running_children() -> list[int]:
    children = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, parent = file.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[:2]
            if int(parent) == os.getpid() and state != "Z":
                children.append(int(file.parent.name))
    return children


def write_outcome(message: str, code: int) -> None:
    """Write this rank's message and exit code to a file for the agent, which knows only in which order ranks ended."""
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
    first_rank = error.failures.get(0)
    if first_rank is not None and first_rank.exitcode == failure.exitcode:
        rank, failure = 0, first_rank  # the same reason on all ranks, and rank 0 has reported it already
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
