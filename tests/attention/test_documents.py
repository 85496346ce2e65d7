import dataclasses

import pytest
import torch

from treering.attention import Documents
from treering.core.errors import DataError


def test_documents_know_their_borders_and_the_longest():
    documents = Documents.of([3, 1, 4])
    assert documents.cu_seqlens.tolist() == [0, 3, 4, 8]
    assert documents.cu_seqlens.dtype == torch.int32
    assert (documents.lengths, documents.longest, documents.tokens) == ((3, 1, 4), 4, 8)


def test_documents_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Documents.of([3]).longest = 4


@pytest.mark.parametrize("lengths", [[], [3, 0], [-1]])
def test_a_document_without_tokens_is_refused(lengths):
    with pytest.raises(DataError, match="each at least 1"):
        Documents.of(lengths)


def test_a_row_of_another_length_is_refused_with_both_numbers():
    with pytest.raises(DataError, match=r"hold 8 tokens but the packed row has 9"):
        Documents.of([3, 1, 4]).check(9)
    Documents.of([3, 1, 4]).check(8)


def test_a_long_list_of_lengths_is_shortened_in_messages():
    with pytest.raises(DataError, match=r"1, 1, … 50 in all"):
        Documents.of([1] * 50).check(9)


def test_documents_move_with_their_lengths():
    there = Documents.of([3, 1]).to("meta")
    assert there.cu_seqlens.device.type == "meta"
    assert there.lengths == (3, 1)
    here = Documents.of([3, 1])
    assert here.to("cpu") is here
