"""What `treering influence build` and `query` do with a run: open it, index its data, score it."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from treering.curvature.vocabulary import Cover
    from treering.data.document import Document
    from treering.influence.run_index import AskedIndex, RunIndex
    from treering.influence.scores import ScoreTable
    from treering.sketches.settings import SketchSettings
    from treering.train.config import Job


def opened(job: "Job", step: int | None) -> "RunIndex":
    """Return the run at a checkpoint, in a form whose backward fits wherever its training did."""
    from treering.influence.run_index import RunIndex
    from treering.technique import Technique
    from treering.techniques import Recompute, Shard, TiledLoss

    helping: list[Technique] = [Recompute(), TiledLoss()]
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        helping.append(Shard())
    return RunIndex.open(job, step=step, helping=helping)


def build_index(
    job: "Job", settings: "SketchSettings", *, tokens: int, step: int | None, cover: "Cover", profile: bool
) -> None:
    """Build the index of a run, and print what is in it and how it does on a probe."""
    from treering.cli.console import console, say
    from treering.cli.text import count, size
    from treering.core.collectives import is_first

    times = StepTimes()
    with times("opening the run"):
        of_run = opened(job, step)
    if is_first():
        say(f"rows of {count(len(of_run.examples), 'document')} into {of_run.folder}")
    with console(stderr=True).status("measuring") as status:
        show = lambda what, done, of: status.update(f"{what}: batch {done:,} of {of:,}")  # noqa: E731
        index = of_run.build(settings, tokens=tokens, cover=cover, progress=show, timed=times)
    asked = of_run.open_index(index.folder.name)
    left_out = asked.sketched.left_out
    if not is_first():
        return
    recipe = index.recipe
    say(f"wrote {index.folder}: {count(len(recipe.modules), 'module')}, {size(recipe.bytes_of_row)} a document")
    for reason in sorted(set(left_out.values())):
        names = [name for name, why in left_out.items() if why == reason]
        say(f"  not indexed: {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {reason}")
    with times("the probe"):
        alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
        warning = asked.probe().warning if alone else None
    if warning:
        say(f"! {warning}", "yellow")
    if profile:
        for name, seconds in times.seconds.items():
            say(f"{seconds:9.2f} s  {name}")


class StepTimes:
    """Wall-clock seconds by the name of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began


def table_of(
    job: "Job", texts: tuple[str, ...], files: tuple[str, ...], *, cosine: bool, step: int | None, name: str | None,
    shaded: int, page: "Path | None",
) -> "ScoreTable":  # fmt: skip
    """Return the scores of a run's training documents for texts and for the records of files.

    Args:
        shaded: print so many of the most helpful documents, their tokens shaded by their share of the score.
        page: write these as HTML as well.
    """
    from treering.core.errors import ConfigError

    of_run = opened(job, step)
    queries = {text: of_run.text(text) for text in texts}
    if len(queries) < len(texts):
        raise ConfigError("a query is given twice; leave one of them out")
    records = of_run.records(files)
    if both := [text for text in texts if text in records]:
        raise ConfigError(f"the query {both[0]!r} is a text and the id of a record; leave one of them out")
    queries |= records
    if shaded and len(queries) > 1:
        raise ConfigError(f"--shade is for one query, and there are {len(queries)}; ask them one by one")
    asked = of_run.open_index(name)
    table = asked.scores(queries, cosine=cosine)
    return _shaded(asked, table, next(iter(queries.values())), shaded, page) if shaded else table


def _shaded(asked: "AskedIndex", table: "ScoreTable", query: "Document", top: int, page: "Path | None") -> "ScoreTable":
    """Print the first documents, shaded, and return the table with the scores of their tokens."""
    from treering.cli.influence_print import print_documents
    from treering.influence.shade import shade, token_texts

    rows = table.order(table.queries[0])[:top].tolist()
    names = [table.documents[row] for row in rows]
    examples, tokenizer = asked.of_run.examples, asked.of_run.tokenizer
    places = {examples.sample_id(i): i for i in range(len(examples))}
    shaded = []
    scores = asked.tokens(names, query)
    for name, row, values in zip(names, rows, scores):
        texts = token_texts(tokenizer, examples.document(places[name]).ids.tolist())
        heading = f"{name} · score {table.scores[row, 0]:+.4g}, its tokens {values.sum():+.4g}"
        shaded.append((heading, shade(texts, values)))
    print_documents(shaded, page)
    return table.with_tokens({row: values[:, None] for row, values in zip(rows, scores)})
