"""Shares of tokens, what of a long text is shown, and text of the data in HTML."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from treering.influence.shade import html, shade, token_texts


def test_shares_add_up_and_levels_follow_them():
    shaded = shade(list("abcd"), np.array([4.0, -2.0, 0.0, 0.4]))
    assert sum(abs(token.share) for token in shaded.tokens) == pytest.approx(1.0)
    assert [token.level for token in shaded.tokens] == [5, -2, 0, 0] and shaded.largest == 4 / 6.4
    assert (shaded.shown, shaded.total, shaded.covered) == (4, 4, pytest.approx(1.0))
    assert shaded.legend == "blue: helpful, orange: harmful; the darkest has 62.5% of the score"


def test_scores_of_0_and_texts_without_tokens_have_no_shade():
    assert [token.level for token in shade(list("ab"), np.zeros(2)).tokens] == [0, 0]
    assert shade([], np.zeros(0)).tokens == () and html(shade([], np.zeros(0)))


def test_of_a_long_text_the_parts_with_the_largest_shares_are_shown():
    scores = np.full(1000, 0.001)
    scores[[300, 305, 990]] = [3.0, -2.0, 5.0]
    shaded = shade([f"<{i}>" for i in range(1000)], scores, most=30)
    texts = [token.text or token.left_out for token in shaded.tokens]
    assert texts[0] == 294 and texts[1:19] == [f"<{i}>" for i in range(294, 312)]
    assert texts[19] == 984 - 312 and texts[-1] == 3 and sum(t for t in texts if isinstance(t, int)) == 1000 - 31
    assert shaded.shown == 31 and shaded.covered > 0.9
    assert re.search(r"shown: 31 of 1,000 tokens, which have 9\d% of the score$", shaded.legend)
    assert "… 294 tokens …" in html(shaded)


class Texts(HTMLParser):
    """Collects the tags and texts of a document."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        assert not {name for name, _ in attributes} - {"style", "title"}

    def handle_data(self, data):
        self.text += data


def test_text_of_the_data_is_no_html():
    hostile = ["<script>alert(1)</script>", "&amp;", "\"' onload=x", "\x1b[2J", "\u202e", "line\nbreak"]
    parser = Texts()
    page = html(shade(hostile, np.array([1.0, -1, 1, -1, 1, 0])), title="<b>x.jsonl:1\x00")
    parser.feed(page)
    assert set(parser.tags) == {"section", "h4", "div", "span", "p"} and "url(" not in page and "http" not in page
    assert parser.text.startswith("<b>x.jsonl:1\\x00")
    assert "".join(hostile[:3]) + "\\x1b[2J\\u202eline\nbreak" in parser.text


def test_texts_and_scores_must_fit():
    with pytest.raises(ValueError, match="2 texts and 3 scores"):
        shade(["a", "b"], np.zeros(3))


def tokenizer(decoder) -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*letters, "▁the", "▁cat"])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_characters_of_several_tokens_are_shown_once():
    bytes_alone = tokenizer(decoders.ByteLevel())
    text = "aé🌲 z"
    ids = bytes_alone.encode(text)
    texts = token_texts(bytes_alone, ids)
    assert texts == ["a", "é", "", "🌲", "", "", "", " ", "z"] and len(texts) == len(ids)
    assert token_texts(bytes_alone, ids[:2])[1] == "\ufffd" and token_texts(bytes_alone, []) == []


def test_blanks_before_words_are_not_lost():
    words = tokenizer(decoders.Metaspace())
    ids = words.convert_tokens_to_ids(["▁the", "▁cat", "▁the"])
    assert token_texts(words, ids) == ["the", " cat", " the"]
