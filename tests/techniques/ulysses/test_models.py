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
