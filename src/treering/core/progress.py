"""Reports on long work: how much of it is done, and about how long the rest takes."""

import time
from collections.abc import Callable

_FIRST, _MOST = 5.0, 60.0  # seconds before the first report, and between later ones


class PartsDone:
    """Calls `report` with a text from time to time; not at all for work of a few seconds.

    Args:
        doing: what is done, as the text begins.
        costs: of all parts, in any unit: the time that is left is estimated from them.
        report: is given the text.

    Example:
        progress = PartsDone("preparing weights", [4.0, 1.0], print)
        progress.done(4.0)
    """

    def __init__(self, doing: str, costs: list[float], report: Callable[[str], None]):
        self.doing, self.report = doing, report
        self.total, self.parts = sum(costs), len(costs)
        self.began = self.reported = time.monotonic()
        self.spent, self.number = 0.0, 0

    def done(self, cost: float) -> None:
        """Count a part."""
        self.spent, self.number = self.spent + cost, self.number + 1
        now = time.monotonic()
        wait = _FIRST if self.reported == self.began else min(_MOST, (self.reported - self.began))
        if now - self.reported < wait or self.number == self.parts or not self.spent:
            return
        self.reported = now
        left = (now - self.began) * max(0.0, self.total - self.spent) / self.spent
        self.report(f"{self.doing}: {self.number:,} of {self.parts:,}, about {in_words(left)} left")


def in_words(seconds: float) -> str:
    """Return a duration for people, in the unit that fits it."""
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
