"""A micro-batch is cut so that every token, target and position is on exactly one rank, and documents stay apart."""

import pytest
import torch

import treering as tr
from tests.same import assert_same
from tests.toy import packed
from treering.attention import Documents
from treering.core.seeds import generator
from treering.plan.batches import with_targets
from treering.techniques.ulysses.ranks import SequenceRanks
from treering.techniques.ulysses.shares import Grid, pieces
from treering.techniques.ulysses.split_batch import split_batch

GRIDS = [Grid(heads=2), Grid(heads=3), Grid(heads=1, gathered=2), Grid(heads=1, gathered=3), Grid(heads=2, gathered=3)]


def shares(batch, grid):
    """What each rank gets."""
    return [split_batch(batch, SequenceRanks(grid=grid, rank=rank)) for rank in range(grid.ranks)]


def joined(name, batch, grid):
    """A tensor [1, T, …] put together again, and what is left over of padding."""
    tokens = batch["input_ids"].numel()
    found = {}
    for share, ranges in zip(shares(batch, grid), grid.tokens(tokens)):
        for part, piece in zip(ranges, share[name].split([len(part) for part in ranges], dim=1)):
            found[part.start] = piece
    complete = torch.cat([found[start] for start in sorted(found)], dim=1)
    return complete[:, :tokens], complete[:, tokens:]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("lengths", [(1,), (2, 1), (7, 13, 1, 4), (40,), (5,) * 6])
def test_every_token_is_on_one_rank(grid, lengths):
    batch = with_targets(packed(lengths)) | {"weights": torch.rand(1, sum(lengths), 3), "count": 5, "samples": ["a"]}
    for name in ("input_ids", "targets", "position_ids", "weights"):
        complete, padding = joined(name, batch, grid)
        assert torch.equal(complete, batch[name])
        if name == "targets":
            assert (padding == -100).all()
    for share in shares(batch, grid):
        documents = share["documents"]
        assert documents.tokens == share["input_ids"].shape[1] > 0
        assert sum(documents.inside.lengths) == grid.padded(sum(lengths))
        assert documents.inside.lengths[: len(lengths)] == lengths
        assert "labels" not in share and share["count"] == 5 and share["samples"] == ["a"]


@pytest.mark.parametrize("grid", GRIDS)
def test_rows_become_documents(grid):
    ids = torch.randint(3, 100, (3, 5), generator=generator(0, "rows"))
    batch = with_targets({"input_ids": ids, "labels": ids})
    complete, _ = joined("input_ids", batch, grid)
    assert torch.equal(complete.view(3, 5), ids)
    complete, _ = joined("targets", batch, grid)
    assert torch.equal(complete.view(3, 5), batch["targets"])
    complete, _ = joined("position_ids", batch, grid)
    assert torch.equal(complete.view(3, 5), torch.arange(5).expand(3, 5))
    assert {share["documents"].inside.lengths[:3] for share in shares(batch, grid)} == {(5, 5, 5)}


def masked(*rows):
    mask = torch.tensor(rows)
    ids = torch.arange(mask.numel()).view_as(mask)
    targets = torch.full_like(ids, -100)
    return {"input_ids": ids, "targets": targets, "attention_mask": mask}


def test_padding_at_either_end_is_a_document_of_its_own():
    batch = masked([1, 1, 1, 0], [0, 0, 1, 1], [0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0])
    with pytest.raises(tr.DataError, match="row 1 is padded on the left and the batch has no position_ids"):
        shares(batch, Grid(heads=2))
    batch["position_ids"] = torch.arange(4).expand(5, 4)
    [share, _] = shares(batch, Grid(heads=2))
    assert share["documents"].inside.lengths == (3, 1, 2, 2, 1, 2, 1, 4, 4)
    assert "attention_mask" not in share


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_mask": torch.tensor([[1, 0, 1, 1]])}, "gap between tokens"),
        ({"attention_mask": torch.ones(1, 1, 4, 4)}, "may only separate padding from tokens"),
        (
            {"targets": torch.tensor([[-100, -100, -100, 7]])},
            "row 0 trains 1 tokens that attention_mask takes for padd",
        ),
        ({"documents": Documents.of([4])}, "packed rows have no padding: leave it out"),
    ],
)
def test_a_mask_that_is_more_than_padding_is_refused(change, message):
    with pytest.raises(tr.DataError, match=message):
        shares(masked([1, 1, 1, 0]) | change, Grid(heads=2))


def test_positions_of_several_kinds_are_cut_alike():
    """Three positions for each token, as models of images have them."""
    positions = torch.arange(30).view(3, 1, 10)
    batch = with_targets(packed((6, 4))) | {"position_ids": positions}
    found = [share["position_ids"] for share in shares(batch, Grid(heads=3))]
    assert_same(torch.cat(found, dim=2), positions)


def test_documents_of_a_share():
    assert pieces((5, 3, 9), (range(2, 6), range(12, 17))) == (3, 1, 5)
    assert pieces((4, 4), (range(4),)) == (4,)
