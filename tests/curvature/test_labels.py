"""Drawn labels: by the model's probabilities, and a function of their document alone."""

import torch

from tests.curvature.texts import documents, packed, rows
from treering.core.philox import key, uniform
from treering.curvature.batch_tokens import numbers_of
from treering.curvature.labels import drawn, draws, with_gradient, with_targets


def test_a_document_has_the_same_draws_whatever_is_next_to_it():
    given = documents((12, 7, 5))
    alone = [draws({"input_ids": d[None]}, torch.zeros(1, len(d)), 3)[0] for d in given]
    together = packed(given)
    assert torch.equal(draws(together, numbers_of(together, None), 3)[0], torch.cat(alone))
    padded = rows(given)
    found = draws(padded, numbers_of(padded, padded["attention_mask"]), 3)
    for row, wanted in zip(found, alone):
        assert torch.equal(row[: len(wanted)], wanted) and not row[len(wanted) :].any()
    other = draws({"input_ids": given[0][None]}, torch.zeros(1, 12), 4)[0]
    assert not torch.equal(other, alone[0])


def test_labels_are_drawn_as_often_as_the_model_expects_them():
    logits = torch.randn(6, generator=torch.Generator().manual_seed(0)) * 2
    count = 30_000
    u = uniform(key(0, "test"), torch.arange(count), 1)[:, 0]
    labels = drawn(logits.expand(count, 6), u)
    expected = logits.softmax(-1) * count
    found = torch.bincount(labels, minlength=6)
    assert float(((found - expected).square() / expected).sum()) < 20.5  # χ² with 5 degrees, 1 in 1,000


def test_a_token_without_probability_is_never_drawn():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 1.0, -torch.inf]])
    u = torch.linspace(0, 1 - 2**-32, 1000, dtype=torch.float64)
    assert set(drawn(logits.expand(1000, 5), u).tolist()) == {1, 3}


def test_targets_end_with_their_document_and_gradients_with_the_last_target():
    given = documents((4, 3))
    batch = packed(given)
    numbers = numbers_of(batch, None)
    targets = with_targets(batch, numbers)["targets"]
    assert targets[0].tolist() == [*given[0][1:].tolist(), -100, *given[1][1:].tolist(), -100]
    assert with_gradient(numbers, targets)[0].tolist() == [0, 0, 0, -1, 1, 1, -1]
    targets[0, 4:] = -100
    assert with_gradient(numbers, targets)[0].tolist() == [0, 0, 0, -1, -1, -1, -1]
