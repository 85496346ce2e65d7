"""What runs on a card, against the plain truth. Skipped without one."""

import itertools

import pytest
import torch

from tests.attention.packs import LENGTHS
from tests.same import assert_same
from treering.attention import Documents, attend
from treering.attention.reference import reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("window", "softcap", "sinks"), itertools.product((None, 8), (None, 0.7), (False, True)))
@pytest.mark.parametrize("widths", [(64, 64), (48, 32)])
def test_every_kernel_and_its_gradient_equal_the_reference(widths, window, softcap, sinks, dtype):
    draw = torch.Generator("cuda").manual_seed(0)
    documents = Documents.of(LENGTHS, "cuda")
    tokens = sum(LENGTHS)
    shapes = [(1, 4, tokens, widths[0]), (1, 2, tokens, widths[0]), (1, 2, tokens, widths[1]), (4,)]
    tensors = [torch.randn(s, generator=draw, device="cuda").to(dtype).requires_grad_() for s in shapes]
    weight = torch.randn(1, 4, tokens, widths[1], generator=draw, device="cuda")
    results = []
    for function, kind in ((attend, dtype), (reference, torch.float64)):
        copies = [x.detach().to(kind).requires_grad_() for x in tensors]
        used = copies if sinks else copies[:3]
        rule = {"scaling": 0.2, "window": window, "softcap": softcap, "sinks_H": copies[3] if sinks else None}
        out = function(*copies[:3], documents, **rule)
        results.append([out.detach(), *torch.autograd.grad((out.double() * weight).sum(), used)])
    for found, wanted in zip(*results, strict=True):
        assert_same(found.double(), wanted, 0.03 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize(("window", "sinks"), [(None, False), (8, True)])
def test_another_document_leaves_no_trace(window, sinks):
    draw = torch.Generator("cuda").manual_seed(0)
    documents = Documents.of(LENGTHS, "cuda")
    query, key, value = (
        torch.randn(1, heads, sum(LENGTHS), 64, generator=draw, device="cuda", dtype=torch.bfloat16)
        for heads in (4, 2, 2)
    )
    rule = {"window": window, "sinks_H": torch.zeros(4, device="cuda") if sinks else None}
    before = attend(query, key, value, documents, **rule)
    for x in (query, key, value):
        x[:, :, :6] += 1
    assert torch.equal(attend(query, key, value, documents, **rule)[:, :, 6:], before[:, :, 6:])
