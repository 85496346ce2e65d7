"""`treering doctor`: whether runs will work on this machine. Each check examines one thing and names a remedy."""

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Literal

import typer

from treering.cli.env import Finding, free_space, memory, versions
from treering.cli.text import size

_STYLES = {"ok": "green", "warn": "yellow", "bad": "bold red"}
GIB = 2**30
REQUIRED = ("torch", "transformers", "tokenizers", "safetensors", "pydantic", "typer", "rich", "PyYAML", "xxhash")


def command(
    output: Annotated[Path, typer.Option(help="The folder that runs would write to.")] = Path("."),
    ranks: Annotated[bool, typer.Option("--ranks/--no-ranks", help="Start two ranks and let them add numbers.")] = True,
) -> None:
    """Check whether runs will work on this machine. Exit code 1 if something is bad."""
    if not show(everything(output, ranks=ranks)):
        raise typer.Exit(1)


def show(findings: Iterable[Finding]) -> bool:
    """Print `findings` one after the other, and return whether none is bad."""
    from treering.cli.console import console, safe

    out, good = console(), True
    for finding in findings:
        line = safe(f"{finding.status:<5}", _STYLES[finding.status])
        line.append(safe(f"{finding.name}: {finding.result}", "default"))
        out.print(line, soft_wrap=True)
        if finding.status != "ok":
            out.print(safe(f"     → {finding.remedy}"), soft_wrap=True)
        good &= finding.status != "bad"
    return good


def everything(output: Path, *, ranks: bool) -> Iterator[Finding]:
    """Yield the findings of all checks, the slow ones last."""
    checks: list[Callable[[], Finding]] = [
        packages,
        lambda: disk(output),
        lambda: disk(cache()),
        lambda: writable(output),
        memory_available,
        open_files,
        file_size,
        shared_memory,
        tokenizer_threads,
        clock,
        torch_build,
        devices,
        allocator,
    ]
    if ranks:
        from treering.cli.ranks_probe import two_ranks

        checks.append(two_ranks)
    for check in checks:
        yield check()


def packages() -> Finding:
    """Check that the required packages are installed."""
    installed = versions()
    missing = [name for name in REQUIRED if installed[name] == "not installed"]
    text = ", ".join(f"{name} {installed[name]}" for name in ("torch", "transformers", "safetensors"))
    if missing:
        remedy = "install treering with pip, which brings them"
        return Finding(name="packages", status="bad", result=f"{', '.join(missing)} not installed", remedy=remedy)
    return Finding(name="packages", status="ok", result=text)


def cache() -> Path:
    """Return the folder in which Hugging Face libraries keep downloads."""
    home = os.environ.get("HF_HUB_CACHE") or os.environ.get("HF_HOME") or "~/.cache/huggingface"
    return Path(home).expanduser()


def disk(folder: Path) -> Finding:
    """Check the free space on the disk of `folder`."""
    free = free_space(folder)
    status: Literal["ok", "warn", "bad"] = "bad" if free < GIB else "warn" if free < 20 * GIB else "ok"
    remedy = "a checkpoint of a 7B model with its optimizer takes up to 84 GiB; free some space or choose another disk"
    return Finding(name=f"disk at {folder}", status=status, result=f"{size(free)} free", remedy=remedy)


def writable(folder: Path) -> Finding:
    """Check that a file in `folder` can be written, flushed and renamed."""
    name = f"writing to {folder}"
    existing = folder.expanduser()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    try:
        with tempfile.TemporaryDirectory(dir=existing, prefix=".treering-") as temporary:
            first = Path(temporary) / "a"
            with first.open("wb") as file:
                file.write(b"x")
                os.fsync(file.fileno())
            first.rename(Path(temporary) / "b")  # checkpoints appear by a rename
    except OSError as error:
        remedy = "choose another `output`, or fix the permissions"
        return Finding(name=name, status="bad", result=error.strerror or str(error), remedy=remedy)
    return Finding(name=name, status="ok", result="works, with fsync and rename")


def memory_available() -> Finding:
    """Check the memory of the machine that is not in use."""
    available = memory("MemAvailable")
    if available is None:
        remedy = "compare the model's size with the machine's memory yourself"
        return Finding(name="memory", status="warn", result="the system does not report it", remedy=remedy)
    status: Literal["ok", "warn"] = "ok" if available >= 4 * GIB else "warn"
    return Finding(
        name="memory",
        status=status,
        result=f"{size(available)} available",
        remedy="close other programs before loading a model",
    )


def open_files() -> Finding:
    """Check the limit of open files."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    endless = soft == resource.RLIM_INFINITY
    status: Literal["ok", "warn"] = "ok" if endless or soft >= 4096 else "warn"
    reach = "unlimited" if hard == resource.RLIM_INFINITY else str(hard)
    return Finding(
        name="open files",
        status=status,
        result="unlimited" if endless else f"limit {soft}",
        remedy=f"many ranks and shards need more: ulimit -n 65536 (here at most {reach})",
    )


def file_size() -> Finding:
    """Check the limit of the size of a file."""
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if soft == resource.RLIM_INFINITY:
        return Finding(name="file size", status="ok", result="unlimited")
    status: Literal["ok", "bad"] = "ok" if soft >= 10 * GIB else "bad"
    return Finding(
        name="file size",
        status=status,
        result=f"limit {size(soft)}",
        remedy="checkpoint files are larger: ulimit -f unlimited",
    )


def shared_memory() -> Finding:
    """Check the free space in /dev/shm."""
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return Finding(name="shared memory", status="ok", result="no /dev/shm on this system")
    free = shutil.disk_usage(folder).free
    status: Literal["ok", "warn"] = "ok" if free >= 2**28 else "warn"
    remedy = "NCCL needs it between GPUs of one machine; in a container: --shm-size=8g or --ipc=host"
    return Finding(name="shared memory", status=status, result=f"{size(free)} free", remedy=remedy)


def tokenizer_threads() -> Finding:
    """Check that tokenizers may use all cores."""
    value = os.environ.get("TOKENIZERS_PARALLELISM", "").lower()
    if value in ("false", "0", "off", "no", "n", "f"):
        remedy = "tokenising uses one core; unset TOKENIZERS_PARALLELISM"
        return Finding(name="tokenizer threads", status="warn", result=f"TOKENIZERS_PARALLELISM={value}", remedy=remedy)
    return Finding(name="tokenizer threads", status="ok", result="all cores")


def clock() -> Finding:
    """Check that the date is possible."""
    now = time.time()
    if now < 1_735_689_600:  # the start of 2025, before the oldest torch that runs us
        remedy = "TLS and file times will be wrong; set the clock"
        return Finding(name="clock", status="warn", result=time.strftime("%Y-%m-%d", time.gmtime(now)), remedy=remedy)
    return Finding(name="clock", status="ok", result=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now)))


def torch_build() -> Finding:
    """Check that torch can be imported and has torch.distributed."""
    try:
        import torch
    except (ImportError, OSError) as error:
        remedy = "reinstall torch for this machine, see pytorch.org/get-started"
        return Finding(name="torch", status="bad", result=f"cannot be imported: {error}", remedy=remedy)
    if not torch.distributed.is_available():
        remedy = "install a build with torch.distributed; even one GPU uses it"
        return Finding(name="torch", status="bad", result=f"{torch.__version__} without distributed", remedy=remedy)
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    return Finding(name="torch", status="ok", result=f"{torch.__version__}, {build}")


def devices() -> Finding:
    """Check that torch can use the GPUs of the machine."""
    try:
        import torch
    except (ImportError, OSError):
        return Finding(name="devices", status="bad", result="unknown without torch", remedy="see above")
    if not torch.cuda.is_available():
        if Path("/dev/nvidia0").exists():
            remedy = "install the CUDA build of torch that matches the driver (nvidia-smi shows it)"
            return Finding(
                name="devices", status="bad", result="there is an NVIDIA GPU that torch cannot use", remedy=remedy
            )
        remedy = "training works on the CPU, slowly; real models want a GPU"
        return Finding(name="devices", status="warn", result="no GPU", remedy=remedy)
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    nccl = torch.distributed.is_nccl_available()
    cards = f"{len(names)} × {names[0]}" + (f", NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}" if nccl else "")
    status: Literal["ok", "bad"] = "ok" if nccl or len(names) == 1 else "bad"
    return Finding(name="devices", status=status, result=cards, remedy="several GPUs need a torch build with NCCL")


def allocator() -> Finding:
    """Check that memory that sequences of one length have left can be used by those of another."""
    import torch

    set_to = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or ""
    expandable = "expandable_segments:true" in set_to.replace(" ", "").lower()
    if expandable or not torch.cuda.is_available():
        return Finding(name="allocator", status="ok", result=set_to or "torch's default")
    remedy = (
        "for long sequences of varying length: PYTORCH_ALLOC_CONF=expandable_segments:True. It changes where tensors "
        "lie, and no number"
    )
    return Finding(name="allocator", status="warn", result=set_to or "torch's default", remedy=remedy)
