"""While its adapters are switched off a model computes as the base model does: a teacher without a second copy."""

import pytest
import torch

import treering as tr
from tests.ranks import on_ranks
from tests.toy import rows, train
from tests.zoo import build

IDS = torch.arange(3, 15)[None]
TARGETS = ("q_proj", "down_proj")
CASES = {
    "lora": [tr.LoRA(rank=4)],
    "two adapters": [tr.LoRA(rank=4), tr.LoRA(name="two", rank=2, targets=TARGETS)],
    "one-sided": [tr.OSFT(protect="weights", ratio=0.4, form="one_sided")],
    "core": [tr.OSFT(protect="weights", ratio=0.4, form="core")],
    "recomputed": [tr.LoRA(rank=4), tr.Recompute()],
    "tiled": [tr.LoRA(rank=4), tr.TiledBlock(tile=5), tr.TiledLoss(tile=5), tr.Recompute(offload="cpu")],
    "compiled": [tr.LoRA(rank=4), tr.Compile(backend="eager")],
}


def logits(model):
    return model(input_ids=IDS, use_cache=False).logits.detach()


def base(techniques, sharding=()):
    """What the model gives where the same techniques are there but those that train."""
    rest = [t for t in techniques if not isinstance(t, tr.LoRA | tr.OSFT)]
    return logits(tr.compose(build("llama"), [*rest, *sharding], frozen=True).model)


def trained(techniques, sharding=(), prepared=None):
    run = tr.compose(build("llama"), [*techniques, *sharding], prepared=prepared)
    train(run, [rows(2), rows(2)])
    return run


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] * (case == "compiled")) for case in CASES]
)
def test_without_its_adapters_a_model_is_the_base_model_bit_for_bit(case):
    wanted = base(CASES[case])
    run = trained(CASES[case])
    before = logits(run.model)
    with run.without():
        inside = logits(run.model)
        with run.without():
            nested = logits(run.model)
        again = logits(run.model)
    assert all(torch.equal(results, wanted) for results in (inside, nested, again))
    assert not torch.equal(before, wanted) and torch.equal(logits(run.model), before)


def test_adapters_are_on_again_after_an_error():
    run = trained(CASES["lora"])
    before = logits(run.model)
    with pytest.raises(ZeroDivisionError), run.without(), run.without():
        raise ZeroDivisionError
    assert torch.equal(logits(run.model), before)


def test_nothing_inside_has_a_gradient():
    """A backward after the context would run recomputed blocks again with the adapters on."""
    run = trained(CASES["recomputed"])
    with run.without():
        assert not run.model(input_ids=IDS, use_cache=False).logits.requires_grad
    assert run.model(input_ids=IDS, use_cache=False).logits.requires_grad


@pytest.mark.parametrize(
    "technique",
    [
        tr.Full(),
        tr.LoRA(rank=4, init="pissa"),
        tr.OSFT(protect="weights"),
        tr.OSFT(protect="weights", form="one_sided", train=("norm",)),
    ],
    ids=lambda technique: f"{technique}"[:40],
)
def test_a_model_that_keeps_nothing_of_its_beginning_says_so(technique):
    run = tr.compose(build("llama"), [technique])
    with pytest.raises(tr.PlanError, match="compose a second model with frozen=True"), run.without():
        pass
    assert logits(run.model) is not None


def interleaved(folder):
    """Teacher and student take turns in a sharded run; the training is that of a run without a teacher."""
    results = {}
    for case in ("lora", "recomputed", "one-sided"):
        for compute in ("stored", "bfloat16"):
            sharding = [tr.Shard(compute=compute)]
            wanted = base(CASES[case], sharding)
            runs = [tr.compose(build("llama"), [*CASES[case], *sharding], prepared=folder) for _ in range(2)]
            optimizers = [run.optimizer(torch.optim.SGD, lr=0.5) for run in runs]
            for _ in range(2):
                for run, optimizer, teacher in zip(runs, optimizers, (True, False)):
                    for batch in run.ready([{**b, "count": 10} for b in rows(2)]):
                        if teacher:
                            with run.without():
                                assert torch.equal(logits(run.model), wanted)
                        run.loss(batch).backward()
                    run.step(optimizer)
            alone, other = ({n: v.clone() for n, v in run.plain()} for run in runs)
            assert all(torch.equal(alone[name], other[name]) for name in alone)
            results[case, compute] = bool(torch.isfinite(logits(runs[0].model)).all())
    return results


def test_a_sharded_teacher_takes_turns_with_its_student(tmp_path):
    for results in on_ranks(2, interleaved, tmp_path):
        assert len(results) == 6 and all(results.values())
