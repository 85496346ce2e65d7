"""What is kept is not computed twice, and changes no number."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import treering as tr
from tests.same import assert_all_same
from tests.toy import gradients, packed, rows
from tests.zoo import build
from treering.technique import recompute_state
from treering.techniques.recompute import Recompute
from treering.techniques.recompute.recomputed_block import KeepPolicy, kind_of

KEEP = Recompute(keep=("attention",))


class Kernels(TorchDispatchMode):
    """Counts attention kernels, forward ones, by the pass they run in."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if kind_of(op) == "attention":
            self.count[recompute_state()] += 1
        return op(*args, **(kwargs or {}))


def counted(*techniques, batches=None, arch="llama"):
    run = tr.compose(build(arch), [tr.Full(), *techniques])
    with Kernels() as kernels:
        found = gradients(run, batches or rows(1))
    return found, dict(kernels.count)


def test_attention_is_computed_once_and_all_gradients_are_bitwise_the_same():
    wanted, once = counted()
    _, twice = counted(Recompute())
    assert once == {"forward": 2} and twice == {"forward": 2, "recompute": 2}
    for ours in (KEEP, Recompute(keep=("attention",), offload="cpu")):
        found, count = counted(ours)
        assert_all_same(found, wanted)
        assert count == {"forward": 2}


def test_packed_documents_are_kept_one_kernel_each():
    batches = [packed((7, 5, 4))]
    wanted, once = counted(batches=batches)
    found, count = counted(KEEP, batches=batches)
    assert_all_same(found, wanted)
    assert count == once == {"forward": 6}


def test_what_is_kept_is_gone_after_the_backward_and_after_an_aborted_step():
    run = tr.compose(build("llama"), [tr.Full(), KEEP])
    [ready] = run.steps([rows(1)])
    loss = run.loss(ready[0])
    del loss
    wanted, _ = counted()
    assert_all_same(gradients(run, rows(1)), wanted)
    assert recompute_state() == "forward"


def test_attention_without_a_kernel_of_its_own_is_refused_instead_of_computed_twice():
    with pytest.raises(tr.PlanError, match=r"attention of model\.layers\.0 ran as many small operators"):
        counted(KEEP, arch="gemma2")


def test_kept_operators_inside_compiled_code_are_refused():
    with pytest.raises(tr.PlanError, match="leave keep out of recompute, or compile out"):
        tr.compose(build("llama"), [tr.Full(), KEEP, tr.Compile(backend="eager")])


class Named:
    def __init__(self, name):
        self.given = name

    def name(self):
        return self.given


NAMES = {
    "aten::_scaled_dot_product_flash_attention": "attention",
    "aten::_scaled_dot_product_cudnn_attention": "attention",
    "aten::_flash_attention_forward": "attention",
    "torch_attn::_varlen_attn": "attention",
    "flex_attention": "attention",
    "aten::_scaled_dot_product_flash_attention_backward": "",
    "torch_attn::_varlen_attn_backward": "",
    "_c10d_functional::all_to_all_single": "all_to_all",
    "c10d::alltoall_base_": "in place",
    "aten::mm": "",
}


@pytest.mark.parametrize("name", NAMES)
def test_operators_are_told_by_their_names(name):
    assert kind_of(Named(name)) == NAMES[name]


def test_an_exchange_in_place_is_refused_where_its_result_was_to_be_kept():
    with pytest.raises(tr.PlanError, match="fills a tensor that it is given"):
        KeepPolicy(("all_to_all",))(None, Named("c10d::alltoall_base_"))
    KeepPolicy(("attention",))(None, Named("c10d::alltoall_base_"))
    assert kind_of(torch.ops._c10d_functional.all_to_all_single.default) == "all_to_all"
