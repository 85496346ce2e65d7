"""`treering demo`: every step from text that ships with Python to an exported model."""

from pathlib import Path
from typing import Annotated

import typer

NAME = "demo"


def command(
    folder: Annotated[Path, typer.Option(help="Where the steps of the demo go.")] = Path("runs/demo"),
) -> None:
    """Pretrain, teach and export a small model. No network, no GPU, a few minutes."""
    from importlib import import_module

    from treering.cli.progress import Live

    import_module("treering.demo").run(
        folder, console=Live()
    )  # by name: the package demo may import cli, and cli not demo
