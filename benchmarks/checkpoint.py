"""Saving and loading a model with AdamW's state on two ranks, against torch's distributed checkpoints (DCP).

    python -m benchmarks.checkpoint [--quick] [--machine cpu2]

Both sides write the same sharded tensors to the same disk, in turns, through to the disk (fsync) and with equally many
bytes; ours with digests, manifest and rename. Loading gives every rank its shards; ours verifies all digests first.
What is read was just written, so that both read from memory and not from the disk. Each figure of one run is that of
the slower rank.
"""

import argparse
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.rows import row, write


def state(mebibytes: int) -> dict[str, Tensor]:
    """This rank's rows of weights and two moments of each, in blocks like those of a model."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    width = 1024
    shapes = {"q": (width, width), "o": (width, width), "up": (3 * width, width), "down": (width, 3 * width)}
    per_block = 3 * 4 * sum(a * b for a, b in shapes.values())  # bytes: a weight and two moments of float32
    blocks = max(1, round(mebibytes * 2**20 * dist.get_world_size() / per_block))
    found = {}
    for block in range(blocks):
        for name, shape in shapes.items():
            for kind in ("", "optimizer/exp_avg/", "optimizer/exp_avg_sq/"):
                whole = torch.randn(shape)
                found[f"{kind}model.layers.{block}.{name}"] = distribute_tensor(whole, mesh, [Shard(0)])
    return found


def timed(work: Callable[[], Any]) -> float:
    """Seconds of the slower rank."""
    dist.barrier()
    began = time.perf_counter()
    work()
    seconds = torch.tensor(time.perf_counter() - began)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return float(seconds)


def ranks(rank: int, store: str, root: Path, mebibytes: int, runs: int, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    tensors = state(mebibytes)
    found: dict[str, list[float]] = {}
    for number in range(runs + 1):  # the first brings in code and is not counted
        seconds = one_round(root, tensors, number)
        if number:
            for name, value in seconds.items():
                found.setdefault(name, []).append(value)
    if rank == 0:
        own = sum(t.to_local().numel() * 4 for t in tensors.values())
        results.put((own, found))
    dist.barrier()


def one_round(root: Path, tensors: dict[str, Tensor], number: int) -> dict[str, float]:
    from torch.distributed import checkpoint as dcp

    from treering.core.sharded import local_rows, put_rows
    from treering.train.checkpoints import files as checkpoint
    from treering.train.checkpoints.manager import Saver

    ours, theirs, their_hf, beside = (root / name for name in ("ours", "dcp", "hf", "beside"))
    places = dict(zip(("save", "dcp save", "hf save", "asynchronous"), (ours, theirs, their_hf, beside)))
    seconds: dict[str, float] = {}
    saver = Saver(True)
    blank = {name: torch.zeros_like(value) for name, value in tensors.items()}

    def load() -> None:
        saved = checkpoint.read(ours / f"step-{number}")
        for name, target in blank.items():
            put_rows(target, saved.tensors[name].rows(*local_rows(target)))

    hf_writer = dcp.HuggingFaceStorageWriter(str(their_hf), save_distributed=True)
    turns: list[tuple[str, Callable[[], Any]]] = [
        ("save", lambda: checkpoint.save(ours, number, tensors, {})),
        ("dcp save", lambda: dcp.save(tensors, storage_writer=dcp.FileSystemWriter(theirs))),
        ("hf save", lambda: dcp.save(tensors, storage_writer=hf_writer)),
        ("asynchronous", lambda: saver.save(beside, number, tensors, {}, lambda: None)),
    ]  # fmt: skip
    loads: list[tuple[str, Callable[[], Any]]] = [
        ("load", load),
        ("dcp load", lambda: dcp.load(blank, storage_reader=dcp.FileSystemReader(theirs))),
        ("hf load", lambda: dcp.load(blank, storage_reader=dcp.HuggingFaceStorageReader(str(their_hf)))),
    ]
    for name, work in (*turns[number % 3 : 3], *turns[: number % 3], turns[3]):
        settle(places[name])
        seconds[name] = timed(work)
    saver.wait()
    for name, work in (*loads[number % 3 :], *loads[: number % 3]):
        settle()
        with torch.no_grad():
            for value in blank.values():
                value.zero_()
        seconds[name] = timed(work)
        wrong = [n for n, value in blank.items() if not torch.equal(value.to_local(), tensors[n].to_local())]
        assert not wrong, f"{name} did not bring back {wrong[0]}"
    return seconds


def settle(place: Path | None = None) -> None:
    """What the last turn left for the disk to do is not charged to the next.

    `place`, with what the same turn wrote in the round before, goes now: so that every turn finds as much memory for
    its pages as it will need, memory that a virtual machine has already got from its host.
    """
    dist.barrier()
    if place is not None and place.exists() and dist.get_rank() == 0:
        shutil.rmtree(place)
    os.sync()
    dist.barrier()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--machine", default="cpu2")
    options = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        root, results = Path(name), spawn.Queue()
        arguments = (str(root / "store"), root, 48 if options.quick else 192, 3 if options.quick else 7, results)
        processes = [spawn.Process(target=ranks, args=(rank, *arguments)) for rank in range(2)]
        for process in processes:
            process.start()
        size, found = results.get(timeout=900)
        for process in processes:
            process.join()
    case = f"AdamW's state and weights, {size / 2**20:.0f} MiB on each of 2 ranks"
    about: Any = {
        "unit": "s",
        "packages": ("treering", "torch", "safetensors", "xxhash"),
        "command": "python -m benchmarks.checkpoint" + (" --quick" if options.quick else ""),
    }
    save, load = "synchronous save, digests and fsync included", "verified load"
    rows = [
        row(figure, f"{case}; {against}", found[mine], found[peer], at_most=bar, **about)
        for figure, against, mine, peer, bar in (
            (save, "plain DCP", "save", "dcp save", 1.3),
            (save, "DCP's safetensors", "save", "hf save", 1.3),
            ("what an asynchronous save holds up", "DCP's synchronous save", "asynchronous", "dcp save", 0.5),
            (load, "plain DCP", "load", "dcp load", 1.5),
            (load, "DCP's safetensors", "load", "hf load", 1.5),
        )
    ]
    write("checkpoint", options.machine, rows)


if __name__ == "__main__":
    main()
