"""What sequence-parallel attention sends and how long it takes, next to DeepSpeed 0.19.8's Ulysses on the same ranks.

    python -m benchmarks.ulysses [--quick] [--machine cpu2] [--only sent]

First both sides compute the same attention, or nothing is measured. Sent: counted at the process groups of real ranks,
forward and backward of one layer. Time: 4 gloo ranks of one thread each, both sides in turn; where there is only the
exchange, an attention that takes no time stands between its two halves on both sides.
"""

import argparse
import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from benchmarks.peers import ulysses as peer
from benchmarks.peers.ulysses_sides import MESSAGES, OURS, THEIRS, Case, named
from benchmarks.rows import Row, others, row, write
from treering.techniques.ulysses.shares import Grid
from treering.techniques.ulysses.traffic import AttentionWidths, choose, grids, traffic

PACKAGES = ("treering", "torch", "transformers")
EVEN = [[4, 4], [4, 2]]
# Query and key heads of Llama-3-8B and Qwen3-8B, of Qwen2.5-14B, of gpt-oss; then many, few and one key head.
HEADS = ((32, 8), (40, 8), (64, 8), (32, 32), (16, 4), (8, 2), (32, 1), (8, 1), (6, 2), (12, 12))
RANKS = (2, 4, 8)
LONG, LLAMA = 131_072, (32, 8, 128)
COUNTED, WIDTH = 256, 16  # tokens and head width of what is counted: bytes are proportional to both
EXCHANGED = ((12, 12, 64), LLAMA)
ATTENDED = (4, 4, 64, 16_384)


def exact(quick: bool, command: str) -> Iterator[Row]:
    """The command inside fails if it is not so."""
    for ranks in (2, 4):
        by_rank = peer.ask("check", str(ranks), json.dumps(EVEN))
        for pair in by_rank[0]:
            worst = max(found[pair] for found in by_rank)
            yield row(
                "worst difference of output and gradients, float32", f"{pair}, {ranks} ranks, heads 4/4 and 4/2",
                [worst], unit="", at_most=peer.EXACT, packages=PACKAGES, command=command,
            )  # fmt: skip


def sent(quick: bool, command: str) -> Iterator[Row]:
    common: dict[str, Any] = {"packages": PACKAGES, "command": command}
    for ranks in RANKS:
        by_rank = peer.ask("traffic", str(ranks), json.dumps([[*heads, WIDTH, COUNTED] for heads in HEADS]))
        for i, heads in enumerate(HEADS):
            check_formulas(heads, ranks, [found[i] for found in by_rank])
            found = by_rank[0][i]
            if (ranks, heads) == (4, (12, 12)):
                case = f"{heads[0]} query and {heads[1]} key heads, {ranks} ranks"
                ours, theirs = found[named(Grid(heads=ranks))]["calls"], found[THEIRS]["calls"]
                yield row("collectives of a layer, forward + backward", case, [ours], unit="", at_most=4, **common)
                yield row(
                    "collectives of a layer, forward + backward", f"{case}: deepspeed", [theirs], unit="", **common
                )
            yield least_bytes(heads, ranks, [found[i] for found in by_rank], common)
    yield from llama(quick, common)


def check_formulas(heads: tuple[int, int], ranks: int, by_rank: Sequence[dict[str, Any]]) -> None:
    """What was counted is what the plan computes, rank by rank, and what DeepSpeed's source does."""
    widths = AttentionWidths(heads=heads[0], kv_heads=heads[1], head_dim=WIDTH, value_dim=WIDTH)
    for rank, found in enumerate(by_rank):
        for grid in grids(ranks):
            one = traffic(widths, grid, rank, COUNTED)
            forward = one.to_heads.elements + one.to_tokens.elements + one.gathered.elements * (grid.gathered - 1)
            backward = one.from_heads.elements + one.from_tokens.elements + one.summed.elements
            counted = found[named(grid)]
            if (counted["forward"], counted["backward"]) != (2 * forward, 2 * backward):
                raise AssertionError(f"{heads} heads, {named(grid)} ranks: counted {counted}, planned {one}")
        theirs, plain = found[THEIRS], alternatives(heads, ranks).get("separate q, k, v")
        if isinstance(theirs, str) != (plain is None):
            raise AssertionError(f"{heads} heads, {ranks} ranks: deepspeed {theirs}, formula {plain}")
        positions = (ranks - 1) * COUNTED // ranks * 8
        if plain is not None and theirs["forward"] + theirs["backward"] != plain + positions:
            raise AssertionError(f"{heads} heads, {ranks} ranks: deepspeed {theirs}, formula {plain} + {positions}")


def alternatives(heads: tuple[int, int], ranks: int) -> dict[str, int]:
    """Bytes that a rank sends, forward and backward, in the arrangements that others have, where these are possible.

    With fewer key heads than ranks, Ulysses sends a key head to each rank that uses it: as many as one for each rank.
    """
    query, key = heads
    each, element = COUNTED // ranks, 2 * WIDTH
    found = {"gathered keys and values": (ranks - 1) * each * 2 * key}
    if query % ranks == 0:
        found["keys and values for each query head"] = each * (ranks - 1) * 4 * query // ranks
        if key % ranks == 0 or ranks % key == 0:
            found["separate q, k, v"] = each * (ranks - 1) * (2 * query + 2 * max(key, ranks)) // ranks
    return {name: 2 * elements * element for name, elements in found.items()}


def least_bytes(heads: tuple[int, int], ranks: int, by_rank: Sequence[dict[str, Any]], common: dict[str, Any]) -> Row:
    """Of the arrangement that `layout: auto` chooses, next to the best of the others."""
    layer = AttentionWidths(heads=heads[0], kv_heads=heads[1], head_dim=128, value_dim=128)
    grid = choose([layer], grids(ranks), tokens=LONG)
    ours = statistics.mean(total(found[named(grid)]) for found in by_rank)
    others: dict[str, float] = dict(alternatives(heads, ranks))
    if not isinstance(by_rank[0][THEIRS], str):
        others["deepspeed"] = total(by_rank[0][THEIRS])
    best = min(others, key=lambda name: others[name])
    shown = "deepspeed refuses" if "deepspeed" not in others else f"ours / deepspeed {ours / others['deepspeed']:.2f}"
    case = f"{heads[0]} query and {heads[1]} key heads on {named(grid)} ranks; peer: {best}; {shown}"
    return row("bytes of a layer, forward + backward", case, [ours], [others[best]], unit="B", at_most=1.0, **common)


def total(counted: dict[str, Any]) -> int:
    return int(counted["forward"] + counted["backward"])


def llama(quick: bool, common: dict[str, Any]) -> Iterator[Row]:
    """Forward of one layer of Llama-3-8B on 2 ranks; the quick version counts a 64th of the tokens."""
    parts = 64 if quick else 1
    found = peer.ask("traffic", "2", json.dumps([[*LLAMA, LONG // parts]]))[0][0]
    layer = AttentionWidths(heads=LLAMA[0], kv_heads=LLAMA[1], head_dim=LLAMA[2], value_dim=LLAMA[2])
    ours = found[named(choose([layer], grids(2), tokens=LONG))]["forward"] * parts / 1e6
    theirs = found[THEIRS]["forward"] * parts / 1e6
    case = f"Llama-3-8B, 2 ranks, {LONG:,} tokens, bfloat16"
    yield row("bytes of a layer, forward", case, [ours], unit="MB", at_most=268.5, **common)
    yield row("bytes of a layer, forward", f"{case}; peer: deepspeed", [ours], [theirs], unit="MB", **common)


def exchange(quick: bool, command: str) -> Iterator[Row]:
    rounds, repeats = (9, 3) if quick else (31, 5)
    cases = [(*heads, tokens) for heads in EXCHANGED for tokens in (1024, 2048, 4096)]
    for numbers, found in zip(cases, peer.ask("times", "4", json.dumps(cases), "true", str(rounds), str(repeats))[0]):
        case = f"{Case(*numbers)}, 4 ranks, bfloat16"
        yield from compared("the exchange alone", case, found, 0.6, command)
        figure = "time of our messages alone, nothing packed"
        yield of_rounds(figure, f"{case}; peer: deepspeed's exchange", found, MESSAGES, "wall", None, command)


def attention(quick: bool, command: str) -> Iterator[Row]:
    numbers = (*ATTENDED[:3], ATTENDED[3] // 4) if quick else ATTENDED
    (found,) = peer.ask("times", "4", json.dumps([numbers]), "false", "7", "1")[0]
    case = f"{Case(*numbers)}, 4 ranks, bfloat16"
    yield from compared("exchange and attention", case, found, 1.0, command)


def compared(what: str, case: str, found: dict[str, Any], bar: float, command: str) -> Iterator[Row]:
    case = f"{case}; peer: deepspeed"
    yield of_rounds(f"time of {what}", case, found, OURS, "wall", bar, command)
    yield of_rounds(f"CPU time of {what}, all ranks", case, found, OURS, "cpu", None, command)


def of_rounds(
    figure: str, case: str, found: dict[str, Any], side: str, kind: str, bar: float | None, command: str
) -> Row:
    """The ratio is the median of the rounds' own: what slows the machine for a while slows both sides of a round."""
    ours, theirs = found[kind][side], found[kind][THEIRS]
    made = row(figure, case, ours, theirs, unit="s", at_most=bar, packages=PACKAGES, command=command)
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    return replace(made, ratio=ratio, holds=ratio <= (math.inf if bar is None else bar))


PARTS: dict[str, Callable[[bool, str], Iterator[Row]]] = {
    "exact": exact,
    "sent": sent,
    "exchange": exchange,
    "attention": attention,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--machine", default="cpu2")
    parser.add_argument("--only", choices=tuple(PARTS), help="one part, next to what is known of the others")
    options = parser.parse_args()
    command = "python -m benchmarks.ulysses" + (" --quick" if options.quick else "")
    chosen = [name for name in PARTS if options.only in (None, name) or name == "exact"]
    made = [one for name in chosen for one in PARTS[name](options.quick, command)]
    write("ulysses", options.machine, [*others("ulysses", options.machine, made), *made])


if __name__ == "__main__":
    main()
