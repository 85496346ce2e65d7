"""Our side of what `benchmarks.influence` compares: the same case as the other packages get, through the public API.

A run is composed with nothing that trains, so that all plain weights of the blocks are looked at: the matrices that
the other packages look at too. Factors and indexes are written to disk, as theirs are.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import treering as tr
from benchmarks.peers.influence_sides import TOKENS, Case
from treering.curvature import GradientSettings, Statistics, measure
from treering.data.document import Document
from treering.influence import Sketched, build, query_rows
from treering.sketches import Index, SketchSettings
from treering.train import calibration

# What is timed. bergson at p = 0 writes complete gradients in float32, and so does the first of these.
COLLECTED = {
    "treering, exact": SketchSettings(kind="exact", curvature="identity", storage="float32"),
    "treering, psift, p = 16": SketchSettings(kind="psift", curvature="kfac", size=16),
    "treering, psift, p = 64": SketchSettings(kind="psift", curvature="kfac", size=64),
    "treering, eigen-topk": SketchSettings(entries=42),
}


def documents(rows: Sequence[Sequence[int]], name: str) -> list[Document]:
    """Return documents of which every token but the first is predicted."""
    made = []
    for number, ids in enumerate(rows):
        mask = np.arange(len(ids)) > 0
        made.append(Document(ids=np.asarray(ids, dtype=np.uint32), mask=mask, sample_id=f"{name}.jsonl:{number + 1}#0"))
    return made


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The model and documents of a case, ready to be measured and indexed."""

    run: Any
    train: list[Document]
    queries: list[Document]
    work: Path

    @classmethod
    def of(cls, case: Case, work: Path, techniques: Sequence[Any] = (), **composing: Any) -> "Subject":
        run = tr.compose(case.model, list(techniques), frozen=True, dtype="float32", **composing)
        return cls(run=run, train=documents(case.train, "train"), queries=documents(case.queries, "queries"), work=work)

    @property
    def batches(self) -> list[dict[str, Any]]:
        return calibration.batches(self.train, self.run.plan, TOKENS, "on")

    def measured(self, kind: str, *, labels: str = "data", to: str | None = None) -> Statistics | None:
        """Return factors; none for `identity`."""
        if kind == "identity":
            return None
        settings = GradientSettings(kind=kind, labels=labels)  # type: ignore[arg-type]
        return measure(self.run, self.batches, gradients=settings, to=None if to is None else self.work / to)

    def index(self, settings: SketchSettings, known: Statistics | None, to: str = "index") -> Index:
        """Write the index anew."""
        shutil.rmtree(self.work / to, ignore_errors=True)
        return build(
            self.run, self.train, self.work / to, settings=settings, statistics=known, capacity=TOKENS
        )  # fmt: skip

    def scores(
        self, settings: SketchSettings, known: Statistics | None, *, unit: bool = False
    ) -> tuple[NDArray[np.float64], Index]:
        """Return scores [queries, documents] out of an index on disk, and the index."""
        index = self.index(settings, known)
        rows = query_rows(Sketched.of(self.run, settings, known), self.queries)
        found = index.score(rows, unit=unit).values.double().numpy()
        place = {name: number for number, name in enumerate(index.all_ids())}
        return found[[place[document.sample_id] for document in self.train]].T.copy(), index


def collection(case: Case, work: Path) -> dict[str, Callable[[], None]]:
    """Return what writes an index of each kind, by name. Factors are measured before."""
    torch.set_num_threads(1)
    subject = Subject.of(case, work)
    known = {kind: subject.measured(kind) for kind in ("kfac", "ekfac", "identity")}

    def of(name: str, settings: SketchSettings) -> Callable[[], None]:
        return lambda: _done(subject.index(settings, known[settings.curvature], name.replace(" ", "")))

    return {name: of(name, settings) for name, settings in COLLECTED.items()}


def fits(case: Case, work: Path) -> dict[str, Callable[[], None]]:
    """Return what measures factors and writes them, by name."""
    torch.set_num_threads(1)
    subject = Subject.of(case, work)

    def of(kind: str) -> Callable[[], None]:
        def run() -> None:
            shutil.rmtree(work / f"ours-{kind}", ignore_errors=True)
            subject.measured(kind, to=f"ours-{kind}")

        return run

    return {f"treering, {kind}": of(kind) for kind in ("kfac", "ekfac")}


def _done(_: object) -> None:
    """The index is on disk."""


def of_ranks(case: Case, work: Path) -> dict[str, str]:
    """Measure and index with all ranks: factors of two kinds, an index of each. Return the digests of the factors."""
    digests = {}
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    sharded: dict[str, Any] = {"techniques": [tr.Shard()], "mesh": tr.mesh(shard=ranks)} if ranks > 1 else {}
    subject = Subject.of(case, work, **sharded)
    for kind, name in (("kfac", "treering, psift, p = 16"), ("ekfac", "treering, eigen-topk")):
        known, to = subject.measured(kind, labels="sampled", to=f"factors-{kind}"), work / f"index-{kind}"
        build(subject.run, subject.train, to, settings=COLLECTED[name], statistics=known, capacity=TOKENS)
        assert known is not None and known.gradients is not None
        digests[kind] = known.gradients.digest
    return digests
