"""Which modules become FSDP units, and when they hold gathered parameters."""

import pytest
import torch

import treering as tr
from tests.ranks import on_ranks
from tests.toy import rows
from tests.zoo import ARCHITECTURES, build
from treering.anatomy import examine
from treering.techniques.shard.units import plan_units


def owner(name, units):
    """The innermost unit that a parameter lies in."""
    inside = [(len(fqn), unit) for unit in units for fqn in unit if fqn == "" or name.startswith(f"{fqn}.")]
    return max(inside)[1]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_is_in_one_unit_and_a_tied_pair_in_one_of_two_modules(arch, tied):
    model = build(arch, tied=tied)
    anatomy = examine(model)
    units = plan_units(anatomy)
    assert units[-1] == ("",) and len({fqn for unit in units for fqn in unit}) == sum(map(len, units))
    owners = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), set()).add(owner(name, units))
    assert all(len(found) == 1 for found in owners.values()), "a parameter would be sharded twice"
    pair = (anatomy.embeddings[0], anatomy.head.fqn)
    assert (pair in units) == tied
    at_root = [n for n, _ in model.named_parameters() if owner(n, units) == ("",)]
    assert all(n.startswith(anatomy.final_norm) for n in at_root), "the root stays gathered: only the last norm is its"


def states():
    """By unit: whether its gathered parameters have been freed."""
    from torch.distributed.fsdp import FSDPModule

    def of(model):
        found = {}
        for name, module in model.named_modules():
            if isinstance(module, FSDPModule):
                group = module._get_fsdp_state()._fsdp_param_group
                if group is not None:
                    found[name] = group.is_sharded
        return found

    return of


def freed(arch, reshard):
    of = states()
    run = tr.compose(build(arch), [tr.Full(), tr.Shard(reshard=reshard)])
    [ready] = run.steps([rows(2)])
    during = {}
    run.model.lm_head.register_forward_pre_hook(lambda *_: during.update(of(run.model)))
    loss = run.loss(ready[0])
    after_forward = of(run.model)
    loss.backward()
    return during, after_forward, of(run.model)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_blocks_embeddings_and_head_are_freed_after_use(arch):
    for during, after_forward, after_backward in on_ranks(2, freed, arch, True):
        embedding = "transformer.wte" if arch == "gpt2" else "model.embed_tokens"
        blocks = [name for name in during if name.rpartition(".")[2].isdigit()]
        assert len(blocks) == 2 and all(during[name] for name in blocks)
        if arch == "llama":  # a tied pair is one unit: gathered again for the head
            assert during[embedding] and not during["lm_head"]
        assert {name for name, sharded in after_forward.items() if not sharded} == {""}
        assert all(after_backward.values())


def test_without_reshard_a_block_stays_for_its_backward():
    for _, after_forward, after_backward in on_ranks(2, freed, "llama", False):
        assert not any(after_forward.values())
        assert all(after_backward.values())


def mixed_unit():
    model = build("llama")
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = parameter.data.bfloat16()
    try:
        tr.compose(model, [tr.Full(), tr.Shard()])
    except tr.PlanError as error:
        return str(error)


def test_trainable_parameters_of_two_dtypes_in_one_unit_are_refused_before_the_first_forward():
    for text in on_ranks(2, mixed_unit):
        assert "model.layers.0" in text and "bfloat16" in text and "float32" in text and "dtype" in text


def test_without_a_mesh_or_a_launcher_shard_makes_its_own():
    [(ranks, text)] = on_ranks(1, unaided)
    assert ranks == 1 and "units over 1 ranks" in text


def unaided():
    import os

    torch.distributed.destroy_process_group()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        del os.environ[name]
    run = tr.compose(build("llama"), [tr.Full(), tr.Shard()])
    return torch.distributed.get_world_size(), run.explain()


def unsharded():
    try:
        tr.compose(build("llama"), [tr.Full()])
    except tr.PlanError as error:
        return str(error)


def test_several_ranks_without_shard_are_refused_even_if_nobody_gave_a_mesh():
    for text in on_ranks(2, unsharded):
        assert "no technique sums their gradients: add shard" in text
