"""A run learns what a teacher gives: loss and gradients are those of all logits of both, on any number of ranks."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import treering as tr
from tests.ranks import on_ranks
from tests.same import assert_all_same, assert_same
from tests.skips import sharded_codes
from tests.toy import VOCABULARY, gradients, packed, rows
from tests.zoo import ARCHITECTURES, build, randomise, save
from treering.attention import install
from treering.core.sharded import gather
from treering.core.topology import data_rank
from treering.objectives import Distill, reference
from treering.train.evaluate import held_out_scores

HOWS = {
    "forward": {},
    "reverse": {"divergence": "reverse", "temperature": 2.0},
    "mixed": {"temperature": 3.0, "mix": 0.3},
}
HEADS: dict[str, list[Any]] = {"plain": [], "tiled": [tr.TiledLoss(tile=3)]}
TEACHERS = ["base", "llama", "gemma2"]  # the second is larger than the student, the third caps its logits
LORA = tr.LoRA(targets=("q_proj", "down_proj"), rank=4, dtype="float64")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("teachers")
    for arch in TEACHERS[1:]:
        teacher(arch).save_pretrained(root / arch)
    return root


def teacher(arch: str) -> Any:
    return sized(hidden_size=48, num_hidden_layers=3) if arch == "llama" else build(arch, seed=5, dtype=torch.float64)


def sized(**sizes: Any) -> Any:
    """A llama of other sizes than the student."""
    config = ARCHITECTURES["llama"]()
    for name, value in sizes.items():
        setattr(config, name, value)
    config.head_dim = config.hidden_size // config.num_attention_heads
    model = hf.LlamaForCausalLM(config).double()
    randomise(model, seed=5)
    return model.eval()


def micro_batches() -> list[dict[str, Any]]:
    """Of unequal numbers of trained tokens; the third has none, the last two are packed."""
    silent = {**rows(1)[0], "labels": torch.full((1, 12), -100)}
    return [*rows(2), silent, packed((5, 1, 7)), packed((9, 2), seed=1)]


def documents(batch: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    lengths = batch["documents"].lengths if "documents" in batch else (batch["input_ids"].shape[1],)
    return list(zip(batch["input_ids"].split(lengths, 1), batch["labels"].split(lengths, 1)))


def move(run: tr.Run) -> None:
    """Adapters that add nothing would make the student its own base, and half of the gradients 0."""
    with torch.no_grad():
        for name, parameter in run.trainable():
            if name.endswith(".B"):
                parameter.fill_(0.02)


def composed(how: Distill, *techniques: Any, arch: str = "llama", **drafting: Any) -> tr.Run:
    run = tr.compose(build(arch, dtype=torch.float64), [LORA, *techniques], objective=how, **drafting)
    move(run)
    return run


@cache
def expected(name: str, taught_by: str, arch: str = "llama") -> tuple[list[float], dict[str, Tensor], dict[str, float]]:
    """Losses, gradients and scores from all logits of two plain models."""
    how = Distill(teacher="given", **HOWS[name])
    student = build(arch, dtype=torch.float64)
    base = build(arch, dtype=torch.float64) if taught_by == "base" else teacher(taught_by)
    for model in (student, base):
        install(model)  # transformers' own eager attention computes its softmax in float32
    factors, undo = {}, []
    for fqn, module in student.named_modules():
        if fqn.endswith(("q_proj", "down_proj")):
            run_names = [f"{fqn}.lora_default.{end}" for end in "AB"]
            factors |= dict(zip(run_names, _factors(arch, fqn)))
            undo.append(torch.nn.utils.parametrize.register_parametrization(module, "weight", _Sum(*_of(factors, fqn))))
    total = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in micro_batches())
    losses, every = [], []
    for batch in micro_batches():
        summed = torch.zeros((), dtype=torch.float64)
        for ids, labels in documents(batch):
            z, t = (model(ids, use_cache=False).logits[0, :-1] for model in (student, base))
            summed = summed + reference.distill(z, t, labels[0, 1:], how)
            every.append((z, t, labels[0, 1:]))
        losses.append(summed / total)
    torch.stack(losses).sum().backward()
    scores = reference.scores(*(torch.cat(parts).detach() for parts in zip(*every)))
    return [float(loss.detach()) for loss in losses], {n: p.grad for n, p in factors.items()}, scores


class _Sum(torch.nn.Module):
    def __init__(self, A: Tensor, B: Tensor):
        super().__init__()
        self.A, self.B = A, B

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.B @ self.A


def _of(factors: dict[str, Any], fqn: str) -> list[Any]:
    return [factors[f"{fqn}.lora_default.{end}"] for end in "AB"]


@cache
def _started(arch: str) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in composed(Distill(teacher="base"), arch=arch).trainable()}


def _factors(arch: str, fqn: str) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(_started(arch)[f"{fqn}.lora_default.{end}"].clone()) for end in "AB"]


def named(folders: Path, taught_by: str) -> str:
    return taught_by if taught_by == "base" else str(folders / taught_by)


def losses_of(run: tr.Run, batches: list[dict[str, Any]]) -> list[float]:
    with torch.no_grad():
        return [float(run.loss(batch)) for ready in run.steps([batches]) for batch in ready]


class HeldOut:
    def __init__(self, rank: int = 0, ranks: int = 1):
        self.rank, self.ranks = rank, ranks

    def once(self):
        batches = micro_batches()
        count = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
        most = -(-len(batches) // self.ranks)
        own = [*batches[self.rank :: self.ranks]]
        yield [{**batch, "count": count} for batch in [*own, *[batches[2]] * (most - len(own))]]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("taught_by", TEACHERS)
@pytest.mark.parametrize("name", HOWS)
def test_loss_and_gradients_are_those_of_all_logits_of_both(name, taught_by, head, folders):
    wanted, wanted_gradients, scores = expected(name, taught_by)
    run = composed(Distill(teacher=named(folders, taught_by), **HOWS[name]), *HEADS[head])
    assert losses_of(run, micro_batches()) == pytest.approx(wanted, rel=1e-9, abs=1e-12)
    assert_all_same(gradients(run, micro_batches()), wanted_gradients, 1e-9)
    held_out = held_out_scores(run, HeldOut())
    assert held_out["loss"] == pytest.approx(sum(wanted), rel=1e-9)
    assert {key: held_out[key] for key in scores} == pytest.approx(scores, rel=1e-9)
    assert held_out["perplexity"] == pytest.approx(2.718281828459045 ** scores["cross_entropy"], rel=1e-9)


@pytest.mark.parametrize("head", HEADS)
def test_a_student_that_caps_its_logits_is_compared_after_the_cap(head, folders):
    wanted, wanted_gradients, _ = expected("mixed", "gemma2", "gemma2")
    run = composed(Distill(teacher=named(folders, "gemma2"), **HOWS["mixed"]), *HEADS[head], arch="gemma2")
    assert losses_of(run, micro_batches()) == pytest.approx(wanted, rel=1e-9, abs=1e-12)
    assert_all_same(gradients(run, micro_batches()), wanted_gradients, 1e-9)


def sharded(name: str, path: str, head: str, shard: dict[str, Any]) -> Any:
    run = composed(Distill(teacher=path, **HOWS[name]), *HEADS[head], tr.Recompute(), tr.Shard(**shard), mesh=tr.mesh())
    rank, ranks = data_rank(run.plan.mesh)
    scores = held_out_scores(run, HeldOut(rank, ranks))
    own, found, total = micro_batches()[rank::ranks], [], torch.zeros((), dtype=torch.float64)
    for _ in range(2):  # what the first step leaves behind must not change the second
        for ready in run.steps([own]):
            for batch in ready:
                loss = run.loss(batch)
                loss.backward()
                total += loss.detach()
        found.append({n: gather(p.grad) for n, p in run.trainable()})
        for _, p in run.trainable():
            p.grad = None
    return float(run.total(total)) / 2, found, scores


@pytest.mark.parametrize(
    ("name", "taught_by", "head", "shard"),
    [
        ("mixed", "base", "plain", {}),
        ("forward", "base", "tiled", {"hold": "gradients"}),
        ("reverse", "llama", "plain", {"hold": "all"}),
        ("mixed", "llama", "tiled", {}),
    ],
)
def test_two_ranks_with_unequal_tokens_are_one_process(name, taught_by, head, shard, folders):
    wanted, wanted_gradients, scores = expected(name, taught_by)
    for total, found, held_out in on_ranks(2, sharded, name, named(folders, taught_by), head, shard):
        assert total == pytest.approx(sum(wanted), rel=1e-9)
        for each in found:
            assert_all_same(each, wanted_gradients, 1e-9)
        assert {key: held_out[key] for key in scores} == pytest.approx(scores, rel=1e-9)


def test_a_teacher_and_its_tied_embedding_are_sharded_like_any_model(tmp_path):
    save("llama", tmp_path / "tied", dtype=torch.float64, seed=5, tied=True)
    one = composed(Distill(teacher=str(tmp_path / "tied")), tr.TiledLoss(tile=3))
    wanted = gradients(one, micro_batches())
    for _, found, _ in on_ranks(2, sharded, "forward", str(tmp_path / "tied"), "tiled", {}):
        for each in found:
            assert_all_same(each, wanted, 1e-9)


def test_an_objective_of_ones_own_may_have_a_teacher(folders):
    from tests.test_objectives import Divergence

    class Taught(Divergence):
        teacher = str(folders / "llama")

    how = Distill(teacher=str(folders / "llama"), temperature=2.0)
    own, known = (composed(objective, tr.TiledLoss(tile=3)) for objective in (Taught(), how))
    assert_same(torch.tensor(losses_of(own, rows(2))), torch.tensor(losses_of(known, rows(2))), 1e-9)


REFUSED = {
    "quantize": ([tr.Quantize(format="int8"), LORA], "base, and quantize keeps weights in few bits"),
    "full": ([tr.Full()], "base, and full trains weights"),
    "pissa": ([tr.LoRA(rank=4, init="pissa")], "base, and lora trains weights"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_that_does_not_keep_what_it_was_is_not_its_own_teacher(case):
    techniques, message = REFUSED[case]
    model = build("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(tr.PlanError, match=message):
        tr.compose(model, techniques, objective=tr.Distill(teacher="base"))
    assert_all_same({name: model.state_dict()[name] for name in before}, before)


def test_another_number_of_logits_is_refused_and_says_both(tmp_path):
    sized(vocab_size=VOCABULARY + 64).save_pretrained(tmp_path)
    with pytest.raises(tr.PlanError, match="has 192 logits for each position, and the model has 128"):
        composed(Distill(teacher=str(tmp_path)))


def test_a_quantized_model_without_anything_to_train_can_be_scored(folders):
    run = tr.compose(
        build("llama"),
        [tr.Quantize(format="int3", group=16)],
        frozen=True,
        objective=tr.Distill(teacher=str(folders / "llama")),
    )
    assert 0 < held_out_scores(run, HeldOut())["kl"] < 10


@sharded_codes
def test_a_quantized_student_learns_the_original_on_two_ranks(folders, tmp_path):
    on_ranks(2, quantized, str(folders / "llama"), str(tmp_path))


def quantized(path: str, prepared: str) -> None:
    techniques = [
        tr.Quantize(format="int4", group=16),
        tr.LoRA(rank=4, init="residual"),
        tr.TiledLoss(tile=3),
        tr.Shard(),
    ]
    run = tr.compose(path, techniques, mesh=tr.mesh(), prepared=prepared, objective=tr.Distill(teacher=path))
    rank, ranks = data_rank(run.plan.mesh)
    before = held_out_scores(run, HeldOut(rank, ranks))["kl"]
    optimizer = run.optimizer(torch.optim.AdamW, lr=1e-3)
    for ready in run.steps([micro_batches()[rank::ranks]] * 8):
        for batch in ready:
            run.loss(batch).backward()
        run.step(optimizer)
    assert held_out_scores(run, HeldOut(rank, ranks))["kl"] < 0.7 * before
