"""The factored forms on one process: exact at load and at export, and held while they learn."""

import copy

import pytest
import torch
from torch.func import functional_call

import treering as tr
from tests.same import assert_all_same, assert_same
from tests.toy import gradients, rows, train, weights
from tests.zoo import build
from treering.anatomy.matrices import Matrix
from treering.techniques.osft import OSFT, reference
from treering.techniques.osft.forward_factors.factor_steps import FactorSteps
from treering.techniques.osft.forward_factors.factored import FactoredLinear, part
from treering.techniques.osft.protection.targets import targets

FORMS = [("forward", "coefficients"), ("factors", "coefficients"), ("factors", "gather"), ("factors", "cached")]
ARCHITECTURES = ["llama", "gpt2", "qwen3_moe", "gpt_oss"]  # GQA, Conv1D with biases, experts and transposed ones
Q = "model.layers.0.self_attn.q_proj.weight"


def osft(form="factors", communication="coefficients", **settings):
    return OSFT(protect="weights", form=form, communication=communication, **settings)


def factored(W, open_, config):
    """One linear by itself, with its values, and the steps around its optimizer."""
    target = Matrix(
        weight="w", module="m", outputs=W.shape[0], inputs=W.shape[1],
        experts=None, transposed=False, block=0, role="mlp",
    )  # fmt: skip
    module = FactoredLinear(config, target, open_, W.dtype, None)
    how = part(target, module, "m", W.dtype)
    module.to_empty(device="cpu")
    tensors = how.split(Lazy(W), None, None)
    live = dict(module.named_parameters(prefix="m")) | dict(module.named_buffers(prefix="m"))
    assert set(tensors) == set(live) == set(how.names)
    with torch.no_grad():
        for name, value in tensors.items():
            live[name].copy_(value)
    return (
        module,
        FactorSteps({"m": module}),
        lambda: how.join({n: p.detach() for n, p in live.items()}, torch.zeros(())),
    )


class Lazy:
    def __init__(self, value):
        self.value, self.shape, self.dtype = value, tuple(value.shape), value.dtype

    def read(self):
        return self.value


def learning(module):
    return [module.U_low, module.S_low, module.V_low]


# --- at load and at export


@pytest.mark.parametrize(("form", "communication"), FORMS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_model_is_the_same_right_after_decomposition(arch, form, communication):
    plain = build(arch).eval()
    wanted = {n: p.detach().clone() for n, p in plain.named_parameters()}
    ids = rows(1)[0]["input_ids"]
    logits = plain(ids).logits
    run = tr.compose(plain, [osft(form, communication)])
    assert max(run.lost.values()) < 2e-6
    assert_same(run.model.eval()(ids).logits, logits, 5e-6)
    assert_all_same(weights(run), wanted, 5e-6)


def test_a_bfloat16_weight_is_factored_in_float32():
    run = tr.compose(build("llama", dtype=torch.bfloat16), [osft(targets=("q_proj",))])
    held = run.model.model.layers[0].self_attn.q_proj.osft
    assert {p.dtype for p in held.parameters()} == {torch.float32} and max(run.lost.values()) < 2e-6
    assert dict(run.plain())[Q].dtype == torch.bfloat16
    assert_all_same(weights(run), dict(build("llama", dtype=torch.bfloat16).named_parameters()), 4e-3)
    losses = train(run, [rows(4)] * 4, torch.optim.AdamW, lr=1e-2, weight_decay=0.0)
    assert losses[-1] < losses[0]


def test_export_has_the_model_s_own_names_and_leaves_everything_else_alone(tmp_path):
    from transformers import AutoModelForCausalLM

    before = {n: p.detach().clone() for n, p in build("llama").named_parameters()}
    run = tr.compose(build("llama"), [osft("forward", targets=("q_proj", "down_proj"))])
    train(run, [rows(4)] * 3, torch.optim.AdamW, lr=1e-2, weight_decay=0.0)
    run.export(tmp_path / "out")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    ids = rows(1)[0]["input_ids"]
    assert_same(read(ids).logits, run.model.eval()(ids).logits, 1e-5)
    for name, value in read.named_parameters():
        changed = "q_proj" in name or "down_proj" in name
        assert torch.equal(value, before[name]) != changed, name


@pytest.mark.parametrize("kind", ["rank deficient", "huge", "tiny", "zero", "one row", "one column"])
def test_extreme_matrices_stay_finite_and_whole(kind):
    torch.manual_seed(0)
    W = {
        "rank deficient": torch.randn(8, 2) @ torch.randn(2, 20),
        "huge": torch.randn(6, 6) * 1e15,
        "tiny": torch.randn(6, 6) * 1e-15,
        "zero": torch.zeros(6, 9),
        "one row": torch.randn(1, 7),
        "one column": torch.randn(7, 1),
    }[kind]
    module, steps, join = factored(W, max(1, min(W.shape) // 2), osft())
    assert (join() - W).norm() <= 2e-6 * W.norm()
    module(torch.randn(4, W.shape[1]), None).sum().backward()
    steps.project()
    steps.retract()
    assert all(torch.isfinite(p).all() and torch.isfinite(p.grad).all() for p in learning(module))
    assert all(leak < 1e-5 for leak in steps.leaks().values())


# --- how many directions


def test_free_directions_are_the_floor_of_the_ratio_and_patterns_override():
    run = tr.compose(build("llama"), [osft(ratio=0.3, ratios={"k_proj": 0.5, "*.0.mlp.up_proj*": 0.0, "q_proj": 1.0})])
    layer = run.model.model.layers[0]
    k, v, q, up = layer.self_attn.k_proj, layer.self_attn.v_proj, layer.self_attn.q_proj, layer.mlp.up_proj
    assert (k.osft.protected, k.osft.trainable) == (8, 8) and k.osft.V_low.shape == (32, 8)
    assert (v.osft.protected, v.osft.trainable) == (12, 4) and v.osft.U_high.shape == (16, 12)
    assert q.osft.protected == 0 and not any("high" in n or "free" in n for n, _ in q.osft.named_parameters())
    assert not hasattr(up, "osft") and not up.weight.requires_grad
    run = tr.compose(build("llama"), [osft(ratio=0.3, ratios={"*up_proj*": 0.0})])
    assert not hasattr(run.model.model.layers[0].mlp.up_proj, "osft")


def test_ratio_0_changes_nothing_in_its_targets():
    config = osft(ratios={"*": 0.0}, train=("model.norm",))
    run = tr.compose(build("llama"), [config])
    train(run, [rows(4)] * 2, torch.optim.AdamW, lr=1e-2, weight_decay=0.0)
    before = dict(build("llama").named_parameters())
    changed = {n for n, w in weights(run).items() if not torch.equal(w, before[n])}
    assert changed == {"model.norm.weight"}


def reference_loss(name, batches):
    model = build("llama", dtype=torch.float64, attention="sdpa").train()
    count = sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches)

    def loss(W):
        total = 0
        for b in batches:
            logits = functional_call(model, {name: W}, (b["input_ids"],), {"use_cache": False}).logits
            total = total + torch.nn.functional.cross_entropy(
                logits[0, :-1], b["labels"][0, 1:], ignore_index=-100, reduction="sum"
            )
        return total / count

    return model.get_parameter(name).detach().clone(), loss


OPTIMIZERS = {
    "adamw": (torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.0}),
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
}


@pytest.mark.parametrize("open_", [32, 31, 8, 1])
@pytest.mark.parametrize("name", [Q, "model.layers.1.mlp.down_proj.weight"])
def test_training_follows_the_reference(name, open_):
    W, loss = reference_loss(name, rows(2))
    wanted, _ = reference.trajectory(W, 32 - open_, loss, lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.0), 4)
    for form, communication in FORMS:
        config = osft(form, communication, targets=(name.removesuffix(".weight"),), free={name: open_})
        run = tr.compose(build("llama", dtype=torch.float64), [config])
        train(run, [rows(2)] * 4, torch.optim.AdamW, lr=1e-2, weight_decay=0.0)
        assert_same(dict(run.plain())[name], wanted, 1e-9, f"{form} {communication}")


# --- while it learns


def regression(W, open_, config, optimizer, steps):
    """Towards another random matrix, with a bend, so that gradients change."""
    module, around, join = factored(W, open_, config)
    kind, settings = optimizer
    stepper = kind(learning(module), **settings)
    generator = torch.Generator().manual_seed(3)
    X = torch.randn(64, W.shape[1], dtype=W.dtype, generator=generator)
    Y = torch.tanh(X @ torch.randn(W.shape[::-1], dtype=W.dtype, generator=generator) / 4)
    for _ in range(steps):
        stepper.zero_grad()
        (torch.tanh(module(X, None)) - Y).square().sum(-1).mean().backward()
        if config.form == "factors":
            around.project()
        stepper.step()
        if config.form == "factors":
            around.retract()
    return module, around, join


MATRICES = {"square": (20, 20), "wide": (12, 30), "tall": (30, 12)}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("shape", MATRICES)
def test_both_forms_have_the_same_weights_after_100_steps(shape, optimizer):
    torch.manual_seed(0)
    W = torch.randn(MATRICES[shape], dtype=torch.float64) / 4
    found = [regression(W, 5, osft(*form), OPTIMIZERS[optimizer], 100)[2]() for form in FORMS]
    assert (found[0] - W).norm() > 0.05 * W.norm()
    for one, form in zip(found[1:], FORMS[1:]):
        assert_same(one, found[0], 1e-10, f"{form}")


def muon(parameters, **settings):
    return torch.optim.Muon([p for p in parameters if p.ndim == 2], **settings)  # it takes matrices alone


HARD = {
    "adamw": (torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.0}),
    "sgd": (torch.optim.SGD, {"lr": 1e-2}),
    "muon": (muon, {"lr": 1e-2, "weight_decay": 0.0}),
}


def bases(module):
    """What is held, as it was stored, in float64."""
    return (module.high[0].double(), module.high[1].double(), module.high[2].double())


def exact(module):
    """W as the forward takes it, without float32's rounding in the product."""
    U_h, S_h, V_h = bases(module)
    U, S, V = (p.detach().double() for p in module.low)
    if module.projected:
        U, V = reference.project(U, U_h), reference.project(V, V_h)
    return (U_h * S_h) @ V_h.T + (U * S) @ V.T


@pytest.mark.parametrize(
    ("shape", "optimizer"),
    [
        pytest.param(
            shape, name, marks=[pytest.mark.slow] if (shape, name) in [("wide", "muon"), ("tall", "muon")] else []
        )
        for shape in MATRICES
        for name in HARD
    ],
)
def test_after_200_steps_in_float32_nothing_leaked_into_what_is_held(shape, optimizer):
    torch.manual_seed(0)
    W = torch.randn(MATRICES[shape]) / 4
    for form in FORMS:
        start = exact(factored(W, 5, osft(*form))[0])
        module, steps, _ = regression(W, 5, osft(*form), HARD[optimizer], 200)
        after, (U, S, V) = exact(module), bases(module)
        D = after - start
        assert D.norm() > 0.01 * W.norm(), f"nothing moved: {float(D.norm() / W.norm())}"
        for leak in (U.T @ D, D @ V):
            assert leak.norm() <= 1e-5 * D.norm(), f"{form}: {float(leak.norm() / D.norm()):.1e}"
        assert (after @ V - U * S).norm() <= 1e-5 * W.norm(), "a held singular triple has changed"
        assert all(leak < 1e-5 for leak in steps.leaks().values())


def test_without_the_projection_after_the_step_adamw_leaks():
    """Shows that the test above can fail: projected gradients alone do not hold."""
    torch.manual_seed(0)
    module, steps, _ = factored(torch.randn(20, 20) / 4, 5, osft())
    stepper = torch.optim.AdamW(learning(module), lr=1e-2, weight_decay=0.0)
    for _ in range(50):
        stepper.zero_grad()
        module(torch.randn(64, 20), None).square().mean().backward()
        steps.project()
        stepper.step()
    assert max(steps.leaks().values()) > 0.1


@pytest.mark.parametrize("open_", [1, 5, 11, 12])
@pytest.mark.parametrize("shape", MATRICES)
def test_gradients_are_orthogonal_to_what_is_held_and_s_is_left_alone(shape, open_):
    torch.manual_seed(0)
    N, M = MATRICES[shape]
    for form, communication in FORMS[1:]:
        module, steps, _ = factored(torch.randn(N, M, dtype=torch.float64), open_, osft(form, communication))
        module(torch.randn(9, M, dtype=torch.float64), None).square().sum().backward()
        raw = module.S_low.grad.clone(), module.S_low.detach().clone()
        with torch.no_grad():
            for p in learning(module):
                p.grad.add_(torch.randn_like(p)) if p.ndim == 2 else None
        unprojected = [p.grad.clone() for p in learning(module)]
        steps.project()
        assert torch.equal(module.S_low.grad, raw[0])
        norms = steps.metrics()
        assert norms["osft/raw_norm"] == pytest.approx(float(torch.cat([g.flatten() for g in unprojected]).norm()))
        assert norms["osft/projected_norm"] == pytest.approx(
            float(torch.cat([p.grad.flatten() for p in learning(module)]).norm())
        )
        if module.protected:
            triple, now = module.high, module._triple(("U_low", "S_low", "V_low"))
            for name, Q, _ in (("U", triple[0], now[0]), ("V", triple[2], now[2])):
                grad = getattr(module, f"{name}_low").grad
                assert (Q.T @ (grad.T if module.turned else grad)).abs().max() < 1e-10
        else:
            assert all(torch.equal(p.grad, g) for p, g in zip(learning(module), unprojected))
        with torch.no_grad():
            for p in learning(module):
                p.add_(torch.randn_like(p))
        raw = module.S_low.detach().clone()
        steps.retract()
        once = [p.detach().clone() for p in learning(module)]
        steps.retract()
        assert torch.equal(once[1], raw)
        for again, before in zip(learning(module), once):
            assert_same(again, before, 1e-12)


def test_a_leak_is_seen_and_its_size_is_right():
    torch.manual_seed(0)
    for form, communication in FORMS:
        module, steps, _ = factored(torch.randn(40, 60, dtype=torch.float64), 10, osft(form, communication))
        Q, X = module.high[0].detach(), module.low[0].detach()
        with torch.no_grad():
            X.add_(Q @ torch.randn(30, 10, dtype=torch.float64) * 0.05)
        true = float((Q.T @ X).norm() / X.norm())
        seen = steps.leaks()
        assert seen["m.V_low"] < 1e-12
        if form == "forward":  # what the forward makes of it has no leak
            assert seen["m.U_low"] < 1e-12
        else:
            assert seen["m.U_low"] == pytest.approx(true, rel=0.3) and true > 0.1


def test_a_side_that_is_all_directions_keeps_its_free_ones_where_that_is_less():
    def kept(N, M, open_, *form):
        module, _, _ = factored(torch.randn(N, M), open_, osft(*form))
        return {n: tuple(b.shape) for n, b in module.named_buffers()}

    assert kept(12, 30, 3, *FORMS[1]) == {"U_free": (12, 3)}
    assert kept(30, 12, 3, *FORMS[1]) == {"V_free": (12, 3)}
    assert kept(12, 12, 3, *FORMS[2]) == {"U_free": (3, 12), "V_free": (3, 12)}
    assert kept(12, 12, 6, *FORMS[1]) == kept(12, 12, 12, *FORMS[1]) == kept(12, 12, 3, *FORMS[0]) == {}


def test_only_learning_factors_learn_and_only_declared_tensors_are_saved():
    for form in FORMS:
        run = tr.compose(build("llama"), [osft(*form)])
        assert all(n.rpartition(".")[2] in ("U_low", "S_low", "V_low") for n, _ in run.trainable())
        found = gradients(run, rows(2))
        assert set(found) == {n for n, _ in run.trainable()}
        run.step(run.optimizer(torch.optim.SGD, lr=0.1))
        names = {n.rpartition(".")[2] for n in run.model.state_dict() if ".osft." in n}
        factors = {f"{a}_{b}" for a in "USV" for b in ("high", "low")}
        assert names - {"U_free", "V_free"} == factors, "a kept basis is no state"


@pytest.mark.parametrize("form", ["forward", "factors"])
def test_weights_that_are_not_finite_are_refused_by_name(form):
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[2, 1] = torch.nan
    for rank in ("ratio", "energy"):
        with pytest.raises(tr.PlanError, match=r"layers\.1\.self_attn\.q_proj\.weight has values that are not finite"):
            tr.compose(copy.deepcopy(model), [tr.OSFT(protect="weights", form=form, rank=rank)])


def test_weight_decay_is_refused_where_it_would_erode_the_base_model():
    for form in FORMS:
        run = tr.compose(build("llama"), [osft(*form, targets=("q_proj",))])
        before = weights(run)
        with pytest.raises(tr.PlanError, match=r"weight_decay 0\.1 would decay.*osft\.keep_initial"):
            train(run, [rows(2)], torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
        assert_all_same(weights(run), before)
        train(run, [rows(2)], torch.optim.AdamW, lr=1e-2, weight_decay=0.0)


@pytest.mark.parametrize(("form", "communication"), [FORMS[0], FORMS[1]])
@pytest.mark.parametrize("arch", [*ARCHITECTURES[:3], pytest.param("gpt_oss", marks=pytest.mark.slow)])
def test_every_architecture_learns_and_stays_held(arch, form, communication):
    config = osft(form, communication)
    run = tr.compose(build(arch), [config])
    start = weights(run)
    losses = train(run, [rows(4)] * 8, torch.optim.AdamW, lr=1e-2, weight_decay=0.0)
    assert losses[-1] < losses[0] - 0.1
    after = weights(run)
    for target in targets(config, run.plan.anatomy):
        module, leaf = run.model.get_submodule(target.module), target.weight.rpartition(".")[2]
        U, _, V = module.osft.high if target.experts is None else getattr(module, f"osft_{leaf}").high
        D = target.oriented(after[target.weight] - start[target.weight])
        assert D.norm() > 0.01 * start[target.weight].norm()
        for leak in (U.mT @ D, D @ V):
            assert leak.norm() <= 1e-5 * D.norm(), f"{target.weight} {float(leak.norm() / D.norm()):.1e}"
