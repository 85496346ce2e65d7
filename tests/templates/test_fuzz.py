"""The checks of `make test-templates` on the short templates of the tests, and that they notice what they look for."""

import collections

import pytest

from tests.data.conftest import backend, tokenizers  # noqa: F401 — fixtures
from tests.data.data_templates import TEMPLATES
from tests.templates.oracle import Difference, Oracle


@pytest.mark.parametrize("name", TEMPLATES)
def test_random_conversations_are_encoded_as_transformers_does_and_trained_where_the_assistant_speaks(
    tokenizers,  # noqa: F811
    name,
):
    oracle = Oracle(tokenizers[name], strict=True)
    outcomes = collections.Counter(oracle.check(seed) == "ok" for seed in range(120))
    assert outcomes[True] > 20


def test_the_checks_notice_a_mask_that_is_too_wide_and_one_that_is_too_narrow(tokenizers):  # noqa: F811
    oracle = Oracle(tokenizers["chatml"], strict=True)
    encode = oracle.encoder.encode
    for start, value in ((0, True), (-12, False)):

        def wrong(samples, start=start, value=value):
            (documents,) = encode(samples)
            for document in documents if isinstance(documents, list) else ():
                document.mask[start:] = value
            return [documents]

        oracle.encoder.encode = wrong
        with pytest.raises(Difference):
            for seed in range(1, 8):
                oracle.check(seed)


def test_the_checks_notice_other_tokens(tokenizers):  # noqa: F811
    oracle = Oracle(tokenizers["chatml"], strict=True)
    encode = oracle.encoder.encode

    def wrong(samples):
        (documents,) = encode(samples)
        for document in documents if isinstance(documents, list) else ():
            document.ids[-1] = oracle.tokenizer.eos_token_id
        return [documents]

    oracle.encoder.encode = wrong
    with pytest.raises(Difference):
        for seed in range(1, 8):
            oracle.check(seed)
