"""Adapters on stacked experts: against the gradient of the merged weight, on ranks, on codes, and in peft's files."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import treering as tr
from tests.experts.families import FAMILIES, family
from tests.ranks import on_ranks
from tests.same import assert_all_same, assert_same
from tests.skips import sharded_codes
from tests.techniques.lora.test_math import randomised
from tests.toy import gradients, rows, train, weights
from tests.zoo import VOCABULARY
from treering.core.errors import CheckpointError, PlanError
from treering.core.sharded import gather

EXPERTS = ("*.experts.*",)
IDS = torch.arange(3, 21).view(2, 9)
each = pytest.mark.parametrize("arch", FAMILIES)


def stacks(run):
    return [m for m in run.plan.techniques[-1].matrices(run.plan.anatomy) if m.lead]


@torch.no_grad()
def logits(model):
    return model.eval()(IDS, use_cache=False).logits


@each
def test_gradients_are_those_of_the_merged_weight_by_the_chain_rule(arch):
    lora = tr.LoRA(rank=3, alpha=5.0, targets=EXPERTS, dtype="float64")
    run = randomised(tr.compose(family(arch, dtype=torch.float64), [lora]))
    plain = family(arch, "eager", torch.float64)
    with torch.no_grad():
        merged = dict(run.plain())
        for name, parameter in plain.named_parameters():
            parameter.copy_(merged[name])
    full, matrices = tr.compose(plain, [tr.Full(train=EXPERTS)]), stacks(run)
    assert_same(logits(run.model), logits(full.model), 1e-6 if arch == "nemotron_h" else 1e-11, "logits")
    found, wanted = gradients(run, rows(3)), gradients(full, rows(3))
    assert matrices and len(found) == 2 * len(matrices)
    for matrix in matrices:
        prefix = f"{matrix.module}.lora_default_{matrix.leaf}"
        A, B = (run.model.get_parameter(f"{prefix}.{half}").detach() for half in "AB")
        dW = matrix.oriented(wanted[matrix.weight]) * 5 / 3
        tolerance = 1e-6 if arch == "nemotron_h" else 1e-10
        assert_same(found[f"{prefix}.A"], B.mT @ dW, tolerance, f"{prefix}.A")
        assert_same(found[f"{prefix}.B"], dW @ A.mT, tolerance, f"{prefix}.B")


@each
def test_a_start_at_zero_changes_no_bit_and_adapters_can_be_switched_off(arch):
    plain = tr.compose(family(arch), [], frozen=True).model
    run = tr.compose(family(arch), [tr.LoRA(rank=3)])
    assert stacks(run), "all-linear includes experts"
    assert torch.equal(logits(run.model), logits(plain))
    randomised(run)
    assert not torch.equal(logits(run.model), logits(plain))
    [off] = [applied.without for applied in run.plan.applied if applied.without]
    with off():
        assert torch.equal(logits(run.model), logits(plain))


def test_each_expert_starts_from_a_seed_of_its_own():
    run = tr.compose(family("qwen3_moe"), [tr.LoRA(rank=3)])
    for matrix in stacks(run):
        A = run.model.get_parameter(f"{matrix.module}.lora_default_{matrix.leaf}.A")
        assert len({tuple(one.flatten().tolist()) for one in A}) == len(A)
        assert float(A.detach().abs().max()) <= matrix.inputs**-0.5


def trained(arch, techniques, folder=None, shard=None):
    techniques = [*techniques, *([tr.Shard(**shard)] if shard is not None else [])]
    run = tr.compose(family(arch), techniques, prepared=folder)
    distributed = torch.distributed.is_initialized()
    rank, world = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if distributed else (0, 1)
    before = {name: gather(p).clone() for name, p in run.model.named_parameters() if not p.requires_grad}
    start = {name: gather(p).clone() for name, p in run.trainable()}
    train(run, [rows(4, seed=i)[rank::world] for i in range(2)])
    after = {name: gather(p) for name, p in run.model.named_parameters() if not p.requires_grad}
    assert all(torch.equal(after[name], value) for name, value in before.items())
    return start, {name: gather(p) for name, p in run.trainable()}, weights(run)


@pytest.mark.parametrize(
    "techniques",
    [[], pytest.param([tr.Quantize(format="int4", group=8)], marks=sharded_codes)],
    ids=["plain", "packed"],
)
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_start_and_train_like_one_process(world, techniques, tmp_path):
    techniques = [*techniques, tr.LoRA(rank=2, targets=(*EXPERTS, "q_proj"))]
    start, _, wanted = trained("qwen3_moe", techniques)
    for first, _, found in on_ranks(world, trained, "qwen3_moe", techniques, tmp_path, {}):
        assert all(torch.equal(first[name], value) for name, value in start.items())
        assert_all_same(found, wanted, 1e-6)


def test_a_pinned_dtype_holds_under_mixed_precision(tmp_path):
    """Every expert has learned, in float32, and the base kept its bits (asserted in `trained`)."""
    lora = tr.LoRA(rank=2, targets=EXPERTS, dtype="fp32")
    for first, last, _ in on_ranks(2, trained, "qwen3_moe", [lora], tmp_path, {"compute": "bfloat16"}):
        assert all(value.dtype == torch.float32 for value in last.values())
        assert all(not torch.equal(first[name], value) for name, value in last.items())


@each
def test_adapters_on_codes_train_as_on_the_decoded_weights(arch):
    quantize = tr.Quantize(format="int4", group=8)
    decoded = dict(tr.compose(family(arch), [quantize], frozen=True).plain())
    plain = family(arch)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(decoded[name])
    runs = [
        randomised(tr.compose(model, [*techniques, tr.LoRA(rank=2, alpha=0.2)]))
        for model, techniques in ((plain, []), (family(arch), [quantize]))
    ]
    found = [gradients(run, rows(3)) for run in runs]
    assert_all_same(found[1], found[0], 5e-6)


def test_several_adapters_with_different_targets_add_up():
    one = {"name": "one", "rank": 2, "targets": ("*.experts.down_proj",)}
    two = {"name": "two", "rank": 3, "targets": EXPERTS}
    alone = [randomised(tr.compose(family("qwen3_moe", dtype=torch.float64), [tr.LoRA(**s)])) for s in (one, two)]
    both = randomised(tr.compose(family("qwen3_moe", dtype=torch.float64), [tr.LoRA(**one), tr.LoRA(**two)]))
    base = dict(family("qwen3_moe", dtype=torch.float64).named_parameters())
    changes = [dict(run.plain()) for run in alone]
    for name, value in both.plain():
        wanted = base[name] + sum(change[name] - base[name] for change in changes)
        assert_same(value, wanted, 1e-6, name)  # factors are float32


def test_the_start_that_moves_the_base_reproduces_every_expert():
    plain = family("gpt_oss")
    run = tr.compose(family("gpt_oss"), [tr.LoRA(rank=4, init="pissa", targets=EXPERTS)])
    assert_all_same(dict(run.plain()), dict(plain.named_parameters()), 1e-5)
    assert all(float(p.detach().abs().sum((-1, -2)).min()) > 0 for _, p in run.trainable())


@pytest.mark.parametrize("rank", [3, 4])  # the toys have four experts
@pytest.mark.parametrize("arch", ["qwen3_moe", "gpt_oss", "mixtral"])
@pytest.mark.parametrize("targets", ["all-linear", EXPERTS, ("*.experts.down_proj",)], ids=str)
def test_peft_opens_what_we_export_and_we_open_it_again(arch, rank, targets, tmp_path):
    from peft import PeftModel

    run = randomised(tr.compose(family(arch), [tr.LoRA(rank=rank, alpha=5.0, targets=targets)]))
    run.export(tmp_path / "a", adapter="default")
    opened = PeftModel.from_pretrained(family(arch, "eager"), tmp_path / "a")
    wanted = logits(copy.deepcopy(opened).double())
    assert_same(logits(copy.deepcopy(run.model).double()), wanted, 1e-5, "logits")
    merged = opened.merge_and_unload().state_dict()
    for name, value in run.plain():
        assert_same(merged[name], value, 1e-6, name)
    again = tr.compose(family(arch), [tr.LoRA.from_peft(tmp_path / "a")])
    assert {name: p.tolist() for name, p in again.trainable()} == {n: p.tolist() for n, p in run.trainable()}


def test_an_adapter_with_inputs_and_outputs_exchanged_is_refused(tmp_path):
    run = randomised(tr.compose(family("qwen3_moe"), [tr.LoRA(rank=3, targets=("*.experts.down_proj",))]))
    run.export(tmp_path / "a", adapter="default")
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    other = {"_A.": "_B.", "_B.": "_A."}
    for name in list(tensors):
        half = name[-9:-6]
        tensors[name] = load_file(file)[name.replace(half, other[half])].T.contiguous()
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"exchanged, as peft before 0\.19"):
        tr.compose(family("qwen3_moe"), [tr.LoRA.from_peft(tmp_path / "a")])


def test_square_adapters_of_an_unknown_version_are_refused(tmp_path):
    config = family("qwen3_moe").config
    config.moe_intermediate_size = config.hidden_size
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config)
    run = tr.compose(copy.deepcopy(model), [tr.LoRA(rank=3, targets=("*.experts.down_proj",))])
    run.export(tmp_path / "a", adapter="default")
    tr.compose(copy.deepcopy(model), [tr.LoRA.from_peft(tmp_path / "a")])
    path = tmp_path / "a" / "adapter_config.json"
    body = json.loads(path.read_text())
    path.write_text(json.dumps(body | {"peft_version": "0.18.1"}))
    with pytest.raises(CheckpointError, match="exchanged"):
        tr.compose(copy.deepcopy(model), [tr.LoRA.from_peft(tmp_path / "a")])


def test_families_without_the_interface_are_refused_by_name():
    from transformers import AutoModelForCausalLM, Llama4TextConfig

    config = Llama4TextConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=24, intermediate_size_mlp=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=1,
    )  # fmt: skip
    with pytest.raises(PlanError, match=r"Llama4TextExperts does not have .* lora\.targets"):
        tr.compose(AutoModelForCausalLM.from_config(config), [tr.LoRA(rank=2)])
