"""`treering influence validate`: train a run again without some of its records, and compare with its index."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from treering.cli.influence_folder import RunFolder, config_of
from treering.cli.train import job_of
from treering.core.errors import ConfigError, DataError

if TYPE_CHECKING:
    from treering.influence.run_index import AskedIndex, RunIndex
    from treering.influence.validate import Validation


def validate(
    run: RunFolder,
    queries: Annotated[
        list[str],
        typer.Option("--queries", metavar="FILE", help="Each record is a query. Repeatable.", show_default=False),
    ],
    subsets: Annotated[int, typer.Option(help="Trainings on a random half of the records each.")] = 20,
    index: Annotated[
        str | None, typer.Option("--index", metavar="NAME", help="Where a run has several, e.g. psift-kfac-16.")
    ] = None,
    leave_out: Annotated[
        int, typer.Option("--leave-out", metavar="K", help="Train without the K first records of each query; 0: not.")
    ] = 5,
    planted: Annotated[
        Path | None,
        typer.Option("--planted", metavar="FILE", help="Ids of records that should be found, one a line."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the halves and of the records left out at random.")] = 0,
    to: Annotated[
        Path | None,
        typer.Option("--to", metavar="DIR", help="Where losses are written; default: influence/validation of RUN."),
    ] = None,
) -> None:
    """Train a run again on halves of its data and without its first records, and compare with its index. The same
    command resumes what was interrupted."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("a validation runs on one process; start it without torchrun or srun")
    wanted = () if planted is None else _planted(planted)
    config = config_of(run)
    from treering.cli.console import console, say
    from treering.cli.influence_run import opened
    from treering.influence.validate import ValidationSettings
    from treering.influence.validate import validate as compare
    from treering.techniques import TiledLoss

    settings = ValidationSettings(subsets=subsets, leave_out=leave_out, seed=seed)
    of_run = opened(job_of(config), None)
    asked = of_run.open_index(index)
    documents = of_run.records(queries)
    folder = to or Path(config.output) / "influence" / "validation"
    with console(stderr=True).status("training again") as status:

        def show(done: int, of: int, seconds: float | None) -> None:
            if done == of:
                return
            rest = f"{of - done} to go" + (f", about {_duration(seconds)} each" if seconds else "")
            total = f": {_duration((of - done) * seconds)}" if seconds else ""
            if not shown:
                say(f"{of} trainings into {folder}, {rest}{total}")
            shown.append(done)
            status.update(f"{done} of {of} trainings, {rest}{total}")

        shown: list[int] = []
        found = compare(
            asked, documents, folder, settings, others=_others(of_run, asked), planted=wanted, helping=[TiledLoss()],
            progress=show,
        )  # fmt: skip
    _print(found, asked.index.folder.name, leave_out)


def _planted(file: Path) -> tuple[str, ...]:
    try:
        ids = tuple(dict.fromkeys(line.strip() for line in file.read_text(encoding="utf-8").splitlines()))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read: {error}; name a file with an id of a record in each line") from error
    if not (ids := tuple(one for one in ids if one)):
        raise DataError(f"{file} names no record; write an id in each line, such as chat.jsonl:17")
    return ids


def _others(of_run: "RunIndex", asked: "AskedIndex") -> "dict[str, AskedIndex]":
    """Return the run's other indexes that are plain products of gradients."""
    if asked.index.recipe.settings.curvature == "identity":
        return {}
    names = sorted(p.parent.name for p in of_run.folder.glob("*-identity*/index.json"))
    return {name: of_run.open_index(name) for name in names}


def _print(found: "Validation", index: str, leave_out: int) -> None:
    from treering.cli.console import console, say, table
    from treering.influence.validate import INDEX

    columns = ("", "LDS", "index above it", "95 % of draws", *(["recall of planted"] if found.recall else []))
    rows = table(*columns, right=columns[1:])
    for name, score in found.scores.items():
        difference = found.differences.get(name)
        rows.add_row(
            index if name == INDEX else name,
            str(score),
            "" if difference is None else f"{difference.value:+.3f} ± {difference.error:.3f}",
            "" if difference is None else f"{difference.low:+.3f} to {difference.high:+.3f}",
            *([f"{found.recall[name]:.2f}"] if found.recall else []),
        )
    console().print(rows)
    say(f"a scorer that knows nothing: LDS 0.000 ± {found.chance:.3f}; {found.trainings} trainings")
    if (top := found.without_top) is not None:
        say(
            f"without the {leave_out} first records a query's loss rises by {top.value:.4f} ± {top.error:.4f} nats a "
            f"token more than without random ones ({top.low:+.4f} to {top.high:+.4f})"
        )
    if found.warning:
        say(f"! {found.warning}", "yellow")


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.1f} s"
        if seconds < 90
        else f"{seconds / 60:.0f} min"
        if seconds < 5400
        else f"{seconds / 3600:.1f} h"
    )
