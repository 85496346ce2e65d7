"""A quantized folder whose config does not say so: its codes are no weights, and are never trained as if they were."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import treering as tr
from tests.toy import weights
from tests.zoo import build, save
from treering.plan.explain import unused


def rewritten(folder, change):
    """`change(name, tensor)` gives what the file holds instead, by name."""
    file = folder / "model.safetensors"
    made = {k: v for name, tensor in load_file(file).items() for k, v in change(name, tensor).items()}
    save_file(made, file, metadata={"format": "pt"})
    return folder


def quantized(kind, scale_name):
    def change(name, W):
        if not name.endswith("proj.weight"):
            return {name: W}
        most = 127 if kind is torch.int8 else 448
        scale = W.abs().amax(1, keepdim=True) / most
        codes = (W / scale).round() if kind is torch.int8 else W / scale
        return {name: codes.to(kind), scale_name(name): scale}

    return change


def scale_inv(name):
    return f"{name}_scale_inv"


def scb(name):
    return name.removesuffix("weight") + "SCB"


def with_codes(name, W):
    return {name: W.to(torch.uint8)} if name.endswith("layers.1.mlp.down_proj.weight") else {name: W}


@pytest.mark.parametrize("arch", ["llama", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("scales", [scale_inv, scb])
@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_codes_are_not_trained_as_weights(arch, kind, scales, dtype, tmp_path):
    folder = rewritten(save(arch, tmp_path / "m"), quantized(kind, scales))
    with pytest.raises(tr.CheckpointError) as caught:
        tr.compose(folder, [tr.LoRA(rank=2, targets=("q_proj",))], dtype=dtype)
    text = str(caught.value)
    name = "model.layers.0.self_attn.k_proj.weight" if arch == "gpt_oss" else "down_proj.weight"
    assert name in text and ("I8" if kind is torch.int8 else "F8_E4M3") in text
    assert "no quantization_config" in text and "bfloat16 or float32" in text


def test_one_tensor_of_integers_is_enough(tmp_path):
    folder = rewritten(save("llama", tmp_path / "m"), with_codes)
    with pytest.raises(tr.CheckpointError, match=r"layers\.1\.mlp\.down_proj\.weight is stored as U8"):
        tr.compose(folder, [tr.Full()])


@pytest.mark.parametrize(
    "beside",
    [
        "weight_scale",
        "weight_scale_inv",
        "weight_scale_2",
        "scales",
        "scale",
        "SCB",
        "weight.absmax",
        "weight.nested_absmax",
        "weight.quant_state.bitsandbytes__nf4",
        "weight_zero_point",
        "scale_weight",
    ],
)
def test_a_scale_that_nobody_multiplies_by_is_refused(beside, tmp_path):
    """Even beside a floating-point weight: it was rounded to codes and kept in bfloat16, or never multiplied."""
    name = f"model.layers.0.mlp.up_proj.{beside}"
    change = lambda n, W: {n: W, name: torch.ones(3)} if n == "model.norm.weight" else {n: W}  # noqa: E731
    folder = rewritten(save("llama", tmp_path / "m"), change)
    with pytest.raises(tr.CheckpointError) as caught:
        tr.compose(folder, [tr.Full()])
    text = str(caught.value)
    assert f"{name} looks like a scale" in text and "model.layers.0.mlp.up_proj.weight" in text
    assert "remove the scales from the folder" in text


def test_a_scale_beside_experts_is_refused(tmp_path):
    name = "model.layers.1.mlp.experts.2.gate_proj.weight_scale_inv"
    change = lambda n, W: {n: W, name: torch.ones(3)} if n == "model.norm.weight" else {n: W}  # noqa: E731
    folder = rewritten(save("qwen3_moe", tmp_path / "m"), change)
    with pytest.raises(tr.CheckpointError, match=r"experts\.2\.gate_proj\.weight_scale_inv looks like a scale"):
        tr.compose(folder, [tr.Full()])


@pytest.mark.parametrize(
    ("arch", "packed"),
    [("llama", ("qweight", "qzeros", "scales")), ("llama", ("weight_packed", "weight_scale")), ("gpt_oss", None)],
)
def test_packed_weights_are_not_called_an_incomplete_folder(arch, packed, tmp_path):
    def change(name, W):
        if arch == "gpt_oss" and name.endswith("gate_up_proj"):
            return {f"{name}_blocks": W.to(torch.uint8), f"{name}_scales": W[..., 0].to(torch.uint8)}
        if arch == "llama" and name.endswith("proj.weight"):
            return {name.removesuffix("weight") + leaf: W.to(torch.int32) for leaf in packed}
        return {name: W}

    folder = rewritten(save(arch, tmp_path / "m"), change)
    with pytest.raises(tr.CheckpointError, match=r"has no tensor for .*it contains quantized weights, .*\(.*\d\)"):
        tr.compose(folder, [tr.Full()])


def test_what_the_model_has_no_place_for_is_listed_and_the_rest_trains(tmp_path):
    more = {f"model.visual.blocks.{i}.{leaf}": torch.ones(2) for i in range(12) for leaf in ("norm.weight", "fc.bias")}
    more |= {f"mtp.layers.0.{leaf}.weight": torch.ones(2, dtype=torch.int8) for leaf in ("a", "b")}
    more |= {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    change = lambda n, W: {n: W, **more} if n == "model.norm.weight" else {n: W}  # noqa: E731
    folder = rewritten(save("llama", tmp_path / "m"), change)
    run = tr.compose(folder, [tr.Full()])
    assert set(run.plan.source.unused) == set(more)
    line = unused(run.plan)
    assert line.startswith("27 of the folder's tensors have no place in this model")
    for part in ("model.visual.blocks.*.norm.weight (12)", "mtp.layers.*.a.weight", "inv_freq"):
        assert part in line
    assert line in run.explain() and len(line) < 500
    assert weights(run).keys() == dict(build("llama").named_parameters()).keys()


def test_a_long_list_stays_short(tmp_path):
    more = {f"model.visual.blocks.{i}.part{chr(97 + i)}.weight": torch.ones(2) for i in range(20)}
    more |= {f"audio{chr(97 + i)}.weight": torch.ones(2) for i in range(9)}
    change = lambda n, W: {n: W, **more} if n == "model.norm.weight" else {n: W}  # noqa: E731
    line = unused(tr.compose(rewritten(save("llama", tmp_path / "m"), change), [tr.Full()]).plan)
    assert "model.* (20)" in line and "and 4 more" in line and len(line) < 300


@pytest.mark.parametrize("row", [0, 127])
def test_a_head_of_its_own_is_not_dropped_because_the_config_ties_it(row, tmp_path):
    def change(name, W):
        if name != "model.embed_tokens.weight":
            return {name: W}
        return {name: W, "lm_head.weight": W + 0.1 * (torch.arange(len(W)) == row)[:, None]}

    folder = rewritten(save("llama", tmp_path / "m", tied=True), change)
    with pytest.raises(tr.CheckpointError, match=r"lm_head.weight is another tensor.*tie_word_embeddings to false"):
        tr.compose(folder, [tr.Full()])


def test_a_config_in_eight_bits_is_refused_and_another_dtype_may_be_named(tmp_path):
    folder = save("llama", tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float8_e4m3fn"}))
    with pytest.raises(tr.PlanError, match=r"float8_e4m3fn.*set model.dtype"):
        tr.compose(folder, [tr.Full()])
    assert tr.compose(folder, [tr.Full()], dtype="float32").model.dtype is torch.float32


def test_a_live_model_in_eight_bits_is_refused():
    model = build("llama")
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.data = weight.data.to(torch.float8_e4m3fn)
    with pytest.raises(tr.PlanError, match=r"up_proj\.weight in float8_e4m3fn.*dequantize"):
        tr.compose(model, [tr.Full()])
