"""`treering influence`: which training documents decided an answer, and a dataset without the harmful ones."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from treering.cli import launch
from treering.cli.config import load
from treering.cli.influence_folder import RunFolder, config_of, file_of
from treering.cli.influence_validate import validate
from treering.cli.train import job_of
from treering.core.errors import ConfigError, DataError

if TYPE_CHECKING:
    from treering.cli.schema import RunConfig
    from treering.influence.choose import RecordChoice
    from treering.influence.records import IndexedSource
    from treering.influence.scores import ScoreTable

app = typer.Typer(help="Find the training data that decided an answer, and train without it.", no_args_is_help=True)
app.command("validate")(validate)
Table = Annotated[
    Path, typer.Argument(metavar="SCORES", help="A table that `influence query` wrote.", show_default=False)
]
Queries = Annotated[
    list[str] | None, typer.Option("--query", metavar="NAME", help="Of these queries; default: all. Repeatable.")
]
Reduce = Annotated[Literal["mean", "sum", "max"], typer.Option(help="Makes one score of those for several queries.")]


@app.command("build")
def build(
    run: RunFolder,
    kind: Annotated[
        Literal["eigen-topk", "psift", "exact"], typer.Option(help="What is kept of a gradient.")
    ] = "eigen-topk",
    curvature: Annotated[
        Literal["ekfac", "kfac", "shampoo", "tkfac", "identity"] | None,
        typer.Option(help="What whitens it; default: ekfac, of psift kfac.", show_default=False),
    ] = None,
    size: Annotated[int, typer.Option(min=1, help="Of psift: numbers of each side of a matrix.")] = 16,
    entries: Annotated[int, typer.Option(min=1, help="Of eigen-topk: coordinates of a matrix.")] = 42,
    block: Annotated[int | None, typer.Option(min=1, help="Of eigen-topk: of so many leading eigenvectors.")] = None,
    cover: Annotated[
        Literal["blocks", "all"],
        typer.Option(help="Matrices in blocks, or biases, norms, routers, embedding, head too."),
    ] = "blocks",
    tokens: Annotated[int, typer.Option(min=1, help="On how many the curvature is measured.")] = 1 << 18,
    step: Annotated[int | None, typer.Option(min=1, help="Of this checkpoint; default: the newest.")] = None,
    nproc: Annotated[int | None, typer.Option(min=1, help="Start this many ranks on this machine.")] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Print the time of each step.")] = False,
) -> None:
    """Measure the curvature of a trained run, and write a row for each of its training documents. The same
    command resumes what was interrupted."""
    from treering.sketches.settings import SketchSettings

    chosen = curvature or ("kfac" if kind == "psift" else "ekfac")
    sketch = SketchSettings(kind=kind, curvature=chosen, size=size, entries=entries, block=block)
    if launch.started("influence", nproc):
        return
    from treering.cli.influence_run import build_index

    build_index(job_of(config_of(run)), sketch, tokens=tokens, step=step, cover=cover, profile=profile)


@app.command("query")
def query(
    run: RunFolder,
    to: Annotated[
        Path, typer.Option("--to", metavar="SCORES", help="The .parquet or .arrow to write.", show_default=False)
    ],
    text: Annotated[list[str] | None, typer.Option("--text", help="A query. Repeatable.")] = None,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", metavar="FILE", help="Each record is a query, encoded as training data is. Repeatable."),
    ] = None,
    bm25: Annotated[bool, typer.Option("--bm25", help="Score by words alone: the baseline, without an index.")] = False,
    cosine: Annotated[bool, typer.Option("--cosine", help="Without the lengths of gradients.")] = False,
    step: Annotated[int | None, typer.Option(min=1, help="Of this checkpoint; default: the newest.")] = None,
    index: Annotated[
        str | None, typer.Option("--index", metavar="NAME", help="Where a run has several, e.g. psift-kfac-16.")
    ] = None,
    shade: Annotated[
        int, typer.Option("--shade", min=0, metavar="N", help="Show so many documents, tokens shaded by their share.")
    ] = 0,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="PAGE", help="With --shade: write a fragment of HTML as well.")
    ] = None,
    n: Annotated[int, typer.Option("-n", min=0, help="How many records are printed.")] = 5,
) -> None:
    """Score every training document of a run for queries, print the first ones, and write the table of scores."""
    if not text and not data:
        raise ConfigError("there is no query; give --text TEXT, or --data FILE with a query in each record")
    if html is not None and (not shade or html.exists()):
        raise ConfigError(
            f"--html {html}: " + ("needs --shade N" if not shade else "exists already; give another name")
        )
    if bm25 and (shade or cosine or step or index):
        raise ConfigError("--bm25 counts words, without an index; leave --shade, --cosine, --step and --index out")
    config = config_of(run)
    from treering.cli.console import say
    from treering.cli.influence_print import print_records
    from treering.cli.influence_run import table_of
    from treering.cli.text import count
    from treering.influence.tables import refuse_taken_file, write_scores

    refuse_taken_file(to)
    if bm25:
        table = _by_words(config, tuple(text or ()), tuple(data or ()))
    else:
        table = table_of(
            job_of(config),
            tuple(text or ()),
            tuple(data or ()),
            cosine=cosine,
            step=step,
            name=index,
            shaded=shade,
            page=html,
        )
    table = replace(table, about={**table.about, "config": str(file_of(run))})
    write_scores(table, to)
    if n:
        reduced = _one_query(table, None, "mean")
        print_records(reduced.by_record(), "helpful", n, _sources(table))
    say(f"wrote {to}: {count(len(table.documents), 'document')}, {count(len(table.queries), 'query', 'queries')}")


def _by_words(config: "RunConfig", texts: tuple[str, ...], files: tuple[str, ...]) -> "ScoreTable":
    from treering.cli.data import built
    from treering.influence.bm25 import bm25_table
    from treering.influence.records import indexed_sources

    examples, tokenizer = built(config, "train")
    queries: dict[str, Any] = {}
    for one in texts:
        _add(queries, one, tokenizer.encode(one, add_special_tokens=False))
    if files:
        rows, _ = built(_with_data(config, files), "train")
        for i in range(len(rows)):
            _add(queries, rows.sample_id(i), rows.document(i).ids)
    return bm25_table(examples, queries, indexed_sources(config.data))


def _add(queries: dict[str, Any], name: str, ids: Any) -> None:
    if name in queries:
        raise ConfigError(f"the query {name!r} is given twice; leave one of them out")
    queries[name] = ids


def _with_data(config: "RunConfig", files: tuple[str, ...]) -> "RunConfig":
    return replace(config, data=replace(config.data, train=files, eval=None, eval_fraction=0.0))


@app.command("scores")
def scores(
    file: Table,
    queries: Queries = None,
    reduce: Reduce = "mean",
    top: Annotated[int, typer.Option("-n", "--top", min=1, help="How many records.")] = 10,
    harmful: Annotated[bool, typer.Option("--harmful", help="The most harmful, not the most helpful.")] = False,
    texts: Annotated[bool, typer.Option("--texts/--no-texts", help="Read the records from the training data.")] = True,
    shade: Annotated[
        Path | None,
        typer.Option("--shade", metavar="FILE", help="The run's configuration: show documents, tokens shaded."),
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="PAGE", help="With --shade: write a fragment of HTML as well.")
    ] = None,
) -> None:
    """Print the records with the highest (or lowest) scores, with their texts."""
    if html is not None and (shade is None or html.exists()):
        reason = "needs --shade FILE, for the tokens" if shade is None else "exists already; give another name"
        raise ConfigError(f"--html {html}: {reason}")
    from treering.cli.influence_print import print_records, print_shaded
    from treering.influence.tables import read_scores

    table = _one_query(read_scores(file), queries, reduce)
    first: Literal["helpful", "harmful"] = "harmful" if harmful else "helpful"
    if shade is not None:
        print_shaded(table, load(shade, None), first, top, html)
        return
    records = table.by_record()
    print_records(records, first, top, _sources(table) if texts else None)


@app.command("clean")
def clean(
    file: Table,
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="The folder to write.", show_default=False)],
    queries: Queries = None,
    reduce: Reduce = "mean",
    remove: Annotated[int | None, typer.Option(min=1, metavar="N", help="Remove the N most harmful records.")] = None,
    remove_share: Annotated[float | None, typer.Option(metavar="SHARE", help="Remove this share of them.")] = None,
    remove_below: Annotated[float | None, typer.Option(metavar="SCORE", help="Remove those below a score.")] = None,
    helpful: Annotated[
        bool, typer.Option("--helpful", help="Remove the most helpful: what taught an answer that is wrong.")
    ] = False,
    remove_above: Annotated[float | None, typer.Option(metavar="SCORE", help="Remove those above a score.")] = None,
    keep: Annotated[int | None, typer.Option(min=1, metavar="N", help="Keep only the N most helpful.")] = None,
    keep_share: Annotated[float | None, typer.Option(metavar="SHARE", help="Keep only this share of them.")] = None,
    keep_above: Annotated[float | None, typer.Option(metavar="SCORE", help="Keep only those above a score.")] = None,
    unscored: Annotated[
        Literal["keep", "drop"], typer.Option(help="Records without a score: held out, skipped or not indexed.")
    ] = "keep",
    config: Annotated[
        Path | None,
        typer.Option("--config", metavar="FILE", help="To train again with; default: that of the query's run."),
    ] = None,
    n: Annotated[int, typer.Option("-n", min=0, help="How many of the removed records are printed.")] = 10,
) -> None:
    """Write a copy of the training data without the most harmful records, or with only the most helpful ones."""
    given = {"remove": remove, "remove-share": remove_share, "remove-below": remove_below}
    given |= {"remove-above": remove_above, "keep": keep, "keep-share": keep_share, "keep-above": keep_above}
    choice = _choice(given, helpful, unscored)
    from treering.cli.console import say
    from treering.cli.text import count
    from treering.influence.clean import LISTING
    from treering.influence.clean import clean as write
    from treering.influence.tables import read_scores

    table = _one_query(read_scores(file), queries, reduce)
    trained = config or Path(str(table.about.get("config", "run.yaml")))
    output = f"{load(trained, None).output}-cleaned" if trained.exists() else "runs/cleaned"
    cleaned = write(table, _sources(table), choice, to)
    for line in cleaned.listing()[:n]:
        say(line, "red")
    if len(cleaned.removed) > n:
        say(f"  … {len(cleaned.removed) - n:,} more; all are in {to / LISTING}")
    for source in cleaned.sources:
        left = source.path or "nothing is left of it"
        say(f"{source.source}: {source.kept:,} kept, {source.removed:,} removed → {left}")
    if missing := sum(source.unscored for source in cleaned.sources):
        say(f"! {count(missing, 'record')} without a score: {unscored}", "yellow")
    if cleaned.ties:
        say(f"! {count(cleaned.ties, 'record')} with exactly the score of a removed one: kept", "yellow")
    say(f"train again: {cleaned.retrain(str(trained), output)}")


def _choice(given: dict[str, Any], helpful: bool, unscored: Literal["keep", "drop"]) -> "RecordChoice":
    chosen = [name for name, value in given.items() if value is not None]
    if len(chosen) != 1:
        options = ", ".join(f"--{name}" for name in given)
        raise ConfigError(f"{len(chosen)} ways to choose records are given; give one of {options}")
    name = chosen[0]
    if helpful and name not in ("remove", "remove-share"):
        raise ConfigError(f"--helpful says which records --remove and --remove-share mean; leave it out of --{name}")
    from treering.influence.choose import RecordChoice

    action, _, by = name.partition("-")
    return RecordChoice(
        action="keep" if action == "keep" else "remove",
        side="helpful" if helpful or name == "remove-above" else "harmful",
        unscored=unscored,
        **{{"": "count", "share": "share"}.get(by, "score"): given[name]},
    )


def _one_query(table: "ScoreTable", queries: list[str] | None, reduce: Literal["mean", "sum", "max"]) -> "ScoreTable":
    """Return the table with one query: the named one, or all or several of them, reduced."""
    names = list(dict.fromkeys(queries or table.queries))
    return table.reduced(reduce, names, name=names[0] if len(names) == 1 else None)


def _sources(table: "ScoreTable") -> "tuple[IndexedSource, ...]":
    from treering.influence.records import from_json

    if "sources" not in table.about:
        raise DataError(
            "this table of scores does not say which training data it is of; make it with `influence query`"
        )
    return from_json(table.about["sources"])
