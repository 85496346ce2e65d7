"""What cannot be run in tiles exactly is an error that says so: from the plan, or at the first step at the latest."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import nn

import treering as tr
from tests.ranks import on_ranks
from tests.techniques.tiling.test_tile import random
from tests.toy import rows
from tests.zoo import build
from treering.anatomy import examine
from treering.core.errors import PlanError
from treering.technique import Claim, Stage
from treering.techniques.tiling import TiledBlock, TiledLoss, TiledMLP, block
from treering.techniques.tiling.tile import TiledRegion


class Centred(nn.Linear):
    def forward(self, x):
        return super().forward(x - x.mean(0))


class Looking(nn.Linear):
    def forward(self, x):
        return super().forward(x) + x.roll(1, 0)


class Counting(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class Talking(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        dist.all_reduce(y)
        return y


def call(module, size=4):
    return TiledRegion("layers.0.mlp", [module], "tiledmlp")(module, random(20, 8), size=size)


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (Centred(8, 8), "depends on the others"),
        (Looking(8, 8), "depends on the others"),
        (Counting(8, 8), "changes a buffer"),
    ],
)
def test_the_first_call_finds_what_tiles_would_change(module, why):
    with pytest.raises(PlanError, match=why):
        call(module)


def test_what_is_found_names_the_module_and_the_setting():
    with pytest.raises(PlanError, match=r"tiledmlp: layers\.0\.mlp cannot be run in tiles") as error:
        call(Centred(8, 8))
    assert error.value.settings == ("tiledmlp",)


def test_even_a_single_tile_is_checked_because_the_next_batch_may_be_longer():
    with pytest.raises(PlanError, match="depends on the others"):
        call(Centred(8, 8), size=1000)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rounding_and_dropout_are_no_reason_to_refuse(dtype):
    x = random(40, 512, dtype=dtype)
    for module in (nn.Linear(512, 512, dtype=dtype), nn.Sequential(nn.Linear(512, 64, dtype=dtype), nn.Dropout(0.5))):
        state = torch.get_rng_state()
        TiledRegion("mlp", [module], "tiledmlp").check.inspect(module, [x], 1, "cat")
        assert torch.equal(torch.get_rng_state(), state), "looking does not use up random numbers"


def talk():
    call(Talking(8, 8))


def test_a_collective_inside_is_refused_before_it_is_sent():
    with pytest.raises(AssertionError, match="communicates with other ranks"):
        on_ranks(1, talk)


def adapters_in_their_own_units():
    tr.compose(build("llama"), [tr.LoRA(rank=4), TiledMLP(tile=4), tr.Shard(compute="bfloat16")], mesh=tr.mesh())


def adapters_that_a_tile_of_attention_holds():
    lora = tr.LoRA(rank=4, targets=("q_proj",))
    run = tr.compose(build("llama"), [lora, TiledBlock(tile=4), tr.Shard(compute="bfloat16")], mesh=tr.mesh())
    (ready,) = run.steps([rows(1)])
    run.loss(ready[0])


def test_an_fsdp_unit_inside_a_tile_is_refused_with_what_to_write_instead():
    with pytest.raises(AssertionError, match=r"lora_default inside it is an FSDP unit.*dtype: base"):
        on_ranks(1, adapters_in_their_own_units)
    with pytest.raises(AssertionError, match=r"lora_default inside it is an FSDP unit.*dtype to base"):
        on_ranks(1, adapters_that_a_tile_of_attention_holds)


class Units:
    """Shards each linear for itself."""

    stage = Stage.SHARD

    def claims(self, anatomy, mesh):
        return [Claim(fqn=linear.fqn, aspect="sharding", setting="units") for linear in anatomy.linears]

    def apply(self, model, site):
        raise AssertionError("refused before")


@pytest.mark.parametrize("technique", [TiledMLP(), TiledBlock()])
def test_a_planned_unit_inside_is_refused_before_any_weight_is_read(technique):
    with pytest.raises(PlanError, match=r"units makes model\.layers\.0\.mlp\.gate_proj inside it a unit"):
        tr.compose(build("llama"), [tr.Full(), technique, Units()])


def test_two_tilings_of_one_mlp_are_a_conflict():
    with pytest.raises(PlanError, match="tiledmlp and tiledblock both replace the forward"):
        tr.compose(build("llama"), [tr.Full(), TiledMLP(), TiledBlock()])


@pytest.mark.parametrize("technique", [TiledMLP(), TiledBlock()])
def test_a_block_without_a_feed_forward_part_is_an_unknown_layout(technique):
    anatomy = examine(build("llama"))
    first = replace(anatomy.blocks[0], mlp=None)
    left = {name: p for name, p in anatomy.parameters.items() if p.block != 0 or p.role != "mlp"}
    with pytest.raises(PlanError, match=r"model\.layers\.0 of this llama model was not found.*recompute and tiledloss"):
        technique.claims(replace(anatomy, blocks=(first, *anatomy.blocks[1:]), parameters=left), None)


def test_another_way_of_mixing_tokens_is_an_unknown_layout():
    anatomy = examine(build("llama"))
    first = replace(anatomy.blocks[0], mixer="other", mixer_class="Mamba")
    with pytest.raises(PlanError, match=r"model\.layers\.0 meet in Mamba.*use tiledmlp instead"):
        TiledBlock().claims(replace(anatomy, blocks=(first, *anatomy.blocks[1:])), None)


def test_an_attention_with_unknown_projections_is_refused_when_applied(monkeypatch):
    monkeypatch.setattr(block, "READERS", (("qkv",),))
    with pytest.raises(PlanError, match=r"model\.layers\.0 .*none of the known projections, but q_proj, k_proj"):
        tr.compose(build("llama"), [tr.Full(), TiledBlock()])


@pytest.mark.parametrize(
    ("meddle", "what"),
    [
        (lambda x: torch.tanh(x), "tanh is applied"),
        (lambda x: x * torch.ones(()), "multiplied by a Tensor"),
        (lambda x: x + 1.0, "a float is added"),
        (lambda x: x.mean(), "its mean is asked for"),
    ],
)
def test_a_block_that_does_something_else_between_norm_and_mlp_is_refused_at_its_first_forward(meddle, what):
    model = build("llama")
    run = tr.compose(model, [tr.Full(), TiledBlock(tile=4)])
    norm = run.model.model.layers[1].post_attention_layernorm
    lazy = norm.forward
    norm.forward = lambda x: meddle(lazy(x))
    (ready,) = run.steps([rows(1)])
    with pytest.raises(PlanError, match=rf"model\.layers\.1 .*{what}.* Use tiledmlp instead"):
        run.loss(ready[0])


def test_logits_that_are_not_understood_are_refused():
    anatomy = examine(build("llama"))
    with pytest.raises(PlanError, match="its forward uses logits_bias"):
        TiledLoss().claims(replace(anatomy, head=replace(anatomy.head, unknown=("logits_bias",))), None)


def test_experts_that_do_not_know_of_others_elsewhere_are_not_run_in_groups():
    with pytest.raises(PlanError, match=r"no number for experts that are elsewhere.*tiledmlp\.experts to tokens"):
        tr.compose(build("gpt_oss"), [tr.Full(), TiledMLP(experts="groups")])
