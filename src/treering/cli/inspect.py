"""`treering inspect`: what is in a folder, without loading it."""

from pathlib import Path
from typing import Annotated

import typer

from treering.core.errors import CheckpointError

NAME = "inspect"


def command(
    folder: Annotated[Path, typer.Argument(help="A model, adapter, checkpoint or run.", show_default=False)],
    full: Annotated[bool, typer.Option("--full", help="Every group of tensors, however many.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Read a checkpoint whole and prove its digests.")] = False,
) -> None:
    """Say what FOLDER is and what it holds. Reads headers and JSON only (--verify: every byte), and never pickle."""
    from treering.cli.console import console, safe, say, table
    from treering.cli.folders import describe
    from treering.cli.text import short, size

    report = describe(folder, verify)
    say(f"{folder}: {report.kind}")
    width = max(map(len, report.facts), default=0)
    for name, value in report.facts.items():
        say(f"  {name:<{width}}  {value}")
    for warning in report.warnings:
        say(f"  ! {warning}", "yellow")
    if report.rows:
        listing = table("tensor", "times", "dtype", "shape", "size", right=("times", "size"))
        rows = report.rows if full else report.rows[:40]
        for row in rows:
            shape = " × ".join(map(str, row.shape)) or "scalar"
            listing.add_row(safe(short(row.name, 100)), str(row.times), row.dtype, shape, size(row.bytes))
        console().print(listing)
        if len(rows) < len(report.rows):
            say(f"… and {len(report.rows) - len(rows)} more groups; --full shows them")
    if report.damage:
        more = f" (and {len(report.damage) - 1} more)" if len(report.damage) > 1 else ""
        raise CheckpointError(f"{report.damage[0]}{more}; this checkpoint is never loaded")
