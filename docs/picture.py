"""The picture in the README, from what a terminal showed: `treering demo | python docs/picture.py`.

Of each training's steps the first and the last are kept; everything else is as it was printed.
"""

import io
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from rich.console import Console
from rich.text import Text

PICTURE = Path(__file__).with_name("terminal.svg")
WIDTH = 118  # columns
STYLES = {"$ ": "bold", "✓": "green", "✗": "bold red", "act ": "bold cyan"}


def shortened(lines: Iterable[str]) -> Iterator[str]:
    waiting: list[str] = []  # step lines after the first of a training
    for line in [*lines, ""]:
        if re.match(r"step \d+/\d+ ·", line) and (waiting or not line.startswith("step 1/")):
            waiting.append(line)
            continue
        if len(waiting) > 1:
            yield f"⋮ {len(waiting) - 1} more lines like this"
        yield from waiting[-1:]
        waiting = []
        yield line


def draw(lines: Iterable[str]) -> str:
    console = Console(record=True, width=WIDTH, file=io.StringIO(), markup=False, highlight=False, emoji=False)
    console.print(Text("$ make demo", style="bold"))
    for line in shortened(lines):
        style = next((style for start, style in STYLES.items() if line.startswith(start)), "")
        console.print(Text(line, style="dim" if line.startswith("⋮") else style))
    # Without the web fonts that rich names: a picture has no business on somebody's network.
    return re.sub(r"\s*@font-face \{.*?\n\s*\}", "", console.export_svg(title="treering"), flags=re.DOTALL)


if __name__ == "__main__":
    PICTURE.write_text(draw(sys.stdin.read().rstrip("\n").splitlines()), encoding="utf-8")
