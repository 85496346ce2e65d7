"""`treering config`: look at a configuration without running it."""

from typing import Annotated

import typer

from treering.cli.options import ConfigFile, Settings, load

NAME = "config"
app = typer.Typer(help="Check a configuration, show it, print its schema.", no_args_is_help=True)


@app.command("check")
def check(file: ConfigFile, settings: Settings = None) -> None:
    """Check whether FILE is a valid configuration, and report everything that is wrong with it."""
    from treering.cli.console import say

    load(file, settings)
    say(f"{file}: valid")


@app.command("show")
def show(file: ConfigFile, settings: Settings = None) -> None:
    """Print FILE with every default written out: what a run would save as its configuration."""
    from treering.cli.console import say
    from treering.cli.parsing import to_yaml

    say(to_yaml(load(file, settings)).rstrip("\n"))


@app.command("schema")
def schema(
    indent: Annotated[int, typer.Option(min=0, max=8, help="Spaces a level.")] = 2,
) -> None:
    """Print the JSON schema, for editors that complete and check YAML."""
    import json

    from treering.cli.console import say
    from treering.cli.parsing import json_schema
    from treering.cli.schema import RunConfig

    say(json.dumps(json_schema(RunConfig), indent=indent, ensure_ascii=False))
