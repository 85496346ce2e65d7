"""`treering data`: show, tokenise or check what a model would be trained on."""

from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from treering.cli.config import ConfigFile, Settings, load
from treering.cli.text import count as number

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.text import Text
    from transformers import PreTrainedTokenizerBase

    from treering.cli.schema import RunConfig
    from treering.data.examine import ShownDocument
    from treering.data.examples import Examples, Report

app = typer.Typer(help="Look at what a model would be trained on.", no_args_is_help=True)
Which = Annotated[Literal["train", "eval"], typer.Option(help="Which of the two sets.")]


@app.command("show")
def show(
    file: ConfigFile,
    settings: Settings = None,
    which: Which = "train",
    start: Annotated[int, typer.Option("--from", min=0, help="The first document.")] = 0,
    count: Annotated[int, typer.Option("-n", min=1, max=1000, help="How many documents.")] = 3,
) -> None:
    """Print documents as tokens: those that are trained in green, or in ⟦ ⟧ where there is no colour."""
    config = load(file, settings)
    from treering.data.examine import show as look

    examples, tokenizer = built(config, which)
    until = min(start + count, len(examples))
    for document in look(examples, tokenizer, range(start, until)):
        _print_document(document)
    _summary(
        examples.report, f"documents {start} to {until - 1} of {len(examples):,}" if until > start else "no document"
    )


@app.command("build")
def build(file: ConfigFile, settings: Settings = None, which: Which = "train") -> None:
    """Tokenise into the cache, so that a run starts at once."""
    config = load(file, settings)
    examples, _ = built(config, which)
    _summary(examples.report, f"{len(examples):,} documents, {int(examples.lengths.sum()):,} tokens")


@app.command("check")
def check(file: ConfigFile, settings: Settings = None, which: Which = "train") -> None:
    """Report lengths, what is cut or skipped, duplicates, and how much is trained."""
    config = load(file, settings)
    from treering.cli.console import console, safe, say, table
    from treering.data.examine import check as examine

    examples, _ = built(config, which)
    result = examine(examples)
    _summary(
        result.report, f"{result.documents:,} documents, {result.tokens:,} tokens, {result.trained_share:.1%} trained"
    )
    shares = ", ".join(f"{share:.0%} ≤ {length:,}" for share, length in result.quantiles)
    say(f"lengths: {result.shortest:,} to {result.longest:,}; {shares}")
    listing = table("tokens", "documents", "", right=("tokens", "documents"))
    most = max(bar.count for bar in result.histogram)
    for bar in result.histogram:
        listing.add_row(f"{bar.low:,}–{bar.high:,}", f"{bar.count:,}", "█" * round(40 * bar.count / most))
    console().print(listing)
    if result.untrained_documents:
        say(f"! {number(result.untrained_documents, 'document')} without a trained token", "yellow")
    if result.duplicate_count:
        repeat = "repeats another" if result.duplicate_count == 1 else "repeat others"
        say(f"! {number(result.duplicate_count, 'document')} {repeat} exactly", "yellow")
        for first, again in result.duplicates:
            console().print(safe(f"    {again} repeats {first}"), soft_wrap=True)


def built(config: "RunConfig", which: Literal["train", "eval"]) -> "tuple[Examples, PreTrainedTokenizerBase]":
    """Return the documents of a set, tokenised or from the cache, and their tokenizer."""
    from treering.core.errors import ConfigError
    from treering.data.examples import build

    if which == "eval" and not config.data.evaluates:
        raise ConfigError("there is no eval set: set data.eval or data.eval_fraction")
    tokenizer = _tokenizer(config.model.path)
    with _counting() as progress:
        return build(config.data, tokenizer, which, progress), tokenizer


def _tokenizer(path: str) -> "PreTrainedTokenizerBase":
    from treering.plan.open_model import locate
    from treering.store.untrusted import open_tokenizer

    return open_tokenizer(locate(path))


@contextmanager
def _counting() -> "Iterator[Callable[[int], None]]":
    """Show a count of records on the terminal while they are tokenised."""
    from treering.cli.console import console

    out = console(stderr=True)
    if not out.is_terminal:
        yield lambda done: None
        return
    with out.status("reading") as status:
        yield lambda done: status.update(f"{done:,} records")


def _print_document(document: "ShownDocument") -> None:
    from treering.cli.console import console, safe

    out = console()
    out.print(
        safe(f"── {document.sample_id} · {len(document.tokens)} tokens, {document.trained} trained ──"), soft_wrap=True
    )
    out.print(_coloured(document, marks=out.color_system is None), soft_wrap=True)


def _coloured(document: "ShownDocument", *, marks: bool) -> "Text":
    """Return the tokens in a row; `marks` puts brackets around what is trained, where colour cannot be seen."""
    from rich.text import Text

    from treering.data.examine import printable

    line, inside = Text(), False
    for token in document.tokens:
        if marks and token.trained != inside:
            line.append("⟦" if token.trained else "⟧")
            inside = token.trained
        line.append(printable(token.text), style="bold green" if token.trained else "dim")
        if token.text.endswith("\n"):
            line.append("\n")
    if inside:
        line.append("⟧")
    return line


def _summary(report: "Report", first: str) -> None:
    from treering.cli.console import say

    say(first)
    say(f"{report.read:,} records as {report.format}, template {report.template}: {report.kept:,} documents")
    for what, times in report.notes.items():
        say(f"! {times:,} {what}", "yellow")
    for kind, times in report.skipped.items():
        say(f"! {times:,} skipped: {kind}", "yellow")
        for named in report.named.get(kind, ()):
            say(f"    {named}")
