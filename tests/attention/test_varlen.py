"""The CUDA path without a card: torch's real operators on the meta device, and our algebra around stand-ins for them.

The stand-ins keep the contract of the flash kernels: the backward knows the softmax by the `lse` and `out` it gets.
"""

import pytest
import torch
from torch import Tensor

from tests.same import assert_same
from treering.attention import Documents
from treering.attention import varlen as varlen_module
from treering.attention.reference import reference
from treering.attention.varlen import varlen

LENGTHS = (5, 1, 13)


def scores(query: Tensor, key: Tensor, documents: Documents, scaling: float, sides: tuple[int, int]) -> Tensor:
    """H × T × T."""
    repeat = query.shape[1] // key.shape[1]
    found = torch.einsum("thd,shd->hts", query, key.repeat_interleave(repeat, 1)) * scaling
    which = torch.repeat_interleave(torch.arange(len(documents.lengths)), documents.cu_seqlens.diff().long())
    age = torch.arange(len(which))[:, None] - torch.arange(len(which))
    seen = (age >= 0) & (which[:, None] == which)
    if sides[0] >= 0:
        seen &= age <= sides[0]
    return found.masked_fill(~seen, -torch.inf)


def flash(query, key, value, documents, scaling, sides):
    found = scores(query, key, documents, scaling, sides)
    value = value.repeat_interleave(query.shape[1] // key.shape[1], 1)
    return torch.einsum("hts,shd->thd", found.softmax(-1), value), found.logsumexp(-1), torch.zeros(2)


def flash_backward(grad, query, key, value, out, lse, random, documents, scaling, sides):
    repeat = query.shape[1] // key.shape[1]
    p = (scores(query, key, documents, scaling, sides) - lse[..., None]).exp()
    delta = torch.einsum("thd,thd->ht", grad, out)
    wide_key, wide_value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    ds = p * (torch.einsum("thd,shd->hts", grad, wide_value) - delta[..., None]) * scaling
    d_key, d_value = torch.einsum("hts,thd->shd", ds, query), torch.einsum("hts,thd->shd", p, grad)
    folded = [x.unflatten(1, (-1, repeat)).sum(2) for x in (d_key, d_value)]
    return torch.einsum("hts,shd->thd", ds, wide_key), *folded


@pytest.mark.parametrize("window", [None, 4])
def test_a_sink_joined_to_the_log_sum_exp_is_a_column_of_the_softmax_in_value_and_gradient(window, monkeypatch):
    monkeypatch.setattr(varlen_module, "_flash", flash)
    monkeypatch.setattr(varlen_module, "_flash_backward", flash_backward)
    draw = torch.Generator().manual_seed(0)
    documents = Documents.of(LENGTHS)
    shapes = [(19, 4, 8), (19, 2, 8), (19, 2, 8), (4,)]
    tensors = [torch.randn(s, generator=draw, dtype=torch.float64).requires_grad_() for s in shapes]
    query, key, value, sinks = tensors
    ours = varlen(query, key, value, documents, scaling=0.5, window=window, sinks_H=sinks)
    rows = [x.transpose(0, 1)[None] for x in (query, key, value)]
    truth = reference(*rows, documents, scaling=0.5, window=window, sinks_H=sinks)[0].transpose(0, 1)
    weight = torch.randn(truth.shape, generator=draw, dtype=torch.float64)
    assert_same(ours, truth, 1e-13)
    found, wanted = (torch.autograd.grad((x * weight).sum(), tensors) for x in (ours, truth))
    for one, other in zip(found, wanted, strict=True):
        assert_same(one, other, 1e-13)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_torch_takes_our_arguments_forward_and_backward(with_sinks, window):
    documents = Documents.of(LENGTHS, "meta")
    query, key, value = (
        torch.empty(19, heads, 8, device="meta", dtype=torch.bfloat16, requires_grad=True) for heads in (4, 2, 2)
    )
    sinks = torch.empty(4, device="meta", requires_grad=True)
    out = varlen(query, key, value, documents, scaling=0.5, window=window, sinks_H=sinks if with_sinks else None)
    out.sum().backward()
    assert out.shape == query.shape
    assert [x.grad.shape for x in (query, key, value)] == [x.shape for x in (query, key, value)]
    assert (sinks.grad is not None) == with_sinks


def test_a_log_sum_exp_of_another_layout_is_noticed(monkeypatch):
    monkeypatch.setattr(varlen_module, "_flash", lambda q, *_: (q, torch.zeros(q.shape[:2]), torch.zeros(2)))
    x = torch.zeros(19, 4, 8)
    with pytest.raises(RuntimeError, match="not heads × tokens"):
        varlen(x, x, x, Documents.of(LENGTHS), scaling=0.5, sinks_H=torch.zeros(4))
