"""`treering env`: facts about this machine and installation, as pairs for people to read; nothing here is secret."""

import os
import platform
import shutil
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal


def command() -> None:
    """Print versions, machine and relevant settings. No secrets: only a fixed list of variables is ever shown."""
    from treering.cli.console import say

    facts = {**versions(), **system(), **accelerators(), **environment()}
    width = max(map(len, facts))
    say("\n".join(["```", *(f"{name:<{width}}  {value}" for name, value in facts.items()), "```"]))


PACKAGES = (
    "treering",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "datasets",
    "pyarrow",
    "peft",
    "pydantic",
    "typer",
    "rich",
    "PyYAML",
    "xxhash",
    "numpy",
)
# Settings that explain behaviour and cannot hold a credential. Nothing else of the environment is ever shown.
ENVIRONMENT = (
    "CUDA_VISIBLE_DEVICES",
    "CUDA_DEVICE_ORDER",
    "HF_HUB_OFFLINE",
    "LOCAL_RANK",
    "MKL_NUM_THREADS",
    "NCCL_DEBUG",
    "NCCL_IB_DISABLE",
    "NCCL_P2P_DISABLE",
    "NCCL_SOCKET_IFNAME",
    "OMP_NUM_THREADS",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "RANK",
    "SLURM_NNODES",
    "SLURM_NTASKS",
    "TOKENIZERS_PARALLELISM",
    "TRANSFORMERS_OFFLINE",
    "WORLD_SIZE",
)


def versions() -> dict[str, str]:
    """Return package → installed version, or `not installed`."""
    result = {}
    for name in PACKAGES:
        try:
            result[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            result[name] = "not installed"
    return result


def system() -> dict[str, str]:
    """Return Python, operating system, cores and memory of this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 0
    prefix = sys.prefix.replace(str(Path.home()), "~")  # without the name of the user
    facts = {
        "python": f"{platform.python_version()} ({platform.python_implementation()}, {prefix})",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores": f"{cores} usable of {os.cpu_count()}",
    }
    if (total := memory("MemTotal")) is not None:
        from treering.cli.text import size

        facts["memory"] = f"{size(total)}, {size(memory('MemAvailable') or 0)} available"
    return facts


def memory(field: str) -> int | None:
    """Return the bytes in a line of /proc/meminfo; None on a system without it."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    values = [line.split() for line in lines if line.startswith(f"{field}:")]
    return int(values[0][1]) * 1024 if values else None


def accelerators() -> dict[str, str]:
    """Return what torch was built for and the devices that it sees. Imports torch."""
    import torch

    facts = {"torch build": f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}"}
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(i)
            facts[f"GPU {i}"] = f"{card.name}, {card.total_memory / 2**30:.0f} GiB, sm_{card.major}{card.minor}"
        facts["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    else:
        facts["GPU"] = "none that torch can use"
    return facts


def environment() -> dict[str, str]:
    """Return the variables of ENVIRONMENT that are set."""
    return {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}


def free_space(folder: Path) -> int:
    """Return the free bytes on the disk of `folder`, which need not exist yet."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The result of one check of `treering doctor`; `remedy` is for a result that is not ok."""

    name: str
    status: Literal["ok", "warn", "bad"]
    result: str
    remedy: str = ""
