import itertools

import pytest
import torch
from torch import Tensor

from tests.attention.packs import LENGTHS
from tests.same import assert_same
from treering.attention import Documents, attend
from treering.attention import chunks as chunks_module
from treering.attention.chunks import chunked
from treering.attention.reference import reference
from treering.core.errors import DataError

FEATURES = list(itertools.product((None, 8), (None, 0.7), (False, True)))


def inputs(
    heads: tuple[int, int], tokens: int, widths: tuple[int, int], dtype: torch.dtype, rows: int = 1
) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    query, keys = heads
    shapes = [
        (rows, query, tokens, widths[0]),
        (rows, keys, tokens, widths[0]),
        (rows, keys, tokens, widths[1]),
        (query,),
    ]
    return [torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def both(
    tensors: list[Tensor], documents: Documents, sinks: bool, **rule: float | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Output and gradients of `attend` and of the reference."""
    results = []
    for function in (attend, reference):
        copies = [x.detach().clone().requires_grad_() for x in tensors]
        out = function(*copies[:3], documents, sinks_H=copies[3] if sinks else None, **rule)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        used = copies if sinks else copies[:3]
        results.append([out.detach(), *torch.autograd.grad((out * weight.to(out.dtype)).sum(), used)])
    return results[0], results[1]


@pytest.mark.parametrize(("window", "softcap", "sinks"), FEATURES)
@pytest.mark.parametrize(("heads", "widths"), [((4, 2), (8, 8)), ((4, 1), (12, 8)), ((2, 2), (8, 12))])
def test_every_kernel_and_its_gradient_equal_the_reference(heads, widths, window, softcap, sinks):
    tensors = inputs(heads, sum(LENGTHS), widths, torch.float64)
    ours, truth = both(tensors, Documents.of(LENGTHS), sinks, window=window, softcap=softcap, scaling=0.5)
    for found, wanted in zip(ours, truth, strict=True):
        assert found.shape == wanted.shape
        assert_same(found, wanted, 1e-13)


RANGES = (
    (range(120),),
    (range(3, 9), range(60, 120)),  # from inside a document to inside another, and a late one
    (range(5, 6), range(76, 90), range(90, 91)),
    (range(40, 76), range(119, 120)),
)


@pytest.mark.parametrize("ranges", RANGES)
@pytest.mark.parametrize(("window", "softcap", "sinks"), FEATURES)
def test_queries_of_some_ranges_see_the_keys_of_the_complete_row(ranges, window, softcap, sinks):
    def rows(x):
        return torch.cat([x[:, :, part.start : part.stop] for part in ranges], dim=2)

    tensors = inputs((4, 2), sum(LENGTHS), (8, 12), torch.float64)
    documents, rule = Documents.of(LENGTHS), {"window": window, "softcap": softcap}
    results = []
    for function in (
        lambda q, k, v, s: attend(rows(q), k, v, documents.with_queries(ranges), sinks_H=s, **rule),
        lambda q, k, v, s: rows(reference(q, k, v, documents, sinks_H=s, **rule)),
    ):
        copies = [x.detach().clone().requires_grad_() for x in tensors]
        out = function(*copies[:3], copies[3] if sinks else None)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        results.append([out.detach(), *torch.autograd.grad((out * weight).sum(), copies if sinks else copies[:3])])
    for found, wanted in zip(*results, strict=True):
        assert_same(found, wanted, 1e-13)


@pytest.mark.parametrize(("window", "softcap", "sinks"), FEATURES)
def test_gradients_of_chunks_are_those_of_finite_differences(window, softcap, sinks, monkeypatch):
    monkeypatch.setattr(chunks_module, "CHUNK", 2)
    documents = Documents.of([1, 3, 4])
    query, key, value, sink = inputs((4, 2), 8, (3, 2), torch.float64)
    window = window and 2

    def function(q: Tensor, k: Tensor, v: Tensor, s: Tensor | None) -> Tensor:
        return chunked(q, k, v, documents, scaling=0.5, window=window, softcap=softcap, sinks_H=s)

    assert torch.autograd.gradcheck(function, (query[0], key[0], value[0], sink if sinks else None))


@pytest.mark.parametrize(("window", "softcap", "sinks"), FEATURES)
def test_half_precision_is_as_close_as_its_rounding(window, softcap, sinks):
    tensors = inputs((4, 2), sum(LENGTHS), (16, 16), torch.bfloat16)
    documents = Documents.of(LENGTHS)
    ours, _ = both(tensors, documents, sinks, window=window, softcap=softcap)
    _, truth = both([x.double() for x in tensors], documents, sinks, window=window, softcap=softcap)
    for found, wanted in zip(ours, truth, strict=True):
        assert found.dtype == torch.bfloat16
        assert_same(found.double(), wanted, 0.02)


def test_several_rows_are_each_cut_into_the_same_documents():
    tensors = inputs((4, 2), 19, (8, 8), torch.float64, rows=3)
    ours, truth = both(tensors, Documents.of([5, 14]), True, window=4)
    for found, wanted in zip(ours, truth, strict=True):
        assert_same(found, wanted, 1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads, length", [((4, 4), 40), ((6, 2), 17), ((4, 1), 1)])
def test_documents_of_one_length_have_the_bits_that_each_has_alone(heads, length, dtype):
    count, (H, K) = 5, heads
    query, key, value, slope = (torch.randn(1, h, count * length, 16, dtype=dtype) for h in (H, K, K, H))
    sides = [x.requires_grad_() for x in (query, key, value)]

    def run(parts, lengths):
        for x in sides:
            x.grad = None
        outputs = [attend(*(x[:, :, part] for x in sides), Documents.of(lengths)) for part in parts]
        torch.cat(outputs, 2).backward(slope)
        return [torch.cat(outputs, 2).detach(), *(x.grad for x in sides)]

    every = run([slice(None)], [length] * count)
    alone = run([slice(i * length, (i + 1) * length) for i in range(count)], [length])
    assert all(torch.equal(a, b) for a, b in zip(every, alone))


def test_a_window_that_no_document_outgrows_changes_nothing():
    query, key, value, _ = inputs((4, 2), 19, (8, 8), torch.float32)
    documents = Documents.of([5, 14])
    plain = attend(query, key, value, documents)
    assert torch.equal(attend(query, key, value, documents, window=14), plain)
    assert not torch.equal(attend(query, key, value, documents, window=13), plain)


def test_a_sink_far_below_changes_nothing_and_one_far_above_silences():
    query, key, value, _ = inputs((4, 2), 19, (8, 8), torch.float64)
    documents = Documents.of([5, 14])
    plain = attend(query, key, value, documents)
    low = attend(query, key, value, documents, sinks_H=torch.full((4,), -60.0, dtype=torch.float64))
    high = attend(query, key, value, documents, sinks_H=torch.full((4,), 60.0, dtype=torch.float64))
    assert_same(low, plain, 1e-14)
    assert high.abs().max() < 1e-20


def test_documents_that_do_not_fill_the_row_are_refused():
    query, key, value, _ = inputs((4, 2), 19, (8, 8), torch.float32)
    with pytest.raises(DataError, match="19"):
        attend(query, key, value, Documents.of([5, 13]))
