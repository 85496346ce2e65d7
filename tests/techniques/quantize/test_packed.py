"""Weights that are stored as codes compute what a plain model with the decoded weights computes, on any mesh."""

import pytest
import torch

import treering as tr
from tests.experts.families import FAMILIES, family
from tests.ranks import on_ranks
from tests.same import assert_all_same, assert_same
from tests.skips import sharded_codes
from tests.toy import gradients, rows, train, weights
from tests.zoo import build, save
from treering import formats
from treering.cli import entry
from treering.core.errors import ConfigError, PlanError
from treering.core.sharded import gather
from treering.experts.routing import route
from treering.techniques.quantize import packed as packing
from treering.techniques.quantize.packed import PackedWeight

# The toys' inputs are 32, 48 and 24 wide.
FORMATS = {
    "int8": {"format": "int8"},
    "int4": {"format": "int4", "group": 8},
    "int3": {"format": "int3", "group": 8, "clip": "mse"},
    "fp8": {"format": "fp8"},
    "fp8_block": {"format": "fp8_block"},
    "nvfp4": {"format": "nvfp4", "targets": ("q_proj", "k_proj", "v_proj", "up_proj")},
    "mxfp4": {"format": "mxfp4", "targets": ("q_proj", "o_proj", "up_proj")},
}
LORA = {"rank": 2, "targets": ("q_proj", "o_proj")}
LAST = tr.LoRA(rank=2, targets=("o_proj",))


def model_of(arch):
    return family(arch) if arch in FAMILIES else build(arch)


def with_rounded_weights(arch, settings):
    """The same model, plain, with the decoded weights, and their largest error."""
    model = model_of(arch)
    run = tr.compose(model_of(arch), [tr.Quantize(**settings)], frozen=True)
    rounded = dict(run.plain())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(rounded[name])
    return model, run.lost


@pytest.mark.parametrize("settings", FORMATS.values(), ids=FORMATS.keys())
def test_training_equals_that_of_a_plain_model_with_the_decoded_weights(settings):
    plain, lost = with_rounded_weights("llama", settings)
    assert lost and all(0 < error < 0.3 for error in lost.values())
    runs = [
        tr.compose(plain, [tr.LoRA(**LORA)]),
        tr.compose(build("llama"), [tr.Quantize(**settings), tr.LoRA(**LORA)]),
    ]
    steps = [rows(3, seed=i) for i in range(3)]
    losses = [train(run, steps) for run in runs]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert_all_same(weights(runs[1]), weights(runs[0]), 1e-6)


@pytest.mark.parametrize("arch", FAMILIES)
def test_experts_of_every_layout(arch):
    settings = {"format": "int4", "group": 8}
    plain, lost = with_rounded_weights(arch, settings)
    assert any("experts" in name for name in lost)
    runs = [tr.compose(plain, [LAST]), tr.compose(family(arch), [tr.Quantize(**settings), LAST])]
    found = [gradients(run, rows(3)) for run in runs]
    assert_all_same(found[1], found[0], 2e-6)


def test_adapters_may_have_the_dtype_that_the_weight_would_have():
    run = tr.compose(build("llama").bfloat16(), [tr.Quantize(format="int8"), tr.LoRA(rank=2, dtype="base")])
    assert {p.dtype for _, p in run.trainable()} == {torch.bfloat16}


def on_mesh(arch, settings, shard, folder):
    techniques = [tr.Quantize(**settings), tr.LoRA(**LORA), tr.Shard(**shard)]
    run = tr.compose(model_of(arch), techniques, prepared=folder)
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    before = {name: gather(p).clone() for name, p in run.model.named_parameters() if p.dtype == torch.uint8}
    train(run, [rows(4, seed=i)[rank::world] for i in range(2)])
    after = {name: gather(p) for name, p in run.model.named_parameters() if p.dtype == torch.uint8}
    assert before and all(torch.equal(after[name], value) for name, value in before.items())
    return weights(run), before


@sharded_codes
@pytest.mark.parametrize("arch", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_train_like_one_process(world, arch, tmp_path):
    settings = {"format": "int4", "group": 8}
    run = tr.compose(model_of(arch), [tr.Quantize(**settings), tr.LoRA(**LORA)])
    train(run, [rows(4, seed=i) for i in range(2)])
    codes = {name: p.clone() for name, p in run.model.named_parameters() if p.dtype == torch.uint8}
    for found, stored in on_ranks(world, on_mesh, arch, settings, {}, tmp_path):
        assert_all_same(found, weights(run), 1e-6)
        assert {name: t.tolist() for name, t in stored.items()} == {name: t.tolist() for name, t in codes.items()}


@sharded_codes
def test_mixed_precision_rounds_neither_codes_nor_scales(tmp_path):
    for _, stored in on_ranks(2, on_mesh, "llama", FORMATS["nvfp4"], {"compute": "bfloat16"}, tmp_path):
        assert {name.rpartition(".")[2] for name in stored} == {"codes", "scales", "global"}


def test_only_codes_are_kept_for_the_backward():
    form = tr.Quantize(format="int4", group=8)
    run = tr.compose(build("llama"), [form, tr.LoRA(**LORA)])
    kept = []
    packed = {p.data_ptr() for p in run.model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        run.loss(run.ready([rows(1)[0] | {"count": 11}])[0])
    widths = {(48, 32), (32, 48), (32, 32), (16, 32)}  # of the decoded weights
    assert not [t.shape for t in kept if tuple(t.shape[-2:]) in widths and t.data_ptr() not in packed]


def test_experts_are_decoded_in_groups_of_those_that_have_tokens(monkeypatch):
    int8, decoded = formats.named("int8"), []
    W = torch.randn(6, 16, 8)
    packed = PackedWeight(int8, (6, 16, 8), torch.device("cpu"), torch.float32)
    for key, value in int8.encode(W).items():
        getattr(packed, key).data = value
    decode = type(int8).decode
    monkeypatch.setattr(type(int8), "decode", lambda *a: decoded.append(len(a[1]["codes"])) or decode(*a))
    monkeypatch.setattr(packing, "GROUP_BYTES", 2 * 16 * 8 * 4)
    x = torch.randn(5, 8)
    routing = route(torch.tensor([[0], [5], [3], [5], [2]]), 6)
    y = packed(x[routing.tokens], routing.offsets)
    assert decoded == [2, 2]
    Q = decode(int8, int8.encode(W), 8, torch.float32)
    expected = torch.stack([x[t] @ Q[e].T for t, e in zip(routing.tokens, routing.experts, strict=True)])
    assert_same(y, expected, 1e-6)


def test_exports_are_plain_and_reopen(tmp_path):
    folder = save("llama", tmp_path / "model")
    run = tr.compose(folder, [tr.Quantize(format="int8"), tr.LoRA(**LORA)])
    train(run, [rows(2)])
    run.export(tmp_path / "merged")
    again = tr.compose(tmp_path / "merged", [tr.Full()])
    assert_all_same(weights(again), weights(run))


def test_what_was_asked_for_is_reported():
    run = tr.compose(build("llama"), [tr.Quantize(format="nvfp4", targets=("q_proj",)), tr.LoRA(**LORA)])
    assert "2 weights in nvfp4, 4.53 bits an element, scales included" in run.explain()
    assert "reconstruction error" in run.explain()


def test_clips_chosen_by_error_lower_it():
    errors = [
        tr.compose(build("llama"), [tr.Quantize(format="int3", group=8, clip=clip)], frozen=True).lost
        for clip in ("max", "mse")
    ]
    assert all(errors[1][name] <= errors[0][name] for name in errors[0])


REFUSALS = {
    "shape": (
        [tr.Quantize(format="mxfp4"), tr.LoRA(rank=2)],
        "mxfp4 groups 32 inputs, and 48 inputs are no multiple of 32. Leave it out of quantize.targets",
    ),
    "no match": ([tr.Quantize(format="int8", targets=("nothing",)), tr.LoRA(rank=2)], "matches no linear"),
    "full": ([tr.Quantize(format="int8"), tr.Full()], "full needs the plain weight of .*, which quantize stores"),
    "osft": ([tr.Quantize(format="int8"), tr.OSFT(protect="weights")], "osft needs the plain weight"),
    "pissa": ([tr.Quantize(format="int8"), tr.LoRA(rank=2, init="pissa")], "lora needs the plain weight"),
    "nothing learns": ([tr.Quantize(format="int8")], "nothing would be trained"),
}


@pytest.mark.parametrize(("techniques", "message"), REFUSALS.values(), ids=REFUSALS.keys())
def test_what_does_not_go_together_is_refused(techniques, message):
    with pytest.raises(PlanError, match=message):
        tr.compose(build("llama"), techniques)


def test_a_weight_that_is_not_finite_is_refused_by_name():
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.inf
    with pytest.raises(PlanError, match=r"layers\.1\.mlp\.up_proj\.weight has values that are not finite"):
        tr.compose(model, [tr.Quantize(format="int8"), tr.LoRA(**LORA)])


def test_settings_that_mean_nothing_are_refused():
    for settings, message in (
        ({"group": 32}, "int4 and int3 take a group"),
        ({"format": "int4", "group": 0}, "int4 and int3 take a group"),
        ({"targets": "q_proj"}, "write all-linear or a list"),
        ({"targets": ()}, "write all-linear or a list"),
    ):
        with pytest.raises(ConfigError, match=message):
            tr.Quantize(**settings)


@sharded_codes
def test_memory_of_quantized_experts_is_planned_from_shapes(tmp_path, capsys):
    save("qwen3_moe", tmp_path / "model")
    (tmp_path / "run.yaml").write_text(
        f"model: {tmp_path}/model\ndata: {{train: x.jsonl, max_length: 64}}\noutput: {tmp_path}/run\n"
        "techniques: {quantize: {format: int4, group: 8}, lora: {rank: 2, targets: [q_proj]}, recompute: , shard: }\n"
    )
    assert entry.run(["plan", str(tmp_path / "run.yaml"), "--ranks", "2"]) == 0
    shown = capsys.readouterr().out
    assert "64 tokens need" in shown and "cannot be planned" not in shown
    assert "12 weights in int4" in shown
