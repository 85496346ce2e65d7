"""The terminal. Text that came from files, data or arguments passes through `safe` on its way here."""

import sys
from typing import TYPE_CHECKING

from treering.cli.text import plain_lines

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text


def console(*, stderr: bool = False) -> "Console":
    """Return a console whose strings are not markup: a `[red]` in somebody's data stays as it is."""
    from rich.console import Console

    # Rich guesses 80 columns for pipes; a log line must not be broken there.
    width = None if (sys.stderr if stderr else sys.stdout).isatty() else 200
    return Console(markup=False, highlight=False, emoji=False, stderr=stderr, width=width, soft_wrap=False)


def safe(text: str, style: str = "") -> "Text":
    """Return `text` without markup and control characters."""
    from rich.text import Text

    return Text(plain_lines(text), style=style)


def say(text: str, style: str = "") -> None:
    """Print lines to stdout, unbroken."""
    console().print(safe(text, style), soft_wrap=True)


def table(*columns: str, right: tuple[str, ...] = ()) -> "Table":
    """Return an empty table in the style of all commands; `right` names the columns of numbers."""
    from rich import box
    from rich.table import Table

    result = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        result.add_column(name, justify="right" if name in right else "left", overflow="fold")
    return result
