"""What a step of the standard configurations needs must not grow unnoticed."""

import json

import pytest

from tests.plan.memory_peaks import FILE, STANDARD, peak

KNOWN = json.loads(FILE.read_text("utf-8"))


@pytest.mark.parametrize("name", STANDARD)
def test_no_change_raises_the_peak_of_a_standard_configuration(name):
    measured = peak(name)
    assert measured <= 1.02 * KNOWN[name], f"{measured:.2f} GiB, and it was {KNOWN[name]:.2f}"
    assert measured >= 0.90 * KNOWN[name], "far less than it was: write it down (python -m tests.plan.memory_peaks)"


def test_every_number_that_is_kept_is_of_a_configuration_there_is():
    assert set(KNOWN) == set(STANDARD)
