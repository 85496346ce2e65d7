from math import ceil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import treering as tr
from tests.zoo import build
from treering.core.errors import ConfigError
from treering.objectives import CrossEntropy
from treering.techniques.tiling import TiledBlock, TiledLoss, TiledMLP, losses
from treering.techniques.tiling.tile import ALIGNED, SHORTEST, bounds, tile_length


@given(total=st.integers(0, 5000), length=st.integers(1, 3000))
def test_tiles_are_contiguous_and_all_but_the_last_of_one_length_for_any_batch(total, length):
    cuts = bounds(total, length)
    lengths = [stop - start for start, stop in cuts]
    assert [start for start, _ in cuts] == [0, *(stop for _, stop in cuts[:-1])] and cuts[-1][1] == total
    assert set(lengths[:-1]) <= {length} and lengths[-1] <= length and (min(lengths) > 0 or total == 0)
    assert len(cuts) == max(1, ceil(total / length)), "as few as can be"


def test_fewer_tokens_than_tiles_asked_for_make_tiles_of_one():
    assert bounds(3, 1) == ((0, 1), (1, 2), (2, 3))
    assert bounds(0, 7) == ((0, 0),)


def test_a_budget_becomes_a_number_of_tokens_that_it_holds():
    length = tile_length("budget", 1.0, 6 * 14336 * 2, 4096)
    assert length * 6 * 14336 * 2 <= 2**30 < (length + ALIGNED) * 6 * 14336 * 2 and length % ALIGNED == 0
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


@pytest.mark.parametrize(
    ("techniques", "lengths"),
    [
        ([tr.Full(), TiledLoss()], [512]),  # of a head that trains: as long as 2,048
        ([tr.Full(), TiledLoss(budget=1e-4)], [256, 256]),
        ([tr.LoRA(targets=("*.q_proj",), rank=2, dtype="base"), TiledLoss()], [256, 256]),
    ],
)
def test_a_head_that_trains_has_longer_tiles_unless_the_budget_is_set(techniques, lengths, monkeypatch):
    monkeypatch.setattr(losses, "BUDGET", 1e-4)
    seen = []

    class Recorded(CrossEntropy):
        def __call__(self, logits_NV, rows):
            seen.append(len(logits_NV))
            return super().__call__(logits_NV, rows)

    run = tr.compose(build("llama", dtype=torch.float64), techniques, objective=Recorded())
    ids = torch.arange(513)[None] % 120
    (batch,) = next(iter(run.steps([[{"input_ids": ids, "labels": ids}]])))
    with torch.no_grad():
        run.loss(batch)  # the first call of a head is checked on a few tokens
    seen.clear()
    run.loss(batch)
    assert seen == lengths
