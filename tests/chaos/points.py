"""Every single fault point of a save, once: the process dies just before it, and what is left is read and gone on with.

Not the whole trainer but what it calls: staging, writing, publishing, pruning, with two older checkpoints and a torn
folder in place. The names of the points are recorded first, so that a new one is met without anybody listing it.
"""

import os
import shutil
import signal
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from tests.chaos import ranks, toy
from tests.chaos.toy import Fault
from treering.core.seeds import generator
from treering.store import disk
from treering.train.checkpoints import files as checkpoint

SHAPES = {"matrix": (7, 3), "vector": (5,), "number": ()}
OLD, NEW, KEEP = 2, 3, 2


def values(step: int) -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape, generator=generator(step, name)) for name, shape in SHAPES.items()}


def saved(root: Path, steps: tuple[int, ...], fault: Fault | None = None, record: Path | None = None) -> None:
    """What a rank does: save each of `steps` and prune, telling of every crossing, or dying before one."""
    rank, several, count = int(os.environ["RANK"]), dist.is_initialized(), 0

    def crossing(point: str) -> None:
        nonlocal count
        count += 1
        if fault == Fault(rank=rank, crossing=count):
            os.kill(os.getpid(), signal.SIGKILL)
        if record is not None:
            with record.with_suffix(f".{rank}").open("a") as file:
                file.write(f"{point}\n")

    disk.crossing = crossing
    mesh = init_device_mesh("cpu", (dist.get_world_size(),)) if several else None
    for step in steps:
        tensors = values(step)
        if mesh is not None:
            tensors = {n: distribute_tensor(t, mesh, [Shard(0)]) if t.ndim else t for n, t in tensors.items()}
        checkpoint.write(root, step, checkpoint.stage(tensors, copy=False), {"step": step})
        if rank == 0:
            checkpoint.prune(root, KEEP, None, step)


class Points:
    """The state before the save, and its fault points, for one number of ranks."""

    def __init__(self, root: Path, world: int, *, damaged: bool):
        self.root, self.world, self.damaged = root / f"points-{world}-{damaged}", world, damaged
        start = self.root / "start"
        ranks.run(world, saved, start, (1, OLD))
        (start / "step-2.tmp-0123abcd").mkdir()
        (start / "step-2.tmp-0123abcd" / "rank-00000.safetensors").write_bytes(b"torn")
        if damaged:  # a checkpoint of this very step has been passed over, and the run went on from an older one
            shutil.copytree(start / "step-2", start / f"step-{NEW}")
        shutil.copytree(start, self.root / "recorded")
        record = self.root / "crossings"
        ranks.run(world, saved, self.root / "recorded", (NEW,), None, record)
        self.names = [record.with_suffix(f".{rank}").read_text().splitlines() for rank in range(world)]

    def all(self) -> list[Fault]:
        return [Fault(rank=r, crossing=n + 1) for r, names in enumerate(self.names) for n in range(len(names))]

    def name(self, fault: Fault) -> str:
        return self.names[fault.rank][fault.crossing - 1]

    def check(self, fault: Fault) -> None:
        """Die there; the old step or the new one is whole, and the next start saves as if nothing had happened."""
        place = self.root / f"at-{fault.rank}-{fault.crossing}"
        shutil.copytree(self.root / "start", place)
        began = ranks.start(self.world, saved, place, (NEW,), fault)
        began.met()
        assert not began.join(), "the point was never reached"
        problems: list[str] = []
        found = checkpoint.newest(place, problems.append)
        assert found is not None and found.step in (OLD, NEW), f"{found} is left"
        passed_over = self.damaged and found.step == OLD and (place / f"step-{NEW}").exists()
        assert len(problems) == passed_over, problems
        same(found)
        if found.step == OLD:
            ranks.run(self.world, saved, place, (NEW,))
            same(checkpoint.read(place / f"step-{NEW}"))
            assert not list(place.glob("*.tmp-*")), "torn folders are left"
            assert checkpoint.steps(place) == [OLD, NEW]
        shutil.rmtree(place)


def same(saved: checkpoint.SavedCheckpoint) -> None:
    found = {name: toy.digest(tensor.read()) for name, tensor in saved.tensors.items()}
    assert found == {name: toy.digest(tensor) for name, tensor in values(saved.step).items()}
