"""Adapters on a folder that stores its weights quantized start from the residual to the unquantized folder."""

import pytest
import torch

import treering as tr
from tests.ranks import on_ranks
from tests.same import assert_all_same, assert_same
from tests.skips import sharded_codes
from tests.toy import weights
from tests.weights import folders
from treering.core.errors import ConfigError, PlanError
from treering.core.sharded import gather

INT4 = {"format": "int4", "group": 32}


@pytest.fixture(params=["llama", "qwen3_moe", "gpt_oss"])
def pair(request, tmp_path):
    """An unquantized folder, the same quantized, and how."""
    plain, how = tmp_path / "plain", INT4
    folders.wide(request.param).save_pretrained(plain)
    if request.param == "gpt_oss":
        how = {"format": "mxfp4", "targets": ("gate_up_proj", "down_proj")}
    tr.compose(plain, [tr.Quantize(**how)], frozen=True).export(tmp_path / "quantized", packed=True)
    return plain, tmp_path / "quantized", how


def test_the_start_is_that_of_quantizing_here(pair):
    plain, quantized, how = pair
    lora = {"rank": 4, "init": "residual", "targets": how.get("targets", "all-linear")}
    known = tr.compose(plain, [tr.Quantize(**how), tr.LoRA(**lora)])
    stored = tr.compose(quantized, [tr.LoRA(**lora, original=str(plain))])
    # gpt-oss' library rounds what it decodes to bfloat16.
    tolerance = 2e-2 if how["format"] == "mxfp4" else 1e-6
    assert_all_same(weights(stored), weights(known), tolerance)
    W = dict(tr.compose(plain, [], frozen=True).plain())
    Q = dict(tr.compose(quantized, [], frozen=True).plain())
    for name in stored.lost:
        if stored.plan.chains[name].reads:
            left = (dict(stored.plain([name]))[name] - W[name]).norm()
            assert left < (Q[name] - W[name]).norm(), name


def test_activation_weighs_the_residual_by_measured_inputs(pair):
    plain, quantized, how = pair
    ids = torch.randint(3, 120, (1, 24), generator=torch.Generator().manual_seed(0))
    statistics = tr.measure(tr.compose(plain, [], frozen=True), [{"input_ids": ids}])
    lora = {"rank": 4, "init": "activation", "targets": how.get("targets", "all-linear")}
    known = tr.compose(plain, [tr.Quantize(**how), tr.LoRA(**lora)], statistics=statistics)
    stored = tr.compose(quantized, [tr.LoRA(**lora, original=str(plain))], statistics=statistics)
    assert_all_same(weights(stored), weights(known), 2e-2 if how["format"] == "mxfp4" else 1e-4)


def started(quantized, plain, prepared):
    lora = tr.LoRA(rank=4, init="residual", original=str(plain))
    run = tr.compose(quantized, [lora, tr.Shard()], prepared=prepared)
    return {name: gather(p).detach() for name, p in run.trainable()}


@sharded_codes
def test_ranks_start_like_one_process(tmp_path):
    folders.wide("qwen3_moe").save_pretrained(tmp_path / "plain")
    tr.compose(tmp_path / "plain", [tr.Quantize(**INT4)], frozen=True).export(tmp_path / "q", packed=True)
    lora = tr.LoRA(rank=4, init="residual", original=str(tmp_path / "plain"))
    wanted = {name: p.detach() for name, p in tr.compose(tmp_path / "q", [lora]).trainable()}
    for found in on_ranks(2, started, tmp_path / "q", tmp_path / "plain", tmp_path / "prepared"):
        products = [{n: t[n] for n in t} for t in (found, wanted)]
        for name in wanted:
            if name.endswith(".B"):
                B, A = ([t[n] for t in products] for n in (name, f"{name[:-1]}A"))
                assert_same(B[0] @ A[0], B[1] @ A[1], 1e-5, name)


def test_another_original_is_another_start(tmp_path):
    for seed in (0, 1):
        folders.wide("llama", seed=seed).save_pretrained(tmp_path / f"plain{seed}")
    tr.compose(tmp_path / "plain0", [tr.Quantize(**INT4)], frozen=True).export(tmp_path / "q", packed=True)
    starts = []
    for seed in (0, 1):  # the prepared results of the first must not be taken for the second
        lora = tr.LoRA(rank=4, init="residual", original=str(tmp_path / f"plain{seed}"))
        starts.append(weights(tr.compose(tmp_path / "q", [lora], prepared=tmp_path / "prepared")))
    name = "model.layers.0.mlp.down_proj.weight"
    assert not torch.equal(starts[0][name], starts[1][name])


def test_what_does_not_fit_is_refused(tmp_path):
    for arch in ("llama", "qwen3_moe"):
        folders.wide(arch).save_pretrained(tmp_path / arch)
    tr.compose(tmp_path / "llama", [tr.Quantize(**INT4)], frozen=True).export(tmp_path / "q", packed=True)

    def compose(model, original, *more):
        return tr.compose(tmp_path / model, [*more, tr.LoRA(rank=2, init="residual", original=str(original))])

    with pytest.raises(PlanError, match=r"name the folder of the unquantized model as lora\.original"):
        tr.compose(tmp_path / "q", [tr.LoRA(rank=2, init="residual")])
    with pytest.raises(PlanError, match=r"has none for model\.layers\.0\.mlp"):
        compose("q", tmp_path / "qwen3_moe")
    with pytest.raises(PlanError, match="holds quantized weights; name the folder of the unquantized model"):
        compose("q", tmp_path / "q")
    with pytest.raises(PlanError, match="none of the targets is stored quantized here"):
        compose("llama", tmp_path / "llama", tr.Quantize(**INT4))
    with pytest.raises(ConfigError, match="it is for init: residual and activation"):
        tr.LoRA(original="x")
