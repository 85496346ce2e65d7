"""DeepSpeed 0.19.8's Ulysses attention and ours, on the same real gloo ranks.

python -m benchmarks.peers.ulysses        makes the environment; `benchmarks.ulysses` asks it for figures
"""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"  # before its import, which would look for cards

import torch
import torch.distributed as dist

from benchmarks.peers import environment
from benchmarks.peers.recording_group import BACKEND, register, taken
from benchmarks.peers.ulysses_sides import (
    MESSAGES,
    OURS,
    THEIRS,
    Case,
    MessagesOnly,
    Ours,
    Side,
    Theirs,
    difference,
    empty,
    named,
    results,
    sequence_ranks,
    step,
    truth,
)
from tests.ranks import on_ranks
from treering.techniques.ulysses.shares import Grid
from treering.techniques.ulysses.traffic import grids

PACKAGES = (
    "deepspeed==0.19.8",
    "hjson==3.1.0",
    "ninja==1.13.2",
    "py-cpuinfo==9.0.0",
    "psutil==7.2.2",
    "msgpack==1.2.4",
    "einops==0.8.2",
)
PROOF = "deepspeed.runtime.sequence_parallel.ulysses_sp"
EXACT = 1e-6


def ask(*arguments: str) -> Any:
    """A figure from inside the environment, which is made if it is not there."""
    python = environment.python("ulysses", PACKAGES, proof=PROOF)
    # DeepSpeed compiles an operator at its first start: next to it, not in the user's cache.
    os.environ["TORCH_EXTENSIONS_DIR"] = str(python.parents[1] / "extensions")
    return environment.ask(python, "benchmarks.peers.ulysses", *arguments)


def started() -> Any:
    """DeepSpeed on this rank's gloo ranks; returns the group of all."""
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    return dist.group.WORLD


def check(heads: Sequence[tuple[int, int]]) -> dict[str, float]:
    """On each rank: how far output and gradients are from one process, and the two sides from each other."""
    world = started()
    found: dict[str, float] = {}

    def worst(name: str, value: float) -> None:
        found[name] = max(found.get(name, 0.0), value)

    for pair in heads:
        case = Case(*pair, width=16, tokens=48, dtype=torch.float32)
        whole = truth(case)
        theirs = results(Theirs(case, world), case)
        for grid in grids(dist.get_world_size()):
            side = Ours(case, sequence_ranks(grid, "gloo")[0])
            own = torch.cat([torch.arange(part.start, part.stop) for part in side.ranges])
            ours = results(side, case)
            worst("ours and one process", difference(ours, [x[:, own] for x in whole]))
            if grid.gathered == 1:
                worst("ours and deepspeed", difference(ours, theirs))
                worst("deepspeed and one process", difference(theirs, [x[:, own] for x in whole]))
    if max(found.values()) > EXACT:
        raise AssertionError(f"not the same attention, so nothing can be compared: {found}")
    return found


def counted(side: Side, case: Case, groups: Sequence[Any]) -> dict[str, Any]:
    """What one layer's attention gives to the process groups: bytes by pass, and the number of collectives."""
    inputs, gradient = empty(case, side.ranges)
    taken(groups)
    out = side(*inputs)
    forward = taken(groups)
    torch.autograd.grad(out, inputs, gradient)
    backward = taken(groups)
    return {
        "forward": sum(call.bytes for call in forward),
        "backward": sum(call.bytes for call in backward),
        "calls": len(forward) + len(backward),
    }


def traffic(cases: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    """For each case: what this rank sends in every arrangement of ours, and in DeepSpeed's unless it refuses."""
    register()
    started()
    size = dist.get_world_size()
    world = dist.new_group(list(range(size)), backend=BACKEND)
    places = {grid: sequence_ranks(grid, BACKEND) for grid in grids(size)}
    found = []
    for numbers in cases:
        case = Case(*numbers)
        one: dict[str, Any] = {
            named(grid): counted(Ours(case, ranks, free=True), case, groups) for grid, (ranks, groups) in places.items()
        }
        try:
            one[THEIRS] = counted(Theirs(case, world, free=True), case, [world])
        except ValueError as refused:
            one[THEIRS] = str(refused)
        found.append(one)
    return found


def times(cases: Sequence[Sequence[int]], free: bool, rounds: int, repeats: int) -> list[dict[str, Any]]:
    """For each case: seconds of a forward and a backward, both sides in turn."""
    world = started()
    ranks, _ = sequence_ranks(Grid(heads=dist.get_world_size()), "gloo")
    found = []
    for numbers in cases:
        case = Case(*numbers)
        made: dict[str, Callable[[], None]] = {
            OURS: step(Ours(case, ranks, free=free), case),
            THEIRS: step(Theirs(case, world, free=free), case),
        }
        if free:
            made[MESSAGES] = MessagesOnly(case, world)
        found.append(alternating(made, rounds, repeats))
    return found


def alternating(sides: dict[str, Callable[[], None]], rounds: int, repeats: int) -> dict[str, Any]:
    """Return seconds of the slowest rank, and CPU seconds of all ranks, after one round that is not counted. Who comes
    first changes from round to round."""
    found = torch.zeros(2, len(sides), rounds, dtype=torch.float64)
    order = list(enumerate(sides.values()))
    for number in range(-1, rounds):
        for i, side in order:
            dist.barrier()
            began, worked = time.perf_counter(), time.process_time()
            for _ in range(repeats):
                side()
            if number >= 0:
                took = time.perf_counter() - began, time.process_time() - worked
                found[:, i, number] = torch.tensor(took, dtype=torch.float64) / repeats
        order.reverse()
    dist.all_reduce(found[0], dist.ReduceOp.MAX)
    dist.all_reduce(found[1], dist.ReduceOp.SUM)
    return {kind: dict(zip(sides, one.tolist())) for kind, one in zip(("wall", "cpu"), found)}


def main() -> None:
    if not sys.argv[1:]:
        environment.python("ulysses", PACKAGES, proof=PROOF)
        return
    command, ranks, *arguments = sys.argv[1:]
    function: Any = {"check": check, "traffic": traffic, "times": times}[command]
    found = on_ranks(int(ranks), function, *map(json.loads, arguments))
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
