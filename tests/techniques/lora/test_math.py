"""An adapter computes what the paper says: forward, gradients and merged weight against the plain reference."""

import pytest
import torch

import treering as tr
from tests.same import assert_same
from tests.toy import weights
from tests.zoo import build
from treering.core.seeds import generator
from treering.techniques.lora import reference

# a linear without bias, one with bias, transformers' Conv1D (always with bias)
LINEARS = {"llama": "layers.1.mlp.down_proj", "qwen2": "layers.0.self_attn.k_proj", "gpt2": "h.1.mlp.c_fc"}
SCALES = {"scale 1": {}, "alpha": {"alpha": 5.0}, "rslora": {"alpha": 5.0, "rslora": True}}


def randomised(run, seed=0):
    """B starts at zero, and a zero B would hide a wrong A, scale or transposition."""
    with torch.no_grad():
        for name, parameter in run.trainable():
            parameter.copy_(torch.randn(parameter.shape, generator=generator(seed, name)))
    return run


def adapted(arch, dtype="float64", **settings):
    run = tr.compose(build(arch, dtype=torch.float64), [tr.LoRA(rank=3, dtype=dtype, **settings)])
    [fqn] = [x.fqn for x in run.plan.anatomy.linears if x.fqn.endswith(LINEARS[arch])]
    return randomised(run), fqn


def as_linear(module, arch):
    W = module.weight.detach()
    return W.T if arch == "gpt2" else W


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("arch", LINEARS)
def test_forward_and_gradients_are_those_of_the_merged_weight(arch, scale):
    run, fqn = adapted(arch, **SCALES[scale])
    module = run.model.get_submodule(fqn)
    addend = module.lora_default
    W = as_linear(module, arch)
    x = torch.randn(5, 2, W.shape[1], dtype=torch.float64, generator=generator(1, "x")).requires_grad_()
    out = module(x)
    factor = torch.randn(out.shape, dtype=torch.float64, generator=generator(1, "g"))
    found = torch.autograd.grad((out * factor).sum(), (x, addend.A, addend.B))

    s = {"scale 1": 1.0, "alpha": 5 / 3, "rslora": 5 / 3**0.5}[scale]
    A, B = (p.detach().clone().requires_grad_() for p in (addend.A, addend.B))
    flat = x.detach().flatten(0, 1).requires_grad_()
    wanted_out = reference.forward(flat, W, A, B, s, module.bias)
    wanted = torch.autograd.grad((wanted_out * factor.flatten(0, 1)).sum(), (flat, A, B))
    assert_same(out.flatten(0, 1), wanted_out, 1e-14, "output")
    assert_same(found[0].flatten(0, 1), wanted[0], 1e-14, "gradient of x")
    assert_same(found[1], wanted[1], 1e-14, "gradient of A")
    assert_same(found[2], wanted[2], 1e-14, "gradient of B")


@pytest.mark.parametrize("arch", LINEARS)
def test_the_exported_weight_is_the_merged_one_and_gives_the_same_logits(arch):
    run, fqn = adapted(arch, alpha=5.0)
    module = run.model.get_submodule(fqn)
    merged = reference.merged(as_linear(module, arch), module.lora_default.A, module.lora_default.B, 5 / 3)
    plain = weights(run)
    found = plain[f"{fqn}.weight"]
    assert_same(found.T if arch == "gpt2" else found, merged, 1e-14, "merged")
    dense = build(arch, dtype=torch.float64, attention="sdpa")  # eager attention rounds to float32
    dense.load_state_dict(plain, strict=False)
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        assert_same(run.model.eval()(ids).logits, dense(ids).logits, 1e-12, "logits")


def test_a_fresh_adapter_changes_no_bit():
    ids = torch.arange(3, 15)[None]
    run = tr.compose(build("llama"), [tr.LoRA(rank=3)])
    plain = tr.compose(build("llama"), [tr.Full()])
    with torch.no_grad():
        assert torch.equal(run.model(ids).logits, plain.model(ids).logits)
    assert max(run.lost.values()) == 0.0


def test_only_the_adapter_learns():
    run = tr.compose(build("llama"), [tr.LoRA(rank=3)])
    names = [name for name, _ in run.trainable()]
    assert len(names) == 28 and all(name.endswith((".A", ".B")) for name in names)


def test_two_adapters_on_one_linear_add_up():
    settings = [tr.LoRA(rank=2, name="one", dtype="float64"), tr.LoRA(rank=3, name="two", alpha=6.0, dtype="float64")]
    run = randomised(tr.compose(build("llama", dtype=torch.float64), settings))
    module = run.model.model.layers[0].mlp.up_proj
    one, two = module.lora_one, module.lora_two
    W = reference.merged(module.weight, one.A, one.B, 1.0)
    W = reference.merged(W, two.A, two.B, 2.0)
    assert_same(weights(run)["model.layers.0.mlp.up_proj.weight"], W, 1e-14)
    x = torch.randn(4, 32, dtype=torch.float64, generator=generator(2, "x"))
    assert_same(module(x), x @ W.T, 1e-14)


def test_all_linear_leaves_routers_embeddings_and_head_alone():
    for arch in ("qwen3_moe", "deepseek_v3", "llama"):
        run = tr.compose(build(arch), [tr.LoRA(rank=2)])
        held = {name.rpartition(".lora_")[0] for name, _ in run.trainable()}
        assert held and not any(name.rpartition(".")[2] == "gate" or "embed" in name or "head" in name for name in held)


def test_a_tied_head_is_refused_as_a_target():
    with pytest.raises(tr.PlanError, match=r"lm_head is tied to transformer\.wte\.weight"):
        tr.compose(build("gpt2"), [tr.LoRA(rank=2, targets=("lm_head",))])


def test_a_head_of_its_own_is_a_legal_target():
    run = randomised(
        tr.compose(build("llama", dtype=torch.float64), [tr.LoRA(rank=2, targets=("lm_head",), dtype="float64")])
    )
    head = run.model.lm_head
    merged = reference.merged(head.weight, head.lora_default.A, head.lora_default.B, 1.0)
    assert_same(weights(run)["lm_head.weight"], merged, 1e-14)


def test_undo_gives_every_linear_its_own_forward_back():
    run = tr.compose(build("llama"), [tr.LoRA(rank=2, name="one"), tr.LoRA(rank=2, name="two")])
    for applied in reversed(run.plan.applied):
        applied.undo()
    assert not [n for n, m in run.model.named_modules() if "forward" in vars(m)]


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"rank": 0}, "rank"),
        ({"alpha": 0.0}, "alpha"),
        ({"alpha": float("nan")}, "alpha"),
        ({"name": "my adapter"}, "name"),
        ({"targets": ()}, "targets"),
        ({"targets": "q_proj"}, "targets"),
        ({"init": "file"}, "file"),
        ({"file": "x"}, "file"),
    ],
    ids=str,
)
def test_settings_outside_what_is_allowed_name_their_field(settings, field):
    with pytest.raises(tr.ConfigError) as caught:
        tr.LoRA(**settings)
    assert caught.value.field == field


def test_a_target_that_matches_nothing_says_what_there_is():
    with pytest.raises(tr.PlanError, match=r"'q_prj' matches no linear.*Did you mean 'q_proj'"):
        tr.compose(build("llama"), [tr.LoRA(targets=("q_prj",), rank=2)])
