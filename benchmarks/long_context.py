"""Long sequences: what each switch costs in time and saves in memory.

python -m benchmarks.long_context [--quick] [--machine cpu2] [--only tiling]
"""

import argparse
from collections.abc import Callable, Iterator

from benchmarks import long_context_tiling, recompute_rows
from benchmarks.rows import Row, others, write

PARTS: dict[str, Callable[[bool, str], Iterator[Row]]] = {
    "tiling": long_context_tiling.rows,
    "blocks": long_context_tiling.blocks,
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
    write("long_context", options.machine, [*others("long_context", options.machine, made), *made])


if __name__ == "__main__":
    main()
