"""Weights that stay, and multiply as their number format would hold them: equal to plain torch, on any mesh."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import treering as tr
from tests.ranks import on_ranks
from tests.same import assert_all_same, assert_same
from tests.toy import gradients, rows, train, weights
from tests.weights import folders
from tests.zoo import build
from treering import formats
from treering.core.errors import ConfigError, PlanError
from treering.core.module_forward import installed
from treering.core.sharded import gather
from treering.experts.grouped_forward import GroupedForward
from treering.techniques.quantize.reference import straight_through

IDS = torch.arange(3, 23)[None]
BLOCKS = ("model.layers.*",)
INT4 = {"format": "int4", "group": 8}
FORMATS = {
    "int8": ({"format": "int8"}, {"scale_dtype": "float64"}),
    "int4": (INT4, {"group": 8, "scale_dtype": "float64"}),
    "int3": ({"format": "int3", "group": 8}, {"group": 8, "scale_dtype": "float64"}),
    "fp8_block": ({"format": "fp8_block"}, {}),
    "nvfp4": ({"format": "nvfp4", "targets": ("q_proj", "k_proj")}, {}),
}


class Straight(nn.Module):
    def __init__(self, form, transposed):
        super().__init__()
        self.form, self.transposed = form, transposed

    def forward(self, W):
        Q = straight_through(W.mT if self.transposed else W, self.form)
        return Q.mT if self.transposed else Q


def through_plain_torch(run, form):
    """Let the run's weights go through the reference, in place of the fast path."""
    packings = {name: chain.parts[0].packing for name, chain in run.plan.chains.items()}
    for weight, packing in packings.items():
        name, _, leaf = weight.rpartition(".")
        module = run.model.get_submodule(name)
        forward = installed(module)
        (forward.sources[leaf] if isinstance(forward, GroupedForward) else forward).quantizer.off = 1
        parametrize.register_parametrization(module, leaf, Straight(form, packing.transposed), unsafe=True)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("arch", ["llama", "qwen3_moe", "gpt_oss"])
def test_training_equals_plain_torch_in_float64(arch, name):
    quantize, settings = FORMATS[name]
    steps = [rows(3, seed=i) for i in range(2)]
    techniques = [tr.Quantize(**quantize, storage="fake"), tr.Full(train=BLOCKS)]
    runs = [tr.compose(build(arch).double(), techniques) for _ in range(2)]
    trained = [[p for _, p in run.trainable()] for run in runs]
    started = [p.detach().clone() for p in trained[0]]
    through_plain_torch(runs[1], formats.named(name, **settings))
    losses = [train(run, steps) for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    for found, wanted in zip(*trained, strict=True):
        assert_same(found, wanted, 1e-10)
    assert sum(not torch.equal(p, start) for p, start in zip(trained[0], started, strict=True)) > 10


@pytest.mark.parametrize(
    "settings", [{"format": "nvfp4"}, {"format": "nf4"}, {"format": "int3", "group": 32, "clip": "mse"}]
)
@pytest.mark.parametrize("arch", ["llama", "mixtral", "gpt_oss"])
def test_products_are_those_of_packed_weights(arch, settings):
    runs = [
        tr.compose(folders.wide(arch, dtype=torch.bfloat16), [tr.Quantize(**settings, storage=how), tr.LoRA(rank=2)])
        for how in ("fake", "packed")
    ]
    assert runs[0].lost == pytest.approx(runs[1].lost, rel=1e-6)
    found, wanted = (gradients(run, rows(2)) for run in runs)
    assert_all_same(found, wanted)
    assert_all_same(weights(runs[0]), weights(runs[1]))


def test_no_quantized_weight_is_kept_for_the_backward():
    run = tr.compose(build("qwen3_moe"), [tr.Quantize(**INT4, storage="fake"), tr.Full(train=BLOCKS)])
    stored = {p.data_ptr() for p in run.model.parameters()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        run.loss(run.ready([rows(1)[0] | {"count": 11}])[0])
    shapes = {tuple(p.shape) for n, p in run.model.named_parameters() if n in run.plan.chains}
    assert [t for t in kept if tuple(t.shape) in shapes and t.data_ptr() in stored]
    assert not [t.shape for t in kept if tuple(t.shape) in shapes and t.data_ptr() not in stored]


def on_mesh(arch, settings, shard, folder, to):
    model = build(arch).double()  # in float32, values on different sides of a code's edge would come from rounding
    run = tr.compose(model, [tr.Quantize(**settings), tr.Full(train=BLOCKS), tr.Shard(**shard)], prepared=folder)
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    train(run, [rows(4, seed=i)[rank::world] for i in range(2)])
    run.export(to, packed=True)
    return {name: gather(p).detach() for name, p in run.model.named_parameters()}


@pytest.mark.parametrize(
    ("arch", "settings"),
    [("llama", {"format": "fp8_block"}), ("qwen3_moe", INT4), ("llama", FORMATS["nvfp4"][0])],
)
def test_ranks_train_like_one_process(arch, settings, tmp_path):
    """A rank has 5 or 6 of 16 rows: no block of rows and no global scale is one rank's."""
    settings = settings | {"storage": "fake"}
    run = tr.compose(build(arch).double(), [tr.Quantize(**settings), tr.Full(train=BLOCKS)])
    train(run, [rows(4, seed=i) for i in range(2)])
    wanted = {name: p.detach() for name, p in run.model.named_parameters()}
    for found in on_ranks(3, on_mesh, arch, settings, {}, tmp_path / "prepared", tmp_path / "q"):
        assert_all_same(found, wanted, 1e-10)


TOGETHER = {
    "tiledmlp": [tr.TiledMLP(), tr.Recompute()],
    "tiledblock": [tr.TiledBlock(), tr.TiledLoss(), tr.Recompute()],
    "compile": [tr.Compile(backend="aot_eager")],
}


@pytest.mark.parametrize(
    ("arch", "more"),
    [
        pytest.param(arch, more, id=f"{arch}-{name}", marks=[pytest.mark.slow] * ((arch, name) == ("llama", "compile")))
        for arch in ("llama", "qwen3_moe")
        for name, more in TOGETHER.items()
    ],
)
def test_tiles_recompute_and_compile_change_nothing(arch, more):
    techniques = [tr.Quantize(**INT4, storage="fake"), tr.Full(train=BLOCKS)]
    runs = [tr.compose(build(arch).double(), [*techniques, *others]) for others in ([], more)]
    found = [gradients(run, rows(3)) for run in runs]
    assert_all_same(found[1], found[0], 1e-6)  # norms are computed in float32


def trained(folder, techniques, to):
    run = tr.compose(folder, techniques)
    train(run, [rows(2, seed=i) for i in range(2)], lr=0.05)
    run.export(to / "packed", packed=True)
    run.export(to / "dense")
    with torch.no_grad():
        return run, run.model(input_ids=IDS).logits


@pytest.mark.parametrize("settings", [{"format": "nvfp4"}, {"format": "int4", "group": 32}, {"format": "fp8"}])
@pytest.mark.parametrize("arch", ["llama", "qwen3_moe"])
def test_exports_compute_what_was_trained(arch, settings, tmp_path):
    folders.wide(arch, dtype=torch.bfloat16).save_pretrained(tmp_path / "m")
    run, wanted = trained(tmp_path / "m", [tr.Quantize(**settings, storage="fake"), tr.Full(train=BLOCKS)], tmp_path)
    for folder in ("packed", "dense"):
        again = tr.compose(tmp_path / folder, [], frozen=True)
        with torch.no_grad():
            assert torch.equal(again.model(input_ids=IDS).logits, wanted), folder
    codes = dict(tr.compose(tmp_path / "packed", [], frozen=True).model.named_parameters())
    W = run.model.get_submodule("model.layers.0.self_attn.q_proj").weight.detach()
    form = tr.Quantize(**settings).form(run.plan.anatomy and _matrix(run), "bfloat16")
    for key, tensor in form.encode(W).items():
        assert torch.equal(codes[f"model.layers.0.self_attn.q_proj.packed.{key}"], tensor), key


def _matrix(run):
    from treering.anatomy.matrices import matrices

    return next(m for m in matrices(run.plan.anatomy) if m.weight.endswith("layers.0.self_attn.q_proj.weight"))


def test_adapters_are_not_merged_into_what_will_be_codes(tmp_path):
    folders.wide("llama").save_pretrained(tmp_path / "m")
    run = tr.compose(tmp_path / "m", [tr.Quantize(format="nvfp4", storage="fake"), tr.LoRA(rank=2, init="residual")])
    with pytest.raises(PlanError, match="codes cannot hold their sum"):
        run.export(tmp_path / "q", packed=True)
    run.export(tmp_path / "q", packed=True, adapter="default")


def test_without_it_the_model_is_the_original_unless_its_weights_train():
    with torch.no_grad():
        wanted = tr.compose(build("llama"), [], frozen=True).model(input_ids=IDS).logits
    run = tr.compose(build("llama"), [tr.Quantize(**INT4, storage="fake"), tr.LoRA(rank=2)])
    train(run, [rows(1)])
    with torch.no_grad():
        assert not torch.equal(run.model(input_ids=IDS).logits, wanted)
        with run.without():
            assert torch.equal(run.model(input_ids=IDS).logits, wanted)
    run.undo()  # the attention is the model's own again, too
    with torch.no_grad():
        assert_same(run.model(input_ids=IDS).logits, wanted, 1e-6)
    full = tr.compose(build("llama"), [tr.Quantize(**INT4, storage="fake"), tr.Full(train=BLOCKS)])
    with pytest.raises(PlanError, match="full trains weights that the model does not keep"), full.without():
        pass


def test_a_residual_start_brings_back_a_part_of_what_is_left_out():
    fake, zeros = (
        tr.compose(build("llama"), [tr.Quantize(**INT4, storage="fake"), tr.LoRA(rank=4, init=init)])
        for init in ("residual", "kaiming_zeros")
    )
    assert all(fake.lost[name] < zeros.lost[name] for name in zeros.lost)


def mixed(folder, cast):
    quantize = tr.Quantize(format="nvfp4", storage="fake", cast=cast)
    run = tr.compose(folder, [quantize, tr.Full(train=BLOCKS), tr.Shard(compute="bfloat16")], prepared=folder / "p")
    train(run, [rows(2)])
    run.export(folder / "q", packed=True)
    with torch.no_grad():
        return run.model(input_ids=IDS).logits


def test_mixed_precision_quantizes_what_an_export_quantizes(tmp_path):
    folders.wide("llama").save_pretrained(tmp_path)
    with pytest.raises(Exception, match=r"Set quantize\.cast to bfloat16"):
        on_ranks(2, mixed, tmp_path, "stored")
    for found in on_ranks(2, mixed, tmp_path, "bfloat16"):
        again = tr.compose(tmp_path / "q", [], frozen=True, dtype="bfloat16")
        with torch.no_grad():
            assert torch.equal(again.model(input_ids=IDS).logits, found)


@pytest.mark.parametrize("other", [tr.OSFT(protect="weights"), tr.LoRA(rank=2, init="pissa")], ids=["osft", "pissa"])
def test_what_needs_the_weights_own_values_is_refused(other):
    with pytest.raises(PlanError, match="to multiply with its own values, and quantize multiplies with others"):
        tr.compose(build("llama"), [tr.Quantize(**INT4, storage="fake"), other])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "stored", "storage": "fake"}, "leave targets"),
        ({"global_scale": "merged", "storage": "fake"}, "each has its own scale"),
        ({"cast": "bfloat16"}, "which is for storage: fake"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        tr.Quantize(**settings)
