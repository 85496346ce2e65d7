"""`treering measure`: the second moments of each layer's inputs, for text that represents what must be kept."""

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from treering.cli import launch
from treering.core.errors import ConfigError

if TYPE_CHECKING:
    from treering.curvature import GradientSettings, Statistics
    from treering.data.document import Document
    from treering.plan import Run
    from treering.technique import Technique

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
    tokens: Annotated[
        int | None,
        typer.Option(min=1, help="How many are measured; default: 4 for each input of a weight, at least 32,768."),
    ] = None,
    max_length: Annotated[int, typer.Option(min=2, help="The longest document, in tokens.")] = 2048,
    trained: Annotated[bool, typer.Option("--trained", help="Count only where an answer is predicted.")] = False,
    gradients: Annotated[
        Literal["kfac", "ekfac", "shampoo", "tkfac"] | None,
        typer.Option("--gradients", help="Measure gradients as well, for influence; by a backward of each batch."),
    ] = None,
    labels: Annotated[
        Literal["sampled", "data"], typer.Option(help="Of --gradients: drawn from the model, or those of the text.")
    ] = "sampled",
    experts: Annotated[
        Literal["each", "pooled"], typer.Option(help="Of --gradients: experts of a stack apart, or together.")
    ] = "each",
    cover: Annotated[
        Literal["blocks", "all"],
        typer.Option(help="Of --gradients: matrices in blocks, or biases, norms, routers, embedding, head too."),
    ] = "blocks",
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
    """Measure which directions the inputs of each layer use: what `osft` keeps, and the next task adds to. With
    --gradients also what `influence` needs."""
    if bool(data) == generate:
        raise ConfigError("give text to measure: --data FILE, or --generate to let the model write it; one of the two")
    if trained and generate:
        raise ConfigError("--trained counts answers in data, and --generate has none; leave one of them out")
    if gradients is not None and (add or trained):
        name = "--add" if add else "--trained"
        raise ConfigError(f"{name} is of inputs alone, and --gradients measures both; leave one of them out")
    if launch.started(NAME, nproc):
        return
    settings = gradient_settings(gradients, labels, experts, seed, cover)
    _refuse_taken(to, add or [], settings)
    from treering.cli.measure_report import announce, report_gradients, table_of
    from treering.curvature.counts import enough_tokens

    run = composed(model, dtype, dequantize, settings)
    refuse_longer(run, max_length)
    tokens = tokens or enough_tokens(run.plan.anatomy, run.model.config)
    texts, packing = documents(run, data, format, generate, tokens, max_length, seed)
    announce(run, settings)
    statistics = measured(run, texts, packing, data, trained, add or [], max_length, to, settings)
    table_of(statistics)
    report_gradients(statistics, run.plan.anatomy)
    if gradients is None:  # with gradients, the last token of a document does not count
        _report_missing(statistics.rings[-1].tokens, tokens, trained)
    _warn(statistics)


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


def gradient_settings(
    kind: str | None, labels: str, experts: str, seed: int, cover: str = "blocks"
) -> "GradientSettings | None":
    """Return what is measured of gradients; None: nothing."""
    from treering.curvature import GradientSettings

    if kind is None:
        return None
    return GradientSettings(kind=kind, labels=labels, experts=experts, seed=seed, cover=cover)  # type: ignore[arg-type]


def composed(model: str, dtype: str, dequantize: bool, gradients: "GradientSettings | None" = None) -> "Run":
    """Return the plain model, sharded where there are several ranks. Nothing is trained. For gradients, blocks are
    recomputed and the loss is in tiles, so that a backward fits wherever a forward does."""
    from treering.plan import compose
    from treering.techniques.recompute import Recompute
    from treering.techniques.shard import Shard
    from treering.techniques.tiling import TiledLoss

    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    shard: list[Technique] = [Shard()] if several else []
    shard = shard if gradients is None else [Recompute(), TiledLoss(), *shard]
    return compose(model, shard, dtype=dtype, dropout="off", frozen=True, dequantize=dequantize)


def _refuse_taken(to: Path, add: list[Path], gradients: "GradientSettings | None") -> None:
    """Refuse, before anything is loaded, a folder whose statistics would be overwritten, unless they are the first half
    of the same measurement."""
    from treering.core.errors import CheckpointError
    from treering.curvature import open
    from treering.curvature.disk import NAME as JSON
    from treering.curvature.disk import refuse_foreign

    refuse_foreign(to)
    if gradients is not None and (to / JSON).exists():
        begun = open(to).gradients
        if begun is not None and begun.settings == gradients and not begun.complete:
            return
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
    gradients: "GradientSettings | None" = None,
) -> "Statistics":
    """Measure the run's matrices over `documents`, write that to the folder `to`, and return it."""
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
            gradients=gradients,
            progress=lambda done, of: status.update(f"measuring: batch {done} of {of}"),
        )
