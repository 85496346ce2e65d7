"""Compiling a block changes no number. `aot_eager` traces forward and backward as inductor does, without kernels."""

import pytest
import torch

import treering as tr
from tests.ranks import on_ranks
from tests.same import assert_all_same
from tests.toy import gradients, packed, rows
from tests.zoo import build
from treering.core.topology import data_rank

OURS = tr.Compile(backend="aot_eager")
LEARNS = {"full": tr.Full(), "lora": tr.LoRA(rank=2, targets=("q_proj", "down_proj"))}


def losses_and_gradients(case, *others, arch="llama"):
    run = tr.compose(build(arch), [LEARNS[case], *others])
    with torch.no_grad():
        for name, parameter in run.trainable():
            if name.endswith(".B"):
                parameter.fill_(0.01)
    rank, ranks = data_rank(run.plan.mesh)
    batches = rows(2)[rank::ranks]
    losses = []
    for ready in run.steps([batches]):
        losses = [float(run.loss(batch).detach()) for batch in ready]
    return losses, gradients(run, batches)


@pytest.mark.parametrize("case", LEARNS)
def test_loss_and_gradients_are_eagers(case):
    wanted_losses, wanted = losses_and_gradients(case)
    losses, found = losses_and_gradients(case, OURS)
    assert losses == pytest.approx(wanted_losses, rel=1e-6)
    assert_all_same(found, wanted, 1e-6)


def test_inside_shards_on_two_ranks_as_well():
    _, wanted = losses_and_gradients("full")
    for _, found in on_ranks(2, losses_and_gradients, "full", OURS, tr.Shard()):
        assert_all_same(found, wanted, 1e-6)


def test_packed_documents_pass_through():
    batch = packed((7, 5, 4))
    wanted = gradients(tr.compose(build("llama"), [tr.Full()]), [batch])
    assert_all_same(gradients(tr.compose(build("llama"), [tr.Full(), OURS]), [batch]), wanted, 1e-6)


def test_each_block_is_compiled_and_undo_restores_it():
    run = tr.compose(build("llama"), [tr.Full(), tr.Compile(backend="eager")])
    blocks = list(run.model.model.layers)
    assert all(block._compiled_call_impl is not None for block in blocks)
    assert "2 blocks, backend eager" in run.explain()
    run.plan.applied[-1].undo()
    assert all(block._compiled_call_impl is None for block in blocks)
    assert_all_same(gradients(run, rows(2)), losses_and_gradients("full")[1])


def test_names_stay_as_they_are(tmp_path):
    run = tr.compose(build("llama"), [tr.Full(), OURS])
    assert set(dict(run.model.named_parameters())) == set(dict(build("llama").named_parameters()))
    run.export(tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_what_runs_in_tiles_and_is_not_compiled_is_listed():
    for tiles, names in ((tr.TiledMLP(tile=4), "mlp"), (tr.TiledBlock(tile=4), "input_layernorm, mlp")):
        text = tr.compose(build("llama"), [tr.Full(), tiles, OURS, tr.Recompute()]).explain()
        assert f"not compiled, because they run in tiles: {names}" in text
    assert "not compiled" not in tr.compose(build("llama"), [tr.Full(), tr.TiledLoss(), OURS]).explain()


def test_in_tiles_nothing_is_compiled_indeed():
    seen = []

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes if "silu" in str(node.target))
        return graph

    for techniques, compiled in (([], True), ([tr.TiledMLP(tile=4)], False)):
        torch._dynamo.reset()
        seen.clear()
        run = tr.compose(build("llama"), [tr.Full(), *techniques, tr.Compile(backend="eager")])
        for block in run.model.model.layers:
            block._compiled_call_impl = torch.compile(block._call_impl, backend=backend)
        gradients(run, rows(1))
        assert bool(seen) == compiled
