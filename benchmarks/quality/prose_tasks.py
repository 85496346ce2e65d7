"""The three settings on real text. Everything is said in bits per byte of text that the base model never saw."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import treering as tr
from benchmarks.quality import prose
from benchmarks.quality.learners import Method
from benchmarks.quality.model import Small, drawn, exact, learn, nats
from treering.train.calibration import generated

FACTS_AT_ONCE = 32
CHECK = 4  # epochs
SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)  # of the way from the base's weights to the tuned ones


@dataclass(frozen=True, kw_only=True)
class World:
    """A base model, what it knows, and what it does not know yet."""

    tokenizer: Any
    small: Small
    old: Tensor  # held out
    old_bytes: int
    known: Tensor  # what `statistics` were measured on
    statistics: Any
    domains: dict[str, tuple[Tensor, Tensor]]  # to learn from, and held out

    @classmethod
    def made(cls, folder: Path, *, characters: int, steps: int, calibration: int) -> "World":
        tokenizer, config, train, held_out = prose.prepared(folder, characters)
        train_rows = prose.rows(tokenizer, train)
        small = prose.base(config, train_rows, steps, folder)
        known = train_rows[: calibration // prose.LENGTH]
        old = prose.rows(tokenizer, held_out, 72)
        every = {name: prose.rows(tokenizer, texts, 600) for name, texts in prose.domains().items()}
        return cls(
            tokenizer=tokenizer,
            small=small,
            old=old,
            old_bytes=prose.byte_count(tokenizer, old),
            known=known,
            statistics=small.measured(prose.ring(known)),
            domains={name: (ids[: -len(ids) // 8], ids[-len(ids) // 8 :][:48]) for name, ids in every.items()},
        )

    def written(self) -> Tensor:
        """Return as much text as was measured, written by the base model, one token at a time as it would draw it."""
        run = tr.compose(self.small.fresh(), [], frozen=True)
        documents = generated(run, self.tokenizer, tokens=self.known.numel(), length=prose.LENGTH, at_once=32)
        ids = torch.tensor([token for one in documents for token in one.ids.tolist()])
        return ids[: self.known.numel()].view_as(self.known)

    def bits(self, small: Small) -> float:
        return bits(small, self.old, self.old_bytes)

    def new_bits(self, small: Small, name: str) -> float:
        held_out = self.domains[name][1]
        return bits(small, held_out, prose.byte_count(self.tokenizer, held_out))


def bits(small: Small, ids: Tensor, size: int) -> float:
    return nats(small.fresh().eval(), ids) * ids[:, 1:].numel() / math.log(2) / size


def learn_facts(world: World, method: Method, lr: float, seed: int, number: int, epochs: int) -> dict[str, Any]:
    """Until 95 % are answered, at a constant rate; the same for every method, however long it takes."""
    ids, labels = prose.facts(world.tokenizer, number, seed)
    learner = method(world.small.fresh(), world.statistics, lr)
    order = iter(drawn(ids, labels, FACTS_AT_ONCE, seed))
    right, epoch = 0.0, 0
    while epoch < epochs and right < 0.95:
        for _ in range(CHECK * len(ids) // FACTS_AT_ONCE):
            learner.step(next(order))
        epoch += CHECK
        right = exact(learner.model.eval(), ids, labels)
        learner.model.train()
        if right == 0 and epoch >= epochs / 3:
            break  # a rate so low that nothing will come of it
    rise = world.bits(world.small.learnt(learner)) - world.bits(world.small)
    return {"right": round(right * number), "of": number, "epochs": epoch, "rise": rise}


def interpolate_facts(world: World, lr: float, seed: int, number: int, epochs: int, method: Method) -> dict[str, Any]:
    """W₀ + share · (W₁ − W₀) after twice the epochs that 95 % take, down to the first share that answers fewer."""
    ids, labels = prose.facts(world.tokenizer, number, seed)
    needed = learn_facts(world, method, lr, seed, number, epochs)["epochs"]
    order = drawn(ids, labels, FACTS_AT_ONCE, seed)
    after = learn(world.small, method, world.statistics, lr, order, 2 * needed * len(ids) // FACTS_AT_ONCE, "constant")
    points = []
    for share in (1.0, *SHARES):
        between = after.towards(world.small, share)
        right = exact(between.fresh().eval(), ids, labels)
        rise = world.bits(between) - world.bits(world.small)
        points.append({"share": share, "right": round(right * number), "of": number, "rise": rise})
        if right < 0.95:
            break
    return {"epochs": 2 * needed, "points": points}


def learn_domain(world: World, method: Method, lr: float, seed: int, name: str, steps: int) -> dict[str, Any]:
    after = _of_domain(world, method, lr, seed, name, steps)
    gain = world.new_bits(world.small, name) - world.new_bits(after, name)
    return {"gain": gain, "rise": world.bits(after) - world.bits(world.small)}


def interpolate_domain(world: World, lr: float, seed: int, name: str, steps: int, method: Method) -> dict[str, Any]:
    after = _of_domain(world, method, lr, seed, name, steps)
    before, old = world.new_bits(world.small, name), world.bits(world.small)
    points = []
    for share in SHARES:
        between = after.towards(world.small, share)
        gain, rise = before - world.new_bits(between, name), world.bits(between) - old
        points.append({"share": share, "gain": gain, "rise": rise})
    return {"points": points}


def _of_domain(world: World, method: Method, lr: float, seed: int, name: str, steps: int) -> Small:
    rows = drawn(world.domains[name][0], None, prose.ROWS, seed)
    return learn(world.small, method, world.statistics, lr, rows, steps, "linear")


def learn_sequence(world: World, method: Method, lr: float, seed: int, steps: int) -> dict[str, Any]:
    """One domain after another; after each its ring is added to the statistics."""
    small, statistics = world.small, world.statistics
    gains, when_learned = [], []
    for number, (name, (train, _)) in enumerate(world.domains.items()):
        before = world.new_bits(small, name)
        order = drawn(train, None, prose.ROWS, seed * 100 + number)
        small = learn(small, method, statistics, lr, order, steps, "linear")
        when_learned.append(world.new_bits(small, name))
        gains.append(before - when_learned[-1])
        statistics = small.measured(prose.ring(train[:80]), onto=[statistics])
    final = [world.new_bits(small, name) for name in world.domains]
    return {
        "gain": sum(gains) / len(gains),
        "rise": world.bits(small) - world.bits(world.small),
        "first": final[0] - when_learned[0],
        "gains": [round(gain, 3) for gain in gains],
        "final": [round(bits, 3) for bits in final],
    }
