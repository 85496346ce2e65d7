"""flex_attention has no backward on the CPU: what is ours, the block mask and the rules, is tested by its forward."""

import pytest
import torch

from tests.same import assert_same
from treering.attention import Documents
from treering.attention.flex import block_mask, flex
from treering.attention.reference import reference

LENGTHS = [5, 140, 1, 100]


@pytest.mark.parametrize("window", [None, 8, 200])
def test_the_block_mask_covers_exactly_the_blocks_that_hold_a_visible_pair(window):
    documents = Documents.of(LENGTHS)
    tokens = documents.tokens
    age = torch.arange(tokens)[:, None] - torch.arange(tokens)
    which = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    seen = (age >= 0) & (age < (window or tokens)) & (which[:, None] == which)
    padded = torch.nn.functional.pad(seen, (0, -tokens % 128, 0, -tokens % 128))
    blocks = padded.view(len(padded) // 128, 128, -1, 128).any(3).any(1)
    assert torch.equal(block_mask(documents, window).to_dense()[0, 0].bool(), blocks)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [None, 100])
def test_flex_equals_the_reference(window):
    draw = torch.Generator().manual_seed(0)
    documents = Documents.of(LENGTHS)
    query, key, value = (torch.randn(1, heads, documents.tokens, 16, generator=draw) for heads in (4, 2, 2))
    rule = {"scaling": 0.5, "softcap": 0.7, "window": window}
    truth = reference(query, key, value, documents, **rule)
    for _ in range(2):  # the second call finds the block mask of the first
        assert_same(flex(query[0], key[0], value[0], documents, **rule), truth[0], 1e-6)
