"""Under FSDP2 and DDP: gradients of the untiled run, and not one collective more."""

import functools
from collections import Counter

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import treering as tr
from tests.ranks import on_ranks
from tests.same import assert_all_same
from tests.toy import rows
from tests.zoo import build
from treering.anatomy import examine
from treering.core.sharded import gather
from treering.core.topology import data_rank
from treering.technique import Site
from treering.techniques.osft import OSFT
from treering.techniques.tiling import TiledBlock, TiledLoss, TiledMLP

TILES = {
    "mlp": [TiledMLP(tile=5)],
    "block and loss": [TiledBlock(tile=5), TiledLoss(tile=3)],
}
SETTINGS = {
    "plain": ([tr.Full()], tr.Shard(), {}),
    "not resharded": ([tr.Full()], tr.Shard(reshard=False), {}),
    "offloaded": ([tr.Full()], tr.Shard(offload="cpu"), {}),
    "bfloat16": ([tr.Full()], tr.Shard(compute="bfloat16"), {}),
    "recomputed": ([tr.Full()], tr.Shard(), {"recompute": True}),
    "recomputed, not resharded": ([tr.Full()], tr.Shard(reshard=False), {"recompute": True}),
    "tied": ([tr.Full()], tr.Shard(), {"tied": True}),
    "lora": ([tr.LoRA(rank=4)], tr.Shard(), {}),
    "lora, recomputed": ([tr.LoRA(rank=4)], tr.Shard(), {"recompute": True}),
    "osft": ([OSFT(form="one_sided", protect="weights")], tr.Shard(), {}),
    "osft update": ([OSFT(form="update", protect="weights")], tr.Shard(), {}),
    "experts": ([tr.Full()], tr.Shard(), {"model": "qwen3_moe"}),
    "frozen": ([tr.Full(train=("model.layers.1.mlp.*", "model.layers.0.mlp.up_proj*"))], tr.Shard(), {}),
}


class Collectives(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional"):
            self.seen[func.name()] += 1
        return func(*args, **(kwargs or {}))


def recompute(model):
    """Each block's forward inside a checkpoint, inside its FSDP unit."""
    for block in model.model.layers:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def gradients(setting, tiles, folder):
    """(whole gradients, collectives) of a step of two micro-batches a rank, with lengths that differ between ranks."""
    techniques, shard, how = SETTINGS[setting]
    model = build(how.get("model", "llama"), tied=how.get("tied"), dtype=torch.float32)
    mesh = tr.mesh()
    run = tr.compose(model, [*techniques, *tiles, shard], mesh=mesh, prepared=folder)
    if how.get("recompute"):
        recompute(run.model)
    with torch.no_grad():
        for name, parameter in run.trainable():
            if name.endswith((".B", ".Z")):
                parameter.fill_(0.02)
    rank, ranks = data_rank(mesh)
    micro = rows(4, lengths=(23, 4, 9, 14))[rank::ranks]
    with Collectives() as collectives:
        for ready in run.steps([micro]):
            for batch in ready:
                run.loss(batch).backward()
    found = {name: gather(p.grad) for name, p in run.trainable() if p.grad is not None}
    return found, collectives.seen


def compare(settings, kinds, folder):
    for setting in settings:
        wanted, collectives = gradients(setting, [], folder)
        for kind in kinds:
            found, counted = gradients(setting, TILES[kind], folder)
            assert counted == collectives, f"{setting}, {kind}"
            assert counted or torch.distributed.get_world_size() == 1  # a rank alone has nobody to talk to
            tolerance = 2e-2 if setting == "bfloat16" else 2e-6
            try:
                assert_all_same(found, wanted, tolerance)
            except AssertionError as error:
                raise AssertionError(f"{setting}, {kind}: {error}") from None


FEW = ["bfloat16", "recomputed", "lora", "experts", "tied"]


@pytest.mark.parametrize(("ranks", "settings"), [(1, FEW[1:2]), (2, FEW)])
def test_sharded_gradients_and_collectives_are_those_without_tiles(ranks, settings, tmp_path):
    on_ranks(ranks, compare, settings, ["block and loss"], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_in_every_setting_as_well(ranks, tmp_path):
    on_ranks(ranks, compare, list(SETTINGS), list(TILES), tmp_path)


def own_units(tiles):
    """The MLP a unit of its own, and gradients that stay on their rank until the last micro-batch."""
    model = build("llama")
    if tiles:
        TiledMLP(tile=5).apply(model, Site(anatomy=examine(model), mesh=None))
    for layer in model.model.layers:
        fully_shard(layer.mlp)
        fully_shard(layer)
    fully_shard(model)
    batches = rows(4, lengths=(23, 4, 9, 14))[torch.distributed.get_rank() :: 2]
    with Collectives() as collectives:
        for i, batch in enumerate(batches):
            model.set_requires_gradient_sync(i == len(batches) - 1)
            model(batch["input_ids"], use_cache=False).logits.float().square().mean().backward()
    return {name: gather(p.grad) for name, p in model.named_parameters()}, collectives.seen


def compare_own_units():
    (wanted, without), (found, counted) = own_units(False), own_units(True)
    assert_all_same(found, wanted, 2e-6)
    assert counted == without


def test_an_mlp_that_is_a_unit_itself_and_gradients_summed_late():
    on_ranks(2, compare_own_units)
