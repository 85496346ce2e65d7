"""A gradient scaler next to form `update`: with fused optimizers it skips a step inside of it, with others outside."""

import pytest
import torch

import treering as tr
from tests.same import assert_all_same
from tests.toy import rows, weights
from tests.zoo import build

CONFIG = tr.OSFT(protect="weights", ratio=0.5, keep_initial=True, targets=("q_proj", "down_proj"))
STEPS = [rows(2, seed=i) for i in range(3)]
KINDS = [(torch.optim.AdamW, True), (torch.optim.AdamW, False), (torch.optim.Adam, True), (torch.optim.SGD, True)]


def trained(kind, fused, scaler, slopes):
    run = tr.compose(build("llama", dtype=torch.float64), [CONFIG])
    parameters = [p for _, p in run.trainable()]
    optimizer = kind(parameters, lr=1e-2, weight_decay=0.5, **({"fused": True} if fused else {}))
    run.attach(optimizer)
    for batches, slope in zip(run.steps(STEPS), slopes):
        for batch in batches:
            scaler.scale(run.loss(batch) * slope).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return weights(run)


def scaler_of(scale):
    return torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000, enabled=scale != 1)


@pytest.mark.parametrize(("kind", "fused"), KINDS)
def test_the_weights_are_those_without_a_scaler(kind, fused):
    scaled = trained(kind, fused, scaler_of(1024.0), (1.0, 1.0, 1.0))
    assert_all_same(scaled, trained(kind, fused, scaler_of(1), (1.0, 1.0, 1.0)), 1e-9)


@pytest.mark.parametrize(("kind", "fused"), KINDS)
def test_steps_that_are_all_skipped_leave_the_weights(kind, fused):
    before = weights(tr.compose(build("llama", dtype=torch.float64), [CONFIG]))
    assert_all_same(trained(kind, fused, scaler_of(1024.0), (torch.inf, torch.nan, torch.inf)), before)
