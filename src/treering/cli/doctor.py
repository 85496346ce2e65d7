"""`treering doctor`: will a run work on this machine?"""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from treering.cli.machine import Finding

NAME = "doctor"
_STYLES = {"ok": "green", "warn": "yellow", "bad": "bold red"}


def command(
    output: Annotated[Path, typer.Option(help="The folder that runs would write to.")] = Path("."),
    ranks: Annotated[bool, typer.Option("--ranks/--no-ranks", help="Start two ranks and let them add numbers.")] = True,
) -> None:
    """Check whether runs will work on this machine. Exit code 1 if something is bad."""
    from treering.cli.checkup import everything

    if not show(everything(output, ranks=ranks)):
        raise typer.Exit(1)


def show(findings: "Iterable[Finding]") -> bool:
    """Print findings as they come; whether none is bad."""
    from treering.cli.console import console, safe

    out, good = console(), True
    for finding in findings:
        line = safe(f"{finding.status:<5}", _STYLES[finding.status])
        line.append(safe(f"{finding.name}: {finding.found}", "default"))
        out.print(line, soft_wrap=True)
        if finding.status != "ok":
            out.print(safe(f"     → {finding.remedy}"), soft_wrap=True)
        good &= finding.status != "bad"
    return good
