"""Patterns name linears and parameters; one that names nothing is an error that helps."""

import pytest

from tests.zoo import build
from treering.anatomy import examine, matches, select, select_parameters
from treering.core.errors import PlanError


@pytest.mark.parametrize(
    ("name", "pattern", "hit"),
    [
        ("model.layers.0.self_attn.q_proj", "q_proj", True),
        ("model.layers.0.self_attn.q_proj.weight", "q_proj", True),
        ("model.layers.0.self_attn.q_proj.bias", "q_proj", True),
        ("model.layers.0.self_attn.q_proj", "self_attn", False),
        ("model.layers.0.self_attn.q_proj", "q_pro", False),
        ("model.layers.0.mlp.experts.gate_up_proj", "gate_up_proj", True),
        ("model.layers.0.self_attn.q_proj.weight", "weight", True),
        ("model.layers.10.mlp.up_proj", "model.layers.1.*", False),
        ("model.layers.10.mlp.up_proj", "*.mlp.*", True),
        ("model.layers.10.mlp.up_proj", "mlp.up_proj", False),
        ("lm_head", "lm_head", True),
        ("weight", "weight", True),
    ],
)
def test_patterns(name, pattern, hit):
    assert matches(name, pattern) is hit


def test_linears_are_selected_once_in_the_models_order():
    anatomy = examine(build("llama"))
    chosen = select(anatomy, ["down_proj", "*.self_attn.q_proj", "q_proj"])
    assert [linear.fqn for linear in chosen] == [
        f"model.layers.{i}.{name}" for i in (0, 1) for name in ("self_attn.q_proj", "mlp.down_proj")
    ]
    assert select(anatomy, "lm_head")[0].role == "head"


def test_parameters_are_selected_by_the_module_that_holds_them():
    anatomy = examine(build("gpt_oss"))
    names = {p.name.rpartition(".")[2] for p in select_parameters(anatomy, "experts")}
    assert names == {"gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"}


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("q_prj", "Did you mean 'q_proj'"),
        ("self_attn.q_proj", r"Did you mean '\*\.self_attn\.q_proj'"),
        ("zzz", "There are"),
    ],
)
def test_a_pattern_without_a_match_tells_what_there_is(pattern, hint):
    with pytest.raises(PlanError, match=hint) as error:
        select(examine(build("llama")), ["q_proj", pattern])
    assert "down_proj (2)" in str(error.value) and "llama" in str(error.value)
