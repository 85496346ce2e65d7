"""What sharding, casting and offloading do to the numbers: nothing, or exactly what was asked for."""

import pytest
import torch

import treering as tr
from tests.ranks import on_ranks
from tests.same import assert_all_same
from tests.toy import gradients, rows, train, weights
from tests.zoo import build
from treering.core.sharded import local
from treering.core.topology import data_rank


def narrow(model):
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    return model


def sharded_gradients(settings, full=None, arch="llama", stored=torch.float32, number=4):
    run = tr.compose(
        narrow(build(arch)) if stored == torch.bfloat16 else build(arch), [full or tr.Full(), tr.Shard(**settings)]
    )
    rank, ranks = data_rank(run.plan.mesh)
    found = gradients(run, rows(number)[rank::ranks])
    assert {p.dtype for _, p in run.trainable()} == {stored}
    return found


def each_alone(number=4, ranks=2):
    """Σ over ranks, in float32, of what each rank's bfloat16 arithmetic gives, without FSDP's reduction."""
    from treering.plan.batches import cross_entropy, trained_tokens, with_targets

    batches = rows(number)
    count = sum(trained_tokens(b["labels"]) for b in batches)
    total = {}
    for batch in batches:
        model = narrow(build("llama", attention="sdpa")).train()
        (cross_entropy(model, with_targets(batch)) / count).backward()
        for name, parameter in model.named_parameters():
            total[name] = total.get(name, 0) + parameter.grad.float()
    return total


def test_bfloat16_arithmetic_is_the_same_on_one_and_two_ranks_and_summed_in_float32():
    wanted = each_alone()
    settings = {"compute": "bfloat16", "reduce": "float32"}
    for world in (1, 2):
        for found in on_ranks(world, sharded_gradients, settings):
            assert {g.dtype for g in found.values()} == {torch.float32}
            assert_all_same(found, wanted, 1e-6)


def test_reduce_stored_sums_in_the_dtype_of_the_gradient_and_shows_that_the_other_does_not():
    wanted = each_alone()
    found = on_ranks(2, sharded_gradients, {"compute": "bfloat16", "reduce": "stored"})[0]
    far = [name for name, g in found.items() if (g - wanted[name]).abs().max() > 1e-4 * wanted[name].abs().max()]
    assert len(far) > 10


def test_reduce_is_a_floor_that_never_narrows():
    plain = on_ranks(2, sharded_gradients, {})[0]
    assert_all_same(on_ranks(2, sharded_gradients, {"reduce": "bfloat16"})[0], plain)


def trained(settings, technique, arch="llama"):
    run = tr.compose(build(arch), [technique, *([tr.Shard(**settings)] if settings is not None else [])])
    rank, ranks = data_rank(run.plan.mesh)
    resting = {str(local(p).device) for p in run.model.parameters()}
    train(run, [rows(6)[rank::ranks], rows(5, seed=1)[rank::ranks]], torch.optim.SGD, lr=0.2)
    norm = None
    for ready in run.steps([rows(6, seed=2)[rank::ranks]]):
        for batch in ready:
            run.loss(batch).backward()
        report = run.step(run.optimizer(torch.optim.SGD, lr=0.2), clip=0.05)
        norm = report.norm
    return weights(run), norm, resting, min(local(p).shape[0] for p in run.model.parameters())


@pytest.mark.parametrize("world", [1, 2])
def test_offload_to_the_cpu_changes_no_number(world):
    wanted, norm, _, _ = trained(None, tr.Full())
    for found, its_norm, resting, _ in on_ranks(world, trained, {"offload": "cpu"}, tr.Full()):
        assert resting == {"cpu"} and its_norm == pytest.approx(norm, rel=1e-6)
        assert_all_same(found, wanted, 1e-6)


CASES = {
    "a frozen half": (tr.Full(train=("model.layers.0.*", "lm_head")), "llama"),
    "a trained embedding and the rest frozen": (tr.Full(train=("embed_tokens",)), "llama"),
    "norms alone": (tr.Full(train=("*norm*",)), "llama"),
    # 4 rows over 3 ranks are 2, 2 and none: a rank with nothing to train at all
    "one rank without a row": (tr.Full(train=("gate",)), "qwen3_moe"),
    "adapters of fewer rows than ranks": (tr.LoRA(rank=2), "llama"),
    "adapters beside tied embeddings": (tr.LoRA(rank=2, targets=("c_attn", "c_fc")), "gpt2"),
}


@pytest.mark.parametrize("case", CASES)
def test_uneven_and_empty_shards_train_like_one_rank(case):
    technique, arch = CASES[case]
    wanted, norm, _, _ = trained(None, technique, arch)
    rows_held = []
    for found, its_norm, _, least in on_ranks(3, trained, {}, technique, arch):
        assert its_norm == pytest.approx(norm, rel=1e-6)
        assert_all_same(found, wanted, 1e-6)
        rows_held.append(least)
    if case.startswith(("one rank", "adapters of")):
        assert rows_held[-1] == 0, "no shard was empty: the case does not test what it says"


def trained_by_adamw(technique, arch):
    run = tr.compose(build(arch), [technique, tr.Shard()])
    rank, ranks = data_rank(run.plan.mesh)
    train(run, [rows(6)[rank::ranks]], torch.optim.AdamW, lr=0.01, weight_decay=0.1)
    return True


def test_an_optimizer_with_nothing_to_do_on_one_rank_still_steps():
    assert on_ranks(3, trained_by_adamw, *CASES["one rank without a row"]) == [True] * 3


def wide():
    run = tr.compose(build("llama", dtype=torch.float64), [tr.Full(), tr.Shard()])
    return gradients(run, rows(4)[torch.distributed.get_rank() :: 2])


def test_float64_gradients_are_not_rounded_on_their_way():
    wanted = gradients(tr.compose(build("llama", dtype=torch.float64), [tr.Full()]), rows(4))
    for found in on_ranks(2, wide):
        assert_all_same(found, wanted, 1e-13)
