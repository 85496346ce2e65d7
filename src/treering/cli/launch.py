"""The rank of this process, as torchrun or srun give it in the environment."""

import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Literal

from treering.core.errors import ConfigError


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
    # A batch script has SLURM_PROCID=0 and SLURM_NTASKS too, though nobody started the other tasks: joining there
    # would wait for them for ever. Only srun makes a step with tasks.
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
    """Return how many tasks a SLURM job asked for that nobody has started, because its script does not use srun."""
    tasks = environ.get("SLURM_NTASKS", "1")
    lonely = "SLURM_JOB_ID" in environ and "SLURM_STEP_ID" not in environ and "SLURM_STEPID" not in environ
    return int(tasks) if lonely and tasks.isdecimal() and int(tasks) > 1 else None


def export(ranks: Ranks, environ: MutableMapping[str, str]) -> None:
    """Set the variables that torch.distributed reads."""
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
