"""A measurement is the same whoever makes it: packed or in rows, on one rank or two, in one pass or many."""

import pytest
import torch

import treering as tr
from tests.curvature.texts import documents, packed, rows, silent
from tests.ranks import on_ranks
from tests.same import assert_same
from tests.zoo import build, save
from treering.anatomy import examine
from treering.curvature import Ring
from treering.curvature.observe import observe
from treering.curvature.reference import moments

PARTS = (documents((12, 7, 5)), documents((9, 3), seed=1))  # what each of two ranks has


def composed(name, ranks=1):
    return tr.compose(build(name), [tr.Full(), *([tr.Shard()] if ranks > 1 else [])])


def same(found, wanted, tolerance=1e-6):
    assert list(found) == list(wanted)
    for weight in wanted:
        assert_same(found[weight]["inputs"], wanted[weight]["inputs"], tolerance, weight)
        assert torch.equal(found[weight]["tokens"], wanted[weight]["tokens"]), weight
    assert [r.tokens for r in found.rings] == [r.tokens for r in wanted.rings]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gpt_oss"])
def test_packed_rows_padded_rows_and_single_rows_give_the_same(name):
    given = [*PARTS[0], *PARTS[1]]
    one_by_one = tr.measure(build(name), [{"input_ids": d[None]} for d in given])
    same(tr.measure(build(name), [rows(given)]), one_by_one)
    run = composed(name)
    same(tr.measure(run, [rows(given[:2]), rows(given[2:])]), one_by_one)
    if run.plan.unpackable is None:
        same(tr.measure(run, [packed(given)]), one_by_one)


@pytest.mark.parametrize("how", [{}, {"tokens": "trained"}], ids=str)
def test_a_measurement_of_padding_alone_is_refused(how, tmp_path):
    ids = torch.randint(3, 128, (2, 9))
    nothing = {"input_ids": ids, "attention_mask": torch.zeros_like(ids), "labels": torch.full_like(ids, -100)}
    with pytest.raises(tr.DataError, match=r"no token of the batches .* nothing to measure"):
        tr.measure(build("llama"), [nothing, nothing], to=tmp_path / "m", **how)
    assert not (tmp_path / "m").exists()
    model = build("llama")
    for batches in ([], [nothing]):
        with observe(model, examine(model)) as seen:
            for batch in batches:
                model(input_ids=ids, attention_mask=batch["attention_mask"])
        with pytest.raises(tr.DataError, match="no token was seen"):
            seen.statistics()


def with_padding_on_one(name):
    ids = torch.randint(3, 128, (1, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.full_like(ids, torch.distributed.get_rank())
    return tr.measure(composed(name, ranks=2), [{"input_ids": ids, "attention_mask": mask}]).rings[0].tokens


def test_one_rank_may_have_padding_alone():
    assert on_ranks(2, with_padding_on_one, "llama") == [9, 9]


def on_two(folder, name, form, memory_limit):
    run = composed(name, ranks=2)
    rank = torch.distributed.get_rank()
    own = PARTS[rank]
    batches = [rows(own)] if form == "rows" else [packed(own[:1]), packed(own[1:])]
    if form == "packed" and rank == 1:
        batches = [packed(own), silent()]
    ring = Ring(name="old text", tokens=0, data="d", date="2026-01-01")
    made = tr.measure(run, batches, to=folder, ring=ring, memory_limit=memory_limit)
    kept = tr.measure(run, batches, ring=ring, memory_limit=memory_limit)
    assert kept.digest == made.digest and kept.rings == made.rings
    run.trainable()  # sharded again
    return {w: dict(made[w]) for w in made}, made.rings[0].tokens, len(made.tensors)


@pytest.mark.parametrize("name, form", [("llama", "packed"), ("llama", "rows"), ("mixtral", "packed")])
def test_two_sharded_ranks_measure_what_one_does(tmp_path, name, form):
    wanted = tr.measure(build(name), [{"input_ids": d[None]} for part in PARTS for d in part])
    for found, tokens, tensors in on_ranks(2, on_two, tmp_path / "measured", name, form, None):
        assert tokens == wanted.rings[0].tokens and tensors == len(wanted.tensors)
        for weight in wanted:
            assert_same(found[weight]["inputs"], wanted[weight]["inputs"], 1e-6, weight)
            assert torch.equal(found[weight]["tokens"], wanted[weight]["tokens"])


def test_several_passes_on_two_ranks_write_the_same_folder(tmp_path):
    wanted = tr.measure(build("mixtral"), [{"input_ids": d[None]} for part in PARTS for d in part])
    memory_limit = 2 * 4 * 32 * 32
    for found, tokens, tensors in on_ranks(2, on_two, tmp_path / "measured", "mixtral", "rows", memory_limit):
        assert tokens == wanted.rings[0].tokens and tensors == len(wanted.tensors)
        for weight in wanted:
            assert_same(found[weight]["inputs"], wanted[weight]["inputs"], 1e-6, weight)


def test_passes_are_as_many_as_memory_asks_for():
    model, batches = build("llama"), [rows(documents()), rows(documents((4, 2)))]
    told = []
    whole = tr.measure(model, batches, progress=lambda *at: told.append(at))
    assert told == [(1, 2), (2, 2)]
    told.clear()
    some = tr.measure(model, batches, memory_limit=3 * 8 * 32 * 32, progress=lambda *at: told.append(at))
    same(some, whole, 0)
    assert some.digest == whole.digest
    assert told[-1] == (8, 8)  # a layer: three inputs of width 32 and one of 48 do not fit with them


def test_dropout_and_gradients_are_off_and_modes_come_back():
    model = build("llama")
    model.model.layers[0].self_attn.attention_dropout = 0.5
    model.train()
    model.model.layers[1].eval()
    first, second = (tr.measure(model, [rows(documents())]).digest for _ in range(2))
    assert first == second
    assert model.training and not model.model.layers[1].training


def test_only_positions_that_predict_a_trained_token_if_asked():
    model = build("llama")
    ids = documents()[0][None]
    labels = ids.clone()
    labels[:, :5] = -100
    wanted = tr.measure(
        model, [{"input_ids": ids, "real": torch.arange(12)[None].ge(4) & torch.arange(12)[None].lt(11)}]
    )
    found = tr.measure(model, [{"input_ids": ids, "labels": labels}], tokens="trained")
    assert found.digest == wanted.digest and found.rings[0].tokens == 7


def test_rows_that_do_not_tell_their_padding_are_refused():
    with pytest.raises(tr.DataError, match="attention_mask"):
        tr.measure(build("llama"), [{"input_ids": rows(documents())["input_ids"]}])
    with pytest.raises(tr.DataError, match="no batch"):
        tr.measure(build("llama"), [])


def test_a_run_with_adapters_is_measured_with_them_by_plain_names():
    run = tr.compose(build("llama"), [tr.LoRA(rank=2, alpha=4)])
    plain = tr.measure(build("llama"), [packed(documents()[:1]) | {"documents": None}])
    same(tr.measure(run, [packed(documents()[:1])]), plain)
    with torch.no_grad():
        for name, parameter in run.trainable():
            parameter.add_(0.3 if "lora_B" in name else 0.0)
    merged = build("llama")
    merged.load_state_dict(dict(run.plain()), strict=False)
    wanted, _ = moments(merged, examine(merged), documents()[:1])
    found = tr.measure(run, [packed(documents()[:1])])
    for weight, moment in wanted.items():
        assert_same(found[weight]["inputs"], moment, 1e-5, weight)


def test_statistics_go_into_compose_and_must_fit(tmp_path):
    folder = save("llama", tmp_path / "model")
    measured = tr.measure(build("llama"), [rows(documents())])
    tr.compose(folder, [tr.Full()], statistics=measured)
    with pytest.raises(tr.CheckpointError, match="another model"):
        tr.compose(save("gpt2", tmp_path / "other"), [tr.Full()], statistics=measured)
