"""`treering measure`: the second moments of each layer's inputs, for text that represents what must be kept."""

import os
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from treering.cli import launch
from treering.core.errors import ConfigError

if TYPE_CHECKING:
    from treering.curvature import Statistics
    from treering.data.examples import Document
    from treering.plan import Run

NAME = "measure"


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model folder or hub name.", show_default=False)],
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="The folder to write.", show_default=False)],
    data: Annotated[
        list[str] | None, typer.Option("--data", metavar="FILE", help="Text that represents what must be kept.")
    ] = None,
    generate: Annotated[bool, typer.Option("--generate", help="Let the model write the text itself.")] = False,
    format: Annotated[
        Literal["auto", "messages", "prompt", "alpaca", "text"], typer.Option(help="Of the records in FILE.")
    ] = "auto",
    tokens: Annotated[int, typer.Option(min=1, help="How many are measured.")] = 32768,
    max_length: Annotated[int, typer.Option(min=2, help="The longest document, in tokens.")] = 2048,
    trained: Annotated[bool, typer.Option("--trained", help="Count only where an answer is predicted.")] = False,
    add: Annotated[
        list[Path] | None, typer.Option("--add", metavar="DIR", help="Earlier statistics to add this to. Repeatable.")
    ] = None,
    dtype: Annotated[Literal["auto", "float32", "bfloat16"], typer.Option(help="To compute in.")] = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Decides which documents, and what is written.")] = 0,
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Decode the weights that MODEL holds quantized, to compute faster.")
    ] = False,
    nproc: Annotated[int | None, typer.Option(min=1, help="Start this many ranks on this machine.")] = None,
) -> None:
    """Measure which directions the inputs of each layer use: what `osft` keeps, and the next task adds to."""
    if bool(data) == generate:
        raise ConfigError("give text to measure: --data FILE, or --generate to let the model write it; one of the two")
    if trained and generate:
        raise ConfigError("--trained counts answers in data, and --generate has none; leave one of them out")
    ranks = launch.ranks_from(os.environ)
    if ranks is not None:
        launch.set_environment(ranks, os.environ)
    elif nproc is not None and nproc > 1:
        _start_ranks(nproc)
        return
    _refuse_taken(to, add or [])
    run = composed(model, dtype, dequantize)
    refuse_longer(run, max_length)
    texts, packing = documents(run, data, format, generate, tokens, max_length, seed)
    statistics = measured(run, texts, packing, data, trained, add or [], max_length, to)
    _table(statistics)
    _report_missing(statistics.rings[-1].tokens, tokens, trained)
    _warn(statistics)


def _start_ranks(nproc: int) -> None:
    import sys

    arguments = sys.argv[sys.argv.index(NAME) :]
    launch.start(nproc, arguments, Path(tempfile.gettempdir()) / "treering-logs")


def _report_missing(counted: int, asked: int, trained: bool) -> None:
    from treering.cli.console import say
    from treering.core.collectives import is_first

    if counted < asked and not trained and is_first():
        say(f"! only {counted:,} of {asked:,} tokens: there is no more text", "yellow")


def _warn(statistics: "Statistics") -> None:
    from treering.cli.console import say
    from treering.core.collectives import is_first
    from treering.techniques.osft.protection.coverage import warnings_on

    if is_first():
        for text in warnings_on(statistics):
            say(f"! {text}", "yellow")


def composed(model: str, dtype: str, dequantize: bool) -> "Run":
    """Return the plain model, sharded where there are several ranks. Nothing is trained."""
    from treering.plan import compose
    from treering.techniques.shard import Shard

    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    shard = [Shard()] if several else []
    return compose(model, shard, dtype=dtype, dropout="off", frozen=True, dequantize=dequantize)


def _refuse_taken(to: Path, add: list[Path]) -> None:
    """Refuse, before anything is loaded, a folder whose statistics would be overwritten."""
    from treering.core.errors import CheckpointError
    from treering.curvature.disk import NAME as JSON
    from treering.curvature.disk import refuse_foreign

    refuse_foreign(to)
    if (to / JSON).exists() and to.resolve() not in [folder.resolve() for folder in add]:
        raise CheckpointError(
            f"{to} holds statistics already; write --add {to} to add to them, or give another folder to --to"
        )


def refuse_longer(run: "Run", max_length: int) -> None:
    """Refuse documents that are longer than the model was made for."""
    from treering.core.errors import PlanError

    positions = getattr(run.model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(positions, int) and 0 < positions < max_length:
        raise PlanError(
            f"--max-length is {max_length}, and {run.plan.source_name} was made for {positions} positions; "
            f"write --max-length {positions}"
        )


def documents(
    run: "Run", data: list[str] | None, format: str, generate: bool, tokens: int, max_length: int, seed: int
) -> "tuple[list[Document], Literal['on', 'off']]":
    """Return the text to measure, from files or written by the model, and whether documents are packed."""
    from treering.cli.console import console
    from treering.core.collectives import is_first, together
    from treering.data.config import Data
    from treering.data.examples import build
    from treering.store.untrusted import open_tokenizer
    from treering.train import calibration
    from treering.train.calibration import generated

    assert run.plan.folder is not None
    tokenizer = open_tokenizer(run.plan.folder)
    packing: Literal["on", "off"] = "off" if run.plan.unpackable else "on"
    with console(stderr=True).status("writing" if generate else "reading") as status:
        if generate:
            show = lambda done, of: status.update(f"writing: {done:,} of {of:,} tokens")  # noqa: E731
            written = generated(run, tokenizer, tokens=tokens, length=max_length, seed=seed, progress=show)
            return calibration.first(written, tokens), packing
        config = Data(train=tuple(data or ()), format=format, max_length=max_length)  # type: ignore[arg-type]
        count = lambda done: status.update(f"reading: {done:,} records")  # noqa: E731
        if is_first():
            build(config, tokenizer, progress=count)  # the other ranks then read the cache
        together(lambda: None, "reading")
        return calibration.sample(build(config, tokenizer), tokens, seed), packing


def measured(
    run: "Run",
    documents: "list[Document]",
    packing: "Literal['on', 'off']",
    data: list[str] | None,
    trained: bool,
    add: list[Path],
    max_length: int,
    to: Path,
) -> "Statistics":
    """Measure the inputs of the run's matrices over `documents`, write that to the folder `to`, and return it."""
    from treering.cli.console import console
    from treering.curvature import Ring, measure, open
    from treering.train import calibration

    batches = calibration.batches(documents, run.plan, max_length, packing)
    name = ", ".join(Path(one).name for one in data) if data else "generated"
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    ring = Ring(name=name, tokens=0, data=calibration.digest(documents), date=date)
    with console(stderr=True).status("measuring") as status:
        return measure(
            run,
            batches,
            tokens="trained" if trained else "real",
            ring=ring,
            onto=[open(folder) for folder in add],
            to=to,
            progress=lambda done, of: status.update(f"measuring: batch {done} of {of}"),
        )


def _table(statistics: "Statistics") -> None:
    """Print a row for each kind of matrix. Effective rank: (Σ e)² / Σ e² of the eigenvalues, without computing them."""
    from treering.cli.console import console, safe, say, table
    from treering.cli.text import count, size
    from treering.core.collectives import is_first

    if not is_first():
        return
    kinds: dict[str, list[str]] = {}
    for key in statistics.tensors:
        shared = [w for w, entry in statistics.entries.items() if entry.key == key]
        names = [w.removesuffix(".weight").rpartition(".")[2] for w in shared]
        kinds.setdefault(" ".join(names), []).append(key)
    listing = table("inputs of", "times", "width", "tokens", "effective rank", "size", right=("times", "width"))
    for kind, keys in kinds.items():
        entries = [statistics.tensors[key] for key in keys]
        tokens = sorted(t for e in entries for t in (e.tokens if isinstance(e.tokens, tuple) else (e.tokens,)))
        ranks = sorted(rank for key in keys for rank in _ranks(statistics, key))
        widths = sorted({entry.shape[-1] for entry in entries})
        listing.add_row(
            safe(kind), str(len(keys)), ", ".join(map(str, widths)), _range(tokens), _range([round(r) for r in ranks]),
            size(sum(4 * _elements(entry.shape) for entry in entries)),
        )  # fmt: skip
    console().print(listing)
    for ring in statistics.rings:
        say(f"measurement {ring.name}: {ring.tokens:,} tokens{f', {ring.date}' if ring.date else ''}")
    say(f"wrote {statistics.where}: {count(len(statistics.entries), 'weight')}, {size(statistics.bytes)}")


def _ranks(statistics: "Statistics", key: str) -> list[float]:
    matrix = statistics[key]["inputs"].double()
    traces, squares = matrix.diagonal(dim1=-2, dim2=-1).sum(-1), matrix.square().sum((-2, -1))
    return (traces.square() / squares.clamp_min(1e-300)).reshape(-1).tolist()


def _elements(shape: tuple[int, ...]) -> int:
    product = 1
    for n in shape:
        product *= n
    return product


def _range(values: list[int]) -> str:
    return f"{values[0]:,}" if values[0] == values[-1] else f"{values[0]:,}–{values[-1]:,}"
