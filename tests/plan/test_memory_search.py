"""The smallest set of switches, and how a forecast is drawn: pure functions."""

from dataclasses import dataclass, replace
from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from treering.memory import Peak
from treering.memory.picture import LETTERS, bars, render, table
from treering.memory.search import Switch, smallest
from treering.memory.tracker import CATEGORIES

GIB = 2**30


@dataclass(frozen=True)
class Run:
    on: frozenset[str] = frozenset()


def switch(name: str, needs: str | None = None) -> Switch[Run]:
    def turn(run: Run) -> Run | None:
        return None if name in run.on or (needs and needs not in run.on) else replace(run, on=run.on | {name})

    return Switch(name=name, config=f"{name}:", on=turn)


SWITCHES = (switch("loss"), switch("recompute"), switch("tiles"), switch("offload", needs="recompute"))


@given(st.lists(st.integers(0, 50), min_size=4, max_size=4), st.integers(0, 120))
def test_no_smaller_set_fits_than_the_one_that_is_named(savings, room):
    saves = dict(zip(("loss", "recompute", "tiles", "offload"), savings))
    needs = lambda run: 100 - sum(saves[name] for name in run.on)  # noqa: E731
    chosen = smallest(Run(), SWITCHES, lambda run: needs(run) <= room)
    if chosen is None:
        assert needs(Run(frozenset(saves))) > room
        return
    names = frozenset(s.name for s in chosen)
    assert needs(Run(names)) <= room
    for count in range(1, len(names)):
        for fewer in combinations(saves, count):
            possible = "offload" not in fewer or "recompute" in fewer
            assert not possible or needs(Run(frozenset(fewer))) > room


def test_what_is_on_already_is_not_proposed():
    chosen = smallest(Run(frozenset({"loss"})), SWITCHES, lambda run: {"loss", "tiles"} <= run.on)
    assert [s.name for s in chosen] == ["tiles"]


def test_a_run_is_tried_once():
    tried = []
    smallest(Run(), SWITCHES, lambda run: tried.append(run) or len(run.on) > 2)
    assert len(tried) == len(set(tried))


def peak(**gigabytes: float) -> Peak:
    categories = {name: gigabytes.get(name, 0.0) * GIB for name in CATEGORIES}
    return Peak(phases=dict.fromkeys(("forward", "loss", "backward", "step"), categories), host=0.0, reserved=GIB)


def test_a_bar_is_as_long_as_what_is_held_and_ends_where_the_device_does():
    (bar, *_) = bars(peak(parameters=31, activations=32), 32 * GIB)
    drawn = bar.removeprefix("forward").strip()
    assert drawn.index("|") == 32
    assert drawn.replace("|", "") == "·" + "P" * 31 + "A" * 32


def test_what_fits_leaves_the_rest_of_the_device_empty():
    (bar, *_) = bars(peak(parameters=15), 64 * GIB)
    assert bar == "forward  " + "·" + "P" * 15 + " " * 48 + "|"


def test_every_category_has_a_letter_of_its_own_and_a_row_where_it_holds_something():
    assert len(set(LETTERS.values())) == len(CATEGORIES)
    for name in CATEGORIES:
        rows = table(peak(**{name: 1.5}))
        assert [row[2 : 2 + len(name)] for row in rows[1:-1]] == [name]
        assert rows[-1].split()[1:] == ["1.50"] * 4


def test_the_verdict_says_how_much_is_missing_or_left():
    assert "4.0 GiB on each rank of 8.0: fits, 4.0 GiB to spare" in render(peak(loss=3), 8 * GIB, 100)
    assert "100 tokens need 4.0 GiB on each rank of 2.0: does NOT fit" in render(peak(loss=3), 2 * GIB, 100)
    assert "|" not in render(peak(loss=3), None, 100)


def test_the_peak_is_the_sum_of_what_it_is_made_of():
    text = render(peak(loss=3, activations=1.5), None, 100)
    assert "100 tokens need 5.5 GiB on each rank" in text
    assert "at its peak, in forward: loss 3.0 GiB, activations 1.5 GiB, reserved 1.0 GiB" in text
