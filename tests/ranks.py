"""Run a function on n real gloo ranks: `results = on_ranks(2, function, *arguments)`.

A forkserver that has torch, FSDP and a Llama imported already forks a rank in milliseconds; spawning one takes 17 s.
The function must be importable (a module-level function of a test file). Its return values come back in rank order;
the first failing rank's traceback is what the test shows. Ranks meet over a file, so no port is ever taken.
"""

import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

PRELOAD = [
    "torch",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "transformers.models.llama.modeling_llama",
    "treering.plan",
]
PATIENCE = 600.0  # seconds until something counts as hung: never a measure of speed, the machine may be busy
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOAD)


class RankFailed(AssertionError):
    """Carries the traceback of the rank that failed first."""


def on_ranks(world: int, function: Callable[..., Any], *arguments: Any, timeout: float = PATIENCE) -> list[Any]:
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(world):
            here, there = _context.Pipe(duplex=False)
            process = _context.Process(
                target=_rank, args=(there, rank, world, os.path.join(folder, "store"), function, arguments), daemon=True
            )
            process.start()
            there.close()
            pipes.append(here)
            processes.append(process)
        try:
            return _collect(pipes, processes, timeout)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()


def _collect(pipes: list[Connection], processes: list[Any], timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    failures: list[tuple[int, str]] = []
    until = time.monotonic() + timeout
    waiting = {pipe: rank for rank, pipe in enumerate(pipes)}
    while waiting:
        ready = wait(list(waiting), timeout=max(0.0, until - time.monotonic()))
        if not ready and failures:
            break  # the rank that failed is the news, not those that wait for it
        if not ready:
            raise RankFailed(f"ranks {sorted(waiting.values())} were not done after {timeout:.0f} s")
        for pipe in ready:
            rank = waiting.pop(pipe)  # type: ignore[arg-type]
            try:
                kind, value = pipe.recv()  # type: ignore[union-attr]
            except EOFError:
                processes[rank].join()
                kind, value = "failed", f"rank {rank} ended with exit code {processes[rank].exitcode}"
            if kind == "failed":
                failures.append((rank, value))
                until = min(until, time.monotonic() + 3.0)  # the others notice soon, or are killed
            else:
                results[rank] = _unboxed(value)
        if failures and len(failures) + len(results) < len(pipes) and time.monotonic() > until:
            break
    if failures:
        rank, text = failures[0]
        raise RankFailed(f"rank {rank} of {len(pipes)}:\n{text}")
    return [results[rank] for rank in range(len(pipes))]


def _rank(
    pipe: Connection, rank: int, world: int, store: str, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    try:
        dist.init_process_group(
            "gloo", store=dist.FileStore(store, world), rank=rank, world_size=world, timeout=timedelta(seconds=PATIENCE)
        )
        pipe.send(("done", _boxed(function(*arguments))))
        dist.barrier()
    except BaseException:
        pipe.send(("failed", traceback.format_exc()))
    pipe.close()
    sys.stdout.flush()
    os._exit(0)


@dataclass(frozen=True)
class _Box:
    """A tensor by value. Sent as itself, torch would send a handle that dies with the rank."""

    dtype: str
    shape: tuple[int, ...]
    content: bytes


def _boxed(value: Any) -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1)
        return _Box(
            str(value.dtype).removeprefix("torch."), tuple(value.shape), flat.view(torch.uint8).numpy().tobytes()
        )
    if isinstance(value, dict):
        return {k: _boxed(v) for k, v in value.items()}
    return type(value)(_boxed(v) for v in value) if isinstance(value, list | tuple) else value


def _unboxed(value: Any) -> Any:
    import torch

    if isinstance(value, _Box):
        flat = torch.frombuffer(bytearray(value.content or b"\0" * 8), dtype=getattr(torch, value.dtype))
        return flat[: len(value.content) // flat.element_size()].reshape(value.shape)
    if isinstance(value, dict):
        return {k: _unboxed(v) for k, v in value.items()}
    return type(value)(_unboxed(v) for v in value) if isinstance(value, list | tuple) else value
