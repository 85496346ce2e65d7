from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treering.core.errors import ConfigError
from treering.techniques.tiling import TiledBlock, TiledLoss, TiledMLP
from treering.techniques.tiling.tile import ALIGNED, SHORTEST, bounds, tile_length


@given(total=st.integers(0, 5000), length=st.integers(1, 3000))
def test_tiles_are_contiguous_short_enough_and_balanced(total, length):
    cuts = bounds(total, length)
    lengths = [stop - start for start, stop in cuts]
    assert [start for start, _ in cuts] == [0, *(stop for _, stop in cuts[:-1])] and cuts[-1][1] == total
    assert max(lengths) <= length and (min(lengths) > 0 or total == 0)
    unit = ALIGNED if length >= 8 * ALIGNED else 1
    assert max(lengths) - min(lengths) < 2 * unit
    assert all(start % unit == 0 for start, _ in cuts)
    assert len(cuts) == max(1, ceil(ceil(total / unit) / (length // unit))), "as few as can be"


def test_fewer_tokens_than_tiles_asked_for_make_tiles_of_one():
    assert bounds(3, 1) == ((0, 1), (1, 2), (2, 3))
    assert bounds(0, 7) == ((0, 0),)


def test_a_budget_becomes_a_number_of_tokens_that_it_holds():
    length = tile_length("budget", 1.0, 6 * 14336 * 2, 4096)
    assert length * 6 * 14336 * 2 <= 2**30 < (length + 1) * 6 * 14336 * 2
    assert tile_length("budget", 1e-6, 10**6, 4096) == SHORTEST


def test_the_compatible_mode_makes_as_many_tiles_as_the_sequence_is_longer_than_the_model_is_wide():
    assert len(bounds(10_000, tile_length("hidden", 1.0, 1, 4096))) == -(-10_000 // 4096)


@pytest.mark.parametrize("kind", [TiledMLP, TiledBlock, TiledLoss])
@pytest.mark.parametrize(("settings", "field"), [({"tile": 0}, "tile"), ({"budget": 0.0}, "budget")])
def test_impossible_settings_are_refused_by_name(kind, settings, field):
    with pytest.raises(ConfigError) as error:
        kind(**settings)
    assert error.value.field == field


@pytest.mark.parametrize(
    ("settings", "field"), [({"label_smoothing": 1.0}, "label_smoothing"), ({"z_loss": -0.1}, "z_loss")]
)
def test_impossible_losses_are_refused_by_name(settings, field):
    with pytest.raises(ConfigError) as error:
        TiledLoss(**settings)
    assert error.value.field == field
