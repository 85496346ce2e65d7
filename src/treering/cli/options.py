"""Arguments that several commands share."""

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from treering.cli.schema import RunConfig

ConfigFile = Annotated[Path, typer.Argument(metavar="FILE", help="The run's YAML (or JSON) file.", show_default=False)]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Override a setting, e.g. train.optimizer.lr=1e-4. Repeatable."),
]


def load(file: Path, settings: list[str] | None) -> "RunConfig":
    """Return the checked configuration of `file`, with each `path=value` of `settings`."""
    from treering.cli.parsing import read_file, validate
    from treering.cli.schema import RunConfig

    return validate(RunConfig, read_file(file), settings or (), _notice)


def _notice(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":  # every rank reads the file, and one line is enough
        logging.getLogger("treering").warning(line)
