"""An anatomy is right if the parts it names can be replaced by independent references without changing the logits."""

from dataclasses import replace

import pytest
import torch

from tests.anatomy import references
from tests.same import assert_same
from tests.zoo import ARCHITECTURES, VOCABULARY, build
from treering.anatomy import Anatomy, examine

TOLERANCE = 5e-6
IDS = torch.randint(0, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(7))


@pytest.fixture(autouse=True)
def own_attention():
    yield
    references.forget_attention()


def _parts(anatomy: Anatomy, kind: str) -> set[str]:
    return set(getattr(anatomy, kind)) if kind in ("norms", "embeddings") else {p.fqn for p in getattr(anatomy, kind)}


@pytest.mark.parametrize("kind", ["linears", "norms", "attentions", "experts", "embeddings"])
@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_parts_replaced_by_references_give_the_same_logits(name, kind):
    model = build(name)
    anatomy = examine(model)
    wanted = model(IDS, use_cache=False).logits
    used = getattr(references, kind)(model, anatomy)
    assert_same(model(IDS, use_cache=False).logits, wanted, TOLERANCE, kind)
    assert used == _parts(anatomy, kind)
    assert used or kind == "experts"


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_the_head_formula_gives_the_logits_from_the_final_norm(name, tied):
    model = build(name, tied=tied)
    anatomy = examine(model)
    assert anatomy.final_norm is not None
    wanted = model(IDS, use_cache=False).logits
    assert_same(references.logits_by_formula(model, anatomy, IDS), wanted, TOLERANCE, "logits")


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("mistral", {"sliding_window": None}),
        ("gemma3", {"sliding_window": 7}),
        ("gemma2", {"softcap": None}),
        ("gpt_oss", {"sinks": None}),
    ],
)
@torch.no_grad()
def test_a_wrong_fact_about_attention_is_seen_in_the_logits(name, wrong):
    model = build(name)
    anatomy = examine(model)
    wanted = model(IDS, use_cache=False).logits
    attentions = tuple(replace(part, **wrong) for part in anatomy.attentions)
    references.attentions(model, replace(anatomy, attentions=attentions))
    difference = (model(IDS, use_cache=False).logits - wanted).abs().max() / wanted.abs().max()
    assert difference > 100 * TOLERANCE
