"""`treering recipes`: configurations to start from, packaged with the library."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from treering.core.errors import ConfigError

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

NAME = "recipes"
app = typer.Typer(help="List or copy packaged configurations.", no_args_is_help=True)
SUFFIXES = (".yaml", ".sbatch")


def recipes() -> "dict[str, Traversable]":
    """Return file name → packaged recipe."""
    from importlib.resources import files

    packaged = (f for f in files("treering").joinpath("recipes").iterdir() if f.name.endswith(SUFFIXES))
    return {f.name: f for f in sorted(packaged, key=lambda f: f.name)}


@app.command("ls")
def ls() -> None:
    """List the recipes with what they do."""
    from treering.cli.console import console, table

    listing = table("recipe", "what it does")
    for name, file in recipes().items():
        listing.add_row(name, _summary(file.read_text(encoding="utf-8")))
    console().print(listing)


@app.command("cp")
def cp(
    name: Annotated[str, typer.Argument(help="As `treering recipes ls` shows it.", show_default=False)],
    to: Annotated[Path, typer.Argument(help="A folder, or the new file's name.")] = Path("."),
) -> None:
    """Copy a recipe. A file that is already there is kept."""
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
