"""Baselines by families: of each, the variant that forgets least at equal learning, and OSFT next to the best."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.quality.runs import Result
from benchmarks.rows import Row, row

PLAIN = ("replay", "self-distillation", "self-generated replay", "L2 to the start", "interpolation", "small rates")
PROTECTED = ("osft + replay", "osft + self-distillation")
BASELINES = (*PLAIN, *PROTECTED)
BARS = {"osft": 0.5, "osft + replay": 1 / 3}  # of the best replay's rise
Rates = dict[float, Result]
Kept = Mapping[str, Mapping[int, Rates]]  # method -> seed -> learning rate
Cost = Callable[[int, Rates], float | None]  # (seed, a variant's runs) -> the rise at equal learning, if it got there


@dataclass(frozen=True, kw_only=True)
class Best:
    variant: str
    rises: dict[int, float]  # by seed
    tried: int  # seeds

    @property
    def told(self) -> str:
        reached = len(self.rises)
        return (
            self.variant if reached == self.tried else f"{self.variant} (reached with {reached} of {self.tried} seeds)"
        )


def family(method: str) -> str:
    """Return the family of a method by its name: "replay 0.5" is of replay. A method of its own is its own family."""
    return next((one for one in BASELINES if method == one or method.startswith(one + " ")), method)


def best(kept: Kept, of: str, cost: Cost) -> Best | None:
    """Return the variant with the least mean rise among those that reach the level with the most seeds."""
    found = []
    for name, by_seed in kept.items():
        if family(name) == of:
            rises = {seed: cost(seed, rates) for seed, rates in by_seed.items()}
            reached = {seed: rise for seed, rise in rises.items() if rise is not None}
            if reached:
                found.append(Best(variant=name, rises=reached, tried=len(rises)))
    return min(found, key=lambda one: (-len(one.rises), sum(one.rises.values()) / len(one.rises)), default=None)


def family_rows(kept: Kept, cost: Cost, level: str, **more: Any) -> list[Row]:
    """Return a row for each family, and for OSFT next to the best replay and to the best of all without protection.

    Where the best replay does not forget at all there is nothing to divide by: then OSFT must not forget more.
    """
    found = {of: one for of in ("full", *PLAIN, "osft", *PROTECTED) if (one := best(kept, of, cost))}
    table = [
        row(f"old text's rise, best variant, {level}", one.told, list(one.rises.values()), unit="bits/byte", **more)
        for of, one in found.items()
    ]
    baselines = [of for of in ("full", *PLAIN) if of in found]
    common = set.intersection(*(set(found[of].rises) for of in baselines)) if baselines else set()
    overall = min(baselines, key=lambda of: sum(found[of].rises[seed] for seed in common), default=None)
    for ours in ("osft", *PROTECTED):
        for peer in dict.fromkeys(("replay", overall)):
            if peer is None or peer not in found or ours not in found:
                continue
            shared = [seed for seed in found[ours].rises if seed in found[peer].rises]
            pair = [[found[of].rises[seed] for seed in shared] for of in (ours, peer)]
            if not shared:
                continue
            what = "the best replay" if peer == "replay" else "the best baseline"
            figure, case = f"old text's rise next to {what}, {level}", f"{found[ours].told}; peer: {found[peer].told}"
            judged = peer == "replay" and ours in BARS
            if min(pair[1]) > 0:
                more_bars = {"at_most": BARS[ours]} if judged else {}
                table.append(row(figure, case, *pair, unit="bits/byte", **more_bars, **more))
            else:
                more_bars = {"at_most": min(pair[1])} if judged else {}
                table.append(row(figure, case, pair[0], unit="bits/byte", **more_bars, **more))
    return table
