"""What is left of earlier tasks after later ones, at equal learning: four tasks, learning rates and seeds in a grid.

    python -m benchmarks.continual [--quick] [--machine cpu2] [--only METHOD …] [--folder runs/quality]

Each run is written down as it ends (results/runs/), and a second start goes on from there. mini_trainer takes part
where it can be imported: .venv-peers/osft/bin/python -m benchmarks.continual (benchmarks.peers.osft makes that).
Equal steps are no fair comparison: who learns less forgets less. So the figure is the backward transfer at which a
method's curve over learning rates reaches 90 % learned; the grid goes on downwards until a method no longer does.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality.baselines import remembering
from benchmarks.quality.learners import methods
from benchmarks.quality.runs import Result, Runs, crossing, median_of
from benchmarks.quality.symbols import Size, base, measured, replayed, sequence
from benchmarks.rows import Row, row, write

LADDER = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
LEVEL = 0.9
PACKAGES = ("treering", "torch", "transformers", "peft", "rhai-innovation-mini-trainer")
Kept = dict[str, dict[int, dict[float, Result]]]  # method -> seed -> learning rate


def run_all(runs: Runs, names: list[str], seeds: int, size: Size, folder: Path, first: int, last: int) -> None:
    """LADDER[first:last] for every method; lower while all of it learns `LEVEL`, higher while none of it does."""
    chosen, replays = methods(), remembering()
    for seed in range(seeds):
        small = base(size, seed, folder)
        old = measured(small, size, seed)
        for name in names:
            run = partial(replayed, small, replays[name]) if name in replays else partial(sequence, small, chosen[name])
            job = partial(run, size=size, seed=seed, old=old)

            def learned(rung: int, name: str = name, seed: int = seed, job: Any = job) -> float:
                key = {"method": name, "lr": LADDER[rung], "seed": seed, "size": _told(size)}
                return runs.take(key, partial(job, lr=LADDER[rung]))["learned"]

            reached = [learned(rung) for rung in range(first, last)]
            low, high = first, last
            while low > 0 and reached[0] >= LEVEL:
                low -= 1
                reached.insert(0, learned(low))
            while high < len(LADDER) and max(reached) < LEVEL:
                reached.append(learned(high))
                high += 1


def _told(size: Size) -> str:
    return f"{size.tasks}x{size.facts} facts {size.steps} steps base {size.base_steps}"


def kept(runs: Runs, size: Size) -> Kept:
    """Of earlier starts too: mini_trainer's runs are another interpreter's."""
    found: Kept = {}
    for key, result in runs.done.items():
        name, lr, seed, of = (part.split(" ", 1)[1] for part in key.split(", "))
        if of == _told(size):
            found.setdefault(name, {}).setdefault(int(seed), {})[float(lr)] = result
    return found


def rows(found: Kept, size: Size, command: str) -> list[Row]:
    table = []
    more: dict[str, Any] = {"unit": "of 1", "packages": PACKAGES, "command": command}
    for name, seeds in found.items():
        told = []
        for rates in seeds.values():
            points = [(one["learned"], -one["bwt"]) for _, one in sorted(rates.items())]
            forgotten = crossing(points, LEVEL)
            told += [-forgotten] if forgotten is not None else []
        if told:
            case = name if len(told) == len(seeds) else f"{name} (reached with {len(told)} of {len(seeds)} seeds)"
            bars: dict[str, Any] = {"at_least": -0.10} if name == "osft" else {}
            table.append(row(f"backward transfer at learned {LEVEL}", case, told, **bars, **more))
    for name, seeds in found.items():
        for lr in LADDER:
            done = [rates[lr] for rates in seeds.values() if lr in rates]
            if done:
                learned, average = median_of(done, "learned"), median_of(done, "average")
                case = f"{name}, lr {lr:g}: learned {learned:.2f}, average of all {average:.2f}"
                bwt = [one["bwt"] for one in done]
                table.append(row(f"backward transfer, {size.steps} steps a task", case, bwt, **more))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one seed, two tasks, two methods: some minutes")
    parser.add_argument("--machine", default="cpu2")
    parser.add_argument("--only", nargs="*", help="these methods; the others' runs stay as they are")
    parser.add_argument("--folder", type=Path, default=Path("runs/quality"), help="where base models are kept")
    options = parser.parse_args()
    torch.set_num_threads(1)
    name = "continual_quick" if options.quick else "continual"
    command = "python -m benchmarks.continual" + (" --quick" if options.quick else "")
    runs = Runs(name, options.machine)
    if options.quick:
        size, known, seeds, first, last = Size(tasks=2, base_steps=400, facts=64, steps=100), ["full", "osft"], 1, 3, 5
    else:
        size, known, seeds, first, last = Size(), [*methods(), *remembering()], 3, 3, 6
    names = [one for one in known if not options.only or one in options.only]
    run_all(runs, names, seeds, size, options.folder, first, last)
    write(name, options.machine, rows(kept(runs, size), size, command))


if __name__ == "__main__":
    main()
