"""A measurement counts every token once, on every mesh, and is that of one process."""

import pytest
import torch

import treering as tr
from tests.curvature.texts import documents, packed, rows, silent
from tests.cut_rows import CutRows
from tests.ranks import on_ranks
from tests.same import assert_same
from tests.zoo import build
from treering.core.topology import data_rank

MESHES = [
    {"shard": 2},
    {"replicate": 2, "shard": 1},
    {"shard": 1, "sequence": 2},
    {"shard": 2, "sequence": 2},
    {"replicate": 2, "shard": 2},
]
LENGTHS = (12, 7, 5, 9, 3, 4)


def batches(form):
    """Three batches of two documents each; the loss of the first is taken at some of its tokens only."""
    pairs = [documents(LENGTHS[i : i + 2], seed=i) for i in (0, 2, 4)]
    batches = [rows(pair) if form == "rows" else packed(pair) for pair in pairs]
    for batch, pair in zip(batches, pairs):
        batch["labels"] = batch["input_ids"].clone()
        batch["labels"][:, [0, 1, 2, *([len(pair[0])] if form == "packed" else [])]] = -100
    return batches


def measured(sizes, arch, form, how, tokens, memory_limit):
    mesh = tr.mesh(**sizes) if sizes else None
    cut = [CutRows(how=how)] if sizes.get("sequence") else []
    run = tr.compose(build(arch), [tr.Full(), *([tr.Shard()] if sizes else []), *cut], mesh=mesh)
    rank, ranks = data_rank(mesh)
    given = batches(form)
    most = -(-len(given) // ranks)
    own = given[rank::ranks]
    own += [silent() | {"labels": torch.full((1, 2), -100)}] * (most - len(own))
    statistics = tr.measure(run, own, tokens=tokens, memory_limit=memory_limit)
    return {weight: dict(statistics[weight]) for weight in statistics}, statistics.rings[0].tokens, statistics.digest


def compare(sizes, arch="llama", form="packed", how="documents", tokens="real", memory_limit=None):
    wanted, count, digest = measured({}, arch, form, how, tokens, None)
    for got, counted, digest_there in on_ranks(
        torch.Size(sizes.values()).numel(), measured, sizes, arch, form, how, tokens, memory_limit
    ):
        assert counted == count and list(got) == list(wanted)
        for weight, values in wanted.items():
            assert torch.equal(got[weight]["tokens"], values["tokens"]), weight
            assert_same(got[weight]["inputs"], values["inputs"], 1e-6, weight)
        if sizes.get("sequence", 1) == 1:  # each rank has documents of its own: every bit is the same
            assert digest_there == digest


@pytest.mark.parametrize("arch", ["llama", "mixtral"])
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_every_mesh_measures_what_one_process_does(sizes, arch):
    compare(sizes, arch)


@pytest.mark.parametrize("ranks", [3, 4])
def test_a_measurement_has_the_same_bits_on_any_number_of_ranks(ranks):
    compare({"shard": ranks}, memory_limit=3 * 8 * 32 * 32)


@pytest.mark.parametrize("form, how", [("packed", "copies"), ("rows", "copies"), ("packed", "targets")])
def test_ranks_that_see_the_same_tokens_count_them_once(form, how):
    compare({"shard": 1, "sequence": 2}, form=form, how=how)


@pytest.mark.parametrize("memory_limit", [None, 3 * 8 * 32 * 32])
def test_the_tokens_that_predict_a_trained_one_are_cut_with_their_row(memory_limit):
    compare({"shard": 1, "sequence": 2}, tokens="trained", memory_limit=memory_limit)


class Shortened(CutRows):
    """Drops the last token of each row on every rank."""

    def apply(self, model, site):
        def batch(batch):
            return {name: value[:, :-1] if hasattr(value, "ndim") else value for name, value in batch.items()}

        return tr.technique.Applied(batch=batch)


def shortened():
    run = tr.compose(build("llama"), [tr.Full(), tr.Shard(), Shortened(how="copies")], mesh=tr.mesh(sequence=2))
    with pytest.raises(tr.PlanError, match=r"12 tokens to be measured.* 22 together"):
        tr.measure(run, [{"input_ids": documents()[0][None]}])


def test_a_technique_that_loses_tokens_on_its_way_is_refused():
    on_ranks(2, shortened)
