"""How the commands of `treering influence` name a run: by its output folder, or by its configuration."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from treering.cli.config import load

if TYPE_CHECKING:
    from treering.cli.schema import RunConfig

RunFolder = Annotated[
    Path, typer.Argument(metavar="RUN", help="The `output` folder of a run, or its configuration.", show_default=False)
]


def config_of(run: Path) -> "RunConfig":
    """Return the configuration of a run by its folder, which may have been moved, or by its file."""
    config = load(file_of(run), None)
    return replace(config, output=str(run)) if run.is_dir() else config


def file_of(run: Path) -> Path:
    """Return the configuration file of a run."""
    return run / "config.yaml" if run.is_dir() else run
