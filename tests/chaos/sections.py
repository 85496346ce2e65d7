"""The parts of the proof: each runs its cases, goes on after one that fails, and gives a row of the table."""

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from tests.chaos import configurations, corruption, datasets, kills, points, resharding, surroundings

OPTIMIZERS = ("adamw", "sgd")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How many cases of each kind."""

    kills: int
    scenes: tuple[tuple[int, bool], ...]  # of fault points: ranks, and whether a damaged checkpoint is in the way
    flips: int  # of bits, in each region of each file
    resumes: int
    pairs: int
    configurations: int
    datasets: int
    disks: int  # that are full
    tokenisers: int  # that are killed
    launchers: int  # that are killed

    @classmethod
    def of(cls, trials: int) -> "Sizes":
        """What the command runs: 300 trials are the full proof."""
        scenes = ((1, False), (1, True), (2, False), (2, True))
        few = max(4, trials // 15)
        return cls(
            kills=trials,
            scenes=scenes,
            flips=max(4, trials // 6),
            resumes=2 * few,
            pairs=few,
            configurations=34 * trials,
            datasets=4 * trials,
            disks=max(6, trials // 5),
            tokenisers=max(6, trials // 5),
            launchers=max(2, trials // 30),
        )


QUICK = Sizes(
    kills=10,
    scenes=((1, True), (2, False)),
    flips=6,
    resumes=2,
    pairs=2,
    configurations=200,
    datasets=60,
    disks=6,
    tokenisers=6,
    launchers=1,
)


@dataclass(kw_only=True)
class Row:
    what: str
    cases: int = 0
    failures: list[str] = field(default_factory=list)
    note: str = ""
    seconds: float = 0.0

    def run(self, cases: Iterable[tuple[str, Callable[[], Any]]]) -> list[Any]:
        """Results of those that held."""
        begun, results = time.monotonic(), []
        for name, case in cases:
            self.cases += 1
            try:
                results.append(case())
            except Exception as error:  # every one is to be counted and told
                self.failures.append(f"{self.what}: {name}: {type(error).__name__}: {error}")
        self.seconds = time.monotonic() - begun
        return results


def kill_trials(proving: kills.Proving, seed: int, sizes: Sizes) -> Row:
    row = Row(what="kill and resume: state and losses bitwise those of the uninterrupted run")
    kinds = list(kills.kinds(Random(f"{seed} kinds"), sizes.kills))

    def case(number: int, kind: kills.Kind) -> tuple[str, Callable[[], list[kills.Died]]]:
        return f"{number} {kind}", lambda: proving.trial(Random(f"{seed} kill {number}"), kind, f"kill-{number}")

    died = [one for trial in row.run(case(i, kind) for i, kind in enumerate(kinds)) for one in trial]
    at_point = sum("crossing" in one.where for one in died)
    row.note = (
        f"{len(died)} kills ({at_point} at fault points, {len(died) - at_point} by the clock); "
        f"{sum(k.ranks == 2 for k in kinds)} trials on 2 ranks, {sum(k.asynchronous for k in kinds)} asynchronous"
    )
    return row


def fault_points(root: Path, sizes: Sizes) -> Row:
    row = Row(what="every fault point of a save, once: the old or the new checkpoint is whole")
    scenes = [points.Points(root, world, damaged=damaged) for world, damaged in sizes.scenes]
    row.run(
        (f"{scene.root.name}: {fault} {scene.name(fault)}", lambda scene=scene, fault=fault: scene.check(fault))
        for scene in scenes
        for fault in scene.all()
    )
    row.note = f"{len({name for scene in scenes for names in scene.names for name in names})} kinds of points"
    return row


def damaged_files(root: Path, seed: int, sizes: Sizes) -> Row:
    row = Row(what="damaged checkpoint read: refused by name, the older one found")
    reading = corruption.Reading(root / "reading")
    cases = list(reading.cases(Random(f"{seed} damage"), sizes.flips))
    row.run((name, lambda harm=harm: reading.check(harm)) for name, harm in cases)
    kinds = Counter(name.split()[0] if name.split()[0] in ("truncate", "flip") else "other" for name, _ in cases)
    row.note = f"{kinds['truncate']} truncations, {kinds['flip']} flipped bits, {kinds['other']} others"
    return row


def unknown_files(root: Path) -> Row:
    row = Row(what="a file that no manifest names: ignored")
    reading = corruption.Reading(root / "unknown")
    row.run([("unknown file", reading.check_unknown_file)])
    return row


def damaged_runs(proving: kills.Proving, seed: int, sizes: Sizes) -> Row:
    row = Row(what="run of 2 ranks on a damaged checkpoint: refused, or on from the older one to the same end")
    resuming = corruption.Resuming(proving)
    found = sorted(resuming.cases().items())
    chosen = Random(f"{seed} runs").sample(found, min(sizes.resumes, len(found)))
    ends = Counter(row.run((name, lambda harm=harm: resuming.check(harm)) for name, harm in chosen))
    row.note = ", ".join(f"{number} {end}" for end, number in sorted(ends.items()))
    return row


def other_ranks(root: Path, seed: int, sizes: Sizes) -> Row:
    row = Row(what="saved on w ranks, loaded on v: state bitwise, losses to 1e-6")
    every = [(w, v, optimizer) for w in range(1, 5) for v in range(1, 5) for optimizer in OPTIMIZERS if w != v]
    chosen = Random(f"{seed} pairs").sample(every, min(sizes.pairs, len(every)))
    shards = resharding.Resharding(root)
    apart = row.run((f"{w} to {v}, {o}", lambda w=w, v=v, o=o: shards.check(w, v, o)) for w, v, o in chosen)
    row.note = f"losses at most {max(apart, default=float('nan')):.1e} apart"
    return row


def strange_configurations(root: Path, seed: int, sizes: Sizes) -> Row:
    row = Row(what="strange configurations: valid, or exit code 2 without a traceback")
    (counts,) = row.run([(f"seed {seed}", lambda: configurations.fuzz(root, sizes.configurations, seed))]) or [{}]
    row.cases = sum(counts.values()) or row.cases
    row.note = ", ".join(f"{number} {end}" for end, number in counts.items())
    return row


def strange_data(root: Path, seed: int, sizes: Sizes) -> Row:
    from transformers import AutoTokenizer

    from tests.toy_run import folder

    row = Row(what="strange data files: an error with file and line, or counted")
    tokenizer = AutoTokenizer.from_pretrained(folder(root / "tokenizer"))
    ends = Counter(
        row.run(
            (f"{i}", lambda i=i: datasets.check(root, Random(f"{seed} data {i}"), tokenizer))
            for i in range(sizes.datasets)
        )
    )
    row.note = ", ".join(f"{number} {end}" for end, number in sorted(ends.items()))
    return row


def containers(proving: kills.Proving) -> Row:
    row = Row(what="PID namespaces: locks and ranks of other containers on one machine")
    row.run(surroundings.Containers(proving).cases())
    row.note = "" if row.cases else "not allowed on this machine"
    return row


def full_disks(proving: kills.Proving, seed: int, sizes: Sizes) -> Row:
    row = Row(what="a disk that fills at each phase: an error with the path, and after it the same end bitwise")
    ends = Counter(
        row.run(
            (f"{i}", lambda i=i: surroundings.fill(proving, Random(f"{seed} disk {i}"), i)) for i in range(sizes.disks)
        )
    )
    row.note = f"{len(surroundings.PHASES)} phases; " + ", ".join(f"{number} {end}" for end, number in ends.items())
    return row


def killed_tokenisers(root: Path, seed: int, sizes: Sizes) -> Row:
    row = Row(what="killed while tokenising: the next run has the tokens, and nothing else is left")
    return _repeated(row, surroundings.kill_tokeniser, root, f"{seed} tokeniser", sizes.tokenisers)


def killed_launchers(root: Path, seed: int, sizes: Sizes) -> Row:
    row = Row(what="killed launcher of 2 ranks: they end, with a whole checkpoint of every step that was taken")
    return _repeated(row, surroundings.kill_launcher, root, f"{seed} launcher", sizes.launchers)


def _repeated(row: Row, attempt: Callable[[Path, Random, int], Any], root: Path, seed: str, number: int) -> Row:
    row.run((f"{i}", lambda i=i: attempt(root, Random(f"{seed} {i}"), i)) for i in range(number))
    return row
