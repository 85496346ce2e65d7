"""A check with two real ranks that add their numbers with gloo.

`python -m treering.cli.ranks_probe RANK FILE` is one of them.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from treering.cli.env import Finding
from treering.cli.text import short

TIMEOUT = 60.0  # seconds; importing torch on a cold disk is most of it


def two_ranks(timeout: float = TIMEOUT, command: tuple[str, ...] = (sys.executable, "-m", __name__)) -> Finding:
    """Return a finding: whether two processes of this machine can form a group and add numbers."""
    start = time.monotonic()
    launched = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {k: v for k, v in os.environ.items() if k not in launched} | {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory(prefix="treering-") as folder:
        store = str(Path(folder) / "store")
        processes = [
            subprocess.Popen(
                [*command, str(rank), store],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            )
            for rank in range(2)
        ]
        problem = ""
        try:
            for rank, process in enumerate(processes):
                output, _ = process.communicate(timeout=max(0.1, start + timeout - time.monotonic()))
                if process.returncode != 0 or not output.rstrip().endswith("sum 3"):
                    last = output.strip().splitlines()[-1:] or ["nothing"]
                    problem = problem or f"rank {rank} ended with {process.returncode}: {short(last[0], 160)}"
        except subprocess.TimeoutExpired:
            problem = f"no answer in {timeout:.0f} s"
        finally:
            for process in processes:
                process.kill()
                process.communicate()
    if problem:
        remedy = "look for a firewall on the loopback device; GLOO_SOCKET_IFNAME=lo may help"
        return Finding(name="two ranks", status="bad", result=problem, remedy=remedy)
    return Finding(name="two ranks", status="ok", result=f"summed over gloo in {time.monotonic() - start:.1f} s")


def _one(rank: int, store: str) -> None:
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=30)
    )
    value = torch.tensor([rank + 1])
    dist.all_reduce(value)
    sys.stdout.write(f"sum {value.item()}\n")
    sys.stdout.flush()
    dist.barrier()  # the first to end must not remove the store
    os._exit(0)


if __name__ == "__main__":
    _one(int(sys.argv[1]), sys.argv[2])
