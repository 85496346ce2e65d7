"""Rows of documents: equal to products token by token, whatever pieces and neighbours they come with."""

import pytest
import torch

from tests.same import assert_same
from tests.sketches.toy import modules, normal, sums
from treering import DataError
from treering.sketches import reference, rows
from treering.sketches.maps import ModuleMap, SideBasis, module_map
from treering.sketches.rows import RowSums, TokenSpans, add_products
from treering.sketches.settings import SketchSettings

PLAIN = SketchSettings(kind="exact", curvature="identity")
LENGTHS = [20, 3, 1, 30, 8, 9]
SPANS = TokenSpans.of_lengths(LENGTHS)


def test_rows_are_sums_over_the_tokens_of_each_document():
    for name, module in modules().items():
        found = sums({name: module}, PLAIN, SPANS, len(LENGTHS)).documents_rows()[name]
        assert_same(found, reference.gradients(module.a, module.g, SPANS, len(LENGTHS)).flatten(1), 1e-6, name)


def test_float64_stays_float64():
    a, g = normal(71, 6).double(), normal(71, 5).double()
    group = RowSums({"m": ModuleMap(name="m", outputs=5, inputs=6)}, len(LENGTHS))
    group.add("m", a, g, SPANS)
    wanted = reference.gradients(a, g, SPANS, len(LENGTHS)).flatten(1)
    assert_same(group.documents_rows()["m"], wanted, 1e-14)


def test_bfloat16_pairs_are_summed_in_float32():
    a, g = normal(71, 6).bfloat16(), normal(71, 5).bfloat16()
    group = RowSums({"m": ModuleMap(name="m", outputs=5, inputs=6)}, len(LENGTHS))
    group.add("m", a, g, SPANS)
    assert_same(group.documents_rows()["m"], reference.gradients(a, g, SPANS, len(LENGTHS)).flatten(1), 1e-6)


@pytest.mark.parametrize("length", [1, 4, 8, 128])
def test_products_by_chunks_are_the_same(length, monkeypatch):
    """What a card does, and the CPU for short documents."""
    left, right = normal(71, 7, name="l").double(), normal(71, 4, name="r").double()
    monkeypatch.setattr(rows, "SHORT", length)
    monkeypatch.setattr(rows, "_divided", lambda spans, most: (spans, ()))
    twice = TokenSpans(documents=(*SPANS.documents, 3, 1), starts=(*SPANS.starts, 0, 5), stops=(*SPANS.stops, 30, 6))
    for spans in (SPANS, twice):
        found = torch.zeros(len(LENGTHS), 7, 4, dtype=torch.float64)
        add_products(found, left, right, spans)
        assert_same(found, reference.gradients(right, left, spans, len(LENGTHS)), 1e-14)


@pytest.mark.parametrize("tile", [1, 7, 16, 71])
def test_a_document_may_come_in_tiles(tile):
    settings = SketchSettings(size=5, kind="psift", curvature="kfac")
    made = modules(71)
    whole = sums(made, settings, SPANS, len(LENGTHS)).documents_rows()
    group = RowSums({name: m.map(settings) for name, m in made.items()}, len(LENGTHS))
    for start in range(0, 71, tile):
        for name, module in made.items():
            piece = slice(start, start + tile)
            group.add(name, module.a[piece], module.g[piece], SPANS.cut(start, start + tile))
    for name, found in group.documents_rows().items():
        assert_same(found, whole[name], 2e-6, name)


def test_neighbours_and_order_do_not_change_a_bit():
    left, right = normal(64, 6, name="l"), normal(64, 5, name="r")
    spans = TokenSpans.of_lengths([20, 3, 30, 11])
    whole = torch.zeros(4, 6, 5)
    add_products(whole, left, right, spans)
    for number, start, stop in zip(spans.documents, spans.starts, spans.stops):
        alone = torch.zeros(1, 6, 5)
        add_products(alone, left[start:stop].clone(), right[start:stop].clone(), TokenSpans.of_lengths([stop - start]))
        assert torch.equal(alone[0], whole[number])


@pytest.mark.parametrize("kind", ["psift", "eigen-topk", "exact"])
def test_rows_of_documents_add_up_to_the_batch_and_rows_of_tokens_to_the_document(kind):
    settings = SketchSettings(kind=kind, curvature="kfac", size=5)
    made = modules(71)
    whole = sums(made, settings, TokenSpans.of_lengths([71]), 1).documents_rows()
    documents = sums(made, settings, SPANS, len(LENGTHS)).documents_rows()
    tokens = sums(made, settings, TokenSpans.of_lengths([1] * 71), 71).documents_rows()
    for name in made:
        assert_same(documents[name].sum(0), whole[name][0], 2e-6, name)
        each = torch.stack([piece.sum(0) for piece in tokens[name].split(LENGTHS)])
        assert_same(each, documents[name], 2e-6, name)


def test_padding_is_in_no_row():
    documents = torch.tensor([0] * 9 + [-1] * 3 + [2] * 4 + [1] * 12 + [-1])
    spans = TokenSpans.of_tokens(documents)
    assert spans == TokenSpans(documents=(0, 2, 1), starts=(0, 12, 16), stops=(9, 16, 28))
    left, right = normal(29, 6, name="l"), normal(29, 5, name="r")
    left[documents < 0] = torch.nan
    found = torch.zeros(3, 6, 5)
    add_products(found, left, right, spans)
    assert_same(found, reference.gradients(right, left, spans, 3), 1e-6)


def test_a_module_that_no_token_reached_has_rows_of_zeros():
    group = RowSums({name: m.map(PLAIN) for name, m in modules().items()}, 4)
    assert all(not row.any() and len(row) == 4 for row in group.documents_rows().values())


def test_tokens_of_an_embedding_stand_for_their_inputs():
    tokens, g = torch.tensor([3, 1, 3, 0, 4, 4, 4, 2, 1, 3]), normal(10, 6)
    one_hot = torch.nn.functional.one_hot(tokens, 5).float()
    spans = TokenSpans.of_lengths([6, 4])
    counts = SideBasis(values=torch.bincount(tokens, minlength=5).double() / 10)
    S = torch.linalg.eigh(g.double().T @ g.double() / 10)
    for size in (3, 9):
        settings = SketchSettings(kind="psift", curvature="kfac", size=size)
        mapped = module_map(
            settings, "e", 6, 5, input_basis=counts, gradient_basis=SideBasis(values=S[0], vectors=S[1])
        )
        group, same = RowSums({"e": mapped}, 2), RowSums({"e": mapped}, 2)
        group.add("e", tokens, g, spans)
        same.add("e", one_hot, g, spans)
        assert_same(group.documents_rows()["e"], same.documents_rows()["e"], 1e-6)


def test_pairs_of_other_tokens_are_refused():
    with pytest.raises(DataError, match="71 inputs and 70 gradients"):
        add_products(torch.zeros(6, 4, 4), normal(70, 4), normal(71, 4), SPANS)
    with pytest.raises(DataError, match="spans of 71 tokens"):
        add_products(torch.zeros(6, 4, 4), normal(70, 4), normal(70, 4), SPANS)
