"""Long sequences: what each switch costs in time and saves in memory.

python -m benchmarks.long_context [--quick] [--machine cpu2] [--only tiling]
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence

from benchmarks import long_context_tiling, recompute_rows
from benchmarks.rows import RESULTS, Row, write

PARTS: dict[str, Callable[[bool, str], Iterator[Row]]] = {
    "tiling": long_context_tiling.rows,
    "recompute": lambda quick, command: iter(recompute_rows.rows(quick)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--machine", default="cpu2")
    parser.add_argument("--only", choices=tuple(PARTS), help="one part, beside what is known of the others")
    options = parser.parse_args()
    command = "python -m benchmarks.long_context" + (" --quick" if options.quick else "")
    chosen = [part for name, part in PARTS.items() if options.only in (None, name)]
    made = [one for part in chosen for one in part(options.quick, command)]
    write("long_context", options.machine, [*others(options.machine, made), *made])


def others(machine: str, made: Sequence[Row]) -> list[Row]:
    """What an earlier run found of the parts that this one leaves out."""
    path = RESULTS / f"long_context.{machine}.json"
    known = json.loads(path.read_text("utf-8")) if path.exists() else []
    figures = {one.figure for one in made}
    return [Row(**one) for one in known if one["figure"] not in figures]


if __name__ == "__main__":
    main()
