"""The baselines that OSFT is compared with are what their names say: each on a tiny model, next to plain torch."""

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from benchmarks.quality.baselines import Distilled, Pulled, Replayed, baselines, remembering
from benchmarks.quality.families import best, family, family_rows
from benchmarks.quality.learners import LINEARS, full
from benchmarks.quality.model import Small, batch, drawn
from benchmarks.quality.symbols import Size, config, facts, measured, remembered, replayed
from treering import Full

SIZE = Size(width=32, middle=48, layers=1)
KNOWN = torch.randint(0, 40, (6, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def small() -> Small:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(SIZE))
    return Small(config=model.config, state={name: p.detach().clone() for name, p in model.named_parameters()})


def new_batch():
    return batch(*(part[:4] for part in facts(8, 0, 1)))


def gradients(learner, one) -> dict[str, torch.Tensor]:
    """Of one step, before it is taken."""
    found = {}

    def take(optimizer, **_):
        found.update({n: p.grad.clone() for n, p in learner.model.named_parameters() if p.grad is not None})

    learner.run.step = take
    learner.step(one)
    return found


def summed(model, ids, labels) -> torch.Tensor:
    logits = model(ids, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")


@pytest.mark.parametrize(("share", "weight", "rows"), [(1.0, 1.0, 2), (0.2, 3.0, 1), (2.0, 0.3, 4)])
def test_replay_adds_weighted_rows_to_the_sum_and_to_the_count(small, share, weight, rows):
    one = new_batch()  # 4 rows of 8 tokens
    more = {"known": (KNOWN, None), "share": share, "weight": weight}
    ours = gradients(Replayed(small.fresh(), [Full(train=LINEARS)], None, 1e-3, **more), one)
    kept = next(iter(drawn(KNOWN, None, rows, 0)))
    model = small.fresh()
    loss = summed(model, one["input_ids"], one["labels"]) + weight * summed(model, kept["input_ids"], kept["labels"])
    (loss / (one["count"] + weight * rows * 15)).backward()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, dict(model.named_parameters())[name].grad, rtol=1e-4, atol=1e-6)
    assert len(ours) == len(LINEARS)


def test_self_distillation_is_still_at_the_base_model_and_pulls_back_elsewhere(small):
    more = {"known": (KNOWN, None), "share": 1.0, "weight": 1.0}
    learner = Distilled(small.fresh(), [Full(train=LINEARS)], None, 1e-3, **more)
    kept = batch(KNOWN[:2])
    assert abs(learner.kept_sum(kept).item()) < 1e-5
    with torch.no_grad():
        for weight in learner.model.parameters():
            weight.mul_(1.5)
    base, tuned = (m(KNOWN[:2], use_cache=False).logits[:, :-1].log_softmax(-1) for m in (learner.base, learner.model))
    wanted = (base.exp() * (base - tuned)).sum()
    assert wanted.item() > 1e-3
    torch.testing.assert_close(learner.kept_sum(kept), wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("pull", [10.0, 1e9])
def test_a_pull_shortens_the_way_from_the_start_after_each_step(small, pull):
    plain = full(small.fresh(), None, 1e-2)
    ours = Pulled(small.fresh(), [Full(train=LINEARS)], None, 1e-2, pull=pull)
    for learner in (plain, ours):
        learner.step(new_batch())
    for name, after in ours.finished().items():
        start = small.state[name]
        expected = torch.lerp(plain.finished()[name], start, min(1.0, 1e-2 * pull))
        torch.testing.assert_close(after, expected, rtol=0, atol=1e-7)


def test_between_two_models_lie_weights_in_the_same_proportion(small):
    other = Small(config=small.config, state={name: w + 1 for name, w in small.state.items()})
    between = other.towards(small, 0.25)
    assert all(torch.allclose(between.state[name], w + 0.25) for name, w in small.state.items())


def test_every_variant_belongs_to_a_family_and_learns(small):
    found = baselines(KNOWN, lambda: KNOWN)
    assert {family(name) for name in found} == {
        "replay", "self-distillation", "self-generated replay", "L2 to the start", "osft + replay",
        "osft + self-distillation",
    }  # fmt: skip
    assert family("osft") == "osft" and family("replayed") == "replayed"
    statistics = small.measured([batch(KNOWN) | {"real": torch.ones_like(KNOWN, dtype=torch.bool)}])
    for name in ("osft + replay 1", "osft + self-distillation 1", "self-generated replay 2"):
        learner = found[name](small.fresh(), statistics, 1e-2)
        before = summed(learner.model, new_batch()["input_ids"], new_batch()["labels"]).item()
        for _ in range(5):
            learner.step(new_batch())
        assert summed(learner.model, new_batch()["input_ids"], new_batch()["labels"]).item() < before


def test_a_sequence_replays_the_rings_of_all_that_was_learned_before():
    size = Size(facts=4, rows=4, steps=1, tasks=2)
    ids, labels = remembered(size, 0, 1)
    assert ids.shape == (8 + 2 * 4, 14) and labels.shape == ids.shape
    for rows, (known, trained) in ((slice(8, 12), facts(4, 0, 0)), (slice(12, 16), facts(4, 0, 1))):
        assert torch.equal(ids[rows, :8], known) and torch.equal(labels[rows, :8], trained)
        assert (labels[rows, 8:] == -100).all()


def test_a_method_of_a_sequence_is_given_more_rows_with_every_task():
    size = Size(width=32, middle=48, layers=1, facts=4, rows=4, steps=1, tasks=2)
    state = AutoModelForCausalLM.from_config(config(size)).state_dict()
    tiny = Small(config=config(size), state={name: value.clone() for name, value in state.items()})
    given = []

    def method(rows):
        given.append(len(rows[0]))
        return remembering()["replay 1"](rows)

    result = replayed(tiny, method, 1e-3, size, 0, measured(tiny, size, 0))
    assert given == [12, 16] and set(result) >= {"learned", "bwt"}


def kept(**rises):
    return {name: {seed: {1e-3: {"rise": rise}} for seed, rise in enumerate(of)} for name, of in rises.items()}


def rise(seed, rates):
    return rates[1e-3]["rise"]


def test_the_best_variant_is_the_least_of_those_that_reach_the_level_with_most_seeds():
    runs = kept(**{"replay 1": [0.3, 0.1], "replay 2": [0.1, 0.4], "replay 3": [0.01]})
    found = best(runs, "replay", rise)
    assert found.variant == "replay 1" and found.rises == {0: 0.3, 1: 0.1}


def test_a_bar_next_to_the_best_replay_is_missed_and_met_by_its_ratio():
    runs = kept(full=[0.4, 0.4], **{"replay 1": [0.2, 0.2], "osft": [0.11, 0.11], "osft + replay 1": [0.06, 0.06]})
    rows = [one for one in family_rows(runs, rise, "here", command="none") if one.bar]
    assert [(one.ratio, one.holds) for one in rows] == [(pytest.approx(0.55), False), (pytest.approx(0.3), True)]


def test_osft_next_to_a_replay_that_does_not_forget_must_not_forget_either():
    runs = kept(full=[0.4], **{"replay 1": [-0.1], "osft": [0.01]})
    (judged,) = [one for one in family_rows(runs, rise, "here", command="none") if one.bar]
    assert judged.peer is None and not judged.holds
