"""What the plan refuses, explains and promises."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import treering as tr
from tests.same import assert_all_same, assert_same
from tests.toy import gradients, rows, train, weights
from tests.zoo import build, save
from treering.core.module_forward import ModuleForward, install
from treering.technique import Applied, Claim, Part, Stage


class SumForward(ModuleForward):
    def __call__(self, x):
        return x @ (self.module.left + self.module.right).T


def test_no_adapting_technique_is_refused():
    with pytest.raises(tr.PlanError, match="nothing would be trained"):
        tr.compose(build("llama"), [tr.Compile()])


def test_an_adapter_and_full_training_of_one_weight_are_refused_with_names_and_settings():
    with pytest.raises(tr.PlanError) as caught:
        tr.compose(build("llama"), [tr.LoRA(rank=2), tr.Full()])
    text = str(caught.value)
    assert "lora and full" in text and "layers.0" in text and "(and 13 more)" in text
    assert set(caught.value.settings) == {"lora.targets", "full.train"}


def test_two_adapters_of_one_name_are_refused():
    with pytest.raises(tr.PlanError, match=r"lora\.name"):
        tr.compose(build("llama"), [tr.LoRA(rank=2), tr.LoRA(rank=4)])


def test_a_pissa_start_must_be_alone_on_its_weight():
    with pytest.raises(tr.PlanError, match="alone"):
        tr.compose(build("llama"), [tr.LoRA(rank=2, init="pissa"), tr.LoRA(rank=4, name="second")])


def test_a_class_in_place_of_a_technique_is_refused():
    with pytest.raises(tr.PlanError, match=r"write Full\(\)"):
        tr.compose(build("llama"), [tr.Full])


def test_a_rank_larger_than_the_matrix_is_refused():
    with pytest.raises(tr.PlanError, match="at most 16"):
        tr.compose(build("llama"), [tr.LoRA(rank=17)])


@dataclass(frozen=True, kw_only=True)
class Halve:
    """A technique that owns a weight and loses some of it: what the self-check is for."""

    error: float = 0.0
    stage: ClassVar[Stage] = Stage.ADAPT
    name: ClassVar[str] = "model.layers.0.mlp.up_proj"

    def claims(self, anatomy, mesh):
        return [Claim(fqn=f"{self.name}.weight", aspect="storage", setting="halve")]

    def apply(self, model, site):
        module = model.get_submodule(self.name)
        whole = module.weight
        del module.weight
        for half in ("left", "right"):
            module.register_parameter(half, torch.nn.Parameter(torch.empty_like(whole)))
        install(SumForward(module))
        left, right = f"{self.name}.left", f"{self.name}.right"

        def split(weight, below, statistics):
            W = weight.read()
            return {left: W / 4, right: W * (0.75 + self.error)}

        part = Part(
            names=(left, right),
            split=split,
            join=lambda t, below: below + t[left] + t[right],
            keeps_base=False,
            tolerance=1e-6,
        )
        return Applied(trainable=(left, right), parts={f"{self.name}.weight": part})


def test_a_technique_that_owns_the_weight_is_filled_exported_and_learns(tmp_path):
    model = build("llama")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    run = tr.compose(model, [Halve()])
    assert_all_same(weights(run), before, 1e-6)
    train(run, [rows(2)])
    changed = [n for n, w in weights(run).items() if not torch.equal(w, before[n])]
    assert changed == [f"{Halve.name}.weight"]


def test_a_split_that_loses_the_weight_is_caught_at_load():
    with pytest.raises(tr.PlanError, match=r"up_proj.weight is not reproduced.*1\.00e-02"):
        tr.compose(build("llama"), [Halve(error=0.01)])


def test_storage_and_an_addend_that_needs_the_plain_weight_are_refused():
    with pytest.raises(tr.PlanError, match=r"needs the plain weight of .*up_proj\.weight, which halve"):
        tr.compose(build("llama"), [Halve(), tr.LoRA(rank=2, init="pissa")])


def test_storage_and_a_zero_start_adapter_go_together():
    run = tr.compose(build("llama"), [Halve(), tr.LoRA(rank=2, targets=("down_proj",))])
    train(run, [rows(2)])


def test_a_live_model_and_its_folder_give_the_same_run(tmp_path):
    save("qwen3_moe", tmp_path / "m")
    from_folder = tr.compose(tmp_path / "m", [tr.Full()])
    live = tr.compose(build("qwen3_moe"), [tr.Full()])
    assert_all_same(weights(from_folder), weights(live))
    losses, wanted = train(from_folder, [rows(3)]), train(live, [rows(3)])
    assert losses == wanted


def test_a_batch_that_was_not_counted_is_refused():
    run = tr.compose(build("llama"), [tr.Full()])
    with pytest.raises(tr.PlanError, match=r"run\.steps"):
        run.loss(rows(1)[0])


def test_an_optimizer_that_misses_a_parameter_is_refused():
    run = tr.compose(build("llama"), [tr.Full()])
    some = [p for _, p in run.trainable()][:-1]
    with pytest.raises(tr.PlanError, match="1 missing"):
        run.attach(torch.optim.SGD(some, lr=0.1))


def test_the_loss_is_the_mean_over_trained_tokens_of_the_whole_step():
    run = tr.compose(build("llama"), [tr.Full()])
    batches = rows(5)
    wanted, count = 0.0, 0
    for batch in batches:
        logits = run.model(batch["input_ids"]).logits[:, :-1]
        each = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="none"
        )
        wanted += each.sum().item()
        count += int((batch["labels"][:, 1:] != -100).sum())
    for ready in run.steps(batches, accumulate=5):
        assert ready[0]["count"] == count
        assert sum(run.loss(b).item() for b in ready) == pytest.approx(wanted / count, rel=1e-6)


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_any_cut_into_micro_batches_gives_the_same_gradients(cut):
    def padded(batches):
        width = max(b["input_ids"].shape[1] for b in batches)
        pad = lambda t, v: torch.nn.functional.pad(t, (0, width - t.shape[1]), value=v)  # noqa: E731
        return {
            "input_ids": torch.cat([pad(b["input_ids"], 0) for b in batches]),
            "labels": torch.cat([pad(b["labels"], -100) for b in batches]),
        }

    batches = rows(6)
    wanted = gradients(tr.compose(build("llama"), [tr.Full()]), batches)
    merged = [padded(batches[i : i + cut]) for i in range(0, 6, cut)]
    assert_all_same(gradients(tr.compose(build("llama"), [tr.Full()]), merged), wanted, 1e-6)


def test_a_gradient_that_is_not_finite_skips_the_step_and_changes_nothing():
    run = tr.compose(build("llama"), [tr.Full()])
    optimizer = run.optimizer(lr=1e-2)
    [ready] = run.steps([rows(1)])
    run.loss(ready[0]).backward()
    run.step(optimizer)
    before = weights(run)
    state = {k: v.clone() for k, v in optimizer.state[run.trainable()[0][1]].items()}
    run.loss(ready[0]).backward()
    run.trainable()[3][1].grad[0] = float("nan")
    report = run.step(optimizer)
    assert report.skipped
    assert_all_same(weights(run), before)
    for key, value in optimizer.state[run.trainable()[0][1]].items():
        assert_same(value, state[key])


def test_too_many_skips_in_a_row_name_step_sample_and_parameter():
    run = tr.compose(build("llama"), [tr.Full()])
    run.max_skips = 2
    optimizer = run.optimizer(lr=1e-2)
    name, parameter = run.trainable()[3]
    with pytest.raises(tr.NumericsError) as caught:
        for ready in run.steps([rows(1), rows(1), rows(1)]):
            run.loss(ready[0]).backward()
            parameter.grad[0] = float("inf")
            run.step(optimizer)
    assert "step 2" in str(caught.value) and "row 0" in str(caught.value) and name in str(caught.value)


def test_clipping_scales_the_whole_gradient():
    run = tr.compose(build("llama"), [tr.Full()])
    [ready] = run.steps([rows(1)])
    run.loss(ready[0]).backward()
    before = {n: p.detach().clone() for n, p in run.trainable()}
    gradient = {n: p.grad.clone() for n, p in run.trainable()}
    norm = torch.stack([g.double().norm() for g in gradient.values()]).norm()
    report = run.step(run.optimizer(torch.optim.SGD, lr=1.0), clip=0.01)
    assert report.norm == pytest.approx(float(norm), rel=1e-6)
    after = {n: before[n] - gradient[n] * (0.01 / norm) for n in before}
    assert_all_same(dict(run.model.named_parameters()), after, 1e-6)


def test_attach_runs_projection_and_retraction_in_a_foreign_loop():
    seen = []

    @dataclass(frozen=True, kw_only=True)
    class Watch:
        stage: ClassVar[Stage] = Stage.ADAPT

        def claims(self, anatomy, mesh):
            return []

        def apply(self, model, site):
            return Applied(gradients=lambda: seen.append("project"), after_step=lambda: seen.append("retract"))

    run = tr.compose(build("llama"), [tr.Full(), Watch()])
    optimizer = torch.optim.SGD([p for _, p in run.trainable()], lr=0.1)
    detach = run.attach(optimizer)
    optimizer.step()
    detach()
    optimizer.step()
    assert seen == ["project", "retract"]


def test_explain_tells_order_counts_and_memory():
    run = tr.compose(build("llama"), [tr.Compile(backend="eager"), tr.LoRA(rank=2)])
    text = run.explain()
    assert text.index("lora") < text.index("compile")
    assert "14 adapters of rank 2" in text and "AdamW state" in text and "% " not in text.split("mesh")[0][-3:]


def test_dropout_is_refused_unless_chosen():
    model = build("llama")
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1
    with pytest.raises(tr.PlanError, match=r"model\.dropout: off"):
        tr.compose(model, [tr.Full()])
    run = tr.compose(model, [tr.Full()], dropout="off")
    assert all(getattr(m, "attention_dropout", 0.0) == 0.0 for m in run.model.modules())


def test_a_second_composition_of_the_same_model_is_refused():
    model = build("llama")
    tr.compose(model, [tr.LoRA(rank=2)])
    with pytest.raises(tr.PlanError, match="composed already"):
        tr.compose(model, [tr.LoRA(rank=2)])


def test_undo_leaves_the_plain_forward():
    run = tr.compose(build("llama"), [tr.LoRA(rank=2, init="pissa")])
    ids = torch.arange(12)[None]
    with torch.no_grad():
        adapted = run.model(ids).logits
        run.undo()
        bare = run.model(ids).logits
    assert not torch.equal(adapted, bare)  # pissa moved part of the weight into the adapter, which is off now
    assert not any("forward" in vars(m) for m in run.model.modules())
