"""Formulas of bytes and calls against what real ranks send, and the arrangement that is chosen by them."""

import itertools

import pytest
import torch

from tests.ranks import on_ranks
from tests.techniques.ulysses.test_exchange import Case, ranks_of, tensors
from treering.attention import attend
from treering.core.links import Links
from treering.core.row_messages import recorded
from treering.techniques.ulysses.shares import Grid
from treering.techniques.ulysses.traffic import AttentionWidths, Sent, SentForm, choose, grids, seconds, traffic

WIDTH = 8
UNEVEN, EVEN = 50, 48  # tokens
HEADS = {
    2: [(2, 1), (2, 2), (4, 2), (6, 2), (8, 2), (8, 8), (8, 1)],
    3: [(3, 1), (3, 3), (6, 3), (9, 3)],
    4: [(4, 1), (4, 2), (4, 4), (8, 4), (8, 2), (12, 4), (16, 4), (8, 1), (8, 8)],
}


def widths(heads, keys):
    return AttentionWidths(heads=heads, kv_heads=keys, head_dim=WIDTH, value_dim=WIDTH)


def counted(ranks, among, transport, tokens=UNEVEN):
    """{(heads, grid): (calls, bytes) of this rank}, forward and backward of one layer."""
    found = {}
    for grid in grids(ranks):
        place = ranks_of(grid, transport)
        for heads in among:
            case = Case(lengths=(tokens,), heads=heads, widths=(WIDTH, WIDTH))
            (q, k, v, _), gradient = tensors(case, tokens)
            own = torch.cat([torch.arange(part.start, part.stop) for part in place.tokens(tokens)])
            q, k, v = (x[:, :, own].bfloat16().requires_grad_() for x in (q, k, v))
            documents = place.documents((tokens,), "cpu")
            inside = documents.inside
            with recorded() as record:
                out = documents.exchange.around(
                    lambda q, k, v, s, inside=inside: attend(q, k, v, inside), q, k, v, None
                )
                out.backward(gradient[:, :, own].bfloat16())
            found[heads, grid] = sum(record.calls.values()), sum(record.bytes.values())
    return found


def formula(heads, grid, rank, padded):
    one = traffic(widths(*heads), grid, rank, UNEVEN, SentForm(padded=padded))
    parts = [one.to_heads, one.to_tokens, one.from_heads, one.from_tokens, one.summed]
    total = sum([*parts, Sent(one.gathered.size * (grid.gathered - 1), one.gathered.calls)], Sent())
    return total.calls, total.size


@pytest.mark.parametrize("ranks", HEADS)
def test_ranks_send_what_the_formulas_say(ranks):
    of_ranks = on_ranks(ranks, counted, ranks, HEADS[ranks], "collective")
    for heads, grid in itertools.product(HEADS[ranks], grids(ranks)):
        found = [of_rank[heads, grid] for of_rank in of_ranks]
        assert found == [formula(heads, grid, rank, True) for rank in range(ranks)], (heads, grid)


@pytest.mark.parametrize("ranks", HEADS)
def test_the_chosen_arrangement_is_the_one_that_really_sends_least(ranks):
    of_ranks = on_ranks(ranks, counted, ranks, HEADS[ranks], "collective", EVEN)
    chosen = set()
    for heads, latency in itertools.product(HEADS[ranks], (0.0, 1e-7, 1e-6)):
        links = Links(node=8, inside=1e9, latency=latency)
        spent = {
            grid: max(size / links.inside + calls * latency for calls, size in (one[heads, grid] for one in of_ranks))
            for grid in grids(ranks)
        }
        grid = choose([widths(*heads)], grids(ranks), links, EVEN)
        assert spent[grid] == pytest.approx(min(spent.values())), (heads, latency, spent)
        chosen.add(grid)
    assert len(chosen) > 1  # one arrangement is not the best for all


def test_rounds_of_pairs_send_no_padding():
    for rank, found in enumerate(on_ranks(3, counted, 3, [(6, 3)], "paired")):
        assert found == {key: formula(*key, rank, False) for key in found}


@pytest.mark.parametrize("ranks", [8, 16, 64, 1024])
def test_the_chosen_arrangement_is_never_slower_than_another(ranks):
    links = Links()
    for heads, keys in ((32, 8), (32, 1), (32, 32), (64, 8), (16, 2)):
        layers = [widths(heads, keys)] * 3
        chosen = choose(layers, grids(ranks), links)
        tokens = 8192 * ranks
        assert seconds(layers, chosen, tokens, links) == min(seconds(layers, g, tokens, links) for g in grids(ranks))


def test_known_sizes():
    """Llama-3-8B, 131,072 tokens in bfloat16, forward, MB of each rank."""
    layer = AttentionWidths(heads=32, kv_heads=8, head_dim=128, value_dim=128)

    def forward(grid):
        one = traffic(layer, grid, 0, 131072, SentForm())
        return round((one.to_heads + one.to_tokens + one.gathered * (grid.gathered - 1)).size / 1e6)

    assert [forward(Grid(heads=p)) for p in (2, 4, 8)] == [671, 503, 294]
    assert [forward(Grid(heads=1, gathered=p)) for p in (2, 4, 8)] == [268, 403, 470]
