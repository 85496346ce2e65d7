"""What one CUDA card shows: correctness, memory, speed and limits, in at most nine minutes and without a network.

    python -m benchmarks.gpu [--rows NAME,NAME] [--seconds N] [--out FOLDER]
    python -m benchmarks.gpu --dry-run      every row at toy size on the CPU: does the script itself work?
    python -m benchmarks.gpu --toy          every row at toy size on the card: does each one run there?

Rows come in the order of their importance, and each figure is on disk as soon as it is measured, in
FOLDER/gpu.MACHINE.json; FOLDER is benchmarks/results if not given. The torch and transformers at hand are used, and
xxhash; Treering itself need not be installed.
"""

import argparse
import signal
import sys
from pathlib import Path

from benchmarks.gpu import record
from benchmarks.gpu.catalogue import ROWS
from benchmarks.gpu.runner import ROOT, Runner
from benchmarks.rows import RESULTS

SECONDS = 525.0


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="rows:\n" + "\n".join(f"  {name:<12} {plan.about}" for name, plan in ROWS.items()),
    )  # fmt: skip
    parser.add_argument("--rows", type=_names, default=list(ROWS), metavar="NAME,NAME", help="only these rows")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on the CPU; nothing that is to be quoted")
    parser.add_argument("--toy", action="store_true", help="toy sizes on the card; nothing that is to be quoted")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for everything; default: {SECONDS:.0f}")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where the rows are written")
    options = parser.parse_args()
    toy = options.dry_run or options.toy
    folder = options.out or (ROOT / "runs" / "gpu-dry" if toy else RESULTS)
    if toy and folder.resolve() == RESULTS.resolve():
        parser.error("toys measure nothing that results may hold; give another --out")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the worker is ended on the way out
    runner = Runner(options.rows, seconds=options.seconds, folder=folder, dry=options.dry_run, toy=toy)
    runner.run()
    print(f"\n{runner.device}: {sum(runner.took.values()):.0f} s in rows")
    print(", ".join(f"{name} {seconds:.1f} s" for name, seconds in runner.took.items()))
    wrong = [entry for entry in runner.rows if entry["failed"] or (entry["bar"] and not entry["holds"])]
    for entry in [] if toy else wrong:  # all of them were printed as they came
        print(record.line(entry))
    print(f"written to {runner.path}")
    return 0 if runner.complete else 1


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in ROWS]
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown) or 'nothing'} is no row; rows are {', '.join(ROWS)}")
    return [name for name in ROWS if name in names]


if __name__ == "__main__":
    sys.exit(main())
