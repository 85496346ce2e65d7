"""The tracker, lengths that tell tokens from widths, depth, and what cannot be planned."""

import gc
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
import transformers as hf
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import treering as tr
from tests.plan.memory_formula import formula
from tests.plan.memory_toys import CPU, llama, llama_8b, moe, subject
from treering.core.errors import PlanError
from treering.memory import Subject, attention, forecast, pretend
from treering.memory.depth import RepeatedBlocks, repeats, shorten
from treering.memory.timeline import LONG, traced_length
from treering.memory.tracker import CATEGORIES, Tracker
from treering.plan import draft
from treering.technique import Applied, Stage

SHORT = llama(num_hidden_layers=2)


def live_bytes(tracker: Tracker) -> int:
    return sum(by for by, record, _ in tracker.events if not record.host)


def test_a_storage_counts_once_from_the_first_tensor_on_it_to_the_last():
    with Tracker(CPU) as tracker:
        x = torch.empty(1024)
        view, other = x[10:], x.view(32, 32)
        assert live_bytes(tracker) == 4096
        del x, view
        assert live_bytes(tracker) == 4096
        other.add_(1)
        assert live_bytes(tracker) == 4096
        del other
        assert live_bytes(tracker) == 0


def test_sizes_are_rounded_as_an_allocator_does():
    with Tracker(CPU) as tracker:
        x = torch.ones(1)
        assert live_bytes(tracker) == 512
        del x


def test_a_storage_that_is_freed_and_filled_again_by_resizing_is_followed():
    with Tracker(CPU) as tracker:
        x = torch.empty(1024)
        x.untyped_storage().resize_(0)
        y = torch.ones(1)
        assert live_bytes(tracker) == 512
        x.untyped_storage().resize_(4096)
        x.copy_(y)
        assert live_bytes(tracker) == 4096 + 512
        del x, y
        gc.collect()
        assert live_bytes(tracker) == 0
        assert tracker.events[0][1].category == "gathered"


def test_fake_tensors_of_the_stand_in_and_of_the_host_are_told_apart():
    device = pretend.accelerator()
    with FakeTensorMode(), Tracker(device) as tracker:
        here, there = torch.empty(256, device=device), torch.empty(512)
        assert [(r.host, r.size) for _, r, _ in tracker.events] == [(False, 1024), (True, 2048)]
        del here, there


def test_what_is_one_kernel_on_an_accelerator_is_one_here():
    device = pretend.accelerator()
    with FakeTensorMode(), Tracker(device) as tracker:
        x = torch.empty(1024, device=device, requires_grad=True)
        y = torch.nn.functional.silu(x)
        before = len(tracker.events)
        (gradient,) = torch.autograd.grad(y, x, torch.empty_like(y))
        assert [by for by, record, _ in tracker.events[before:] if by > 0] == [4096, 4096]  # of y, and of x
        del gradient


def test_no_other_operator_has_kernels_and_falls_back_on_others():
    """A new torch may have more of them: then `KERNELS` has to grow."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("aten::") and has(n, "CPU")]
    assert {n.removeprefix("aten::") for n in names if has(n, "CompositeImplicitAutograd")} == set(pretend.KERNELS)


def test_attention_keeps_its_inputs_its_output_and_a_log_sum_exp():
    device = pretend.accelerator()
    T, H, K, D = 64, 8, 2, 16
    with FakeTensorMode(), Tracker(device) as tracker:
        make = lambda heads: torch.empty(1, T, heads, D, device=device, dtype=torch.bfloat16).transpose(1, 2)  # noqa: E731
        q, k, v = (make(n).requires_grad_() for n in (H, K, K))
        before = live_bytes(tracker)
        out, _ = attention.attention(nn.Module(), q, k, v)
        result, kept, norms = 2 * T * H * D, 2 * T * H * D, 4 * T * H
        assert live_bytes(tracker) - before == result + kept + norms
        out.sum().backward()
        assert all(x.grad.shape == x.shape for x in (q, k, v))


def test_a_length_is_a_prime_whose_predecessor_is_twice_one():
    assert traced_length(10**9) == LONG
    assert traced_length(200) == 179
    assert traced_length(2) == 11


def test_a_step_of_any_length_is_read_from_one_trace():
    settings = subject(SHORT, [tr.Full(), tr.TiledLoss(tile=64), tr.Shard()], world=2)
    short, long = forecast(settings, 400), forecast(settings, 1500)
    for length in (300, 1000, 5000):
        assert short.at(length).device == pytest.approx(long.at(length).device, rel=0.01)


def test_the_longest_that_fits_fits_and_one_step_more_does_not():
    predicted = forecast(subject(SHORT, [tr.Full()]), 400)
    limit = predicted.at(3000).device
    longest = predicted.longest(limit, step=8)
    assert 2992 <= longest <= 3008
    assert predicted.at(longest).device <= limit < predicted.at(longest + 8).device
    assert predicted.longest(predicted.at(1).device) == 0


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(subject(llama(), [tr.Full(), tr.Recompute(), tr.Shard()], world=4), marks=pytest.mark.slow),
        pytest.param(
            subject(moe(num_hidden_layers=12, decoder_sparse_step=2), [tr.LoRA(rank=2), tr.Shard()], world=2),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            subject(llama(), [tr.Full(), tr.Recompute(), tr.TiledBlock(tile=64), tr.Shard()], world=4),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["even", "every second block of experts", "tiled"],
)
def test_a_deep_model_is_read_from_its_first_blocks(settings):
    few, all_of_them = forecast(settings, 200), forecast(replace(settings, all_blocks=True), 200)
    assert len(few.traces) == 2 and len(all_of_them.traces) == 1
    for length in (200, 2000):
        predicted, wanted = few.at(length), all_of_them.at(length)
        for phase, categories in wanted.phases.items():
            assert sum(predicted.phases[phase].values()) == pytest.approx(sum(categories.values()), rel=0.005), phase


def test_blocks_that_differ_are_traced_with_all_of_them():
    train = tr.Full(train=("*layers.[0-3].*",))
    predicted = forecast(subject(llama(), [train]), 100)
    assert predicted.layout == RepeatedBlocks(depth=6, prefix=0, period=6) and len(predicted.traces) == 1
    named = forecast(subject(llama(), [tr.Full(train=("*layers.5.*",))]), 100)
    assert len(named.traces) == 1


def test_how_blocks_repeat_is_found():
    assert repeats(list("a" * 9)) == RepeatedBlocks(depth=9, prefix=0, period=1)
    assert repeats(list("x" + "a" * 9)) == RepeatedBlocks(depth=10, prefix=1, period=1)
    assert repeats(list("ab" * 8)) == RepeatedBlocks(depth=16, prefix=0, period=2)
    assert repeats(list("abc")).depths() == (3,)
    assert repeats(list("x" + "ab" * 8 + "a")).depths() == (8, 12)


def test_a_shorter_config_lists_fewer_blocks():
    config = llama(num_hidden_layers=8)
    config.layer_types = ["full_attention"] * 8
    shorten(config, 3)
    assert config.num_hidden_layers == 3 and len(config.layer_types) == 3


def test_offloaded_states_are_in_host_memory_and_leave_the_device():
    here = forecast(subject(SHORT, [tr.Full(), tr.Shard()]), 100)
    away = forecast(subject(SHORT, [tr.Full(), tr.Shard(offload="cpu")]), 100)
    states = 4 * 4 * here.parameters
    assert away.at(100).host == pytest.approx(states, rel=0.02)
    assert here.at(100).host < states / 100
    assert all(away.at(100).phases[p]["optimizer"] == 0 for p in ("forward", "loss", "backward", "step"))


def test_every_category_of_a_sharded_run_is_there():
    predicted = forecast(subject(SHORT, [tr.LoRA(rank=4), tr.Recompute(), tr.Shard(compute="bfloat16")], world=2), 100)
    peaks = {c: max(predicted.at(100).phases[p][c] for p in predicted.at(100).phases) for c in CATEGORIES}
    assert all(peaks.values()), peaks
    lora = sum(r * (i + o) for r, i, o in [(4, 64, 64)] * 4 + [(4, 64, 176)] * 3) * 2
    assert peaks["technique"] == pytest.approx(4 * lora / 2, rel=0.1)
    steps = 512 * 2 * 7 * 2  # how many there were: a number for each tensor, in the smallest piece of memory
    assert peaks["optimizer"] == pytest.approx(2 * peaks["technique"] + steps, rel=0.01)


def test_the_formula_agrees_with_the_trace_of_a_llama():
    techniques = [tr.Full(), tr.Recompute(), tr.Shard(compute="bfloat16")]
    settings = subject(llama_8b(), techniques, world=8)
    traced = forecast(settings, 2000).at(32768)
    with pretend.ranks(8):
        with torch.device("meta"):
            model = hf.LlamaForCausalLM(settings.config)
        plan = draft(model, techniques, mesh=tr.mesh(device="cpu"), weights=False)
        foreseen = formula(
            plan, width=2, recompute=True, offload=False, tiles="none", tiled_loss=False, host=False
        ).peak(32768)
    assert foreseen == pytest.approx(traced.device - traced.reserved, rel=0.05)


@dataclass(frozen=True, kw_only=True)
class Curious:
    """Its loss depends on a value."""

    stage: ClassVar[Stage] = Stage.FORWARD

    def claims(self, anatomy, mesh):
        return []

    def apply(self, model, site):
        def loss(model, batch, objective):
            logits = model(input_ids=batch["input_ids"], use_cache=False).logits
            return logits.sum() if int(batch["labels"].sum()) > 3 else logits.mean()

        return Applied(loss=loss)


def test_what_depends_on_values_cannot_be_planned_and_says_so():
    settings: Subject = subject(SHORT, [tr.Full(), Curious()])
    with pytest.raises(PlanError, match="depends on values"):
        forecast(settings, 100)


class Counted:
    """An exchange that needs memory of its own, and counts its calls."""

    def __init__(self):
        self.calls = 0

    def around(self, attend, query, key, value, sinks):
        self.calls += 1
        out = attend(query * query, key, value, sinks)  # keeps another tensor for the backward
        return out * out


@dataclass(frozen=True, kw_only=True)
class Exchanging:
    exchange: Counted

    stage: ClassVar[Stage] = Stage.FORWARD

    def claims(self, anatomy, mesh):
        return []

    def apply(self, model, site):
        return Applied(batch=lambda batch: {**batch, "documents": batch["documents"].exchanged(self.exchange)})


def test_the_exchange_of_documents_is_traced_as_well():
    exchange = Counted()
    with_it = forecast(subject(SHORT, [tr.Full(), Exchanging(exchange=exchange)]), 1000).at(1000).device
    assert exchange.calls == SHORT.num_hidden_layers
    assert with_it > forecast(subject(SHORT, [tr.Full()]), 1000).at(1000).device
