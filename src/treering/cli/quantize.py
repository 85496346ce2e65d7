"""`treering quantize`: a folder with quantized weights, without training, and what that costs each matrix."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from treering.core.errors import ConfigError

if TYPE_CHECKING:
    from treering.curvature import Statistics
    from treering.plan.quantizing import MatrixError


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model folder or hub name.", show_default=False)],
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="The folder to write.", show_default=False)],
    format: Annotated[
        Literal["nvfp4", "mxfp4", "int4", "int3", "int8", "fp8", "fp8_block", "nf4"],
        typer.Option(help="The number format; docs/quantize.md says which when."),
    ] = "nvfp4",
    pattern: Annotated[
        list[str] | None,
        typer.Option("--pattern", help="Quantize what this names, not all linears and experts. Repeatable."),
    ] = None,
    group: Annotated[
        int | None, typer.Option(min=1, help="Inputs that share a scale, of int4 and int3.", show_default=False)
    ] = None,
    observer: Annotated[
        Literal["max", "mse"], typer.Option(help="How scales are chosen: `clip` of the technique quantize.")
    ] = "max",
    data: Annotated[
        list[str] | None,
        typer.Option("--data", metavar="FILE", help="Text for the errors of outputs: the model runs over it first."),
    ] = None,
    statistics: Annotated[
        Path | None,
        typer.Option("--statistics", metavar="DIR", help="Of `treering measure`, for the errors of outputs."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="How many of --data are measured.")] = 32768,
    max_length: Annotated[int, typer.Option(min=2, help="The longest document of --data, in tokens.")] = 2048,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"], typer.Option(help="Of the weights that stay as they are.")
    ] = "auto",
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Decode the weights that MODEL holds quantized, and round again.")
    ] = False,
) -> None:
    """Quantize a model without training: a folder for engines, or to train adapters on, with an error table."""
    if data and statistics is not None:
        raise ConfigError("--data measures inputs and --statistics has them measured; give one of the two")
    from treering.plan import draft
    from treering.plan.quantizing import write_quantized
    from treering.store.publish import refuse_taken
    from treering.techniques.quantize import Quantize

    refuse_taken(to)
    targets: Any = tuple(pattern) if pattern else "all-linear"
    shared: Any = "merged" if format == "nvfp4" else "matrix"
    technique = Quantize(format=format, targets=targets, group=group, clip=observer, global_scale=shared)
    settings: dict[str, Any] = {"dtype": dtype, "dropout": "off", "frozen": True, "dequantize": dequantize}
    if data:  # refused before the model runs
        draft(model, [technique], **settings, weights=False)
    with tempfile.TemporaryDirectory() as folder:
        measured = _statistics(model, data, statistics, tokens, max_length, dtype, dequantize, Path(folder) / "moments")
        plan = draft(model, [technique], **settings)
        if measured is not None:
            measured.check(plan.anatomy)
        about = {"model": model, "format": format, "group": group, "observer": observer, "data": data}
        from treering.cli.console import console, safe

        with console(stderr=True).status("quantizing") as status:
            show = lambda weight: status.update(safe(f"quantizing {weight}"))  # noqa: E731
            errors = write_quantized(plan, to, statistics=measured, about=about, progress=show)
    _table(errors, to)


def _statistics(
    model: str,
    data: list[str] | None,
    folder: Path | None,
    tokens: int,
    max_length: int,
    dtype: str,
    dequantize: bool,
    to: Path,
) -> "Statistics | None":
    """Return the second moments of inputs: those of `folder`, or measured on `data`, or None."""
    from treering.cli import measure
    from treering.curvature import open

    if folder is not None:
        return open(folder)
    if not data:
        return None
    run = measure.composed(model, dtype, dequantize)
    measure.refuse_longer(run, max_length)
    documents, packing = measure.documents(run, data, "auto", False, tokens, max_length, 0)
    return measure.measured(run, documents, packing, data, False, [], max_length, to)


def _table(errors: "Sequence[MatrixError]", to: Path) -> None:
    """Print a row for each kind of matrix, and where the largest error is."""
    from treering.cli.console import console, safe, say, table
    from treering.cli.text import count, size
    from treering.plan.quantizing import ERRORS
    from treering.store.model_folder import tensor_files

    kinds: dict[str, list[MatrixError]] = {}
    for one in errors:
        kinds.setdefault(one.weight.removesuffix(".weight").rpartition(".")[2], []).append(one)
    outputs = any(one.output_error is not None for one in errors)
    numbers = ("matrices", "bits", "error", "largest", *(("of outputs", "largest of outputs") if outputs else ()))
    listing = table("weights", *numbers, "of", right=numbers)
    for kind, ones in kinds.items():
        columns = [[one.weight_error for one in ones]]
        if outputs:
            columns.append([one.output_error or 0.0 for one in ones])
        shown = [f"{value:.4f}" for column in columns for value in (sum(column) / len(column), max(column))]
        worst = max(ones, key=lambda one: one.output_error if outputs and one.output_error else one.weight_error)
        where = worst.weight if worst.expert is None else f"{worst.weight}[{worst.expert}]"
        listing.add_row(
            safe(kind), f"{len(ones):,}", f"{sum(one.bits for one in ones) / len(ones):.2f}", *shown, safe(where)
        )
    console().print(listing)
    if outputs and (unseen := sum(one.tokens == 0 for one in errors)):
        say(
            f"! no measured token reached {count(unseen, 'matrix', 'matrices')}: their outputs count as exact", "yellow"
        )
    elements = sum(one.outputs * one.inputs for one in errors)
    bits = sum(one.bits * one.outputs * one.inputs for one in errors) / elements
    files = size(sum(path.stat().st_size for path in set(tensor_files(to).values())))
    matrices = count(len(errors), "matrix", "matrices")
    say(f"wrote {to}: {matrices} in {bits:.2f} bits an element, files of {files}")
    say(f"errors of each matrix: {to / ERRORS}")
