"""The index of a training run: what it was trained to, its factors and rows, and scores of queries.

    OUTPUT/influence/step-N/statistics-ekfac        factors of the run at step N, measured on its training data
    OUTPUT/influence/step-N/eigen-topk-ekfac-42     a row for each training document

Model, step and data are those of the run's own configuration and checkpoints, so an index cannot be asked about another
model without a message: its recipe has a digest of the weights.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from treering.core.collectives import is_first, together
from treering.core.errors import CheckpointError
from treering.curvature import GradientSettings, Ring, Statistics, measure
from treering.curvature import open as open_statistics
from treering.curvature.vocabulary import Cover
from treering.data import examples as encoding
from treering.data.document import Document
from treering.data.examples import Examples
from treering.influence.bm25 import TokenLists, bm25
from treering.influence.building import Timed, build
from treering.influence.probe import ProbeResult, make_probe
from treering.influence.query import query_rows
from treering.influence.records import IndexedSource, as_json, indexed_sources
from treering.influence.scores import ScoreTable
from treering.influence.sketched import Sketched, packing_of
from treering.influence.tokens import token_scores
from treering.plan import Run
from treering.sketches import Index, SketchSettings
from treering.sketches import open as open_index
from treering.technique import Technique
from treering.train import calibration
from treering.train.checkpoints.identity import as_begun
from treering.train.config import Job
from treering.train.export import reopen
from treering.train.prepare import open_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Progress = Callable[[str, int, int], None]  # (what, done, of)


class TrainingDocuments(Sequence[Document]):
    """The documents of a training set, read when they are asked for."""

    def __init__(self, examples: Examples):
        self.examples = examples
        self.lengths = examples.lengths

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self.examples.document(n) for n in range(*i.indices(len(self)))]
        return self.examples.document(i)


@dataclass(frozen=True, kw_only=True)
class RunIndex:
    """A run, as it was at a checkpoint, and the folder of its index.

    Example:
        of_run = RunIndex.open(job)
        index = of_run.build(SketchSettings())
        table = of_run.open_index().scores({"why": document})
    """

    job: Job
    run: Run
    examples: Examples
    folder: Path

    @classmethod
    def open(cls, job: Job, *, step: int | None = None, helping: Sequence[Technique] = ()) -> "RunIndex":
        """Return the run of `job` at its newest checkpoint, or that of `step`. Every rank calls it.

        Args:
            helping: techniques that train nothing: a tiled loss, recompute, and shard where there are several ranks.
        """
        job, _ = as_begun(job)  # what retrains it has the settings that it had
        run = reopen(job, step=step, helping=helping)
        for parameter in run.model.parameters():
            parameter.requires_grad_(
                False
            )  # rows are made of activations' gradients; those of weights would cost a third
        tokenizer = open_tokenizer(job)
        if is_first():
            encoding.build(job.data, tokenizer, "train")
        together(lambda: None, "reading the training data")  # the other ranks read what the first has written
        examples = encoding.build(job.data, tokenizer, "train")
        return cls(job=job, run=run, examples=examples, folder=Path(job.output) / "influence" / f"step-{run.number}")

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer of the run's model."""
        return open_tokenizer(self.job)

    @cached_property
    def sources(self) -> tuple[IndexedSource, ...]:
        """The files of the training data, with digests of their content, which is read once."""
        return indexed_sources(self.job.data)

    @property
    def capacity(self) -> int:
        """The tokens of a batch."""
        return self.job.data.max_length

    @property
    def about(self) -> dict[str, str]:
        """What an index and its queries have to agree in: data that has changed has other rows."""
        return {"training data": self.examples.digest}

    def statistics(
        self, settings: GradientSettings, tokens: int, progress: Progress = lambda what, done, of: None
    ) -> Statistics:
        """Return the factors of the run, measured on `tokens` tokens of its training data unless they are there.

        A collective.
        """
        folder = self._statistics(settings.kind, settings.cover)
        documents = calibration.sample(self.examples, tokens, settings.seed)
        ring = Ring(name="the training data", tokens=0, data=calibration.digest(documents))
        present = open_statistics(folder) if folder.exists() else None
        of_others = present is not None and (
            present.gradients is None or present.gradients.settings != settings or present.rings[0].data != ring.data
        )
        if of_others:
            raise CheckpointError(
                f"{folder} was measured on other text, or in another way; give the number of tokens of that time, or "
                "move it away together with the indexes next to it"
            )
        batches = calibration.batches(documents, self.run.plan, self.capacity, packing_of(self.run))
        return measure(
            self.run, batches, ring=ring, gradients=settings, to=folder,
            progress=lambda done, of: progress("measuring", done, of),
        )  # fmt: skip

    def build(
        self, settings: SketchSettings, *, tokens: int = 1 << 18, seed: int = 0, cover: Cover = "blocks",
        progress: Progress = lambda what, done, of: None, timed: Timed = nullcontext,
    ) -> Index:  # fmt: skip
        """Measure what the settings need, and write a row for each training document; or resume both. A collective.

        Args:
            tokens: on how many the factors are measured.
            seed: of the drawn labels, and of which documents are measured.
            cover: matrices inside the `blocks`, or `all` parameters.
            timed: opened around each step, with its name.
        """
        known = None
        if settings.curvature != "identity":
            measured = GradientSettings(kind=settings.curvature, seed=seed, cover=cover)
            with timed("measuring the curvature"):
                known = self.statistics(measured, tokens, progress)
        return build(
            self.run, TrainingDocuments(self.examples), self.folder / index_name(settings, cover), settings=settings,
            statistics=known, capacity=self.capacity, about=self.about, cover=cover,
            progress=lambda done, of: progress("indexing", done, of), timed=timed,
        )  # fmt: skip

    def open_index(self, name: str | None = None) -> "AskedIndex":
        """Return an index that `build` wrote, ready for queries. A collective.

        Args:
            name: of its folder; None: the only one.

        Raises:
            CheckpointError: there is none, or the run or its factors are not those that it was made from.
        """
        names = sorted(p.name for p in self.folder.glob("*") if not p.name.startswith("statistics-") and p.is_dir())
        if name is None and len(names) == 1:
            name = names[0]
        if name not in names:
            asked = "" if name is None else f" {name!r}"
            has = f"has the indexes {', '.join(names)}; name one" if names else "has no index; build one"
            raise CheckpointError(f"{self.folder}{asked and ': no index' + asked + ', and it'} {has}")
        index = open_index(self.folder / name)
        settings, cover = index.recipe.settings, index.recipe.cover
        whitened = settings.curvature != "identity"
        known = open_statistics(self._statistics(settings.curvature, cover)) if whitened else None
        sketched = Sketched.of(self.run, settings, known, self.about, cover)
        index.check(sketched.recipe)
        return AskedIndex(of_run=self, index=index, sketched=sketched)

    def _statistics(self, curvature: str, cover: Cover) -> Path:
        return self.folder / f"statistics-{curvature}{'' if cover == 'blocks' else '-all'}"

    def text(self, text: str) -> Document:
        """Return a text as a query: each of its tokens but the first is to be explained."""
        return _trained(np.asarray(self.tokenizer.encode(text), dtype=np.uint32))

    def records(self, files: Sequence[str]) -> dict[str, Document]:
        """Return each record of files as a query, encoded as the training data is: what is trained of it is to be
        explained."""
        if not files:
            return {}
        config = replace(self.job.data, train=tuple(files), eval=None, eval_fraction=0.0)
        rows = encoding.build(config, self.tokenizer, "train")
        return {rows.sample_id(i): rows.document(i) for i in range(len(rows))}


@dataclass(frozen=True, kw_only=True)
class AskedIndex:
    """An index of a run, and how queries become its rows."""

    of_run: RunIndex
    index: Index
    sketched: Sketched

    def scores(self, queries: Mapping[str, Document], *, cosine: bool = False, words: bool = True) -> ScoreTable:
        """Return the scores of all training documents for `queries`.

        Args:
            queries: documents by name: the loss of each is what training moved.
            cosine: of unit norm, so that long documents have no advantage.
            words: add the scores of BM25 as a baseline.
        """
        examples = self.of_run.examples
        rows = query_rows(self.sketched, list(queries.values()))
        found = self.index.score(rows, unit=cosine).values.numpy()
        place = {name: i for i, name in enumerate(self.index.all_ids())}
        documents = tuple(examples.sample_id(i) for i in range(len(examples)))
        if absent := [name for name in documents if name not in place]:
            raise CheckpointError(
                f"{self.index.folder} has no row for {absent[0]}: the training data is another one now; put back that "
                "of the run, or build the index again"
            )
        about = {
            "method": f"{self.index.recipe.settings.kind} {self.index.recipe.settings.curvature}",
            "documents": examples.digest,
            "sources": as_json(self.of_run.sources),
            "index": self.index.recipe.digest,
        }
        baselines = {}
        if words:
            tokens = TokenLists.of([document.ids for document in queries.values()])
            baselines["bm25"] = bm25(TokenLists.of_examples(examples), tokens)
        return ScoreTable(
            documents=documents,
            queries=tuple(queries),
            scores=np.ascontiguousarray(found[[place[name] for name in documents]], dtype=np.float32),
            baselines=baselines,
            about=about,
        )

    def tokens(self, names: Sequence[str], query: Document) -> list[NDArray[np.float32]]:
        """Return the score of each token of some training documents for one query. They add up to the exact score, of
        which an index that keeps a part of the numbers has an estimate."""
        examples = self.of_run.examples
        places = {examples.sample_id(i): i for i in range(len(examples))}
        documents = [examples.document(places[name]) for name in names]
        rows = query_rows(self.sketched, [query])
        return [scores[:, 0] for scores in token_scores(self.sketched, documents, rows)]

    def probe(self, number: int = 16) -> ProbeResult:
        """Return how well the index, and BM25, find documents by their second halves."""
        documents = TokenLists.of_examples(self.of_run.examples)
        probe = make_probe(documents, number=number)
        halves = {f"half {i}": _trained(ids) for i, ids in enumerate(_lists(probe.queries))}
        table = self.scores(halves)
        return ProbeResult(
            ranks=probe.ranks(table.scores), baseline=probe.ranks(table.baselines["bm25"]), documents=len(documents)
        )


def index_name(settings: SketchSettings, cover: Cover) -> str:
    """Return the name of the folder of an index."""
    size = {"psift": f"-{settings.size}", "eigen-topk": f"-{settings.entries}", "exact": ""}[settings.kind]
    return f"{settings.kind}-{settings.curvature}{size}{'' if cover == 'blocks' else '-all'}"


def _trained(ids: NDArray[Any]) -> Document:
    mask = np.ones(len(ids), dtype=np.bool_)
    mask[:1] = False
    return Document(ids=np.asarray(ids, dtype=np.uint32), mask=mask, sample_id="query")


def _lists(lists: TokenLists) -> list[NDArray[Any]]:
    return [np.asarray(lists.ids[a:b]) for a, b in zip(lists.offsets, lists.offsets[1:])]
