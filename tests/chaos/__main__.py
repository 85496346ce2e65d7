"""`python -m tests.chaos --trials 300 --seed 0`: everything that a run must survive, in one table.

With `--page docs/reliability.md` the table of that page is replaced: nothing is lost between a terminal and the page.

The exit code is 0 only if every case holds. A case is a function of the seed and its number, except that a kill by the
clock meets whatever the run does at that moment.
"""

import argparse
import logging
import os
import sys
import tempfile
from pathlib import Path

from tests.chaos import sections
from tests.chaos.kills import Proving
from tests.chaos.sections import Row, Sizes

HEAD = "| what | cases | held | | seconds |"


def prove(root: Path, seed: int, sizes: Sizes) -> list[Row]:
    proving = Proving(root)
    return [
        sections.kill_trials(proving, seed, sizes),
        sections.fault_points(root, sizes),
        sections.damaged_files(root, seed, sizes),
        sections.unknown_files(root),
        sections.damaged_runs(proving, seed, sizes),
        sections.other_ranks(root, seed, sizes),
        sections.strange_configurations(root, seed, sizes),
        sections.strange_data(root, seed, sizes),
        sections.containers(proving),
        sections.full_disks(proving, seed, sizes),
        sections.killed_tokenisers(root, seed, sizes),
        sections.killed_launchers(root, seed, sizes),
    ]


def table(rows: list[Row]) -> str:
    lines = [HEAD, "|---|---|---|---|---|"]
    for row in rows:
        held = row.cases - len(row.failures)
        lines.append(f"| {row.what} | {row.cases:,} | {held:,} | {row.note} | {row.seconds:.0f} |")
    return "\n".join(lines)


def put(rows: list[Row], page: Path) -> None:
    """Replace the table of `page`, which must have one, by that of `rows`."""
    text = page.read_text(encoding="utf-8")
    before, head, after = text.partition(f"{HEAD}\n")
    if not head:
        raise SystemExit(f"{page} has no line {HEAD}")
    rest = after.partition("\n\n")[2]
    page.write_text(f"{before}{table(rows)}\n\n{rest}", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--trials", type=int, default=300, help="kill trials; the other parts are sized by it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--page", type=Path, help="a page whose table is replaced by this one")
    asked = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        rows = prove(Path(folder), asked.seed, Sizes.of(asked.trials))
    print(table(rows))
    if asked.page is not None:
        put(rows, asked.page)
    failures = [failure for row in rows for failure in row.failures]
    for failure in failures:
        print(f"\nseed {asked.seed}: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
