"""The oracle of the benchmarks against definitions: float64, a tiny model, everything dense."""

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import influence_oracle as oracle
from tests.same import assert_same

DOCUMENTS, LENGTH = 5, 7
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def model():
    config = LlamaConfig(
        vocab_size=19, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(0)
    made = LlamaForCausalLM(config).double().eval()
    for parameter in made.parameters():
        parameter.data *= 8  # so that predictions are not uniform
    return made


@pytest.fixture(scope="module")
def documents():
    return list(torch.randint(0, 19, (DOCUMENTS, LENGTH), generator=torch.Generator().manual_seed(1)))


@pytest.fixture(scope="module")
def rows(model, documents):
    return oracle.rows(model, documents)


def loss(model, ids, labels=None):
    logits = model(input_ids=ids[None]).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, ids[1:] if labels is None else labels, reduction="sum")


def test_gradients_are_those_of_the_weights_of_all_linears_of_the_blocks(model, documents, rows):
    weights = dict(model.named_parameters())
    assert len(rows) == 7 and "lm_head.weight" not in rows
    for number, ids in enumerate(documents):
        gradients = torch.autograd.grad(loss(model, ids), [weights[name] for name in rows])
        for name, gradient in zip(rows, gradients):
            assert_same(rows[name][number], gradient, 1e-10)


def test_sampled_labels_are_where_the_loss_is(model, documents):
    labels = oracle.sampled(model, documents)
    again = oracle.sampled(model, documents[:2])
    assert all(torch.equal(one, other) for one, other in zip(labels, again))  # each document by itself
    weight = dict(model.named_parameters())[UP]
    (gradient,) = torch.autograd.grad(loss(model, documents[0], labels[0]), [weight])
    assert_same(oracle.rows(model, documents[:1], labels)[UP][0], gradient, 1e-10)


@pytest.mark.parametrize("factored", [False, True])
def test_the_inverse_is_that_of_the_damped_kronecker_product(model, documents, rows, factored):
    H = oracle.curvature(model, documents, None, kind="kfac")
    pairs = [oracle.pairs(model, ids)[UP] for ids in documents]
    a, g = (torch.cat([pair[side] for pair in pairs]) for side in (0, 1))
    T, c = len(a), 0.1
    A, S = a.T @ a / T, g.T @ g / T
    I_A, I_S = torch.eye(len(A)).double(), torch.eye(len(S)).double()
    if factored:
        dense = torch.kron(S + c * S.trace() / len(S) * I_S, A + c * A.trace() / len(A) * I_A) * T / DOCUMENTS
    else:
        dense = torch.kron(S, A) * T / DOCUMENTS
        dense = dense + c * dense.trace() / len(dense) * torch.eye(len(dense)).double()
    G = rows[UP].flatten(1)
    found = oracle.scores({UP: rows[UP]}, {UP: rows[UP]}, {UP: H[UP]}, c=c, factored=factored)
    assert_same(found, G @ torch.linalg.solve(dense, G.T), 1e-9)


def test_corrected_eigenvalues_are_squares_in_the_basis_and_keep_the_trace(model, documents, rows):
    H = oracle.curvature(model, documents, None, kind="ekfac")[UP]
    assert H.corrected is not None
    assert_same(H.corrected, sum((H.Q_S.T @ G @ H.Q_A) ** 2 for G in rows[UP]) / DOCUMENTS, 1e-10)
    assert float(H.corrected.sum()) == pytest.approx(float(rows[UP].square().sum() / DOCUMENTS))


@pytest.mark.parametrize("kind", ["shampoo", "tkfac"])
def test_shampoo_and_tkfac_have_the_trace_of_the_fisher_of_a_document(model, documents, rows, kind):
    for name, H in oracle.curvature(model, documents, None, kind=kind).items():
        trace = float(H.E_S.sum() * H.E_A.sum()) * H.scale
        assert trace == pytest.approx(float(rows[name].square().sum() / DOCUMENTS))


def test_all_coordinates_give_the_exact_scores_and_fewer_ones_are_further_away(model, documents, rows):
    H = oracle.curvature(model, documents, None, kind="ekfac")
    one, numbers = {UP: rows[UP]}, rows[UP][0].numel()
    exact = oracle.scores(one, one, H)
    assert_same(oracle.top_coordinates(one, one, H, numbers), exact, 1e-10)
    few, more = (float((oracle.top_coordinates(one, one, H, k) - exact).norm()) for k in (2, numbers // 2))
    assert few > more > 1e-6


def test_sketches_are_right_on_average(model, documents, rows):
    H = oracle.curvature(model, documents, None, kind="kfac")
    one, draws = {UP: rows[UP]}, 2000
    exact = oracle.scores(one, one, H, factored=True)
    found = torch.stack([oracle.sketched(one, one, H, 4, seed=seed) for seed in range(draws)])
    error = (found.mean(0) - exact).abs() / (found.std(0) / math.sqrt(draws))
    assert float(error.max()) < 4.5


def test_bm25_prefers_rare_tokens_and_shorter_documents():
    found = oracle.bm25([torch.tensor([7, 1])], [torch.tensor(x) for x in ([1, 2], [7, 2], [7, 2, 3, 4], [1, 5])])[0]
    assert found[1] > found[2] > 0  # of equal counts the shorter
    alone = oracle.bm25([torch.tensor([9])], [torch.tensor([9, 1]), torch.tensor([1, 1])])[0]
    idf = math.log(1 + (2 - 1 + 0.5) / 1.5)
    assert float(alone[0]) == pytest.approx(idf * 2.5 / (1 + 1.5)) and float(alone[1]) == 0
