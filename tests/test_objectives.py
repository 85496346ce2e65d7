"""An objective is a value: the plain head and the tiled head evaluate the same one, to the same numbers."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import treering as tr
from tests.ranks import on_ranks
from tests.same import assert_all_same, assert_same
from tests.techniques.tiling.test_losses import Watched
from tests.toy import VOCABULARY, gradients, packed, rows
from tests.zoo import build
from treering.attention import install
from treering.core.seeds import generator
from treering.objectives import IGNORED, CrossEntropy, Objective


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """T² · KL(teacher ‖ student) with given logits of the teacher."""

    temperature: float = 2.0
    needs: ClassVar[tuple[str, ...]] = ("teacher_logits",)
    copies: ClassVar[int] = 6

    def __call__(self, logits_NV: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
        p, q = (F.log_softmax(z / self.temperature, -1) for z in (rows["teacher_logits"], logits_NV))
        return self.temperature**2 * F.kl_div(q, p, log_target=True, reduction="sum")


@dataclass(frozen=True, kw_only=True)
class Weighted:
    """Cross-entropy with a weight for each position. It would be nan for a row that is not trained."""

    needs: ClassVar[tuple[str, ...]] = ("targets", "weights")
    copies: ClassVar[int] = 4

    def __call__(self, logits_NV: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
        assert (rows["targets"] != IGNORED).all(), "only rows that are trained are evaluated"
        return (rows["weights"] * F.cross_entropy(logits_NV, rows["targets"], reduction="none")).sum()


OBJECTIVES: dict[str, Objective] = {
    "divergence": Divergence(),
    "weighted": Weighted(),
    "smoothed": CrossEntropy(label_smoothing=0.1, z_loss=1e-2),
}
HEADS = {"plain": [], "tiled": [tr.TiledLoss(tile=3)]}
ARCHITECTURES = ["llama", "gemma2", "granite"]  # of these, gemma2 caps its logits and granite scales them


def with_needs(batch: dict[str, Any], dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    shape, draw = batch["input_ids"].shape, generator(7, "needs", *batch["input_ids"].shape)
    weights = torch.rand(shape, generator=draw, dtype=torch.float64)
    teacher = torch.randn(*shape, VOCABULARY, generator=draw, dtype=torch.float64)
    return {**batch, "weights": weights.to(dtype), "teacher_logits": teacher.to(dtype)}


def padded() -> dict[str, Any]:
    """Three right-padded rows."""
    ids = torch.randint(3, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill(torch.arange(9)[None] >= torch.tensor([[9], [4], [6]]), IGNORED)
    return {"input_ids": ids, "labels": labels, "samples": []}


def batches(dtype: torch.dtype = torch.float64) -> list[dict[str, Any]]:
    return [with_needs(batch, dtype) for batch in (*rows(2), packed((5, 1, 7)), padded())]


def composed(objective: Objective | None, head: str, arch: str = "llama", *techniques: Any, **model: Any) -> tr.Run:
    model = {"dtype": torch.float64} | model
    return tr.compose(build(arch, **model), [tr.Full(), *HEADS[head], *techniques], objective=objective)


def losses(run: tr.Run, micro_batches: list[dict[str, Any]]) -> Tensor:
    with torch.no_grad():
        return torch.stack([run.loss(batch) for ready in run.steps([micro_batches]) for batch in ready])


def expected(objective: Objective, arch: str) -> tuple[Tensor, dict[str, Tensor]]:
    """From all logits of the model, without any of the code under test."""
    model = build(arch, dtype=torch.float64)
    install(model)  # transformers' own eager attention computes its softmax in float32
    micro_batches = [batch for batch in batches() if "documents" not in batch]
    total = sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in micro_batches)
    values = []
    for batch in micro_batches:
        logits = model(batch["input_ids"], use_cache=False).logits
        trained = (batch["labels"][:, 1:] != IGNORED).nonzero(as_tuple=True)
        given = {key: batch[key][trained] for key in ("weights", "teacher_logits")}
        values.append(objective(logits[trained], {**given, "targets": batch["labels"][:, 1:][trained]}) / total)
    torch.stack(values).sum().backward()
    return torch.stack(values).detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_both_heads_give_the_loss_and_the_gradients_of_all_logits(arch, objective):
    wanted, wanted_gradients = expected(OBJECTIVES[objective], arch)
    micro_batches = [batch for batch in batches() if "documents" not in batch]
    for head in HEADS:
        run = composed(OBJECTIVES[objective], head, arch)
        assert_same(losses(run, micro_batches), wanted, 1e-10, head)
        assert_all_same(gradients(run, micro_batches), wanted_gradients, 1e-10)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_plain_and_tiled_are_the_same_on_packed_and_padded_rows(arch, objective):
    plain, tiled = (composed(OBJECTIVES[objective], head, arch) for head in HEADS)
    assert_same(losses(tiled, batches()), losses(plain, batches()), 1e-10)
    assert_all_same(gradients(tiled, batches()), gradients(plain, batches()), 1e-10)


@cache
def cross_entropy_gradients() -> dict[str, Tensor]:
    return gradients(composed(None, "plain"), batches())


@pytest.mark.parametrize("head", HEADS)
def test_without_one_it_is_cross_entropy(head):
    assert_all_same(gradients(composed(None, head), batches()), cross_entropy_gradients(), 1e-12)
    ones = [{**batch, "weights": torch.ones_like(batch["weights"])} for batch in batches()]
    assert_all_same(gradients(composed(Weighted(), head), ones), cross_entropy_gradients(), 1e-12)


@pytest.mark.parametrize("head", HEADS)
def test_what_it_needs_and_the_batch_has_not_is_named(head):
    run, batch = composed(Divergence(), head), {**batches()[0], "count": 3}
    del batch["teacher_logits"]
    (ready,) = run.ready([batch])
    with pytest.raises(tr.DataError, match=r"needs 'teacher_logits', and the batch has 'input_ids'"):
        run.loss(ready)
    (ready,) = run.ready([{**batch, "teacher_logits": torch.zeros(1, 3, VOCABULARY)}])
    with pytest.raises(tr.DataError, match=r"'teacher_logits' for each of 1 × 12 positions, and its shape is \[1, 3"):
        run.loss(ready)


@pytest.mark.parametrize("head", HEADS)
def test_a_micro_batch_that_trains_nothing_needs_nothing_and_has_zero_gradients(head):
    run, batch = composed(Weighted(), head), rows(1)[0]
    (ready,) = run.ready([{**batch, "labels": torch.full_like(batch["labels"], IGNORED), "count": 3}])
    loss = run.loss(ready)
    loss.backward()
    assert float(loss.detach()) == 0
    assert all(p.grad is None or not p.grad.any() for _, p in run.trainable())
    assert run.model.lm_head.weight.grad is not None


def test_settings_of_a_technique_and_an_objective_are_not_both_taken():
    smoothing = tr.TiledLoss(tile=3, label_smoothing=0.1, z_loss=1e-2)
    run = tr.compose(build("llama", dtype=torch.float64), [tr.Full(), smoothing])
    assert run.plan.objective == OBJECTIVES["smoothed"]
    wanted = gradients(composed(OBJECTIVES["smoothed"], "plain"), batches())
    assert_all_same(gradients(run, batches()), wanted, 1e-10)
    model = build("llama")
    with pytest.raises(tr.PlanError, match="Leave label_smoothing and z_loss out of tiledloss"):
        tr.compose(model, [tr.Full(), smoothing], objective=Divergence())
    tr.compose(model, [tr.Full()], objective=Divergence())  # the refusal left the model as it was


def test_tiles_refuse_an_objective_that_is_no_sum_over_rows():
    @dataclass(frozen=True, kw_only=True)
    class Mean:
        needs: ClassVar[tuple[str, ...]] = ("targets",)
        copies: ClassVar[int] = 4

        def __call__(self, logits_NV: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
            return F.cross_entropy(logits_NV, rows["targets"])

    run = composed(Mean(), "tiled")
    with pytest.raises(tr.PlanError, match="gives for one token depends on the others"):
        gradients(run, batches())


def test_a_tile_of_a_given_budget_is_shorter_for_an_objective_with_more_copies():
    seen = []

    @dataclass(frozen=True, kw_only=True)
    class Counting:
        copies: int
        needs: ClassVar[tuple[str, ...]] = ("targets",)

        def __call__(self, logits_NV: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
            seen.append(len(logits_NV))
            return CrossEntropy()(logits_NV, rows)

    (batch,) = rows(1, lengths=(2001,))
    gib = 4 * 4 * VOCABULARY * 1024 / 2**30  # for 1,024 rows of 4 copies
    longest = {}
    for copies in (4, 8):
        run = tr.compose(build("llama"), [tr.Full(), tr.TiledLoss(budget=gib)], objective=Counting(copies=copies))
        seen.clear()
        gradients(run, [batch])
        longest[copies] = max(seen)
    assert 512 < longest[4] <= 1024 and 256 < longest[8] <= 512


@pytest.mark.parametrize("objective", [*OBJECTIVES, None])
def test_no_tensor_of_the_tiled_head_has_tokens_times_vocabulary_elements(objective):
    """The divergence is given its teacher's logits, so what counts there is what is made."""
    run = tr.compose(build("llama"), [tr.Full(), tr.TiledLoss(tile=8)], objective=OBJECTIVES.get(objective))
    micro_batches = [with_needs(batch, torch.float32) for batch in rows(1, lengths=(400,))]
    gradients(run, micro_batches)  # it compares values, once
    (ready,) = run.ready([{**micro_batches[0], "count": 399}])
    ready = {key: value for key, value in ready.items() if objective == "divergence" or key != "teacher_logits"}
    with Watched() as seen:
        run.loss(ready).backward()
    limit = 400 * 48 if objective != "divergence" else 400 * VOCABULARY  # the MLP's width; a view of the teacher's
    assert seen.largest <= limit
    with Watched() as seen:
        tr.compose(build("llama"), [tr.Full()]).loss(ready).backward()
    assert seen.largest >= 399 * VOCABULARY, "this would see it"


@dataclass(frozen=True, kw_only=True)
class Dtypes(Weighted):
    """FSDP casts floating tensors in the arguments of a forward; weights are none of its business."""

    dtype: torch.dtype

    def __call__(self, logits_NV: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
        assert rows["weights"].dtype == self.dtype
        return super().__call__(logits_NV, rows)


def sharded_gradients(heads: tuple[str, ...], compute: str, dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """Rank 1 has one micro-batch less, and takes part with a silent one that has no weights."""
    mine = [with_needs(batch, dtype) for batch in rows(3)][torch.distributed.get_rank() :: 2]
    objective = Dtypes(dtype=dtype)
    return [
        gradients(composed(objective, head, "llama", tr.Shard(compute=compute, reduce="stored"), dtype=dtype), mine)
        for head in heads
    ]


def test_on_two_ranks_with_unequally_many_micro_batches():
    wanted = gradients(composed(Weighted(), "plain"), [with_needs(batch) for batch in rows(3)])
    for found in on_ranks(2, sharded_gradients, tuple(HEADS), "stored", torch.float64):
        for one in found:
            assert_all_same(one, wanted, 1e-10)


def test_mixed_precision_leaves_what_an_objective_needs_as_it_is():
    on_ranks(2, sharded_gradients, tuple(HEADS), "bfloat16", torch.float32)
