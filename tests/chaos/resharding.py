"""Saved by w ranks, gone on with by v: every tensor is the same bit for bit, and the losses that follow agree."""

import json
import os
import shutil
from pathlib import Path

import torch.distributed as dist

import treering as tr
from tests import toy_run
from tests.chaos import ranks, toy
from treering.core.sharded import gather
from treering.train import Job, optimizers, train
from treering.train.checkpoints import state
from treering.train.checkpoints.files import read
from treering.train.checkpoints.manager import CheckpointManager
from treering.train.config import Checkpoint, Optimizer
from treering.train.prepare import open_data, open_tokenizer
from treering.train.run import draft_of

STEPS, CUT = 8, 4
TOLERANCE = 1e-6  # of the losses: the ranks' shares are summed in another order


def job(root: Path, output: str, optimizer: str) -> Job:
    """Without dropout, whose masks are each rank's own."""
    rate = {"adamw": 1e-3, "sgd": 0.1}[optimizer]
    return toy_run.job(
        root,
        output,
        techniques=(tr.Full(), tr.Shard()),
        train={
            "steps": STEPS,
            "tokens_per_step": 512,
            "optimizer": Optimizer(name=optimizer, lr=rate, momentum=0.9 if optimizer == "sgd" else None),
            "checkpoint": Checkpoint(every=CUT, keep=9),
        },
    )


def trained(root: Path, output: str, optimizer: str) -> None:
    _group()
    train(job(root, output, optimizer))


def reloaded(root: Path, output: str, optimizer: str) -> None:
    """What a rank holds after loading, gathered and told by the first; then it trains on."""
    _group()
    made = job(root, output, optimizer)
    plan = draft_of(made)
    keeper = CheckpointManager(made, plan, open_data(made, open_tokenizer(made), plan))
    run = keeper.load(lambda text: None)
    steppers = optimizers.build(run, made.train.optimizer)
    assert keeper.restore(run, steppers) == CUT
    held = {name: toy.digest(gather(tensor)) for name, tensor in state.tensors(run, steppers).items()}
    if dist.get_rank() == 0:
        (root / output / "held.json").write_text(json.dumps(held))
    dist.barrier()
    train(made)


def _group() -> None:
    """A single rank shards as well, over itself."""
    if os.environ["WORLD_SIZE"] == "1":
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


class Resharding:
    def __init__(self, root: Path):
        self.root = root / "resharding"
        self.root.mkdir()
        toy_run.folder(self.root / "model", num_hidden_layers=1)
        toy_run.chats(self.root / "chat.jsonl")
        self.wholes: set[str] = set()

    def whole(self, world: int, optimizer: str) -> Path:
        name = f"whole-{world}-{optimizer}"
        if name not in self.wholes:
            ranks.run(world, trained, self.root, name, optimizer)
            self.wholes.add(name)
        return self.root / name

    def check(self, saved: int, loaded: int, optimizer: str) -> float:
        """The largest relative difference of a loss after going on."""
        whole, folder = self.whole(saved, optimizer), self.root / "cut"
        shutil.copytree(whole, folder)
        try:
            shutil.rmtree(folder / "checkpoints" / f"step-{STEPS}")
            (folder / "metrics.jsonl").unlink()
            ranks.run(loaded, reloaded, self.root, folder.name, optimizer)
            wanted = read(whole / "checkpoints" / f"step-{CUT}").tensors
            held = json.loads((folder / "held.json").read_text())
            assert held == {name: toy.digest(tensor.read()) for name, tensor in wanted.items()}, "the state is another"
            found, told = toy.losses(folder), toy.losses(whole)
        finally:
            shutil.rmtree(folder)
        assert list(found) == list(range(CUT + 1, STEPS + 1)), f"it trained the steps {list(found)}"
        apart = max(abs(found[step] - told[step]) / abs(told[step]) for step in found)
        assert apart <= TOLERANCE, f"the losses are {apart:.1e} apart"
        return apart
