"""The dtype pin: adapters in float32 stay there, in storage and in arithmetic, whatever surrounds them."""

import pytest
import torch
from torch.nn import functional as F

import treering as tr
from tests.ranks import on_ranks
from tests.same import assert_all_same
from tests.toy import gradients, rows
from tests.zoo import build
from treering.core.sharded import gather

TARGETS = ("q_proj", "down_proj")


def narrow(model):
    """Parameters alone: `model.bfloat16()` would round the rotary frequencies as well."""
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    return model


def hand_made(model, rank, batches):
    """Gradients of the same model with adapters written out by hand in float32, without any of our machinery."""
    from treering.core.seeds import generator
    from treering.plan.batches import trained_tokens

    pairs = {}
    for name, module in model.named_modules():
        if not name.endswith(TARGETS):
            continue
        A = torch.empty(rank, module.in_features)
        bound = module.in_features**-0.5
        A.uniform_(-bound, bound, generator=generator(0, "lora", "default", f"{name}.weight"))
        B = torch.full((module.out_features, rank), 0.01)
        pair = pairs[name] = A.requires_grad_(), B.requires_grad_()

        def forward(x, module=module, pair=pair):
            return F.linear(x, module.weight, module.bias) + F.linear(F.linear(x.float(), pair[0]), pair[1]).to(x.dtype)

        module.forward = forward
    count = sum(trained_tokens(b["labels"]) for b in batches)
    for batch in batches:
        logits = model(batch["input_ids"]).logits[:, :-1].float()
        F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum").div(count).backward()
    return {f"{n}.lora_default.{k}": t.grad for n, pair in pairs.items() for k, t in zip("AB", pair)}


def ours(world, shard, **settings):
    wide = build("llama", attention="sdpa")
    model = narrow(wide) if settings.pop("stored", True) else wide
    techniques = [tr.LoRA(rank=4, targets=TARGETS), *([tr.Shard(**settings)] if shard else [])]
    run = tr.compose(model, techniques)
    with torch.no_grad():
        for name, parameter in run.trainable():
            if name.endswith(".B"):
                parameter.fill_(0.01)
    rank = torch.distributed.get_rank() if world > 1 else 0
    found = gradients(run, rows(4)[rank::world])
    dtypes = {p.dtype for _, p in run.trainable()} | {g.dtype for g in found.values()}
    return found, str(dtypes), run.explain()


def test_float32_adapters_in_a_bfloat16_model_are_float32_throughout():
    found, dtypes, _ = ours(1, False)
    assert dtypes == "{torch.float32}"
    assert_all_same(found, hand_made(narrow(build("llama", attention="sdpa")), 4, rows(4)), 1e-6)
    rounded = [g for g in found.values() if torch.equal(g, g.bfloat16().float())]
    assert not rounded, "a gradient has no digits beyond bfloat16"


def sharded(settings):
    return ours(2, True, **settings)


@pytest.mark.parametrize(
    "settings",
    [{}, {"compute": "bfloat16"}, {"compute": "bfloat16", "stored": False}],
    ids=["stored", "cast", "wide base"],
)
def test_on_two_ranks_they_stay_float32_inside_bfloat16_units(settings):
    # whether the base is stored in bfloat16, or in float32 and gathered in bfloat16, is the same arithmetic
    wanted = hand_made(narrow(build("llama", attention="sdpa")), 4, rows(4))
    for found, dtypes, text in on_ranks(2, sharded, settings):
        assert dtypes == "{torch.float32}"
        assert_all_same(found, wanted, 1e-6)
        assert ("4 modules with a pinned dtype have units of their own" in text) == ("stored" in settings)


def policies():
    from torch.distributed.fsdp import FSDPModule

    run = tr.compose(
        build("llama").double(),  # cast to float32, and so adapters of another dtype need units of their own
        [tr.LoRA(rank=4, targets=TARGETS, dtype="bfloat16"), tr.Shard(compute="float32", reshard=False)],
    )
    found = {}
    for name, module in run.model.named_modules():
        if isinstance(module, FSDPModule) and name.endswith("lora_default"):
            group = module._get_fsdp_state()._fsdp_param_group
            found[name] = (
                str(group.mp_policy.param_dtype),
                str(group.mp_policy.reduce_dtype),
                group._reshard_after_forward,
            )
    return found


def test_a_unit_of_its_own_still_follows_reduce_and_reshard():
    """Gradients pinned to bfloat16 are summed over ranks in float32, as `reduce` says; `reshard: false` holds too."""
    for found in on_ranks(2, policies):
        assert len(found) == 4 and set(found.values()) == {("torch.bfloat16", "torch.float32", False)}


def mixed(_):
    run = tr.compose(narrow(build("llama")), [tr.LoRA(rank=4, targets=TARGETS), tr.Full(train=("*norm*",)), tr.Shard()])
    found = gradients(run, rows(4)[torch.distributed.get_rank() :: 2])
    return {name: gather(p).dtype for name, p in run.trainable()}, {n: str(g.dtype) for n, g in found.items()}


def test_trainable_parameters_of_two_dtypes_in_one_block_are_kept_apart():
    for stored, computed in on_ranks(2, mixed, None):
        assert {str(d) for n, d in stored.items() if "lora" in n} == {"torch.float32"}
        assert {str(d) for n, d in stored.items() if "norm" in n} == {"torch.bfloat16"}
        assert {n: str(d) for n, d in stored.items()} == computed


TILES = {
    "tiledmlp": (tr.TiledMLP(tile=5),),
    "tiledblock": (tr.TiledBlock(tile=5), tr.TiledLoss(tile=5), tr.Recompute(offload="cpu")),
}


def tiled(techniques, arch="llama"):
    distributed = torch.distributed.is_initialized()
    rank, world = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if distributed else (0, 1)
    run = tr.compose(narrow(build(arch, attention="sdpa")), [tr.LoRA(rank=4, targets=TARGETS), *techniques])
    with torch.no_grad():
        for name, parameter in run.trainable():
            if name.endswith(".B"):
                parameter.fill_(0.01)
    found = gradients(run, rows(4)[rank::world])
    return {name: gather(g) for name, g in found.items()}


@pytest.mark.parametrize("arch", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("name", TILES)
def test_float32_adapters_inside_tiles_under_mixed_precision(name, arch):
    """The usual recipe for long texts: two ranks give the gradients of one process, all of them in float32."""
    wanted = tiled(TILES[name], arch)
    for found in on_ranks(2, tiled, (*TILES[name], tr.Shard(compute="bfloat16")), arch):
        assert {g.dtype for g in found.values()} == {torch.float32}
        assert_all_same(found, wanted, 1e-6)
