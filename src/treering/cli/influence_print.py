"""Records and documents with their scores on the terminal. Text of the data is never markup."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from treering.core.errors import DataError

if TYPE_CHECKING:
    from rich.text import Text

    from treering.cli.schema import RunConfig
    from treering.influence.records import IndexedSource
    from treering.influence.scores import ScoreTable
    from treering.influence.shade import ShadedText

_TEXT = 160  # characters of a record in a row


def print_records(
    table: "ScoreTable", first: Literal["helpful", "harmful"], top: int, sources: "Sequence[IndexedSource] | None"
) -> None:
    """Print the records with the first scores. `sources` are where their texts are read from, if they are shown.

    Scores of other methods have other units, so their ranks are shown: 1 is the most helpful (or harmful).
    """
    import numpy as np

    from treering.cli.console import console, safe, say
    from treering.cli.console import table as columns
    from treering.cli.text import short
    from treering.influence.records import read_records, text_of

    rows = table.order(table.queries[0], first=first)[:top].tolist()
    shown = [table.documents[row] for row in rows]
    records = read_records(sources, shown) if sources is not None else {}
    ranks = {}
    for name, values in table.baselines.items():
        order = np.argsort(-values[:, 0] if first == "helpful" else values[:, 0], kind="stable")
        ranks[f"rank by {name}"] = np.argsort(order, kind="stable") + 1
    say(f"the most {first} of {len(table.documents):,} records for: {short(table.queries[0], 120)}")
    numbers = ("rank", "score", *ranks)
    listing = columns(*numbers, "record", *(("text",) if records else ()), right=numbers)
    for i, row in enumerate(rows):
        cells = [f"{i + 1}", f"{table.scores[row, 0]:+.4g}", *(f"{one[row]:,}" for one in ranks.values())]
        text = [safe(short(text_of(records[table.documents[row]]).replace("\n", " ⏎ "), _TEXT))] if records else []
        listing.add_row(*cells, safe(short(table.documents[row])), *text)
    console().print(listing)


def print_shaded(
    table: "ScoreTable", config: "RunConfig", first: Literal["helpful", "harmful"], top: int, page: Path | None
) -> None:
    """Print the documents with the first scores, each token shaded by its share; write them to `page` as HTML."""
    from treering.cli.data import built
    from treering.influence.shade import shade, token_texts

    if table.tokens is None:
        raise DataError("this table has no scores of tokens; query with --shade, or leave it out here")
    examples, tokenizer = built(config, "train")
    if table.about.get("documents") not in (None, examples.digest):
        raise DataError(
            f"the scores are of other tokens than those of {config.data.train}; give the configuration that was scored"
        )
    places = {examples.sample_id(i): i for i in range(len(examples))}
    rows = table.order(table.queries[0], first=first)[:top].tolist()
    shaded = []
    for row in rows:
        name, values = table.documents[row], table.tokens.of(row)[:, 0]
        if not len(values):
            raise DataError(f"{name} has no scores of tokens; query with a larger --shade, or show fewer with -n")
        if name not in places or len(values) != examples.lengths[places[name]]:
            raise DataError(f"{name} has other tokens in {config.data.train}; give the configuration that was scored")
        texts = token_texts(tokenizer, examples.document(places[name]).ids.tolist())
        shaded.append((f"{name} · score {table.scores[row, 0]:+.4g}", shade(texts, values)))
    print_documents(shaded, page)


def print_documents(shaded: "Sequence[tuple[str, ShadedText]]", page: Path | None) -> None:
    """Print documents, each with its heading, and write them to `page` as HTML."""
    from treering.cli.console import console, safe, say
    from treering.influence.shade import html

    out = console()
    for heading, one in shaded:
        out.print(safe(f"── {heading} ──"), soft_wrap=True)
        out.print(coloured(one, marks=out.color_system is None), soft_wrap=True)
        out.print(safe(one.legend, "dim"), soft_wrap=True)
    if page is not None:
        try:
            page.write_text("".join(html(one, heading) for heading, one in shaded), encoding="utf-8")
        except OSError as error:
            raise DataError(f"{page} cannot be written: {error.strerror or error}; give another place") from error
        say(f"wrote {page}")


def coloured(shaded: "ShadedText", *, marks: bool) -> "Text":
    """Return shaded tokens as a line of rich; `marks` puts ⟦+ ⟧ or ⟦- ⟧ around strong ones, for no colours."""
    from rich.text import Text

    from treering.data.examine import printable
    from treering.influence.shade import HARMFUL, HELPFUL, LEVELS

    line = Text()
    for token in shaded.tokens:
        if token.left_out:
            line.append(f" … {token.left_out:,} tokens … ", style="dim")
            continue
        text = "\n".join(printable(part) for part in token.text.split("\n"))
        if marks and abs(token.level) > LEVELS // 2:
            text = f"⟦{'+' if token.level > 0 else '-'}{text}⟧"
        # Mixed with the white of a terminal's text: the paler, the smaller the share.
        strength = abs(token.level) / LEVELS
        colour = [round(255 - (255 - part) * strength) for part in (HELPFUL if token.level > 0 else HARMFUL)]
        line.append(text, style=f"black on rgb({colour[0]},{colour[1]},{colour[2]})" if token.level else "")
    return line
