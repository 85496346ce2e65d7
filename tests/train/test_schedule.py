from itertools import pairwise

import pytest

from treering.train.config import Schedule
from treering.train.optimizers import rate


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "constant"])
def test_it_warms_up_to_the_peak_and_never_stands_at_zero(name):
    schedule = Schedule(name=name, warmup=4, decay=0.5)
    rates = [rate(schedule, step, 20) for step in range(20)]
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8]) and rates[4] == 1.0
    assert min(rates) > 0 and max(rates) == 1.0


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
def test_it_falls_to_the_final_share(name):
    schedule = Schedule(name=name, warmup=0, decay=0.5, final=0.1)
    rates = [rate(schedule, step, 100) for step in range(100)]
    assert all(a >= b for a, b in pairwise(rates)) and 0.1 < rates[-1] < 0.13


def test_wsd_stays_at_the_peak_until_it_decays():
    schedule = Schedule(name="wsd", warmup=0, decay=10)
    assert [rate(schedule, step, 40) for step in range(30)] == [1.0] * 30
    assert rate(schedule, 35, 40) == pytest.approx(0.5)


def test_the_halves_of_a_cosine_meet_in_the_middle():
    assert rate(Schedule(warmup=0), 50, 100) == pytest.approx(0.5)


def test_one_step_is_enough():
    assert 0 < rate(Schedule(), 0, 1) <= 1.0
