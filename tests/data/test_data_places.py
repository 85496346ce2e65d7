"""Places from the bytes of tokens equal the tokenizer's offsets, which take longer."""

import json
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from treering.data.config import Data
from treering.data.encode import Encoder
from treering.data.encoding_recipe import recipe
from treering.data.formats import Sample
from treering.data.token_places import _MANY, Offsets, Placer, Spelled, Tokens

TEXT = st.text(st.sampled_from("ab Z9\n\té😀ñ語\u0301\u200b'<|"), max_size=30)
PIECES = st.lists(
    st.one_of(TEXT, st.sampled_from(("<|im_start|>", "<eos>", "<think>", " the", "function"))), max_size=8
)


def bare(backend: str, **parts) -> str:
    return json.dumps({**json.loads(backend), "post_processor": None, **parts})


def placer(backend: str) -> Placer:
    return Placer(Tokenizer.from_str(backend), json.loads(backend))


def placed(under_test: Placer, *texts: str) -> list[Tokens]:
    return under_test.place(texts, under_test.encode(texts))


@pytest.fixture(scope="module")
def byte_level(backend) -> tuple[Tokenizer, Placer]:
    return Tokenizer.from_str(bare(backend)), placer(bare(backend))


@settings(max_examples=300, deadline=None)
@given(pieces=PIECES, data=st.data())
def test_spelling_and_offsets_give_the_same_tokens(byte_level, pieces, data):
    tokenizer, under_test = byte_level
    text = "".join(pieces)
    borders = sorted(data.draw(st.lists(st.integers(0, len(text)), min_size=8, max_size=8)))
    low, start, end, high = borders[::2]
    limits, spans = [(low, high), (end, borders[7])], [(start, end), (borders[5], borders[7])]
    (spelled,) = placed(under_test, text)
    assert isinstance(spelled, Spelled)
    offsets = Offsets(tokenizer.encode(text, add_special_tokens=False))
    assert spelled.ids.tolist() == offsets.ids.tolist()
    for bounds in (limits, spans):
        expected = [(a, b) for a, b in offsets.ranges(spans, bounds) if a < b]
        assert [(a, b) for a, b in spelled.ranges(spans, bounds) if a < b] == expected


@settings(max_examples=300, deadline=None)
@given(pieces=PIECES, borders=st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)), min_size=1, max_size=8))
@pytest.mark.parametrize("normalizer", [None, {"type": "NFC"}, {"type": "Strip", "strip_left": True}], ids=str)
def test_many_spans_are_found_in_a_table_as_few_are_by_asking(backend, normalizer, pieces, borders):
    text = "".join(pieces)
    tokenizer = Tokenizer.from_str(bare(backend, normalizer=normalizer and {"strip_right": True, **normalizer}))
    offsets = Offsets(tokenizer.encode(text, add_special_tokens=False))
    spans = [(min(a, len(text)), min(b, len(text))) for a, b in borders]
    limits = [(0, len(text))] * len(spans)
    asked = offsets.ranges(spans, limits)
    assert offsets._in_order
    assert offsets.ranges(spans * _MANY, limits * _MANY) == asked * _MANY


def test_a_text_of_many_turns_asks_for_no_token_by_reading_all(backend, monkeypatch):
    tokenizer = Tokenizer.from_str(bare(backend, normalizer={"type": "NFC"}))
    text = "cafe\u0301 " * 5_000
    spans = [(i, i + 5) for i in range(0, len(text), 6)]
    offsets = Offsets(tokenizer.encode(text, add_special_tokens=False))
    monkeypatch.setattr(Offsets, "_overlapping", None)
    assert len(offsets.ranges(spans, spans)) == 5_000


def test_nothing_overlaps_an_empty_span_inside_a_token(byte_level):
    _, under_test = byte_level
    (tokens,) = placed(under_test, "99 the")
    assert tokens.ranges([(3, 4)], [(0, 6)]) == [(len(tokens.ids) - 1, len(tokens.ids))]
    ((first, stop),) = tokens.ranges([(3, 3)], [(0, 6)])
    assert first == stop


def test_a_text_that_a_normalizer_changes_is_placed_by_offsets_and_its_neighbours_are_not(backend):
    under_test = placer(bare(backend, normalizer={"type": "NFC"}))
    composed, apart = "caf\u00e9 au lait", "cafe\u0301 au lait"
    assert unicodedata.normalize("NFC", apart) == composed
    kinds = [type(tokens) for tokens in placed(under_test, composed, apart, "plain")]
    assert kinds == [Spelled, Offsets, Spelled]


def test_a_token_that_includes_spaces_is_placed_by_offsets(backend):
    state = json.loads(bare(backend))
    for token in state["added_tokens"]:
        token["lstrip"] = token["content"] == "<eos>"
    tight, wide = placed(placer(json.dumps(state)), "a<eos>", "a  <eos>")
    assert isinstance(tight, Spelled) and isinstance(wide, Offsets)
    assert tight.ids.tolist() == wide.ids.tolist()


def test_a_space_that_the_tokenizer_adds_is_no_part_of_the_text(backend):
    spaced = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    (tokens,) = placed(placer(bare(backend, pre_tokenizer=spaced)), "the end")
    assert isinstance(tokens, Offsets) and tokens.ranges([(0, 3)], [(0, 3)]) == [(0, 1)]


def test_masks_are_the_same_for_a_tokenizer_that_is_not_byte_level(tokenizer):
    """One token a character: which ones are trained can be read off the text."""
    letters = {c: i for i, c in enumerate("▁abcdefghijklmnopqrstuvwxyz\n?._<>|")}
    backend = Tokenizer(models.BPE(vocab=letters, merges=[], unk_token="?"))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split("▁", "isolated")
    backend.decoder = decoders.Replace("▁", " ")
    foreign = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", bos_token="<|im_start|>")
    foreign.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    foreign.chat_template = tokenizer.chat_template
    messages = [{"role": "user", "content": "who is it"}, {"role": "assistant", "content": "it is me"}]
    under_test = Encoder(recipe(foreign, Data(train="train.jsonl"), "messages"))
    ((document,),) = under_test.encode([Sample(kind="chat", where="f:1", file=0, row=1, messages=messages)])
    trained = [id for id, trained in zip(document.ids.tolist(), document.mask.tolist(), strict=True) if trained]
    assert foreign.decode(trained) == "it is me<|im_end|>"
