"""Published quantized folders open with their bits kept, and not decoded and encoded again, on any number of ranks."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import treering as tr
from tests.ranks import on_ranks
from tests.same import assert_all_same, assert_same
from tests.skips import sharded_codes
from tests.toy import rows, train, weights
from tests.toy_run import folder as toy_folder
from tests.toy_run import job
from tests.weights import folders, layouts
from tests.weights.folders import WRITERS, published
from treering.cli import entry
from treering.core.sharded import gather
from treering.formats import FP8, MXFP4, NF4, NVFP4, FP8Block, Integer
from treering.train import train as run_job
from treering.train.checkpoints import files as checkpoints
from treering.weights.quantized import opened

LORA = tr.LoRA(rank=2, targets=("q_proj", "o_proj"))
IDS = torch.arange(3, 23)[None]


def codes(run):
    return {name: gather(p).clone() for name, p in run.model.named_parameters() if p.dtype == torch.uint8}


def logits(run):
    with torch.no_grad():
        return run.model(input_ids=IDS).logits


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("arch", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS.keys())
def test_every_layout_computes_what_its_decoded_weights_compute(writer, arch, dtype, tmp_path):
    folder = published(arch, tmp_path / "m", writer)
    stored = tr.compose(folder, [LORA], dtype=dtype)
    plain = tr.compose(folder, [LORA], dtype=dtype, dequantize=True)
    assert len(codes(stored)) >= 24 and not codes(plain)
    assert torch.equal(logits(stored), logits(plain))
    assert_all_same(weights(stored), weights(plain))


def test_codes_and_scales_are_the_bytes_of_the_folder(tmp_path):
    folder = published("llama", tmp_path / "m", WRITERS["nvfp4"])
    files = load_file(folder / "model.safetensors")
    live = codes(tr.compose(folder, [LORA]))
    for i in range(2):
        name = f"model.layers.{i}.mlp.down_proj"
        assert torch.equal(live[f"{name}.packed.codes"], files[f"{name}.weight_packed"])
        assert torch.equal(live[f"{name}.packed.scales"], files[f"{name}.weight_scale"].view(torch.uint8))
        whole = files[f"{name}.weight_global_scale"].view(torch.uint8)
        assert torch.equal(live[f"{name}.packed.global"], whole[None])


def test_gpt_oss(tmp_path):
    folder = folders.gpt_oss(tmp_path / "m")
    stored, plain = tr.compose(folder, [LORA]), tr.compose(folder, [LORA], dequantize=True)
    assert_same(logits(stored), logits(plain), 1e-6)  # transformers adds experts in another order
    assert_all_same(weights(stored), weights(plain))
    files = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.experts"
    live = codes(stored)[f"{name}.packed_gate_up_proj.codes"]
    assert torch.equal(live, files[f"{name}.gate_up_proj_blocks"].flatten(-2))
    losses = [train(run, [rows(3, seed=i) for i in range(2)]) for run in (stored, plain)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


FAMILIES = ["mixtral", "deepseek_v3"]


@pytest.mark.parametrize("arch", FAMILIES)
def test_experts_of_other_families_are_stacked_as_transformers_stacks_them(arch, tmp_path):
    """The values are those that transformers' own conversion makes of the decoded tensors."""

    def chosen(key):
        return key.endswith(".weight") and "experts." in key and "shared" not in key

    folder = published(arch, tmp_path / "m", folders.compressed(Integer(width=4, group=8)), chosen)
    stored, plain = tr.compose(folder, [LORA_O]), tr.compose(folder, [LORA_O], dequantize=True)
    assert any("experts.packed_gate_up_proj" in name for name in codes(stored))
    assert torch.equal(logits(stored), logits(plain))
    assert_all_same(weights(stored), weights(plain))


LORA_O = tr.LoRA(rank=2, targets=("o_proj",))


def test_merges_keep_scales_exact(tmp_path):
    """Of gate and up that become one parameter: a global scale for each, or a scale for each row."""
    forms = {
        "nvfp4": NVFP4(parts=2),
        "fp8 tensor": FP8(scale="channel"),
        "int8 tensor": Integer(width=8, group=0),
        "bitsandbytes": NF4(nested=False),
        "fp8 block": FP8Block(block=16),
        "mxfp4": MXFP4(),
    }
    for name, form in forms.items():
        run = tr.compose(published("qwen3_moe", tmp_path / name, WRITERS[name]), [LORA])
        experts = run.model.model.layers[0].mlp.experts
        assert experts.packed_gate_up_proj.form == form
        own = {"fp8 tensor": FP8(scale="tensor"), "int8 tensor": Integer(width=8, group=-1), "bitsandbytes": NF4()}
        alone = {**forms, **own, "nvfp4": NVFP4()}[name]
        assert experts.packed_down_proj.form == alone


def test_parts_of_other_scales_are_not_mixed_up(tmp_path):
    """Gate a hundred times larger than up: the scales of one would be wrong for the other by that factor."""
    folders.wide("qwen3_moe").save_pretrained(tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    tensors = {key: 100 * t if "gate_proj" in key else t for key, t in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    plain = {key: tensors[key] for key in tensors if "experts.0.gate_proj" in key or "experts.0.up_proj" in key}
    folder = folders.quantize(tmp_path / "m", WRITERS["nvfp4"], folders.linears)
    merged = dict(tr.compose(folder, [LORA]).plain(["model.layers.1.mlp.experts.gate_up_proj"]))
    gate, up = merged["model.layers.1.mlp.experts.gate_up_proj"][0].chunk(2)
    for name, value in (("gate_proj", gate), ("up_proj", up)):
        expected = plain[f"model.layers.1.mlp.experts.0.{name}.weight"]
        assert (value - expected).norm() < 0.15 * expected.norm()


def on_mesh(paths, compute="stored", more=()):
    every = []
    for path in paths:
        run = tr.compose(path, [LORA, tr.Shard(compute=compute), *more])
        before = codes(run)
        world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
        train(run, [rows(4, seed=i)[rank::world] for i in range(2)])
        after = codes(run)
        assert all(torch.equal(after[name], value) for name, value in before.items())
        every.append((before, weights(run)))
    return every


@sharded_codes
@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_hold_the_same_codes_and_train_like_one_process(world, tmp_path):
    """No folder for prepared results is needed: each rank reads its own rows of codes."""
    chosen = [(name, "llama") for name in WRITERS] + [(n, "qwen3_moe") for n in ("nvfp4", "deepseek", "bitsandbytes")]
    paths = [published(arch, tmp_path / f"{i}", WRITERS[name]) for i, (name, arch) in enumerate(chosen)]
    results = on_ranks(world, on_mesh, paths)
    for i, path in enumerate(paths):
        run = tr.compose(path, [LORA])
        stored = codes(run)
        train(run, [rows(4, seed=step) for step in range(2)])
        for rank in results:
            live, trained = rank[i]
            assert live.keys() == stored.keys()
            assert all(torch.equal(live[name], value) for name, value in stored.items())
            assert_all_same(trained, weights(run), 2e-6)


@sharded_codes
def test_mixed_precision_and_recomputing_leave_the_codes_as_they_are(tmp_path):
    names = ("nvfp4", "fp8 block", "bitsandbytes")
    paths = [published("llama", tmp_path / name, WRITERS[name]) for name in names]
    for rank in on_ranks(2, on_mesh, paths, "bfloat16", (tr.Recompute(), tr.TiledLoss())):
        for (live, _), path in zip(rank, paths, strict=True):
            stored = codes(tr.compose(path, [LORA]))
            assert all(torch.equal(live[name], value) for name, value in stored.items())


PROJECTED = tr.OSFT(protect="weights", form="one_sided", ratio=0.4, targets=("up_proj",))


def projected(path, prepared):
    run = tr.compose(path, [PROJECTED, tr.Shard()], prepared=prepared)
    train(run, [rows(4, seed=i)[torch.distributed.get_rank() :: 2] for i in range(2)])
    return weights(run)


@sharded_codes
def test_ranks_share_projectors_of_stored_weights_and_no_codes(tmp_path):
    folder = published("llama", tmp_path / "m", WRITERS["nvfp4"])
    run = tr.compose(folder, [PROJECTED])
    train(run, [rows(4, seed=i) for i in range(2)])
    for trained in on_ranks(2, projected, folder, tmp_path / "prepared"):
        assert_all_same(trained, weights(run), 1e-5)
    results = list((tmp_path / "prepared").glob("*.safetensors"))
    assert len(results) == 2 and not [name for file in results for name in load_file(file) if "packed" in name]


def decoded_reads(path):
    return reads(path, dequantize=True)


@sharded_codes
@pytest.mark.parametrize("writer", ["nvfp4", "fp8 block", "fp8 tensor", "w4a16 asymmetric", "modelopt w4a16"])
def test_a_rank_decodes_its_own_rows(writer, tmp_path):
    folder = published("llama", tmp_path / "m", WRITERS[writer])
    name = "model.layers.0.self_attn.o_proj"
    code = f"{name}.weight_packed" if "modelopt" not in writer and "fp8" not in writer else f"{name}.weight"
    whole = 32 if "modelopt" in writer else 64  # modelopt packs rows in pairs
    assert [counted[code] for counted in on_ranks(2, decoded_reads, folder)] == [whole // 2] * 2


def reads(path, **how):
    """The stored tensors that a rank reads, and how many rows of each."""
    counted = {}
    read = opened.FolderReader.__call__

    def counting(self, key, rows=slice(None), /):
        tensor = read(self, key, rows)
        if not tensor.is_meta:
            counted[key] = counted.get(key, 0) + (tensor.shape[0] if tensor.ndim else 1)
        return tensor

    opened.FolderReader.__call__ = counting
    tr.compose(path, [LORA, tr.Shard()], **how)
    return counted


@sharded_codes
def test_a_rank_reads_its_own_experts_and_its_own_rows(tmp_path):
    folder = published("qwen3_moe", tmp_path / "m", WRITERS["nvfp4"])
    for rank, counted in enumerate(on_ranks(2, reads, folder)):
        experts = {key.split(".experts.")[1][0] for key in counted if ".experts." in key and "packed" in key}
        assert experts == ({"0", "1"} if rank == 0 else {"2", "3"})
        assert counted["model.layers.0.self_attn.q_proj.weight_packed"] == 32  # of 64


def quantized_job(root, **changes):
    path = root / "model"
    if not path.exists():
        folders.quantize(toy_folder(path), folders.compressed(Integer(width=4, group=16)), folders.linears)
    return job(root, techniques=(tr.LoRA(rank=2, targets=("q_proj", "o_proj")),), **changes)


def test_checkpoints_leave_the_codes_to_the_folder_and_a_resume_takes_them_from_there(tmp_path):
    run_job(quantized_job(tmp_path, output="whole"))
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    for step in ("step-10", "step-12"):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / step)
    saved = checkpoints.newest(tmp_path / "run" / "checkpoints", pytest.fail)
    assert saved.step == 5 and not [name for name in saved.tensors if "packed" in name]
    assert not list((tmp_path / "run" / "prepared").glob("*.safetensors"))
    run_job(quantized_job(tmp_path, output="run"))
    ends = [checkpoints.newest(tmp_path / name / "checkpoints", pytest.fail) for name in ("run", "whole")]
    assert [end.step for end in ends] == [12, 12]
    for name, tensor in ends[0].tensors.items():
        assert torch.equal(tensor.read(), ends[1].tensors[name].read()), name
    notes = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any("14 weights stay as the folder stores them: int4 (14)" in str(note) for note in notes)


def resumed(root, first):
    from dataclasses import replace

    settings = quantized_job(root, output="ranks")
    run_job(replace(settings, techniques=(*settings.techniques, tr.Shard())))
    if first:
        return None
    newest = checkpoints.newest(root / "ranks" / "checkpoints", pytest.fail)
    return {name: tensor.read() for name, tensor in newest.tensors.items() if "/" not in name}


@sharded_codes
def test_a_run_on_two_ranks_resumes_on_three(tmp_path):
    quantized_job(tmp_path)  # writes the folder once
    on_ranks(2, resumed, tmp_path, True)
    for step in ("step-10", "step-12"):
        shutil.rmtree(tmp_path / "ranks" / "checkpoints" / step)
    ends = on_ranks(3, resumed, tmp_path, False)
    run_job(quantized_job(tmp_path, output="whole"))
    whole = checkpoints.newest(tmp_path / "whole" / "checkpoints", pytest.fail).tensors
    for name, value in ends[0].items():
        assert_same(value, whole[name].read(), 1e-4)


YAML = """
model: {{path: {folder}{more}}}
data: {{train: x.jsonl, max_length: 64}}
output: {folder}-run
techniques: {{lora: {{rank: 2, targets: [q_proj]}}, recompute: , shard: {quantize}}}
"""


def planned(folder, capsys, more="", quantize=""):
    capsys.readouterr()
    (folder.parent / "run.yaml").write_text(YAML.format(folder=folder, more=more, quantize=quantize))
    status = entry.run(["plan", str(folder.parent / "run.yaml"), "--ranks", "2"])
    shown = capsys.readouterr()
    return status, shown.out + shown.err


@sharded_codes
def test_plan_counts_what_is_stored(tmp_path, capsys):
    folder = published("qwen3_moe", tmp_path / "m", WRITERS["modelopt nvfp4"])
    status, shown = planned(folder, capsys)
    assert status == 0 and "12 weights as the folder stores them: nvfp4 (12)" in shown
    assert "64 tokens need" in shown and "cannot be planned" not in shown
    assert "32 tensors of the folder are ignored: input_scale (32)" in shown
    assert planned(folder, capsys, quantize=", quantize: {format: stored}")[1] == shown
    status, shown = planned(folder, capsys, more=", dequantize: true")
    assert status == 0 and "32 quantized weights (nvfp4 (32)) are decoded to float32: 0.5 MiB" in shown
    assert "as the folder stores them" not in shown


def test_inspect_names_the_formats(tmp_path, capsys):
    folder = published("llama", tmp_path / "m", WRITERS["modelopt nvfp4"])
    assert entry.run(["inspect", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "modelopt: nvfp4 (14)" in shown
    config = json.loads((folder / "hf_quant_config.json").read_text())
    (folder / "hf_quant_config.json").write_text(json.dumps(config | {"quant_method": "gptq"}))
    assert entry.run(["inspect", str(folder)]) == 0
    assert "GPTQ's order of groups cannot be read" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("writer", ["nvfp4", "modelopt fp8", "deepseek"])
def test_exports_are_dense_and_open_as_plain_folders(writer, tmp_path):
    folder = published("qwen3_moe", tmp_path / "m", WRITERS[writer])
    run = tr.compose(folder, [LORA])
    train(run, [rows(2)])
    run.export(tmp_path / "merged")
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    again = tr.compose(tmp_path / "merged", [tr.Full()])
    assert_all_same(weights(again), weights(run))


def test_decoded_weights_can_be_trained_themselves(tmp_path):
    folder = published("qwen3_moe", tmp_path / "m", WRITERS["bitsandbytes"])
    run = tr.compose(folder, [tr.Full()], dequantize=True)
    assert train(run, [rows(2, seed=i) for i in range(3)])[0] > 0
    assert "MiB as they are stored" in run.explain()


def test_an_adapter_that_is_started_from_a_file_adds_to_the_stored_weight(tmp_path):
    folder = published("llama", tmp_path / "m", WRITERS["fp8 channel"])
    first = tr.compose(folder, [LORA])
    train(first, [rows(2, seed=i) for i in range(2)])
    first.export(tmp_path / "adapter", adapter="default")
    again = tr.compose(folder, [tr.LoRA.from_peft(tmp_path / "adapter")])
    assert torch.equal(logits(again), logits(first))


def test_projections_of_stored_weights_train(tmp_path):
    """OSFT in form one_sided reads what is below it: the decoded weight."""
    folder = published("llama", tmp_path / "m", WRITERS["nvfp4"])
    osft = tr.OSFT(protect="weights", form="one_sided", ratio=0.4, targets=("up_proj",))
    runs = [tr.compose(folder, [osft]), tr.compose(folder, [osft], dequantize=True)]
    losses = [train(run, [rows(2, seed=i) for i in range(2)]) for run in runs]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


REFUSALS = {
    "another format": (
        [tr.Quantize(format="int8"), LORA],
        r"quantize and stored both own how the weight is stored of .*Leave them out of quantize\.targets, leave "
        r"quantize out, or set model\.dequantize to true",
    ),
    "full": (
        [tr.Full()],
        r"full needs the plain weight of .*Leave it out of full\..*, or set model\.dequantize to true",
    ),
    "osft": ([tr.OSFT(protect="weights")], r"osft needs the plain weight of .*or set model\.dequantize to true"),
    "pissa": ([tr.LoRA(rank=2, init="pissa")], r"lora needs the plain weight of .*or set model\.dequantize to true"),
    "residual": ([tr.LoRA(rank=2, init="residual")], r"is stored quantized in the model's folder.*kaiming_zeros"),
    "nothing learns": ([], "nothing would be trained"),
}


@pytest.mark.parametrize(("techniques", "message"), REFUSALS.values(), ids=REFUSALS.keys())
def test_what_needs_plain_weights_is_refused(techniques, message, tmp_path):
    folder = published("llama", tmp_path / "m", WRITERS["nvfp4"])
    with pytest.raises(tr.PlanError, match=message):
        tr.compose(folder, techniques)


def test_another_format_may_quantize_what_the_folder_holds_plain(tmp_path):
    folder = folders.gpt_oss(tmp_path / "m")
    quantize = tr.Quantize(format="int8", targets=("q_proj", "k_proj"))
    run = tr.compose(folder, [quantize, LORA])
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in codes(run)} == {
        "packed",
        "packed_gate_up_proj",
        "packed_down_proj",
    }


def test_stored_without_anything_stored_is_refused(tmp_path):
    folders.wide("llama").save_pretrained(tmp_path / "m")
    with pytest.raises(tr.PlanError, match="the model has no weights that its folder holds quantized"):
        tr.compose(tmp_path / "m", [tr.Quantize(format="stored"), LORA])
    with pytest.raises(tr.PlanError, match=r"model\.dequantize is set, and .* holds no quantized weights"):
        tr.compose(tmp_path / "m", [LORA], dequantize=True)
    with pytest.raises(tr.ConfigError, match="leave targets, group, clip, global_scale and storage out"):
        tr.Quantize(format="stored", clip="mse")
    with pytest.raises(tr.PlanError, match="the model is a live one"):
        tr.compose(folders.wide("llama"), [LORA], dequantize=True)


METHODS = {
    "gptq": ({"quant_method": "gptq"}, "GPTQ's order of groups cannot be read"),
    "awq": ({"quant_method": "awq"}, "AWQ's scales of activations cannot be read"),
    "bitsandbytes int8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, r"LLM\.int8"),
}


@pytest.mark.parametrize(("config", "message"), METHODS.values(), ids=METHODS.keys())
def test_other_methods_are_refused_by_name(config, message, tmp_path):
    folders.wide("llama").save_pretrained(tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config}))
    with pytest.raises(tr.CheckpointError, match=message):
        tr.compose(tmp_path / "m", [LORA])


def damaged(folder, key, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    if (value := change(tensors[key])) is None:
        del tensors[key]
    else:
        tensors[key] = value.contiguous()
    save_file(tensors, file, metadata={"format": "pt"})


UP = "model.layers.1.mlp.up_proj"
DAMAGE = {
    "short codes": (
        f"{UP}.weight_packed",
        lambda t: t[:, :-8],
        r"scales of nvfp4 is uint8 \[128, 4\]; .*uint8 \[128, 3\]",
    ),
    "short scales": (f"{UP}.weight_scale", lambda t: t[:, :-1], r"scales of nvfp4 is uint8 \[128, 3\]"),
    "few scales": (f"{UP}.weight_scale", lambda t: t[:-1], r"scales of nvfp4 is uint8 \[127, 4\]"),
    "nan scale": (f"{UP}.weight_global_scale", lambda t: t * torch.nan, "global scale of nvfp4 is not a positive"),
    "no scale": (f"{UP}.weight_scale", lambda t: None, r"has no .*up_proj\.weight_scale; the folder is incomplete"),
}


def on_each(folder):
    with pytest.raises(tr.CheckpointError, match="a scale of nvfp4 is NaN"):
        tr.compose(folder, [LORA, tr.Shard()])
    return True


@sharded_codes
def test_damage_that_one_rank_reads_is_raised_on_all(tmp_path):
    folder = published("qwen3_moe", tmp_path / "m", WRITERS["nvfp4"])
    damaged(folder, "model.layers.1.mlp.experts.3.up_proj.weight_scale", lambda t: torch.full_like(t, torch.nan))
    assert on_ranks(2, on_each, folder) == [True, True]


def test_a_layout_that_the_model_has_no_place_for_is_refused_by_name(tmp_path):
    folder = published("llama", tmp_path / "m", WRITERS["nvfp4"])
    file = folder / "model.safetensors"
    names = {key: key.replace("mlp.up_proj", "mlp.other") for key in load_file(file)}
    save_file({names[key]: t for key, t in load_file(file).items()}, file, metadata={"format": "pt"})
    with pytest.raises(tr.CheckpointError, match=r"quantized weights that no tensor of .* is made of, such as .*other"):
        tr.compose(folder, [LORA])


def test_wrong_sizes_are_refused_before_anything_is_loaded(tmp_path):
    for name, key in (("bitsandbytes", ".absmax"), ("deepseek", "_scale_inv"), ("w4a16 asymmetric", "_zero_point")):
        folder = published("llama", tmp_path / name, WRITERS[name])
        damaged(folder, f"{UP}.weight{key}", lambda t: t[:-1])
        with pytest.raises(tr.CheckpointError, match=r"up_proj\.weight: .*damaged"):
            tr.plan.draft(folder, [LORA], weights=False)


@pytest.mark.parametrize(("key", "change", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_folders_are_refused(key, change, message, tmp_path):
    folder = published("llama", tmp_path / "m", WRITERS["nvfp4"])
    damaged(folder, key, change)
    with pytest.raises(tr.CheckpointError, match=message):
        tr.compose(folder, [LORA])


def test_what_is_no_linear_is_decoded_and_said(tmp_path):
    def chosen(key):
        return folders.linears(key) or key.endswith("mlp.gate.weight") or key == "lm_head.weight"

    folder = published("qwen3_moe", tmp_path / "m", WRITERS["fp8 channel"], chosen)
    runs = [tr.compose(folder, [LORA]), tr.compose(folder, [LORA], dequantize=True)]
    assert torch.equal(logits(runs[0]), logits(runs[1]))
    shown = runs[0].explain()
    assert "13 weights as the folder stores them: fp8 (13)" in shown
    assert "2 others are no linear layers or experts, and are decoded, such as model.layers.0.mlp.gate.weight" in shown
    with pytest.raises(tr.PlanError, match=r"Leave it out of tiledloss, or set model\.dequantize to true"):
        tr.compose(folder, [LORA, tr.TiledLoss()])


def test_measuring_sees_the_inputs_of_stored_weights(tmp_path):
    folder = published("llama", tmp_path / "m", WRITERS["nvfp4"])
    batches = [{"input_ids": IDS}]
    measured = [tr.measure(tr.compose(folder, [], frozen=True, dequantize=d), batches) for d in (False, True)]
    names = list(measured[0])
    assert names == list(measured[1]) and len(names) == 14
    for name in names:
        assert_same(measured[0][name]["inputs"], measured[1][name]["inputs"], 1e-6)


def test_merges_that_no_format_holds_are_refused_and_can_be_decoded(tmp_path):
    cases = {
        "mixed forms": (
            lambda name, weight: layouts.compressed_tensors(name, weight, MXFP4() if "up_proj" in name else NVFP4()),
            folders.linears,
            "which no one format holds",
        ),
        "plain among them": (
            WRITERS["nvfp4"],
            lambda key: folders.linears(key) and "experts.2.up" not in key,
            "is merged of quantized weights and of plain ones",
        ),
        "blocks": (
            lambda name, weight: layouts.deepseek(name, weight, block=48),
            folders.linears,
            r"64, 64\] of one matrix. Set model\.dequantize",
        ),
    }
    for case, (writer, chosen, message) in cases.items():
        folder = published("qwen3_moe", tmp_path / case, writer, chosen)
        if case == "mixed forms":
            config = json.loads((folder / "config.json").read_text())
            group = config["quantization_config"]["config_groups"]["group_0"]
            mx, nv = (
                {"type": "float", "num_bits": 4, "strategy": s, "group_size": g}
                for s, g in (("group", 32), ("tensor_group", 16))
            )
            config["quantization_config"]["config_groups"] = {
                "a": group | {"targets": ["re:.*up_proj"], "weights": mx},
                "b": group | {"weights": nv},
            }
            (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(tr.CheckpointError, match=message):
            tr.compose(folder, [LORA])
        assert torch.isfinite(logits(tr.compose(folder, [LORA], dequantize=True))).all()


def test_transformers_is_never_asked_to_load_or_convert_a_quantized_folder(tmp_path, monkeypatch):
    import transformers

    folder = published("llama", tmp_path / "m", WRITERS["modelopt fp8"])

    def refuse(*_, **__):
        raise AssertionError("transformers loads weights")

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", refuse)
    run = tr.compose(folder, [LORA])
    assert not hasattr(run.model.config, "quantization_config")
    assert type(run.model.model.layers[0].mlp.up_proj) is torch.nn.Linear


@pytest.mark.parametrize("arch", ["qwen3_moe", "gpt_oss"])
def test_adapters_of_experts_on_stored_weights_train_as_on_the_decoded_ones(arch, tmp_path):
    if arch == "gpt_oss":
        folder = folders.gpt_oss(tmp_path / "m")
    else:
        folder = published(arch, tmp_path / "m", WRITERS["nvfp4"])
    adapters = tr.LoRA(rank=2, targets=("gate_up_proj", "down_proj", "q_proj"))
    runs = [tr.compose(folder, [adapters]), tr.compose(folder, [adapters], dequantize=True)]
    before = codes(runs[0])
    losses = [train(run, [rows(3, seed=i) for i in range(3)]) for run in runs]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert_all_same(weights(runs[0]), weights(runs[1]), 1e-5)
    assert all(torch.equal(codes(runs[0])[name], value) for name, value in before.items())
