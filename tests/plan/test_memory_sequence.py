"""Memory predicted for ranks that share rows of tokens, against steps of real ranks."""

import pytest

import treering as tr
from tests.plan.memory_toys import CPU, llama, of_this_rank, subject
from tests.ranks import on_ranks
from treering.memory import pretend
from treering.memory.forecast import forecast
from treering.memory.timeline import LONG, TracedRow, traced_length, traced_row
from treering.techniques.ulysses.shares import Grid

LENGTH = 4 * 107 + 3  # near the row that is traced: on CPUs gathered keys need scores of 64 queries, no multiple of it
TECHNIQUES = {
    "full": [tr.Full()],
    "tiled, recomputed": [tr.Full(), tr.Recompute(), tr.TiledLoss(tile=64)],
    "kept": [tr.Full(), tr.Recompute(keep=("all_to_all",)), tr.TiledLoss(tile=64)],
    "coded": [tr.Full(), tr.Recompute(), tr.TiledLoss(tile=64)],
}
MORE = ("full", "kept", "coded")


def run(layout, name, ranks, shards=1, key_heads=2, on="cpu"):
    sizes = {"shard": shards, "sequence": ranks}
    ulysses = tr.Ulysses(layout=layout, codec="int8" if name == "coded" else "none")
    techniques = [*TECHNIQUES[name], ulysses, tr.Shard()]
    config = llama(num_key_value_heads=key_heads)
    return subject(config, techniques, world=shards * ranks, sizes=sizes, on=on)


def measured(cases, length):
    """The peak of this rank in each of `cases`, with real tensors and real messages."""
    return [of_this_rank(run(*case), length).peak(length) for case in cases]


@pytest.mark.parametrize(
    "cases",
    [
        [("heads", "tiled, recomputed", 2), ("gathered", "tiled, recomputed", 2)],
        pytest.param([(layout, name, 2) for layout in ("heads", "gathered") for name in MORE], marks=pytest.mark.slow),
        pytest.param([(layout, "full", 3) for layout in ("heads", "gathered")], marks=pytest.mark.slow),
        pytest.param(
            [("heads", "full", 2, 2), *((layout, "kept", 4) for layout in ("heads", "gathered", "2d"))],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["2 ranks", "2 ranks, more", "3 ranks", "4 ranks"],
)
def test_what_is_predicted_for_a_shared_row_is_what_a_rank_holds(cases):
    _, _, ranks, *more = cases[0]
    found = on_ranks(ranks * (more[0] if more else 1), measured, cases, LENGTH)
    for case, *peaks in zip(cases, *found):
        foreseen = forecast(run(*case), LENGTH, device=CPU).at(LENGTH).device
        assert foreseen == pytest.approx(max(peaks), rel=0.05), f"{case}: {foreseen / max(peaks):.4f}"


@pytest.mark.parametrize(
    "grid", [Grid(heads=h, gathered=r) for h in (1, 2, 3, 4, 8) for r in (1, 2, 3, 5) if h * r > 1]
)
@pytest.mark.parametrize("wanted", [100, 5000, 10**6])
def test_every_share_of_a_traced_row_is_a_multiple_of_its_unit(grid, wanted):
    row = traced_row(wanted, lambda tokens: grid.tokens(tokens)[0])
    assert row.distinguishes and row.tokens <= max(wanted, 11 * row.multiple)
    for ranges in (*grid.tokens(row.tokens), *grid.row_tokens(row.tokens)):
        assert all(part.start % row.unit == 0 and part.stop % row.unit == 0 for part in ranges)
    assert sum(map(len, grid.tokens(row.tokens)[0])) <= LONG


def test_a_row_that_no_rank_shares_is_traced_as_it_was():
    for wanted in (2, 200, 4096, 10**6):
        assert traced_row(wanted, lambda tokens: (range(tokens),)) == TracedRow(unit=traced_length(wanted))


@pytest.mark.parametrize(
    "case",
    [
        ("gathered", "kept", 4),
        ("heads", "full", 3),
        pytest.param(("heads", "coded", 2), marks=pytest.mark.slow),
        pytest.param(("heads", "tiled, recomputed", 2, 2), marks=pytest.mark.slow),
        pytest.param(("2d", "full", 6), marks=pytest.mark.slow),
    ],
)
def test_a_step_of_any_length_is_read_from_one_trace_of_a_shared_row(case):
    settings = run(*case, on=pretend.NAME)
    short, long = forecast(settings, 1500), forecast(settings, 6000)
    for length in (1000, 5000, 50_000):
        assert short.at(length).device == pytest.approx(long.at(length).device, rel=0.01)


def test_a_forecast_is_of_complete_rows():
    shared, alone = (
        forecast(subject(llama(num_hidden_layers=2), [tr.Full(), *more], world=n, sizes=sizes), 2000)
        for more, n, sizes in (
            ([tr.Ulysses(), tr.Shard()], 2, {"shard": 1, "sequence": 2}),
            ([], 1, {}),
        )
    )
    limit = alone.at(4096).device - alone.reserved + shared.reserved
    longest = shared.longest(limit)
    assert 1.7 < longest / 4096 < 3.0
    assert shared.at(longest).device <= limit < shared.at(longest + 256).device
