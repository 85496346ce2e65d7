"""`treering export`: the newest checkpoint of a run as a folder that transformers, or peft, loads."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from treering.cli.options import load

NAME = "export"


def command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The `output` folder of a run.", show_default=False)],
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="The folder to write.", show_default=False)],
    adapter: Annotated[
        str | None, typer.Option(help="Write only this adapter, in peft's format, instead of the merged model.")
    ] = None,
    step: Annotated[int | None, typer.Option(min=0, help="The checkpoint of this step, not the newest.")] = None,
) -> None:
    """Write a trained model for others to load: a Hugging Face folder, or one adapter as a peft folder."""
    config = load(run / "config.yaml", None)
    from treering.cli.console import say
    from treering.cli.train import job_of
    from treering.train.export import export

    job = replace(job_of(config), output=str(run))  # the folder may have been moved since
    say(f"wrote {export(job, to, adapter=adapter, step=step)}")
