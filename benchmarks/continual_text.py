"""What a small language model forgets of real text while it learns facts, a domain, and four domains in turn.

    python -m benchmarks.continual_text [--quick] [--machine cpu2] [--only METHOD …] [--folder runs/quality]

Nothing is downloaded: the base reads the standard library, the domains are what else lies on a machine with Python.
Each run is written down as it ends (results/runs/), and a second start goes on from there. mini_trainer takes part
where it can be imported: .venv-peers/osft/bin/python -m benchmarks.continual_text.
Methods are compared at equal learning, each at the best of its learning rates. Among them are baselines that replay the
text that OSFT measures, and others without text: `--only` takes a method or a family (benchmarks/quality/families.py).
"""

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality.baselines import baselines
from benchmarks.quality.families import BASELINES, family, family_rows
from benchmarks.quality.learners import full, methods
from benchmarks.quality.prose_tasks import (
    World,
    interpolate_domain,
    interpolate_facts,
    learn_domain,
    learn_facts,
    learn_sequence,
)
from benchmarks.quality.runs import Result, Runs, crossing
from benchmarks.rows import Row, row, write

FEW = ("full", "osft", "osft one-sided .5", "lora r8")


@dataclass(frozen=True, kw_only=True)
class Setting:
    task: Callable[..., Result]
    rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
    seeds: int = 2
    methods: tuple[str, ...] = ()  # none named: all
    baseline_rates: tuple[float, ...] = ()  # none: without baselines
    baseline_epochs: int | None = None  # replay slows learning down: more epochs for the same rate
    interpolated: Callable[..., Result] | None = None
    small_rates: tuple[float, ...] = ()  # full fine-tuning, in as many epochs as baselines


SETTINGS = {
    "facts": Setting(
        task=partial(learn_facts, number=64, epochs=240),
        baseline_rates=(3e-4, 1e-3),
        baseline_epochs=720,
        interpolated=partial(interpolate_facts, number=64, epochs=240, method=full),
        small_rates=(1e-4, 2e-4),
    ),
    "domain": Setting(
        task=partial(learn_domain, steps=60),
        rates=(1e-4, 3e-4, 1e-3, 3e-3, 5e-3, 1e-2),
        baseline_rates=(3e-4, 1e-3, 3e-3),
        interpolated=partial(interpolate_domain, steps=60, method=full),
    ),
    "sequence": Setting(task=partial(learn_sequence, steps=40), rates=(3e-4, 1e-3, 3e-3), seeds=1, methods=FEW),
    "more facts": Setting(
        task=partial(learn_facts, number=256, epochs=120), rates=(3e-4, 1e-3, 3e-3), seeds=1, methods=FEW
    ),
}
QUICK = {
    "facts": Setting(
        task=partial(learn_facts, number=32, epochs=240), rates=(1e-3, 3e-3), seeds=1, methods=("full", "osft")
    ),
    "domain": Setting(
        task=partial(learn_domain, steps=30), rates=(3e-4, 1e-3, 3e-3), seeds=1, methods=("full", "osft")
    ),
}
PACKAGES = ("treering", "torch", "transformers", "peft", "rhai-innovation-mini-trainer")
Kept = dict[str, dict[int, dict[float, Result]]]  # method -> seed -> learning rate


def run_all(
    runs: Runs,
    settings: dict[str, Setting],
    only: Sequence[str] | None,
    folder: Path,
    size: dict[str, int],
    seeds: Sequence[int] | None,
) -> dict[str, Kept]:
    world = World.made(folder, **size)
    for name, setting in settings.items():
        for seed in range(setting.seeds):
            if seeds and seed not in seeds:
                continue
            for method, rates, job in _jobs(world, name, setting):
                if only and not {method, family(method)} & set(only):
                    continue
                for lr in rates:
                    key = {"setting": name, "method": method, "lr": lr, "seed": seed}
                    runs.take(key, partial(job, lr=lr, seed=seed))
    return {name: _kept(runs, name, setting) for name, setting in settings.items()}


def _jobs(world: World, name: str, setting: Setting) -> Iterator[tuple[str, tuple[float, ...], Callable[..., Result]]]:
    """Yield every method of a setting with its rates and what runs it, given a rate and a seed."""
    of = {"name": next(iter(world.domains))} if name == "domain" else {}
    chosen = methods()
    longer = {"epochs": setting.baseline_epochs} if setting.baseline_epochs else {}
    for method in setting.methods or tuple(chosen):
        # As many epochs as its baselines: a small rate learns slowly under protection.
        epochs = longer if method == "osft" else {}
        yield method, setting.rates, partial(setting.task, world, chosen[method], **of, **epochs)
    if setting.baseline_rates:
        for method, start in baselines(world.known, cache(world.written)).items():
            yield method, setting.baseline_rates, partial(setting.task, world, start, **of, **longer)
    if setting.interpolated:
        yield "interpolation", setting.baseline_rates, partial(setting.interpolated, world, **of)
    if setting.small_rates:
        yield "small rates", setting.small_rates, partial(setting.task, world, full, **of, **longer)


def _kept(runs: Runs, setting: str, of: Setting) -> Kept:
    """Of earlier starts too: mini_trainer's runs are another interpreter's."""
    found: Kept = {}
    for key, result in runs.done.items():
        own, name, lr, seed = (part.split(" ", 1)[1] for part in key.split(", "))
        if own == setting and float(lr) in (*of.rates, *of.baseline_rates, *of.small_rates):
            points = (
                {f"{name} {one['share']:g}": one for one in result["points"]} if "points" in result else {name: result}
            )
            for variant, point in points.items():
                found.setdefault(variant, {}).setdefault(int(seed), {})[float(lr)] = point
    return found


def facts_rows(kept: Kept, setting: str, **more: Any) -> list[Row]:
    """Each method at the rate with the smallest rise among those that learned."""
    table = []
    for name, seeds in kept.items():
        bars: dict[str, Any] = {"at_most": 0.03} if setting == "facts" and name == "osft" else {}
        best = [_least(rates) for rates in seeds.values()]
        rises = [one["rise"] for one in best if one]
        every = [one for rates in seeds.values() for one in rates.values()]
        of = every[0]["of"]
        if rises:
            figure = f"old text's rise when {math.ceil(0.95 * of)} of {of} facts are answered"
            case = name if len(rises) == len(best) else f"{name} (reached with {len(rises)} of {len(best)} seeds)"
            table.append(row(figure, case, rises, unit="bits/byte", **bars, **more))
        else:
            most = max(one["right"] for one in every)
            table.append(row(f"most of {of} facts answered: not enough", name, [most], unit="facts", **more))
    return table


def _least(rates: dict[float, Result]) -> Result | None:
    learned = [one for one in rates.values() if one["right"] >= 0.95 * one["of"]]
    return min(learned, key=lambda one: one["rise"], default=None)


def domain_rows(kept: Kept, setting: str, **more: Any) -> list[Row]:
    """The rise where a method's curve over rates reaches 70 % of the most that full fine-tuning gains."""
    full = kept.get("full", {})
    levels = {seed: 0.7 * max(one["gain"] for one in rates.values()) for seed, rates in full.items()}
    mean = sum(levels.values()) / max(1, len(levels))
    table = []
    for name, seeds in kept.items():
        bars: dict[str, Any] = {"at_most": 0.25} if name == "osft" and setting == "domain" else {}
        shared = [seed for seed in seeds if seed in levels]
        pairs = [(_at(seeds[seed], levels[seed]), _at(full[seed], levels[seed])) for seed in shared]
        both = [(ours, theirs) for ours, theirs in pairs if ours is not None and theirs is not None]
        if both:
            figure = f"old text's rise, {setting}: at a gain of {mean:.2f} bits/byte"
            theirs = [] if name == "full" else [peer for _, peer in both]
            case = name if name == "full" else f"{name}; peer: full fine-tuning"
            table.append(row(figure, case, [ours for ours, _ in both], theirs, unit="bits/byte", **bars, **more))
        else:
            most = max(one["gain"] for rates in seeds.values() for one in rates.values())
            figure = f"largest gain, {setting}: {mean:.2f} is not between two rates"
            table.append(row(figure, name, [most], unit="bits/byte", **more))
    return table


def _at(rates: dict[float, Result], level: float) -> float | None:
    """Rises grow by factors from rate to rate: between two they are joined in the logarithm.

    None unless a rate learns less and another more: at the least rate alone a method would look worse than it is.
    """
    if not min(one["gain"] for one in rates.values()) < level:
        return None
    points = [(one["gain"], math.log(max(one["rise"], 1e-4))) for _, one in sorted(rates.items())]
    found = crossing(points, level)
    return None if found is None else math.exp(found)


def _facts_cost(seed: int, rates: dict[float, Result]) -> float | None:
    found = _least(rates)
    return found["rise"] if found else None


def _domain_families(kept: Kept, setting: str, **more: Any) -> list[Row]:
    """At a moderate gain and at a large one, where replay is strong."""
    table = []
    for part in (0.7, 0.9):
        levels = {seed: part * max(one["gain"] for one in rates.values()) for seed, rates in kept["full"].items()}
        mean = sum(levels.values()) / len(levels)

        def cost(seed: int, rates: dict[float, Result], levels: dict[int, float] = levels) -> float | None:
            return _at(rates, levels[seed]) if seed in levels else None

        table += family_rows(kept, cost, f"{setting}: at a gain of {mean:.2f} bits/byte", **more)
    return table


def first_rows(kept: Kept, **more: Any) -> list[Row]:
    """The first domain after three others. The bar is at one rate, which full fine-tuning learns well with too."""
    table = []
    for name, seeds in kept.items():
        for lr, one in sorted(seeds[0].items()):
            bars: dict[str, Any] = {"at_most": 0.1} if name == "osft" and lr == 1e-3 else {}
            case = f"{name}, lr {lr:g}: mean gain {one['gain']:.2f}, base text +{one['rise']:.3f}"
            table.append(
                row("first of four domains, rise since learned", case, [one["first"]], unit="bits/byte", **bars, **more)
            )
    return table


def rows(kept: dict[str, Kept], command: str) -> list[Row]:
    more: dict[str, Any] = {"packages": PACKAGES, "command": command}
    table: list[Row] = []
    for setting, found in kept.items():
        if not found:
            continue
        # Of baselines only the best variant has a row; every run is in results/runs.
        alone = {name: seeds for name, seeds in found.items() if family(name) not in BASELINES}
        if "facts" in setting:
            table += facts_rows(alone, setting, **more)
            if len(alone) < len(found):
                table += family_rows(found, _facts_cost, f"{setting}: at 95 % answered", **more)
        else:
            table += domain_rows(alone, setting, **more)
            if len(alone) < len(found):
                table += _domain_families(found, setting, **more)
        if setting == "sequence":
            table += first_rows(found, **more)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one seed, a base that read less, two methods, few rates")
    parser.add_argument("--machine", default="cpu2")
    parser.add_argument(
        "--only", nargs="*", help="these methods, or families of baselines; the others' runs stay as they are"
    )
    parser.add_argument("--settings", nargs="*", choices=list(SETTINGS), help="these settings only")
    parser.add_argument("--seeds", nargs="*", type=int, help="these seeds only")
    parser.add_argument("--folder", type=Path, default=Path("runs/quality"), help="where the base model is kept")
    options = parser.parse_args()
    torch.set_num_threads(1)
    quick = options.quick
    name = "continual_text_quick" if quick else "continual_text"
    command = "python -m benchmarks.continual_text" + (" --quick" if quick else "")
    every = QUICK if quick else SETTINGS
    settings = {n: s for n, s in every.items() if not options.settings or n in options.settings}
    size = {"characters": 1_600_000 if quick else 4_000_000, "steps": 600 if quick else 1000, "calibration": 30_000}
    kept = run_all(Runs(name, options.machine), settings, options.only, options.folder, size, options.seeds)
    write(name, options.machine, rows(kept, command))


if __name__ == "__main__":
    main()
