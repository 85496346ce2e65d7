"""Retraining of the text benchmark with a tiny model: what the ground truth rests on."""

import numpy as np
import pytest
import torch

from benchmarks.influence_text import Setting, batches, finetune, ground_truth, half, losses, retrained
from tests.same import assert_all_same

TINY = Setting(
    width=16, inner=24, layers=1, heads=2, base_chunks=8, base_length=16, base_batch=4, runs=4, chunks=5, length=8,
    documents=16, queries=4, batch=8, epochs=2, vocabulary=300,
)  # fmt: skip


def tiny():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=300, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2,
        )
    )  # fmt: skip


def test_a_document_that_is_missing_moves_no_other_one():
    """Training on a subset is training on all, where a document that is left out has a gradient of zero."""
    train = torch.randint(0, 300, (16, 8), generator=torch.Generator().manual_seed(0))
    kept = half(TINY, 0)
    found, wanted = tiny(), tiny()
    finetune(found, train, kept, TINY, divisor=4)
    weights = torch.from_numpy(kept).float()
    optimizer = torch.optim.AdamW(wanted.parameters(), lr=TINY.lr, weight_decay=0.0)
    order = batches(len(train), TINY)
    for step, batch in enumerate(order):
        optimizer.param_groups[0]["lr"] = TINY.lr * (1 - step / len(order))
        logits = wanted(input_ids=train[batch]).logits[:, :-1]
        each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), train[batch][:, 1:], reduction="none").mean(1)
        optimizer.zero_grad()
        ((each * weights[batch]).sum() / 4).backward()
        optimizer.step()
    assert_all_same(dict(found.named_parameters()), dict(wanted.named_parameters()), 1e-5)


def test_halves_are_halves_and_do_not_depend_on_how_many_there_are():
    subsets = [half(TINY, number) for number in range(20)]
    assert {int(one.sum()) for one in subsets} == {8} and len({one.tobytes() for one in subsets}) == 20


@pytest.mark.slow
def test_the_truth_is_the_same_when_made_again_or_continued(tmp_path):
    once = ground_truth(subsets=4, folder=tmp_path / "once", setting=TINY)
    ground_truth(subsets=3, folder=tmp_path / "again", setting=TINY)
    again = ground_truth(subsets=4, folder=tmp_path / "again", setting=TINY)
    assert np.array_equal(once.losses, again.losses) and np.array_equal(once.subsets, again.subsets)
    assert torch.equal(once.train, again.train) and once.names == again.names
    assert (once.full < once.before).all()
    everything = retrained(once, np.ones(16, dtype=bool), setting=TINY)
    assert np.array_equal(losses(everything, once.queries), once.full)
    assert len(set(once.names) | set(once.query_names)) == 20  # no document twice, no query among them
