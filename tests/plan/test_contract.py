"""What the contract offers a technique: shares of a row, what came before, what is reproduced, a place to observe."""

import inspect
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import pytest
import torch

import treering as tr
from tests.ranks import on_ranks
from tests.same import assert_same
from tests.toy import packed, rows, train
from tests.zoo import build, save
from treering.core.module_forward import ModuleForward, install
from treering.formats import FP8
from treering.plan.batches import with_targets
from treering.plan.compose import DraftSettings
from treering.technique import Applied, Claim, LazyTensor, Part, Stage, StoredTensor, Variant
from treering.techniques import TECHNIQUES
from treering.train.evaluate import held_out_loss
from treering.weights.plain_tensors import PlainTensor


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Each rank along `sequence` computes its half of a row, as a row of its own."""

    short: int = 0  # what the share is said to be too little
    stage: ClassVar[Stage] = Stage.FORWARD

    def claims(self, anatomy, mesh):
        return [Claim(fqn="", aspect="attention", setting="cut")]

    def apply(self, model, site):
        ranks, rank = site.mesh["sequence"].size(), site.mesh["sequence"].get_local_rank()

        def share(length):
            each = -(-length // ranks)
            return (range(rank * each, min((rank + 1) * each, length) - self.short),)

        def cut(batch):
            (own,) = share(batch["input_ids"].shape[1])
            names = ("input_ids", "targets", "labels")
            return {**batch, **{name: batch[name][:, own.start : own.stop + self.short] for name in names}}

        return Applied(batch=cut, tokens=share)


@dataclass
class Once:
    """A loader of one step."""

    batches: list[dict[str, Any]]

    def once(self):
        yield self.batches


def cut_in_two():
    run = tr.compose(build("llama"), [tr.Full(), Cut(), tr.Shard()], mesh=tr.mesh(shard=1, sequence=2))
    batches = [{**b, "count": 19} for b in rows(2, lengths=(12, 7))]
    ready = run.ready(batches)
    shares = [list(run.plan.tokens(n)[0]) for n in (12, 7)]
    return (
        [b["count"] for b in ready],
        shares,
        [b["input_ids"].shape[1] for b in ready],
        held_out_loss(run, Once(batches)),
    )


def test_a_row_that_is_cut_is_counted_once():
    model, expected = build("llama"), 0.0
    for batch in rows(2, lengths=(12, 7)):
        targets = with_targets(batch)["targets"]
        for start, stop in ((0, 6), (6, 12)) if targets.shape[1] == 12 else ((0, 4), (4, 7)):
            logits = model(input_ids=batch["input_ids"][:, start:stop]).logits[0].detach()
            expected += torch.nn.functional.cross_entropy(logits, targets[0, start:stop], reduction="sum").item()
    for rank, (counts, shares, lengths, loss) in enumerate(on_ranks(2, cut_in_two)):
        assert counts == [19, 19]
        assert shares == ([[0, 1, 2, 3, 4, 5], [0, 1, 2, 3]], [[6, 7, 8, 9, 10, 11], [4, 5, 6]])[rank]
        assert lengths == [len(share) for share in shares]
        assert loss == pytest.approx(expected / 19, rel=1e-5)


def wrong_share():
    run = tr.compose(build("llama"), [tr.Full(), Cut(short=1), tr.Shard()], mesh=tr.mesh(shard=1, sequence=2))
    with pytest.raises(AssertionError, match=r"cut to 6 tokens, and this rank's share is 5"):
        run.ready(rows(1))


def test_a_technique_that_cuts_otherwise_than_it_says_is_found():
    on_ranks(2, wrong_share)


def test_a_row_that_nobody_cuts_is_whole_on_each_rank():
    run = tr.compose(build("llama"), [tr.Full()])
    assert run.plan.tokens(12) == (range(12),)


@dataclass(frozen=True, kw_only=True)
class Watcher:
    """Observes what techniques before it map."""

    adds: bool = False
    trains: str = ""
    sites: list[Any] = field(default_factory=list, compare=False)
    stage: ClassVar[Stage] = Stage.OBSERVE

    def claims(self, anatomy, mesh):
        return []

    def apply(self, model, site):
        self.sites.append(site)
        if self.adds:
            model.register_parameter("seen", torch.nn.Parameter(torch.zeros(1)))
        return Applied(trainable=(self.trains,) if self.trains else ())


def test_an_observer_comes_last_and_is_given_what_was_applied_before():
    watcher = Watcher()
    adapters = [tr.LoRA(rank=4), tr.LoRA(name="two", rank=2, targets=("q_proj",))]
    run = tr.compose(build("llama"), [watcher, *adapters, tr.Recompute()])
    assert run.plan.techniques[-1] is watcher
    (site,) = watcher.sites
    q_proj = "model.layers.0.self_attn.q_proj"
    names = [f"{q_proj}.lora_{name}.{half}" for name in ("default", "two") for half in "AB"]
    assert [one.name for one in site.maps[f"{q_proj}.weight"]] == names
    train(run, [rows(2)])
    plain = tr.compose(build("llama"), [], frozen=True).model
    ids = rows(1)[0]["input_ids"]
    with site.without():
        assert torch.equal(run.model(ids, use_cache=False).logits, plain(ids, use_cache=False).logits)
    assert not torch.equal(run.model(ids, use_cache=False).logits, plain(ids, use_cache=False).logits)


def test_without_what_trains_the_plain_weights_is_refused_when_it_is_opened():
    watcher = Watcher()
    tr.compose(build("llama"), [tr.Full(), watcher])
    with pytest.raises(tr.PlanError, match="full trains weights"), watcher.sites[0].without():
        pass


@pytest.mark.parametrize("watcher", [Watcher(adds=True), Watcher(trains="lm_head.weight")], ids=["adds", "trains"])
def test_an_observer_that_adds_or_trains_a_parameter_is_refused(watcher):
    model = build("llama")
    with pytest.raises(tr.PlanError, match="watcher is of the stage OBSERVE"):
        tr.compose(model, [tr.LoRA(rank=4), watcher])


class CodesForward(ModuleForward):
    def __call__(self, x):
        return x @ (self.module.codes * self.module.step).T


@dataclass(frozen=True, kw_only=True)
class Rounded:
    """Weights of one kind, rounded to multiples of a step."""

    step: float = 0.1
    name: str = "up_proj"
    splits: list[str] = field(default_factory=list, compare=False)
    stage: ClassVar[Stage] = Stage.QUANTIZE

    def linears(self, anatomy):
        return [linear for linear in anatomy.linears if linear.fqn.endswith(self.name)]

    def claims(self, anatomy, mesh):
        return [Claim(fqn=linear.weight, aspect="storage", setting="rounded") for linear in self.linears(anatomy)]

    def split(self, own, weight, below, statistics):
        self.splits.append(own)
        return {own: (weight.read() / self.step).round()}

    def apply(self, model, site):
        parts = {}
        for linear in self.linears(site.anatomy):
            module = model.get_submodule(linear.fqn)
            codes = torch.nn.Parameter(torch.empty_like(module.weight))
            del module.weight
            module.register_parameter("codes", codes)
            module.step = self.step
            install(CodesForward(module))
            own = f"{linear.fqn}.codes"
            parts[linear.weight] = Part(
                names=(own,),
                split=partial(self.split, own),
                join=lambda tensors, below, own=own: below + tensors[own] * self.step,
                keeps_base=False,
                tolerance=None,
            )
        return Applied(parts=parts)


@dataclass(frozen=True, kw_only=True)
class Residual:
    """Looks at what is left of a weight, and trains something else."""

    seen: dict[str, Any] = field(default_factory=dict, compare=False)
    stage: ClassVar[Stage] = Stage.ADAPT

    def resolve(self, anatomy, source, statistics):
        seen = {name: (t.read().clone(), t.rows(2, 5).clone(), t) for name, t in source.tensors.items()}
        return replace(self, seen=seen)

    def claims(self, anatomy, mesh):
        return []

    def apply(self, model, site):
        return Applied(trainable=("model.norm.weight",))


@pytest.mark.parametrize("live", [False, True])
def test_what_is_chosen_on_data_sees_what_quantizing_leaves(live, tmp_path):
    model = build("llama")
    plain = {name: p.detach().clone() for name, p in model.named_parameters()}
    run = tr.compose(model if live else save("llama", tmp_path), [Residual(), Rounded()])
    seen = run.plan.techniques[1].seen
    assert set(seen) == set(plain)
    for name, weight in plain.items():
        rounded = name.endswith("up_proj.weight")
        wanted = (weight / 0.1).round() * 0.1 if rounded else weight
        whole, some, tensor = seen[name]
        assert_same(whole, wanted, 1e-6, name)
        assert_same(some, wanted[2:5], 1e-6, name)
        assert tuple(tensor.shape) == tuple(weight.shape) and tensor.stored is None
        if rounded and not live:
            assert torch.equal(tensor.original.read(), weight)


def test_what_is_reproduced_is_computed_when_asked_for():
    rounded = Rounded()
    plan = tr.plan.draft(build("llama"), [tr.OSFT(protect="weights", targets=("q_proj",)), rounded])
    assert rounded.splits == []
    tr.plan.load(plan)
    assert len(rounded.splits) == 2


def test_ranks_are_counted_on_what_is_reproduced():
    """Of a step larger than nearly all weights, next to nothing is left to keep."""
    ranks = {}
    for step in (1e-4, 1.0):
        osft = tr.OSFT(protect="weights", rank="energy", energy=0.7, targets=("up_proj",), form="one_sided")
        plan = tr.plan.draft(build("llama"), [osft, Rounded(step=step)])
        ranks[step] = plan.techniques[1].free
    plain = tr.plan.draft(
        build("llama"), [tr.OSFT(protect="weights", rank="energy", energy=0.7, targets=("up_proj",), form="one_sided")]
    )
    assert ranks[1e-4] == plain.techniques[0].free
    assert ranks[1.0] != ranks[1e-4]


def test_a_tensor_says_how_its_folder_stores_it(tmp_path):
    run = tr.compose(save("llama", tmp_path), [tr.Full()])
    assert {tensor.stored for tensor in run.plan.source.tensors.values()} == {None}
    codes = PlainTensor(name="w", shape=(4, 4), dtype=torch.uint8, reader=lambda: torch.zeros(4, 4))
    stored = StoredTensor(form=FP8(), tensors={"codes": codes, "scales": codes})
    tensor: LazyTensor = replace(codes, stored=stored)
    assert tensor.stored.form == FP8() and tensor.stored.tensors["codes"].stored is None


def test_every_variant_changes_its_technique_once_and_says_what_to_write():
    variants = [(key, v) for key, cls in TECHNIQUES.items() if hasattr(cls, "lighter") for v in cls.lighter()]
    assert {v.name for _, v in variants} >= {"a tiled loss", "recompute", "tiled blocks"}
    assert len({v.order for _, v in variants}) == len(variants)
    for key, variant in variants:
        assert isinstance(variant, Variant) and variant.config.startswith(f"{key}:")
        first = variant.of(None) or variant.of(TECHNIQUES[key]())
        assert isinstance(first, TECHNIQUES[key]) and variant.of(first) is None
        assert set(variant.replaces) <= set(TECHNIQUES)


def test_a_packed_row_is_whole_as_well():
    run = tr.compose(build("llama"), [tr.Full()])
    assert run.ready([{**packed((5, 4)), "count": 7}])[0]["input_ids"].shape[1] == 9


def test_compose_takes_the_keywords_of_draft_and_no_others():
    assert set(DraftSettings.__annotations__) < set(inspect.signature(tr.plan.draft).parameters)
    with pytest.raises(TypeError, match="sed"):
        tr.compose(build("llama"), [tr.Full()], sed=3)
