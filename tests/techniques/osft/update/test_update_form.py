"""Form `update` and the adapters against whole matrices, one process; then what bad input gets."""

import pytest
import torch

import treering as tr
from tests.same import assert_all_same, assert_same
from tests.techniques.osft.measured import moments
from tests.toy import rows, train, weights
from tests.zoo import build
from treering.techniques.osft import reference
from treering.techniques.osft.protection.soft import soft_operator
from treering.techniques.osft.protection.targets import targets, trainable

STEPS = [rows(2, seed=i) for i in range(4)]


def composed(config, arch="llama", dtype=torch.float64, **more):
    model = build(arch, dtype=dtype)
    statistics = moments(model, config) if config.measured else None
    return tr.compose(model, [config], statistics=statistics, **more), statistics


def logits(model):
    return model(torch.arange(9)[None], use_cache=False).logits.detach()


def dense(run, config, statistics, before):
    """(P_out, P_in) of each target as matrices, by the plain formulas."""
    found = {}
    for target in targets(config, run.plan.anatomy):
        W = target.oriented(before[target.weight])
        out = torch.eye(target.outputs, dtype=W.dtype)
        into = torch.eye(target.inputs, dtype=W.dtype)
        open_ = trainable(config, target)
        if config.protect == "weights":
            out, into = reference.protect_weights(W, target.rank - open_)
        if config.protect == "both":
            out, _ = reference.protect_weights(W, target.rank - open_ * target.rank // target.inputs)
        if config.protect != "weights":
            A, held = statistics[target.weight]["inputs"], target.inputs - open_
            soft = config.strength == "soft"
            if soft and config.ratio is None and config.form == "update":
                held = target.inputs
            into = reference.protect_softly(A, held, config.damping) if soft else reference.protect_hard(A, held)
            if soft and held == target.inputs and not target.transposed and config.form == "update":
                ours = soft_operator(A, config.damping)
                size = ours.flatten(-2).norm(dim=-1) / into.flatten(-2).norm(dim=-1)
                assert float((size - 1).abs().max()) < 0.1  # the scale comes from a few rounds of power iteration
                into = into * size[..., None, None]
        found[target.weight] = target, out, into
    return found


CASES = [
    tr.OSFT(protect="weights", ratio=0.25),
    tr.OSFT(protect="weights", ratio=0.75),
    tr.OSFT(protect="inputs", strength="hard", ratio=0.25, form="update"),
    tr.OSFT(protect="inputs", strength="hard", ratio=0.6, form="update"),
    tr.OSFT(protect="inputs", ratio=0.4, form="update"),
    tr.OSFT(protect="both", ratio=0.3, damping=0.1),
    tr.OSFT(form="update"),
]


@pytest.mark.parametrize("arch", ["llama", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("config", CASES, ids=lambda c: f"{c.protect}-{c.strength}-{c.ratio}")
def test_one_sgd_step_is_the_projected_gradient(config, arch):
    run, statistics = composed(config, arch)
    before = weights(run)
    plain = tr.compose(build(arch, dtype=torch.float64), [tr.Full()])
    for batches in plain.steps(STEPS[:1]):
        for batch in batches:
            plain.loss(batch).backward()
    raw = {name: p.grad for name, p in plain.trainable()}
    train(run, STEPS[:1], lr=0.1)
    after, wanted = weights(run), dict(before)
    for name, (target, out, into) in dense(run, config, statistics, before).items():
        step = out @ (out @ target.oriented(raw[name]) @ into) @ into
        c = torch.ones(target.experts or 1, dtype=torch.float64)
        for P in (out, into):
            c = c * (P.shape[-1] / P.square().sum((-2, -1))).sqrt()
        wanted[name] = before[name] - 0.1 * target.oriented(step * c[:, None, None] if target.experts else step * c)
    assert_all_same(after, wanted, 1e-9)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Muon])
@pytest.mark.parametrize("config", [CASES[0], CASES[2]], ids=["weights", "inputs"])
def test_nothing_leaks_into_what_is_held(config, kind):
    from dataclasses import replace

    run, _ = composed(replace(config, keep_initial=True, targets=("q_proj", "down_proj")), dtype=torch.float32)
    train(run, [rows(1, seed=i % 3) for i in range(200)], kind, lr=1e-2, weight_decay=0.1)
    assert 0 < run.metrics()["osft/leak"] <= 1e-5


def test_leak_is_what_it_says():
    run, statistics = composed(tr.OSFT(protect="inputs", strength="hard", ratio=0.5, keep_initial=True, form="update"))
    before = weights(run)
    train(run, STEPS, torch.optim.AdamW, lr=1e-2, weight_decay=0.0)
    with torch.no_grad():
        for _, p in run.trainable():
            p.add_(0.01)  # as an optimizer that nobody retracts would
    changed = weights(run)
    worst = 0.0
    for name, (_, _, into) in dense(run, CASES[2], statistics, before).items():
        A = statistics[name]["inputs"]
        into = reference.protect_hard(A, A.shape[-1] - A.shape[-1] // 2)
        change = changed[name] - before[name]
        worst = max(worst, float((change - change @ into).norm() / change.norm()))
    assert run.metrics()["osft/leak"] == pytest.approx(worst, rel=1e-9)


def test_ratio_0_changes_nothing_and_ratio_1_is_unconstrained():
    for form in ("update", "one_sided", "core"):
        with pytest.raises(tr.PlanError, match="no target has a trainable direction"):
            composed(tr.OSFT(protect="weights", ratio=0.0, form=form))
    config = tr.OSFT(protect="weights", ratio=0.0, ratios={"q_proj": 1.0})
    run, _ = composed(config)
    before = weights(run)
    train(run, STEPS, torch.optim.AdamW, lr=1e-2, weight_decay=0.0)
    free_run = tr.compose(build("llama", dtype=torch.float64), [tr.Full(train=("q_proj",))])
    train(free_run, STEPS, torch.optim.AdamW, lr=1e-2, weight_decay=0.0)
    wanted = weights(free_run)
    assert_all_same(weights(run), wanted, 0.0)
    assert [name for name in before if not torch.equal(before[name], wanted[name])] == [
        f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)
    ]


@pytest.mark.parametrize("form", ["one_sided", "core"])
@pytest.mark.parametrize("config", CASES, ids=lambda c: f"{c.protect}-{c.strength}-{c.ratio}")
@pytest.mark.parametrize("arch", ["llama", "gpt2", "qwen3_moe", "gpt_oss"])
def test_adapters_stay_where_it_is_free(form, config, arch):
    from dataclasses import replace

    if form == "core" and config.protect == "inputs":
        pytest.skip("core has two ends")
    config = replace(config, form=form)
    run, statistics = composed(config, arch)
    before = weights(run)
    plain = tr.compose(build(arch, dtype=torch.float64), [tr.Full()]).model
    assert_same(logits(run.model), logits(plain), 1e-12)  # a start changes nothing
    train(run, STEPS, torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
    after = weights(run)
    for name, (target, out, into) in dense(run, replace(config, strength="hard"), statistics, before).items():
        change = target.oriented(after[name] - before[name])
        assert float(change.norm()) > 0
        if (
            config.strength == "soft"
            and form == "one_sided"
            and config.protect == "both"
            and target.inputs >= target.outputs
        ):
            into = torch.eye(target.inputs, dtype=torch.float64)  # soft and whole: nothing is closed
        assert float((change - out @ change @ into).norm() / change.norm()) < 1e-9
    plain.load_state_dict(after, strict=False)
    assert_same(logits(run.model), logits(plain), 1e-9)


@pytest.mark.parametrize("arch", ["llama", "qwen3_moe", "gpt_oss"])
def test_one_sided_reaches_all_that_is_free(arch):
    """A step of SGD on Z, at Z = 0, is the projected gradient, on both kinds of rectangles."""
    config = tr.OSFT(protect="weights", ratio=0.3, form="one_sided")
    run, _ = composed(config, arch)
    before = weights(run)
    plain = tr.compose(build(arch, dtype=torch.float64), [tr.Full()])
    for batches in plain.steps(STEPS[:1]):
        for batch in batches:
            plain.loss(batch).backward()
    raw = {name: p.grad for name, p in plain.trainable()}
    train(run, STEPS[:1], lr=0.1)
    after = weights(run)
    for name, (target, out, into) in dense(run, config, None, before).items():
        direction = out @ target.oriented(raw[name]) @ into
        change = target.oriented(after[name] - before[name])
        sizes = [t.flatten(-2).norm(dim=-1)[..., None, None].clamp_min(1e-30) for t in (change, direction)]
        assert_same(change / sizes[0], -direction / sizes[1], 1e-9)


def test_weight_decay_without_an_anchor_is_refused_and_with_one_acts_on_the_change():
    run, _ = composed(tr.OSFT(protect="weights"))
    with pytest.raises(tr.PlanError, match="set osft"):
        train(run, STEPS, torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
    decayed = {}
    for rate in (0.0, 5.0):
        run, _ = composed(tr.OSFT(protect="weights", keep_initial=True))
        before = weights(run)
        train(run, STEPS, torch.optim.AdamW, lr=1e-2, weight_decay=rate)
        decayed[rate] = sum(float((w - before[n]).norm()) for n, w in weights(run).items())
    assert 0 < decayed[5.0] < decayed[0.0]


def test_somebodys_own_loop_with_hooks_is_the_same(tmp_path):
    config = tr.OSFT(protect="weights", ratio=0.3)
    ours, _ = composed(config)
    train(ours, STEPS, torch.optim.AdamW, lr=1e-2, weight_decay=0.0)
    theirs, _ = composed(config)
    optimizer = torch.optim.AdamW([p for _, p in theirs.trainable()], lr=1e-2, weight_decay=0.0)
    detach = theirs.attach(optimizer)
    for batches in theirs.steps(STEPS):
        for batch in batches:
            theirs.loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    detach()
    assert_all_same(weights(theirs), weights(ours), 1e-12)  # ours is the fused AdamW


def test_the_export_is_the_plain_model(tmp_path):
    from transformers import AutoModelForCausalLM

    for form in ("update", "one_sided"):
        run, _ = composed(tr.OSFT(protect="inputs", ratio=0.5, form=form), dtype=torch.float32)
        train(run, STEPS, torch.optim.AdamW, lr=1e-2, weight_decay=0.0)
        run.export(tmp_path / form)
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / form)
        assert_same(logits(plain), logits(run.model), 1e-6)


def test_the_clipped_norm_is_that_of_the_projected_gradient():
    run, _ = composed(tr.OSFT(protect="weights", ratio=0.25))
    optimizer = run.optimizer(torch.optim.SGD, lr=0.1)
    for batches in run.steps(STEPS[:1]):
        for batch in batches:
            run.loss(batch).backward()
        report = run.step(optimizer, clip=1e9)
    assert report.norm == pytest.approx(run.metrics()["osft/projected_norm"], rel=1e-6)
    assert report.norm < 0.9 * run.metrics()["osft/raw_norm"]


def test_bad_input_is_told_what_to_write():
    with pytest.raises(tr.PlanError, match="treering measure"):
        tr.compose(build("llama"), [tr.OSFT(form="update")])
    with pytest.raises(tr.PlanError, match="measured on another model"):
        other = moments(build("llama"), tr.OSFT(form="update"))
        wrong = {name: {"inputs": m["inputs"][:-1, :-1]} for name, m in other.items()}
        tr.compose(build("llama"), [tr.OSFT(form="update")], statistics=wrong)
    with pytest.raises(tr.PlanError, match="nothing on the inputs"):
        tr.compose(build("llama"), [tr.OSFT(form="update")], statistics={})
    with pytest.raises(tr.PlanError, match="to float32"):
        tr.compose(build("llama", dtype=torch.bfloat16), [tr.OSFT(protect="weights")])
    with pytest.raises(tr.PlanError, match="is not a linear layer"):
        tr.compose(build("llama"), [tr.OSFT(protect="weights", targets=("embed_tokens",))])
    with pytest.raises(tr.PlanError, match="decide what happens to the gradient"):
        tr.compose(build("llama"), [tr.OSFT(protect="weights"), tr.LoRA()])
    with pytest.raises(tr.ConfigError, match="form update or one_sided"):
        tr.OSFT(form="factors")
    with pytest.raises(tr.ConfigError, match="greater than 0"):
        tr.OSFT(damping=float("inf"))
    with pytest.raises(tr.PlanError, match="outside the blocks, where no inputs are measured"):
        untied = build("llama", tied=False)
        tr.compose(untied, [tr.OSFT(targets=("lm_head",))], statistics=moments(untied, tr.OSFT(form="update")))


def test_what_is_trained_besides_is_named(tmp_path):
    run, _ = composed(tr.OSFT(protect="weights", train=("*norm*",)))
    names = {name for name, _ in run.trainable()}
    assert {"model.norm.weight", "model.layers.0.input_layernorm.weight"} < names
    assert "model.embed_tokens.weight" not in names and "lm_head.weight" not in names
    assert "without protection" in run.explain()


@pytest.mark.parametrize("arch", ["llama", "gpt2", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize(
    "config",
    [
        tr.OSFT(protect="inputs", ratio=0.4, form="one_sided"),
        tr.OSFT(protect="both", ratio=0.3, form="one_sided"),
        tr.OSFT(protect="weights", ratio=0.3, form="core"),
        tr.OSFT(protect="weights", ratio=1.0, form="one_sided", targets=("c_fc", "up_proj", "down_proj", "c_proj")),
    ],
    ids=lambda c: f"{c.protect}-{c.form}-{c.ratio}",
)
def test_the_small_file_is_an_adapter_that_peft_loads(config, arch, tmp_path):
    from dataclasses import replace

    from peft import PeftModel

    names = {"llama": ("up_proj", "down_proj"), "gpt2": ("c_fc", "c_proj")}
    if config.ratio == 1:
        config = replace(config, targets=names.get(arch, ("*.experts.*_proj",)))
    run, _ = composed(config, arch, torch.float32)
    train(run, STEPS, torch.optim.AdamW, lr=1e-2, weight_decay=0.0)
    run.export(tmp_path / "adapter", adapter="osft")
    theirs = PeftModel.from_pretrained(build(arch), tmp_path / "adapter")
    assert_same(logits(theirs), logits(run.model), 1e-6)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (torch.optim.SGD, {"momentum": 0.9}),
        (torch.optim.Adam, {}),
        (torch.optim.AdamW, {}),
        (torch.optim.Muon, {}),
        (torch.optim.SGD, {"maximize": True}),
        (torch.optim.Adam, {"maximize": True}),
        (torch.optim.AdamW, {"maximize": True}),
    ],
    ids=lambda x: getattr(x, "__name__", "-".join(x) if isinstance(x, dict) else ""),
)
def test_decay_is_that_of_the_change(kind, settings):
    """The same optimizer on the change itself, with the weight from before added in the forward."""
    config = tr.OSFT(protect="weights", ratio=1.0, keep_initial=True, targets=("q_proj",))
    run, _ = composed(config)
    before = weights(run)
    train(run, STEPS, kind, lr=1e-2, weight_decay=0.5, **settings)
    after = weights(run)
    plain = tr.compose(build("llama", dtype=torch.float64), [tr.Full(train=("q_proj",))])
    changes = {name: torch.zeros_like(p) for name, p in plain.trainable()}
    optimizer = kind(list(changes.values()), lr=1e-2, weight_decay=0.5, **settings)
    for batches in plain.steps(STEPS):
        for batch in batches:
            plain.loss(batch).backward()
        for name, p in plain.trainable():
            changes[name].grad, p.grad = p.grad, None
        optimizer.step()
        with torch.no_grad():
            for name, p in plain.trainable():
                p.copy_(before[name] + changes[name])
    for name, change in changes.items():
        assert_same(after[name], before[name] + change, 1e-9, name)


def test_an_optimizer_whose_decay_is_not_known_is_refused():
    class Lion(torch.optim.SGD):
        pass

    run, _ = composed(tr.OSFT(protect="weights", keep_initial=True))
    with pytest.raises(tr.PlanError, match="how Lion decays"):
        train(run, STEPS, Lion, lr=1e-2, weight_decay=0.1)


def test_a_failed_step_leaves_the_weights(monkeypatch):
    run, _ = composed(tr.OSFT(protect="weights", keep_initial=True))
    before = weights(run)
    optimizer = run.optimizer(torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        patched.setattr(optimizer, "step", lambda: (_ for _ in ()).throw(MemoryError()))
        for batches in run.steps(STEPS[:1]):
            for batch in batches:
                run.loss(batch).backward()
            run.step(optimizer)
    assert_all_same(weights(run), before, 0.0)


def stepped(config, **context):
    run, _ = composed(config, dtype=torch.float32)
    optimizer = run.optimizer(torch.optim.AdamW, lr=1e-2)
    for batches in run.steps([rows(1, seed=i) for i in range(10)]):
        with torch.autocast("cpu", torch.bfloat16, enabled=bool(context.get("autocast"))):
            for batch in batches:
                run.loss(batch).backward()
            run.step(optimizer)
    return run


@pytest.mark.parametrize("form", ["update", "one_sided", "forward", "factors"])
def test_neither_autocast_nor_fast_products_leak(form):
    config = tr.OSFT(protect="weights", ratio=0.3, form=form, keep_initial=form == "update")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        base = {name: W.double() for name, W in weights(composed(config, dtype=torch.float32)[0]).items()}
        run = stepped(config, autocast=True)
    finally:
        torch.set_float32_matmul_precision(before)
    for target in targets(config, run.plan.anatomy):
        W = base[target.weight]
        U, _, Vh = torch.linalg.svd(W, full_matrices=False)
        held = target.rank - trainable(config, target)
        change = weights(run)[target.weight].double() - W
        for leak in (U[:, :held].T @ change, change @ Vh[:held].T):
            assert float(leak.norm() / change.norm()) < 1e-4, target.weight


def test_a_refusal_leaves_somebodys_model_as_it_was():
    model = build("llama", dtype=torch.bfloat16)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(tr.PlanError, match="to float32"):
        tr.compose(model, [tr.OSFT(protect="weights")])
    assert all(torch.equal(p, before[name]) and p.requires_grad for name, p in model.named_parameters())
    tr.compose(model.float(), [tr.OSFT(protect="weights")])


def test_closures_and_double_hooks_are_refused():
    run, _ = composed(tr.OSFT(protect="weights"))
    optimizer = torch.optim.SGD([p for _, p in run.trainable()], lr=0.1)
    detach = run.attach(optimizer)
    with pytest.raises(tr.PlanError, match="closure"):
        optimizer.step(lambda: torch.zeros(()))
    with pytest.raises(tr.PlanError, match="twice"):
        run.attach(optimizer)
    with pytest.raises(tr.PlanError, match="twice"):
        run.step(optimizer)
    detach()
    assert run.metrics() == {}


def test_what_was_measured_nowhere_is_held_nowhere():
    from dataclasses import replace

    free = {"unmeasured": "unprotected"}
    for config in (
        tr.OSFT(strength="hard", ratio=0.5, **free, form="update"),
        tr.OSFT(rank="energy", energy=0.8, **free, form="update"),
    ):
        model = build("qwen3_moe", dtype=torch.float64)
        statistics = {name: dict(found) for name, found in moments(model, config).items()}
        empty = "model.layers.0.mlp.experts.gate_up_proj"
        statistics[empty]["inputs"][1] = 0.0
        run = tr.compose(model, [replace(config)], statistics=statistics)
        held = run.model.get_submodule("model.layers.0.mlp.experts").osft_gate_up_proj
        X = torch.randn(*held.matrix.shape, dtype=torch.float64)
        projected = held.project(X, X, held.fetch()())
        assert_same(projected[1], X[1], 1e-12)
        assert float((projected[0] - X[0]).norm()) > 0.1 * float(X[0].norm())


def partly_measured(empty, experts=(1,)):
    """A mixture, and statistics in which some experts of `empty` stacks saw no token."""
    model = build("qwen3_moe", dtype=torch.float64)
    statistics = {name: dict(found) for name, found in moments(model, tr.OSFT(form="update")).items()}
    for name in empty:
        statistics[name]["inputs"][list(experts)] = 0.0
        count = statistics[name]["tokens"].expand(4).clone()
        count[list(experts)] = 0
        statistics[name]["tokens"] = count
    return model, statistics


EMPTY = [f"model.layers.0.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")]


def test_experts_that_saw_no_token_are_refused_by_name():
    model, statistics = partly_measured(EMPTY, experts=(1, 3))
    with pytest.raises(tr.PlanError) as caught:
        tr.compose(model, [tr.OSFT(form="update")], statistics=statistics)
    text = str(caught.value)
    assert "4 of 24 matrices" in text and f"{EMPTY[0]}, experts 1, 3 and 1 more weights" in text
    assert "treering measure --tokens N" in text and "freeze" in text and "unprotected" in text
    assert caught.value.settings == ("statistics.path", "techniques.osft.unmeasured")
    others = tr.OSFT(targets=("q_proj", "model.layers.1.mlp.experts.*"))  # what is no target may be as it is
    tr.compose(model, [others], statistics=statistics)


@pytest.mark.parametrize(
    "config",
    [tr.OSFT(form="update"), tr.OSFT(strength="hard", ratio=0.5, form="update"), tr.OSFT(protect="both")],
    ids=str,
)
@pytest.mark.parametrize("anchor", [False, True])
def test_unmeasured_experts_can_be_frozen(config, anchor):
    from dataclasses import replace

    model, statistics = partly_measured(EMPTY, experts=(1, 3))
    config = replace(config, unmeasured="freeze", keep_initial=anchor)
    run = tr.compose(model, [config], statistics=statistics)
    assert "4 of 24 matrices saw no token and are not trained" in run.explain()
    before = weights(run)
    optimizer = run.optimizer(torch.optim.AdamW, lr=1e-2, weight_decay=0.1 if anchor else 0.0)
    for batches in run.steps(STEPS):
        for batch in batches:
            run.loss(batch).backward()
        run.plan.applied[0].gradients()
        for name in EMPTY:
            grad = run.model.get_parameter(name).grad
            assert not grad[[1, 3]].any() and grad[[0, 2]].any()
        run.step(optimizer)
    after = weights(run)
    for name in EMPTY:
        assert torch.equal(after[name][[1, 3]], before[name][[1, 3]])
        assert not torch.equal(after[name][[0, 2]], before[name][[0, 2]])
    name = EMPTY[0].replace("layers.0", "layers.1")
    assert all(not torch.equal(a, b) for a, b in zip(after[name], before[name]))


def test_unmeasured_experts_can_learn_unprotected_and_are_counted():
    model, statistics = partly_measured(EMPTY)
    run = tr.compose(model, [tr.OSFT(unmeasured="unprotected", form="update")], statistics=statistics)
    assert "2 of 24 matrices saw no token and are trained without protection" in run.explain()


@pytest.mark.parametrize("form", ["update", "one_sided"])
def test_a_linear_that_saw_no_token_is_refused_or_frozen(form):
    model = build("llama", dtype=torch.float64)
    name = "model.layers.1.mlp.down_proj.weight"
    statistics = {n: dict(found) for n, found in moments(model, tr.OSFT(form="update")).items()}
    statistics[name] = {"inputs": torch.zeros_like(statistics[name]["inputs"]), "tokens": torch.tensor(0)}
    with pytest.raises(tr.PlanError, match=f"1 of 14 matrices \\({name}\\)"):
        tr.compose(model, [tr.OSFT(form=form)], statistics=statistics)
    run = tr.compose(model, [tr.OSFT(form=form, unmeasured="freeze")], statistics=statistics)
    before = weights(run)
    train(run, STEPS, torch.optim.AdamW, lr=1e-2)
    after = weights(run)
    assert {n for n in before if not torch.equal(before[n], after[n])} == set(statistics) - {name}


@pytest.mark.parametrize("unmeasured", ["refuse", "freeze", "unprotected"])
@pytest.mark.parametrize("protect", ["inputs", "both"])
def test_a_measurement_of_no_token_is_refused_whatever_is_set(unmeasured, protect):
    model = build("llama", dtype=torch.float64)
    empty = {
        name: {"inputs": torch.zeros_like(found["inputs"]), "tokens": torch.tensor(0)}
        for name, found in moments(model, tr.OSFT(form="update")).items()
    }
    with pytest.raises(tr.PlanError, match="measured on no token at all"):
        tr.compose(model, [tr.OSFT(protect=protect, unmeasured=unmeasured)], statistics=empty)


def test_a_thin_measurement_is_warned_about_with_how_much_would_do():
    model = build("llama")
    ids = torch.randint(3, 128, (1, 100))
    statistics = tr.measure(model, [{"input_ids": ids}])
    run = tr.compose(model, [tr.OSFT(form="update")], statistics=statistics)
    [warning] = run.plan.applied[0].warnings
    assert "14 of 14 weights were measured on fewer than 4 tokens for each input dimension" in warning
    assert "down_proj.weight, 100 tokens for 48 inputs)" in warning and "About 192 tokens would do" in warning
    assert warning in run.explain()
    enough = tr.measure(
        build("llama"), [{"input_ids": torch.randint(3, 128, (2, 96)), "attention_mask": torch.ones(2, 96)}]
    )
    run = tr.compose(build("llama"), [tr.OSFT(form="update")], statistics=enough)
    assert run.plan.applied[0].warnings == ()
    assert "14 weights train as they are: 14 are protected" in run.explain()
    [few] = (
        tr.compose(build("llama"), [tr.OSFT(targets=("down_proj",))], statistics=statistics).plan.applied[0].warnings
    )
    assert "2 of 2 weights" in few


def test_a_run_that_was_begun_before_there_was_the_setting_is_the_same_run():
    """Checkpoints know their techniques by this text."""
    assert repr(tr.OSFT(form="update")) == repr(
        tr.OSFT(unmeasured="unprotected", form="update")
    ) and "unmeasured" not in repr(tr.OSFT(form="update"))
    assert "unmeasured='freeze'" in repr(tr.OSFT(unmeasured="freeze", form="update"))
    assert repr(tr.OSFT(form="update")).startswith("OSFT(protect='inputs', strength='soft', damping=0.01, ratio=None, ")


def test_weights_without_protection_are_counted():
    run, _ = composed(tr.OSFT(protect="weights", ratio=0.25, ratios={"q_proj": 1.0}, keep_initial=True))
    assert "14 weights train as they are: 12 are protected, 2 are not" in run.explain()


def test_a_pattern_of_ratios_that_names_nothing_is_an_error():
    with pytest.raises(tr.PlanError, match="matches no target"):
        composed(tr.OSFT(protect="weights", ratios={"q_prj": 0.5}))
