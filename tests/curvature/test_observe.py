"""What a live model's linears see is what the definition says, and nothing of the watching stays behind."""

import pytest
import torch

import treering as tr
from tests.curvature.texts import LENGTHS, documents, rows
from tests.same import assert_same
from tests.zoo import ARCHITECTURES, build
from treering.anatomy import examine
from treering.curvature import observe
from treering.curvature.reference import moments
from treering.technique import recomputing

DENSE = [name for name in ARCHITECTURES if name not in ("qwen3_moe", "mixtral", "gpt_oss")]


@pytest.fixture(scope="module")
def llama():
    model = build("llama")
    return model, examine(model)


def seen_by(model, anatomy, *forwards, **how):
    with torch.no_grad(), observe(model, anatomy, **how) as seen:
        for inputs in forwards:
            model(**inputs)
    return seen.statistics()


@pytest.mark.parametrize("name", DENSE)
def test_moments_are_those_of_the_definition_and_padding_is_left_out(name):
    model = build(name)
    anatomy = examine(model)
    wanted, count = moments(model, anatomy, documents())
    found = seen_by(model, anatomy, rows(documents()))
    assert set(wanted) <= set(found)
    for weight, moment in wanted.items():
        assert_same(found[weight]["inputs"], moment, 1e-6, weight)
        assert found[weight]["inputs"].dtype == torch.float32
        assert int(found[weight]["tokens"]) == count[weight] == sum(LENGTHS)
    assert found.rings[0].tokens == sum(LENGTHS)


def test_linears_with_the_same_inputs_are_measured_once(llama):
    model, anatomy = llama
    found = seen_by(model, anatomy, rows(documents()))
    assert len(found) == 14 and len(found.tensors) == 8
    layer = "model.layers.1"
    keys = {name: found.entries[f"{layer}.{name}.weight"].key.removeprefix(f"{layer}.") for name in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    )}  # fmt: skip
    assert set(keys.values()) == {
        f"{name}.weight" for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    }
    apart = seen_by(model, anatomy, rows(documents()), share=False)
    assert len(apart.tensors) == 14
    for weight in found:
        assert torch.equal(found[weight]["inputs"], apart[weight]["inputs"]), weight


class Reused(torch.nn.Module):
    """Writes into what the first linear saw, or gives the second one another tensor in the same place."""

    def __init__(self, layer, how):
        super().__init__()
        self.q_proj, self.k_proj, self.how = layer.q_proj, layer.k_proj, how

    def forward(self, x):
        x = x * 1.0
        q = self.q_proj(x)
        if self.how == "written":
            x.mul_(3.0)
        elif self.how == "freed":
            size = x.shape
            del x
            x = torch.full(size, 7.0)  # likely where the old one was, if nobody held on to it
        return q.sum() + self.k_proj(x.view(x.shape) if self.how == "viewed" else x).sum()


@pytest.mark.parametrize("how, shared", [("as it is", True), ("viewed", True), ("written", False), ("freed", False)])
@pytest.mark.parametrize("inference", [False, True])
def test_what_was_written_to_or_freed_is_not_the_same_input(llama, how, shared, inference):
    model, anatomy = llama
    attention = model.model.layers[0].self_attn
    other = Reused(attention, how)
    x = torch.randn(1, 4, 32)
    mode = torch.inference_mode if inference else torch.no_grad
    with mode(), observe(model, anatomy) as seen:
        other(x)
        other(x)
    q, k = (f"model.layers.0.self_attn.{n}_proj.weight" for n in "qk")
    assert (seen.owner[k] == q) is (shared and not inference)
    found = seen.statistics()
    factor = {"written": 9.0}.get(how, 1.0)
    wanted = torch.full((32, 32), 49.0) if how == "freed" else factor * (x[0].T @ x[0]) / 4
    assert_same(found[k]["inputs"], wanted, 1e-6)
    assert int(found[k]["tokens"]) == int(found[q]["tokens"]) == 8


def test_inputs_shared_in_one_forward_only_are_refused_with_a_way_out(llama):
    model, anatomy = llama
    layer, x = model.model.layers[0].self_attn, torch.randn(1, 4, 32)
    with torch.no_grad(), observe(model, anatomy):
        Reused(layer, "as it is")(x)
        with pytest.raises(tr.PlanError, match="share=False"):
            Reused(layer, "written")(x)


def test_a_second_pass_for_the_backward_is_not_counted(llama):
    model, anatomy = llama
    once = seen_by(model, anatomy, rows(documents()))
    with torch.no_grad(), observe(model, anatomy) as seen:
        model(**rows(documents()))
        with recomputing("recompute"):
            model(**rows(documents()))
    twice = seen.statistics()
    assert twice.digest == once.digest and twice.rings == once.rings


def test_observing_a_training_loop_changes_nothing_in_it_and_leaves_nothing(llama):
    model, anatomy = llama
    before = {name: sorted(vars(module)) for name, module in model.named_modules()}
    hooks = lambda: sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())  # noqa: E731
    ids = documents()[0][None]
    plain = torch.autograd.grad(model(input_ids=ids, labels=ids).loss, model.get_input_embeddings().weight)[0]
    with observe(model, anatomy) as seen:
        loss = model(input_ids=ids, labels=ids).loss
        grad = torch.autograd.grad(loss, model.get_input_embeddings().weight)[0]
        assert hooks()
    assert torch.equal(grad, plain) and not hooks()
    assert {name: sorted(vars(module)) for name, module in model.named_modules()} == before
    assert not any(moment["inputs"].requires_grad for moment in seen.statistics().values())


def test_nothing_stays_after_a_failure(llama):
    model, anatomy = llama
    with pytest.raises(IndexError), observe(model, anatomy):
        model(input_ids=torch.tensor([[10_000]]))
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_a_cached_generation_counts_each_token_once(llama):
    model, anatomy = llama
    first, second = documents((6, 6))
    batch = {"input_ids": torch.stack([first, second]), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    batch["attention_mask"][0, :2] = 0
    with torch.no_grad(), observe(model, anatomy) as seen:
        cache = model(**batch).past_key_values
        mask = torch.cat([batch["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
        model(input_ids=torch.tensor([[4], [5]]), attention_mask=mask, past_key_values=cache)
    assert seen.tokens == 12 - 2 + 2


def test_which_tokens_count_can_be_told(llama):
    model, anatomy = llama
    ids = documents()[0][None]
    wanted, _ = moments(model, anatomy, [documents()[0]])
    real = torch.zeros(1, 12, dtype=torch.bool)
    real[0, :4] = True
    short, _ = moments(model, anatomy, [documents()[0][:4]])  # causal: the first tokens do not see the rest
    with torch.no_grad(), observe(model, anatomy) as seen, seen.counting(real):
        model(input_ids=ids)
    weight = "model.layers.1.mlp.down_proj.weight"
    assert_same(seen.statistics()[weight]["inputs"], short[weight], 1e-6)
    assert not torch.allclose(wanted[weight].float(), short[weight].float())
    with torch.no_grad(), observe(model, anatomy) as seen, pytest.raises(tr.PlanError, match="counting"):
        model(input_ids=ids, attention_mask=torch.ones(1, 1, 12, 12, dtype=torch.bool))


def test_bfloat16_is_widened_before_the_product():
    model = build("llama", dtype=torch.bfloat16)
    anatomy = examine(model)
    wanted, _ = moments(model, anatomy, documents((12,)))  # the inputs are bfloat16, their products float64
    found = seen_by(model, anatomy, {"input_ids": documents((12,))[0][None]})
    for weight, moment in wanted.items():
        assert_same(found[weight]["inputs"], moment, 1e-6, weight)


def test_autocast_does_not_round_the_products(llama):
    model, anatomy = llama
    x = torch.randn(1, 64, 32)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16), observe(model, anatomy) as seen:
        model.model.layers[0].mlp.up_proj(x)
    wanted = x[0].double().T @ x[0].double() / 64
    assert_same(seen.statistics()["model.layers.0.mlp.up_proj.weight"]["inputs"], wanted, 1e-6)


def test_compiled_blocks_are_measured_too(llama):
    model, anatomy = build("llama"), llama[1]
    wanted = seen_by(model, anatomy, rows(documents()))
    for block in model.model.layers:
        block.compile(backend="eager")
    with torch.no_grad():
        model(**rows(documents()))  # compiled before anybody watches
    assert seen_by(model, anatomy, rows(documents())).digest == wanted.digest


def test_what_is_not_finite_is_said(llama):
    model, anatomy = llama
    with torch.no_grad(), observe(model, anatomy) as seen:
        model.model.layers[0].mlp.up_proj(torch.full((1, 2, 32), 1e30))
    with pytest.raises(tr.NumericsError, match=r"mlp\.up_proj"):
        seen.statistics()


def test_a_weight_outside_the_blocks_is_not_to_be_had(llama):
    with pytest.raises(tr.PlanError, match=r"lm_head\.weight"), observe(*llama, weights=["lm_head.weight"]):
        pass
