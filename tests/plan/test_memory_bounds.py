"""What makes proposals quick: a row as short as tiles allow, and what a few blocks show of all of them."""

import sys

import pytest
import torch

import treering as tr
from tests.plan.memory_toys import llama, subject
from treering.memory import forecast
from treering.memory.forecast import TooLarge
from treering.memory.timeline import LONG, SHORT

DEEP = llama(num_hidden_layers=16)
LENGTH = 50_000
SWITCHES = {
    "nothing": [tr.Full()],
    "frozen embedding": [tr.LoRA(dtype="base")],
    "tiled blocks": [tr.Full(), tr.TiledBlock(tile=4000), tr.TiledLoss(tile=4000)],
    "recompute": [tr.Full(), tr.Recompute(), tr.TiledLoss(tile=4000)],
    "offload": [tr.Full(), tr.Recompute(offload="cpu"), tr.TiledBlock(tile=4000), tr.TiledLoss(tile=4000)],
}


@pytest.mark.parametrize("name", SWITCHES)
def test_a_few_blocks_never_show_more_than_all_need(name):
    settings = subject(DEEP, [*SWITCHES[name], tr.Shard()], world=8)
    like = forecast(settings, LENGTH)
    needed, bound = like.at(LENGTH).device, like.at_least(LENGTH)
    assert 0 < bound <= needed
    if name in ("nothing", "recompute"):
        assert bound > 0.8 * needed, "what is kept is most of it, and counted"
    with pytest.raises(TooLarge):
        forecast(settings, LENGTH, like=like, most=0.99 * bound)


@pytest.mark.parametrize(("tile", "unit"), [(4000, SHORT), (9000, LONG)])
def test_a_row_is_as_short_as_tiles_allow(tile, unit, monkeypatch):
    settings = subject(DEEP, [tr.Full(), tr.TiledMLP(tile=tile), tr.Recompute()], dtype=torch.bfloat16)
    found = forecast(settings, LENGTH)
    assert [one.row.unit for one in found.traces] == [unit, unit]
    monkeypatch.setattr(sys.modules[TooLarge.__module__], "SHORT", LONG)
    assert found.at(LENGTH).device == pytest.approx(forecast(settings, LENGTH).at(LENGTH).device, rel=0.01)
