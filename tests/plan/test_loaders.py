"""What people's own loaders may hand to a run."""

import pytest

import treering as tr
from tests.toy import packed, rows
from tests.zoo import build
from treering.attention import Documents
from treering.plan.batches import steps


def test_a_label_that_reaches_over_a_border_of_documents_is_refused():
    batch = packed((3, 4, 2))
    assert next(steps([batch], 1, None))[0]["count"] == 6
    batch["labels"][0, 3] = 5
    with pytest.raises(tr.DataError, match=r"1 of 3 packed documents \(the 2\. first\)"):
        next(steps([batch], 1, None))


def test_documents_that_are_not_the_row_are_refused():
    with pytest.raises(tr.DataError, match="hold 5 tokens but the packed row has 9"):
        next(steps([packed((3, 4, 2)) | {"documents": Documents.of([3, 2])}], 1, None))


def test_a_last_step_of_fewer_micro_batches_counts_its_own_tokens():
    taken = list(steps(rows(5), 2, None))
    assert [len(step) for step in taken] == [2, 2, 1]
    for step in taken:
        assert step[0]["count"] == sum(int((b["labels"][:, 1:] != -100).sum()) for b in step)


def test_a_step_of_no_micro_batch_is_refused():
    run = tr.compose(build("llama"), [tr.Full()])
    with pytest.raises(tr.PlanError, match="accumulate is 0"):
        next(run.steps(rows(1), accumulate=0))
