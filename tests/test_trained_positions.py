"""Trained positions are found with the batch, on the host: no forward waits for a device to report them."""

import pytest
import torch
from torch.nn.functional import pad

import treering as tr
from tests.same import assert_same
from tests.techniques.tiling.test_losses import Watched
from tests.toy import packed, rows
from tests.zoo import build
from treering.objectives import IGNORED, INPUTS
from treering.objectives.trained import TRAINED, find_trained, trained_positions

HEADS = {"plain": [], "tiled": [tr.TiledLoss(tile=5)]}


def two_rows():
    long, short = rows(2, lengths=(12, 9))
    return {
        "input_ids": torch.cat([long["input_ids"], pad(short["input_ids"], (0, 3))]),
        "labels": torch.cat([long["labels"], pad(short["labels"], (0, 3), value=IGNORED)]),
    }


def every():
    ids = torch.arange(3, 23).view(2, 10)
    return {"input_ids": ids, "labels": ids}


BATCHES = {"one row": lambda: rows(1)[0], "two rows": two_rows, "packed": lambda: packed((5, 7)), "all": every}


def ready(head, batch, count=None):
    run = tr.compose(build("llama", dtype=torch.float64), [tr.Full(), *HEADS[head]])
    (one,) = next(iter(run.steps([[batch | ({} if count is None else {"count": count})]])))
    return run, one


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", BATCHES)
def test_a_forward_waits_for_nothing(head, kind):
    run, one = ready(head, BATCHES[kind]())
    run.loss(one)  # a tile's first call is checked
    with Watched() as of_model:  # transformers looks at positions itself
        run.model(**{key: one[key] for key in INPUTS if key in one}, use_cache=False)
    with Watched() as seen:
        with_positions = run.loss(one)
    assert seen.waits == of_model.waits
    with Watched() as seen:
        without = run.loss({key: value for key, value in one.items() if key != TRAINED})
    assert len(seen.waits) > len(of_model.waits), "this would see it"
    assert torch.equal(with_positions, without)


@pytest.mark.parametrize("head", HEADS)
def test_other_targets_have_other_positions(head):
    run, one = ready(head, rows(1)[0])
    fewer = one["targets"].clone()
    fewer[:, :6] = IGNORED
    found = run.loss({**one, "targets": fewer})
    _, other = ready(
        head, {"input_ids": one["input_ids"], "labels": pad(fewer[:, :-1], (1, 0), value=IGNORED)}, one["count"]
    )
    assert_same(found, run.loss(other), 1e-12)
    assert trained_positions({**one, "targets": fewer}).number == int((fewer != IGNORED).sum())


def test_positions_are_those_of_the_targets():
    targets = torch.tensor([[7, IGNORED, 5, IGNORED], [IGNORED, IGNORED, 6, IGNORED]])
    found = find_trained(targets)
    assert found.rows(targets).tolist() == [7, 5, 6] and found.number == 3
    assert found.columns_K.tolist() == [0, 2] and found.kept_N.tolist() == [0, 1, 3]
    nothing = find_trained(torch.full((1, 4), IGNORED))
    assert nothing.number == 0 and nothing.rows(targets[:1]).numel() == 0
    full = find_trained(torch.tensor([[3, 4, IGNORED]]))
    assert full.index_N is None and full.rows(torch.tensor([[3, 4, IGNORED]])).tolist() == [3, 4]
