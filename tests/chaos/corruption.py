"""Damaged checkpoints are refused by name: by whoever reads one, and by a run, which takes an older one or none."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from random import Random

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from tests.chaos import damage, kills, ranks, toy
from tests.chaos.damage import Damage
from treering.core.errors import CheckpointError
from treering.core.seeds import generator
from treering.train import train
from treering.train.checkpoints import files as checkpoint

# 1.3 MiB a rank: two blocks of digests, and twenty places to truncate at.
SHAPES = {"matrix": (650, 1024), "vector": (3,), "number": (), "nothing": (0, 4)}
OLD, NEW = 1, 2


def values(step: int) -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape, generator=generator(step, name)) for name, shape in SHAPES.items()}


def saved(root: Path) -> None:
    """Two checkpoints by all ranks."""
    mesh = init_device_mesh("cpu", (int(os.environ["WORLD_SIZE"]),))
    for step in (OLD, NEW):
        live = {n: distribute_tensor(t, mesh, [Shard(0)]) if t.ndim else t for n, t in values(step).items()}
        checkpoint.write(root, step, checkpoint.stage(live, copy=False), {"step": step})


def loaded(folder: Path) -> dict[str, str]:
    return {name: toy.digest(tensor.read()) for name, tensor in checkpoint.read(folder).tensors.items()}


class Reading:
    """Every damage, against `read` and `newest`."""

    def __init__(self, root: Path):
        self.whole, self.root, self.alone = root / "saved", root / "both", root / "alone"
        ranks.run(2, saved, self.whole)
        shutil.copytree(self.whole / f"step-{OLD}", self.root / f"step-{OLD}")
        wanted = {name: toy.digest(tensor) for name, tensor in values(NEW).items()}
        assert loaded(self.whole / f"step-{NEW}") == wanted, "what is not damaged does not load"

    def cases(self, random: Random, flips: int) -> Iterator[tuple[str, Damage]]:
        new = self.whole / f"step-{NEW}"
        yield from damage.cuts(new, random)
        yield from damage.flips(new, random, flips)
        yield from damage.files(self.whole / f"step-{OLD}").items()
        yield from damage.sealed_lies("matrix").items()

    def check(self, harm: Damage) -> None:
        """Never anything but a CheckpointError that names the folder, and the older checkpoint is what is found."""
        for root, older in ((self.root, OLD), (self.alone, None)):
            folder = root / f"step-{NEW}"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(self.whole / f"step-{NEW}", folder)
            harm(folder)
            problems: list[str] = []
            found = checkpoint.newest(root, problems.append)
            assert found is None or found.step != NEW, "it was taken for whole"
            assert (found.step if found is not None else None) == older, f"found {found}"
            assert len(problems) == 1 and str(folder) in problems[0], problems
        try:
            loaded(folder)
        except CheckpointError as error:
            assert str(folder) in str(error)
        else:
            raise AssertionError("it was loaded")

    def check_unknown_file(self) -> None:
        """A file that the manifest does not name is nobody's business: no byte of it is read."""
        folder = self.root / f"step-{NEW}"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.whole / f"step-{NEW}", folder)
        (folder / "rank-00002.safetensors").write_bytes(b"\xff" * 64)
        (folder / "notes.pt").write_bytes(b"\x80\x04.")
        assert loaded(folder) == loaded(self.whole / f"step-{NEW}")


def goes_on(root: Path, kind: toy.Kind, output: str) -> None:
    """What a rank does: train on, or say why not."""
    try:
        train(toy.job(root, kind, output))
    except CheckpointError as error:
        (root / output / f"refused.{os.environ['RANK']}").write_text(str(error))


class Resuming:
    """Damage, against a run of two ranks that would go on from it."""

    def __init__(self, proving: kills.Proving):
        self.proving, self.kind = proving, toy.Kind(ranks=2, every=2)
        self.whole, self.root = proving.whole(self.kind), proving.root
        ranks.run(2, toy.trained, self.root, self.kind, "to-damage")

    @property
    def folder(self) -> Path:
        return self.root / "to-damage" / "checkpoints" / f"step-{toy.STEPS}"

    def cases(self) -> dict[str, Damage]:
        older = self.folder.with_name(f"step-{toy.STEPS - 2}")
        names = [name for name, shape in checkpoint.read(self.folder).tensors.items() if len(shape.shape) == 2]
        parameter = next(name for name in names if not name.startswith("optimizer/"))
        moment = next(name for name in names if name.endswith("/exp_avg"))
        found = dict(damage.files(older))
        found |= {f"{name} ({parameter})": harm for name, harm in damage.sealed_lies(parameter).items()}
        return found | {f"{name} ({moment})": harm for name, harm in damage.sealed_lies(moment).items()}

    def check(self, harm: Damage) -> str:
        """Either all ranks refuse it by name, or the run goes on from the older one to the very same end."""
        shutil.copytree(self.root / "to-damage", self.root / "damaged")
        try:
            harm(self.root / "damaged" / "checkpoints" / f"step-{toy.STEPS}")
            ranks.run(2, goes_on, self.root, self.kind, "damaged")
            refusals = [path.read_text() for path in sorted((self.root / "damaged").glob("refused.*"))]
            if refusals:
                assert len(refusals) == 2, "one rank refused, the other did not"
                assert "step-" in refusals[0], refusals
                return "refused"
            told = (self.root / "damaged" / "metrics.jsonl").read_text()
            assert "passed over a checkpoint" in told, "it went on without a word"
            kills.compare(toy.outcome(self.root / "damaged"), self.whole.steps[toy.STEPS], "the end")
            assert toy.losses(self.root / "damaged") == self.whole.losses
            return "passed over"
        finally:
            shutil.rmtree(self.root / "damaged")
