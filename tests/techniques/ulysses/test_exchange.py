"""Attention over ranks is attention: outputs and all gradients of every case equal the reference of one process."""

import itertools
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist

from tests.ranks import on_ranks
from tests.same import assert_all_same, assert_same
from treering.attention import Documents, attend
from treering.core.row_messages import recorded
from treering.core.seeds import generator
from treering.techniques.ulysses.ranks import SequenceRanks
from treering.techniques.ulysses.reference import joined, reference
from treering.techniques.ulysses.shares import Grid


@dataclass(frozen=True)
class Case:
    lengths: tuple[int, ...]
    heads: tuple[int, int] = (4, 2)
    widths: tuple[int, int] = (8, 8)
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False


LENGTHS = ((1,), (3,), (5,), (24,), (37,), (1, 1, 1), (12, 12), (7, 1, 29), (13, 11, 1, 5), (2, 30, 4))
HEADS = ((1, 1), (2, 1), (3, 1), (3, 3), (4, 2), (6, 2), (6, 3), (7, 7), (9, 3), (2, 2), (8, 2))
# every pair of tokens and heads; the rest in turn
CASES = [
    Case(
        lengths=lengths,
        heads=heads,
        widths=((8, 8), (8, 4), (4, 6))[i % 3],
        window=(None, None, 3, 9)[i % 4],
        softcap=(None, 2.0, None, None, None)[i % 5],
        sinks=i % 3 == 1,
    )
    for i, (lengths, heads) in enumerate(itertools.product(LENGTHS, HEADS))
]
GRIDS = {2: [(2, 1), (1, 2)], 3: [(3, 1), (1, 3)], 4: [(4, 1), (1, 4), (2, 2)], 6: [(3, 2), (2, 3)]}


def ranks_of(grid, transport):
    """Process groups of the rows and columns; every rank makes all of them, and knows its own."""
    me = dist.get_rank()
    if grid.gathered == 1 or grid.heads == 1:
        return SequenceRanks.of_group(dist.group.WORLD, transport, gathered=grid.heads == 1)
    row, column = grid.place(me)
    rows = [dist.new_group([r * grid.heads + u for u in range(grid.heads)]) for r in range(grid.gathered)]
    columns = [dist.new_group([r * grid.heads + u for r in range(grid.gathered)]) for u in range(grid.heads)]
    names = {"row": rows[row].group_name, "column": columns[column].group_name}
    return SequenceRanks(grid=grid, rank=me, transport=transport, **names)


def tensors(case, tokens, batch=1):
    """Query, key, value, sinks and the gradient of the output; the same on every rank."""
    heads, keys = case.heads
    shapes = [(heads, case.widths[0]), (keys, case.widths[0]), (keys, case.widths[1]), (heads, case.widths[1])]
    made = [
        torch.randn(batch, h, tokens, d, dtype=torch.float64, generator=generator(1, str(case), i))
        for i, (h, d) in enumerate(shapes)
    ]
    sinks = torch.randn(heads, dtype=torch.float64, generator=generator(1, str(case), "sinks")) if case.sinks else None
    return (*made[:3], sinks), made[3]


def padded(case, grid):
    """The documents with the padding that gives each rank a token."""
    more = grid.padded(sum(case.lengths)) - sum(case.lengths)
    return (*case.lengths, more) if more else case.lengths


def results(attended, inputs, gradient):
    inputs = [None if x is None else x.detach().clone().requires_grad_() for x in inputs]
    out = attended(*inputs)
    out.backward(gradient)
    names = ("query", "key", "value", "sinks")
    return {"out": out.detach()} | {n: x.grad for n, x in zip(names, inputs) if x is not None}


def wanted(case, lengths, grid):
    """The output of every rank and gradients of the complete inputs, by the reference."""
    inputs, gradient = tensors(case, sum(lengths))
    documents, ranges = Documents.of(lengths), grid.tokens(sum(lengths))
    rules = {"window": case.window, "softcap": case.softcap}

    def of_all(query, key, value, sinks):
        shares = ([cut(x, of_rank) for of_rank in ranges] for x in (query, key, value))
        return joined(reference(*shares, documents, grid, sinks_H=sinks, **rules), ranges)

    return results(of_all, inputs, gradient)


def cut(x, ranges):
    return torch.cat([x[:, :, part.start : part.stop] for part in ranges], dim=2)


def over_ranks(case, ranks):
    """This rank's part of every result, as one process would have it."""
    lengths = padded(case, ranks.grid)
    own = torch.cat([torch.arange(part.start, part.stop) for part in ranks.tokens(sum(lengths))])
    documents = ranks.documents(lengths, "cpu")
    (query, key, value, sinks), gradient = tensors(case, sum(lengths))

    def attended(q, k, v, s):
        rules = {"window": case.window, "softcap": case.softcap}
        return documents.exchange.around(
            lambda q, k, v, s: attend(q, k, v, documents.inside, scaling=case.widths[0] ** -0.5, sinks_H=s, **rules),
            q, k, v, s,
        )  # fmt: skip

    found = results(attended, (query[:, :, own], key[:, :, own], value[:, :, own], sinks), gradient[:, :, own])
    if sinks is not None:
        dist.all_reduce(found["sinks"])
    all_of_it = wanted(case, lengths, ranks.grid)
    return found, {name: x if name == "sinks" else x[:, :, own] for name, x in all_of_it.items()}


def flat(results):
    return torch.cat([results[name].reshape(-1) for name in sorted(results)])


def run(world, cases, transport):
    for heads, gathered in GRIDS[world]:
        ranks = ranks_of(Grid(heads=heads, gathered=gathered), transport)
        for case in cases:
            try:
                found, of_one = over_ranks(case, ranks)
                # relative to the largest element of all: with one key the gradient of its query is 0
                assert_same(flat(found), flat(of_one), 1e-12)
            except AssertionError as error:
                raise AssertionError(f"{case} on {heads} × {gathered} ranks: {error}") from error


@pytest.mark.parametrize("transport", ["collective", "paired"])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_attention_over_ranks_is_that_of_one_process(world, transport):
    on_ranks(world, run, world, CASES[::2] if transport == "collective" else CASES[::7], transport)


def bits(world):
    """Both transports give the same bits, and as many bytes."""
    case = Case(lengths=(13, 11, 1, 5), heads=(6, 2), widths=(8, 4))
    for heads, gathered in GRIDS[world]:
        grid = Grid(heads=heads, gathered=gathered)
        found, records = [], []
        for transport in ("collective", "paired"):
            ranks = ranks_of(grid, transport)
            with recorded() as record:
                found.append(over_ranks(case, ranks)[0])
            records.append(record)
        assert_all_same(found[1], found[0])
        assert sum(records[0].calls.values()) == sum(records[1].calls.values())


@pytest.mark.parametrize("world", [2, 3, 4])
def test_both_transports_give_the_same_bits(world):
    on_ranks(world, bits, world)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3, 4, 6])
@pytest.mark.parametrize("transport", ["collective", "paired"])
def test_attention_over_more_ranks_and_in_all_cases(world, transport):
    on_ranks(world, run, world, CASES, transport)
