"""Kill a run, start it again, and again; the end must be the one that no kill disturbed, bit for bit.

A kill is SIGKILL of one rank: at a moment of the clock, or just before one of its crossings to the disk. After each of
them, the newest checkpoint must be whole, no older than before, and bitwise what the uninterrupted run had then.
"""

import shutil
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random

from tests.chaos import ranks, toy
from tests.chaos.toy import Fault, Kind
from treering.train.checkpoints.files import newest

MOST_STARTS = 12


@dataclass(kw_only=True)
class Whole:
    """The uninterrupted run: how it went on, how long it took, where it touched the disk."""

    steps: dict[int, toy.Outcome]
    losses: dict[int, float]
    seconds: float
    crossings: dict[int, list[dict[str, list[int]]]] = field(default_factory=dict)  # by `every`


@dataclass(frozen=True, kw_only=True)
class Died:
    """One kill that happened, and what was left to go on from."""

    where: str
    newest: int


class Proving:
    """Makes the uninterrupted runs as they are needed, and the trials beside them."""

    def __init__(self, root: Path):
        self.root = root
        self.wholes: dict[str, Whole] = {}
        toy.prepare(root)
        ranks.run(1, toy.trained, root, Kind(ranks=1), "first")  # makes the cache of tokens, and is slower for it

    def whole(self, kind: Kind) -> Whole:
        if kind.whole not in self.wholes:
            begun = time.monotonic()
            base = replace(kind, every=1, asynchronous=False)
            ranks.run(kind.ranks, toy.trained, self.root, base, kind.whole, toy.STEPS)
            seconds = time.monotonic() - begun
            folder = self.root / kind.whole
            steps = {step: toy.outcome(folder, step) for step in range(1, toy.STEPS + 1)}
            self.wholes[kind.whole] = Whole(steps=steps, losses=toy.losses(folder), seconds=seconds)
        return self.wholes[kind.whole]

    def crossings(self, kind: Kind) -> list[dict[str, list[int]]]:
        """For each rank: name of a fault point -> the numbers of its crossings in an uninterrupted run."""
        whole, key = self.whole(kind), kind.every
        if key not in whole.crossings:
            record = self.root / f"crossings-{kind.whole}-{kind.every}"
            ranks.run(kind.ranks, toy.trained, self.root, kind, "recorded", toy.KEEP, None, record)
            whole.crossings[key] = [_points(record.with_suffix(f".{rank}")) for rank in range(kind.ranks)]
            shutil.rmtree(self.root / "recorded")
        return whole.crossings[key]

    def trial(self, random: Random, kind: Kind, name: str) -> list[Died]:
        """Up to three kills, at least one; then the comparison."""
        planned = random.choice((1, 1, 2, 3))
        died: list[Died] = []
        for start in range(MOST_STARTS):
            # By the clock it may be too late, time and again; a fault point is always met.
            surely = not died and start >= 2
            where = self._start(random, kind, name, kill=len(died) < planned, surely=surely)
            if where is not None:
                died.append(Died(where=where, newest=self.check(kind, name, died)))
            elif died:
                break
            else:  # it was done before the kill came
                shutil.rmtree(self.root / name)
        assert died, f"{name} was never killed"
        self.check_end(kind, name)
        shutil.rmtree(self.root / name)
        return died

    def _start(self, random: Random, kind: Kind, name: str, *, kill: bool, surely: bool) -> str | None:
        """Start it, killing one rank if asked. Where it was killed; None if it came to its end."""
        victim, at_crossing = random.randrange(kind.ranks), surely or random.random() < 0.5
        moment = random.random() * self.whole(kind).seconds
        point, numbers = random.choice(sorted(self.crossings(kind)[victim].items()))
        fault = Fault(rank=victim, crossing=random.choice(numbers)) if kill and at_crossing else None
        began = ranks.start(kind.ranks, toy.trained, self.root, kind, name, toy.KEEP, fault)
        began.met()
        where = f"rank {victim} before crossing {fault.crossing} ({point})" if fault else ""
        if kill and fault is None and not began.gone(moment):
            began.kill(victim)
            where = f"rank {victim} after {moment:.3f} s"
        # A launcher needs a moment too, and the others go on meanwhile.
        if began.join(grace=random.random() * 0.05):
            return None
        assert kill, "a rank was killed, and not by the trial"
        return where

    def check(self, kind: Kind, name: str, died: list[Died]) -> int:
        """What a kill has left is whole, right, and no less than there was before."""
        problems: list[str] = []
        found = newest(self.root / name / "checkpoints", problems.append)
        assert not problems, f"a kill left something that had to be passed over: {problems}"
        step = found.step if found is not None else 0
        assert step >= max((d.newest for d in died), default=0), f"step {step} is left; there was more: {died}"
        if found is not None:
            compare(toy.outcome(self.root / name, step), self.whole(kind).steps[step], f"step {step} after a kill")
        return step

    def check_end(self, kind: Kind, name: str) -> None:
        whole = self.whole(kind)
        compare(toy.outcome(self.root / name), whole.steps[toy.STEPS], "the end")
        assert toy.losses(self.root / name) == whole.losses, "the losses are not those of the uninterrupted run"


def compare(found: toy.Outcome, wanted: toy.Outcome, what: str) -> None:
    assert found.tensors.keys() == wanted.tensors.keys(), f"{what}: {found.tensors.keys() ^ wanted.tensors.keys()}"
    different = [name for name, digest in found.tensors.items() if digest != wanted.tensors[name]]
    assert not different, f"{what}: {len(different)} of {len(wanted.tensors)} tensors differ, as {different[0]}"
    assert found.counts == wanted.counts, f"{what}: {found.counts}, wanted {wanted.counts}"


def kinds(random: Random, trials: int) -> Iterator[Kind]:
    """Three of four on one rank: they are the quick ones."""
    for number in range(trials):
        yield Kind(
            ranks=2 if number % 4 == 3 else 1,
            technique=random.choice(("full", "lora")),
            every=random.choice((1, 2)),
            asynchronous=random.random() < 0.5,
        )


def _points(record: Path) -> dict[str, list[int]]:
    found = defaultdict(list)
    for number, point in enumerate(record.read_text(encoding="utf-8").splitlines(), start=1):
        found[point].append(number)
    return dict(found)
