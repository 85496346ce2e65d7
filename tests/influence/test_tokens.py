"""Scores of tokens against hooks in plain torch, and their sums against the scores of an index."""

import numpy as np
import pytest
import torch

import treering as tr
from tests.curvature.texts import documents
from tests.influence.test_build import LENGTHS, QUERIES, known, texts
from tests.ranks import on_ranks
from tests.same import assert_same
from tests.zoo import build as model_of
from treering.anatomy import examine
from treering.curvature.reference import document_gradients
from treering.influence import Sketched, build, query_rows
from treering.influence.tokens import token_scores
from treering.sketches import SketchSettings

PLAIN = SketchSettings(kind="exact", curvature="identity", storage="float32")
SETTINGS = {
    "products of gradients": PLAIN,
    "exact": SketchSettings(kind="exact", storage="float32"),
    "psift": SketchSettings(kind="psift", curvature="kfac", size=8, storage="float32"),
    "all coordinates": SketchSettings(entries=100_000, restore_norm=False),
}


def test_a_token_has_the_score_of_its_inputs_and_output_gradients():
    """score_t = Σ over linears g_tᵀ G a_t, in float64 with hooks of torch alone."""
    run = tr.compose(model_of("llama"), [tr.Full()])
    sketched = Sketched.of(run, PLAIN, None)
    queries, asked = texts(QUERIES, "query", seed=5), documents(QUERIES, seed=5)
    found = token_scores(sketched, texts()[:3], query_rows(sketched, queries))
    model = model_of("llama").double().eval()
    gradients = [document_gradients(model, examine(model), q) for q in asked]
    for tokens, scores in zip(documents(LENGTHS)[:3], found):
        seen = {}

        def watch(name, seen=seen):
            def hook(module, inputs, output):
                output.register_hook(lambda grad: seen.__setitem__(name, (inputs[0].detach()[0], grad[0])))

            return hook

        handles = [
            module.register_forward_hook(watch(f"{name}.weight"))
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and f"{name}.weight" in sketched.targets
        ]
        logits = model(tokens[None]).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="sum").backward()
        for handle in handles:
            handle.remove()
        assert seen.keys() == sketched.targets.keys()
        wanted = torch.stack([sum(((g @ G[n]) * a).sum(1) for n, (a, g) in seen.items()) for G in gradients], 1)
        assert_same(torch.from_numpy(scores), wanted, 1e-5)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("which", SETTINGS)
def test_tokens_add_up_to_the_score_of_their_document(name, which, tmp_path):
    settings = SETTINGS[which]
    run = tr.compose(model_of(name), [tr.Full()])
    statistics = None if settings.curvature == "identity" else known(run, settings.curvature)
    index = build(run, texts(), tmp_path / "index", settings=settings, statistics=statistics, capacity=32)
    sketched = Sketched.of(run, settings, statistics)
    queries = query_rows(sketched, texts(QUERIES, "query", seed=5))
    scores = index.score(queries).values
    place = {sample: i for i, sample in enumerate(index.all_ids())}
    found = token_scores(sketched, texts(), queries)
    assert [one.shape for one in found] == [(length, len(QUERIES)) for length in LENGTHS]
    sums = torch.from_numpy(np.stack([one.sum(0) for one in found]))
    assert_same(sums, scores[[place[d.sample_id] for d in texts()]], 0.02 if "all" in which else 2e-4)


def test_adapters_tiles_and_recompute_do_not_change_the_scores_of_tokens():
    found = {}
    for name, helping in {"plain": [], "tiles": [tr.TiledBlock(tile=4), tr.TiledLoss(), tr.Recompute()]}.items():
        run = tr.compose(model_of("llama"), [tr.LoRA(rank=2), *helping])
        with torch.no_grad():
            for parameter in (p for n, p in run.trainable()):
                parameter.copy_(torch.linspace(-0.1, 0.1, parameter.numel()).view_as(parameter))
        sketched = Sketched.of(run, PLAIN, None)
        found[name] = token_scores(sketched, texts()[:4], query_rows(sketched, texts(QUERIES, "query", seed=5)))
    for one, other in zip(found["plain"], found["tiles"]):
        assert np.abs(one).max() > 0
        assert_same(torch.from_numpy(other), torch.from_numpy(one), 1e-4)


def refused(rank_settings):
    run = tr.compose(model_of("llama"), [tr.Full(), tr.Ulysses(), tr.Shard()], mesh=tr.mesh(**rank_settings))
    sketched = Sketched.of(run, PLAIN, None)
    queries = query_rows(sketched, texts(QUERIES, "query", seed=5))
    with pytest.raises(tr.PlanError, match="sequence axis of 2") as found:
        token_scores(sketched, texts()[:1], queries)
    return found.value.settings


def test_ranks_that_share_a_sequence_do_not_have_the_tokens_of_a_document():
    assert on_ranks(2, refused, {"shard": 1, "sequence": 2}) == [("mesh.sequence",)] * 2
