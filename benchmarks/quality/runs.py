"""Runs written down one by one as they end, so that a benchmark of an hour can be stopped and started again."""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "results" / "runs"
Result = dict[str, Any]


class Runs:
    """`NAME.MACHINE.jsonl`, a line a run: {"key": {…}, "result": {…}, "seconds": …}. What is there is not run again."""

    def __init__(self, name: str, machine: str, folder: Path = FOLDER):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{name}.{machine}.jsonl"
        self.done: dict[str, Result] = {}
        if self.path.exists():
            whole = self.path.read_text("utf-8").rpartition("\n")[0]  # what was cut off in writing is run again
            self.path.write_text(whole + "\n" if whole else "", "utf-8")
            for line in whole.splitlines():
                entry = json.loads(line)
                self.done[_name(entry["key"])] = entry["result"]

    def take(self, key: Mapping[str, Any], run: Callable[[], Result]) -> Result:
        name = _name(key)
        if name not in self.done:
            began = time.perf_counter()
            result = run()
            entry = {"key": dict(key), "result": result, "seconds": round(time.perf_counter() - began, 1)}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
            self.done[name] = result
            sys.stdout.write(f"{name}: {json.dumps(result)} ({entry['seconds']} s)\n")
            sys.stdout.flush()
        return self.done[name]


def _name(key: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in key.items())


def crossing(points: Iterable[tuple[float, float]], level: float) -> float | None:
    """The least cost at which a curve of (learned, cost) points, joined in the order given, reaches `level`.

    None where no point learned as much: nothing is extrapolated.
    """
    points = list(points)
    found = [cost for learned, cost in points if learned >= level]
    for (a, cost_a), (b, cost_b) in pairwise(points):
        if min(a, b) < level < max(a, b):
            found.append(cost_a + (cost_b - cost_a) * (level - a) / (b - a))
    return min(found) if found else None


def median_of(results: Sequence[Result], name: str) -> float:
    return statistics.median(result[name] for result in results)
