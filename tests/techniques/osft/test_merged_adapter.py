"""Form `merged` takes the steps of `one_sided`, with the forward of the plain model, on any number of ranks."""

import shutil
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

import treering as tr
from tests.ranks import on_ranks
from tests.same import assert_all_same, assert_same
from tests.techniques.osft.measured import moments
from tests.toy import packed, rows, train, weights
from tests.toy_run import folder, job
from tests.zoo import build
from treering.core.topology import data_rank
from treering.curvature.statistics import Ring
from treering.plan import draft
from treering.techniques.osft.merged_adapter import _LinearGradient
from treering.techniques.osft.protection.targets import targets
from treering.train.checkpoints.files import read
from treering.train.config import StatisticsSection

STEPS = [rows(4, seed=i) for i in range(4)]
MERGED = tr.OSFT(form="merged")


def composed(config, arch="llama", dtype=torch.float64, techniques=(), known=None, **more):
    model = build(arch, dtype=dtype)
    statistics = moments(model, config) if known is None else known
    return tr.compose(model, [config, *techniques], statistics=statistics, **more)


def test_it_is_the_default_where_inputs_are_protected():
    assert tr.OSFT().chosen_form == "merged"
    assert tr.OSFT(protect="weights").chosen_form == tr.OSFT(keep_initial=True).chosen_form == "update"
    assert tr.OSFT(communication="cached").chosen_form == "update"
    with pytest.raises(tr.ConfigError, match="form merged trains between all outputs"):
        tr.OSFT(form="merged", protect="both")


@pytest.mark.parametrize("arch", ["llama", "gpt2", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize(
    "config",
    [tr.OSFT(ratio=0.3), tr.OSFT(strength="hard", ratio=0.5), tr.OSFT(rank="energy")],
    ids=["soft", "hard", "energy"],
)
def test_steps_are_those_of_one_sided(config, arch):
    found = {}
    for form in ("merged", "one_sided"):
        ratio = config.ratio if config.rank == "ratio" else None
        run = composed(replace(config, form=form, ratio=ratio), arch)
        losses = train(run, STEPS, torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
        found[form] = weights(run), torch.tensor(losses)
    assert_all_same(found["merged"][0], found["one_sided"][0], 1e-9)
    assert_same(found["merged"][1], found["one_sided"][1], 1e-9)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Muon])
def test_steps_of_any_optimizer_are(kind):
    found = []
    for form in ("merged", "one_sided"):
        run = composed(tr.OSFT(form=form, ratio=0.3, targets=("q_proj", "down_proj")))
        train(run, STEPS, kind, lr=1e-2)
        found.append(weights(run))
    assert_all_same(*found, 1e-9)


def test_the_output_is_the_plain_models_and_the_gradient_that_of_the_narrowed_inputs():
    run = composed(replace(MERGED, targets=("q_proj", "gate_proj")))
    plain = tr.compose(build("llama", dtype=torch.float64), [tr.Full(train=("q_proj", "gate_proj"))])
    for one in (run, plain):
        for batches in one.steps(STEPS[:1]):
            for batch in batches:
                one.loss(batch).backward()
    for name, p in plain.trainable():
        child = run.model.get_submodule(name.removesuffix(".weight")).osft
        assert_same(child.Z.grad, p.grad @ child.B, 1e-12, name)
    assert torch.equal(*(one.model(torch.arange(9)[None]).logits for one in (run, plain)))


def on_a_mesh(arch, sharding, techniques, folder):
    mesh = None if sharding is None else tr.mesh(**sharding)
    rank, ranks = data_rank(mesh)
    more = techniques if mesh is None else (*techniques, tr.Shard())
    run = composed(MERGED, arch, techniques=more, mesh=mesh, prepared=folder)
    losses = train(run, [batches[rank::ranks] for batches in STEPS], torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
    return weights(run), losses


@pytest.mark.parametrize(
    ("arch", "sharding"),
    [
        ("llama", {"shard": 2}),
        ("gpt2", {"shard": 3}),
        ("llama", {"replicate": 2, "shard": 2}),
        ("qwen3_moe", {"shard": 2}),
        ("qwen3_moe", {"shard": 2, "expert": 2}),
    ],
    ids=str,
)
def test_every_mesh_trains_like_one(arch, sharding, tmp_path):
    wanted, losses = on_a_mesh(arch, None, (), tmp_path)
    world = sharding.get("replicate", 1) * sharding["shard"]
    found = on_ranks(world, on_a_mesh, arch, sharding, (), tmp_path)
    for changed, _ in found:
        assert_all_same(changed, wanted, 1e-9)
    assert [sum(step) for step in zip(*(shares for _, shares in found))] == pytest.approx(losses, rel=1e-9)


@pytest.mark.parametrize("arch", ["llama", "qwen3_moe"])
def test_tiles_and_recompute_change_nothing(arch):
    found = []
    for techniques in ((), (tr.TiledMLP(tile=5), tr.TiledLoss(tile=4), tr.Recompute())):
        run = composed(MERGED, arch, techniques=techniques)
        train(run, [[packed((9, 4, 11), seed=i)] for i in range(3)], torch.optim.AdamW, lr=1e-2)
        found.append(weights(run))
    assert_all_same(*found, 1e-9)


def test_a_loop_with_hooks_and_a_scaler_that_skips_all_steps_leaves_the_weights():
    run = composed(MERGED)
    before = weights(run)
    optimizer = torch.optim.AdamW([p for _, p in run.trainable()], lr=1e-2, weight_decay=0.5, fused=True)
    run.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for slope, batches in zip((torch.inf, torch.nan, 1.0), run.steps(STEPS)):
        if slope == 1.0:
            assert_all_same(weights(run), before)
        for batch in batches:
            scaler.scale(run.loss(batch) * slope).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert not torch.equal(*(values["model.layers.0.self_attn.q_proj.weight"] for values in (weights(run), before)))


def test_the_change_is_in_the_rounded_basis_and_the_adapter_is_the_change(tmp_path):
    from peft import PeftModel

    run = composed(MERGED, dtype=torch.float32)
    before = weights(run)
    train(run, STEPS, torch.optim.AdamW, lr=1e-2, weight_decay=0.0)
    after = weights(run)
    for name in before:
        if name.endswith("proj.weight"):
            B = run.model.get_submodule(name.removesuffix(".weight")).osft.B
            assert B.dtype == torch.bfloat16 and B.shape[1] == before[name].shape[1] * 3 // 8
            Q = torch.linalg.qr(B.double()).Q
            change = (after[name] - before[name]).double()
            assert float((change - change @ Q @ Q.mT).norm() / change.norm()) < 1e-5
    ids = torch.arange(9)[None]
    run.export(tmp_path / "model")
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "model")(ids).logits, run.model(ids).logits, 1e-6)
    run.export(tmp_path / "adapter", adapter="osft")
    assert_same(
        PeftModel.from_pretrained(build("llama"), tmp_path / "adapter")(ids).logits, run.model(ids).logits, 1e-5
    )


def test_experts_that_saw_no_token_stay_where_they_are_frozen():
    config = replace(MERGED, unmeasured="freeze")
    model = build("qwen3_moe", dtype=torch.float64)
    known = {name: dict(found) for name, found in moments(model, config).items()}
    name = "model.layers.0.mlp.experts.down_proj"
    known[name]["inputs"][1] = 0.0
    known[name]["tokens"] = torch.tensor([64.0, 0.0, 64.0, 64.0])
    run = composed(config, "qwen3_moe", known=known)
    before = weights(run)
    train(run, STEPS, torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
    after = weights(run)
    assert torch.equal(after[name][1], before[name][1])
    assert not torch.equal(after[name][0], before[name][0])


def test_weights_in_half_precision_and_other_models_statistics_are_refused():
    with pytest.raises(tr.PlanError, match="form merged changes model"):
        composed(MERGED, dtype=torch.bfloat16)
    with pytest.raises(tr.PlanError, match="keep a copy of"), composed(MERGED).without():
        pass


def test_every_target_has_three_eighths_of_the_directions():
    run = composed(MERGED)
    for target in targets(MERGED, run.plan.anatomy):
        module: nn.Module = run.model.get_submodule(target.module)
        assert module.osft.Z.shape == (target.outputs, target.inputs * 3 // 8)


def test_the_plan_says_how_long_preparing_takes():
    shape = {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 2, "vocab_size": 64}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**shape, num_attention_heads=8))
    text = "\n".join(draft(model, [MERGED], weights=False).applied[0].notes)
    assert "directions of 14 weights are prepared once, in float64, the largest of 6,144 × 6,144: about 5 min" in text


def test_a_step_that_fails_is_merged_with_the_next_one():
    run = composed(MERGED)
    before = weights(run)
    optimizer = run.optimizer(torch.optim.AdamW, lr=1e-2)
    step = optimizer.step

    def failing():
        step()
        raise MemoryError

    for number, batches in enumerate(run.steps(STEPS[:2])):
        for batch in batches:
            run.loss(batch).backward()
        optimizer.step = failing if number == 0 else step
        if number == 0:
            with pytest.raises(MemoryError):
                run.step(optimizer)
        else:
            run.step(optimizer)
    name = "model.layers.0.self_attn.q_proj"
    child = run.model.get_submodule(name).osft
    assert_same(weights(run)[f"{name}.weight"] - before[f"{name}.weight"], child.Z.detach() @ child.B.mT, 1e-9)


def test_a_model_may_write_into_the_output_of_a_layer():
    Z = torch.zeros(3, 2, requires_grad=True)
    y = _LinearGradient.apply(torch.ones(4, 3), torch.ones(4, 2), Z)
    y.mul_(2.0).sum().backward()
    assert torch.equal(Z.grad, torch.full((3, 2), 8.0))


def measured_model(root):
    """A model whose folder has statistics."""
    ids = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "real": torch.ones(2, 40, dtype=torch.bool)}
    run = tr.compose(folder(root / "model"), [tr.Full()])
    tr.measure(run, [batch], ring=Ring(name="old", tokens=0, data="old"), to=root / "model" / "statistics")


def trained(root, output):
    from treering.train import train as train_job

    section = StatisticsSection(tokens=0)
    train_job(job(root, output, techniques=(MERGED, tr.Shard()), train={"steps": 8}, statistics=section))


def saved(root, output):
    return {n: t.read() for n, t in read(root / output / "checkpoints" / "step-8").tensors.items()}


def test_a_run_of_two_ranks_is_resumed_bit_for_bit_and_on_other_numbers_of_ranks(tmp_path):
    measured_model(tmp_path)
    job(tmp_path)  # makes the toys before several ranks look for them
    on_ranks(2, trained, tmp_path, "whole")
    whole = saved(tmp_path, "whole")
    assert "model.layers.0.self_attn.q_proj.weight" in whole  # which no optimizer steps
    for ranks, tolerance in ((2, 0.0), (1, 1e-4)):
        cut = f"cut-{ranks}"
        shutil.copytree(tmp_path / "whole", tmp_path / cut)
        shutil.rmtree(tmp_path / cut / "checkpoints" / "step-8")
        on_ranks(ranks, trained, tmp_path, cut)
        assert "resumes after step 5" in (tmp_path / cut / "metrics.jsonl").read_text()
        assert_all_same(saved(tmp_path, cut), whole, tolerance)
