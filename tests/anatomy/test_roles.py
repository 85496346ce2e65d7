"""Every parameter has exactly one role, and an anatomy is data about the plain model only."""

import json
import subprocess
import sys
from collections import Counter
from dataclasses import asdict

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.zoo import ARCHITECTURES, WINDOW, build
from treering.anatomy import ROLES, Anatomy, examine
from treering.core.errors import PlanError

MIXTURES = {"qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss"}


def _meta(name: str, tied: bool) -> Anatomy:
    config = ARCHITECTURES[name]()
    config.tie_word_embeddings = tied
    with torch.device("meta"):
        return examine(AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_parameter_has_one_role(name):
    model = build(name)
    anatomy = examine(model)
    plain = dict(model.named_parameters())
    assert list(anatomy.parameters) == list(plain)
    for parameter in anatomy.parameters.values():
        assert parameter.role in ROLES
        assert parameter.shape == tuple(plain[parameter.name].shape)
        assert parameter.name.startswith(f"{parameter.module}.")
    roles = Counter(p.role for p in anatomy.parameters.values())
    assert {"embedding", "attention", "norm"} <= roles.keys()
    assert not {"mixer", "other"} & roles.keys()
    assert ("experts" in roles) == ("router" in roles) == (name in MIXTURES)
    assert ("mlp" in roles) == (name not in {"qwen3_moe", "mixtral", "gpt_oss"})
    assert ("position" in roles) == (name == "gpt2")
    assert ("sink" in roles) == (name == "gpt_oss")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_matrices_of_blocks_belong_to_linears_or_experts_or_routers(name):
    anatomy = examine(build(name))
    matrices = {p.name for p in anatomy.parameters.values() if p.block is not None and len(p.shape) > 1}
    linears = {linear.weight for linear in anatomy.linears if linear.block is not None}
    stacked = {p for experts in anatomy.experts for p in (*experts.stacked, *experts.biases)}
    routers = {f"{experts.router}.weight" for experts in anatomy.experts}
    assert matrices == linears | stacked | routers


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_blocks_hold_their_attention_and_their_feed_forward_part(name):
    anatomy = examine(build(name))
    assert [block.index for block in anatomy.blocks] == [0, 1]
    for block, attention in zip(anatomy.blocks, anatomy.attentions, strict=True):
        assert block.mixer == "attention" and block.attention == attention.fqn
        assert attention.fqn.startswith(f"{block.fqn}.") and attention.block == block.index
        assert block.mlp is not None and block.mlp.startswith(f"{block.fqn}.")
        assert attention.interface


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_meta_device_is_enough(name, tied):
    assert _meta(name, tied) == examine(build(name, tied=tied))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_tied_head_has_no_parameter_of_its_own(name):
    tied, free = (examine(build(name, tied=tied)) for tied in (True, False))
    assert tied.head is not None and free.head is not None
    tokens = f"{tied.embeddings[0]}.weight"
    assert tied.head.tied_to == tied.head.weight == tokens
    assert not tied.with_role("head") and tied.parameters[tokens].role == "embedding"
    assert free.head.tied_to is None
    assert [p.name for p in free.with_role("head")] == [free.head.weight]
    assert [linear.role for linear in tied.linears if linear.weight == tokens] == ["head"]


def test_sliding_and_full_layers_alternate_as_the_config_says():
    for name in ("gemma2", "gemma3", "gpt_oss"):
        assert [part.sliding_window for part in examine(build(name)).attentions] == [WINDOW, None]
    assert [part.sliding_window for part in examine(build("mistral")).attentions] == [WINDOW, WINDOW]


def test_latent_attention_is_described_as_it_is_computed():
    first = examine(build("deepseek_v3")).attentions[0]
    assert (first.heads, first.kv_heads, first.head_dim, first.value_dim) == (4, 4, 16, 12)


def test_only_gpt_oss_stacks_its_experts_the_other_way_round():
    layouts = {name: examine(build(name)).experts[-1] for name in MIXTURES}
    assert {name for name, part in layouts.items() if part.transposed and part.interleaved and part.biases} == {
        "gpt_oss"
    }
    assert {(part.number, part.fused, part.gated) for part in layouts.values()} == {(4, True, True)}


def test_an_anatomy_is_plain_data():
    assert json.dumps(asdict(examine(build("gpt_oss"))))


def test_heads_that_contradict_the_projections_are_refused():
    model = build("llama")
    model.model.layers[1].self_attn.num_key_value_groups = 4
    with pytest.raises(
        PlanError, match=r"layers\.1\.self_attn .*1 key-value heads.*make 8 rows of k_proj, which has 16"
    ):
        examine(model)


def test_importing_anatomy_does_not_import_torch():
    code = "import sys, treering.anatomy; raise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
