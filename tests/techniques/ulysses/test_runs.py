"""Runs with ranks that share rows: what a loop of one's own may do wrong, other models, refusals, and teachers."""

import re

import pytest
import torch
import torch.distributed as dist
import transformers as hf

import treering as tr
from tests.ranks import on_ranks
from tests.same import assert_all_same, assert_same
from tests.toy import packed, rows, train, weights
from tests.zoo import build, randomise
from treering.attention import Documents
from treering.core.topology import data_rank

SIZES = {"shard": 1, "sequence": 2}


def composed(*techniques, arch="llama", sizes=SIZES, **settings):
    return tr.compose(build(arch), [*techniques, tr.Ulysses(), tr.Shard()], mesh=tr.mesh(**sizes), **settings)


def other_tokens(change):
    """Rank 1 is given something else than rank 0."""
    run, given = composed(tr.Full()), [[packed((7, 5))], [packed((9, 3))]]
    if dist.get_rank() == 1:
        given = change(given)
    with pytest.raises(tr.DataError) as refused:
        for batches in run.steps(given):
            for batch in batches:
                run.loss(batch).backward()
    return str(refused.value)


def another_row(given):
    return [[packed((7, 5), seed=4)], *given[1:]]


def other_documents(given):
    return [[given[0][0] | {"documents": Documents.of([12])}], *given[1:]]


def one_more_micro_batch(given):
    return [[*given[0], packed((4,))], *given[1:]]


def no_second_step(given):
    return given[:1]


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (another_row, "1 micro-batch with the digest"),
        (other_documents, "1 micro-batch with the digest"),
        (one_more_micro_batch, "2 micro-batches with the digest"),
        (no_second_step, "rank 1 has no more data"),
    ],
)
def test_ranks_with_other_batches_are_named_on_every_rank(change, found):
    for message in on_ranks(2, other_tokens, change):
        assert "ranks 0, 1 of the mesh's `sequence` axis" in message
        assert found in message and "data_rank(mesh)" in message


def one_rank_cannot(change, sizes):
    """A rank with a step that it cannot use raises its own error, and all others of the mesh one that says so."""
    run = composed(tr.Full(), sizes=sizes)
    batch = packed((7, 5))
    last = dist.get_rank() == dist.get_world_size() - 1
    with pytest.raises(tr.DataError) as refused:
        for batches in run.steps([[change(batch) if last else batch]]):
            run.loss(batches[0]).backward()
    return str(refused.value)


def first_token_trained(batch):
    return batch | {"labels": batch["input_ids"].clone()}


def other_ids(batch):
    return batch | {"input_ids": batch["input_ids"].flip(1)}


@pytest.mark.parametrize("sizes", [SIZES, {"shard": 2, "sequence": 2}])
@pytest.mark.parametrize(
    ("change", "own"), [(first_token_trained, "have a label at their first token"), (other_ids, "with the digest")]
)
def test_no_rank_of_the_mesh_waits_for_one_that_cannot_go_on(sizes, change, own):
    *others, last = on_ranks(2 * sizes["shard"], one_rank_cannot, change, sizes)
    assert own in last
    for message in others:
        assert re.search(r"cannot be used; its message says why|another part of the mesh|with the digest", message)


def left_padded():
    ids = torch.arange(3, 14)[None]
    mask = (torch.arange(11) > 2).long()[None]
    batch = {"input_ids": ids, "labels": ids.masked_fill(torch.arange(11) < 4, -100), "attention_mask": mask}
    run = composed(tr.Full())
    with pytest.raises(tr.DataError, match="padded on the left"):
        run.ready([batch | {"count": 7}])
    mask = mask.bfloat16()
    run.ready([batch | {"count": 7, "attention_mask": mask, "position_ids": torch.arange(11)[None]}])


def test_positions_of_rows_that_are_padded_on_the_left_are_not_guessed():
    on_ranks(2, left_padded)


def mixed():
    """Queries and values of different dtypes are one message, and keep their own."""
    from treering.techniques.ulysses.ranks import SequenceRanks

    documents = SequenceRanks.of_group(dist.group.WORLD).documents([8], "cpu")
    seen = []

    def attend(q, k, v, s):
        seen.extend((q.dtype, k.dtype, v.dtype))
        return v.repeat_interleave(2, 1)

    q, k, v = torch.randn(1, 4, 4, 8).bfloat16(), torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 8)
    out = documents.exchange.around(attend, q, k, v, None)
    assert seen == [torch.bfloat16, torch.float32, torch.float32]
    assert torch.equal(out, v.repeat_interleave(2, 1))


def test_dtypes_of_query_and_value_are_kept():
    on_ranks(2, mixed)


def left_alone():
    """A second model computes the same bits before, while and after another one shares its rows."""
    ids = torch.arange(3, 24)[None]
    other = build("llama", seed=3, attention="sdpa")
    before = other(ids).logits
    run = composed(tr.Full())
    for batches in run.steps([[packed((7, 5))]]):
        run.loss(batches[0]).backward()
    assert_same(other(ids).logits, before)
    run.undo()
    assert_same(other(ids).logits, before)


def test_another_model_of_the_process_computes_the_same_bits():
    on_ranks(2, left_alone)


def generated():
    """Without documents each rank computes alone: a cache, and greedy continuations."""
    run, plain = composed(tr.Full()), build("llama", attention="sdpa")
    ids = torch.arange(3, 9)[None]
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    run.model.eval()
    wanted = plain.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    assert torch.equal(run.model.generate(ids, attention_mask=torch.ones_like(ids), **settings), wanted)


def test_a_model_that_shares_rows_generates_as_it_did():
    on_ranks(2, generated)


def uncut():
    """A loop of one's own that forgets run.ready would count each gradient once for each rank."""
    run, batch = composed(tr.Full()), packed((7, 5))
    given = {name: batch[name] for name in ("input_ids", "position_ids", "documents")}
    for attempt in (
        lambda: run.loss(batch | {"count": 10}),
        lambda: run.model(**given, use_cache=False),
        lambda: run.model(input_ids=batch["input_ids"], use_cache=False),
    ):
        with pytest.raises(tr.PlanError, match=r"pass them through run\.ready"):
            attempt()
    with torch.no_grad():
        assert run.model(**given, use_cache=False).logits.shape[1] == 12
        with pytest.raises(tr.PlanError, match="would count once for each"):
            run.loss(batch | {"count": 10})
    run.undo()
    run.model(**given, use_cache=False)
    with pytest.raises(tr.PlanError, match=r"run\.undo\(\) has removed"):
        run.ready([batch | {"count": 10}])
    tiled = composed(tr.Full(), tr.TiledLoss(tile=3))
    with pytest.raises(tr.PlanError, match=r"pass them through run\.ready"):
        tiled.model.base_model(**given, use_cache=False)
    with pytest.raises(tr.PlanError, match=r"pass them through run\.ready"):
        tiled.loss(batch | {"count": 10})


def test_a_batch_that_is_not_cut_has_no_gradient():
    on_ranks(2, uncut)


def refusal(technique, sizes):
    with pytest.raises(tr.PlanError) as refused:
        tr.compose(build("llama"), [tr.Full(), technique, tr.Shard()], mesh=tr.mesh(**sizes))
    return str(refused.value)


def test_rows_and_columns_need_a_number_that_has_them():
    for message in on_ranks(2, refusal, tr.Ulysses(layout="2d"), SIZES):
        assert "2 ranks of the axis `sequence` are no rows and columns; write heads, gathered or auto" in message


STRANGERS = {
    "falcon_h1": (hf.FalconH1Config, {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8}, "hybrid"),
    "lfm2": (hf.Lfm2Config, {"layer_types": ["conv", "full_attention"]}, "kind conv"),
    "mamba": (hf.MambaConfig, {"state_size": 8}, "Mamba"),
    "bloom": (hf.BloomConfig, {"n_head": 4, "num_key_value_heads": 4}, "computes its attention itself"),
    "qwen3_next": (hf.Qwen3NextConfig, {"layer_types": ["linear_attention", "full_attention"]}, "linear_attention"),
}


def strangers():
    """Models in which tokens meet otherwise than by the attention that is exchanged."""
    mesh, messages = tr.mesh(**SIZES), {}
    sizes = {
        "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }  # fmt: skip
    for name, (kind, settings, _) in STRANGERS.items():
        with torch.device("meta"):
            model = hf.AutoModelForCausalLM.from_config(kind(**(sizes | settings)))
        try:
            tr.compose(model, [tr.Full(), tr.Ulysses(), tr.Shard()], mesh=mesh)
        except tr.PlanError as error:
            messages[name] = str(error)
    return messages


def test_models_in_which_tokens_meet_otherwise_are_refused_by_layer():
    for messages in on_ranks(2, strangers):
        assert messages.keys() == STRANGERS.keys()
        for name, (_, _, found) in STRANGERS.items():
            assert found in messages[name], f"{name}: {messages[name]}"


def trained(sizes, kind, dtype):
    """Losses and weights of three steps with unequal numbers of tokens, accumulated; one row has fewer tokens than
    there are ranks, and some micro-batches train nothing."""
    mesh = tr.mesh(**sizes) if sizes else None
    techniques = [tr.Full(), tr.Ulysses(), *([tr.Shard()] if sizes else [])]
    run = tr.compose(build("qwen3", dtype=dtype), techniques, mesh=mesh)
    rank, ranks = data_rank(mesh)
    nothing = packed((6,), seed=9)
    nothing["labels"][:] = -100
    steps = [
        [packed((7, 3, 2)), *rows(1, lengths=(2,)), *rows(2, lengths=(9, 12)), nothing, packed((1, 1, 1, 5), seed=2)],
        [*rows(3, lengths=(5, 12, 3), seed=1), packed((19,), seed=3)],
        [packed((4, 4), seed=5), packed((2, 9), seed=6)],
    ]
    losses = train(run, [step[rank::ranks] for step in steps], kind, lr=0.5 if kind is torch.optim.SGD else 1e-2)
    losses = [float(run.total(torch.tensor(loss, dtype=torch.float64))) for loss in losses]
    return losses, weights(run)


MESHES = [SIZES, {"shard": 1, "sequence": 3}, {"shard": 2, "sequence": 2}]


@pytest.mark.parametrize("sizes", MESHES)
@pytest.mark.parametrize(
    ("kind", "dtype", "tolerance"),
    [(torch.optim.SGD, torch.float32, 1e-6), (torch.optim.AdamW, torch.float64, 1e-10)],
)
def test_any_number_of_ranks_trains_the_same(sizes, kind, dtype, tolerance):
    losses, wanted = trained({}, kind, dtype)
    for found, parameters in on_ranks(sizes["shard"] * sizes["sequence"], trained, sizes, kind, dtype):
        assert found == pytest.approx(losses, rel=1e-6)
        assert_all_same(parameters, wanted, tolerance)


def taught(sizes, folder, teacher):
    mesh = tr.mesh(**sizes) if sizes else None
    objective = tr.Distill(teacher=teacher, temperature=2.0, mix=0.25)
    techniques = [tr.LoRA(rank=4), tr.TiledLoss(tile=3), tr.Ulysses(), *([tr.Shard()] if sizes else [])]
    run = tr.compose(build("qwen3"), techniques, mesh=mesh, prepared=folder, objective=objective)
    rank, ranks = data_rank(mesh)
    steps = [[packed((7, 3, 2)), packed((9, 4), seed=1)][rank::ranks]] * 2
    losses = train(run, steps, lr=0.5)
    return [float(run.total(torch.tensor(loss))) for loss in losses], weights(run)


def roped_teacher(folder):
    config = hf.LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=16,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    )  # fmt: skip
    model = hf.AutoModelForCausalLM.from_config(config)
    randomise(model, 5)
    model.save_pretrained(folder)


def taught_long(sizes, folder):
    mesh = tr.mesh(**sizes) if sizes else None
    techniques = [tr.Full(), tr.Ulysses(), *([tr.Shard()] if sizes else [])]
    objective = tr.Distill(teacher=str(folder / "roped"))
    run = tr.compose(build("qwen3"), techniques, mesh=mesh, prepared=folder, objective=objective)
    [ready] = run.steps([[packed((37,))]])
    return float(run.total(run.loss(ready[0])))


def test_a_teacher_whose_frequencies_depend_on_the_longest_position_sees_it(tmp_path):
    roped_teacher(tmp_path / "roped")
    wanted = taught_long({}, tmp_path)
    for found in on_ranks(2, taught_long, SIZES, tmp_path):
        assert found == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("base", [False, True])
def test_a_teacher_is_given_the_same_shares(base, tmp_path):
    teacher = "base" if base else str(tmp_path / "teacher")
    # another number of heads than the student has
    build("llama", seed=5).save_pretrained(tmp_path / "teacher")
    losses, wanted = taught({}, tmp_path, teacher)
    for found, parameters in on_ranks(2, taught, SIZES, tmp_path, teacher):
        assert found == pytest.approx(losses, rel=1e-5)
        assert_all_same(parameters, wanted, 2e-6)
