"""The techniques in whole models: equal to the untiled run, and gone without a trace."""

import pytest
import torch

import treering as tr
from tests.same import assert_all_same, assert_same
from tests.toy import packed, rows
from tests.zoo import ARCHITECTURES, build
from treering.anatomy import examine
from treering.technique import Site
from treering.techniques.tiling import TiledBlock, TiledLoss, TiledMLP
from treering.techniques.tiling.groups import KNOWS_ELSEWHERE

KINDS = {
    "mlp": [TiledMLP(tile=4)],
    "groups": [TiledMLP(tile=4, experts="groups")],
    "block and loss": [TiledBlock(tile=4), TiledLoss(tile=3)],
}
GROUPED = ("qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss") if KNOWS_ELSEWHERE else ()


def gradients(name, techniques, adapting=None, batches=None, **how):
    run = tr.compose(build(name, dtype=torch.float64, **how), [adapting or tr.Full(), *techniques])
    with torch.no_grad():
        for key, parameter in run.trainable():
            if key.endswith(".B"):
                parameter.fill_(0.02)
    found = {}
    for ready in run.steps([batches or [_two_rows(), *rows(2, lengths=(7, 13))]]):
        for i, batch in enumerate(ready):
            loss = run.loss(batch)
            found[f"loss {i}"] = loss.detach()
            loss.backward()
    return found | {key: p.grad for key, p in run.trainable() if p.grad is not None}


def _two_rows():
    """Right-padded: rows of different lengths in one batch."""
    long, short = (batch for batch in rows(2, lengths=(12, 9), seed=3))
    pad = torch.nn.functional.pad
    return {
        "input_ids": torch.cat([long["input_ids"], pad(short["input_ids"], (0, 3))]),
        "labels": torch.cat([long["labels"], pad(short["labels"], (0, 3), value=-100)]),
    }


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_trains_as_without_tiles(name):
    # The eager form of gpt_oss' experts has no number for those that are elsewhere.
    how = {"experts": "batched_mm"} if name == "gpt_oss" else {}
    wanted = gradients(name, [], **how)
    for kind, techniques in KINDS.items():
        if kind == "groups" and name not in GROUPED:
            continue
        # gemma's norms make float32 of their weights, whatever the model's dtype is
        assert_all_same(gradients(name, techniques, **how), wanted, 1e-6 if "gemma" in name else 1e-12)


@pytest.mark.parametrize("adapting", [tr.LoRA(rank=4, dtype="float64"), tr.Full(train=("*.mlp.up_proj.*",))])
def test_adapters_inside_and_frozen_weights(adapting):
    for techniques in ([TiledMLP(tile=5)], [TiledBlock(tile=5), TiledLoss(tile=4)]):
        assert_all_same(gradients("llama", techniques, adapting), gradients("llama", [], adapting), 1e-12)


def test_packed_documents():
    batches = [packed((7, 5, 4)), packed((9, 7), seed=1)]
    techniques = [TiledBlock(tile=5), TiledLoss(tile=4)]
    assert_all_same(gradients("qwen3", techniques, None, batches), gradients("qwen3", [], None, batches), 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("tiles", [TiledMLP(tile=5), TiledBlock(tile=5)])
def test_compiled_blocks(tiles):
    torch._dynamo.reset()
    batches = rows(2, lengths=(16,))
    techniques = [tiles, TiledLoss(tile=4), tr.Compile(backend="aot_eager")]
    assert_all_same(gradients("llama", techniques, None, batches), gradients("llama", [], None, batches), 1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_names_stay_and_undo_gives_the_very_model_back(kind, name):
    if kind == "groups" and name == "qwen3_moe" and not KNOWS_ELSEWHERE:
        pytest.skip("this transformers has no number for experts elsewhere: refused")
    model = build(name)
    ids = rows(1)[0]["input_ids"]
    before, state = model(ids, use_cache=False).logits, {k: v.clone() for k, v in model.state_dict().items()}
    held = {path: dict(vars(module)) for path, module in model.named_modules()}
    applied = [t.apply(model, Site(anatomy=examine(model), mesh=None)) for t in KINDS[kind]]
    assert [k for k, _ in model.named_parameters()] == [k for k, _ in build(name).named_parameters()]
    assert_same(model(ids, use_cache=False).logits, before, 2e-6)
    model(ids, use_cache=False).logits.sum().backward()
    for one in reversed(applied):
        one.undo()
    assert {path: dict(vars(module)) for path, module in model.named_modules()} == held
    assert torch.equal(model(ids, use_cache=False).logits, before)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])


def test_evaluation_builds_no_graph_and_gives_the_same_loss():
    run, plain = (tr.compose(build("llama"), [tr.Full(), *t]) for t in ([TiledBlock(tile=4), TiledLoss(tile=3)], []))
    (batch,) = next(iter(run.steps([rows(1)])))
    with torch.no_grad():
        assert_same(run.loss(batch), plain.loss(batch), 1e-6)
    assert not run.model.training or run.loss(batch).requires_grad


def test_a_micro_batch_that_trains_nothing_is_zero_and_still_has_a_graph():
    run = tr.compose(build("llama"), [tr.Full(), TiledLoss(tile=3)])
    batch = {**rows(1)[0], "count": 5}
    batch["labels"] = torch.full_like(batch["labels"], -100)
    (batch,) = run.ready([batch])
    loss = run.loss(batch)
    loss.backward()
    assert float(loss) == 0 and all(p.grad is not None and not p.grad.any() for _, p in run.trainable())


def test_explain_tells_what_is_tiled():
    run = tr.compose(build("qwen3_moe"), [tr.Full(), TiledBlock(), TiledLoss(tile=64)])
    said = run.explain()
    assert "routers outside" in said and "norms, q, k and v of 2 blocks" in said and "64 tokens" in said
