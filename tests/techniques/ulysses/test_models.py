"""Models of transformers over ranks that share their rows: logits and gradients are those of each document alone."""

from functools import cache

import pytest
import torch

import treering as tr
from tests.ranks import on_ranks
from tests.same import assert_all_same, assert_same
from tests.toy import packed, rows
from tests.zoo import build
from treering.core.sharded import gather
from treering.core.topology import data_rank

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "gpt_oss", "qwen3_moe", "deepseek_v3", "gpt2")
LAYOUTS = ("heads", "gathered", "2d")
LENGTHS = (7, 13, 1, 4)  # longer than the window and shorter; borders of ranks inside documents


@cache
def mesh(**sizes):
    """One for all cases: each mesh starts threads."""
    return tr.mesh(**sizes)


def alone(arch, batches, dtype=torch.float32):
    """Logits of every token of each micro-batch, and all gradients, by transformers' own model, each document alone."""
    model = build(arch, dtype=dtype).train()
    count = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    logits, total = [], torch.zeros(())
    for batch in batches:
        lengths = batch["documents"].lengths if "documents" in batch else (batch["input_ids"].shape[1],)
        of_batch = []
        for ids, labels in zip(batch["input_ids"].split(lengths, 1), batch["labels"].split(lengths, 1)):
            out = model(ids, use_cache=False).logits
            of_batch.append(out.detach())
            loss = torch.nn.functional.cross_entropy(
                out[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
            )
            total = total + loss / count
        logits.append(torch.cat(of_batch, dim=1))
    total.backward()
    return logits, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, float(total.detach())


def global_batch():
    """Two packed rows and two of one document, with unequal numbers of trained tokens."""
    return [packed(LENGTHS), packed((9, 3), seed=1), *rows(2, lengths=(11, 3))]


def over_ranks(arch, ulysses, sizes, extra=(), dtype=torch.float32):
    run = tr.compose(build(arch, dtype=dtype), [tr.Full(), ulysses, tr.Shard(), *extra], mesh=mesh(**sizes))
    rank, ranks = data_rank(run.plan.mesh)
    own, logits = global_batch()[rank::ranks], []
    total = 0.0
    for ready in run.steps([own]):
        for given, batch in zip(own, ready):
            with torch.no_grad():
                inputs = {n: batch[n] for n in ("input_ids", "position_ids", "documents")}
                share = run.plan.tokens(given["input_ids"].numel())
                logits.append((share, run.model(**inputs, use_cache=False).logits))
            loss = run.loss(batch)
            loss.backward()
            total += loss.detach()
    gradients = {name: gather(p.grad) for name, p in run.trainable() if p.grad is not None}
    return rank, ranks, logits, gradients, float(run.total(total))


def check(arch, ulysses, sizes, extra=()):
    logits, gradients, loss = alone(arch, global_batch())
    rank, ranks, found, found_gradients, found_loss = over_ranks(arch, ulysses, sizes, extra)
    for wanted, (ranges, share) in zip(logits[rank::ranks], found):
        own = [i for part in ranges for i in part if i < wanted.shape[1]]
        assert_same(share[:, : len(own)], wanted[:, own], 2e-6, f"logits of {arch}")
    assert_all_same(found_gradients, gradients, 1e-5)
    assert abs(found_loss - loss) < 1e-6 * loss


def families(archs, layouts, sizes):
    for arch in archs:
        for layout in layouts:
            try:
                check(arch, tr.Ulysses(layout=layout), sizes)
            except AssertionError as error:
                raise AssertionError(f"{arch}, {layout}: {error}") from error


@pytest.mark.parametrize("arch", FAMILIES)
def test_a_model_over_two_ranks_is_each_document_alone(arch):
    on_ranks(2, families, (arch,), ("heads", "gathered"), {"shard": 1, "sequence": 2})


EXTRAS = {
    "recompute": (tr.Recompute(),),
    "recompute, keep": (tr.Recompute(keep=("all_to_all",)),),
    "everything": (tr.TiledBlock(tile=5), tr.TiledLoss(tile=3), tr.Recompute(offload="cpu")),
}


def with_extras(archs, transport, layouts, sizes):
    for arch in archs:
        for layout, (name, extra) in zip(layouts * 3, EXTRAS.items()):
            try:
                check(arch, tr.Ulysses(layout=layout, transport=transport), sizes, extra)
            except AssertionError as error:
                raise AssertionError(f"{arch}, {layout}, {name}: {error}") from error


@pytest.mark.parametrize(
    ("sizes", "archs", "layouts"),
    [
        ({"shard": 1, "sequence": 3}, ("llama",), ("heads", "gathered", "auto")),
        ({"shard": 2, "sequence": 2}, ("qwen3_moe",), ("gathered", "heads", "auto")),
        pytest.param(
            {"replicate": 2, "shard": 1, "sequence": 2},
            ("mistral",),
            ("heads", "gathered", "heads"),
            marks=pytest.mark.slow,
        ),
        ({"shard": 1, "sequence": 4}, ("gpt_oss",), ("2d", "heads", "gathered")),
    ],
)
def test_models_on_larger_meshes_recomputed_and_in_tiles(sizes, archs, layouts):
    world = 3 if sizes["sequence"] == 3 else 4
    on_ranks(world, with_extras, archs, "collective", layouts, sizes)


def test_ranks_that_exchange_in_pairs_train_the_same():
    on_ranks(3, with_extras, ("gpt_oss",), "paired", ("heads", "gathered", "heads"), {"shard": 1, "sequence": 3})


@pytest.mark.slow
@pytest.mark.parametrize("arch", FAMILIES)
@pytest.mark.parametrize("numbers", [(1, 3), (1, 4), (2, 2)])
def test_all_models_on_larger_meshes(arch, numbers):
    sizes = dict(zip(("shard", "sequence"), numbers))
    layouts = ("heads", "gathered", "2d" if sizes["sequence"] == 4 else "auto")
    world = sizes["shard"] * sizes["sequence"]
    on_ranks(world, with_extras, (arch,), "collective", layouts, sizes)
    on_ranks(world, with_extras, (arch,), "paired", layouts[::-1], sizes)


ROPES = {
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 2.5, 3.0, 4.0],
        "original_max_position_embeddings": 16,
    },
}


def roped(rope, techniques, sizes, several=False):
    """The loss and gradients of one document that is longer than the model was trained with, or of two rows."""
    import transformers as hf

    from tests.zoo import randomise

    config = hf.LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=16, rope_parameters=ROPES[rope],
    )  # fmt: skip
    model = hf.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    randomise(model, 0)
    run = tr.compose(model, [tr.Full(), *techniques], mesh=mesh(**sizes) if sizes else None)
    ids = torch.arange(3, 77).view(2, 37)
    batch = {"input_ids": ids, "labels": ids} if several else packed((37,))
    for batches in run.steps([[batch]]):
        loss = run.loss(batches[0])
        loss.backward()
        total = float(run.total(loss))
    return total, {name: gather(p.grad) for name, p in run.trainable()}


@pytest.mark.parametrize("rope", ROPES)
def test_frequencies_that_depend_on_the_longest_position_are_those_of_the_complete_row(rope):
    for layout, several in (("heads", False), ("gathered", True)):
        loss, gradients = roped(rope, [], {}, several)
        techniques = [tr.Ulysses(layout=layout), tr.Recompute(), tr.Shard()]
        for found, found_gradients in on_ranks(2, roped, rope, techniques, {"shard": 1, "sequence": 2}, several):
            assert abs(found - loss) < 1e-6 * loss
            assert_all_same(found_gradients, gradients, 1e-5)
