"""What a user may say, and what is refused before any weight is read."""

import pytest

import treering as tr
from tests.zoo import build
from treering.anatomy import examine
from treering.techniques.recompute import Recompute
from treering.techniques.recompute.settings import read_bytes

BAD = {
    "first_blocks is about what is offloaded, and offload is none; set offload to cpu": {"first_blocks": 2},
    "budget is about what is offloaded, and offload is none; set offload to cpu": {"budget": "1GiB"},
    "prefetch is about what is offloaded, and offload is none": {"prefetch": 2},
    "prefetch is 0; it is a number of blocks, at least 1": {"offload": "cpu", "prefetch": 0},
    "first_blocks is 0; it is at least 1. To offload nothing, set offload to none": {
        "offload": "cpu",
        "first_blocks": 0,
    },
    "both limit how much is offloaded": {"offload": "cpu", "first_blocks": 1, "budget": "1GiB"},
    "budget is '64'; write a size in KiB, MiB, GiB or TiB, such as 64GiB": {"offload": "cpu", "budget": "64"},
    "budget is '0GiB'": {"offload": "cpu", "budget": "0GiB"},
    r"write a list: \[attention\]": {"keep": "attention"},
    "keep has 'mlp'; it may have attention and all_to_all": {"keep": ("mlp",)},
}


@pytest.mark.parametrize("message", BAD)
def test_settings_that_contradict_each_other_say_what_to_write_instead(message):
    with pytest.raises(tr.ConfigError, match=message) as caught:
        Recompute(**BAD[message])
    assert caught.value.field


def test_sizes_are_read_as_people_write_them():
    assert read_bytes("64GiB") == 64 * 2**30 and read_bytes(" 1.5 MiB ") == 3 * 2**19


def composed(arch="llama", **settings):
    return tr.compose(build(arch), [tr.Full(), Recompute(**settings)])


def test_more_blocks_than_there_are_is_refused():
    with pytest.raises(tr.PlanError, match="first_blocks is 3 and the model has 2 blocks; write at most 2"):
        composed(offload="cpu", first_blocks=3)


def test_all_to_all_where_nothing_is_exchanged_is_refused():
    with pytest.raises(tr.PlanError, match="the mesh has sequence=1 and expert=1"):
        composed(keep=("all_to_all",))


def test_a_model_that_recomputes_already_is_refused():
    model = build("llama")
    model.gradient_checkpointing_enable()
    with pytest.raises(tr.PlanError, match=r"gradient_checkpointing_disable\(\)"):
        tr.compose(model, [tr.Full(), Recompute()])


def test_each_block_is_a_region_that_nobody_else_may_own():
    anatomy = examine(build("llama"))
    assert {(c.fqn, c.aspect, c.exclusive) for c in Recompute().claims(anatomy, None)} == {
        ("model.layers.0", "region", True),
        ("model.layers.1", "region", True),
    }
    with pytest.raises(tr.PlanError, match=r"both own the recomputed region of model\.layers\.0"):
        tr.compose(build("llama"), [tr.Full(), Recompute(), Recompute(offload="cpu")])


def test_explain_tells_what_is_kept_and_where():
    text = composed(keep=("attention",), offload="cpu", budget="2GiB").explain()
    assert "2 blocks are computed again in the backward" in text and "kept: attention" in text
    assert "inputs of 1 blocks are offloaded to host memory, at most 2GiB a rank" in text
