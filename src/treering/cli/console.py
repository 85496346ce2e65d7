"""The terminal: styled lines, tables, and the output of a run while it trains.

Text that came from files, data or arguments passes through `safe` on its way here.
"""

import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from treering.cli.text import plain_lines, size

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live as RichLive
    from rich.table import Table
    from rich.text import Text

_REFRESH = 0.2  # seconds between two draws of the line: a step may be faster than a terminal


def console(*, stderr: bool = False) -> "Console":
    """Return a console whose strings are not markup: a `[red]` in data is printed as it is."""
    from rich.console import Console

    # Rich assumes 80 columns for pipes; a log line must not be wrapped there.
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


class Live:
    """`start`, then `step` with each step's metrics and `note` for events, then `stop`.

    Known metrics are step, loss, lr, tokens_per_second and memory (bytes); others follow as they are called.
    """

    def __init__(self, screen: "Console | None" = None, *, rank: int | None = None):
        self._rank = int(os.environ.get("RANK", "0")) if rank is None else rank
        self._console = screen or console()
        self._line: RichLive | None = None
        self._total = 0
        self._first: tuple[int, float] | None = None  # (step, time) that the ETA counts from
        self._drawn = 0.0

    def start(self, total_steps: int) -> None:
        """Begin the line of a run that ends at step `total_steps`."""
        self.stop()
        self._total, self._first, self._drawn = total_steps, None, 0.0
        if self._rank == 0 and self._console.is_terminal:
            from rich.live import Live as RichLive

            # No thread of its own: it would take the interpreter from the training loop.
            self._line = RichLive(console=self._console, auto_refresh=False, redirect_stdout=False, transient=False)
            self._line.start()

    def step(self, metrics: Mapping[str, float]) -> None:
        """Show the metrics of one step."""
        if self._rank != 0:
            return
        now, step = time.monotonic(), int(metrics.get("step", 0))
        if self._first is None:
            # The first step compiles and fills caches, so the remaining time is estimated from the second on.
            self._first = (step, now)
        if self._line is None:
            self._console.print(safe(self._text(metrics, now)), soft_wrap=True)
        elif now - self._drawn >= _REFRESH or step >= self._total:
            self._drawn = now
            self._line.update(safe(self._text(metrics, now)), refresh=True)

    def note(self, text: str) -> None:
        """Print a line that stays: an evaluation, a checkpoint, a skipped step."""
        if self._rank == 0:
            self._console.print(safe(text), soft_wrap=True)

    def table(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Print a table with the keys of the first row as columns; numbers are aligned to the right."""
        if self._rank != 0 or not rows:
            return
        names = list(rows[0])
        numbers = tuple(n for n in names if all(isinstance(r.get(n), (int, float)) for r in rows))
        result = table(*names, right=numbers)
        for row in rows:
            result.add_row(*(safe(_number(row.get(n, ""))) for n in names))
        self._console.print(result)

    def stop(self) -> None:
        """End the line, leaving its last state."""
        if self._line is not None:
            self._line.stop()
            self._line = None

    def _text(self, metrics: Mapping[str, float], now: float) -> str:
        step = int(metrics.get("step", 0))
        parts = [f"step {step}/{self._total}" if self._total else f"step {step}"]
        for name, value in metrics.items():
            if name == "tokens_per_second":
                parts.append(f"{value:,.0f} tokens/s")
            elif name == "memory":
                parts.append(size(value))
            elif name == "lr":
                parts.append(f"lr {value:.2e}")
            elif name != "step":
                parts.append(f"{name} {_number(value)}")
        if (left := self._left(step, now)) is not None:
            parts.append(f"ETA {duration(left)}")
        return " · ".join(parts)

    def _left(self, step: int, now: float) -> float | None:
        if self._first is None or step <= self._first[0] or step >= self._total:
            return None
        return (now - self._first[1]) / (step - self._first[0]) * (self._total - step)


def duration(seconds: float) -> str:
    """Return `4 s`, `3:07 min` or `12:05 h`."""
    rounded = round(seconds)
    if rounded < 60:
        return f"{rounded} s"
    if rounded < 3600:
        return f"{rounded // 60}:{rounded % 60:02} min"
    return f"{rounded // 3600}:{rounded % 3600 // 60:02} h"


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e6 else f"{value:.3e}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
