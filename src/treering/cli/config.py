"""`treering config` and `treering recipes`, and reading the configuration file that other commands take."""

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from treering.core.errors import ConfigError

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

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


app = typer.Typer(help="Check a configuration, show it, print its schema.", no_args_is_help=True)


@app.command("check")
def check(file: ConfigFile, settings: Settings = None) -> None:
    """Check whether FILE is a valid configuration, and report everything that is wrong with it."""
    from treering.cli.console import say

    load(file, settings)
    say(f"{file}: valid")


@app.command("show")
def show(file: ConfigFile, settings: Settings = None) -> None:
    """Print FILE with every default, as a run would save it."""
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


recipes_app = typer.Typer(help="List or copy packaged configurations.", no_args_is_help=True)
SUFFIXES = (".yaml", ".sbatch")


def recipes() -> "dict[str, Traversable]":
    """Return file name → packaged recipe."""
    from importlib.resources import files

    packaged = (f for f in files("treering").joinpath("recipes").iterdir() if f.name.endswith(SUFFIXES))
    return {f.name: f for f in sorted(packaged, key=lambda f: f.name)}


@recipes_app.command("ls")
def ls() -> None:
    """List the recipes with what they do."""
    from treering.cli.console import console, table

    listing = table("recipe", "what it does")
    for name, file in recipes().items():
        listing.add_row(name, _summary(file.read_text(encoding="utf-8")))
    console().print(listing)


@recipes_app.command("cp")
def cp(
    name: Annotated[str, typer.Argument(help="As `treering recipes ls` shows it.", show_default=False)],
    to: Annotated[Path, typer.Argument(help="A folder, or the new file's name.")] = Path("."),
) -> None:
    """Copy a recipe. A file that exists already is not overwritten."""
    from treering.cli.console import say

    known = recipes()
    file = known.get(name) or known.get(f"{name}.yaml")
    if file is None:
        from treering.cli.parsing.suggest import closest

        near = closest(name, list(known))
        hint = f"did you mean {near}?" if near else "there are " + ", ".join(known)
        raise ConfigError(f"there is no recipe {name!r}; {hint}")
    target = to / file.name if to.is_dir() else to
    try:
        with target.open("x", encoding="utf-8") as out:
            out.write(file.read_text(encoding="utf-8"))
    except FileExistsError:
        raise ConfigError(f"{target} is already there; give another name") from None
    except OSError as error:
        raise ConfigError(f"{target} cannot be written: {error.strerror}") from None
    say(f"wrote {target}")


def _summary(text: str) -> str:
    lines = [line for line in text.splitlines() if line.startswith("# ")]
    return lines[0].removeprefix("# ") if lines else ""
