"""What OSFT costs: bytes on the wire, time around and inside the step, starting, and memory; beside mini_trainer 0.9.0.

    python -m benchmarks.osft [--quick] [--machine cpu2] [--only wire | times | starting | memory | lengths]

Wire: one step of Llama-3.1-8B in float32, counted (see `traffic`), at 8, 64 and 1024 ranks. The quick version counts
one and two layers and adds the difference 31 times. Peer: full fine-tuning for totals, mini_trainer for one pass.

Time: a llama of 4 layers, 2,048 tokens, a single thread's own seconds; all forms and mini_trainer take turns.

Lengths: ‖ΔW‖ of all linears after 20 steps at one learning rate, relative to full fine-tuning with the same optimizer:
how far one rate carries over. A small model that learns 96 facts (`benchmarks.quality.symbols`).
"""

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from benchmarks.peers import osft as peer
from benchmarks.peers.osft_sides import DEFAULT, FULL, RATIO, TOKENS, forms, sides
from benchmarks.rows import Row, others, row, write
from benchmarks.traffic import eightb, of_a_step

PACKAGES = ("treering", "torch", "transformers")
WORLDS = (8, 64, 1024)
LAYERS = 32
PHASES = ("model", "gradients", "step")
PASS_BAR = 8.0  # GB, of `factors` at `coefficients` and 8 ranks
Bytes = dict[str, float]


def wired(quick: bool) -> dict[str, Any]:
    """Every form, and each wire. Owners are dealt over all layers: few layers do not tell of many."""
    import treering as tr

    made = forms()
    del made["factors"]
    for wire in ("coefficients", "gather", "cached"):
        made[f"factors, {wire}"] = tr.OSFT(protect="weights", form="factors", ratio=RATIO, communication=wire)
    if not quick:
        made["update, inputs, cached"] = tr.OSFT(form="update", communication="cached")
    return made


def whole(of: Callable[[int], Bytes], quick: bool) -> Bytes:
    """GB of each phase with all layers; layers after the first are alike, so that two counts tell the rest."""
    if not quick:
        return {phase: size / 1e9 for phase, size in of(LAYERS).items()}
    one, two = of(1), of(2)
    return {phase: (one[phase] + (LAYERS - 1) * (two[phase] - one[phase])) / 1e9 for phase in PHASES}


def counted(technique: Any, ranks: int, quick: bool) -> Bytes:
    import treering as tr

    def of(layers: int) -> Bytes:
        measured = getattr(technique, "measured", False)
        traffic = of_a_step(eightb(layers), [technique, tr.Shard()], ranks, statistics=measured)
        return {phase: traffic.sent(phase) for phase in PHASES}

    return whole(of, quick)


def wire(quick: bool, command: str) -> Iterator[Row]:
    import treering as tr

    common: dict[str, Any] = {"unit": "GB", "packages": PACKAGES, "command": command}
    for ranks in WORLDS:

        def asked(layers: int, ranks: int = ranks) -> Bytes:
            return peer.ask("traffic", str(ranks), str(layers))

        full = sum(counted(tr.Full(), ranks, quick).values())
        found = {name: counted(technique, ranks, quick) for name, technique in wired(quick).items()}
        for name, phases in {"mini_trainer": whole(asked, quick), **found}.items():
            most = {"factors, coefficients": PASS_BAR, "forward": 0.0}.get(name) if ranks == WORLDS[0] else None
            worst = max(phases["gradients"], phases["step"])
            yield row("bytes of one pass of projection", f"{name}, {ranks} ranks", [worst], at_most=most, **common)
            most = 1.12 if name == DEFAULT and ranks == WORLDS[0] else None
            yield row(
                "bytes of a step, FSDP's included", f"{name}, {ranks} ranks; peer: full fine-tuning",
                [sum(phases.values())], [full], at_most=most, **common,
            )  # fmt: skip


def times(rounds: int, command: str) -> Iterator[Row]:
    common: dict[str, Any] = {"packages": PACKAGES, "command": command}
    found = peer.ask("steps", str(rounds))
    theirs, full = found.pop(peer.PEER), found.pop(FULL)
    yield row(
        "projecting, part of forward + backward", f"mini_trainer, {TOKENS} tokens",
        [share(one) for one in theirs], unit="", **common,
    )  # fmt: skip
    for name, own in found.items():
        yield row(
            "projecting, part of forward + backward", f"{name}, {TOKENS} tokens",
            [share(one) for one in own], unit="", at_most=0.08, **common,
        )  # fmt: skip
        yield of_rounds(
            "time of a step", f"{name}; peer: {FULL}", [one["step"] for one in own], [one["step"] for one in full],
            unit="s", at_most=None, **common,
        )  # fmt: skip
        yield of_rounds(
            "time of a step", f"{name}; peer: mini_trainer",
            [one["step"] for one in own], [one["step"] for one in theirs], unit="s", at_most=0.90, **common,
        )  # fmt: skip


def share(one: dict[str, float]) -> float:
    """Hooks, and projections inside the forward and backward, of what forward and backward take without them."""
    return (one["hooks"] + one["inside"]) / (one["model"] - one["inside"])


def of_rounds(
    figure: str, case: str, ours: Sequence[float], theirs: Sequence[float], *, at_most: float | None, **more: Any
) -> Row:
    """The median of the rounds' ratios, not the ratio of medians: both sides of a round met the same weather."""
    made = row(figure, case, ours, theirs, at_most=at_most, **more)
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    return replace(made, ratio=ratio, holds=None if at_most is None else ratio <= at_most)


def starting(width: int, rounds: int, command: str) -> Iterator[Row]:
    common: dict[str, Any] = {"packages": PACKAGES, "command": command}
    found = peer.ask("decompositions", str(width), str(rounds))
    case = f"a Llama-8B layer at width {width}"
    yield of_rounds(
        "decomposition", f"{case}; peer: mini_trainer", found["ours"], found["theirs"], unit="s", at_most=0.6, **common
    )
    angles = [found["our angle"]], [found["their angle"]]
    yield row("angle to the true subspace", case, angles[0], unit="rad", at_most=1e-5, **common)
    yield row("angle to the true subspace", f"{case}, mini_trainer", angles[1], unit="rad", **common)


def memory(rounds: int, command: str) -> Iterator[Row]:
    common: dict[str, Any] = {"unit": "MiB", "packages": PACKAGES, "command": command}
    found: dict[str, list[Bytes]] = {}
    for _ in range(rounds):
        for name in (peer.PEER, *sides()):
            found.setdefault(name, []).append(peer.ask("memory", name))
    theirs, full = found.pop(peer.PEER), found.pop(FULL)
    step = f"peak of a step of {TOKENS} tokens"
    for name, own in found.items():
        for what, called, most in (("start", "peak of starting", 1.0), ("step", step, 0.8)):
            pair = [m[what] for m in own], [m[what] for m in theirs]
            yield of_rounds(called, f"{name}; peer: mini_trainer", *pair, at_most=most, **common)
        pair = [m["step"] for m in own], [m["step"] for m in full]
        yield of_rounds(step, f"{name}; peer: {FULL}", *pair, at_most=None, **common)


def lengths(steps: int, command: str) -> Iterator[Row]:
    from functools import partial
    from itertools import islice

    import torch

    from benchmarks.influence_text import cache, one_thread
    from benchmarks.quality import learners, symbols
    from benchmarks.quality.model import Small, drawn

    optimizers: dict[str, Any] = {
        "AdamW": (partial(torch.optim.AdamW, weight_decay=0.0), 3e-4),
        "Muon": (partial(torch.optim.Muon, weight_decay=0.0), 3e-4),
        "SGD": (torch.optim.SGD, 0.1),
    }
    cases = {
        "the default": {},
        "update": {"form": "update"},
        "damping .001": {"damping": 0.001},
        "damping .1": {"damping": 0.1},
        "hard, half": {"strength": "hard", "ratio": 0.5},
        "hard, a tenth": {"strength": "hard", "ratio": 0.1},
        "both, half": {"protect": "both", "ratio": 0.5},
        "weights, half": {"protect": "weights", "ratio": 0.5},
        "weights, a tenth": {"protect": "weights", "ratio": 0.1},
    }

    def length(small: Small, method: Any, kind: Any, lr: float) -> float:
        learner = method(small.fresh(), known, lr)
        learner.optimizer = kind([p for _, p in learner.run.trainable()], lr=lr)
        for one in islice(drawn(*symbols.facts(size.facts, 0, 1), size.rows, 1), steps):
            learner.step(one)
        return sum(float((new - small.state[name]).square().sum()) for name, new in learner.finished().items()) ** 0.5

    size = symbols.Size()
    with one_thread():
        small = symbols.base(size, 0, cache())
        known = symbols.measured(small, size, 0)
        for name, (kind, lr) in optimizers.items():
            full = length(small, learners.full, kind, lr)
            for case, settings in cases.items():
                found = length(small, learners.osft(**settings), kind, lr)
                words = f"{case}, {name}; peer: full fine-tuning"
                yield row("length of the change", words, [found], [full], unit="", packages=PACKAGES, command=command)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--machine", default="cpu2")
    parser.add_argument(
        "--only", choices=("wire", "times", "starting", "memory", "lengths"), help="one part, next to what is known"
    )
    options = parser.parse_args()
    quick = options.quick
    command = "python -m benchmarks.osft" + (" --quick" if quick else "")
    parts: dict[str, Callable[[], Iterator[Row]]] = {
        "wire": lambda: wire(quick, command),
        "times": lambda: times(5 if quick else 20, command),
        "starting": lambda: starting(512 if quick else 1024, 5 if quick else 20, command),
        "memory": lambda: memory(1 if quick else 5, command),
        "lengths": lambda: lengths(20, command),
    }
    made = [one for name, part in parts.items() if options.only in (None, name) for one in part()]
    write("osft", options.machine, [*others("osft", options.machine, made), *made])


if __name__ == "__main__":
    main()
