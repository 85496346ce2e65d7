"""What SmolLM2-135M-Instruct forgets while it learns facts or a domain: of text that was measured, and of other text.

    python -m benchmarks.continual_real [--quick] [--machine cpu2] [--only METHOD …] [--settings facts domain]
                                        [--rates 3e-4 …] [--seeds 0 …]

24 made-up facts in chat form are trained until 23 are answered, 12 in a step; or Perl sources, 24 steps of 512 tokens.
All methods train the linears of the blocks: AdamW, clip 1.0. 5,900 tokens are measured or replayed: Python's
documentation and ten general questions with the answers that the model gives. Reported are rises, in nats a token, of

    measured kind     more of the documentation
    not measured      the GPL (other licences where it is not on the machine)
    other questions   twenty general questions, with the answers that the model gave before it learned

`replay` takes 512 of the measured tokens into each step and adds their mean loss (`× 4`: four times). `own text` is
measured on as many tokens that the model writes after its first token, as `treering measure --generate` does, `own
chats` on chats of which it writes questions and answers. Each run is written down as it ends (results/runs/), and a
second start continues there: three to ten minutes a run on one core.
"""

import argparse
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks import realmodel
from benchmarks.influence_text import cache
from benchmarks.quality.chat import ROWS, Size, World
from benchmarks.quality.learners import Method, decayed, full, lora, osft
from benchmarks.quality.model import drawn, exact
from benchmarks.quality.runs import Result, Runs
from benchmarks.rows import Row, row, write

FACTS_AT_ONCE, CHECK, MOST = 12, 6, 60  # facts in a step; steps between two looks at the answers; steps
DOMAIN_STEPS = 24
RATES = (1e-4, 3e-4)
PACKAGES = ("treering", "torch", "transformers", "peft")
TEXTS = {
    "measured kind": "text of the measured kind",
    "not measured": "text that was not measured",
    "other questions": "other general questions",
}


@dataclass(frozen=True, kw_only=True)
class Way:
    """A method with what it is given: `replay` is the weight of the replayed tokens' loss, `measured` which text."""

    method: Method
    rates: tuple[float, ...] = RATES
    measured: Literal["kept", "own", "own_chats"] | None = None
    replay: float = 0.0


def ways(folder: Path) -> dict[str, Way]:
    """Operators are decomposed once and kept in the folder."""
    default, one_sided, weights = (
        osft(prepared=folder, **settings)
        for settings in ({}, {"form": "one_sided", "ratio": 0.5}, {"protect": "weights", "ratio": 0.5})
    )
    return {
        "full": Way(method=full),
        "full + replay": Way(method=full, replay=1.0),
        "full + replay × 4": Way(method=full, replay=4.0),
        "lora r16": Way(method=lora(16), rates=(1e-3,)),
        "osft weights .5": Way(method=weights),
        "osft one-sided .5": Way(method=one_sided, measured="kept"),
        "osft one-sided .5 (own text)": Way(method=one_sided, measured="own"),
        "osft one-sided .5 (own chats)": Way(method=one_sided, measured="own_chats"),
        "osft one-sided .5 + replay": Way(method=one_sided, measured="kept", replay=1.0),
        "osft": Way(method=default, measured="kept"),
        "osft (own text)": Way(method=default, measured="own"),
        "osft (own chats)": Way(method=default, measured="own_chats"),
        "osft + replay": Way(method=default, measured="kept", replay=1.0),
    }


class Forgetting:
    """The two tasks, and the rise of each text."""

    def __init__(self, world: World):
        self.world = world

    @cached_property
    def before(self) -> Result:
        """The base model's losses."""
        base = self.world.model().eval()
        return {name: texts.nats(base) for name, texts in self.world.watched.items()}

    @cached_property
    def domain_before(self) -> float:
        return self.world.domain[1].nats(self.world.model().eval())

    def rises(self, model: Any) -> Result:
        return {name: texts.nats(model) - self.before[name] for name, texts in self.world.watched.items()}

    def facts(self, way: Way, lr: float, seed: int) -> Result:
        """Train until 95 % are answered, at a constant rate."""
        texts = self.world.facts(seed)
        number = len(texts.ids)
        learner, replayed = self._start(way, lr, seed)
        order = iter(drawn(texts.ids, texts.labels, FACTS_AT_ONCE, seed))
        right, steps = 0, 0
        while steps < MOST and right < 0.95 * number:
            for _ in range(CHECK):
                learner.step(next(order), *replayed())
            steps += CHECK
            right = round(number * exact(learner.model.eval(), texts.ids, texts.labels))
            if right < 0.95 * number:
                learner.model.train()
        return {"right": right, "of": number, "steps": steps, **self.rises(learner.model)}

    def domain(self, way: Way, lr: float, seed: int) -> Result:
        """Train so many steps, at a rate that falls to 0."""
        new, held_out = self.world.domain
        learner, replayed = self._start(way, lr, seed)
        order = iter(drawn(new.ids, None, ROWS, seed))
        for step in range(DOMAIN_STEPS):
            decayed(learner, lr, step / DOMAIN_STEPS, shape="linear")
            learner.step(next(order), *replayed())
        return {"gain": self.domain_before - held_out.nats(learner.model.eval()), **self.rises(learner.model)}

    def _start(self, way: Way, lr: float, seed: int) -> tuple[Any, Any]:
        """Return the learner, and a function that gives what is replayed in the next step."""
        learner = way.method(self.world.model(), self.world.statistics(way.measured) if way.measured else None, lr)
        kept = iter(drawn(self.world.kept.ids, self.world.kept.labels, ROWS, seed + 1))

        def replayed() -> list[dict[str, Any]]:
            if not way.replay:
                return []
            one = next(kept)
            return [one | {"count": one["count"] / way.replay}]

        return learner, replayed


@dataclass(frozen=True, kw_only=True)
class Setting:
    seeds: int
    methods: tuple[str, ...] = ()  # none named: all
    rates: tuple[float, ...] = ()  # none given: each method's own


FEW = ("full", "full + replay", "osft one-sided .5", "osft", "osft + replay")
SETTINGS = {"facts": Setting(seeds=2), "domain": Setting(seeds=1, methods=FEW)}
QUICK = {"facts": Setting(seeds=1, methods=("full", "osft"), rates=(3e-4,))}
SMALL = Size(facts=8, answer=24, questions=(4, 6), kept=16, held_out=4, domain=8)
Kept = dict[tuple[str, float], list[Result]]  # (method, learning rate) -> a result of each seed


def run_all(runs: Runs, settings: Mapping[str, Setting], options: argparse.Namespace, world: World) -> None:
    known, forgetting = ways(world.cache / "prepared"), Forgetting(world)
    for name, setting in settings.items():
        for seed in options.seeds if options.seeds is not None else range(setting.seeds):
            for method in options.only or setting.methods or known:
                way = known[method]
                for lr in options.rates or setting.rates or way.rates:
                    key = {"setting": name, "method": method, "lr": lr, "seed": seed}
                    runs.take(key, partial(getattr(forgetting, name), way, lr, seed))


def _kept(runs: Runs, setting: str) -> Kept:
    found: Kept = {}
    for key, result in runs.done.items():
        own, method, lr, _ = (part.split(" ", 1)[1] for part in key.split(", "))
        if own == setting:
            found.setdefault((method, float(lr)), []).append(result)
    return dict(sorted(found.items()))


def facts_rows(done: Kept, **more: Any) -> Iterator[Row]:
    """The three rises of each method and rate; how many facts were answered where no draw was learned."""
    for text, words in TEXTS.items():
        for (method, lr), results in done.items():
            learned = [one for one in results if one["right"] >= 0.95 * one["of"]]
            if not learned:
                continue
            steps = " and ".join(str(one["steps"]) for one in learned)
            of = learned[0]["of"]
            figure = f"rise when {math.ceil(0.95 * of)} of {of} facts are answered: {words}"
            case = f"{method}, lr {lr:g}, {steps} steps"
            case += "" if len(learned) == len(results) else f" (reached with {len(learned)} of {len(results)} draws)"
            yield row(figure, case, [one[text] for one in learned], unit="nats/token", **more)
    for (method, lr), results in done.items():
        most = max(results, key=lambda one: one["right"])
        if most["right"] < 0.95 * most["of"]:
            figure = f"of {most['of']} facts answered after {most['steps']} steps: not enough"
            yield row(figure, f"{method}, lr {lr:g}", [most["right"]], unit="facts", **more)


def domain_rows(done: Kept, **more: Any) -> Iterator[Row]:
    for text, words in TEXTS.items():
        for (method, lr), results in done.items():
            gain = sum(one["gain"] for one in results) / len(results)
            figure = f"rise after {DOMAIN_STEPS} steps of a domain: {words}"
            case = f"{method}, lr {lr:g}: gain {gain:.3f}"
            yield row(figure, case, [one[text] for one in results], unit="nats/token", **more)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="8 facts, full and osft, short texts")
    parser.add_argument("--machine", default="cpu2")
    parser.add_argument("--only", nargs="*", help="these methods; the others' runs stay as they are")
    parser.add_argument("--settings", nargs="*", choices=list(SETTINGS), help="these settings only")
    parser.add_argument("--rates", nargs="*", type=float, help="these learning rates only")
    parser.add_argument("--seeds", nargs="*", type=int, help="these draws only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    name = "continual_real_quick" if options.quick else "continual_real"
    command = "python -m benchmarks.continual_real" + (" --quick" if options.quick else "")
    every = QUICK if options.quick else SETTINGS
    settings = {n: one for n, one in every.items() if not options.settings or n in options.settings}
    world = World(realmodel.folder(), SMALL if options.quick else Size(), cache() / name)
    run_all(runs := Runs(name, options.machine), settings, options, world)
    more: dict[str, Any] = {"packages": PACKAGES, "command": command}
    table = [*facts_rows(_kept(runs, "facts"), **more), *domain_rows(_kept(runs, "domain"), **more)]
    write(name, options.machine, table)


if __name__ == "__main__":
    main()
