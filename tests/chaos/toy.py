"""The run that is killed: eight steps of a tiny model with dropout, a checkpoint every step or two."""

import hashlib
import json
import os
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

import treering as tr
from tests import toy_run
from treering.store import disk as disk_of_checkpoints
from treering.train import Job, train
from treering.train.checkpoints.files import read
from treering.train.config import Checkpoint, Optimizer

STEPS, KEEP = 8, 3


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What is trained, on how many ranks, and how it is saved."""

    ranks: int
    technique: Literal["full", "lora"] = "full"
    every: int = 2
    asynchronous: bool = False

    @property
    def whole(self) -> str:
        """The uninterrupted run to compare with: when and how it is saved must make no difference."""
        return f"whole-{self.technique}-{self.ranks}"


@dataclass(frozen=True, kw_only=True)
class Fault:
    """`rank` kills itself just before its crossing number `crossing` to the disk, counted from 1."""

    rank: int
    crossing: int


def job(root: Path, kind: Kind, output: str, keep: int = KEEP) -> Job:
    """The same run for every way of saving it."""
    adapting = tr.Full() if kind.technique == "full" else tr.LoRA(rank=4, init="pissa")
    made = toy_run.job(
        root,
        output,
        techniques=(adapting, tr.Shard()) if kind.ranks > 1 else (adapting,),
        train={
            "steps": STEPS,
            "tokens_per_step": 256,
            "optimizer": Optimizer(lr=1e-3),
            "checkpoint": Checkpoint(every=kind.every, keep=keep, asynchronous=kind.asynchronous),
        },
        data={"packing": "off"},
    )
    return replace(made, model=replace(made.model, dropout="per_rank"))


def prepare(root: Path) -> None:
    """Model, data and tokens, before several ranks look for them. With dropout, or a lost random state is not seen."""
    toy_run.folder(root / "model", attention_dropout=0.1, num_hidden_layers=1)
    toy_run.chats(root / "chat.jsonl")


def trained(
    root: Path, kind: Kind, output: str, keep: int = KEEP, fault: Fault | None = None, crossings: Path | None = None
) -> None:
    """What a rank does: train, and tell of every crossing to the disk or die at one."""
    rank, count = int(os.environ["RANK"]), 0

    def crossing(point: str) -> None:
        nonlocal count
        count += 1
        if fault is not None and (fault.rank, fault.crossing) == (rank, count):
            os.kill(os.getpid(), signal.SIGKILL)
        if crossings is not None:
            with crossings.with_suffix(f".{rank}").open("a") as file:
                file.write(f"{point}\n")

    disk_of_checkpoints.crossing = crossing
    train(job(root, kind, output, keep))


@dataclass(frozen=True)
class Outcome:
    """What must be the same after any number of kills."""

    tensors: dict[str, str]  # name -> sha256 of the bytes
    losses: dict[int, float]
    counts: dict[str, object]


def outcome(folder: Path, step: int = STEPS) -> Outcome:
    """Of the run in `folder`: its checkpoint of `step`, and the losses that it told, the last word of each step."""
    saved = read(folder / "checkpoints" / f"step-{step}")
    return Outcome({n: digest(t.read()) for n, t in saved.tensors.items()}, losses(folder), saved.facts["counts"])


def losses(folder: Path) -> dict[int, float]:
    told = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return {line["step"]: line["loss"] for line in told if line["kind"] == "step"}


def digest(tensor: torch.Tensor) -> str:
    """Of bits, shape and dtype."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode() + flat.numpy().tobytes()).hexdigest()
