"""Runs in which nothing learns: for measuring, and for models that others learn from."""

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

import treering as tr
from tests.ranks import on_ranks
from tests.zoo import save


def logits(folder: str, techniques: list, mesh=None) -> torch.Tensor:
    run = tr.compose(folder, techniques, mesh=mesh, frozen=True)
    assert not run.trainable() and not any(p.requires_grad for p in run.model.parameters())
    return run.model(input_ids=torch.arange(8)[None]).logits.detach()


def test_a_frozen_run_computes_what_the_model_computes(tmp_path):
    from transformers import AutoModelForCausalLM

    folder = save("llama", tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = plain(input_ids=torch.arange(8)[None]).logits.detach()
    torch.testing.assert_close(logits(str(folder), []), expected)


def test_techniques_that_train_are_refused_in_a_frozen_run_and_needed_in_another(tmp_path):
    folder = save("llama", tmp_path)
    with pytest.raises(tr.PlanError, match="the run is frozen, and lora trains"):
        tr.compose(folder, [tr.LoRA()], frozen=True)
    with pytest.raises(tr.PlanError, match="nothing would be trained"):
        tr.compose(folder, [])
    with pytest.raises(tr.PlanError, match="nothing to optimize"):
        tr.compose(folder, [], frozen=True).optimizer()


def sharded(folder: str) -> tuple[torch.Tensor, bool, float]:
    """Logits, whether units are shards again afterwards, and the norm of the gradient at the embedding's output."""
    run = tr.compose(folder, [tr.Shard()], mesh=tr.mesh(shard=-1), frozen=True)
    seen = []

    def keep(module, args, output):
        seen.append(output.detach().requires_grad_())
        return seen[-1]

    handle = run.model.get_input_embeddings().register_forward_hook(keep)
    out = run.model(input_ids=torch.arange(8)[None]).logits
    out.square().mean().backward()
    handle.remove()
    units = [module for module in run.model.modules() if isinstance(module, FSDPModule)]
    resting = all(hasattr(p, "placements") for unit in units for p in unit.parameters())
    return out.detach(), resting and not run.trainable(), float(seen[0].grad.norm())


def test_sharded_and_frozen_gradients_flow_to_the_embedding_and_weights_stay(tmp_path):
    folder = str(save("llama", tmp_path))
    one = on_ranks(1, sharded, folder)[0]
    for out, resting, gradient in on_ranks(2, sharded, folder):
        assert resting and gradient > 0 and abs(gradient - one[2]) < 1e-5 * one[2]
        torch.testing.assert_close(out, one[0])
